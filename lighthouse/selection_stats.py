"""Statistics of a selection.

    refined share    fraction of the entries of a level that is selected
    coverage         fraction of the positions with a contribution from a level
    head overlap     fraction of the entries selected by one kv head that another also selects
    attention on level 0
                     fraction of dense attention on tokens that are level-0 entries

Refined share and coverage follow from the configuration, except at the end of the sequence: k of
N/p**l entries are selected. They are the values of the other two statistics at random. Two heads
that select independently overlap by the refined share. Uniform attention puts a fraction equal to
the coverage of level 0 on level 0.

Nothing here has a gradient. Memory grows with the entries and with rows times N, never N * N.
"""

import torch

from lighthouse.config import LighthouseConfig
from lighthouse.scorers import score
from lighthouse.selection import Selection, select_spans

NUM_ROWS = 16
"""Query rows for which dense attention is computed. For 2**20 tokens 16 take 64 MiB per head."""


@torch.no_grad()
def measure(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, config: LighthouseConfig
) -> dict[str, float]:
    """All statistics of a layer's q, k, v, as means over sequences, heads and rows.

    Args:
        q: [B, H, N, D]; k, v: [B, Hkv, N, D]. They hold whole sequences.

    Returns:
        `refined_share/level_1` and so on. Head overlap is left out if there is one kv head.
    """
    seq_len = q.shape[2]
    selection = select_spans(score(q, k, v, config)[0], config, seq_len)
    # Each statistic with its first level.
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
    """Fraction of the entries of levels 1 .. L-1 that is selected: [L-1], fp64."""
    levels = range(1, selection.config.num_levels)
    return torch.stack([_is_refined(selection, level).double().mean() for level in levels])


def coverage(selection: Selection) -> torch.Tensor:
    """Fraction of the positions with a contribution from levels 0 .. L-1: [L], fp64."""
    shares = []
    for level in range(selection.config.num_levels):
        span = selection.config.span(level)
        is_present = _is_present(selection, level)
        # An entry reaches `span` positions from its last token on. The last entry reaches one.
        num_reached = span * is_present.sum(-1) - (span - 1) * is_present[..., -1].int()
        shares.append(num_reached.double().mean() / selection.seq_len)
    return torch.stack(shares)


def head_overlap(selection: Selection) -> torch.Tensor:
    """Fraction of the k entries selected by one kv head that another also selects.

    Returns:
        [L-1] for levels 1 .. L-1, fp64: the mean over sequences and pairs of different heads.
    """
    num_heads = selection.entry_to_slot.shape[1]
    assert num_heads > 1
    overlaps = []
    for level in range(1, selection.config.num_levels):
        # n heads that select an entry form n * (n - 1) ordered pairs.
        num_selecting = _is_refined(selection, level).sum(1)  # [B, N/p**l]
        num_shared = (num_selecting * (num_selecting - 1)).sum(-1).double().mean()
        overlaps.append(num_shared / (num_heads * (num_heads - 1) * selection.config.topk))
    return torch.stack(overlaps)


def attention_on_level_0(
    q: torch.Tensor, k: torch.Tensor, selection: Selection, rows: torch.Tensor
) -> torch.Tensor:
    """Fraction of causal dense attention on tokens that are level-0 entries of the sub-sequence.

    Args:
        q: [B, H, N, D]; k: [B, Hkv, N, D].
        rows: positions of the queries, [R], int64.

    Returns:
        [B, H, R], fp32 (fp64 for fp64 inputs).
    """
    group = q.shape[1] // k.shape[1]
    dtype = torch.promote_types(q.dtype, torch.float32)
    is_later = torch.arange(q.shape[2], device=q.device) > rows[:, None]  # [R, N]
    is_present = _is_present(selection, 0).to(dtype)
    parts = q.new_empty((*q.shape[:2], len(rows)), dtype=dtype)
    # Autocast would lower the precision of the products below fp32.
    with torch.autocast(q.device.type, enabled=False):
        for b in range(q.shape[0]):
            for h in range(q.shape[1]):
                g = h // group
                logits = q[b, h, rows].to(dtype) @ k[b, g].to(dtype).T * q.shape[3] ** -0.5
                weights = logits.masked_fill_(is_later, -torch.inf).softmax(-1)
                parts[b, h] = weights @ is_present[b, g]
    return parts


def sample_rows(seq_len: int) -> torch.Tensor:
    """Random positions, ascending, [R], the same each time. The global generator is not used."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(seq_len, (NUM_ROWS,), generator=generator).sort().values


def _is_present(selection: Selection, level: int) -> torch.Tensor:
    """Whether each entry of a level is in the sub-sequence, [B, Hkv, N/p**l]."""
    start = selection.config.level_offset(level, selection.seq_len)
    length = selection.config.level_len(level, selection.seq_len)
    return selection.entry_to_slot[..., start : start + length] >= 0


def _is_refined(selection: Selection, level: int) -> torch.Tensor:
    """Whether each entry of a level above the finest is selected, [B, Hkv, N/p**l]. The children of
    a selected entry are in the sub-sequence."""
    return _is_present(selection, level - 1)[..., :: selection.config.pooling_factor]
