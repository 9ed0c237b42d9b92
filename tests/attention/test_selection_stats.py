"""Selection statistics: comparison with loops over the entries, and memory below N * N."""

import itertools

import pytest
import torch
from layer_inputs import entries_of
from torch.utils._python_dispatch import TorchDispatchMode

from lighthouse import LighthouseConfig, select
from lighthouse.scorers import score
from lighthouse.selection import select_spans
from lighthouse.selection_stats import (
    attention_on_level_0,
    coverage,
    head_overlap,
    measure,
    refined_share,
    sample_rows,
)

CASES = [
    # H, Hkv, N, num_levels, pooling_factor, topk. At most half of the coarsest level is selected.
    (2, 2, 512, 2, 2, 128),
    (6, 3, 3072, 3, 2, 384),
    (4, 2, 2048, 2, 8, 128),
    (2, 2, 2048, 4, 2, 128),
]
IDS = [f"H{h}-Hkv{g}-N{n}-L{num_levels}-p{p}-k{k}" for h, g, n, num_levels, p, k in CASES]


def setup(case):
    n_heads, n_kv_heads, seq_len, *fields = case
    torch.manual_seed(0)
    config = LighthouseConfig(*fields)
    # Each head adds its own score to a shared score, so that heads agree in part.
    scores = torch.rand(2, 2, n_kv_heads, seq_len) + torch.rand(2, 2, 1, seq_len)
    q = torch.randn(2, n_heads, seq_len, 8, dtype=torch.float64)
    k = torch.randn(2, n_kv_heads, seq_len, 8, dtype=torch.float64)
    return q, k, select(*scores, config)


def entries(selection) -> dict[tuple[int, int], dict[int, set[int]]]:
    """Indices of the entries in the sub-sequence, by level, for each sequence and kv head."""
    found = {}
    for b, g in itertools.product(*map(range, selection.slot_to_entry.shape[:2])):
        levels = found[b, g] = {level: set() for level in range(selection.config.num_levels)}
        for level, index in entries_of(selection, b, g):
            levels[level].add(index)
    return found


def refined(levels: dict[int, set[int]], level: int, p: int) -> set[int]:
    """The selected entries of a level, which are the parents of the entries below."""
    return {index // p for index in levels[level - 1]}


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_shares_and_overlap_equal_loops(case):
    _, n_kv_heads, seq_len, num_levels, p, topk = case
    selection = setup(case)[2]
    found = entries(selection)
    shares, overlaps = refined_share(selection), head_overlap(selection)
    assert shares.shape == overlaps.shape == (num_levels - 1,)
    for level in range(1, num_levels):
        sets = {place: refined(levels, level, p) for place, levels in found.items()}
        assert all(len(chosen) == topk for chosen in sets.values())
        assert shares[level - 1].item() == pytest.approx(topk / (seq_len / p**level))
        pairs = [
            len(sets[b, g] & sets[b, other]) / topk
            for b, g in sets
            for other in range(n_kv_heads)
            if other != g
        ]
        assert overlaps[level - 1].item() == pytest.approx(sum(pairs) / len(pairs))
        # The overlap is above chance and below 1.
        assert shares[level - 1] < overlaps[level - 1] < 1


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_coverage_equals_loops(case):
    _, n_kv_heads, seq_len, _, p, _ = case
    selection = setup(case)[2]
    for level, share in enumerate(coverage(selection).tolist()):
        reached = {
            (*place, position)
            for place, levels in entries(selection).items()
            for index in levels[level]
            for position in range(index * p**level + p**level - 1, (index + 2) * p**level - 1)
            if position < seq_len
        }
        assert share == pytest.approx(len(reached) / (2 * n_kv_heads * seq_len))


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_attention_on_level_0_equals_dense_attention(case):
    n_heads, n_kv_heads, seq_len, *_ = case
    q, k, selection = setup(case)
    found = entries(selection)
    rows = torch.tensor([0, 1, seq_len // 3, seq_len - 1])
    parts = attention_on_level_0(q, k, selection, rows)
    assert parts.shape == (2, n_heads, 4) and parts.dtype == torch.float64
    for b in range(2):
        for h in range(n_heads):
            g = h // (n_heads // n_kv_heads)
            for part, row in zip(parts[b, h], rows.tolist(), strict=True):
                weights = (k[b, g, : row + 1] @ q[b, h, row] / 8**0.5).softmax(-1)
                tokens = [token for token in found[b, g][0] if token <= row]
                torch.testing.assert_close(part, weights[tokens].sum())
    # Token 0 is in every sub-sequence.
    assert (parts[..., 0] == 1).all() and (parts[..., -1] < 1).all()


def test_everything_of_a_layer_under_autocast():
    config = LighthouseConfig(num_levels=3, pooling_factor=2, topk=128)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 1024, 8, dtype=torch.bfloat16) for heads in (4, 2, 2))
    figures = measure(q, k, v, config)
    with torch.autocast("cpu", torch.bfloat16):
        assert measure(q, k, v, config) == figures
    selection = select_spans(score(q, k, v, config)[0], config, 1024)
    parts = attention_on_level_0(q.double(), k.double(), selection, sample_rows(1024))
    assert figures == {
        "refined_share/level_1": 128 / 512,
        "refined_share/level_2": 128 / 256,
        **{f"coverage/level_{level}": x for level, x in enumerate(coverage(selection).tolist())},
        **{f"head_overlap/level_{level}": x for level, x in enumerate(head_overlap(selection), 1)},
        "attention_on_level_0": pytest.approx(parts.mean().item(), rel=1e-4),
    }
    # A single head has no overlap.
    assert "head_overlap/level_1" not in measure(q, k[:, :1], v[:, :1], config)


def test_rows_are_the_same_each_time_and_leave_the_generator_alone():
    before = torch.get_rng_state()
    rows = sample_rows(98_304)
    assert torch.equal(rows, sample_rows(98_304)) and torch.equal(torch.get_rng_state(), before)
    assert rows.min() >= 0 and rows.max() < 98_304 and (rows.diff() > 0).all()


class Largest(TorchDispatchMode):
    """Records the largest number of elements of a tensor."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_memory_is_rows_times_tokens():
    seq_len, config = 32_768, LighthouseConfig(num_levels=3, pooling_factor=4, topk=128)
    q, k, v = torch.randn(3, 1, 2, seq_len, 8).unbind()
    with Largest() as largest:
        measure(q, k, v, config)
    assert 16 * seq_len <= largest.numel <= 32 * seq_len
