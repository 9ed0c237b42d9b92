"""Gather and scatter-back, and their backward passes: rows summed through the two maps.

Two ways to walk, and each kernel writes every row of its output once, with fp32 sums:

    by slot    a program takes a block of slots, reads the rows of tokens that each entry sums
               gather                  tokens i*p**l .. + p**l - 1, mean; the coarsest level is
                                       copied from its own buffer
               scatter-back backward   tokens i*p**l + p**l - 1 .. + p**l - 1, those in the chunk
    by token   a program takes a tile of tokens, reads the rows in the slots of each level
               gather backward         entry t // p**l of level l, times p**-l
               scatter-back            entry (t + 1) // p**l - 1 of level l, or, where that is in
                                       the chunk before, the edge of level l

Rows that several entries or tokens of one block share come from the cache. With GQA a program
serves all tensors that share the maps of a kv head, one after another.

Bytes moved, with b bytes per element and R = B * (H + 2 Hkv) * D * b bytes per row of q, k and v,
R' = B * H * D * b, and C = k p**(L-1) tokens below the selected entries of the coarsest level:

    gather                  read (C + N/p**(L-1)) R, written S R
    gather backward         read S R, written N R
    scatter-back            read S R', written N R'
    scatter-back backward   read N R', written S R'

and the maps, 4 B Hkv S by slot or 4 B Hkv E by token, and the table of phases of gather and its
backward pass, 4 R p**(L-1), where q and k are rotated to the last token of a span.
"""

import torch
import triton
import triton.language as tl

from lighthouse.kernels.rotary import (
    NO_PAIRS,
    load_pairs,
    load_phases,
    pair_sizes,
    rotate,
    store_pairs,
    table_pointers,
)

_TILE = 4096
"""Elements of a block of slots or tokens: 32 rows of 128, 32 elements for each of 128 threads."""


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
    block, batch, head, flat_head = _block_batch_head(n_kv_heads)
    offs_s = block * BLOCK_S + tl.arange(0, BLOCK_S)
    mask_s = offs_s < sub_seq_len
    index, span = _decode(
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
    # Spans are powers of two: the quotient is exact. It is one for a copied row.
    share = (1.0 / tl.maximum(num_rows, 1).to(tl.float32))[:, None]
    coarsest_ptrs = coarsest_ptr + index.to(tl.int64)[:, None] * HEAD_DIM
    sub_ptrs = sub_ptr + offs_s.to(tl.int64)[:, None] * HEAD_DIM
    if PAIRS == NO_PAIRS:
        offs_d = tl.arange(0, BLOCK_D)[None, :]
        mask_d = offs_d < HEAD_DIM
        copied = tl.load(coarsest_ptrs + offs_d, mask=mask_c[:, None] & mask_d, other=0.0)
        sums = _add_rows(
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
def _scatter_back_backward_kernel(
    dout_ptr, entry_ptr, dsub_ptr,
    dout_stride_b, dout_stride_h, dout_stride_n, dout_stride_d,
    n_heads, seq_len, chunk_len, sub_seq_len,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    NUM_LEVELS: tl.constexpr, POOLING_FACTOR: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    block, batch, head, flat_head = _block_batch_head(n_heads)
    offs_s = block * BLOCK_S + tl.arange(0, BLOCK_S)
    mask_s = offs_s < sub_seq_len
    index, span = _decode(
        entry_ptr + flat_head // GROUP * sub_seq_len, offs_s, mask_s, seq_len,
        NUM_LEVELS, POOLING_FACTOR, BLOCK_S,
    )  # fmt: skip
    first = index * span + span - 1
    num_rows = tl.where(mask_s, tl.minimum(span, chunk_len - first % chunk_len), 0)
    dsub = _add_rows(
        tl.zeros((BLOCK_S, BLOCK_D), tl.float32),
        dout_ptr + batch * dout_stride_b + head * dout_stride_h, dout_stride_n, dout_stride_d,
        first, num_rows, POOLING_FACTOR ** (NUM_LEVELS - 1), HEAD_DIM, BLOCK_D,
    )  # fmt: skip
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    dsub_ptr += flat_head * sub_seq_len * HEAD_DIM
    dsub_ptrs = dsub_ptr + offs_s.to(tl.int64)[:, None] * HEAD_DIM + offs_d
    mask = mask_s[:, None] & (offs_d < HEAD_DIM)
    tl.store(dsub_ptrs, dsub.to(dsub_ptr.dtype.element_ty), mask=mask)


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
    block, batch, head, flat_head = _block_batch_head(n_kv_heads)
    offs_s = block * BLOCK_S + tl.arange(0, BLOCK_S)
    mask_s = offs_s < seq_len
    slots = _load_slots(
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
    """Gradients of a block of tokens of one head: of every level the row in the slot of the token,
    times p**-level, rotated back from the last token of the entry."""
    if PAIRS == NO_PAIRS:
        dx = _sum_slots(
            dsub_ptr, stride_s, stride_d, slots,
            HEAD_DIM, NUM_LEVELS, 1.0 / POOLING_FACTOR, BLOCK_S, BLOCK_D,
        )  # fmt: skip
        _store_rows(dx_ptr, dx, row, mask_s, HEAD_DIM, BLOCK_D)
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


@triton.jit
def _scatter_back_kernel(
    sub_out_ptr, edges_ptr, slot_ptr, out_ptr,
    sub_stride_b, sub_stride_h, sub_stride_s, sub_stride_d,
    n_heads, seq_len, chunk_len, num_entries,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HAS_EDGES: tl.constexpr,
    NUM_LEVELS: tl.constexpr, POOLING_FACTOR: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    block, batch, head, flat_head = _block_batch_head(n_heads)
    offs_s = block * BLOCK_S + tl.arange(0, BLOCK_S)
    mask_s = offs_s < seq_len
    slots = _load_slots(
        slot_ptr + flat_head // GROUP * num_entries, offs_s, mask_s, seq_len, 1,
        NUM_LEVELS, POOLING_FACTOR,
    )  # fmt: skip
    if HAS_EDGES:
        slots = _without_edges(slots, offs_s, chunk_len, NUM_LEVELS, POOLING_FACTOR)
    out = _sum_slots(
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
    _store_rows(out_ptr, out, row, mask_s, HEAD_DIM, BLOCK_D)


@triton.jit
def _block_batch_head(n_heads):
    """Block along the sequence; batch, head and both as one, int64 since they meet strides."""
    # Heads are fastest: neighbours touch neighbouring rows of [B, N, H, D].
    pid = tl.program_id(0)
    head = (pid % n_heads).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    return pid // n_heads, batch, head, batch * n_heads + head


@triton.jit
def _decode(
    entry_ptr, offs_s, mask_s, seq_len,
    NUM_LEVELS: tl.constexpr, POOLING_FACTOR: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Index within its level and span of the entry in each slot."""
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
def _add_rows(
    acc, x_ptr, stride_n, stride_d, first, num_rows,
    MAX_ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add the `num_rows` rows from `first` on to `acc`, [BLOCK_S, BLOCK_D]."""
    # Rows of one slot that are in flight together.
    UNROLL: tl.constexpr = min(MAX_ROWS, 4)
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    mask_d = offs_d < HEAD_DIM
    x_ptrs = x_ptr + first.to(tl.int64)[:, None] * stride_n + offs_d * stride_d
    row_stride = tl.full((), stride_n, tl.int64)
    # Few blocks hold entries of every level: stop after the longest span that is there.
    most = MAX_ROWS if MAX_ROWS == UNROLL else tl.max(num_rows, 0)
    for start in range(0, most, UNROLL):
        for j in tl.static_range(UNROLL):
            mask = (start + j < num_rows)[:, None] & mask_d
            x = tl.load(x_ptrs + (start + j) * row_stride, mask=mask, other=0.0)
            acc += x.to(tl.float32)
    return acc


@triton.jit
def _add_rotated_rows(
    acc_a, acc_b, x_ptr, stride_n, stride_d, cos_ptr, sin_ptr, first, num_rows,
    MAX_ROWS: tl.constexpr, PAIRS: tl.constexpr,
    HEAD_DIM: tl.constexpr, NUM_PAIRS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """`_add_rows` for rows as pairs, each rotated to the position of the last one."""
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
def _load_slots(
    slot_ptr, offs_s, mask_s, seq_len,
    SHIFT: tl.constexpr, NUM_LEVELS: tl.constexpr, POOLING_FACTOR: tl.constexpr,
):  # fmt: skip
    """Slots that each token takes from, one [BLOCK_S] per level, -1 for none.

    With SHIFT 0 those of the entries that cover the token; with SHIFT 1 those of the entries
    whose output reaches it.
    """
    slots = ()
    level_ptr = slot_ptr
    for level in tl.static_range(NUM_LEVELS):
        index = (offs_s + SHIFT) // POOLING_FACTOR**level - SHIFT
        slots += (tl.load(level_ptr + index, mask=mask_s & (index >= 0), other=-1),)
        level_ptr += seq_len // POOLING_FACTOR**level
    return slots


@triton.jit
def _sum_slots(
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
def _without_edges(
    slots, offs_s, chunk_len, NUM_LEVELS: tl.constexpr, POOLING_FACTOR: tl.constexpr
):
    """The slots, but -1 for an entry that is in the chunk before."""
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
def _store_rows(x_ptr, x, row, mask_s, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    x_ptrs = x_ptr + row[:, None] * HEAD_DIM + offs_d
    tl.store(x_ptrs, x.to(x_ptr.dtype.element_ty), mask=mask_s[:, None] & (offs_d < HEAD_DIM))


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
    """See `lighthouse::gather`; `slot` is not read."""
    batch, n_heads, seq_len, _ = q.shape
    n_kv_heads = k.shape[1]
    sub_seq_len = entry.shape[-1]
    subs = [x.new_empty((*x.shape[:2], sub_seq_len, x.shape[3])) for x in (q, k, v)]
    coarsest = [x.contiguous() for x in (coarsest_q, coarsest_k, coarsest_v)]
    sizes = _sizes(q, num_levels, pooling_factor, cos)
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
    grads = [_empty_bnhd(x, seq_len) for x in (dsub_q, dsub_k, dsub_v)]
    sizes = _sizes(dsub_q, num_levels, pooling_factor, cos)
    grid = (triton.cdiv(seq_len, sizes["BLOCK_S"]) * n_kv_heads, batch)
    with torch.cuda.device_of(dsub_q):
        _gather_backward_kernel[grid](
            dsub_q, dsub_k, dsub_v, slot.contiguous(), *table_pointers(cos, sin, dsub_q), *grads,
            *dsub_q.stride(), *dsub_k.stride(), *dsub_v.stride(),
            n_kv_heads, seq_len, num_entries,
            GROUP=n_heads // n_kv_heads, **sizes, **pair_sizes(cos, interleaved),
        )  # fmt: skip
    return tuple(grads)


def scatter_back(
    sub_out: torch.Tensor,
    edges: torch.Tensor | None,
    entry: torch.Tensor,
    slot: torch.Tensor,
    num_levels: int,
    pooling_factor: int,
    seq_len: int,
) -> torch.Tensor:
    """See `lighthouse::scatter_back`; `entry` is not read."""
    batch, n_heads = sub_out.shape[:2]
    n_kv_heads, num_entries = slot.shape[1:]
    out = _empty_bnhd(sub_out, seq_len)
    has_edges = edges is not None
    num_chunks = edges.shape[2] if has_edges else 1
    sizes = _sizes(sub_out, num_levels, pooling_factor)
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
    sizes = _sizes(dout, num_levels, pooling_factor)
    grid = (triton.cdiv(sub_seq_len, sizes["BLOCK_S"]) * n_heads, batch)
    with torch.cuda.device_of(dout):
        _scatter_back_backward_kernel[grid](
            dout, entry.contiguous(), dsub, *dout.stride(),
            n_heads, seq_len, seq_len // num_chunks, sub_seq_len,
            GROUP=n_heads // n_kv_heads, **sizes,
        )  # fmt: skip
    return dsub


def _sizes(
    x: torch.Tensor, num_levels: int, pooling_factor: int, cos: torch.Tensor | None = None
) -> dict[str, int]:
    head_dim = x.shape[-1]
    # Cosines and sines take registers, too.
    tile = _TILE if cos is None else _TILE // 2
    block_d = triton.next_power_of_2(head_dim)
    return {
        "HEAD_DIM": head_dim,
        "NUM_LEVELS": num_levels,
        "POOLING_FACTOR": pooling_factor,
        "BLOCK_S": max(tile // block_d, 1),
        "BLOCK_D": block_d,
        "num_warps": 4,
    }


def _empty_bnhd(x: torch.Tensor, seq_len: int) -> torch.Tensor:
    batch, n_heads, _, head_dim = x.shape
    return x.new_empty((batch, seq_len, n_heads, head_dim)).transpose(1, 2)
