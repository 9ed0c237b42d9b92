"""Gated linear attention: comparison with the recurrence token by token."""

import sys
from types import SimpleNamespace

import pytest
import torch
from layer_inputs import random_qkv

from lighthouse import gla
from lighthouse.gla import gated_linear_attention
from lighthouse.reference import _gated_linear_attention


def by_token(q, k, v):
    heads = zip(*(x.double().flatten(0, 1) for x in (q, k, v)), strict=True)
    return torch.stack([_gated_linear_attention(*head) for head in heads]).view(q.shape)


@pytest.mark.parametrize("seq_len", [1, 2, 63, 64, 65, 128, 300])
def test_equals_the_recurrence(seq_len):
    q, k, v = random_qkv(2, 3, 3, seq_len, 8)
    assert (gated_linear_attention(q, k, v) - by_token(q, k, v)).abs().max() < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_computes_in_fp32(dtype):
    """The error is at most twice that of the recurrence in fp32."""
    q, k, v = random_qkv(2, 3, 3, 1024, 32, dtype)
    out = gated_linear_attention(q, k, v)
    assert out.dtype == torch.float32
    state = torch.zeros(2, 3, 32, 32)
    plain = torch.empty(2, 3, 1024, 32)
    for t in range(1024):
        q_t, k_t, v_t = (x[:, :, t].float() for x in (q, k, v))
        state = 2 ** (-1 / 16) * state + k_t[..., None] * v_t[..., None, :]
        plain[:, :, t] = (q_t[..., None, :] @ state)[..., 0, :] / 32**0.5
    exact = by_token(q, k, v)
    error, plain_error = ((x.double() - exact).norm() for x in (out, plain))
    assert 0 < error <= 2 * plain_error


def test_autocast_changes_nothing():
    q, k, v = random_qkv(2, 3, 3, 130, 8, torch.float32)
    expected = gated_linear_attention(q, k, v)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gated_linear_attention(q, k, v), expected)


def test_what_has_faded_leaves_no_trace():
    """Values of 1e30 do not overflow, and have no effect 3,000 tokens later."""
    q, k, v = random_qkv(2, 3, 3, 4096, 8, torch.float32)
    expected = gated_linear_attention(q, k, v)
    k[:, :, 0] = 1e30
    out = gated_linear_attention(q, k, v)
    assert out.isfinite().all() and out[:, :, 0].abs().max() > 1e28
    torch.testing.assert_close(out[:, :, 3000:], expected[:, :, 3000:])


def test_flash_linear_attention_is_called_as_it_asks_to_be(monkeypatch):
    """A replacement with the same signature and the layout [B, N, H, D] is called correctly."""

    def chunk_simple_gla(q, k, v, g=None, g_gamma=None, scale=None):
        assert g is None and g_gamma.shape == q.shape[2:3] and g_gamma.dtype == torch.float32
        torch.testing.assert_close(g_gamma.exp(), torch.full((3,), 0.5 ** (1 / 16)))
        assert scale == q.shape[3] ** -0.5
        return by_token(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2), None

    module = SimpleNamespace(chunk_simple_gla=chunk_simple_gla)
    monkeypatch.setitem(sys.modules, "fla", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "fla.ops", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "fla.ops.simple_gla", module)
    q, k, v = random_qkv(2, 3, 3, 65, 8)
    torch.testing.assert_close(gla._by_fla(q, k, v), gated_linear_attention(q, k, v))
