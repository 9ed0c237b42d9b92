"""Selection: comparison with loops, ties, coverage, order, and consistency of the two maps."""

import pytest
import torch
from layer_inputs import entries_of

from lighthouse import LighthouseConfig, select
from lighthouse.reference import reference_selection
from lighthouse.selection import _select

CASES = [
    # num_levels, pooling_factor, topk, seq_len: legal corners, one and several strata.
    (2, 2, 128, 256),
    (2, 2, 256, 1024),
    (2, 4, 256, 1024),
    (2, 8, 128, 1024),
    (3, 2, 384, 1536),
    (3, 2, 128, 2048),
    (3, 4, 128, 4096),
    (4, 2, 256, 4096),
    (5, 2, 128, 2048),
]
IDS = [f"L{num_levels}-p{p}-k{k}-N{n}" for num_levels, p, k, n in CASES]


KINDS = ["random", "negative", "few", "equal", "zeros", "one-hot", "powers", "extreme"]
EXTREMES = [-torch.inf, -3e38, -1e-38, -1e-45, -0.0, 0.0, 1e-45, 1e-38, 1.0, 3e38, torch.inf]


def scores_of(kind: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Scores of one kind, fp32."""
    if kind == "random":
        return torch.rand(shape)
    if kind == "negative":
        return torch.randn(shape) - 2
    if kind == "few":
        return torch.randint(0, 3, shape).float()
    if kind == "equal":
        return torch.full(shape, 2.5)
    if kind == "zeros":
        # Both zeros tie.
        return torch.tensor([-0.0, 0.0])[torch.randint(0, 2, shape)]
    if kind == "one-hot":
        return (torch.arange(shape[-1]) == shape[-1] - 2).float().expand(shape)
    if kind == "powers":
        return torch.ldexp(torch.ones(shape), torch.randint(-126, 127, shape))
    assert kind == "extreme"
    return torch.tensor(EXTREMES)[torch.randint(0, len(EXTREMES), shape)]


@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_loops(case, kind):
    num_levels, p, topk, seq_len = case
    torch.manual_seed(0)
    q_scores, k_scores = (scores_of(kind, (2, 2, seq_len)) for _ in range(2))
    selection = select(q_scores, k_scores, LighthouseConfig(num_levels, p, topk))
    for b in range(2):
        for g in range(2):
            expected = reference_selection(
                q_scores[b, g].tolist(), k_scores[b, g].tolist(), num_levels, p, topk
            )
            assert entries_of(selection, b, g) == expected


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_maps_are_mutual_inverses(case):
    num_levels, p, topk, seq_len = case
    config = LighthouseConfig(num_levels, p, topk)
    selection = select(torch.rand(1, 3, seq_len), torch.rand(1, 3, seq_len), config)
    assert selection.slot_to_entry.dtype == selection.entry_to_slot.dtype == torch.int32
    assert selection.slot_to_entry.shape == (1, 3, config.sub_seq_len(seq_len))
    assert selection.entry_to_slot.shape == (1, 3, config.num_entries(seq_len))
    slots = torch.arange(config.sub_seq_len(seq_len), dtype=torch.int32).expand(1, 3, -1)
    assert torch.equal(selection.entry_to_slot.gather(-1, selection.slot_to_entry.long()), slots)
    present = selection.entry_to_slot >= 0
    assert (present.sum(-1) == config.sub_seq_len(seq_len)).all()
    assert (selection.entry_to_slot[~present] == -1).all()


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_order_is_causal(case):
    num_levels, p, topk, seq_len = case
    config = LighthouseConfig(num_levels, p, topk)
    selection = select(torch.rand(1, 1, seq_len), torch.rand(1, 1, seq_len), config)
    level, index = selection.level[0, 0].long(), selection.index[0, 0].long()
    span = p**level
    start, end = index * span, (index + 1) * span
    # An entry attends to earlier entries. None of them may end after it.
    furthest = end.cummax(0).values
    assert (furthest <= end).all()
    assert (start >= 0).all() and (end <= seq_len).all()


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_every_position_has_a_contributor_since_entry_zero_is_always_selected(case):
    num_levels, p, topk, seq_len = case
    config = LighthouseConfig(num_levels, p, topk)
    scores = torch.rand(1, 1, seq_len) + 1
    # The first spans have the lowest scores. Only the rule for entry 0 selects them.
    scores[..., : p ** (num_levels - 1)] = 0
    selection = select(scores, scores, config)
    covered = torch.zeros(seq_len, dtype=torch.bool)
    for level, i in entries_of(selection, 0, 0):
        first = i * p**level + p**level - 1
        covered[first : first + p**level] = True
    assert covered.all()
    for level in range(num_levels):
        assert selection.entry_to_slot[0, 0, config.level_offset(level, seq_len)] >= 0


def test_illegal_length():
    with pytest.raises(ValueError, match="seq_len must be a multiple of"):
        select(torch.rand(1, 1, 1000), torch.rand(1, 1, 1000), LighthouseConfig(3, 4, 128))


@pytest.mark.parametrize(
    ("q_scores", "k_scores"),
    [
        (torch.rand(1, 1, 512), torch.rand(1, 1, 1024)),
        (torch.rand(1, 1, 512), torch.rand(1, 2, 512)),
        (torch.rand(1, 512), torch.rand(1, 512)),
        (torch.ones(1, 1, 512).int(), torch.ones(1, 1, 512).int()),
    ],
    ids=["tokens", "heads", "dimensions", "integers"],
)
def test_scores_that_do_not_fit(q_scores, k_scores):
    with pytest.raises(ValueError, match=r"k_scores must both be .* and floating-point, got .*"):
        select(q_scores, k_scores, LighthouseConfig(2, 2, 128))


def test_op():
    q_scores, k_scores = torch.rand(1, 2, 768), torch.rand(1, 2, 768)
    torch.library.opcheck(_select, (q_scores, k_scores, 3, 2, 128, 1024, True))
