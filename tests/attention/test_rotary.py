"""Pooling with aligned phases: comparison with loops from unrotated q and k, and its purpose."""

import pytest
import torch
from layer_inputs import entries_of, frequencies, random_qkv, rotary_table

from lighthouse import (
    LighthouseAttention,
    LighthouseConfig,
    RotaryPhases,
    lighthouse_attention,
    select,
)
from lighthouse.gather import _gather
from lighthouse.reference import reference_attention, rope_of
from lighthouse.scorers import SCORERS, _norm_score_pool, mean_pool, score, squared_norms
from lighthouse.sdpa import causal_sdpa

CASES = [
    # H, Hkv, N, D, R, num_levels, pooling_factor, topk, interleaved
    (1, 1, 256, 8, 8, 2, 2, 128, True),
    (2, 1, 512, 8, 8, 2, 2, 128, False),
    (4, 2, 1024, 8, 4, 2, 4, 256, True),
    (2, 2, 1024, 12, 8, 2, 8, 128, False),
    (2, 1, 1536, 4, 4, 3, 2, 384, True),
    (2, 2, 2048, 8, 8, 3, 4, 128, False),
    (1, 1, 2048, 6, 2, 4, 2, 256, False),
    (1, 1, 2048, 4, 4, 5, 2, 128, True),
]
IDS = [
    f"H{h}-Hkv{g}-N{n}-D{d}-R{r}-L{num_levels}-p{p}-k{k}-{'interleaved' if i else 'halves'}"
    for h, g, n, d, r, num_levels, p, k, i in CASES
]
SCORER_CASE = (2, 1, 512, 8, 8, 2, 2, 128, False)


def setup(case, dtype=torch.float64):
    """Config, table, rotary embedding, and unrotated q, k, v with the strides of a model."""
    n_heads, n_kv_heads, seq_len, head_dim, rotary_dim, *fields, interleaved = case
    config = LighthouseConfig(*fields)
    inputs = random_qkv(1, n_heads, n_kv_heads, seq_len, head_dim, requires_grad=True)
    rotary = rotary_table(rotary_dim, config.span(config.num_levels - 1), interleaved, dtype)
    return config, rotary, rope_of(frequencies(rotary_dim), interleaved), inputs


def rotated(x: torch.Tensor, rope, first_position: int = 0) -> torch.Tensor:
    rows = [rope(x[:, :, t], first_position + t) for t in range(x.shape[2])]
    return torch.stack(rows, 2)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_equals_loops_from_unrotated_q_and_k(case):
    config, rotary, rope, (q, k, v) = setup(case)
    # The layer does not know it. Only differences of positions count.
    first = 70
    out = lighthouse_attention(
        rotated(q, rope, first), rotated(k, rope, first), v, config, rotary=rotary
    )
    expected = reference_attention(q, k, v, *case[5:8], rope=rope, first_position=first)
    assert (out - expected).abs().max() < 1e-9
    dout = torch.randn_like(expected)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    expected_grads = torch.autograd.grad(expected, (q, k, v), dout)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert (grad - expected_grad).abs().max() < 1e-9


@pytest.mark.parametrize("scorer", ["dilated", "gla"])
def test_other_scorers_equal_loops(scorer):
    config, rotary, rope, (q, k, v) = setup(SCORER_CASE)
    config = LighthouseConfig(2, 2, 128, scorer)
    with torch.no_grad():
        out = lighthouse_attention(rotated(q, rope), rotated(k, rope), v, config, rotary=rotary)
        expected = reference_attention(q, k, v, 2, 2, 128, scorer, rope=rope)
    assert (out - expected).abs().max() < 1e-9


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_no_rotation_is_bit_for_bit_no_table(case):
    config, rotary, _, inputs = setup(case)
    ones = RotaryPhases(
        torch.ones_like(rotary.cos), torch.zeros_like(rotary.sin), rotary.interleaved
    )
    results = []
    for phases in (None, ones):
        out = lighthouse_attention(*inputs, config, rotary=phases)
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    for plain, turned in zip(*results, strict=True):
        assert torch.equal(plain, turned)


def test_equal_unrotated_vectors_pool_to_a_vector_of_their_norm():
    _, rotary, rope, _ = setup(CASES[5])
    x = rotated(torch.ones(1, 1, 16, 8, dtype=torch.float64), rope)
    norm = torch.full((1, 1, 1), 8**0.5, dtype=torch.float64)
    aligned = mean_pool(x, 16, rotary.cos, rotary.sin, rotary.interleaved)
    torch.testing.assert_close(aligned.norm(dim=-1), norm)
    torch.testing.assert_close(aligned[:, :, 0], x[:, :, 15])
    assert (mean_pool(x, 16).norm(dim=-1) < 0.9 * norm).all()


@pytest.mark.parametrize("pairs", [None, "interleaved", "halves"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_in_low_precision_is_that_of_plain_pytorch(dtype, pairs):
    """Errors of outputs and gradients are at most twice those of PyTorch in the same dtype."""
    config = LighthouseConfig(3, 4, 128)
    rotary = None if pairs is None else rotary_table(24, 16, pairs == "interleaved", torch.float32)
    inputs = random_qkv(1, 4, 2, 2048, 32, dtype)
    selection = select(*(squared_norms(x, 2) for x in inputs[:2]), config)
    entries = [entries_of(selection, 0, g) for g in range(2)]
    dout = torch.randn(inputs[0].shape, dtype=torch.float64)

    def run(layer, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        out = layer(*leaves)
        return out, *torch.autograd.grad(out, leaves, dout.to(dtype))

    ours = run(lambda *x: lighthouse_attention(*x, config, rotary=rotary), dtype)
    plain = run(lambda *x: layer_of_entries(*x, entries, rotary), dtype)
    exact = run(lambda *x: layer_of_entries(*x, entries, rotary), torch.float64)
    for x, y, true in zip(ours, plain, exact, strict=True):
        assert x.dtype == dtype
        error, plain_error = ((z.double() - true).norm() / true.norm() for z in (x, y))
        assert 0 < error <= 2 * plain_error


def layer_of_entries(q, k, v, entries, rotary):
    """The layer in plain PyTorch with every intermediate in the dtype of q."""
    heads = []
    for h in range(4):
        g = h // 2
        spans = [(i * 4**level, 4**level) for level, i in entries[g]]
        sub = [
            torch.stack([turn_to_last(x[s : s + n], phases).mean(0) for s, n in spans])
            for x, phases in ((q[0, h], rotary), (k[0, g], rotary), (v[0, g], None))
        ]
        sub_out = causal_sdpa(*(x[None, None] for x in sub))[0, 0]
        owners = [
            torch.arange(start + span - 1, min(start + 2 * span - 1, len(q[0, h])))
            for start, span in spans
        ]
        rows = sub_out.repeat_interleave(torch.tensor([len(x) for x in owners]), 0)
        heads.append(torch.zeros_like(q[0, h]).index_add(0, torch.cat(owners), rows))
    return torch.stack(heads)[None]


def turn_to_last(x, rotary):
    """Tokens of one span, [n, D], rotated to the last."""
    if rotary is None or len(x) == 1:
        return x
    cos, sin = (y[: len(x)].flip(0).to(x.dtype) for y in (rotary.cos, rotary.sin))
    num_pairs = cos.shape[1]
    if rotary.interleaved:
        a, b = x[:, : 2 * num_pairs : 2], x[:, 1 : 2 * num_pairs : 2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(1)
    else:
        a, b = x[:, :num_pairs], x[:, num_pairs : 2 * num_pairs]
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    return torch.cat([turned, x[:, 2 * num_pairs :]], -1)


@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "halves"])
def test_ops(interleaved):
    config, rotary, _, inputs = setup((4, 2, 512, 8, 6, 3, 2, 128, interleaved), torch.float32)
    q, k, v = (x.detach().float() for x in inputs)
    arguments = 3, 2, rotary.cos, rotary.sin, interleaved
    torch.library.opcheck(_norm_score_pool, (q, k, v, *arguments))
    _, coarsest = score(q, k, v, config, rotary)
    selection = select(*(squared_norms(x, 2) for x in (q, k)), config)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    maps = selection.slot_to_entry, selection.entry_to_slot
    torch.library.opcheck(_gather, (*leaves, *coarsest, *maps, *arguments))


def test_scores_do_not_depend_on_the_table():
    config, rotary, _, (q, k, v) = setup(CASES[5])
    for plain, turned in zip(
        score(q, k, v, config)[0], score(q, k, v, config, rotary)[0], strict=True
    ):
        assert torch.equal(plain, turned)


@pytest.mark.parametrize("scorer", SCORERS)
def test_module_adds_nothing_to_a_model_and_keeps_the_dtype_of_its_table(scorer):
    rotary = rotary_table(8, 2, True, torch.float32)
    module = LighthouseAttention(torch.nn.Identity(), LighthouseConfig(scorer=scorer), rotary)
    assert not module.state_dict() and not [*module.parameters(), *module.buffers()]
    assert module.bfloat16().rotary.cos.dtype == torch.float32
    assert module.to("meta").rotary.cos.device.type == "meta"


@pytest.mark.parametrize(
    ("cos", "sin", "message"),
    [
        (torch.ones(4), torch.ones(4), r"must both be \[offsets, R/2\], got \[4\] and \[4\]"),
        (torch.ones(4, 4), torch.ones(4, 3), r"got \[4, 4\] and \[4, 3\]"),
        (torch.ones(0, 4), torch.ones(0, 4), r"got \[0, 4\] and \[0, 4\]"),
        (torch.ones(4, 4).half(), torch.ones(4, 4).half(), "must both be fp32 or fp64"),
        (torch.ones(4, 4), torch.ones(4, 4).double(), "must both be fp32 or fp64"),
        (torch.ones(4, 4), torch.ones(4, 4, device="meta"), "must be on one device"),
        (torch.ones(3, 4), torch.ones(3, 4), r"\(num_levels-1\) = 4 rows or more, got 3"),
        (torch.ones(4, 5), torch.ones(4, 5), "got 5 columns and head_dim 8"),
        (*[torch.ones(4, 4, device="meta")] * 2, "must be on the device of q, cpu, got meta"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(cos, sin, message):
    q = torch.randn(1, 1, 512, 8)
    with pytest.raises(ValueError, match=message) as error:
        rotary = RotaryPhases(cos, sin, True)
        lighthouse_attention(q, q, q, LighthouseConfig(3, 2, 128), rotary=rotary)
    assert "\n" not in str(error.value)


def test_an_odd_head_is_refused():
    q = torch.randn(1, 1, 512, 7)
    with pytest.raises(ValueError, match="head_dim must be even, got 2 columns and head_dim 7"):
        lighthouse_attention(
            q, q, q, LighthouseConfig(3, 2, 128), rotary=rotary_table(4, 4, True, torch.float32)
        )
