"""Scorers: comparison with loops for norms, attention in both directions, and pooling.

Pooling is the maximum over spans and groups, or the mean of the coarsest level.
"""

import pytest
import torch
from layer_inputs import random_qkv

from lighthouse import LighthouseConfig
from lighthouse.reference import reference_scores
from lighthouse.scorers import (
    SCORERS,
    _dilated_scores,
    _gla_scores,
    _norm_score_pool,
    pool_scores,
    score,
    squared_norms,
)
from lighthouse.selection import select_spans

CONFIG = LighthouseConfig(3, 2, 128)
SEQ_LEN = 512
BY_ATTENTION = [
    LighthouseConfig(3, 2, 128, scorer, dilation)
    for scorer, dilation in (("dilated", 1), ("dilated", 3), ("dilated", 4), ("gla", 4))
]
BY_ATTENTION_IDS = [f"{config.scorer}-{config.dilation}" for config in BY_ATTENTION]


@pytest.mark.parametrize("n_heads, n_kv_heads", [(1, 1), (4, 2), (3, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_equals_loops(n_heads, n_kv_heads, dtype):
    q, k, v = random_qkv(2, n_heads, n_kv_heads, SEQ_LEN, 8, dtype)
    scores, coarsest = score(q, k, v, CONFIG)
    assert scores.q.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    group = n_heads // n_kv_heads
    position = 0
    for span in (2, 4):
        for i in range(SEQ_LEN // span):
            tokens = slice(i * span, (i + 1) * span)
            for found, x, heads in ((scores.q, q, group), (scores.k, k, 1)):
                for g in range(n_kv_heads):
                    rows = x[:, g * heads : (g + 1) * heads, tokens].double()
                    expected = rows.square().sum(-1).amax((1, 2))
                    torch.testing.assert_close(
                        found[:, g, position].double(), expected, rtol=1e-6, atol=0
                    )
            position += 1
    assert position == scores.q.shape[-1] == scores.k.shape[-1]
    for found, x in zip(coarsest, (q, k, v), strict=True):
        assert found.dtype == dtype
        for i in range(SEQ_LEN // 4):
            mean = x[:, :, 4 * i : 4 * i + 4].double().mean(2)
            torch.testing.assert_close(found[:, :, i], mean.to(dtype))


@pytest.mark.parametrize("config", BY_ATTENTION, ids=BY_ATTENTION_IDS)
# No length is a multiple of 3, and 580 is not a multiple of gla's chunks.
@pytest.mark.parametrize(
    "n_heads, n_kv_heads, seq_len", [(1, 1, SEQ_LEN), (4, 2, 580), (3, 1, SEQ_LEN)]
)
def test_by_attention_equals_loops(config, n_heads, n_kv_heads, seq_len):
    q, k, v = random_qkv(1 + (n_heads == 1), n_heads, n_kv_heads, seq_len, 8)
    scores, coarsest = score(q, k, v, config)
    expected = reference_scores(q, k, v, config.scorer, config.dilation)
    for found, by_token in zip(scores, expected, strict=True):
        torch.testing.assert_close(found, pool_scores(by_token, 3, 2), rtol=1e-10, atol=1e-10)
    for found, by_norm in zip(coarsest, score(q, k, v, CONFIG)[1], strict=True):
        assert torch.equal(found, by_norm)


@pytest.mark.parametrize("config", BY_ATTENTION, ids=BY_ATTENTION_IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_by_attention_errors_are_those_of_plain_pytorch(config, dtype):
    """The error to fp64 is at most twice as large for the same inputs."""
    q, k, v = random_qkv(2, 4, 2, SEQ_LEN, 32, dtype)
    scores, _ = score(q, k, v, config)
    plain, exact = (
        plain_scores(*(x.to(precision) for x in (q, k, v)), config)
        for precision in (dtype, torch.float64)
    )
    for ours, theirs, truth in zip(scores, plain, exact, strict=True):
        assert ours.dtype == torch.float32
        error, plain_error = ((x.double() - truth).norm() for x in (ours, theirs))
        assert 0 < error <= 2 * plain_error


def plain_scores(q, k, v, config):
    """Reference with all N * N weights at once, in the dtype of q."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    token = torch.arange(q.shape[2])
    distance = token[:, None] - token
    for x, y in ((q, k), (k, q)):
        weights = x @ y.mT * q.shape[3] ** -0.5
        if config.scorer == "dilated":
            is_seen = (distance >= 0) & (distance % config.dilation == 0)
            weights = weights.masked_fill(~is_seen, -torch.inf).softmax(-1)
        else:
            weights = weights * (2 ** (-distance / 16)).tril().to(q.dtype)
        yield pool_scores(squared_norms(weights @ v, 2), 3, 2)


@pytest.mark.parametrize("config", BY_ATTENTION, ids=BY_ATTENTION_IDS)
def test_by_attention_scores_are_causal(config):
    """Scores of a span do not depend on later tokens."""
    inputs = random_qkv(2, 4, 2, SEQ_LEN, 8)
    scores, _ = score(*inputs, config)
    for x in inputs:
        x[:, :, 300:] += 1
    changed, _ = score(*inputs, config)
    for before, after in zip(scores, changed, strict=True):
        for level, start in ((1, 0), (2, 256)):
            spans = 300 // 2**level
            is_same = (before == after)[:, :, start : start + spans]
            assert is_same.all()
            assert (before != after)[:, :, start + spans : start + SEQ_LEN // 2**level].any()


@pytest.mark.parametrize("config", BY_ATTENTION, ids=BY_ATTENTION_IDS)
@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_by_attention_every_score_is_written_and_repeatable(config, n_kv_heads):
    # Deterministic algorithms fill fresh memory with NaN.
    torch.use_deterministic_algorithms(True)
    try:
        q, k, v = random_qkv(2, 4, n_kv_heads, 580, 8, torch.float32)
        first, second = (score(q, k, v, config)[0] for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(first, second, strict=True):
        assert (a > 0).all() and torch.equal(a, b)


@pytest.mark.parametrize("config", BY_ATTENTION, ids=BY_ATTENTION_IDS)
def test_by_attention_any_strides(config):
    q, k, v = random_qkv(2, 4, 2, SEQ_LEN, 8)
    expected, _ = score(q, k, v, config)
    for layout in (torch.Tensor.contiguous, lambda x: torch.cat([x, x], -1)[..., 8:]):
        scores, _ = score(*map(layout, (q, k, v)), config)
        for found, same in zip(scores, expected, strict=True):
            torch.testing.assert_close(found, same)


@pytest.mark.parametrize("scorer", SCORERS)
def test_scores_of_equal_tokens_are_finite(scorer):
    for value in (0.0, 1e-30, 1.0, 1e3):
        x = torch.full((1, 2, SEQ_LEN, 8), value)
        scores, _ = score(x, x, x, LighthouseConfig(3, 2, 128, scorer))
        assert all(x.isfinite().all() for x in scores)


@pytest.mark.parametrize("config", BY_ATTENTION, ids=BY_ATTENTION_IDS)
def test_by_attention_ties_go_to_the_lowest_index(config):
    """If all values are zero, all scores are zero. The layer is then that of equal norms."""
    q, k, v = (torch.ones(1, 2, SEQ_LEN, 8) for _ in range(3))
    scores, _ = score(q, k, torch.zeros_like(v), config)
    assert all((x == 0).all() for x in scores)
    selection, expected = (
        select_spans(x, CONFIG, SEQ_LEN) for x in (scores, score(q, k, v, CONFIG)[0])
    )
    assert torch.equal(selection.slot_to_entry, expected.slot_to_entry)


@pytest.mark.parametrize("scorer", SCORERS)
def test_scores_have_no_gradient(scorer):
    config = LighthouseConfig(3, 2, 128, scorer)
    q, k, v = (torch.randn(1, 2, SEQ_LEN, 8, requires_grad=True) for _ in range(3))
    scores, coarsest = score(q, k, v, config)
    assert not any(x.requires_grad for x in (*scores, *coarsest))


def test_op():
    q, k, v = (torch.randn(1, h, SEQ_LEN, 8) for h in (4, 2, 2))
    torch.library.opcheck(_norm_score_pool, (q, k, v, 3, 2))
    torch.library.opcheck(_dilated_scores, (q, k, v, 3, 2, 3))
    torch.library.opcheck(_gla_scores, (q, k, v, 3, 2))
