"""What is selected, in a few numbers: how much, by how many heads alike, and how well.

    refined share    selected entries of a level, of all of it
    coverage         positions that get a contribution of a level, of all of them
    head overlap     entries that two kv heads both select, of those that one selects
    attention on level 0
                     the part of dense attention that falls on tokens which are entries themselves

Share and coverage follow from the configuration, up to the end of the sequence: k of N/p**l entries
are selected. They say what the other two would be by chance: two heads that select independently
overlap by the refined share, and attention spread evenly puts the coverage of level 0 there.

Nothing here has a gradient. Memory grows with the entries and with rows times N, never N * N.
"""

import torch

from lighthouse.config import LighthouseConfig
from lighthouse.scorers import score
from lighthouse.selection import Selection, select_spans

NUM_ROWS = 16
"""Query rows whose dense attention is computed: 16 of a million tokens take 64 MiB for a head."""


@torch.no_grad()
def measure(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, config: LighthouseConfig
) -> dict[str, float]:
    """All of the above, means over sequences, heads and rows, for what a layer attends with.

    Args:
        q: [B, H, N, D]; k, v: [B, Hkv, N, D]: whole sequences.

    Returns:
        `refined_share/level_1` and so on; no head overlap for one kv head.
    """
    seq_len = q.shape[2]
    selection = select_spans(score(q, k, v, config)[0], config, seq_len)
    # Each with its first level.
    by_level = {
        "refined_share": (1, refined_share(selection)),
        "coverage": (0, coverage(selection)),
    }
    if k.shape[1] > 1:
        by_level["head_overlap"] = (1, head_overlap(selection))
    rows = sample_rows(seq_len).to(q.device)
    return {
        f"{name}/level_{level}": value
        for name, (first, values) in by_level.items()
        for level, value in enumerate(values.tolist(), first)
    } | {"attention_on_level_0": attention_on_level_0(q, k, selection, rows).mean().item()}


def refined_share(selection: Selection) -> torch.Tensor:
    """Part of the entries of levels 1 .. L-1 that is selected: [L-1], fp64."""
    levels = range(1, selection.config.num_levels)
    return torch.stack([_is_refined(selection, level).double().mean() for level in levels])


def coverage(selection: Selection) -> torch.Tensor:
    """Part of the positions that gets a contribution of levels 0 .. L-1: [L], fp64."""
    shares = []
    for level in range(selection.config.num_levels):
        span = selection.config.span(level)
        is_present = _is_present(selection, level)
        # An entry reaches `span` positions from its last token on, the last entry that one alone.
        num_reached = span * is_present.sum(-1) - (span - 1) * is_present[..., -1].int()
        shares.append(num_reached.double().mean() / selection.seq_len)
    return torch.stack(shares)


def head_overlap(selection: Selection) -> torch.Tensor:
    """Entries of levels 1 .. L-1 that two kv heads both select, of the k that each selects.

    Returns:
        [L-1], fp64: the mean over sequences and over pairs of different heads.
    """
    num_heads = selection.entry_to_slot.shape[1]
    assert num_heads > 1
    overlaps = []
    for level in range(1, selection.config.num_levels):
        # Each entry is shared by as many ordered pairs of the heads that select it.
        num_selecting = _is_refined(selection, level).sum(1)  # [B, N/p**l]
        num_shared = (num_selecting * (num_selecting - 1)).sum(-1).double().mean()
        overlaps.append(num_shared / (num_heads * (num_heads - 1) * selection.config.topk))
    return torch.stack(overlaps)


def attention_on_level_0(
    q: torch.Tensor, k: torch.Tensor, selection: Selection, rows: torch.Tensor
) -> torch.Tensor:
    """Part of causal dense attention that falls on tokens which the sub-sequence holds on level 0.

    Args:
        q: [B, H, N, D]; k: [B, Hkv, N, D].
        rows: positions of the queries to look at, [R], int64.

    Returns:
        [B, H, R], fp32 (fp64 for fp64 inputs).
    """
    group = q.shape[1] // k.shape[1]
    dtype = torch.promote_types(q.dtype, torch.float32)
    is_later = torch.arange(q.shape[2], device=q.device) > rows[:, None]  # [R, N]
    is_present = _is_present(selection, 0).to(dtype)
    parts = q.new_empty((*q.shape[:2], len(rows)), dtype=dtype)
    # Autocast would multiply in less than fp32.
    with torch.autocast(q.device.type, enabled=False):
        for b in range(q.shape[0]):
            for h in range(q.shape[1]):
                g = h // group
                logits = q[b, h, rows].to(dtype) @ k[b, g].to(dtype).T * q.shape[3] ** -0.5
                weights = logits.masked_fill_(is_later, -torch.inf).softmax(-1)
                parts[b, h] = weights @ is_present[b, g]
    return parts


def sample_rows(seq_len: int, num_rows: int = NUM_ROWS) -> torch.Tensor:
    """The same random positions each time, ascending, [R]; the global generator is left alone."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(seq_len, (num_rows,), generator=generator).sort().values


def _is_present(selection: Selection, level: int) -> torch.Tensor:
    """Whether each entry of a level is in the sub-sequence, [B, Hkv, N/p**l]."""
    start = selection.config.level_offset(level, selection.seq_len)
    length = selection.config.level_len(level, selection.seq_len)
    return selection.entry_to_slot[..., start : start + length] >= 0


def _is_refined(selection: Selection, level: int) -> torch.Tensor:
    """Whether each entry of a level above the finest is selected, which is when its children are
    present, [B, Hkv, N/p**l]."""
    return _is_present(selection, level - 1)[..., :: selection.config.pooling_factor]
