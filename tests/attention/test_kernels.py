"""Compare the Triton kernels with the PyTorch bodies of the ops and the loop reference.

Without a GPU the kernels run in Triton's slow interpreter (conftest.py), so sizes are tiny. Deep
pyramids are tested with trees of a few selected entries instead of whole selections.
"""

import pytest
import torch
from layer_inputs import frequencies, rotary_table
from test_selection import KINDS, scores_of
from torch.utils._pytree import tree_leaves

from lighthouse import LighthouseConfig, lighthouse_attention
from lighthouse import gather as gather_ops
from lighthouse import scorers as scorer_ops
from lighthouse import selection as selection_ops
from lighthouse.reference import reference_attention, reference_selection, rope_of

pytest.importorskip("triton")
from lighthouse.kernels import gather, scatter_back, scorers, selection

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(p, num_levels) for p in (2, 4, 8) for num_levels in (2, 3, 4, 5)]
SHAPE_IDS = [f"p{p}-L{num_levels}" for p, num_levels in SHAPES]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# H, Hkv, D
HEADS = [(1, 1, 16), (4, 2, 32), (3, 1, 80), (2, 2, 128)]
HEAD_IDS = [f"H{h}-Hkv{g}-D{d}" for h, g, d in HEADS]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """New tensors hold NaN, or the largest integer, until they are written."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(2, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def random_bnhd(batch, n_heads, length, head_dim, dtype=torch.float32):
    x = torch.randn(batch, length, n_heads, head_dim, device=DEVICE)
    return x.to(dtype).transpose(1, 2)


def random_maps(batch, n_kv_heads, num_coarsest, num_levels, p, num_selected):
    """`entry` and `slot` of random trees, with `num_selected` selected entries per level."""
    level_lens = [num_coarsest * p ** (num_levels - 1 - level) for level in range(num_levels)]
    offsets = [sum(level_lens[:level]) for level in range(num_levels)]
    maps = []
    for _ in range(batch * n_kv_heads):
        selected = {}
        candidates = torch.arange(num_coarsest)
        for level in range(num_levels - 1, 0, -1):
            picks = candidates[torch.randperm(len(candidates))[:num_selected]].sort().values
            selected[level] = set(picks.tolist())
            candidates = (picks[:, None] * p + torch.arange(p)).flatten()

        order = []

        def walk(level, index, selected=selected, order=order):
            if level and index in selected[level]:
                for child in range(p):
                    walk(level - 1, index * p + child)
            order.append(offsets[level] + index)

        for index in range(num_coarsest):
            walk(num_levels - 1, index)
        maps.append(torch.tensor(order))
    entry = torch.stack(maps)
    slots = torch.arange(entry.shape[1]).expand_as(entry)
    slot = torch.full((len(maps), sum(level_lens)), -1).scatter_(1, entry, slots)
    return tuple(
        x.to(DEVICE, torch.int32).view(batch, n_kv_heads, -1).contiguous() for x in (entry, slot)
    )


def assert_as_exact(actual, plain, exact):
    """The error is at most twice that of plain PyTorch in the same dtype, up to fp32 rounding."""
    assert actual.dtype == plain.dtype
    assert actual.stride() == plain.stride()
    assert not actual.isnan().any()
    rounding = 4e-7
    if DEVICE == "cpu" and actual.dtype == torch.bfloat16:
        # The interpreter truncates fp32 to bf16. A GPU rounds it.
        rounding = torch.finfo(torch.bfloat16).eps
    error, plain_error = ((x.double() - exact).abs().max().item() for x in (actual, plain))
    assert error <= 2 * plain_error + rounding * exact.abs().max().item()


def check(kernel, reference, tensors, *arguments):
    """Compare the outputs of a kernel with those of its PyTorch function. Returns them."""
    actual = kernel(*tensors, *arguments)
    plain = reference(*tensors, *arguments)
    exact = reference(*(None if x is None else x.double() for x in tensors), *arguments)
    for outputs in zip(*map(tree_leaves, (actual, plain, exact)), strict=True):
        assert_as_exact(*outputs)
    return actual


def phases(rotary_dim, num_rows, interleaved):
    """cos, sin, interleaved. Rows after the last legal one are NaN."""
    table = rotary_table(rotary_dim, num_rows, interleaved, torch.float32)
    behind = torch.full((2, rotary_dim // 2), torch.nan)
    cos, sin = (torch.cat([x, behind]).to(DEVICE) for x in (table.cos, table.sin))
    return cos, sin, interleaved


# ---- norm_score_pool


def check_norm_score_pool(q, k, v, num_levels, p, rotary=()):
    reference = scorer_ops.norm_score_pool_reference
    check(scorers.norm_score_pool, reference, (q, k, v), num_levels, p, *rotary)


@pytest.mark.parametrize(("p", "num_levels"), SHAPES, ids=SHAPE_IDS)
def test_norm_score_pool_of_every_shape(p, num_levels, monkeypatch):
    if p ** (num_levels - 1) > 1024:
        # Fewer and larger tiles. The interpreter's time depends on the number of operations.
        monkeypatch.setattr(scorers, "_ROWS", 128)
    seq_len = 3 * p ** (num_levels - 1)
    q, k, v = (random_bnhd(1, heads, seq_len, 8) for heads in (2, 1, 1))
    check_norm_score_pool(q, k, v, num_levels, p)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("n_heads", "n_kv_heads", "head_dim"), HEADS, ids=HEAD_IDS)
def test_norm_score_pool_of_heads_and_dtypes(n_heads, n_kv_heads, head_dim, dtype):
    heads = n_heads, n_kv_heads, n_kv_heads
    q, k, v = (random_bnhd(2, n, 5 * 16, head_dim, dtype) for n in heads)
    check_norm_score_pool(q, k, v, 3, 4)


def test_scores_of_coarser_entries_are_maxima():
    q, k, v = (random_bnhd(1, 2, 3 * 64, 16) for _ in range(3))
    for scores in scorers.norm_score_pool(q, k, v, 4, 4)[:2]:
        finest, middle, coarsest = scores.split([48, 12, 3], -1)
        assert torch.equal(middle, finest.unflatten(-1, (-1, 4)).amax(-1))
        assert torch.equal(coarsest, middle.unflatten(-1, (-1, 4)).amax(-1))


# ---- select

# L, p, topk, candidates of a stratum at the coarsest level
CASCADES = [
    (2, 2, 128, 128),
    (3, 4, 256, 129),
    (4, 2, 128, 200),
    (3, 8, 128, 136),
    (2, 4, 128, 700),
]
CASCADE_IDS = [f"L{levels}-p{p}-k{topk}-C{count}" for levels, p, topk, count in CASCADES]


def check_select(q_scores, k_scores, num_levels, p, topk, seq_len):
    for is_start in (False, True):
        arguments = q_scores, k_scores, num_levels, p, topk, seq_len, is_start
        actual = selection.select(*arguments)
        plain = selection_ops.select_reference(*arguments)
        for ours, theirs in zip(actual, plain, strict=True):
            assert ours.dtype == torch.int32
            assert torch.equal(ours, theirs)
    return actual


@pytest.mark.parametrize("kind", KINDS)
def test_select_of_scores(kind):
    num_levels, p, topk, count = 3, 2, 128, 131
    seq_len = count * p ** (num_levels - 1)
    num_scores = sum(seq_len // p**level for level in range(1, num_levels))
    # The two kinds of scores are drawn separately, so that each selection has its own ties.
    q_scores, k_scores = (scores_of(kind, (1, 2, num_scores)).to(DEVICE) for _ in range(2))
    check_select(q_scores, k_scores, num_levels, p, topk, seq_len)


@pytest.mark.parametrize(("num_levels", "p", "topk", "count"), CASCADES, ids=CASCADE_IDS)
def test_select_of_every_cascade(num_levels, p, topk, count):
    seq_len = topk // 128 * count * p ** (num_levels - 1)
    q_scores, k_scores = (torch.rand(1, 1, seq_len, device=DEVICE) for _ in range(2))
    pooled = [scorer_ops.pool_scores(x, num_levels, p) for x in (q_scores, k_scores)]
    entry, slot = check_select(*pooled, num_levels, p, topk, seq_len)

    order = reference_selection(
        q_scores[0, 0].tolist(), k_scores[0, 0].tolist(), num_levels, p, topk
    )
    config = LighthouseConfig(num_levels=num_levels, pooling_factor=p, topk=topk)
    ids = [config.level_offset(level, seq_len) + index for level, index in order]
    assert entry[0, 0].tolist() == ids
    # The maps are inverses of each other. All other entries are absent.
    assert torch.equal(slot[0, 0, entry[0, 0].long()].cpu(), torch.arange(len(ids)).int())
    assert (slot >= 0).sum() == len(ids)


def test_select_of_strided_scores_of_batches_and_heads():
    num_levels, p, topk, seq_len = 3, 2, 256, 2 * 130 * 4
    num_scores = seq_len // 2 + seq_len // 4
    q_scores = torch.rand(3, num_scores, 2, device=DEVICE)[1:].permute(0, 2, 1)
    k_scores = torch.rand(2, 2, 2 * num_scores, device=DEVICE)[..., 1::2]
    check_select(q_scores, k_scores, num_levels, p, topk, seq_len)


# ---- gather and scatter-back


def check_gather_and_scatter_back(q, k, v, entry, slot, num_levels, p, grads=None, rotary=()):
    """Run all four kernels. Gradients have the given values, or random values."""
    seq_len = q.shape[2]
    exact_levels = scorer_ops.norm_score_pool_reference(
        q.double(), k.double(), v.double(), num_levels, p, *rotary
    )[2:]  # fmt: skip
    inputs = q, k, v, *(x.to(q.dtype) for x in exact_levels)
    arguments = entry, slot, num_levels, p, *rotary
    subs = check(gather.gather, gather_ops.gather_reference, inputs, *arguments)
    dsubs = grads or [torch.randn_like(x) for x in subs]
    arguments = slot, num_levels, p, seq_len, *rotary
    check(gather.gather_backward, gather_ops.gather_backward_reference, dsubs, *arguments)
    if rotary:
        return
    # One sequence with the maximum number of chunks, one per entry of the coarsest level.
    for num_chunks in (1, seq_len // p ** (num_levels - 1)):
        edges = None
        if num_chunks > 1:
            edges = torch.randn(*q.shape[:2], num_chunks, num_levels - 1, q.shape[-1]).to(dsubs[0])
        arguments = entry, slot, num_levels, p, seq_len
        reference = gather_ops.scatter_back_reference
        check(scatter_back.scatter_back, reference, (dsubs[0], edges), *arguments)
        arguments = entry, num_levels, p, num_chunks
        reference = gather_ops.scatter_back_backward_reference
        check(scatter_back.scatter_back_backward, reference, (q,), *arguments)


@pytest.mark.parametrize(("p", "num_levels"), SHAPES, ids=SHAPE_IDS)
def test_gather_and_scatter_back_of_every_shape(p, num_levels):
    num_coarsest = 3
    seq_len = num_coarsest * p ** (num_levels - 1)
    entry, slot = random_maps(1, 1, num_coarsest, num_levels, p, 2)
    q, k, v = (random_bnhd(1, 1, seq_len, 8) for _ in range(3))
    check_gather_and_scatter_back(q, k, v, entry, slot, num_levels, p)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("n_heads", "n_kv_heads", "head_dim"), HEADS, ids=HEAD_IDS)
def test_gather_and_scatter_back_of_heads_and_dtypes(n_heads, n_kv_heads, head_dim, dtype):
    entry, slot = random_maps(2, n_kv_heads, 5, 3, 2, 3)
    heads = n_heads, n_kv_heads, n_kv_heads
    q, k, v = (random_bnhd(2, n, 5 * 4, head_dim, dtype) for n in heads)
    check_gather_and_scatter_back(q, k, v, entry, slot, 3, 2)


# H, Hkv, D, R, interleaved, p, L
ROTARY_CASES = [
    (2, 1, 16, 16, True, 2, 3),
    (2, 1, 16, 16, False, 2, 3),
    (1, 1, 80, 80, True, 4, 3),
    (1, 1, 80, 20, False, 4, 3),
    (1, 1, 128, 128, True, 8, 2),
    (1, 1, 128, 32, False, 2, 5),
    (3, 1, 8, 6, True, 4, 4),
    (1, 1, 2, 2, False, 8, 3),
]
ROTARY_IDS = [
    f"H{h}-Hkv{g}-D{d}-R{r}-{'interleaved' if i else 'halves'}-p{p}-L{num_levels}"
    for h, g, d, r, i, p, num_levels in ROTARY_CASES
]


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("case", ROTARY_CASES, ids=ROTARY_IDS)
def test_rotary_phases(case, dtype):
    n_heads, n_kv_heads, head_dim, rotary_dim, interleaved, p, num_levels = case
    span = p ** (num_levels - 1)
    rotary = phases(rotary_dim, span, interleaved)
    entry, slot = random_maps(1, n_kv_heads, 3, num_levels, p, 2)
    heads = n_heads, n_kv_heads, n_kv_heads
    q, k, v = (random_bnhd(1, n, 3 * span, head_dim, dtype) for n in heads)
    check_norm_score_pool(q, k, v, num_levels, p, rotary)
    check_gather_and_scatter_back(q, k, v, entry, slot, num_levels, p, rotary=rotary)


def any_strides(kind, batch, n_heads, length, head_dim):
    if kind == "contiguous":
        return torch.randn(batch, n_heads, length, head_dim, device=DEVICE)
    if kind == "sliced":
        # A slice of a fused projection, without its first token.
        x = torch.randn(batch, length + 1, 3 * n_heads, head_dim, device=DEVICE)
        return x[:, 1:, n_heads : 2 * n_heads].transpose(1, 2)
    if kind == "columns":
        return torch.randn(batch, n_heads, head_dim, length, device=DEVICE).transpose(2, 3)
    return torch.randn(batch, 1, 1, 1, device=DEVICE).expand(-1, n_heads, length, head_dim)


@pytest.mark.parametrize("kind", ["contiguous", "sliced", "columns", "expanded"])
def test_any_strides(kind):
    p, num_levels, num_coarsest = 2, 3, 5
    entry, slot = random_maps(2, 1, num_coarsest, num_levels, p, 2)
    q, k, v = (any_strides(kind, 2, heads, num_coarsest * 4, 16) for heads in (2, 1, 1))
    check_norm_score_pool(q, k, v, num_levels, p)
    dsubs = [any_strides(kind, 2, heads, entry.shape[-1], 16) for heads in (2, 1, 1)]
    check_gather_and_scatter_back(q, k, v, entry, slot, num_levels, p, dsubs)
    for rotary in (phases(16, 4, True), phases(8, 4, False)):
        check_norm_score_pool(q, k, v, num_levels, p, rotary)
        check_gather_and_scatter_back(q, k, v, entry, slot, num_levels, p, dsubs, rotary)


# ---- the whole layer


OPS = [
    scorer_ops._norm_score_pool,
    selection_ops._select,
    gather_ops._gather,
    gather_ops._gather_backward,
    gather_ops._scatter_back,
    gather_ops._scatter_back_backward,
]
CUDA = {op._name: op._backend_fns["cuda"] for op in OPS}
"""The functions registered for CUDA, by the names of their ops."""


@pytest.mark.parametrize("is_rotary", [False, True], ids=["averaged", "aligned"])
@pytest.mark.parametrize("n_kv_heads", [1, 2], ids=["GQA", "MHA"])
def test_layer_and_gradients_match_the_reference(n_kv_heads, is_rotary):
    config = LighthouseConfig(num_levels=3, pooling_factor=2, topk=128)
    seq_len, head_dim = 4 * 129, 16
    inputs = [random_bnhd(1, heads, seq_len, head_dim) for heads in (2, n_kv_heads, n_kv_heads)]
    dout = random_bnhd(1, 2, seq_len, head_dim)
    rotary = rotary_table(6, 4, interleaved=True).to(torch.device(DEVICE)) if is_rotary else None
    rope = rope_of(frequencies(6), interleaved=True) if is_rotary else None

    def reference(q, k, v):
        if is_rotary:
            # The reference takes q and k before their rotation.
            q, k = (torch.stack([rope(x[:, :, t], -t) for t in range(seq_len)], 2) for x in (q, k))
        return reference_attention(q, k, v, 3, 2, 128, rope=rope)

    def out_and_gradients(attention, device, dtype):
        leaves = [x.to(device, dtype).requires_grad_() for x in inputs]
        out = attention(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, dout.to(device, dtype))

    launched = []
    with torch.library._scoped_library("lighthouse", "IMPL") as library:
        for name, implementation in CUDA.items():

            def launch(*args, name=name, implementation=implementation):
                launched.append(name)
                return implementation(*args)

            library.impl(name, launch, DEVICE.upper(), allow_override=True)
        actual = out_and_gradients(
            lambda *x: lighthouse_attention(*x, config, rotary=rotary), DEVICE, torch.float32
        )
    assert sorted(launched) == sorted(CUDA)
    exact = out_and_gradients(reference, "cpu", torch.float64)
    for ours, theirs in zip(actual, exact, strict=True):
        torch.testing.assert_close(ours.double().cpu(), theirs, rtol=1e-5, atol=1e-5)


def test_fp64_takes_the_pytorch_body(monkeypatch):
    q, k, v = (random_bnhd(1, 1, 20, 16).double() for _ in range(3))
    entry, slot = random_maps(1, 1, 5, 3, 2, 2)
    # Every launch passes through here.
    monkeypatch.setattr(torch.cuda, "device_of", None)
    *scores, coarsest_q, coarsest_k, coarsest_v = CUDA["norm_score_pool"](q, k, v, 3, 2)
    subs = CUDA["gather"](q, k, v, coarsest_q, coarsest_k, coarsest_v, entry, slot, 3, 2)
    grads = CUDA["gather_backward"](*subs, slot, 3, 2, 20)
    out = CUDA["scatter_back"](subs[0], None, entry, slot, 3, 2, 20)
    dsub = CUDA["scatter_back_backward"](out, entry, 3, 2, 1)
    span_scores = torch.rand(1, 1, 384, device=DEVICE, dtype=torch.float64)
    CUDA["select"](span_scores, span_scores, 3, 2, 128, 512, True)
    assert {x.dtype for x in (*scores, *subs, *grads, out, dsub)} == {torch.float64}
