"""Norm scores of all levels and the pooled coarsest level, in one pass over q, k and v.

A program processes a few spans of the coarsest level of one kv head: first k, then v, then each
query head of the group. This order needs the fewest registers. The loop over the tokens of a span
is unrolled, and each iteration reads one row of [spans, D]. Only the norm of a row then needs a
reduction over threads. Maxima over the tokens of an entry and sums over a span stay in registers.
A tile [tokens, spans, D] would be shorter code, but Triton up to 3.6 distributes its tokens over
threads. For spans longer than 16 tokens, 8 tokens are unrolled in a loop with running maxima.
Nothing of level 0 is written.

Bytes moved, with b bytes per element and R = B * (H + 2 Hkv) * D * b bytes per token:

    read     N R
    written  N R / p**(L-1), and 8 B Hkv (E - N) of scores

A rotary table, which rotates q and k to the last token of a span, adds 4 p**(L-1) bytes read per
rotated element of a head.
"""

import torch
import triton
import triton.language as tl

from lighthouse.kernels.rotary import (
    HALVES,
    INTERLEAVED,
    NO_PAIRS,
    load_pairs,
    load_phases,
    pair_sizes,
    rotate,
    split_pairs,
    store_pairs,
    table_pointers,
)

_ROW_BYTES = 2048
"""Bytes per token over all spans of a program: one load of 16 bytes for each of 128 threads."""

_ROWS = 8
"""Minimum number of loads per thread and tensor. Also the number of tokens unrolled in a long
span."""


@triton.jit
def _norm_score_pool_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr,
    q_scores_ptr, k_scores_ptr,
    coarsest_q_ptr, coarsest_k_ptr, coarsest_v_ptr,
    q_stride_b, q_stride_h, q_stride_n, q_stride_d,
    k_stride_b, k_stride_h, k_stride_n, k_stride_d,
    v_stride_b, v_stride_h, v_stride_n, v_stride_d,
    n_kv_heads, seq_len, num_scores,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    NUM_LEVELS: tl.constexpr, LEVEL_LANES: tl.constexpr, POOLING_FACTOR: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
    PAIRS: tl.constexpr, NUM_PAIRS: tl.constexpr,
):  # fmt: skip
    # Heads vary fastest, so that adjacent programs read adjacent rows of [B, N, H, D].
    pid = tl.program_id(0)
    head = (pid % n_kv_heads).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    flat_head = batch * n_kv_heads + head
    offs_r = pid // n_kv_heads * BLOCK_R + tl.arange(0, BLOCK_R)

    q_ptr += batch * q_stride_b + head * GROUP * q_stride_h
    k_ptr += batch * k_stride_b + head * k_stride_h
    v_ptr += batch * v_stride_b + head * v_stride_h
    q_scores_ptr += flat_head * num_scores
    k_scores_ptr += flat_head * num_scores
    coarsest_size = (seq_len // POOLING_FACTOR ** (NUM_LEVELS - 1)).to(tl.int64) * HEAD_DIM
    coarsest_q_ptr += flat_head * GROUP * coarsest_size
    _score_pool_head(
        k_ptr, k_stride_n, k_stride_d, cos_ptr, sin_ptr, k_scores_ptr, False,
        coarsest_k_ptr + flat_head * coarsest_size, offs_r, seq_len, True, False,
        HEAD_DIM, NUM_LEVELS, LEVEL_LANES, POOLING_FACTOR, BLOCK_T, BLOCK_R, BLOCK_D,
        PAIRS, NUM_PAIRS,
    )  # fmt: skip
    _score_pool_head(
        v_ptr, v_stride_n, v_stride_d, cos_ptr, sin_ptr, k_scores_ptr, False,
        coarsest_v_ptr + flat_head * coarsest_size, offs_r, seq_len, False, False,
        HEAD_DIM, NUM_LEVELS, LEVEL_LANES, POOLING_FACTOR, BLOCK_T, BLOCK_R, BLOCK_D,
        NO_PAIRS, NUM_PAIRS,
    )  # fmt: skip
    for g in range(GROUP):
        _score_pool_head(
            q_ptr + g * q_stride_h, q_stride_n, q_stride_d, cos_ptr, sin_ptr, q_scores_ptr, g > 0,
            coarsest_q_ptr + g * coarsest_size, offs_r, seq_len, True, GROUP > 1,
            HEAD_DIM, NUM_LEVELS, LEVEL_LANES, POOLING_FACTOR, BLOCK_T, BLOCK_R, BLOCK_D,
            PAIRS, NUM_PAIRS,
        )  # fmt: skip


@triton.jit
def _score_pool_head(
    x_ptr, stride_n, stride_d, cos_ptr, sin_ptr, scores_ptr, has_scores, coarsest_ptr, offs_r,
    seq_len, HAS_NORMS: tl.constexpr, IS_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, NUM_LEVELS: tl.constexpr, LEVEL_LANES: tl.constexpr,
    POOLING_FACTOR: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
    PAIRS: tl.constexpr, NUM_PAIRS: tl.constexpr,
):  # fmt: skip
    """Scores of one head if HAS_NORMS, and its means of the coarsest level.

    For the later heads of a group (`has_scores`), the result is the maximum with the stored scores.
    """
    SPAN: tl.constexpr = POOLING_FACTOR ** (NUM_LEVELS - 1)
    # Number of rows of one span that are loaded together.
    IN_FLIGHT: tl.constexpr = min(BLOCK_T, 8 if PAIRS == INTERLEAVED else 4)
    BLOCK_P: tl.constexpr = max(BLOCK_D // 2, 1)
    mask_r = offs_r < seq_len // SPAN
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < HEAD_DIM
    mask = mask_r[:, None] & mask_d[None, :]
    # For rows as pairs, these are the sums of the first and of the second elements.
    sums = tl.zeros((BLOCK_R, BLOCK_D if PAIRS == NO_PAIRS else BLOCK_P), tl.float32)
    second_sums = sums
    best = tl.full((LEVEL_LANES, BLOCK_R), float("-inf"), tl.float32)
    row_stride = tl.full((), stride_n, tl.int64)
    for start in range(0, SPAN, BLOCK_T):
        first = offs_r * SPAN + start
        row_ptrs = x_ptr + first.to(tl.int64)[:, None] * row_stride
        x_ptrs = row_ptrs + offs_d[None, :] * stride_d
        maxima = ()
        tile_sums = tl.zeros_like(sums)
        second_tile_sums = tile_sums
        for group in tl.static_range(0, BLOCK_T, IN_FLIGHT):
            # All loads of a group are issued before the first use.
            rows = ()
            for t in tl.static_range(IN_FLIGHT):
                offset = (group + t) * row_stride
                if PAIRS == HALVES:
                    pairs = load_pairs(
                        row_ptrs + offset, stride_d, mask_r[:, None],
                        PAIRS, HEAD_DIM, NUM_PAIRS, BLOCK_P,
                    )  # fmt: skip
                    rows += (pairs,)
                else:
                    rows += (tl.load(x_ptrs + offset, mask=mask, other=0.0),)
            for t in tl.static_range(IN_FLIGHT):
                if PAIRS == NO_PAIRS:
                    x = rows[t].to(tl.float32)  # [BLOCK_R, BLOCK_D]
                    tile_sums += x
                    squares = x * x
                else:
                    a, b, squares = _rotate_row(
                        rows[t], SPAN - 1 - start - group - t, cos_ptr, sin_ptr, mask_r[:, None],
                        PAIRS, NUM_PAIRS, BLOCK_R, BLOCK_P,
                    )  # fmt: skip
                    tile_sums += a
                    second_tile_sums += b
                if HAS_NORMS:
                    maxima += (tl.sum(squares, 1),)
        sums += tile_sums
        second_sums += second_tile_sums
        if HAS_NORMS:
            maxima = _store_tile_maxima(
                scores_ptr, maxima, first, mask_r, has_scores, seq_len, IS_GROUP,
                NUM_LEVELS, POOLING_FACTOR, BLOCK_T,
            )  # fmt: skip
            if SPAN > BLOCK_T:
                best = tl.maximum(best, _strongest(maxima, 0, len(maxima))[None, :])
                best = _store_running_maxima(
                    scores_ptr, best, start, first, mask_r, has_scores, seq_len, IS_GROUP,
                    NUM_LEVELS, LEVEL_LANES, POOLING_FACTOR, BLOCK_T, BLOCK_R,
                )  # fmt: skip
    if HAS_NORMS and IS_GROUP:
        # The next head of the group reads scores written by other threads.
        tl.debug_barrier()
    _store_means(
        coarsest_ptr, sums * (1.0 / SPAN), second_sums * (1.0 / SPAN), offs_r, mask_r[:, None],
        HEAD_DIM, PAIRS, NUM_PAIRS, BLOCK_D, BLOCK_P,
    )  # fmt: skip


@triton.jit
def _store_means(
    coarsest_ptr, means, second_means, offs_r, mask_r,
    HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr, NUM_PAIRS: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Store rows of the coarsest level, given as rows or as first and second elements of pairs."""
    row_ptrs = coarsest_ptr + offs_r.to(tl.int64)[:, None] * HEAD_DIM
    if PAIRS == NO_PAIRS:
        offs_d = tl.arange(0, BLOCK_D)[None, :]
        means = means.to(coarsest_ptr.dtype.element_ty)
        tl.store(row_ptrs + offs_d, means, mask=mask_r & (offs_d < HEAD_DIM))
    else:
        store_pairs(row_ptrs, means, second_means, mask_r, PAIRS, HEAD_DIM, NUM_PAIRS, BLOCK_P)


@triton.jit
def _rotate_row(
    row, to_last, cos_ptr, sin_ptr, mask,
    PAIRS: tl.constexpr, NUM_PAIRS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Rotate one token of each span by `to_last` positions.

    Returns the first and second elements of its pairs, each [BLOCK_R, BLOCK_P], and the terms of
    its squared norm.
    """
    if PAIRS == HALVES:
        a = row[0].to(tl.float32)
        b = row[1].to(tl.float32)
        squares = a * a + b * b
    else:
        x = row.to(tl.float32)
        squares = x * x
        a, b = split_pairs(x)
    positions = tl.zeros((BLOCK_R, 1), tl.int32) + to_last
    cos, sin = load_phases(cos_ptr, sin_ptr, positions, mask, NUM_PAIRS, BLOCK_P)
    a, b = rotate(a, b, cos, sin)
    return a, b, squares


@triton.jit
def _store_tile_maxima(
    scores_ptr, maxima, first, mask_r, has_scores, seq_len, IS_GROUP: tl.constexpr,
    NUM_LEVELS: tl.constexpr, POOLING_FACTOR: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Store the scores of the entries of a tile, from its squared norms.

    Returns the scores of the coarsest level in the tile.
    """
    level_ptr = scores_ptr
    level_len = seq_len
    for level in tl.static_range(1, NUM_LEVELS):
        level_len = level_len // POOLING_FACTOR
        if POOLING_FACTOR**level <= BLOCK_T:
            finer = maxima
            maxima = ()
            for i in tl.static_range(BLOCK_T // POOLING_FACTOR**level):
                strongest = _strongest(finer, i * POOLING_FACTOR, POOLING_FACTOR)
                maxima += (strongest,)
                index = first // POOLING_FACTOR**level + i
                _store_maxima(level_ptr + index, strongest, mask_r, has_scores, IS_GROUP)
        level_ptr += level_len
    return maxima


@triton.jit
def _strongest(scores, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """Elementwise maximum of COUNT tensors of a tuple, starting at FIRST."""
    strongest = scores[FIRST]
    for i in tl.static_range(1, COUNT):
        strongest = tl.maximum(strongest, scores[FIRST + i])
    return strongest


@triton.jit
def _store_running_maxima(
    scores_ptr, best, start, first, mask_r, has_scores, seq_len, IS_GROUP: tl.constexpr,
    NUM_LEVELS: tl.constexpr, LEVEL_LANES: tl.constexpr, POOLING_FACTOR: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Store the scores of entries longer than a tile that end with it.

    `best` has one row of running maxima per level.
    """
    offs_l = tl.arange(0, LEVEL_LANES)
    span = tl.full((LEVEL_LANES,), 1, tl.int32)
    offset = tl.zeros((LEVEL_LANES,), tl.int32)
    level_len = seq_len
    for level in tl.static_range(1, NUM_LEVELS):
        level_len = level_len // POOLING_FACTOR
        span = tl.where(offs_l >= level, span * POOLING_FACTOR, span)
        offset += tl.where(offs_l > level, level_len, 0)
    is_done = (offs_l < NUM_LEVELS) & (span > BLOCK_T) & ((start + BLOCK_T) % span == 0)
    index = offset[:, None] + first[None, :] // span[:, None]
    mask = is_done[:, None] & mask_r[None, :]
    _store_maxima(scores_ptr + index, best, mask, has_scores, IS_GROUP)
    return tl.where(is_done[:, None], float("-inf"), best)


@triton.jit
def _store_maxima(scores_ptrs, maxima, mask, has_scores, IS_GROUP: tl.constexpr):
    if IS_GROUP:
        before = tl.load(scores_ptrs, mask=mask & has_scores, other=float("-inf"))
        maxima = tl.maximum(maxima, before)
    tl.store(scores_ptrs, maxima, mask=mask)


def norm_score_pool(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    num_levels: int,
    pooling_factor: int,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `lighthouse::norm_score_pool`. q, k, v are bf16, fp16 or fp32 with any strides."""
    batch, n_heads, seq_len, head_dim = q.shape
    n_kv_heads = k.shape[1]
    span = pooling_factor ** (num_levels - 1)
    coarsest_len = seq_len // span
    num_scores = sum(seq_len // pooling_factor**level for level in range(1, num_levels))
    q_scores, k_scores = (
        q.new_empty((batch, n_kv_heads, num_scores), dtype=torch.float32) for _ in range(2)
    )
    coarsest = [x.new_empty((*x.shape[:2], coarsest_len, head_dim)) for x in (q, k, v)]
    block_d = triton.next_power_of_2(head_dim)
    pairs = pair_sizes(cos, interleaved)
    # Half rows in separate tiles need more registers, so fewer tokens are unrolled.
    is_long = span > (_ROWS if pairs["PAIRS"] == HALVES.value else 2 * _ROWS)
    block_t = _ROWS if is_long else span
    block_r = max(_ROW_BYTES // (q.element_size() * block_d), 1) * max(_ROWS // block_t, 1)
    grid = (triton.cdiv(coarsest_len, block_r) * n_kv_heads, batch)
    with torch.cuda.device_of(q):
        _norm_score_pool_kernel[grid](
            q, k, v, *table_pointers(cos, sin, q), q_scores, k_scores, *coarsest,
            *q.stride(), *k.stride(), *v.stride(),
            n_kv_heads, seq_len, num_scores,
            GROUP=n_heads // n_kv_heads, HEAD_DIM=head_dim,
            NUM_LEVELS=num_levels, LEVEL_LANES=triton.next_power_of_2(num_levels),
            POOLING_FACTOR=pooling_factor, BLOCK_T=block_t, BLOCK_R=block_r, BLOCK_D=block_d,
            **pairs, num_warps=4,
        )  # fmt: skip
    return q_scores, k_scores, *coarsest
