"""Costs: comparison with counts by hand and with the sizes of the tensors."""

import pytest
import torch

from lighthouse import LighthouseConfig
from lighthouse.costs import (
    Shape,
    attention_flops,
    dense_costs,
    edge_bytes,
    exchange_bytes,
    floor_seconds,
    layer_costs,
)
from lighthouse.gather import gather, scatter_back
from lighthouse.scorers import score
from lighthouse.selection import select_spans


def test_attention_flops_count_half_of_the_square():
    # Four FLOPs per head dimension and attended position: a multiplication and an addition in
    # each of two products. Of 8 positions, position t attends to t + 1: about half of 64.
    assert attention_flops(2, 3, 8, 16) == 2 * 3 * 4 * 16 * 8 * 8 // 2


def test_layer_at_98k():
    config = LighthouseConfig(3, 4, 1536)
    costs = layer_costs(Shape(1, 8, 8, 98304, 128, 2), config)
    row = 256
    assert config.sub_seq_len(98304) == 18432
    # Reads q, k, v. Writes a sixteenth of them, with the scores of levels 1 and 2.
    scores = 2 * 4 * 8 * (24576 + 6144)
    assert costs["score"].bytes == 24 * (98304 + 6144) * row + scores
    # 6144 tokens for level 0, 6144 spans of 4 for level 1, and the whole level 2.
    read = 6144 + 6144 * 4 + 6144
    assert costs["gather"].bytes == 24 * (read + 18432) * row + 4 * 8 * 18432
    assert costs["scatter back"].bytes == 8 * (18432 + 98304) * row + 4 * 8 * (98304 + 30720)
    assert costs["attend"].flops == 8 * 2 * 18432**2 * 128
    assert costs["attend backward"].flops == costs["attend"].flops * 5 // 2


@pytest.mark.parametrize(
    ("scorer", "flops"),
    [
        ("norm", 0),
        # Both directions, four classes of 256 tokens in each of three heads.
        ("dilated", 2 * attention_flops(1, 4 * 3, 256, 16)),
        # Both directions, 1,024 tokens in three heads. Updating the state takes a multiplication
        # and an addition per element. Reading it takes as many.
        ("gla", 2 * 1024 * 3 * (2 + 2) * 16 * 16),
    ],
)
def test_scoring_flops(scorer, flops):
    shape = Shape(1, 3, 1, 1024, 16, 4)
    costs = layer_costs(shape, LighthouseConfig(2, 2, 128, scorer))
    by_norm = layer_costs(shape, LighthouseConfig(2, 2, 128))
    assert costs.pop("score") == by_norm.pop("score")._replace(flops=flops)
    assert costs == by_norm


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
def test_outputs_counted_are_the_tensors(n_kv_heads):
    config, seq_len, row = LighthouseConfig(3, 2, 256), 2048, 8 * 4
    q = torch.rand(1, 4, seq_len, 8)
    k = torch.rand(1, n_kv_heads, seq_len, 8)
    scores, coarsest = score(q, k, k, config)
    selection = select_spans(scores, config, seq_len)
    subs = gather(q, k, k, coarsest, selection)
    costs = layer_costs(Shape(1, 4, n_kv_heads, seq_len, 8, 4), config)

    def size(*tensors):
        return sum(x.numel() * x.element_size() for x in tensors)

    assert costs["score"].bytes == size(q, k, k, *scores, *coarsest)
    read = 512 * row * (4 + 2 * n_kv_heads) * (1 + 2)  # level 0 and level 1
    assert costs["gather"].bytes == read + size(*coarsest, *subs, selection.slot_to_entry)
    out = scatter_back(subs[0], selection)
    assert costs["scatter back"].bytes == size(subs[0], out, selection.entry_to_slot)
    assert costs["gather backward"].bytes == size(*subs, q, k, k, selection.entry_to_slot)


def test_phases_add_their_table():
    config, shape = LighthouseConfig(3, 4, 1536), Shape(1, 8, 8, 98304, 128, 2)
    averaged, aligned = layer_costs(shape, config), layer_costs(shape, config, rotary_dim=64)
    added = {name: aligned[name].bytes - cost.bytes for name, cost in averaged.items()}
    # 32 cosines and 32 sines of 4 bytes, for offsets 0 to 15, or 0 to 3.
    expected = {"score": 16 * 256, "gather": 4 * 256, "gather backward": 16 * 256}
    assert {name: n for name, n in added.items() if n} == expected


def test_floor_takes_the_larger_of_bytes_and_flops():
    costs = dense_costs(Shape(1, 1, 1, 1024, 64, 2))
    by_bytes = floor_seconds(costs, bandwidth=1.0, rate=1e30)
    by_flops = floor_seconds(costs, bandwidth=1e30, rate=1.0)
    assert by_bytes["attend"] == 4 * 1024 * 64 * 2
    assert by_flops["attend"] == 2 * 1024**2 * 64


def test_bytes_exchanged_at_1m():
    config = LighthouseConfig(4, 4, 4096)
    shape = Shape(1, 8, 8, config.sub_seq_len(1048576), 128, 2)
    # Each of eight ranks has 8,192 rows of q, k, v and out. An eighth of them stays.
    forward = 8192 * 8 * 4 * 256 * 7 // 8
    found = exchange_bytes(shape, 8, "ulysses")
    assert found == {"exchange": forward, "exchange backward": forward}
    # k and v are sent seven times. Their gradients are twice as large and are sent eight times.
    rotated = 7 * 8192 * 8 * 2 * 256
    found = exchange_bytes(shape, 8, "ring")
    assert found == {"exchange": rotated, "exchange backward": rotated + 8 * 8192 * 8 * 2 * 512}
    # With GQA, k and v are smaller.
    grouped = exchange_bytes(shape._replace(n_kv_heads=2), 8, "ulysses")
    assert grouped["exchange"] == 8192 * (2 * 8 + 2 * 2) * 256 * 7 // 8
    # Three levels above the finest, with one or two chunks per rank.
    for scheme, chunks in (("ulysses", 1), ("ring", 2)):
        edges = chunks * 8 * 3 * 256 * 7
        found = edge_bytes(shape, config, 8, scheme)
        assert found == {"edges": edges, "edges backward": edges}
