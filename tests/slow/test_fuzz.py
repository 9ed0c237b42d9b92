"""Random configurations: accepted ones run, and rejected ones could not run.

Whether a configuration can run is found in a second way: by cutting lists into pieces instead of
arithmetic, and by running without the rules. The nearest value that an error suggests is accepted.
The normal suite uses the same few examples every time. `slow` tests use many new ones.
"""

import copy
import itertools
import json
import math
import re
import tempfile
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runs import command_line, losses_of, trainer_of
from torchtitan.experiments.lighthouse.config.job_config import JobConfig
from torchtitan.experiments.lighthouse.config.load import load_config
from torchtitan.experiments.lighthouse.config.rule_helpers import leaves, value_of
from torchtitan.experiments.lighthouse.preflight import check_config

from lighthouse import LighthouseConfig, lighthouse_attention
from lighthouse.config import LONGEST, nearest_multiple, nearest_power_of_two
from lighthouse.scorers import Scores, pool_scores
from lighthouse.selection import select_spans

FEW, MANY = "few", "many"


def fuzz(few: int, many: int, effort: str) -> settings:
    """The number of examples for this suite. The few of the normal suite are always the same."""
    return settings(
        max_examples=few if effort == FEW else many,
        derandomize=effort == FEW,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


both_efforts = pytest.mark.parametrize("effort", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])

wild = st.one_of(
    st.integers(-5, 5), st.integers(-5000, 5000), st.integers(), st.integers(-(10**40), 10**40)
)
"""Numbers of every size, most of them small."""

shapes = st.builds(
    dict,
    num_levels=st.integers(2, 5),
    pooling_factor=st.sampled_from([2, 2, 4, 8]),
    topk=st.integers(1, 6).map(lambda strata: 128 * strata),
)
"""Fields of LighthouseConfig that are each legal alone."""

FIELDS_OF_SHAPES = ("num_levels", "pooling_factor", "topk")


@st.composite
def lengths(draw, longest: int = 4096) -> int:
    """Often a multiple of something, so that some are legal."""
    step = draw(st.sampled_from([1, 16, 128, 256, 384, 512, 1024]))
    return step * draw(st.integers(1, longest // step))


def pieces(items: list, count: int) -> list[list] | None:
    """Cut `items` into `count` consecutive pieces of equal size. None if that is impossible."""
    size = -(-len(items) // count)
    cut = [items[i : i + size] for i in range(0, len(items), size)]
    return cut if len(cut) == count and {len(piece) for piece in cut} == {size} else None


def could_run(fields: dict[str, int], seq_len: int, num_chunks: int = 1) -> bool:
    """Whether the pyramid can be built and its strata filled. A second statement of the rules."""
    p, strata = fields["pooling_factor"], fields["topk"] // 128
    level = list(range(seq_len))
    for _ in range(fields["num_levels"] - 1):
        if len(level) % p:
            return False
        level = level[::p]
    cut = pieces(level, strata) if level else None
    if cut is None or min(map(len, cut)) < 128:
        return False
    # A stratum is in only one chunk.
    return pieces(cut, num_chunks) is not None


def refusal(check, *args, **options) -> str | None:
    """The message of a check, or None if it passes. Any other exception fails the test."""
    try:
        check(*args, **options)
    except ValueError as error:
        message = str(error)
        assert "\n" not in message and 20 < len(message) < 1500, message
        return message
    return None


# ---- the attention


@both_efforts
def test_what_is_accepted_runs_and_what_is_refused_does_not(effort):
    heads = st.sampled_from([(1, 1), (2, 1), (2, 2), (3, 1)])
    seen = []

    @fuzz(40, 1000, effort)
    @given(
        fields=shapes,
        seq_len=lengths(),
        heads=heads,
        scorer=st.sampled_from(["norm", "norm", "dilated", "gla"]),
        dilation=st.integers(1, 9),
        dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
        seed=st.integers(0, 99),
    )
    def check(fields, seq_len, heads, scorer, dilation, dtype, seed):
        config = LighthouseConfig(**fields, scorer=scorer, dilation=dilation)
        message = refusal(config.check_seq_len, seq_len)
        assert (message is None) == could_run(fields, seq_len), message
        seen.append(message is None)
        if message is not None:
            assert not runs_unchecked(config, seq_len)
            return
        generator = torch.Generator().manual_seed(seed)
        q, k, v = (
            torch.randn(1, n_heads, seq_len, 4, generator=generator).to(dtype).requires_grad_()
            for n_heads in (heads[0], heads[1], heads[1])
        )
        out = lighthouse_attention(q, k, v, config)
        assert out.shape == q.shape and out.dtype == dtype
        gradients = torch.autograd.grad(out.float().square().sum(), (q, k, v))
        assert all(x.isfinite().all() for x in (out, *gradients))
        assert all(x.any() for x in (out, *gradients))

    check()
    assert 5 < sum(seen) < len(seen) - 5


def runs_unchecked(config: LighthouseConfig, seq_len: int) -> bool:
    """Whether scores give a selection without any checks, with another entry in every slot."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.rand(2, 1, 1, seq_len, generator=generator)
    with mock.patch.object(LighthouseConfig, "check_seq_len", lambda *args: None):
        try:
            scores = (pool_scores(x, config.num_levels, config.pooling_factor) for x in tokens)
            selection = select_spans(Scores(*scores), config, seq_len)
        except (RuntimeError, IndexError, ValueError):
            return False
    entry = selection.slot_to_entry[0, 0]
    is_entry = bool(((entry >= 0) & (entry < config.num_entries(seq_len))).all())
    if not is_entry or len(entry.unique()) < len(entry):
        return False
    # 128 entries of every stratum and level are refined, and all their children are present.
    return len(entry) == config.sub_seq_len(seq_len) and bool((selection.entry_to_slot >= 0).any())


# ---- the rules of the attention alone


@both_efforts
def test_a_wrong_field_is_refused_in_time_and_the_nearest_one_accepted(effort):
    @fuzz(300, 5000, effort)
    @given(
        fields=st.fixed_dictionaries(
            {},
            optional=dict.fromkeys(("num_levels", "pooling_factor", "topk", "dilation"), wild),
        )
    )
    def check(fields):
        # Each message names one field. Setting it to the suggested value removes the error.
        for _ in range(5):
            message = refusal(LighthouseConfig, **fields)
            if message is None:
                return
            name = message.split()[0]
            value = int(re.search(r"(?:nearest: |use )(-?\d+)", message).group(1))
            assert value != fields[name]
            fields = {**fields, name: value}
        raise AssertionError(message)

    check()


@both_efforts
def test_the_nearest_length_and_topk_are_accepted(effort):
    @fuzz(300, 5000, effort)
    @given(
        fields=shapes | st.builds(dict, **dict.fromkeys(("num_levels",), st.integers(2, 30))),
        seq_len=lengths() | wild,
        num_chunks=st.sampled_from([1, 1, 2, 4, 8]),
        multiple_of=st.sampled_from([2, 4, 6, 16]),
    )
    def check(fields, seq_len, num_chunks, multiple_of):
        config = LighthouseConfig(**fields)
        message = refusal(config.check_seq_len, seq_len, num_chunks, multiple_of)
        if message is None:
            return
        nearest = message.split("nearest")[1]
        named = re.findall(r"topk (\d+) with seq_len (\d+)|topk (\d+)(?!\d*:| with)", nearest)
        by_len = re.search(r"(?:, or seq_len|topk \d+:) (\d+)", nearest)
        for topk, its_len, alone in named:
            other = LighthouseConfig(**{**fields, "topk": int(alone or topk)})
            other.check_seq_len(int(its_len or seq_len), num_chunks)
        if by_len:
            config.check_seq_len(int(by_len.group(1)), num_chunks)
            assert int(by_len.group(1)) % multiple_of == 0
        assert named or by_len or "fewer levels or a smaller factor" in nearest

    check()


@both_efforts
def test_no_legal_value_is_nearer(effort):
    @fuzz(60, 2000, effort)
    @given(fields=shapes, seq_len=lengths(), num_chunks=st.sampled_from([1, 2, 3, 4]))
    def check(fields, seq_len, num_chunks):
        config = LighthouseConfig(**fields)
        legal = [
            k
            for k in range(128, 4097, 128)
            if could_run({**fields, "topk": k}, seq_len, num_chunks)
        ]
        distance = min((abs(k - config.topk) for k in legal), default=None)
        found = config.nearest_topk(seq_len, num_chunks)
        assert (found is None) == (distance is None)
        assert found is None or (found in legal and abs(found - config.topk) == distance)

    check()

    @fuzz(300, 5000, effort)
    @given(st.integers(-300, 300), st.integers(1, 40), st.integers(1, 60), st.integers(60, 200))
    def check_multiple(value, of, least, most):
        legal = [n for n in range(least, most + 1) if n % of == 0]
        if legal:
            expected = min(legal, key=lambda n: (abs(n - value), n))
            assert nearest_multiple(value, of, least, most) == expected
        powers = [2**n for n in range(1, 31)]
        expected = min(powers, key=lambda n: (abs(n - value), n))
        assert nearest_power_of_two(value) == expected

    check_multiple()


def test_numbers_beyond_all_bounds_are_near_the_bound():
    assert nearest_power_of_two(10**100) == LONGEST and nearest_power_of_two(-(10**100)) == 2
    assert nearest_multiple(10**100, 128, most=LONGEST) == LONGEST
    assert nearest_multiple(-(10**100), 128) == 128


# ---- whole configurations


@pytest.fixture(scope="module")
def base(corpus, tmp_path_factory) -> JobConfig:
    """A run of two steps on the CPU."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    options = {"model__flavor": "quickstart", "lr_scheduler__total_steps": 9}
    options |= {"training__steps": 2, "lighthouse__stage1_steps": 1, "checkpoint__enable": False}
    # The model has two layers.
    options["lighthouse__full_attn_layers"] = [0]
    return load_config(command_line(folder, corpus, **options))


def changed(base: JobConfig, values: dict[str, Any]) -> JobConfig:
    """A copy with other values, by dotted names such as `training.steps`."""
    config = copy.deepcopy(base)
    for name, value in values.items():
        section, _, leaf = name.rpartition(".")
        owner = value_of(config, section)
        assert hasattr(owner, leaf), name
        setattr(owner, leaf, value)
    return config


def values_of(annotation: Any) -> st.SearchStrategy:
    """Values of the type of a field, sensible or not."""
    origin, options = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return st.one_of(*map(values_of, options))
    if origin is Literal:
        return st.sampled_from(options)
    if origin is list:
        return st.lists(values_of(options[0]), max_size=3)
    words = ["", " ", "none", "op", "2", "text", "prepared", "model", "debugmodel", "norm", "é\n"]
    return {
        # No paths, because the test must not depend on files of this machine.
        str: st.sampled_from(words) | st.text("abc-_. \n\u00e9\u2028", max_size=6),
        int: st.sampled_from([0, 1, 2, 3, 128, 2048]) | wild,
        float: st.floats() | st.floats(0, 1),
        bool: st.booleans(),
        NoneType: st.none(),
    }[annotation]


FIELDS = dict(leaves(JobConfig))


@both_efforts
def test_any_values_of_any_fields_are_accepted_or_refused_in_one_line(effort, base):
    whatever = st.sampled_from(sorted(FIELDS)).flatmap(
        lambda name: st.tuples(st.just(name), values_of(FIELDS[name]))
    )
    refused = []

    @fuzz(250, 20000, effort)
    @given(st.lists(whatever, min_size=1, max_size=3), st.sampled_from([1, 1, 2, 4]))
    def check(values, world_size):
        message = refusal(check_config, changed(base, dict(values)), world_size)
        refused.append(message is not None)
        if message is not None:
            assert re.search(r"must|is not a field", message), message

    check()
    assert any(refused) and not all(refused)
    assert not Path(base.job.dump_folder).exists()


@both_efforts
def test_any_file_is_accepted_or_refused_in_one_line(effort, tmp_path):
    scalars = st.one_of(
        st.booleans(), st.integers(-(10**20), 10**20), st.floats(), st.text("ab \\n", max_size=4)
    )
    anything = st.one_of(scalars, st.lists(scalars, max_size=2), st.just({}))
    path = tmp_path / "run.toml"

    @fuzz(12, 1000, effort)
    @given(st.lists(st.tuples(st.sampled_from(sorted(FIELDS)), anything), min_size=1, max_size=4))
    def check(values):
        path.write_text(
            "".join(f"{name} = {toml(value)}\n" for name, value in dict(values).items())
        )
        message = refusal(load_config, ["--job.config_file", str(path)])
        fits = all(fits_type(value, FIELDS[name]) for name, value in dict(values).items())
        is_module = any(name == "job.custom_config_module" and value for name, value in values)
        assert (message is None) == fits or is_module, (message, values)

    check()


def toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    return "{}" if value == {} else repr(value)


def fits_type(value: Any, annotation: Any) -> bool:
    """Whether a TOML value has the annotated type of a field."""
    written = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    options = written.replace("typing.", "").split(" | ")
    if "Literal[" in written:
        return any(repr(value) in option for option in options) and isinstance(value, str)
    kinds = {bool: "bool", int: "int", float: "float", str: "str", dict: "dict"}
    if isinstance(value, list):
        inside = [option[5:-1] for option in options if option.startswith("list[")]
        return any(all(kinds.get(type(item)) == kind for item in value) for kind in inside)
    kind = kinds[type(value)]
    return kind in options or (kind == "int" and "float" in options)


@both_efforts
def test_a_named_value_ends_the_complaint(effort, base):
    numbers = [
        "training.steps",
        "training.seq_len",
        "training.local_batch_size",
        "training.global_batch_size",
        "training.loss_chunk_size",
        "training.gc_freq",
        "metrics.log_freq",
        "lighthouse.num_levels",
        "lighthouse.pooling_factor",
        "lighthouse.topk",
        "lighthouse.dilation",
        "lighthouse.telemetry_freq",
        "parallelism.data_parallel_shard_degree",
        "parallelism.tensor_parallel_degree",
        "comm.init_timeout_seconds",
        "comm.trace_buf_size",
    ]
    small = st.sampled_from([1, 2, 4, 128, 256, 512, 2048, 4096])
    ended = []

    @fuzz(200, 10000, effort)
    @given(
        st.dictionaries(st.sampled_from(numbers), small | wild, min_size=1, max_size=3),
        st.sampled_from([1, 2, 4, 6]),
    )
    def check(values, world_size):
        config = changed(base, values)
        message = refusal(check_config, config, world_size)
        named = re.search(
            r"; (?:nearest|nearest with topk \d+|use|set it to)[: ]+(-?\d+)(?! with|\d)",
            message or "",
        )
        if named is None:
            return
        name = message.split()[0]
        better = changed(config, {name: int(named.group(1))})
        still = refusal(check_config, better, world_size)
        if "nearest" in message:
            assert still is None or still.split()[0] != name, (message, still)
        else:
            # A bound is one of several rules.
            assert still is None or still.split(", got")[0] != message.split(", got")[0]
        ended.append(name)

    check()
    assert len(set(ended)) > 8


@both_efforts
def test_ranks_are_accepted_where_they_make_a_grid(effort, base):
    degrees = st.sampled_from([1, 1, 2, 2, 4, 0, -1, 3])
    seen = []

    @fuzz(300, 20000, effort)
    @given(
        world_size=st.sampled_from([1, 2, 4, 8, 6]),
        shard=st.sampled_from([-1, -1, -1, 1, 2, 3]),
        replicate=degrees,
        context=degrees,
        tensor=degrees,
        scheme=st.sampled_from(["ulysses", "ring"]),
        scorer=st.sampled_from(["norm", "norm", "norm", "gla"]),
        stage1_steps=st.sampled_from([0, 1, -1]),
        strata=st.sampled_from([1, 2, 4, 8]),
        length=st.sampled_from([256, 512, 1024, 2048, 4096, 2050]),
        flavor=st.sampled_from(["quickstart", "10M", "8B"]),
    )
    def check(
        world_size, shard, replicate, context, tensor, scheme, scorer, stage1_steps, strata,
        length, flavor,
    ):  # fmt: skip
        fields = {"num_levels": 2, "pooling_factor": 2, "topk": 128 * strata}
        config = changed(
            base,
            {
                **{f"lighthouse.{name}": value for name, value in fields.items()},
                "parallelism.data_parallel_shard_degree": shard,
                "parallelism.data_parallel_replicate_degree": replicate,
                "parallelism.context_parallel_degree": context,
                "parallelism.tensor_parallel_degree": tensor,
                "lighthouse.context_parallel": scheme,
                "lighthouse.scorer": scorer,
                "lighthouse.stage1_steps": stage1_steps,
                "training.seq_len": length,
                "model.flavor": flavor,
            },
        )
        n_kv_heads = {"quickstart": 2, "10M": 4, "8B": 8}[flavor]
        expected = False
        for shards in range(1, world_size + 1):
            grid = itertools.product(*map(range, (replicate, shards, context, tensor)))
            expected |= sum(1 for _ in grid) == world_size and shard in (-1, shards)
            if expected:
                break
        expected = expected and min(replicate, context, tensor) >= 1
        expected = expected and pieces(list(range(n_kv_heads)), tensor) is not None
        if expected and context > 1:
            if scheme == "ulysses":
                expected = pieces(list(range(n_kv_heads // tensor)), context) is not None
            expected = expected and (scorer == "norm" or stage1_steps == 0)
        if expected:
            # Without sharding, DDP replicates the parameters. DDP supports no other mesh.
            expected = not (replicate > 1 and tensor > 1 and shards * context == 1)
            expected = expected and pieces(list(range(length)), 2 * context * tensor) is not None
        if expected and stage1_steps:
            num_chunks = 1 if context == 1 else context * (2 if scheme == "ring" else 1)
            expected = could_run(fields, length, num_chunks)
        message = refusal(check_config, config, world_size)
        assert (message is None) == expected, message
        seen.append(expected)

    check()
    assert 5 < sum(seen) < len(seen) - 5


@both_efforts
def test_what_is_accepted_trains(effort, base, corpus):
    trained = []

    @st.composite
    def runs(draw) -> dict[str, Any]:
        fields = draw(shapes.filter(lambda fields: fields["num_levels"] < 4))
        span = fields["pooling_factor"] ** (fields["num_levels"] - 1)
        legal = fields["topk"] * span
        seq_len = draw(st.sampled_from([legal, legal, legal + 1])) if legal <= 2048 else 254
        return {
            **{f"lighthouse.{name}": value for name, value in fields.items()},
            "lighthouse.scorer": draw(st.sampled_from(["norm", "dilated", "gla"])),
            "lighthouse.dilation": draw(st.integers(1, 5)),
            "lighthouse.full_attn_layers": draw(
                st.lists(st.sampled_from([0, -1, -2, 1, 2]), max_size=2)
            ),
            "lighthouse.stage1_steps": draw(st.sampled_from([1, -1, 0, 2, 1, 3])),
            "lighthouse.telemetry_freq": draw(st.integers(0, 1)),
            "training.seq_len": seq_len,
            "training.local_batch_size": draw(st.integers(1, 2)),
            "training.global_batch_size": draw(st.sampled_from([-1, 2, 2])),
            "training.loss_chunk_size": draw(st.sampled_from([0, 100, 5000])),
            "training.max_norm": draw(st.sampled_from([1e-3, 1.0, math.inf])),
            "training.mixed_precision_param": draw(st.sampled_from(["float32", "bfloat16"])),
            "activation_checkpoint.mode": draw(st.sampled_from(["none", "selective", "full"])),
            "activation_checkpoint.selective_ac_option": draw(st.sampled_from(["1", "2", "op"])),
            "optimizer.lr": draw(st.sampled_from([1e-6, 1e-3])),
            "optimizer.beta1": draw(st.sampled_from([0.0, 0.9])),
            "optimizer.weight_decay": draw(st.sampled_from([0.0, 0.1])),
            "optimizer.name": draw(st.sampled_from(["Adam", "AdamW"])),
            "lr_scheduler.warmup_steps": draw(st.integers(0, 2)),
            "lr_scheduler.total_steps": draw(st.sampled_from([None, 2, 9])),
            "lr_scheduler.decay_ratio": draw(st.sampled_from([None, 0.0, 0.5, 1.0])),
            "lr_scheduler.min_lr_factor": draw(st.sampled_from([0.0, 0.1])),
            "lr_scheduler.decay_type": draw(st.sampled_from(["linear", "sqrt", "cosine"])),
            "debug.seed": draw(st.sampled_from([None, 0, 2**64 - 1])),
        }

    @fuzz(20, 300, effort)
    @given(runs())
    def check(values):
        config = changed(base, values)
        message = refusal(check_config, config, 1)
        fields = {name: values[f"lighthouse.{name}"] for name in FIELDS_OF_SHAPES}
        seq_len, stage1_steps = values["training.seq_len"], values["lighthouse.stage1_steps"]
        expected = seq_len % 2 == 0 if stage1_steps == 0 else could_run(fields, seq_len)
        expected = expected and stage1_steps <= 2
        # quickstart has two layers.
        expected = expected and all(
            layer in (-2, -1, 0, 1) for layer in values["lighthouse.full_attn_layers"]
        )
        assert (message is None) == expected, message
        if message is not None:
            return
        with tempfile.TemporaryDirectory() as folder:
            config.job.dump_folder = folder
            with trainer_of(config) as trainer:
                trainer.train()
                rate = trainer.lr_schedulers.schedulers[0].get_last_lr()[0]
            losses = losses_of(folder)
        assert list(losses) == [1, 2] and all(map(math.isfinite, losses.values()))
        assert 0 <= rate <= values["optimizer.lr"]
        trained.append(values)

    check()
    assert len(trained) > 2


# Fields that make a run long or large or need the network. The compiler takes long, too.
NOT_TRIED = {
    *("training.steps", "training.seq_len", "training.local_batch_size", "model.flavor"),
    *("training.global_batch_size", "validation.steps", "validation.local_batch_size"),
    *("validation.seq_len", "lighthouse.stage1_steps", "metrics.enable_wandb", "compile.enable"),
}


@both_efforts
def test_any_value_that_is_accepted_trains(effort, base):
    """Values of all fields, one field at a time."""
    whatever = st.sampled_from(sorted(FIELDS.keys() - NOT_TRIED)).flatmap(
        lambda name: st.tuples(st.just(name), values_of(FIELDS[name]))
    )
    trained = []

    @fuzz(20, 400, effort)
    @given(whatever, st.booleans(), st.booleans())
    def check(value, validates, saves):
        values = {"validation.enable": validates, "checkpoint.enable": saves, value[0]: value[1]}
        config = changed(base, values)
        with tempfile.TemporaryDirectory() as folder:
            if value[0] != "job.dump_folder":
                config.job.dump_folder = folder
            if refusal(check_config, config, 1) is not None:
                return
            config.job.dump_folder = folder
            with trainer_of(config) as trainer:
                trainer.train()
            assert list(losses_of(folder)) == [1, 2][: 2 // config.metrics.log_freq]
        trained.append(value)

    check()
    assert len(trained) > 5
