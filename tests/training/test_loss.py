"""Cross-entropy in chunks has the plain value and gradients, with one chunk in memory.

The expected values are those of `F.cross_entropy` on all logits. Whole runs, on one rank and on two
FSDP ranks over gloo, are compared with runs without chunks.
"""

import math
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from ranks import launch
from runs import STAGE1_STEPS, STEPS, Run, command_line, saved_keys, train
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchtitan.components.loss import IGNORE_INDEX, cross_entropy_loss
from torchtitan.experiments.lighthouse import metrics
from torchtitan.experiments.lighthouse.config.load import load_config
from torchtitan.experiments.lighthouse.flavors import FLAVORS
from torchtitan.experiments.lighthouse.loss import build_loss, chunked_cross_entropy

# Differences of the last bit, which later steps carry on. A wrong factor is orders larger.
ROUNDING = 100 * torch.finfo(torch.float32).eps

TOKENS, DIM, VOCAB = 300, 64, 200
# Chunks that divide the tokens, do not divide them, are one token, all tokens, and more.
CHUNK_SIZES = [100, 128, 1, 300, 1000]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def inputs(
    dtype: torch.dtype = torch.float64, counted: float = 0.9, scale: float = 1
) -> tuple[torch.Tensor, ...]:
    """hidden, weight and labels. The given share of labels counts. Logits are of order `scale`."""
    generator = torch.Generator().manual_seed(0)
    hidden = (torch.randn(TOKENS, DIM, generator=generator) * scale).to(dtype)
    weight = (torch.randn(VOCAB, DIM, generator=generator) / DIM**0.5).to(dtype)
    labels = torch.randint(VOCAB, (TOKENS,), generator=generator)
    labels[torch.rand(TOKENS, generator=generator) >= counted] = IGNORE_INDEX
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def plain(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Reference with all logits, in at least fp32 after them."""
    logits = F.linear(hidden, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORE_INDEX)


def value_and_gradients(loss: torch.Tensor, *leaves: torch.Tensor) -> list[torch.Tensor]:
    # As in training, the sum is divided by a number of tokens.
    return [loss.detach(), *torch.autograd.grad(loss / 17, leaves)]


def errors(got: list[torch.Tensor], expected: list[torch.Tensor]) -> list[float]:
    return [((x.double() - y).norm() / y.norm()).item() for x, y in zip(got, expected, strict=True)]


def in_fp64(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor):
    leaves = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    return value_and_gradients(plain(*leaves, labels), *leaves)


# ---- value and gradients


@pytest.mark.parametrize(
    ("counted", "scale"), [(1.0, 1), (0.9, 1), (0.01, 1), (0.9, 1e-3), (0.9, 1e3)]
)
@pytest.mark.parametrize("chunk_size", CHUNK_SIZES, ids="C{}".format)
def test_value_and_gradients_are_those_of_all_logits(chunk_size, counted, scale):
    hidden, weight, labels = inputs(counted=counted, scale=scale)
    assert 0 < (labels != IGNORE_INDEX).sum() <= TOKENS
    loss = chunked_cross_entropy(hidden, weight, labels, chunk_size)
    got = value_and_gradients(loss, hidden, weight)
    assert [x.dtype for x in got] == [torch.float64] * 3
    assert max(errors(got, in_fp64(hidden, weight, labels))) < 1e-12


@pytest.mark.parametrize("chunk_size", CHUNK_SIZES, ids="C{}".format)
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)],
    ids=["fp32", "bf16", "autocast"],
)
def test_errors_are_at_most_twice_the_plain_ones(dtype, autocast, chunk_size):
    hidden, weight, labels = inputs(dtype)
    expected = in_fp64(hidden, weight, labels)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with Work() as work:
            loss = chunked_cross_entropy(hidden, weight, labels, chunk_size)
        plain_loss = plain(hidden, weight, labels)
    assert work.product_dtypes == {torch.bfloat16 if autocast else dtype}
    got = value_and_gradients(loss, hidden, weight)
    assert [x.dtype for x in got] == [torch.float32, dtype, dtype]
    limits = errors(value_and_gradients(plain_loss, hidden, weight), expected)
    # The error of a single value can be zero by chance.
    limits[0] = max(limits[0], torch.finfo(torch.float32).eps)
    for error, limit in zip(errors(got, expected), limits, strict=True):
        assert error <= 2 * limit


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp64", "fp32", "bf16"])
def test_without_a_counted_token_loss_and_gradients_are_zero(dtype):
    hidden, weight, labels = inputs(dtype, counted=0)
    loss = chunked_cross_entropy(hidden, weight, labels, 128)
    for x in value_and_gradients(loss, hidden, weight):
        assert torch.equal(x, torch.zeros_like(x))


def test_a_token_that_does_not_count_leaves_no_trace():
    hidden, weight, labels = inputs()
    loss = chunked_cross_entropy(hidden, weight, labels, 128)
    counted = labels != IGNORE_INDEX
    _, dhidden, dweight = value_and_gradients(loss, hidden, weight)
    assert not dhidden[~counted].any() and dhidden[counted].all(1).all()
    other = hidden.detach().where(counted.unsqueeze(1), 3.0).requires_grad_()
    other_loss = chunked_cross_entropy(other, weight, labels, 128)
    assert torch.equal(other_loss, loss)
    assert torch.equal(value_and_gradients(other_loss, other, weight)[2], dweight)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp64", "fp32", "bf16"])
def test_bitwise_repeatable(dtype):
    hidden, weight, labels = inputs(dtype)
    first, second = (
        value_and_gradients(chunked_cross_entropy(hidden, weight, labels, 128), hidden, weight)
        for _ in range(2)
    )
    assert all(map(torch.equal, first, second))


def test_two_backward_passes_of_one_forward_pass_agree():
    hidden, weight, labels = inputs(torch.float32)
    loss = chunked_cross_entropy(hidden, weight, labels, 128)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, (hidden, weight))))


# ---- work and memory


class Work(TorchDispatchMode):
    """Counts matrix products, bytes of new tensors, and logits in memory at the same time."""

    def __init__(self, vocab: int = VOCAB):
        super().__init__()
        self.vocab = vocab
        self.num_products = self.bytes = self.peak = self.most_logits = 0
        self.product_dtypes, self.sizes = set(), {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in tensors_of((args, kwargs)):
            # This tensor was not made here.
            self.sizes.setdefault(tensor.untyped_storage()._cdata, 0)
        result = func(*args, **kwargs or {})
        if func.overloadpacket is torch.ops.aten.mm:
            self.num_products += 1
            self.product_dtypes |= {tensor.dtype for tensor in tensors_of((args, result))}
        for tensor in tensors_of(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self.free, storage._cdata)
            if tensor.shape[-1:] == (self.vocab,):
                # In tokens. The transposed weight has the same shape and is counted, too.
                self.most_logits = max(self.most_logits, tensor.numel() // self.vocab)
        self.peak = max(self.peak, self.bytes)
        return result

    def free(self, key: int) -> None:
        self.bytes -= self.sizes.pop(key)


def tensors_of(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize(
    ("wants_dhidden", "wants_dweight", "products_per_chunk"),
    [(True, True, 3), (True, False, 2), (False, True, 2), (False, False, 1)],
)
def test_nothing_is_computed_that_nobody_wants(wants_dhidden, wants_dweight, products_per_chunk):
    hidden, weight, labels = inputs()
    hidden.requires_grad_(wants_dhidden)
    weight.requires_grad_(wants_dweight)
    num_chunks = math.ceil(TOKENS / 128)
    with Work() as work:
        loss = chunked_cross_entropy(hidden, weight, labels, 128)
    assert loss.requires_grad == (wants_dhidden or wants_dweight)
    assert work.num_products == products_per_chunk * num_chunks
    with Work() as work, torch.no_grad():
        assert torch.equal(chunked_cross_entropy(hidden, weight, labels, 128), loss.detach())
    assert work.num_products == num_chunks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("chunk_size", [8, 128], ids="C{}".format)
@pytest.mark.parametrize("num_tokens", [512, 1024], ids="n{}".format)
def test_peak_memory_is_as_documented(num_tokens, chunk_size, dtype):
    dim, vocab = 32, 2048
    hidden = torch.zeros(num_tokens, dim, dtype=dtype, requires_grad=True)
    weight = torch.zeros(vocab, dim, dtype=dtype, requires_grad=True)
    labels = torch.zeros(num_tokens, dtype=torch.int64)
    size = dtype.itemsize
    logits = chunk_size * vocab * (4 if size == 4 else 6)
    with Work() as validation, torch.no_grad():
        chunked_cross_entropy(hidden, weight, labels, chunk_size)
    with Work() as training:
        loss = chunked_cross_entropy(hidden, weight, labels, chunk_size)
    kept = size * num_tokens * dim + 4 * vocab * dim
    assert 0 <= training.bytes - kept <= 64
    with Work() as backward:
        gradients = torch.autograd.grad(loss, (hidden, weight))
    handed_on = size * (num_tokens + vocab) * dim
    # The formulas do not count vectors of a chunk and its rows of hidden.
    rest = chunk_size * (8 * 8 + 3 * 4 * dim)
    while_summed = size * (chunk_size + dim) * vocab
    assert logits <= validation.peak <= logits + rest
    assert 0 <= training.peak - kept - max(logits, while_summed) <= rest
    assert handed_on <= backward.peak <= handed_on + 64
    assert len(gradients) == 2


# ---- the object that torchtitan calls


def test_without_chunks_the_loss_is_torchtitans():
    assert (
        build_loss(load_config(["--model.flavor", "debugmodel"]), parallel_dims=None)
        is cross_entropy_loss
    )


@pytest.mark.parametrize(("components", "is_compiled"), [("model,loss", True), ("model", False)])
def test_the_loss_of_a_chunk_is_compiled_where_the_loss_is(components, is_compiled):
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    args = "--training.loss_chunk_size 128 --compile.enable --compile.components"
    config = load_config([*args.split(), components])
    config.compile.backend = backend
    loss_fn = build_loss(config)
    hidden, weight, labels = inputs(torch.float32)
    got, expected = (
        value_and_gradients(chunked_cross_entropy(hidden, weight, labels, 128, f), hidden, weight)
        for f in (loss_fn.loss_of_logits, None)
    )
    assert bool(graphs) == is_compiled
    assert all(map(torch.equal, got, expected))


# ---- whole runs

CHUNKS = {"training__loss_chunk_size": 100}
VALIDATION = {"validation__enable": True, "validation__freq": 2}
# Every entry is selected, so a last bit cannot change the selection at a near-tie.
TWO_STAGES = {"lighthouse__topk": 384}
# The first moments are the gradients of the step, unclipped, times a constant.
ONE_STEP = {
    **{"training__steps": 1, "training__seq_len": 256, "training__max_norm": 1e6},
    **{"lighthouse__stage1_steps": 0, "checkpoint__enable": False},
}
BF16 = {"training__mixed_precision_param": "bfloat16"}


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory, corpus) -> Run:
    """A run without chunks."""
    folder = tmp_path_factory.mktemp("plain")
    return train(command_line(folder, corpus, **TWO_STAGES, **VALIDATION))


def validation_losses(run: Run) -> list[float]:
    lines = metrics.read_metrics(run.folder, metrics.VALIDATION_LOSS)
    return [line[metrics.VALIDATION_LOSS] for line in lines]


def gradients(run: Run) -> dict[str, torch.Tensor]:
    """Gradients after one step, up to a factor."""
    return {name: x for name, x in run.moments.items() if name.endswith(".exp_avg")}


def assert_same_gradients(run: Run, expected: Run) -> None:
    assert gradients(run).keys() == gradients(expected).keys()
    assert "output.weight.exp_avg" in gradients(run)
    for name, gradient in gradients(run).items():
        same = gradients(expected)[name]
        # Zero on a rank whose part of the vocabulary does not occur.
        assert (gradient - same).norm() <= ROUNDING * same.norm(), name


def assert_errors_of_bf16(run: Run, plain: Run, expected: Run) -> None:
    """The gradient of the head is off by at most twice as much as without chunks."""
    name = "output.weight.exp_avg"
    error, limit = (
        errors([gradients(x)[name]], [gradients(expected)[name]])[0] for x in (run, plain)
    )
    # Both losses did round to bf16.
    assert min(error, limit) > 1e-4
    assert error <= 2 * limit


def test_a_run_in_chunks_is_the_run_without(plain_run, corpus, tmp_path):
    run = train(command_line(tmp_path, corpus, **TWO_STAGES, **VALIDATION, **CHUNKS))
    assert len(run.losses) == STEPS and run.losses == pytest.approx(plain_run.losses, rel=ROUNDING)
    expected = validation_losses(plain_run)
    assert len(expected) == 6
    assert validation_losses(run) == pytest.approx(expected, rel=ROUNDING)
    assert run.keys == plain_run.keys and run.batches == plain_run.batches


def test_a_checkpoint_saved_without_chunks_goes_on_with_them(plain_run, corpus, tmp_path):
    checkpoint = plain_run.folder / "checkpoint" / f"step-{STAGE1_STEPS}"
    options = {"lighthouse__stage1_steps": 0, "checkpoint__initial_load_path": checkpoint}
    run = train(command_line(tmp_path, corpus, **options, **CHUNKS))
    expected = {step: plain_run.losses[step] for step in range(STAGE1_STEPS + 1, STEPS + 1)}
    assert run.losses == pytest.approx(expected, rel=ROUNDING)
    assert saved_keys(run, STEPS) == saved_keys(plain_run, STEPS)


@pytest.mark.parametrize(
    "options", [{}, {"training__global_batch_size": 2}], ids=["one batch", "two batches"]
)
def test_the_gradients_of_a_step(corpus, tmp_path, options):
    plain, run = (
        train(command_line(tmp_path / str(len(chunks)), corpus, **ONE_STEP, **options, **chunks))
        for chunks in ({}, CHUNKS)
    )
    assert_same_gradients(run, plain)


def test_the_gradients_of_a_step_under_autocast(corpus, tmp_path):
    expected, plain, run = (
        train(command_line(tmp_path / name, corpus, **ONE_STEP, **options))
        for name, options in {"fp32": {}, "plain": BF16, "chunks": {**BF16, **CHUNKS}}.items()
    )
    assert_errors_of_bf16(run, plain, expected)


@pytest.mark.parametrize("chunk_size", [0, 192])
def test_the_logits_of_a_sequence_never_exist(corpus, tmp_path, chunk_size):
    options = {**ONE_STEP, **VALIDATION, "validation__seq_len": 256}
    args = command_line(tmp_path, corpus, training__loss_chunk_size=chunk_size, **options)
    with Work(FLAVORS["debugmodel"].vocab_size) as work:
        run = train(args)
    assert len(validation_losses(run)) == 1
    # Without chunks, all logits of a validation batch. The weight has 128 columns.
    assert work.most_logits == (chunk_size or 2 * 256)


# ---- two ranks

# Two batches per step and rank.
ACCUMULATED = {"training__global_batch_size": 4}
TWO_RANKS = {
    "two stages": {**TWO_STAGES, **ACCUMULATED, "checkpoint__enable": False},
    "fsdp": {**ONE_STEP, **ACCUMULATED},
    "resharded": {
        **{**ONE_STEP, **VALIDATION, "validation__seq_len": 256},
        "parallelism__fsdp_reshard_after_forward": "always",
    },
    "replicated": {**ONE_STEP, "parallelism__data_parallel_replicate_degree": 2},
    "bf16": {**ONE_STEP, **ACCUMULATED, **BF16},
}


def run_on_two_ranks(folder: Path, corpus: Path) -> dict[tuple[str, bool], Run]:
    """All runs of the tests below, with and without chunks, in one group of processes."""
    return {
        (name, is_chunked): train(
            command_line(
                folder / f"{name} {is_chunked}", corpus, **options, **CHUNKS if is_chunked else {}
            )
        )
        for name, options in TWO_RANKS.items()
        for is_chunked in (False, True)
    }


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, corpus) -> list[dict[tuple[str, bool], Run]]:
    """The runs of each rank."""
    folder = tmp_path_factory.mktemp("two")
    return launch(run_on_two_ranks, 2, folder / "results", folder, corpus)


@pytest.mark.parametrize("name", ["fsdp", "resharded", "replicated"])
def test_the_gradients_of_a_step_on_two_ranks(two_ranks, name):
    for runs in two_ranks:
        assert_same_gradients(runs[name, True], runs[name, False])
    if "validation__enable" in TWO_RANKS[name]:
        got, expected = (validation_losses(two_ranks[0][name, i]) for i in (True, False))
        assert len(expected) == 1 and got == pytest.approx(expected, rel=ROUNDING)


def test_the_gradients_of_a_step_in_bf16_on_two_ranks(two_ranks):
    for runs in two_ranks:
        assert_errors_of_bf16(runs["bf16", True], runs["bf16", False], runs["fsdp", False])


def test_a_run_in_chunks_on_two_ranks_is_the_run_without(two_ranks):
    for runs in two_ranks:
        run, expected = runs["two stages", True], runs["two stages", False]
        assert len(expected.losses) == STEPS
        assert run.losses == pytest.approx(expected.losses, rel=ROUNDING)
        assert run.keys == expected.keys
