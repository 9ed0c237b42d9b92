"""Scatter-back kernels: forward sums entry outputs per token, backward sums gradients per entry.

    scatter-back            by token: sum over levels l of the output of entry (t + 1) // p**l - 1,
                            or of the edge of level l if that entry is in the previous chunk
    scatter-back backward   by slot: sum over p**l tokens from i*p**l + p**l - 1 on, within the
                            chunk

Bytes moved, with b bytes per element and R = B * H * D * b bytes per row:

    scatter-back            read S R, written N R
    scatter-back backward   read N R, written S R

The maps add 4 B Hkv E (by token) or 4 B Hkv S (by slot).
"""

import torch
import triton
import triton.language as tl

from lighthouse.gather import empty_bnhd
from lighthouse.kernels.rows import (
    add_rows,
    block_batch_head,
    decode,
    launch_sizes,
    load_slots,
    store_rows,
    sum_slots,
)


@triton.jit
def _scatter_back_kernel(
    sub_out_ptr, edges_ptr, slot_ptr, out_ptr,
    sub_stride_b, sub_stride_h, sub_stride_s, sub_stride_d,
    n_heads, seq_len, chunk_len, num_entries,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HAS_EDGES: tl.constexpr,
    NUM_LEVELS: tl.constexpr, POOLING_FACTOR: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    block, batch, head, flat_head = block_batch_head(n_heads)
    offs_s = block * BLOCK_S + tl.arange(0, BLOCK_S)
    mask_s = offs_s < seq_len
    slots = load_slots(
        slot_ptr + flat_head // GROUP * num_entries, offs_s, mask_s, seq_len, 1,
        NUM_LEVELS, POOLING_FACTOR,
    )  # fmt: skip
    if HAS_EDGES:
        slots = _without_edges(slots, offs_s, chunk_len, NUM_LEVELS, POOLING_FACTOR)
    out = sum_slots(
        sub_out_ptr + batch * sub_stride_b + head * sub_stride_h, sub_stride_s, sub_stride_d,
        slots, HEAD_DIM, NUM_LEVELS, 1.0, BLOCK_S, BLOCK_D,
    )  # fmt: skip
    if HAS_EDGES:
        num_edges = seq_len // chunk_len * (NUM_LEVELS - 1)
        edges_ptr += flat_head * num_edges * HEAD_DIM
        out += _sum_edges(
            edges_ptr, offs_s, mask_s, chunk_len,
            HEAD_DIM, NUM_LEVELS, POOLING_FACTOR, BLOCK_S, BLOCK_D,
        )  # fmt: skip
    row = (batch * seq_len + offs_s) * n_heads + head
    store_rows(out_ptr, out, row, mask_s, HEAD_DIM, BLOCK_D)


@triton.jit
def _without_edges(
    slots, offs_s, chunk_len, NUM_LEVELS: tl.constexpr, POOLING_FACTOR: tl.constexpr
):
    """The slots, with -1 for entries of the previous chunk."""
    kept = (slots[0],)
    for level in tl.static_range(1, NUM_LEVELS):
        is_edge = offs_s % chunk_len < POOLING_FACTOR**level - 1
        kept += (tl.where(is_edge, -1, slots[level]),)
    return kept


@triton.jit
def _sum_edges(
    edges_ptr, offs_s, mask_s, chunk_len,
    HEAD_DIM: tl.constexpr, NUM_LEVELS: tl.constexpr, POOLING_FACTOR: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sums over levels of the edges that reach each token: [BLOCK_S, BLOCK_D], fp32."""
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    mask_d = offs_d < HEAD_DIM
    first_row = offs_s // chunk_len * (NUM_LEVELS - 1)
    acc = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    for level in tl.static_range(1, NUM_LEVELS):
        is_edge = mask_s & (offs_s % chunk_len < POOLING_FACTOR**level - 1)
        row = (first_row + level - 1).to(tl.int64)
        edge_ptrs = edges_ptr + row[:, None] * HEAD_DIM + offs_d
        acc += tl.load(edge_ptrs, mask=is_edge[:, None] & mask_d, other=0.0).to(tl.float32)
    return acc


@triton.jit
def _scatter_back_backward_kernel(
    dout_ptr, entry_ptr, dsub_ptr,
    dout_stride_b, dout_stride_h, dout_stride_n, dout_stride_d,
    n_heads, seq_len, chunk_len, sub_seq_len,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    NUM_LEVELS: tl.constexpr, POOLING_FACTOR: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    block, batch, head, flat_head = block_batch_head(n_heads)
    offs_s = block * BLOCK_S + tl.arange(0, BLOCK_S)
    mask_s = offs_s < sub_seq_len
    index, span = decode(
        entry_ptr + flat_head // GROUP * sub_seq_len, offs_s, mask_s, seq_len,
        NUM_LEVELS, POOLING_FACTOR, BLOCK_S,
    )  # fmt: skip
    first = index * span + span - 1
    num_rows = tl.where(mask_s, tl.minimum(span, chunk_len - first % chunk_len), 0)
    dsub = add_rows(
        tl.zeros((BLOCK_S, BLOCK_D), tl.float32),
        dout_ptr + batch * dout_stride_b + head * dout_stride_h, dout_stride_n, dout_stride_d,
        first, num_rows, POOLING_FACTOR ** (NUM_LEVELS - 1), HEAD_DIM, BLOCK_D,
    )  # fmt: skip
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    dsub_ptr += flat_head * sub_seq_len * HEAD_DIM
    dsub_ptrs = dsub_ptr + offs_s.to(tl.int64)[:, None] * HEAD_DIM + offs_d
    mask = mask_s[:, None] & (offs_d < HEAD_DIM)
    tl.store(dsub_ptrs, dsub.to(dsub_ptr.dtype.element_ty), mask=mask)


def scatter_back(
    sub_out: torch.Tensor,
    edges: torch.Tensor | None,
    entry: torch.Tensor,
    slot: torch.Tensor,
    num_levels: int,
    pooling_factor: int,
    seq_len: int,
) -> torch.Tensor:
    """See `lighthouse::scatter_back`. `entry` is unused."""
    batch, n_heads = sub_out.shape[:2]
    n_kv_heads, num_entries = slot.shape[1:]
    out = empty_bnhd(sub_out, seq_len)
    has_edges = edges is not None
    num_chunks = edges.shape[2] if has_edges else 1
    sizes = launch_sizes(sub_out, num_levels, pooling_factor, num_warps=2)
    grid = (triton.cdiv(seq_len, sizes["BLOCK_S"]) * n_heads, batch)
    with torch.cuda.device_of(sub_out):
        _scatter_back_kernel[grid](
            sub_out, edges.contiguous() if has_edges else sub_out, slot.contiguous(), out,
            *sub_out.stride(), n_heads, seq_len, seq_len // num_chunks, num_entries,
            GROUP=n_heads // n_kv_heads, HAS_EDGES=has_edges, **sizes,
        )  # fmt: skip
    return out


def scatter_back_backward(
    dout: torch.Tensor, entry: torch.Tensor, num_levels: int, pooling_factor: int, num_chunks: int
) -> torch.Tensor:
    """See `lighthouse::scatter_back_backward`."""
    batch, n_heads, seq_len, head_dim = dout.shape
    n_kv_heads, sub_seq_len = entry.shape[1:]
    dsub = dout.new_empty((batch, n_heads, sub_seq_len, head_dim))
    sizes = launch_sizes(dout, num_levels, pooling_factor, num_warps=8)
    grid = (triton.cdiv(sub_seq_len, sizes["BLOCK_S"]) * n_heads, batch)
    with torch.cuda.device_of(dout):
        _scatter_back_backward_kernel[grid](
            dout, entry.contiguous(), dsub, *dout.stride(),
            n_heads, seq_len, seq_len // num_chunks, sub_seq_len,
            GROUP=n_heads // n_kv_heads, **sizes,
        )  # fmt: skip
    return dsub
