"""Gather and scatter-back: loops as reference, gradients, the coarsest level, registered ops."""

import pytest
import torch
from layer_inputs import entries_of, random_qkv

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
    q, k, v = random_qkv(2, n_heads, n_kv_heads, seq_len, 4, dtype, requires_grad=True)
    selection = select(*torch.rand(2, 2, n_kv_heads, seq_len), config)
    return q, k, v, score(q, k, v, config)[1], selection


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_gather_equals_loops(case):
    q, k, v, coarsest, selection = setup(case)
    p = case[4]
    for x, sub in zip((q, k, v), gather(q, k, v, coarsest, selection), strict=True):
        assert sub.is_contiguous()
        for h in range(x.shape[1]):
            for b in range(2):
                expected = [
                    x[b, h, i * p**level : (i + 1) * p**level].mean(0)
                    for level, i in entries_of(selection, b, h // (x.shape[1] // k.shape[1]))
                ]
                torch.testing.assert_close(sub[b, h], torch.stack(expected))


@pytest.mark.parametrize("is_chunked", [False, True], ids=["whole", "chunks"])
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_scatter_back_and_its_gradients_equal_loops(case, is_chunked):
    n_heads, n_kv_heads, seq_len, num_levels, p, _ = case
    selection = setup(case)[-1]
    num_chunks = seq_len // p ** (num_levels - 1) // 64 if is_chunked else 1
    chunk_len = seq_len // num_chunks
    sub_seq_len = selection.slot_to_entry.shape[-1]
    leaves = [torch.randn(2, n_heads, sub_seq_len, 4, dtype=torch.float64, requires_grad=True)]
    if is_chunked:
        edges = torch.randn(2, n_heads, num_chunks, num_levels - 1, 4, dtype=torch.float64)
        leaves.append(edges.requires_grad_())
    out = scatter_back(leaves[0], selection, *leaves[1:])
    rows = torch.cat([leaves[0], *(x.flatten(2, 3) for x in leaves[1:])], 2)
    expected = torch.empty_like(out)
    for b in range(2):
        for h in range(n_heads):
            # How often each position gets each row.
            counts = torch.zeros(seq_len, rows.shape[2], dtype=torch.float64)
            for s, (level, i) in enumerate(entries_of(selection, b, h // (n_heads // n_kv_heads))):
                first = i * p**level + p**level - 1
                chunk_end = (first // chunk_len + 1) * chunk_len
                counts[first : min(first + p**level, chunk_end), s] += 1
            for edge in range(rows.shape[2] - sub_seq_len):
                chunk, level = edge // (num_levels - 1), edge % (num_levels - 1) + 1
                first = chunk * chunk_len
                counts[first : first + p**level - 1, sub_seq_len + edge] += 1
            expected[b, h] = counts @ rows[b, h]
    torch.testing.assert_close(out, expected)
    assert out.transpose(1, 2).is_contiguous()
    y = torch.randn_like(out)
    for ours, loops in zip(
        torch.autograd.grad(out, leaves, y), torch.autograd.grad(expected, leaves, y), strict=True
    ):
        torch.testing.assert_close(ours, loops)


def test_coarsest_level_is_taken_from_its_buffer():
    q, k, v, coarsest, selection = setup(CASES[3])
    marked = CoarsestLevel(*(torch.full_like(x, 7.0) for x in coarsest))
    sub = gather(q, k, v, marked, selection)[2]
    is_coarsest = (selection.level == 2)[..., None].expand_as(sub)
    assert (sub[is_coarsest] == 7).all() and (sub[~is_coarsest] != 7).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_mean_of_large_values_does_not_overflow(dtype):
    _, _, v, *_ = setup(CASES[3], dtype)
    v = torch.full_like(v, 60000)
    config = LighthouseConfig(*CASES[3][3:])
    selection = select(*torch.rand(2, 2, 2, v.shape[2]), config)
    for sub in gather(v, v, v, score(v, v, v, config)[1], selection):
        assert torch.equal(sub, v[:, :, : sub.shape[2]])


def test_ops():
    q, k, v, coarsest, selection = setup(CASES[1], torch.float32)
    maps = selection.slot_to_entry, selection.entry_to_slot
    torch.library.opcheck(_gather, (q, k, v, *coarsest, *maps, 2, 4))
    sub_out = torch.randn(2, 4, selection.slot_to_entry.shape[-1], 4, requires_grad=True)
    edges = torch.randn(2, 4, 4, 1, 4, requires_grad=True)
    for chunks in (None, edges):
        torch.library.opcheck(_scatter_back, (sub_out, chunks, *maps, 2, 4, 1024))
