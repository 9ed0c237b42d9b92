"""Gather and scatter-back: from tokens to the sub-sequence and back (paper, 3.3 and 3.5).

    gather          sub[s] = mean of x over the p**l tokens covered by the entry (l, i) in slot s;
                    with a rotary table, q and k are first rotated to the last of these tokens
    scatter-back    out[t] = sum over levels l of sub[slot(l, (t + 1) // p**l - 1)]

Scatter-back shifts an entry's output by p**l - 1 tokens, so that it first reaches the last token
of its span. Entry (l, i) reaches the tokens `i*p**l + p**l - 1 .. i*p**l + 2*p**l - 2` below N. An
absent entry contributes nothing. Scatter-back is a gather through the inverse map: it writes each
output once and does not accumulate in memory. The backward passes are

    gather's          dx[t]   = sum over l of dsub[slot(l, t // p**l)] / p**l, rotated back
    scatter-back's    dsub[s] = sum of dout over the tokens that entry s reaches

Under context parallelism the tokens are chunks of a longer sequence. An entry then reaches tokens
of its own chunk only. The first tokens of a chunk add outputs of the last entries of the previous
chunk, which may be on another rank. These outputs are passed as `edges`.

Sums accumulate in fp32 (fp64 for fp64 input) and are rounded once. With GQA the query heads of a
group share the maps of their kv head. Only the two maps and the rotary table are saved for the
backward passes.
"""

import torch
import torch.nn.functional as F

from lighthouse.ops import register
from lighthouse.rotary import RotaryPhases, rotate, rotate_to_last, table_arguments
from lighthouse.scorers import CoarsestLevel
from lighthouse.selection import Selection


def gather(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    coarsest: CoarsestLevel,
    selection: Selection,
    rotary: RotaryPhases | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pool q, k and v over the selected entries.

    Args:
        q: [B, H, N, D], any strides.
        k, v: [B, Hkv, N, D], any strides.
        coarsest: means of q, k, v over the coarsest level. Its gradient flows to q, k, v.
        rotary: if given, q and k are rotated to the last position of a span, as in `coarsest`.

    Returns:
        [B, H, S, D], [B, Hkv, S, D], [B, Hkv, S, D], contiguous.
    """
    config = selection.config
    return _gather(
        q, k, v, *coarsest, selection.slot_to_entry, selection.entry_to_slot,
        config.num_levels, config.pooling_factor, *table_arguments(rotary),
    )  # fmt: skip


def scatter_back(
    sub_out: torch.Tensor, selection: Selection, edges: torch.Tensor | None = None
) -> torch.Tensor:
    """Map the output of the sub-sequence back to the tokens.

    Args:
        sub_out: [B, H, S, D], any strides.
        edges: [B, H, chunks, L-1, D] if the tokens are chunks of a longer sequence: the output of
            the last entry of levels 1 .. L-1 before each chunk, zeros for an absent entry.

    Returns:
        [B, H, N, D] with the strides of a contiguous [B, N, H, D].
    """
    config = selection.config
    return _scatter_back(
        sub_out, edges, selection.slot_to_entry, selection.entry_to_slot,
        config.num_levels, config.pooling_factor, selection.seq_len,
    )  # fmt: skip


def gather_reference(
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
    seq_len = q.shape[2]
    table, none = (cos, sin, interleaved), (None, None, False)
    sources = (q, coarsest_q, table), (k, coarsest_k, table), (v, coarsest_v, none)
    subs = tuple(x.new_empty((*x.shape[:2], entry.shape[-1], x.shape[3])) for x in (q, k, v))
    for level, slots, index in _entries_by_level(entry, seq_len, num_levels, pooling_factor):
        for (x, coarse, phases), sub in zip(sources, subs, strict=True):
            if level == num_levels - 1:
                pooled = _rows(coarse)
            else:
                span = pooling_factor**level
                pooled = _mean_spans(x, index * span, span, *phases)
            _rows(sub).index_copy_(0, _row_ids(sub, slots).flatten(), pooled)
    return subs


def _gather_fake(q, k, v, coarsest_q, coarsest_k, coarsest_v, entry, *_):
    sub_seq_len = entry.shape[-1]
    return tuple(x.new_empty((*x.shape[:2], sub_seq_len, x.shape[3])) for x in (q, k, v))


def gather_backward_reference(
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
    lens = [seq_len // pooling_factor**level for level in range(num_levels)]
    slots = slot.split(lens, -1)
    table, none = (cos, sin, interleaved), (None, None, False)
    return (
        _spread_to_tokens(dsub_q, slots, pooling_factor, *table),
        _spread_to_tokens(dsub_k, slots, pooling_factor, *table),
        _spread_to_tokens(dsub_v, slots, pooling_factor, *none),
    )


def _gather_backward_fake(dsub_q, dsub_k, dsub_v, slot, num_levels, pooling_factor, seq_len, *_):
    return tuple(empty_bnhd(dsub, seq_len) for dsub in (dsub_q, dsub_k, dsub_v))


_gather_backward = register(
    "gather_backward", gather_backward_reference, _gather_backward_fake, kernels="gather"
)


def _gather_setup(ctx, inputs, output):
    q, *_, slot, num_levels, pooling_factor, cos, sin, interleaved = inputs
    ctx.save_for_backward(slot, cos, sin)
    ctx.sizes = num_levels, pooling_factor, q.shape[2]
    ctx.interleaved = interleaved


def _gather_autograd(ctx, dsub_q, dsub_k, dsub_v):
    slot, *table = ctx.saved_tensors
    grads = _gather_backward(dsub_q, dsub_k, dsub_v, slot, *ctx.sizes, *table, ctx.interleaved)
    return *grads, *(None,) * 10


_gather = register(
    "gather",
    gather_reference,
    _gather_fake,
    kernels="gather",
    backward=_gather_autograd,
    setup_context=_gather_setup,
)


def scatter_back_reference(
    sub_out: torch.Tensor,
    edges: torch.Tensor | None,
    entry: torch.Tensor,
    slot: torch.Tensor,
    num_levels: int,
    pooling_factor: int,
    seq_len: int,
) -> torch.Tensor:
    sub_seq_len = sub_out.shape[2]
    lens = [seq_len // pooling_factor**level for level in range(num_levels)]
    if edges is not None:
        # Edges get the slots after those of the sub-sequence.
        num_chunks = edges.shape[2]
        sub_out = torch.cat([sub_out, edges.flatten(2, 3)], 2)
        edge_slots = torch.arange(sub_seq_len, sub_out.shape[2], device=slot.device).int()
        edge_slots = edge_slots.view(num_chunks, num_levels - 1)
    slots = []
    for level, of_level in enumerate(slot.split(lens, -1)):
        span = pooling_factor**level
        shifted = F.pad(of_level.repeat_interleave(span, -1), (span - 1, 0), value=-1)
        shifted = shifted[..., :seq_len].contiguous()
        if edges is not None and level:
            by_chunk = shifted.view(*shifted.shape[:2], num_chunks, -1)
            by_chunk[..., : span - 1] = edge_slots[:, level - 1, None]
        slots.append(shifted)
    return _sum_slots(sub_out, torch.stack(slots, -1))


def _scatter_back_fake(sub_out, edges, entry, slot, num_levels, pooling_factor, seq_len):
    return empty_bnhd(sub_out, seq_len)


def scatter_back_backward_reference(
    dout: torch.Tensor, entry: torch.Tensor, num_levels: int, pooling_factor: int, num_chunks: int
) -> torch.Tensor:
    seq_len = dout.shape[2]
    dsub = dout.new_empty((*dout.shape[:2], entry.shape[-1], dout.shape[3]))
    for level, slots, index in _entries_by_level(entry, seq_len, num_levels, pooling_factor):
        span = pooling_factor**level
        starts = index * span + span - 1
        pooled = _sum_spans(dout, starts, span, seq_len // num_chunks)
        _rows(dsub).index_copy_(0, _row_ids(dsub, slots).flatten(), pooled)
    return dsub


def _scatter_back_backward_fake(dout, entry, *_):
    return dout.new_empty((*dout.shape[:2], entry.shape[-1], dout.shape[3]))


_scatter_back_backward = register(
    "scatter_back_backward",
    scatter_back_backward_reference,
    _scatter_back_backward_fake,
    kernels="scatter_back",
)


def _scatter_back_setup(ctx, inputs, output):
    _, edges, entry, _, num_levels, pooling_factor, _ = inputs
    ctx.save_for_backward(entry)
    num_chunks = 1 if edges is None else edges.shape[2]
    ctx.has_edges = edges is not None
    ctx.sizes = num_levels, pooling_factor, num_chunks


def _scatter_back_autograd(ctx, dout):
    (entry,) = ctx.saved_tensors
    dsub = _scatter_back_backward(dout, entry, *ctx.sizes)
    dedges = _edges_backward(dout, *ctx.sizes) if ctx.has_edges else None
    return dsub, dedges, *(None,) * 5


def _edges_backward(
    dout: torch.Tensor, num_levels: int, pooling_factor: int, num_chunks: int
) -> torch.Tensor:
    """The edge of level l reaches the first p**l - 1 tokens of its chunk."""
    accumulate = torch.float64 if dout.dtype == torch.float64 else torch.float32
    chunks = dout.unflatten(2, (num_chunks, -1))
    spans = [pooling_factor**level for level in range(1, num_levels)]
    sums = [chunks[:, :, :, : span - 1].sum(3, dtype=accumulate) for span in spans]
    return torch.stack(sums, 3).to(dout.dtype)


_scatter_back = register(
    "scatter_back",
    scatter_back_reference,
    _scatter_back_fake,
    kernels="scatter_back",
    backward=_scatter_back_autograd,
    setup_context=_scatter_back_setup,
)


# The helpers treat a tensor as rows of D elements. Each row of [B, H, n, D] has one id, for any
# order of its dimensions in memory. An embedding bag sums rows by id in one pass.


def _rows(x: torch.Tensor) -> torch.Tensor:
    """The rows of a dense `x` in memory order, [B*H*n, D]."""
    return x.as_strided((x.numel() // x.shape[-1], x.shape[-1]), (x.shape[-1], 1))


def _row_ids(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Row ids of `x` at `positions` of the sequence: [B, Hkv, ...] to [B, H, ...]."""
    batch, n_heads, _, head_dim = x.shape
    positions = positions.repeat_interleave(n_heads // positions.shape[1], 1)
    batch_start = torch.arange(batch, device=x.device)[:, None] * x.stride(0)
    head_start = batch_start + torch.arange(n_heads, device=x.device) * x.stride(1)
    head_start = head_start.view(batch, n_heads, *[1] * (positions.dim() - 2))
    return (head_start + positions * x.stride(2)) // head_dim


def _dense(x: torch.Tensor) -> torch.Tensor:
    """`x` itself if its memory is [B, H, n, D] or [B, n, H, D] without gaps, else a copy."""
    return x if x.transpose(1, 2).is_contiguous() else x.contiguous()


def empty_bnhd(x: torch.Tensor, seq_len: int) -> torch.Tensor:
    """Uninitialised [B, H, N, D] with the strides of a contiguous [B, N, H, D]."""
    batch, n_heads, _, head_dim = x.shape
    return x.new_empty((batch, seq_len, n_heads, head_dim)).transpose(1, 2)


def _entries_by_level(entry, seq_len, num_levels, pooling_factor):
    """Yield each level, its slots and the indices of their entries, both [B, Hkv, n], by slot."""
    offset = 0
    for level in range(num_levels):
        level_len = seq_len // pooling_factor**level
        of_level = (entry >= offset) & (entry < offset + level_len)
        slots = of_level.nonzero()[:, -1].view(*entry.shape[:2], -1)
        yield level, slots, entry.gather(-1, slots) - offset
        offset += level_len


def _mean_spans(
    x: torch.Tensor,
    starts: torch.Tensor,
    span: int,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    interleaved: bool,
) -> torch.Tensor:
    """Mean of the `span` tokens from each start on, rotated to the last one if a table is given.

    Args:
        x: [B, H, N, D].
        starts: [B, Hkv, n].

    Returns:
        [B*H*n, D]
    """
    x = _dense(x)
    ids = _row_ids(x, starts.long()[..., None] + torch.arange(span, device=x.device)).flatten(0, 2)
    if cos is None or span == 1:
        # In the dtype of x the sum would be rounded before the division, and fp16 can overflow.
        rows = _rows(x).to(torch.promote_types(x.dtype, torch.float32))
        return F.embedding_bag(ids, rows, mode="mean").to(x.dtype)
    rows = _rows(x)[ids].to(torch.promote_types(x.dtype, torch.float32))  # [B*H*n, span, D]
    rotated = rotate_to_last(rows, cos, sin, interleaved).flatten(0, 1)
    # The order of summation is the same as without a table, so rotation by 0 is bitwise neutral.
    ids = torch.arange(ids.numel(), device=x.device).view_as(ids)
    return F.embedding_bag(ids, rotated, mode="mean").to(x.dtype)


def _sum_spans(x: torch.Tensor, starts: torch.Tensor, span: int, chunk_len: int) -> torch.Tensor:
    """Sum of the `span` tokens from each start on, excluding tokens after the chunk of the start.

    Args:
        x: [B, H, N, D].
        starts: [B, Hkv, n], below N.

    Returns:
        [B*H*n, D]
    """
    x = _dense(x)
    tokens = starts.long()[..., None] + torch.arange(span, device=x.device)
    ids = _row_ids(x, tokens.clamp(max=x.shape[2] - 1)).flatten(0, 2)
    if span == 1:
        return _rows(x)[ids.flatten()]
    inside = tokens // chunk_len == tokens[..., :1] // chunk_len
    inside = inside.repeat_interleave(x.shape[1] // tokens.shape[1], 1)
    return F.embedding_bag(
        ids, _rows(x), mode="sum", per_sample_weights=inside.flatten(0, 2).to(x.dtype)
    )


def _spread_to_tokens(
    dsub: torch.Tensor,
    slots: tuple[torch.Tensor, ...],
    pooling_factor: int,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    interleaved: bool,
) -> torch.Tensor:
    """Gradient of the tokens from that of the sub-sequence, from the coarsest level down.

    Each child receives 1/p of the gradient of its parent, rotated back to the last token of the
    child.

    Args:
        dsub: [B, H, S, D].
        slots: for every level, [B, Hkv, N/p**l]; -1 for an absent entry.

    Returns:
        [B, H, N, D] with the strides of a contiguous [B, N, H, D].
    """
    dsub = _dense(dsub)
    accumulate = torch.promote_types(dsub.dtype, torch.float32)
    # All entries of the coarsest level are in the sub-sequence.
    grad = _rows(dsub)[_row_ids(dsub, slots[-1].long())].to(accumulate)  # [B, H, N/p**(L-1), D]
    for level in range(len(slots) - 2, -1, -1):
        children = empty_bnhd(grad, grad.shape[2] * pooling_factor)
        spread = children.unflatten(2, (-1, pooling_factor))
        shares = (grad / pooling_factor)[..., None, :]
        if cos is None:
            spread.copy_(shares)
        else:
            # Positions from the last token of each child to that of its parent.
            steps = pooling_factor**level * torch.arange(pooling_factor - 1, -1, -1)
            for child, step in enumerate(steps.tolist()):
                spread[..., child, :] = rotate(
                    shares[..., 0, :], cos[step], -sin[step], interleaved
                )
        is_present = slots[level] >= 0
        index = is_present.nonzero()[:, -1].view(*is_present.shape[:2], -1)
        rows = _rows(dsub)[_row_ids(dsub, slots[level].gather(-1, index).long()).flatten()]
        _rows(children).index_add_(0, _row_ids(children, index).flatten(), rows.to(accumulate))
        grad = children
    return grad.to(dsub.dtype)


def _sum_slots(sub: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Sum over levels of the rows in the slots of each token; slot -1 adds 0.

    Args:
        sub: [B, H, S, D].
        slots: [B, Hkv, N, L].

    Returns:
        [B, H, N, D] with the strides of a contiguous [B, N, H, D].
    """
    sub = _dense(sub)
    rows = _rows(sub)
    zero_row = rows.shape[0]
    rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
    is_absent = slots.repeat_interleave(sub.shape[1] // slots.shape[1], 1) < 0
    ids = _row_ids(sub, slots.long()).masked_fill_(is_absent, zero_row)
    ids = ids.transpose(1, 2)  # [B, N, H, L]
    out = F.embedding_bag(ids.flatten(0, 2), rows, mode="sum")
    return out.view(*ids.shape[:3], rows.shape[1]).transpose(1, 2)
