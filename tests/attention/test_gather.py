"""Gather and scatter-back: loops as reference, adjoints, written elements, registered ops."""

import pytest
import torch

from lighthouse import LighthouseConfig, select
from lighthouse.gather import _gather, _scatter_back, gather, scatter_back
from lighthouse.scorers import CoarsestLevel, score

CASES = [
    # H, Hkv, N, num_levels, pooling_factor, topk
    (1, 1, 256, 2, 2, 128),
    (4, 2, 1024, 2, 4, 256),
    (3, 1, 1536, 3, 2, 384),
    (2, 2, 2048, 3, 4, 128),
    (1, 1, 1024, 2, 8, 128),
]
IDS = [f"H{h}-Hkv{g}-N{n}-L{num_levels}-p{p}-k{k}" for h, g, n, num_levels, p, k in CASES]


def setup(case, dtype=torch.float64):
    """q, k, v, the coarsest level and a selection by random scores."""
    n_heads, n_kv_heads, seq_len, *fields = case
    config = LighthouseConfig(*fields)
    q, k, v = (
        torch.randn(2, seq_len, heads, 4, dtype=dtype).transpose(1, 2).requires_grad_()
        for heads in (n_heads, n_kv_heads, n_kv_heads)
    )
    selection = select(*torch.rand(2, 2, n_kv_heads, seq_len), config)
    return q, k, v, score(q, k, v, config)[1], selection


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_gather_equals_loops(case):
    q, k, v, coarsest, selection = setup(case)
    group = q.shape[1] // k.shape[1]
    for x, sub in zip((q, k, v), gather(q, k, v, coarsest, selection), strict=True):
        assert sub.is_contiguous()
        heads = group if x is q else 1
        for h in range(x.shape[1]):
            for b in range(2):
                levels, indices = (y[b, h // heads] for y in (selection.level, selection.index))
                expected = [
                    x[b, h, i * case[4] ** level : (i + 1) * case[4] ** level].mean(0)
                    for level, i in zip(levels.tolist(), indices.tolist(), strict=True)
                ]
                torch.testing.assert_close(sub[b, h], torch.stack(expected))


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_scatter_back_equals_loops(case):
    q, k, *_, selection = setup(case)
    seq_len, p = case[2], case[4]
    group = q.shape[1] // k.shape[1]
    sub_out = torch.randn(2, q.shape[1], selection.slot_to_entry.shape[-1], 4, dtype=torch.float64)
    out = scatter_back(sub_out, selection)
    expected = torch.zeros(2, q.shape[1], seq_len, 4, dtype=torch.float64)
    for b in range(2):
        for h in range(q.shape[1]):
            levels, indices = (y[b, h // group] for y in (selection.level, selection.index))
            for s, (level, i) in enumerate(zip(levels.tolist(), indices.tolist(), strict=True)):
                first = i * p**level + p**level - 1
                expected[b, h, first : first + p**level] += sub_out[b, h, s]
    torch.testing.assert_close(out, expected)
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_scatter_back_of_chunks_equals_loops(case):
    q, k, *_, selection = setup(case)
    seq_len, num_levels, p = case[2], case[3], case[4]
    num_chunks = seq_len // p ** (num_levels - 1) // 64
    chunk_len = seq_len // num_chunks
    group = q.shape[1] // k.shape[1]
    sub_out = torch.randn(2, q.shape[1], selection.slot_to_entry.shape[-1], 4, dtype=torch.float64)
    edges = torch.randn(2, q.shape[1], num_chunks, num_levels - 1, 4, dtype=torch.float64)
    leaves = [sub_out.requires_grad_(), edges.requires_grad_()]
    out = scatter_back(sub_out, selection, edges)
    expected = torch.zeros_like(out)
    for b in range(2):
        for h in range(q.shape[1]):
            levels, indices = (y[b, h // group] for y in (selection.level, selection.index))
            for s, (level, i) in enumerate(zip(levels.tolist(), indices.tolist(), strict=True)):
                first = i * p**level + p**level - 1
                chunk_end = (first // chunk_len + 1) * chunk_len
                expected[b, h, first : min(first + p**level, chunk_end)] += sub_out[b, h, s]
            for chunk in range(num_chunks):
                for level in range(1, num_levels):
                    first = chunk * chunk_len
                    expected[b, h, first : first + p**level - 1] += edges[b, h, chunk, level - 1]
    torch.testing.assert_close(out, expected)
    y = torch.randn_like(out)
    for ours, loops in zip(
        torch.autograd.grad(out, leaves, y), torch.autograd.grad(expected, leaves, y), strict=True
    ):
        torch.testing.assert_close(ours, loops)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_backward_is_the_adjoint(case):
    q, k, v, coarsest, selection = setup(case)
    for x, sub in zip((q, k, v), gather(q, k, v, coarsest, selection), strict=True):
        y = torch.randn_like(sub)
        (adjoint,) = torch.autograd.grad(sub, x, y, retain_graph=True)
        torch.testing.assert_close((sub * y).sum(), (x * adjoint).sum())
    sub_out = torch.randn(*q.shape[:2], sub.shape[2], 4, dtype=torch.float64, requires_grad=True)
    out = scatter_back(sub_out, selection)
    y = torch.randn_like(out)
    (adjoint,) = torch.autograd.grad(out, sub_out, y)
    torch.testing.assert_close((out * y).sum(), (sub_out * adjoint).sum())


def test_coarsest_level_is_taken_from_its_buffer():
    q, k, v, coarsest, selection = setup(CASES[3])
    marked = CoarsestLevel(*(torch.full_like(x, 7.0) for x in coarsest))
    sub = gather(q, k, v, marked, selection)[2]
    is_coarsest = (selection.level == 2)[..., None].expand_as(sub)
    assert (sub[is_coarsest] == 7).all() and (sub[~is_coarsest] != 7).all()


def test_ops():
    q, k, v, coarsest, selection = setup(CASES[1], torch.float32)
    maps = selection.slot_to_entry, selection.entry_to_slot
    torch.library.opcheck(_gather, (q, k, v, *coarsest, *maps, 2, 4))
    sub_out = torch.randn(2, 4, selection.slot_to_entry.shape[-1], 4, requires_grad=True)
    edges = torch.randn(2, 4, 4, 1, 4, requires_grad=True)
    for chunks in (None, edges):
        torch.library.opcheck(_scatter_back, (sub_out, chunks, *maps, 2, 4, 1024))
