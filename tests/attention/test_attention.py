"""The whole layer: comparison with plain loops in fp64, gradients, causality, compilation."""

import pytest
import torch
from compiled import GroupedSdpa, assert_compiles_in_one_graph

from lighthouse import LighthouseAttention, LighthouseConfig, lighthouse_attention, select
from lighthouse.gather import gather, scatter_back
from lighthouse.reference import reference_attention
from lighthouse.scorers import SCORERS, score, squared_norms
from lighthouse.sdpa import causal_sdpa
from lighthouse.selection import select_spans

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


def inputs_of(case, dtype=torch.float64, requires_grad=True, seed=0):
    """q, k, v with the strides of a model: views of [B, N, H, D]."""
    batch, n_heads, n_kv_heads, seq_len, head_dim, *_ = case
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, seq_len, heads, head_dim, generator=generator, dtype=torch.float64)
        .to(dtype)
        .transpose(1, 2)
        .requires_grad_(requires_grad)
        for heads in (n_heads, n_kv_heads, n_kv_heads)
    ]


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_in_low_precision_is_that_of_its_attention(dtype):
    """The error is at most twice that of plain PyTorch in the same dtype and selection."""
    case = (1, 4, 2, 2048, 32, 3, 4, 128)
    q, k, v = inputs_of(case, dtype)
    out = lighthouse_attention(q, k, v, config_of(case))
    assert out.dtype == dtype
    scores = [squared_norms(x.detach(), 2) for x in (q, k)]
    selection = select(*scores, config_of(case))
    entries = [
        [
            list(zip(selection.level[0, g].tolist(), selection.index[0, g].tolist(), strict=True))
            for g in range(2)
        ]
    ]
    exact = reference_attention(q, k, v, *case[5:], entries=entries)
    plain = reference_in(dtype, q, k, v, entries[0])
    error, plain_error = ((x.double() - exact).norm() / exact.norm() for x in (out, plain))
    assert 0 < error <= 2 * plain_error


def reference_in(dtype, q, k, v, entries):
    """The layer in plain PyTorch with every intermediate in `dtype`."""
    group = q.shape[1] // k.shape[1]
    out = torch.zeros_like(q)
    for h in range(q.shape[1]):
        g = h // group
        spans = [(i * 4**level, 4**level) for level, i in entries[g]]
        sub = [
            torch.stack([x[s : s + n].mean(0) for s, n in spans])
            for x in (q[0, h], k[0, g], v[0, g])
        ]
        sub_out = causal_sdpa(*(x[None, None] for x in sub))[0, 0]
        for (start, span), row in zip(spans, sub_out, strict=True):
            out[0, h, start + span - 1 : start + 2 * span - 1] += row
    return out


def test_gradients_by_finite_differences():
    case = (1, 2, 1, 256, 2, 2, 2, 128)
    config = config_of(case)
    q, k, v = inputs_of(case)
    selection = select_spans(score(q, k, v, config)[0], config, 256)

    def layer(q, k, v):
        # The selection is fixed, because a finite difference must not change it.
        _, coarsest = score(q, k, v, config)
        sub = gather(q, k, v, coarsest, selection)
        return scatter_back(causal_sdpa(*sub, enable_gqa=True), selection)

    assert torch.autograd.gradcheck(layer, (q, k, v), fast_mode=True)


def test_all_spans_selected_and_the_finest_alone_is_dense_attention():
    config = LighthouseConfig(2, 4, 256)
    q, k, v = inputs_of((1, 2, 2, 1024, 8), requires_grad=False)
    scores, coarsest = score(q, k, v, config)
    selection = select_spans(scores, config, 1024)
    subs = gather(q, k, v, coarsest, selection)
    finest = [sub[:, :, selection.level[0, 0] == 0] for sub in subs]
    torch.testing.assert_close(causal_sdpa(*finest), causal_sdpa(q, k, v))


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


@pytest.mark.parametrize("layout", ["bhnd", "bnhd", "sliced", "expanded"])
def test_strides(layout):
    case = (2, 2, 2, 512, 8, 2, 2, 128)
    q, k, v = inputs_of(case, requires_grad=False)
    expected = lighthouse_attention(q, k, v, config_of(case))
    if layout == "bhnd":
        q, k, v = (x.contiguous() for x in (q, k, v))
    elif layout == "sliced":
        q, k, v = (torch.cat([x, x], -1)[..., 8:] for x in (q, k, v))
    elif layout == "expanded":
        v = v[:, :1].expand(-1, 2, -1, -1)
        expected = lighthouse_attention(q, k, v.contiguous(), config_of(case))
    out = lighthouse_attention(q, k, v, config_of(case))
    assert torch.equal(out, expected)
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("scorer", SCORERS)
def test_module_adds_nothing_to_a_state_dict(scorer):
    module = LighthouseAttention(torch.nn.Identity(), LighthouseConfig(scorer=scorer))
    assert not module.state_dict() and not list(module.parameters())


@pytest.mark.parametrize(
    "shapes, fragment",
    [
        (((1, 2, 512), (1, 2, 512, 8), (1, 2, 512, 8)), "must be [B, H, N, D]"),
        (((1, 2, 512, 8), (1, 2, 512, 8), (1, 2, 256, 8)), "must be [B, H, N, D]"),
        (((1, 2, 512, 8), (1, 2, 256, 8), (1, 2, 256, 8)), "must be [B, H, N, D]"),
        (((1, 3, 512, 8), (1, 2, 512, 8), (1, 2, 512, 8)), "multiple"),
        (((1, 2, 512, 4), (1, 2, 512, 8), (1, 2, 512, 8)), "head_dim"),
        (((1, 2, 501, 8), (1, 2, 501, 8), (1, 2, 501, 8)), "seq_len must be a multiple of"),
        (((1, 512, 2, 8), (1, 512, 2, 8), (1, 512, 2, 8)), "transpose dimensions 1 and 2"),
        (((0, 2, 512, 8), (0, 2, 512, 8), (0, 2, 512, 8)), "must not be empty"),
        (((1, 0, 512, 8), (1, 0, 512, 8), (1, 0, 512, 8)), "must not be empty"),
        (((1, 2, 512, 8), (1, 0, 512, 8), (1, 0, 512, 8)), "must not be empty"),
        (((1, 2, 512, 0), (1, 2, 512, 0), (1, 2, 512, 0)), "must not be empty"),
    ],
)
def test_bad_shapes(shapes, fragment):
    with pytest.raises(ValueError) as error:
        lighthouse_attention(*(torch.rand(s) for s in shapes), LighthouseConfig(2, 2, 128))
    assert fragment in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.float32, torch.float64),
        (torch.int32, torch.int32, torch.int32),
    ],
    ids=str,
)
def test_mixed_and_integer_dtypes_are_refused(dtypes):
    with pytest.raises(ValueError, match="must have one dtype, fp16, bf16, fp32 or fp64, got "):
        lighthouse_attention(
            *(torch.ones(1, 1, 512, 8).to(dtype) for dtype in dtypes), LighthouseConfig(2, 2, 128)
        )


def test_several_devices_are_refused():
    q = torch.ones(1, 1, 512, 8)
    with pytest.raises(ValueError, match="must be on one device, got cpu, meta, cpu; move them"):
        lighthouse_attention(q, q.to("meta"), q, LighthouseConfig(2, 2, 128))


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


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_in_one_graph(scorer, dynamic):
    case = (1, 4, 2, 512, 8, 2, 2, 128)
    module = LighthouseAttention(GroupedSdpa(), LighthouseConfig(*case[5:], scorer))
    assert_compiles_in_one_graph(module, dynamic, lambda: inputs_of(case, torch.float32))
