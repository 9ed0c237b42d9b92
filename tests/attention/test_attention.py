"""The whole layer: comparison with plain loops in fp64, gradients, causality, compilation."""

import pytest
import torch
from layer_inputs import random_qkv, rotary_table

from lighthouse import LighthouseAttention, LighthouseConfig, lighthouse_attention
from lighthouse.reference import reference_attention
from lighthouse.scorers import SCORERS
from lighthouse.sdpa import causal_sdpa

CASES = [
    # B, H, Hkv, N, D, num_levels, pooling_factor, topk
    (1, 1, 1, 256, 8, 2, 2, 128),
    (2, 2, 2, 512, 4, 2, 2, 128),
    (1, 4, 2, 1024, 8, 2, 4, 256),
    (1, 1, 1, 1024, 8, 2, 8, 128),
    (1, 2, 1, 1536, 4, 3, 2, 384),
    (1, 2, 2, 2048, 8, 3, 4, 128),
    (1, 3, 1, 2048, 4, 4, 2, 256),
    (1, 1, 1, 2048, 4, 5, 2, 128),
]
IDS = [
    f"B{b}-N{n}-H{h}-Hkv{hkv}-D{d}-L{num_levels}-p{p}-k{k}"
    for b, h, hkv, n, d, num_levels, p, k in CASES
]


def inputs_of(case, dtype=torch.float64, requires_grad=True):
    return random_qkv(*case[:5], dtype, requires_grad)


def config_of(case) -> LighthouseConfig:
    return LighthouseConfig(*case[5:])


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_equals_loops(case):
    q, k, v = inputs_of(case)
    out = lighthouse_attention(q, k, v, config_of(case))
    expected = reference_attention(q, k, v, *case[5:])
    assert (out - expected).abs().max() < 1e-9
    dout = torch.randn_like(expected)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    expected_grads = torch.autograd.grad(expected, (q, k, v), dout)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert (grad - expected_grad).abs().max() < 1e-9


# Cases in which the selection leaves something out.
@pytest.mark.parametrize("case", [CASES[1], CASES[4]], ids=[IDS[1], IDS[4]])
@pytest.mark.parametrize(("scorer", "dilation"), [("dilated", 4), ("dilated", 5), ("gla", 4)])
def test_equals_loops_with_other_scorers(case, scorer, dilation):
    q, k, v = inputs_of(case, requires_grad=False)
    out = lighthouse_attention(q, k, v, LighthouseConfig(*case[5:], scorer, dilation))
    expected = reference_attention(q, k, v, *case[5:], scorer, dilation)
    assert (out - expected).abs().max() < 1e-9
    assert not torch.equal(out, lighthouse_attention(q, k, v, config_of(case)))


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_values_are_causal(case):
    config = config_of(case)
    q, k, v = inputs_of(case, requires_grad=False)
    seq_len = case[3]
    t = seq_len * 5 // 8
    out = lighthouse_attention(q, k, v, config)
    changed = v.clone()
    changed[:, :, t:] += torch.randn_like(changed[:, :, t:])
    other = lighthouse_attention(q, k, changed, config)
    assert torch.equal(out[:, :, :t], other[:, :, :t])
    assert not torch.equal(out[:, :, t:], other[:, :, t:])


def test_gradients_are_causal_in_q_k_and_v():
    case = CASES[5]
    q, k, v = inputs_of(case)
    out = lighthouse_attention(q, k, v, config_of(case))
    for t in (0, 15, 16, 1000, 2047):
        for grad in torch.autograd.grad(out[:, :, t].sum(), (q, k, v), retain_graph=True):
            assert (grad[:, :, t + 1 :] == 0).all()


def test_every_output_is_written():
    # Deterministic algorithms fill fresh memory with NaN.
    torch.use_deterministic_algorithms(True)
    try:
        for case in CASES:
            q, k, v = inputs_of(case, torch.float32)
            out = lighthouse_attention(q, k, v, config_of(case))
            grads = torch.autograd.grad(out.sum(), (q, k, v))
            assert all(torch.isfinite(x).all() for x in (out, *grads))
            assert (out != 0).any(-1).all()
    finally:
        torch.use_deterministic_algorithms(False)


def test_is_bitwise_repeatable():
    case = (1, 4, 2, 2048, 32, 3, 4, 128)

    def run():
        q, k, v = inputs_of(case, torch.float32)
        out = lighthouse_attention(q, k, v, config_of(case))
        return out, *torch.autograd.grad(out.square().sum(), (q, k, v))

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


LAYOUTS = {
    "bhnd": torch.Tensor.contiguous,
    "bnhd": lambda x: x,
    "sliced": lambda x: torch.cat([x, x], -1)[..., 8:],
    # Rows with an odd start and an odd stride.
    "odd": lambda x: torch.nn.functional.pad(x, (1, 0))[..., 1:],
    "expanded": lambda x: x[:, :1].expand(-1, x.shape[1], -1, -1),
}


@pytest.mark.parametrize("pairs", [None, "interleaved", "halves"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout, pairs):
    config = LighthouseConfig(3, 2, 128)
    rotary = None if pairs is None else rotary_table(6, 4, pairs == "interleaved")
    inputs = [LAYOUTS[layout](x) for x in random_qkv(2, 4, 2, 512, 8)]
    # The memory of [B, N, H, D].
    plain = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    out, expected = (lighthouse_attention(*x, config, rotary=rotary) for x in (inputs, plain))
    assert (out - expected).abs().max() <= (0 if pairs is None else 1e-12)
    assert out.transpose(1, 2).is_contiguous()


def tensors(*shapes):
    return [torch.rand(shape) for shape in shapes]


Q = torch.ones(1, 1, 512, 8)
ONE_DTYPE = "must have one dtype, fp16, bf16, fp32 or fp64, got "


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (tensors((1, 2, 512), (1, 2, 512, 8), (1, 2, 512, 8)), "must be [B, H, N, D]"),
        (tensors((1, 2, 512, 8), (1, 2, 512, 8), (1, 2, 256, 8)), "must be [B, H, N, D]"),
        (tensors((1, 2, 512, 8), (1, 2, 256, 8), (1, 2, 256, 8)), "must be [B, H, N, D]"),
        (tensors((1, 2, 512, 8), (1, 2, 512), (1, 2, 512)), "must be [B, H, N, D]"),
        (tensors((1, 3, 512, 8), (1, 2, 512, 8), (1, 2, 512, 8)), "heads of q must be a multiple"),
        (tensors((1, 2, 512, 4), (1, 2, 512, 8), (1, 2, 512, 8)), "with one head_dim"),
        (tensors(*[(1, 2, 501, 8)] * 3), "seq_len must be a multiple of"),
        (tensors(*[(1, 512, 2, 8)] * 3), "transpose dimensions 1 and 2"),
        (tensors(*[(0, 2, 512, 8)] * 3), "must not be empty"),
        (tensors(*[(1, 0, 512, 8)] * 3), "must not be empty"),
        (tensors((1, 2, 512, 8), (1, 0, 512, 8), (1, 0, 512, 8)), "must not be empty"),
        (tensors(*[(1, 2, 512, 0)] * 3), "must not be empty"),
        ([Q.bfloat16(), Q, Q], ONE_DTYPE),
        ([Q, Q, Q.double()], ONE_DTYPE),
        ([Q.int()] * 3, ONE_DTYPE),
        ([Q, Q.to("meta"), Q], "must be on one device, got cpu, meta, cpu; move them"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(inputs, message):
    with pytest.raises(ValueError) as error:
        lighthouse_attention(*inputs, LighthouseConfig(2, 2, 128))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_autocast_is_that_of_standard_attention():
    """Rotated q and k are often fp32 under autocast, and v is not."""
    config = LighthouseConfig(2, 2, 128)
    q, k, v = random_qkv(1, 2, 1, 512, 8, torch.float32, requires_grad=True)
    expected = lighthouse_attention(*(x.bfloat16() for x in (q, k, v)), config)
    with torch.autocast("cpu", torch.bfloat16):
        out = lighthouse_attention(q, k, v.bfloat16(), config)
        doubles = lighthouse_attention(q.double(), k.double(), v.double(), config)
    assert out.dtype == torch.bfloat16 and doubles.dtype == torch.float64
    assert torch.equal(out, expected)
    assert torch.autograd.grad(out.float().sum(), q)[0].dtype == torch.float32


def test_forward_mode_is_refused():
    q = torch.randn(1, 1, 512, 8)

    def layer(x):
        return lighthouse_attention(q, x, q, LighthouseConfig(2, 2, 128))

    with pytest.raises(NotImplementedError, match="no forward-mode derivatives; differentiate"):
        torch.func.jvp(layer, (q,), (torch.ones_like(q),))


def test_second_derivatives_are_refused():
    q = torch.randn(1, 1, 512, 8, requires_grad=True)
    out = lighthouse_attention(q, q, q, LighthouseConfig(2, 2, 128))
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only; differentiate once"):
        grad.sum().backward()


class GroupedSdpa(torch.nn.Module):
    """Causal attention as a module."""

    def forward(self, q, k, v, *, enable_gqa):
        return causal_sdpa(q, k, v, enable_gqa=enable_gqa)


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("is_aligned", [False, True], ids=["averaged", "aligned"])
def test_compiles_in_one_graph(scorer, dynamic, is_aligned):
    """Outputs and gradients are close to those in eager mode, also at a second length."""
    rotary = rotary_table(8, 4, True, torch.float32) if is_aligned else None
    module = LighthouseAttention(GroupedSdpa(), LighthouseConfig(3, 2, 128, scorer), rotary)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for seq_len in (512, 1024):
        results = []
        for layer in (module, compiled):
            inputs = random_qkv(1, 4, 2, seq_len, 8, torch.float32, requires_grad=True)
            out = layer(*inputs)
            results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
        for eager, graph in zip(*results, strict=True):
            torch.testing.assert_close(graph, eager)
