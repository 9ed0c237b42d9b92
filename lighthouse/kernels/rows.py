"""Device functions of gather and scatter-back that sum rows through the two maps.

Each kernel writes every row of its output once and sums in fp32. There are two access patterns:

    by slot    a program has a block of slots and reads the rows of the tokens that each entry sums
    by token   a program has a tile of tokens and reads the rows in the slots of each level

Rows shared by several entries or tokens of a block come from the cache. With GQA a program
processes, one after another, all tensors that share the maps of a kv head.
"""

import torch
import triton
import triton.language as tl

_ELEMENTS_PER_WARP = 512
"""Elements of a block per warp: 16 for each thread, two loads of 16 bytes of bf16. With twice as
many, the rotating kernels took up to 1.4 times as long on an H100."""


@triton.jit
def block_batch_head(n_heads):
    """Index of the block along the sequence, batch, head, and batch and head as one index.

    All but the first are int64, since they are multiplied by strides.
    """
    # Heads vary fastest, so that adjacent programs access adjacent rows of [B, N, H, D].
    pid = tl.program_id(0)
    head = (pid % n_heads).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    return pid // n_heads, batch, head, batch * n_heads + head


@triton.jit
def decode(
    entry_ptr, offs_s, mask_s, seq_len,
    NUM_LEVELS: tl.constexpr, POOLING_FACTOR: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Index within the level, and span, of the entry in each slot."""
    entry = tl.load(entry_ptr + offs_s, mask=mask_s, other=0)
    index = entry
    span = tl.full((BLOCK_S,), 1, tl.int32)
    offset = seq_len
    for level in tl.static_range(1, NUM_LEVELS):
        is_above = entry >= offset
        index = tl.where(is_above, entry - offset, index)
        span = tl.where(is_above, POOLING_FACTOR**level, span)
        offset += seq_len // POOLING_FACTOR**level
    return index, span


@triton.jit
def add_rows(
    acc, x_ptr, stride_n, stride_d, first, num_rows,
    MAX_ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add the `num_rows` rows from `first` on to `acc`, [BLOCK_S, BLOCK_D]."""
    # Number of rows of one slot that are loaded together.
    UNROLL: tl.constexpr = min(MAX_ROWS, 4)
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    mask_d = offs_d < HEAD_DIM
    x_ptrs = x_ptr + first.to(tl.int64)[:, None] * stride_n + offs_d * stride_d
    row_stride = tl.full((), stride_n, tl.int64)
    # Few blocks hold entries of every level, so stop after the longest span of this block.
    most = MAX_ROWS if MAX_ROWS == UNROLL else tl.max(num_rows, 0)
    for start in range(0, most, UNROLL):
        for j in tl.static_range(UNROLL):
            mask = (start + j < num_rows)[:, None] & mask_d
            x = tl.load(x_ptrs + (start + j) * row_stride, mask=mask, other=0.0)
            acc += x.to(tl.float32)
    return acc


@triton.jit
def load_slots(
    slot_ptr, offs_s, mask_s, seq_len,
    SHIFT: tl.constexpr, NUM_LEVELS: tl.constexpr, POOLING_FACTOR: tl.constexpr,
):  # fmt: skip
    """Slots that each token reads, one [BLOCK_S] per level, -1 for none.

    SHIFT 0 gives the slots of the entries that cover the token. SHIFT 1 gives the slots of the
    entries whose output reaches it.
    """
    slots = ()
    level_ptr = slot_ptr
    for level in tl.static_range(NUM_LEVELS):
        index = (offs_s + SHIFT) // POOLING_FACTOR**level - SHIFT
        slots += (tl.load(level_ptr + index, mask=mask_s & (index >= 0), other=-1),)
        level_ptr += seq_len // POOLING_FACTOR**level
    return slots


@triton.jit
def sum_slots(
    x_ptr, stride_s, stride_d, slots,
    HEAD_DIM: tl.constexpr, NUM_LEVELS: tl.constexpr, WEIGHT: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sums over levels of the rows in `slots`, times WEIGHT**level: [BLOCK_S, BLOCK_D], fp32."""
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    mask_d = offs_d < HEAD_DIM
    acc = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    for level in tl.static_range(NUM_LEVELS):
        slot = slots[level]
        x_ptrs = x_ptr + slot.to(tl.int64)[:, None] * stride_s + offs_d * stride_d
        x = tl.load(x_ptrs, mask=(slot >= 0)[:, None] & mask_d, other=0.0)
        acc += x.to(tl.float32) * WEIGHT**level
    return acc


@triton.jit
def store_rows(x_ptr, x, row, mask_s, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    x_ptrs = x_ptr + row[:, None] * HEAD_DIM + offs_d
    tl.store(x_ptrs, x.to(x_ptr.dtype.element_ty), mask=mask_s[:, None] & (offs_d < HEAD_DIM))


def launch_sizes(
    x: torch.Tensor, num_levels: int, pooling_factor: int, num_warps: int
) -> dict[str, int]:
    head_dim = x.shape[-1]
    block_d = triton.next_power_of_2(head_dim)
    return {
        "HEAD_DIM": head_dim,
        "NUM_LEVELS": num_levels,
        "POOLING_FACTOR": pooling_factor,
        "BLOCK_S": max(_ELEMENTS_PER_WARP * num_warps // block_d, 1),
        "BLOCK_D": block_d,
        "num_warps": num_warps,
    }
