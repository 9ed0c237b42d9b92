"""Scorers rank the spans of each level (paper, section 3.1).

A scorer maps q, k, v to one query score and one key score per token and kv head. The score of an
entry of a coarser level is the maximum over its tokens, separately for q and k. Scores only rank
entries. They have no gradient and no parameters.

    norm      the L2 norms of q and k
    dilated   the L2 norms of two attention outputs, q over k and k over q, both with values v;
              attention is causal within each residue class of the tokens
    gla       the same with gated linear attention over all tokens

The scores are squared norms, which have the same order. One pass over q, k, v computes the scores
of `norm` and the pooled coarsest level, so that the gather need not read all tokens again. The
other scorers use this pass for the coarsest level only. Its scores are cheap compared with theirs.
Activation checkpointing saves the scores of `dilated` and `gla` (`ops.OPS_TO_SAVE`).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from lighthouse.config import LighthouseConfig
from lighthouse.gla import gated_linear_attention
from lighthouse.ops import register
from lighthouse.rotary import RotaryPhases, rotate_to_last, table_arguments
from lighthouse.sdpa import causal_sdpa


class Scores(NamedTuple):
    """Scores of all entries above the finest level, concatenated from level 1 to level L-1."""

    q: torch.Tensor
    """Query scores, [B, Hkv, E - N], fp32."""

    k: torch.Tensor
    """Key scores, [B, Hkv, E - N], fp32."""


class CoarsestLevel(NamedTuple):
    """Means of q, k, v over the spans of the coarsest level, in their dtype. No gradient."""

    q: torch.Tensor
    """[B, H, N/p**(L-1), D]"""

    k: torch.Tensor
    """[B, Hkv, N/p**(L-1), D]"""

    v: torch.Tensor
    """[B, Hkv, N/p**(L-1), D]"""


def score(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    config: LighthouseConfig,
    rotary: RotaryPhases | None = None,
) -> tuple[Scores, CoarsestLevel]:
    """Score every span and pool the coarsest level.

    Args:
        q: [B, H, N, D], any strides.
        k, v: [B, Hkv, N, D], any strides.
        rotary: if given, q and k are rotated to the last position of a span before pooling.
            Scores do not use it.
    """
    with torch.no_grad():
        return SCORERS[config.scorer](q, k, v, config, rotary)


def norm_scorer(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    config: LighthouseConfig,
    rotary: RotaryPhases | None = None,
) -> tuple[Scores, CoarsestLevel]:
    """The L2 norm of q and of k; with GQA, the maximum over a group's query heads."""
    q_scores, k_scores, *coarsest = _norm_score_pool(
        q, k, v, config.num_levels, config.pooling_factor, *table_arguments(rotary)
    )
    return Scores(q_scores, k_scores), CoarsestLevel(*coarsest)


def dilated_scorer(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    config: LighthouseConfig,
    rotary: RotaryPhases | None = None,
) -> tuple[Scores, CoarsestLevel]:
    """Causal softmax attention within each residue class modulo `dilation`, q over k and k over q.

    Token t attends to token s <= t if t - s is a multiple of `dilation`. The scale is 1/sqrt(D).
    With GQA each query head attends to the k of its kv head, and that k attends to each query head
    of the group. Both scores are the maximum over the group. With one head per group this is the
    paper's scorer.

    The cost is 2 / dilation of the forward pass of dense attention, O(N**2 D / dilation). There is
    no backward pass. Attention is fused and stores nothing of size N * N.
    """
    scores = _dilated_scores(q, k, v, config.num_levels, config.pooling_factor, config.dilation)
    return Scores(*scores), norm_scorer(q, k, v, config, rotary)[1]


def gla_scorer(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    config: LighthouseConfig,
    rotary: RotaryPhases | None = None,
) -> tuple[Scores, CoarsestLevel]:
    """Gated linear attention over all tokens, q over k and k over q; GQA as in `dilated_scorer`.

    The cost is O(N D**2). Plain PyTorch needs memory for about eight copies of v in fp32.
    """
    scores = _gla_scores(q, k, v, config.num_levels, config.pooling_factor)
    return Scores(*scores), norm_scorer(q, k, v, config, rotary)[1]


SCORERS = {"norm": norm_scorer, "dilated": dilated_scorer, "gla": gla_scorer}


def pool_scores(token_scores: torch.Tensor, num_levels: int, pooling_factor: int) -> torch.Tensor:
    """Scores of the levels above the finest, concatenated.

    Args:
        token_scores: [B, Hkv, N].

    Returns:
        [B, Hkv, E - N]; the score of an entry is the maximum over its tokens.
    """
    levels = [token_scores]
    for _ in range(1, num_levels):
        levels.append(levels[-1].unflatten(-1, (-1, pooling_factor)).amax(-1))
    return torch.cat(levels[1:], -1)


def squared_norms(x: torch.Tensor, n_kv_heads: int) -> torch.Tensor:
    """Squared L2 norm per token, the maximum over the query heads of each kv head.

    Args:
        x: [B, H, N, D].

    Returns:
        [B, Hkv, N], fp32 (fp64 for fp64 input).
    """
    x = x if x.dtype == torch.float64 else x.float()
    return x.square().sum(-1).unflatten(1, (n_kv_heads, -1)).amax(2)


def norm_score_pool_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    num_levels: int,
    pooling_factor: int,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    n_kv_heads = k.shape[1]
    span = pooling_factor ** (num_levels - 1)
    scores = [pool_scores(squared_norms(x, n_kv_heads), num_levels, pooling_factor) for x in (q, k)]
    coarsest = [mean_pool(x, span, cos, sin, interleaved) for x in (q, k)]
    return *scores, *coarsest, mean_pool(v, span)


def _empty_scores(k: torch.Tensor, num_levels: int, pooling_factor: int) -> list[torch.Tensor]:
    batch, n_kv_heads, seq_len, _ = k.shape
    num_scores = sum(seq_len // pooling_factor**level for level in range(1, num_levels))
    dtype = torch.promote_types(k.dtype, torch.float32)
    return [k.new_empty((batch, n_kv_heads, num_scores), dtype=dtype) for _ in range(2)]


def _norm_score_pool_fake(q, k, v, num_levels, pooling_factor, *_):
    coarsest_len = k.shape[2] // pooling_factor ** (num_levels - 1)
    coarsest = [x.new_empty((*x.shape[:2], coarsest_len, x.shape[3])) for x in (q, k, v)]
    return *_empty_scores(k, num_levels, pooling_factor), *coarsest


_norm_score_pool = register(
    "norm_score_pool", norm_score_pool_reference, _norm_score_pool_fake, kernels="scorers"
)


def dilated_scores_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    num_levels: int,
    pooling_factor: int,
    dilation: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    def attend(q, k, v):
        out = causal_sdpa(*(_residue_classes(x, dilation) for x in (q, k, v)))
        classes = out.unflatten(1, (dilation, -1))  # [B, dilation, Hkv, N / dilation, D]
        return classes.movedim(1, 3).flatten(2, 3)[:, :, : q.shape[2]]

    return _both_ways(attend, q, k, v, num_levels, pooling_factor)


def gla_scores_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num_levels: int, pooling_factor: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return _both_ways(gated_linear_attention, q, k, v, num_levels, pooling_factor)


def _scores_fake(q, k, v, num_levels, pooling_factor, *_):
    return tuple(_empty_scores(k, num_levels, pooling_factor))


_dilated_scores = register("dilated_scores", dilated_scores_reference, _scores_fake, save=True)
_gla_scores = register("gla_scores", gla_scores_reference, _scores_fake, save=True)


def _both_ways(
    attend: Callable[..., torch.Tensor],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    num_levels: int,
    pooling_factor: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of the levels above the finest by `attend(q, k, v)` and `attend(k, q, v)`."""
    n_kv_heads = k.shape[1]
    by_head = [
        (squared_norms(attend(x, k, v), n_kv_heads), squared_norms(attend(k, x, v), n_kv_heads))
        for x in q.unflatten(1, (n_kv_heads, -1)).unbind(2)
    ]
    return tuple(
        pool_scores(torch.stack(scores).amax(0), num_levels, pooling_factor)
        for scores in zip(*by_head, strict=True)
    )


def _residue_classes(x: torch.Tensor, dilation: int) -> torch.Tensor:
    """[B, H, N, D] to [B, dilation * H, N / dilation, D], with N padded with zeros at the end.

    The result is a view of the model's [B, N, H, D] if `dilation` divides N.
    """
    missing = -x.shape[2] % dilation
    padded = F.pad(x, (0, 0, 0, missing)) if missing else x
    return padded.unflatten(2, (-1, dilation)).movedim(3, 1).flatten(1, 2)


_CHUNK = 2**18
"""Elements that `mean_pool` rotates at a time. They fit into the caches of a CPU."""


def mean_pool(
    x: torch.Tensor,
    span: int,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    interleaved: bool = False,
) -> torch.Tensor:
    """Means over `span` tokens, accumulated in fp32 (fp64 for fp64 input).

    Args:
        x: [B, H, N, D].
        cos, sin, interleaved: a table as in `RotaryPhases`; None means no rotation.

    Returns:
        [B, H, N/span, D], contiguous.
    """
    accumulate = torch.promote_types(x.dtype, torch.float32)
    spans = x.unflatten(2, (-1, span))
    if cos is None:
        return spans.mean(3, dtype=accumulate).to(x.dtype).contiguous()
    pooled = x.new_empty((*x.shape[:2], x.shape[2] // span, x.shape[3]))
    chunk_len = max(1, _CHUNK // (x.shape[0] * x.shape[1] * span * x.shape[3]))
    for chunk, out in zip(spans.split(chunk_len, 2), pooled.split(chunk_len, 2), strict=True):
        out.copy_(rotate_to_last(chunk.to(accumulate), cos, sin, interleaved).mean(3))
    return pooled
