"""Selection kernel: one program selects all levels of one stratum.

The 64 largest scores are found by bisection over int32 images of the fp32 scores, which have the
same order. At most 32 counts find the 64th largest score, and a prefix sum resolves ties. The
result is a mask in index order, which the slots need.

    down   select level by level; store the rank of each candidate among the selected (-1 for the
           others) and the index of each selected entry
    up     number of slots that each selected entry and its descendants occupy
    down   prefix sums of these sizes along each level give `entry` and `slot` (see selection.py)

A candidate is found through the selected entry above it, and a selected entry through its rank. A
program cannot index its registers, so both are stored in a workspace that stays in the cache. A
stratum owns a contiguous part of every level and of the sub-sequence and writes all of it. It first
fills its part of the slot map below the coarsest level with -1 and then writes the slots.

Bytes moved: B Hkv times 4 E + 8 S written, 8 (N/p**(L-1) + (L-2) p k) of scores read. The chain of
up to 64 (L-1) counts dominates the time. If the candidates fit into one warp, the counts are sums
over its lanes.
"""

import torch
import triton
import triton.language as tl

# Lower than the image of every score, including minus infinity.
_LOWEST = tl.constexpr(-(2**31))
_INFINITY = tl.constexpr(0x7F800000)

_CANDIDATES_PER_WARP = 512
"""16 candidates per lane, in registers."""


@triton.jit
def _select_kernel(
    q_scores_ptr, k_scores_ptr, entry_ptr, slot_ptr, workspace_ptr,
    q_stride_b, q_stride_h, q_stride_e, k_stride_b, k_stride_h, k_stride_e,
    n_kv_heads, num_strata, seq_len, num_entries, sub_seq_len,
    NUM_LEVELS: tl.constexpr, POOLING_FACTOR: tl.constexpr, BLOCK_C: tl.constexpr,
    IS_START: tl.constexpr,
):  # fmt: skip
    TOP: tl.constexpr = NUM_LEVELS - 1
    # Each level stores its ranks, then 128 indices, sizes and starts of the selected entries.
    WIDTH: tl.constexpr = max(BLOCK_C, 128 * POOLING_FACTOR)
    LEVEL_SPACE: tl.constexpr = WIDTH + 3 * 128

    stratum = tl.program_id(0)
    pid_head = tl.program_id(1)
    batch = (pid_head // n_kv_heads).to(tl.int64)
    head = (pid_head % n_kv_heads).to(tl.int64)
    flat_head = pid_head.to(tl.int64)
    # Scores have no level 0. This shift makes them addressable by entry id.
    q_scores_ptr += batch * q_stride_b + head * q_stride_h - seq_len.to(tl.int64) * q_stride_e
    k_scores_ptr += batch * k_stride_b + head * k_stride_h - seq_len.to(tl.int64) * k_stride_e
    entry_ptr += flat_head * sub_seq_len
    slot_ptr += flat_head * num_entries
    workspace_ptr += (flat_head * num_strata + stratum) * (TOP * LEVEL_SPACE)

    num_top = seq_len // POOLING_FACTOR**TOP // num_strata
    for level in tl.static_range(TOP):
        level_start = _level_offset(seq_len, level, POOLING_FACTOR)
        level_count = num_top * POOLING_FACTOR ** (TOP - level)
        _fill_absent(slot_ptr + level_start + stratum * level_count, level_count, 1024)

    _select_levels(
        q_scores_ptr, k_scores_ptr, workspace_ptr, q_stride_e, k_stride_e,
        stratum, num_top, seq_len, NUM_LEVELS, POOLING_FACTOR, BLOCK_C, WIDTH, IS_START,
    )  # fmt: skip
    _store_sizes(workspace_ptr, NUM_LEVELS, POOLING_FACTOR, WIDTH)
    _store_slots(
        entry_ptr, slot_ptr, workspace_ptr, stratum, num_top, seq_len,
        NUM_LEVELS, POOLING_FACTOR, BLOCK_C, WIDTH,
    )  # fmt: skip


@triton.jit
def _select_levels(
    q_scores_ptr, k_scores_ptr, workspace_ptr, q_stride_e, k_stride_e,
    stratum, num_top, seq_len,
    NUM_LEVELS: tl.constexpr, POOLING_FACTOR: tl.constexpr, BLOCK_C: tl.constexpr,
    WIDTH: tl.constexpr, IS_START: tl.constexpr,
):  # fmt: skip
    """Down: select, and store the rank of each candidate and the index of each selected entry."""
    TOP: tl.constexpr = NUM_LEVELS - 1
    NUM_CHILDREN: tl.constexpr = 128 * POOLING_FACTOR
    LEVEL_SPACE: tl.constexpr = WIDTH + 3 * 128
    for level in tl.static_range(TOP, 0, -1):
        ranks_ptr = workspace_ptr + (level - 1) * LEVEL_SPACE
        if level == TOP:
            offs_c = tl.arange(0, BLOCK_C)
            mask_c = offs_c < num_top
            index = stratum * num_top + offs_c
        else:
            offs_c = tl.arange(0, NUM_CHILDREN)
            mask_c = offs_c < NUM_CHILDREN
            index = _children(ranks_ptr + LEVEL_SPACE + WIDTH, offs_c, POOLING_FACTOR)
        ids = (index + _level_offset(seq_len, level, POOLING_FACTOR)).to(tl.int64)
        q_score = tl.load(q_scores_ptr + ids * q_stride_e, mask=mask_c, other=0.0)
        k_score = tl.load(k_scores_ptr + ids * k_stride_e, mask=mask_c, other=0.0)
        q_image = _order_preserving(q_score)
        if IS_START:
            q_image = tl.where(index == 0, _INFINITY, q_image)
        by_q = _best_64(tl.where(mask_c, q_image, _LOWEST))
        by_k = _best_64(tl.where(mask_c & ~by_q, _order_preserving(k_score), _LOWEST))
        is_selected = by_q | by_k
        rank = tl.cumsum(is_selected.to(tl.int32), 0) - 1
        tl.store(ranks_ptr + offs_c, tl.where(is_selected, rank, -1))
        tl.store(ranks_ptr + WIDTH + rank, index, mask=is_selected)
        tl.debug_barrier()


@triton.jit
def _store_sizes(
    workspace_ptr, NUM_LEVELS: tl.constexpr, POOLING_FACTOR: tl.constexpr, WIDTH: tl.constexpr
):
    """Up: store the sizes of the subtrees of the selected entries."""
    NUM_CHILDREN: tl.constexpr = 128 * POOLING_FACTOR
    LEVEL_SPACE: tl.constexpr = WIDTH + 3 * 128
    for level in tl.static_range(2, NUM_LEVELS):
        ranks_ptr = workspace_ptr + (level - 1) * LEVEL_SPACE
        offs_c = tl.arange(0, NUM_CHILDREN)
        weight, _ = _weights(
            ranks_ptr - LEVEL_SPACE, offs_c, NUM_CHILDREN, level - 1, WIDTH, POOLING_FACTOR
        )
        size = 1 + tl.sum(tl.reshape(weight, (128, POOLING_FACTOR)), 1)
        tl.store(ranks_ptr + WIDTH + 128 + tl.arange(0, 128), size)
        tl.debug_barrier()


@triton.jit
def _store_slots(
    entry_ptr, slot_ptr, workspace_ptr, stratum, num_top, seq_len,
    NUM_LEVELS: tl.constexpr, POOLING_FACTOR: tl.constexpr, BLOCK_C: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Down: store the slot of each entry and the entry of each slot."""
    TOP: tl.constexpr = NUM_LEVELS - 1
    NUM_CHILDREN: tl.constexpr = 128 * POOLING_FACTOR
    LEVEL_SPACE: tl.constexpr = WIDTH + 3 * 128
    for level in tl.static_range(TOP, -1, -1):
        ranks_ptr = workspace_ptr + (level - 1) * LEVEL_SPACE
        if level == TOP:
            offs_c = tl.arange(0, BLOCK_C)
            mask_c = offs_c < num_top
            index = stratum * num_top + offs_c
            weight, rank = _weights(ranks_ptr, offs_c, num_top, level, WIDTH, POOLING_FACTOR)
            stratum_start = stratum * (num_top + TOP * NUM_CHILDREN)
            start = stratum_start + tl.cumsum(weight, 0) - weight
        else:
            offs_c = tl.arange(0, NUM_CHILDREN)
            mask_c = offs_c < NUM_CHILDREN
            parents_ptr = ranks_ptr + LEVEL_SPACE + WIDTH
            index = _children(parents_ptr, offs_c, POOLING_FACTOR)
            weight, rank = _weights(ranks_ptr, offs_c, NUM_CHILDREN, level, WIDTH, POOLING_FACTOR)
            siblings = tl.reshape(weight, (128, POOLING_FACTOR))
            before = tl.reshape(tl.cumsum(siblings, 1) - siblings, (NUM_CHILDREN,))
            start = tl.load(parents_ptr + 2 * 128 + offs_c // POOLING_FACTOR) + before
        ids = index + _level_offset(seq_len, level, POOLING_FACTOR)
        slot = start + weight - 1
        tl.store(entry_ptr + slot, ids, mask=mask_c)
        tl.store(slot_ptr + ids, slot, mask=mask_c)
        if level > 0:
            tl.store(ranks_ptr + WIDTH + 2 * 128 + rank, start, mask=mask_c & (rank >= 0))
            tl.debug_barrier()


@triton.jit
def _level_offset(seq_len, LEVEL: tl.constexpr, POOLING_FACTOR: tl.constexpr):
    """Id of the first entry of a level."""
    offset = seq_len - seq_len
    for finer in tl.static_range(LEVEL):
        offset += seq_len // POOLING_FACTOR**finer
    return offset


@triton.jit
def _fill_absent(slot_ptr, count, BLOCK: tl.constexpr):
    for first in range(0, count, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        tl.store(slot_ptr + offs, tl.full((BLOCK,), -1, tl.int32), mask=offs < count)


@triton.jit
def _children(parents_ptr, offs_c, POOLING_FACTOR: tl.constexpr):
    """Indices of the candidates `offs_c`, the children of the selected entries."""
    parent = tl.load(parents_ptr + offs_c // POOLING_FACTOR)
    return parent * POOLING_FACTOR + offs_c % POOLING_FACTOR


@triton.jit
def _weights(
    ranks_ptr, offs_c, count,
    LEVEL: tl.constexpr, WIDTH: tl.constexpr, POOLING_FACTOR: tl.constexpr,
):  # fmt: skip
    """Number of slots of each candidate and its descendants, and its rank among the selected."""
    mask_c = offs_c < count
    if LEVEL == 0:
        return mask_c.to(tl.int32), tl.full(offs_c.shape, -1, tl.int32)
    rank = tl.load(ranks_ptr + offs_c, mask=mask_c, other=-1)
    if LEVEL == 1:
        size = 1 + POOLING_FACTOR
    else:
        size = tl.load(ranks_ptr + WIDTH + 128 + rank, mask=rank >= 0, other=0)
    return tl.where(rank >= 0, size, mask_c.to(tl.int32)), rank


@triton.jit
def _order_preserving(score):
    """int32 images of scores, in the same order as the scores."""
    bits = score.to(tl.float32).to(tl.int32, bitcast=True)
    image = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    # -1 is the image of -0.0 alone, which ties with 0.0.
    return tl.where(image == -1, 0, image)


@triton.jit
def _best_64(image):
    """Mask of the 64 largest; ties go to the lowest index. At least 64 are above `_LOWEST`."""
    # Find the largest threshold that 64 images reach, bit by bit from the sign on. A threshold that
    # exactly 64 reach also suffices. It is usually found after half of the bits.
    count = tl.sum((image >= 0).to(tl.int32), 0)
    threshold = tl.where(count >= 64, 0, _LOWEST)
    reached = tl.where(count >= 64, count, image.shape[0])
    bit = 30
    while (bit >= 0) & (reached != 64):
        trial = threshold | (1 << bit)
        count = tl.sum((image >= trial).to(tl.int32), 0)
        threshold = tl.where(count >= 64, trial, threshold)
        reached = tl.where(count >= 64, count, reached)
        bit -= 1
    is_above = image > threshold
    is_equal = image == threshold
    num_equal = 64 - tl.sum(is_above.to(tl.int32), 0)
    return is_above | (is_equal & (tl.cumsum(is_equal.to(tl.int32), 0) <= num_equal))


def select(
    q_scores: torch.Tensor,
    k_scores: torch.Tensor,
    num_levels: int,
    pooling_factor: int,
    topk: int,
    seq_len: int,
    is_start: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `lighthouse::select`. The scores have any strides and are compared in fp32."""
    batch, n_kv_heads, num_scores = q_scores.shape
    num_strata = topk // 128
    num_top = seq_len // pooling_factor ** (num_levels - 1) // num_strata
    sub_seq_len = num_top * num_strata + (num_levels - 1) * pooling_factor * topk
    num_entries = seq_len + num_scores
    block_c = triton.next_power_of_2(num_top)
    width = max(block_c, 128 * pooling_factor)
    shape = (batch, n_kv_heads)
    entry = q_scores.new_empty((*shape, sub_seq_len), dtype=torch.int32)
    slot = q_scores.new_empty((*shape, num_entries), dtype=torch.int32)
    workspace = q_scores.new_empty(
        (*shape, num_strata, num_levels - 1, width + 3 * 128), dtype=torch.int32
    )
    with torch.cuda.device_of(q_scores):
        _select_kernel[(num_strata, batch * n_kv_heads)](
            q_scores, k_scores, entry, slot, workspace,
            *q_scores.stride(), *k_scores.stride(),
            n_kv_heads, num_strata, seq_len, num_entries, sub_seq_len,
            NUM_LEVELS=num_levels, POOLING_FACTOR=pooling_factor, BLOCK_C=block_c,
            IS_START=is_start,
            num_warps=min(max(width // _CANDIDATES_PER_WARP, 1), 16),
        )  # fmt: skip
    return entry, slot
