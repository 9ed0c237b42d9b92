"""Scorers: norms, maxima over spans and groups, means of the coarsest level, by loops."""

import pytest
import torch

from lighthouse import LighthouseConfig
from lighthouse.scorers import _norm_score_pool, pool_scores, score

CONFIG = LighthouseConfig(3, 2, 128)
SEQ_LEN = 512


@pytest.mark.parametrize("n_heads, n_kv_heads", [(1, 1), (4, 2), (3, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_equals_loops(n_heads, n_kv_heads, dtype):
    q = torch.randn(2, n_heads, SEQ_LEN, 8, dtype=dtype)
    k, v = (torch.randn(2, n_kv_heads, SEQ_LEN, 8, dtype=dtype) for _ in range(2))
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


def test_scores_have_no_gradient():
    q, k, v = (torch.randn(1, 2, SEQ_LEN, 8, requires_grad=True) for _ in range(3))
    scores, coarsest = score(q, k, v, CONFIG)
    assert not any(x.requires_grad for x in (*scores, *coarsest))


def test_pooled_scores_are_maxima_level_by_level():
    scores = torch.tensor([[[3.0, 1.0, -2.0, 0.0, 5.0, 5.0, 4.0, 7.0]]])
    assert pool_scores(scores, 4, 2).tolist() == [[[3.0, 0.0, 5.0, 7.0, 3.0, 7.0, 7.0]]]


def test_op():
    q, k, v = (torch.randn(1, h, SEQ_LEN, 8) for h in (4, 2, 2))
    torch.library.opcheck(_norm_score_pool, (q, k, v, 3, 2))
