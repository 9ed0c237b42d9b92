"""Device functions that load, store and rotate rows of a head as pairs of elements.

A tile of rows is two tensors [rows, BLOCK_P], the first and the second elements of the pairs. PAIRS
gives their positions in memory: INTERLEAVED (2i, 2i + 1) or HALVES (i, i + R/2). Elements after the
first R also form pairs, which are not rotated. NO_PAIRS means that there is no table.
"""

import torch
import triton
import triton.language as tl

NO_PAIRS = tl.constexpr(0)
INTERLEAVED = tl.constexpr(1)
HALVES = tl.constexpr(2)


@triton.jit
def load_pairs(
    row_ptrs, stride_d, mask_s,
    PAIRS: tl.constexpr, HEAD_DIM: tl.constexpr, NUM_PAIRS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Load the rows at `row_ptrs`, [rows, 1], in their dtype; zeros outside `mask_s`, [rows, 1]."""
    if PAIRS == INTERLEAVED:
        offs_d = tl.arange(0, 2 * BLOCK_P)[None, :]
        mask = mask_s & (offs_d < HEAD_DIM)
        first, second = split_pairs(tl.load(row_ptrs + offs_d * stride_d, mask=mask, other=0.0))
    else:
        offs_p = tl.arange(0, BLOCK_P)[None, :]
        mask = mask_s & (offs_p < HEAD_DIM // 2)
        offs_first, offs_second = _halves(offs_p, HEAD_DIM, NUM_PAIRS)
        first = tl.load(row_ptrs + offs_first * stride_d, mask=mask, other=0.0)
        second = tl.load(row_ptrs + offs_second * stride_d, mask=mask, other=0.0)
    return first, second


@triton.jit
def store_pairs(
    row_ptrs, first, second, mask_s,
    PAIRS: tl.constexpr, HEAD_DIM: tl.constexpr, NUM_PAIRS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Store pairs as the rows at `row_ptrs`, [rows, 1], whose elements are contiguous."""
    dtype = row_ptrs.dtype.element_ty
    if PAIRS == INTERLEAVED:
        offs_d = tl.arange(0, 2 * BLOCK_P)[None, :]
        row = tl.reshape(tl.join(first.to(dtype), second.to(dtype)), (first.shape[0], 2 * BLOCK_P))
        tl.store(row_ptrs + offs_d, row, mask=mask_s & (offs_d < HEAD_DIM))
    else:
        offs_p = tl.arange(0, BLOCK_P)[None, :]
        mask = mask_s & (offs_p < HEAD_DIM // 2)
        offs_first, offs_second = _halves(offs_p, HEAD_DIM, NUM_PAIRS)
        tl.store(row_ptrs + offs_first, first.to(dtype), mask=mask)
        tl.store(row_ptrs + offs_second, second.to(dtype), mask=mask)


@triton.jit
def split_pairs(x):
    """Split adjacent elements of a tile, [rows, 2 * BLOCK_P], into pairs."""
    return tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))


@triton.jit
def rotate(first, second, cos, sin):
    """Rotate pairs in fp32."""
    first = first.to(tl.float32)
    second = second.to(tl.float32)
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _halves(offs_p, HEAD_DIM: tl.constexpr, NUM_PAIRS: tl.constexpr):
    """Offsets of the elements of each pair. Those after R = 2 * NUM_PAIRS also pair in halves."""
    if 2 * NUM_PAIRS == HEAD_DIM:
        return offs_p, offs_p + NUM_PAIRS
    is_rotary = offs_p < NUM_PAIRS
    first = offs_p + tl.where(is_rotary, 0, NUM_PAIRS)
    return first, first + tl.where(is_rotary, NUM_PAIRS, HEAD_DIM // 2 - NUM_PAIRS)


@triton.jit
def load_phases(
    cos_ptr, sin_ptr, offset, mask_s, NUM_PAIRS: tl.constexpr, BLOCK_P: tl.constexpr
):  # fmt: skip
    """Cosines and sines of the rotation by `offset` positions, [rows, 1]: two [rows, BLOCK_P]."""
    # Each thread loads its own values row by row from L1, without exchange between threads.
    offs_p = tl.arange(0, BLOCK_P)[None, :]
    mask = mask_s & (offs_p < NUM_PAIRS)
    offs = offset * NUM_PAIRS + offs_p
    cos = tl.load(cos_ptr + offs, mask=mask, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    return cos, sin


def pair_sizes(cos: torch.Tensor | None, interleaved: bool) -> dict[str, int]:
    """The constexprs PAIRS and NUM_PAIRS for a launch with this table."""
    if cos is None:
        return {"PAIRS": NO_PAIRS.value, "NUM_PAIRS": 0}
    pairs = INTERLEAVED if interleaved else HALVES
    return {"PAIRS": pairs.value, "NUM_PAIRS": cos.shape[1]}


def table_pointers(
    cos: torch.Tensor | None, sin: torch.Tensor | None, unused: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cos and sin for a launch. Without a table, `unused` twice, which the kernel does not read."""
    return (unused, unused) if cos is None else (cos.contiguous(), sin.contiguous())
