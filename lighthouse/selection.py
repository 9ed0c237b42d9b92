"""Selection of the entries of the sub-sequence and of their order (paper, 3.2).

Selection runs level by level, from the coarsest level down, independently in each of T strata:

    candidates(L-1) = the stratum's part of the coarsest level
    for level l = L-1 .. 1:
        selected(l)     = 64 best candidates by q score, then 64 best of the rest by k score
        candidates(l-1) = children of selected(l)

All candidates of all levels are the S entries of the sub-sequence. They are ordered by a
post-order walk of the tree: a selected entry comes after all its descendants. Computing the slots
needs no sort. With the weights

    w(entry) = 1                            not selected, or on level 0
             = 1 + sum of w(children)       selected

an entry and its descendants occupy `w` slots from its start on, and the entry itself has the last
of these slots. On the coarsest level, starts are exclusive prefix sums of the weights. Below it,
they are the parent's start plus exclusive prefix sums of the weights of the siblings.

Ties go to the lowest index. Entry 0 of every level above the finest is always selected, so that
every output position has a contribution. Under context parallelism this applies to the first
entries of the whole sequence only. Nothing here has a gradient.
"""

from dataclasses import dataclass

import torch

from lighthouse.config import SELECTED_PER_STRATUM, LighthouseConfig
from lighthouse.ops import register
from lighthouse.scorers import Scores, pool_scores


@dataclass(frozen=True)
class Selection:
    """Two inverse maps between slots of the sub-sequence and entries of the pyramid.

    An entry has one flat id: entry i of level l has `config.level_offset(l, seq_len) + i`.
    """

    slot_to_entry: torch.Tensor
    """Id of the entry in each slot, [B, Hkv, S], int32."""

    entry_to_slot: torch.Tensor
    """Slot of each entry, -1 for an absent entry, [B, Hkv, E], int32."""

    config: LighthouseConfig
    seq_len: int

    @property
    def level(self) -> torch.Tensor:
        """Level of the entry in each slot, [B, Hkv, S], int32."""
        level = torch.zeros_like(self.slot_to_entry)
        for coarser in range(1, self.config.num_levels):
            level += self.slot_to_entry >= self.config.level_offset(coarser, self.seq_len)
        return level

    @property
    def index(self) -> torch.Tensor:
        """Index within its level of the entry in each slot, [B, Hkv, S], int32."""
        index = self.slot_to_entry.clone()
        for level in range(1, self.config.num_levels):
            above = self.slot_to_entry >= self.config.level_offset(level, self.seq_len)
            index -= above * self.config.level_len(level - 1, self.seq_len)
        return index


def select(q_scores: torch.Tensor, k_scores: torch.Tensor, config: LighthouseConfig) -> Selection:
    """Select entries by the scores of the tokens.

    Args:
        q_scores, k_scores: [B, Hkv, N]; higher is better, NaN is not allowed.

    Raises:
        ValueError: other shapes, scores that are not floating-point, or N that is not legal under
            `config`.
    """
    is_float = q_scores.is_floating_point() and k_scores.is_floating_point()
    if not is_float or q_scores.dim() != 3 or q_scores.shape != k_scores.shape:
        raise ValueError(
            "q_scores and k_scores must both be [B, Hkv, N] and floating-point, got "
            f"{list(q_scores.shape)} {q_scores.dtype} and {list(k_scores.shape)} {k_scores.dtype}; "
            "reshape or convert them"
        )
    seq_len = q_scores.shape[-1]
    config.check_seq_len(seq_len)
    scores = Scores(
        *(pool_scores(x, config.num_levels, config.pooling_factor) for x in (q_scores, k_scores))
    )
    return select_spans(scores, config, seq_len)


def select_spans(
    scores: Scores, config: LighthouseConfig, seq_len: int, is_start: bool = True
) -> Selection:
    """Select entries by the scores that `scorers.score` returns.

    Args:
        is_start: whether the tokens are at the start of their sequence.
    """
    with torch.no_grad():
        entry, slot = _select(
            *scores, config.num_levels, config.pooling_factor, config.topk, seq_len, is_start
        )
    return Selection(entry, slot, config, seq_len)


def select_reference(
    q_scores: torch.Tensor,
    k_scores: torch.Tensor,
    num_levels: int,
    pooling_factor: int,
    topk: int,
    seq_len: int,
    is_start: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    lens = [seq_len // pooling_factor**level for level in range(num_levels)]
    offsets = [sum(lens[:level]) for level in range(num_levels)]
    num_strata = topk // SELECTED_PER_STRATUM
    shape = (*q_scores.shape[:2], num_strata)

    # Down: candidates of each level, and the positions of the selected ones among them.
    candidates = [None] * num_levels  # [B, Hkv, T, C], index within the level, ascending
    chosen = [None] * num_levels  # [B, Hkv, T, 128], position among the candidates, ascending
    coarsest = torch.arange(lens[-1], device=q_scores.device)
    candidates[-1] = coarsest.view(num_strata, -1).expand(*shape, -1)
    children = torch.arange(pooling_factor, device=q_scores.device)
    for level in range(num_levels - 1, 0, -1):
        # Scores have no level 0, so their offsets are lower by seq_len.
        ids = (candidates[level] + (offsets[level] - seq_len)).flatten(2)
        q_cand, k_cand = (x.gather(-1, ids).view(*shape, -1) for x in (q_scores, k_scores))
        if is_start:
            # Entry 0 is the first candidate of the first stratum on every level.
            q_cand[:, :, 0, 0] = torch.inf
        chosen[level] = _best_by_q_then_k(q_cand, k_cand)
        parents = candidates[level].gather(-1, chosen[level])
        candidates[level - 1] = (parents[..., None] * pooling_factor + children).flatten(-2)

    # Up: weights. Down: starts and slots.
    weights = [torch.ones_like(level_candidates) for level_candidates in candidates]
    for level in range(1, num_levels):
        of_children = weights[level - 1].unflatten(-1, (-1, pooling_factor)).sum(-1)
        weights[level].scatter_(-1, chosen[level], 1 + of_children)
    weight = weights[-1].flatten(2)
    start = (weight.cumsum(-1) - weight).view_as(weights[-1])
    sub_seq_len = lens[-1] + (num_levels - 1) * pooling_factor * topk
    entry = q_scores.new_empty((*shape[:2], sub_seq_len), dtype=torch.int32)
    slot = q_scores.new_full((*shape[:2], sum(lens)), -1, dtype=torch.int32)
    for level in range(num_levels - 1, -1, -1):
        slots = (start + weights[level] - 1).flatten(2)
        ids = (candidates[level] + offsets[level]).flatten(2)
        entry.scatter_(-1, slots, ids.int())
        slot.scatter_(-1, ids, slots.int())
        if level:
            siblings = weights[level - 1].unflatten(-1, (-1, pooling_factor))
            before = siblings.cumsum(-1) - siblings
            start = (start.gather(-1, chosen[level])[..., None] + before).flatten(-2)
    return entry, slot


def _select_fake(q_scores, k_scores, num_levels, pooling_factor, topk, seq_len, is_start):
    lens = [seq_len // pooling_factor**level for level in range(num_levels)]
    sub_seq_len = lens[-1] + (num_levels - 1) * pooling_factor * topk
    shape = q_scores.shape[:2]
    entry = q_scores.new_empty((*shape, sub_seq_len), dtype=torch.int32)
    return entry, q_scores.new_empty((*shape, sum(lens)), dtype=torch.int32)


_select = register("select", select_reference, _select_fake, kernels="selection", save=True)


def _best_by_q_then_k(q_scores: torch.Tensor, k_scores: torch.Tensor) -> torch.Tensor:
    """The 64 best by q score, and the 64 best of the rest by k score.

    Args:
        q_scores, k_scores: [..., C], C >= 128.

    Returns:
        Positions, [..., 128], ascending.
    """
    half = SELECTED_PER_STRATUM // 2
    by_q = q_scores.sort(dim=-1, descending=True, stable=True).indices[..., :half]
    is_chosen = torch.zeros_like(q_scores, dtype=torch.bool).scatter_(-1, by_q, True)
    order = k_scores.sort(dim=-1, descending=True, stable=True).indices
    is_left = ~is_chosen.gather(-1, order)
    is_best = is_left & (is_left.cumsum(-1) <= half)
    is_chosen.scatter_(-1, order, is_chosen.gather(-1, order) | is_best)
    return is_chosen.nonzero()[:, -1].view(*q_scores.shape[:-1], SELECTED_PER_STRATUM)
