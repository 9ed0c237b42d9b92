"""Gather kernels: forward pools tokens into entries, backward spreads gradients to the tokens.

    gather            by slot: mean of the tokens i*p**l .. i*p**l + p**l - 1; entries of the
                      coarsest level are copied from their own buffer
    gather backward   by token: sum over levels l of the gradient of entry t // p**l, times p**-l

With a rotary table, q and k are rotated to the last token of a span, and their gradients back.

Bytes moved, with b bytes per element and R = B * (H + 2 Hkv) * D * b bytes per row of q, k and v,
and C = k p**(L-1) tokens under the selected entries of the coarsest level:

    gather            read (C + N/p**(L-1)) R, written S R
    gather backward   read S R, written N R

The maps add 4 B Hkv S (by slot) or 4 B Hkv E (by token). A rotary table adds 4 R' p**(L-1), where
R' elements of a head are rotated.
"""

import torch
import triton
import triton.language as tl

from lighthouse.gather import empty_bnhd
from lighthouse.kernels.rotary import (
    NO_PAIRS,
    load_pairs,
    load_phases,
    pair_sizes,
    rotate,
    store_pairs,
    table_pointers,
)
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
def _gather_kernel(
    q_ptr, k_ptr, v_ptr, coarsest_q_ptr, coarsest_k_ptr, coarsest_v_ptr, entry_ptr,
    cos_ptr, sin_ptr, sub_q_ptr, sub_k_ptr, sub_v_ptr,
    q_stride_b, q_stride_h, q_stride_n, q_stride_d,
    k_stride_b, k_stride_h, k_stride_n, k_stride_d,
    v_stride_b, v_stride_h, v_stride_n, v_stride_d,
    n_kv_heads, seq_len, sub_seq_len,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    NUM_LEVELS: tl.constexpr, POOLING_FACTOR: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
    PAIRS: tl.constexpr, NUM_PAIRS: tl.constexpr,
):  # fmt: skip
    block, batch, head, flat_head = block_batch_head(n_kv_heads)
    offs_s = block * BLOCK_S + tl.arange(0, BLOCK_S)
    mask_s = offs_s < sub_seq_len
    index, span = decode(
        entry_ptr + flat_head * sub_seq_len, offs_s, mask_s, seq_len,
        NUM_LEVELS, POOLING_FACTOR, BLOCK_S,
    )  # fmt: skip
    is_coarsest = span == POOLING_FACTOR ** (NUM_LEVELS - 1)
    mask_c = mask_s & is_coarsest
    num_rows = tl.where(mask_s & ~is_coarsest, span, 0)
    first = index * span

    q_ptr += batch * q_stride_b + head * GROUP * q_stride_h
    k_ptr += batch * k_stride_b + head * k_stride_h
    v_ptr += batch * v_stride_b + head * v_stride_h
    coarsest_size = (seq_len // POOLING_FACTOR ** (NUM_LEVELS - 1)).to(tl.int64) * HEAD_DIM
    sub_size = sub_seq_len.to(tl.int64) * HEAD_DIM
    for g in range(GROUP):
        flat_q_head = flat_head * GROUP + g
        _gather_rows(
            q_ptr + g * q_stride_h, coarsest_q_ptr + flat_q_head * coarsest_size,
            sub_q_ptr + flat_q_head * sub_size, q_stride_n, q_stride_d,
            cos_ptr, sin_ptr, first, num_rows, index, mask_c, offs_s, mask_s,
            HEAD_DIM, NUM_LEVELS, POOLING_FACTOR, BLOCK_S, BLOCK_D, PAIRS, NUM_PAIRS,
        )  # fmt: skip
    _gather_rows(
        k_ptr, coarsest_k_ptr + flat_head * coarsest_size,
        sub_k_ptr + flat_head * sub_size, k_stride_n, k_stride_d,
        cos_ptr, sin_ptr, first, num_rows, index, mask_c, offs_s, mask_s,
        HEAD_DIM, NUM_LEVELS, POOLING_FACTOR, BLOCK_S, BLOCK_D, PAIRS, NUM_PAIRS,
    )  # fmt: skip
    _gather_rows(
        v_ptr, coarsest_v_ptr + flat_head * coarsest_size,
        sub_v_ptr + flat_head * sub_size, v_stride_n, v_stride_d,
        cos_ptr, sin_ptr, first, num_rows, index, mask_c, offs_s, mask_s,
        HEAD_DIM, NUM_LEVELS, POOLING_FACTOR, BLOCK_S, BLOCK_D, NO_PAIRS, NUM_PAIRS,
    )  # fmt: skip


@triton.jit
def _gather_rows(
    x_ptr, coarsest_ptr, sub_ptr, stride_n, stride_d, cos_ptr, sin_ptr,
    first, num_rows, index, mask_c, offs_s, mask_s,
    HEAD_DIM: tl.constexpr, NUM_LEVELS: tl.constexpr, POOLING_FACTOR: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
    PAIRS: tl.constexpr, NUM_PAIRS: tl.constexpr,
):  # fmt: skip
    MAX_ROWS: tl.constexpr = POOLING_FACTOR ** (NUM_LEVELS - 2)
    # Spans are powers of two, so the quotient is exact. It is 1 for a copied row.
    share = (1.0 / tl.maximum(num_rows, 1).to(tl.float32))[:, None]
    coarsest_ptrs = coarsest_ptr + index.to(tl.int64)[:, None] * HEAD_DIM
    sub_ptrs = sub_ptr + offs_s.to(tl.int64)[:, None] * HEAD_DIM
    if PAIRS == NO_PAIRS:
        offs_d = tl.arange(0, BLOCK_D)[None, :]
        mask_d = offs_d < HEAD_DIM
        copied = tl.load(coarsest_ptrs + offs_d, mask=mask_c[:, None] & mask_d, other=0.0)
        sums = add_rows(
            copied.to(tl.float32), x_ptr, stride_n, stride_d, first, num_rows,
            MAX_ROWS, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
        mean = (sums * share).to(sub_ptr.dtype.element_ty)
        tl.store(sub_ptrs + offs_d, mean, mask=mask_s[:, None] & mask_d)
    else:
        BLOCK_P: tl.constexpr = BLOCK_D // 2
        a, b = load_pairs(
            coarsest_ptrs, 1, mask_c[:, None], PAIRS, HEAD_DIM, NUM_PAIRS, BLOCK_P
        )  # fmt: skip
        a, b = _add_rotated_rows(
            a.to(tl.float32), b.to(tl.float32),
            x_ptr, stride_n, stride_d, cos_ptr, sin_ptr, first, num_rows,
            MAX_ROWS, PAIRS, HEAD_DIM, NUM_PAIRS, BLOCK_P,
        )  # fmt: skip
        store_pairs(
            sub_ptrs, a * share, b * share, mask_s[:, None], PAIRS, HEAD_DIM, NUM_PAIRS, BLOCK_P
        )  # fmt: skip


@triton.jit
def _add_rotated_rows(
    acc_a, acc_b, x_ptr, stride_n, stride_d, cos_ptr, sin_ptr, first, num_rows,
    MAX_ROWS: tl.constexpr, PAIRS: tl.constexpr,
    HEAD_DIM: tl.constexpr, NUM_PAIRS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """`add_rows` for rows as pairs. Each row is rotated to the position of the last one."""
    UNROLL: tl.constexpr = min(MAX_ROWS, 4)
    row_ptrs = x_ptr + first.to(tl.int64)[:, None] * stride_n
    row_stride = tl.full((), stride_n, tl.int64)
    most = MAX_ROWS if MAX_ROWS == UNROLL else tl.max(num_rows, 0)
    for start in range(0, most, UNROLL):
        for j in tl.static_range(UNROLL):
            to_last = (num_rows - 1 - start - j)[:, None]
            mask = to_last >= 0
            a, b = load_pairs(
                row_ptrs + (start + j) * row_stride, stride_d, mask,
                PAIRS, HEAD_DIM, NUM_PAIRS, BLOCK_P,
            )  # fmt: skip
            cos, sin = load_phases(cos_ptr, sin_ptr, to_last, mask, NUM_PAIRS, BLOCK_P)
            a, b = rotate(a, b, cos, sin)
            acc_a += a
            acc_b += b
    return acc_a, acc_b


@triton.jit
def _gather_backward_kernel(
    dsub_q_ptr, dsub_k_ptr, dsub_v_ptr, slot_ptr, cos_ptr, sin_ptr, dq_ptr, dk_ptr, dv_ptr,
    q_stride_b, q_stride_h, q_stride_s, q_stride_d,
    k_stride_b, k_stride_h, k_stride_s, k_stride_d,
    v_stride_b, v_stride_h, v_stride_s, v_stride_d,
    n_kv_heads, seq_len, num_entries,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    NUM_LEVELS: tl.constexpr, POOLING_FACTOR: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
    PAIRS: tl.constexpr, NUM_PAIRS: tl.constexpr,
):  # fmt: skip
    block, batch, head, flat_head = block_batch_head(n_kv_heads)
    offs_s = block * BLOCK_S + tl.arange(0, BLOCK_S)
    mask_s = offs_s < seq_len
    slots = load_slots(
        slot_ptr + flat_head * num_entries, offs_s, mask_s, seq_len, 0,
        NUM_LEVELS, POOLING_FACTOR,
    )  # fmt: skip

    dsub_q_ptr += batch * q_stride_b + head * GROUP * q_stride_h
    dsub_k_ptr += batch * k_stride_b + head * k_stride_h
    dsub_v_ptr += batch * v_stride_b + head * v_stride_h
    token = batch * seq_len + offs_s
    for g in range(GROUP):
        row = (token * n_kv_heads + head) * GROUP + g
        _spread_rows(
            dsub_q_ptr + g * q_stride_h, q_stride_s, q_stride_d, cos_ptr, sin_ptr,
            dq_ptr, row, slots, offs_s, mask_s,
            HEAD_DIM, NUM_LEVELS, POOLING_FACTOR, BLOCK_S, BLOCK_D, PAIRS, NUM_PAIRS,
        )  # fmt: skip
    row = token * n_kv_heads + head
    _spread_rows(
        dsub_k_ptr, k_stride_s, k_stride_d, cos_ptr, sin_ptr, dk_ptr, row, slots, offs_s, mask_s,
        HEAD_DIM, NUM_LEVELS, POOLING_FACTOR, BLOCK_S, BLOCK_D, PAIRS, NUM_PAIRS,
    )  # fmt: skip
    _spread_rows(
        dsub_v_ptr, v_stride_s, v_stride_d, cos_ptr, sin_ptr, dv_ptr, row, slots, offs_s, mask_s,
        HEAD_DIM, NUM_LEVELS, POOLING_FACTOR, BLOCK_S, BLOCK_D, NO_PAIRS, NUM_PAIRS,
    )  # fmt: skip


@triton.jit
def _spread_rows(
    dsub_ptr, stride_s, stride_d, cos_ptr, sin_ptr, dx_ptr, row, slots, offs_s, mask_s,
    HEAD_DIM: tl.constexpr, NUM_LEVELS: tl.constexpr, POOLING_FACTOR: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
    PAIRS: tl.constexpr, NUM_PAIRS: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of tokens of one head. Each level contributes the row in the token's
    slot, times p**-level, rotated back from the last token of the entry."""
    if PAIRS == NO_PAIRS:
        dx = sum_slots(
            dsub_ptr, stride_s, stride_d, slots,
            HEAD_DIM, NUM_LEVELS, 1.0 / POOLING_FACTOR, BLOCK_S, BLOCK_D,
        )  # fmt: skip
        store_rows(dx_ptr, dx, row, mask_s, HEAD_DIM, BLOCK_D)
    else:
        BLOCK_P: tl.constexpr = BLOCK_D // 2
        da = tl.zeros((BLOCK_S, BLOCK_P), tl.float32)
        db = da
        for level in tl.static_range(NUM_LEVELS):
            slot = slots[level]
            mask = (slot >= 0)[:, None]
            row_ptrs = dsub_ptr + slot.to(tl.int64)[:, None] * stride_s
            a, b = load_pairs(row_ptrs, stride_d, mask, PAIRS, HEAD_DIM, NUM_PAIRS, BLOCK_P)
            if level == 0:
                da += a
                db += b
            else:
                to_last = POOLING_FACTOR**level - 1 - offs_s % POOLING_FACTOR**level
                cos, sin = load_phases(cos_ptr, sin_ptr, to_last[:, None], mask, NUM_PAIRS, BLOCK_P)
                a, b = rotate(a, b, cos, -sin)
                da += a * (1.0 / POOLING_FACTOR**level)
                db += b * (1.0 / POOLING_FACTOR**level)
        store_pairs(
            dx_ptr + row[:, None] * HEAD_DIM, da, db, mask_s[:, None],
            PAIRS, HEAD_DIM, NUM_PAIRS, BLOCK_P,
        )  # fmt: skip


def gather(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    coarsest_q: torch.Tensor,
    coarsest_k: torch.Tensor,
    coarsest_v: torch.Tensor,
    entry: torch.Tensor,
    slot: torch.Tensor,
    num_levels: int,
    pooling_factor: int,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `lighthouse::gather`. `slot` is unused."""
    batch, n_heads, seq_len, _ = q.shape
    n_kv_heads = k.shape[1]
    sub_seq_len = entry.shape[-1]
    subs = [x.new_empty((*x.shape[:2], sub_seq_len, x.shape[3])) for x in (q, k, v)]
    coarsest = [x.contiguous() for x in (coarsest_q, coarsest_k, coarsest_v)]
    sizes = launch_sizes(q, num_levels, pooling_factor, num_warps=4)
    grid = (triton.cdiv(sub_seq_len, sizes["BLOCK_S"]) * n_kv_heads, batch)
    with torch.cuda.device_of(q):
        _gather_kernel[grid](
            q, k, v, *coarsest, entry.contiguous(), *table_pointers(cos, sin, q), *subs,
            *q.stride(), *k.stride(), *v.stride(),
            n_kv_heads, seq_len, sub_seq_len,
            GROUP=n_heads // n_kv_heads, **sizes, **pair_sizes(cos, interleaved),
        )  # fmt: skip
    return tuple(subs)


def gather_backward(
    dsub_q: torch.Tensor,
    dsub_k: torch.Tensor,
    dsub_v: torch.Tensor,
    slot: torch.Tensor,
    num_levels: int,
    pooling_factor: int,
    seq_len: int,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `lighthouse::gather_backward`."""
    batch, n_heads = dsub_q.shape[:2]
    n_kv_heads, num_entries = slot.shape[1:]
    grads = [empty_bnhd(x, seq_len) for x in (dsub_q, dsub_k, dsub_v)]
    sizes = launch_sizes(dsub_q, num_levels, pooling_factor, num_warps=4)
    grid = (triton.cdiv(seq_len, sizes["BLOCK_S"]) * n_kv_heads, batch)
    with torch.cuda.device_of(dsub_q):
        _gather_backward_kernel[grid](
            dsub_q, dsub_k, dsub_v, slot.contiguous(), *table_pointers(cos, sin, dsub_q), *grads,
            *dsub_q.stride(), *dsub_k.stride(), *dsub_v.stride(),
            n_kv_heads, seq_len, num_entries,
            GROUP=n_heads // n_kv_heads, **sizes, **pair_sizes(cos, interleaved),
        )  # fmt: skip
    return tuple(grads)
