"""Lighthouse Attention as plain loops in fp64, the reference for all tests.

It follows the paper line by line, one batch element and one kv head at a time. It builds the tree
explicitly and shares no code with the rest of the library. It is slow; use it for up to a few
thousand tokens. Gradients come from autograd through the loops.
"""

import math

import torch


def reference_attention(
    q,
    k,
    v,
    num_levels,
    pooling_factor,
    topk,
    scorer="norm",
    dilation=4,
    entries=None,
    rope=None,
    first_position=0,
):
    """The whole layer, computed in fp64.

    Args:
        q: [B, H, N, D]; k, v: [B, Hkv, N, D]. With `rope`, q and k are *not* rotated yet.
        rope: rotary embedding `rope(x, position)` of one row [D]. The mean of the tokens of an
            entry is rotated by the position of its last token.
        first_position: position of the first token.
        entries: selected entries to use instead of scores, `entries[b][g]` as
            `reference_selection` returns them.

    Returns:
        [B, H, N, D], fp64.
    """
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[1] // k.shape[1]
    if entries is None:
        scored = [x.detach() for x in (q, k, v)]
        if rope is not None and scorer != "norm":
            positions = range(first_position, first_position + q.shape[2])
            for i in range(2):
                rows = [rope(scored[i][:, :, t - first_position], t) for t in positions]
                scored[i] = torch.stack(rows, 2)
        scores = reference_scores(*scored, scorer, dilation)
    batches = []
    for b in range(q.shape[0]):
        heads = []
        for g in range(k.shape[1]):
            group_q = q[b, g * group : (g + 1) * group]
            if entries is None:
                token_scores = (x[b, g].tolist() for x in scores)
                order = reference_selection(*token_scores, num_levels, pooling_factor, topk)
            else:
                order = entries[b][g]
            for head_q in group_q:
                heads.append(
                    _reference_head(
                        head_q, k[b, g], v[b, g], order, pooling_factor, rope, first_position
                    )
                )
        batches.append(torch.stack(heads))
    return torch.stack(batches)


def reference_scores(q, k, v, scorer, dilation=4):
    """Scores of the tokens.

    Args:
        q: [B, H, N, D]; k, v: [B, Hkv, N, D]. Computed in fp64.

    Returns:
        q_scores and k_scores, [B, Hkv, N].
    """
    q, k, v = q.double(), k.double(), v.double()
    if scorer not in ("norm", "dilated", "gla"):
        raise ValueError(f"there is no reference for the scorer {scorer!r}; add a branch below")
    group = q.shape[1] // k.shape[1]
    scores = torch.zeros(2, *k.shape[:3], dtype=torch.float64)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            g = h // group
            head_q, head_k, head_v = q[b, h], k[b, g], v[b, g]
            if scorer == "norm":
                outs = head_q, head_k
            elif scorer == "dilated":
                outs = (
                    _dilated_attention(head_q, head_k, head_v, dilation),
                    _dilated_attention(head_k, head_q, head_v, dilation),
                )
            elif scorer == "gla":
                outs = (
                    _gated_linear_attention(head_q, head_k, head_v),
                    _gated_linear_attention(head_k, head_q, head_v),
                )
            for role, out in enumerate(outs):
                scores[role, b, g] = torch.maximum(scores[role, b, g], (out**2).sum(-1))
    return scores.unbind()


def _dilated_attention(q, k, v, dilation):
    """One head, [N, D] to [N, D]. Token t attends to tokens t, t - dilation, t - 2 dilation, ..."""
    outs = []
    for t in range(len(q)):
        seen = list(range(t % dilation, t + 1, dilation))
        outs.append(torch.softmax(k[seen] @ q[t] / math.sqrt(q.shape[1]), 0) @ v[seen])
    return torch.stack(outs)


def _gated_linear_attention(q, k, v):
    """One head, [N, D] to [N, D], token by token."""
    gate = torch.sigmoid(torch.zeros((), dtype=torch.float64)) ** (1 / 16)
    state = torch.zeros(q.shape[1], q.shape[1], dtype=torch.float64)
    outs = []
    for t in range(len(q)):
        state = gate * state + torch.outer(k[t], v[t])
        outs.append(q[t] @ state / math.sqrt(q.shape[1]))
    return torch.stack(outs)


def reference_selection(q_scores, k_scores, num_levels, pooling_factor, topk):
    """Entries of the sub-sequence in causal order.

    Args:
        q_scores, k_scores: one number per token.

    Returns:
        List of (level, index).
    """
    seq_len = len(q_scores)

    def entry_score(token_scores, level, index):
        if index == 0:
            return math.inf
        span = pooling_factor**level
        return max(token_scores[index * span : (index + 1) * span])

    def best(token_scores, level, candidates):
        return sorted(candidates, key=lambda i: (-entry_score(token_scores, level, i), i))[:64]

    num_coarsest = seq_len // pooling_factor ** (num_levels - 1)
    num_strata = topk // 128
    per_stratum = num_coarsest // num_strata
    children_of = {}
    for stratum in range(num_strata):
        candidates = list(range(stratum * per_stratum, (stratum + 1) * per_stratum))
        for level in range(num_levels - 1, 0, -1):
            by_q = best(q_scores, level, candidates)
            by_k = best(k_scores, level, [i for i in candidates if i not in set(by_q)])
            candidates = []
            for i in sorted(by_q + by_k):
                children = [i * pooling_factor + c for c in range(pooling_factor)]
                children_of[level, i] = [(level - 1, child) for child in children]
                candidates += children

    order = []

    def walk(entry):
        for child in children_of.get(entry, []):
            walk(child)
        order.append(entry)

    for i in range(num_coarsest):
        walk((num_levels - 1, i))
    return order


def rope_of(frequencies, interleaved):
    """A rotary embedding for `reference_attention`.

    Args:
        frequencies: angle per position of each pair, [R/2].
        interleaved: pairs of elements 2i and 2i+1, or i and i + R/2.
    """
    num_pairs = len(frequencies)

    def rope(x, position):
        """Multiply x, [..., D], by the rotation matrix of the position."""
        matrix = torch.eye(x.shape[-1], dtype=torch.float64)
        for i, frequency in enumerate(frequencies.tolist()):
            a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + num_pairs)
            cos, sin = math.cos(position * frequency), math.sin(position * frequency)
            matrix[a, a], matrix[a, b], matrix[b, a], matrix[b, b] = cos, -sin, sin, cos
        return x @ matrix.T

    return rope


def _reference_head(q, k, v, order, pooling_factor, rope, first_position):
    """One head, [N, D] to [N, D], over the entries in `order`."""
    seq_len, head_dim = q.shape
    spans = [(i * pooling_factor**level, pooling_factor**level) for level, i in order]
    sub_q, sub_k, sub_v = (
        torch.stack([x[start : start + span].mean(0) for start, span in spans]) for x in (q, k, v)
    )
    if rope is not None:
        last = [first_position + start + span - 1 for start, span in spans]
        sub_q, sub_k = (
            torch.stack([rope(row, position) for row, position in zip(sub, last, strict=True)])
            for sub in (sub_q, sub_k)
        )
    contributions = [[] for _ in range(seq_len)]
    for s, (start, span) in enumerate(spans):
        logits = sub_k[: s + 1] @ sub_q[s] / math.sqrt(head_dim)
        out = torch.softmax(logits, 0) @ sub_v[: s + 1]
        for t in range(start + span - 1, min(start + 2 * span - 1, seq_len)):
            contributions[t].append(out)
    return torch.stack([torch.stack(outs).sum(0) for outs in contributions])
