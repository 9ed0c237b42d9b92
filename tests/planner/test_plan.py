"""Plans: comparison with counts by hand and with real runs on the CPU.

Memory is measured at the allocator. torch's profiler records every allocation and release of a
training step, also inside operators. Traffic is measured at the collectives of two gloo ranks.
"""

import importlib.util
import json
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import launch
from refusals import refused
from runs import RANKS, command_line, trainer_of
from torch.distributed.tensor.experimental._context_parallel import _attention as torch_ring
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torchtitan.experiments.lighthouse.config.load import load_config
from torchtitan.experiments.lighthouse.planner import render as plan_script
from torchtitan.experiments.lighthouse.planner.estimate import checkpoint_facts, pieces_plan, plan
from torchtitan.experiments.lighthouse.planner.flops import (
    flops_per_token,
    logged_flops_per_token,
    recomputed_flops_per_token,
)
from torchtitan.experiments.lighthouse.planner.gpus import GPUS, read_gpu
from torchtitan.experiments.lighthouse.planner.memory import kept_tensors, stage_memory
from torchtitan.experiments.lighthouse.planner.run_shape import Sizes
from torchtitan.experiments.lighthouse.planner.traffic import step_traffic
from torchtitan.experiments.lighthouse.preflight import check_config
from torchtitan.experiments.lighthouse.train import TwoStageTrainer

from lighthouse import LighthouseConfig
from lighthouse.gather import gather
from lighthouse.scorers import score
from lighthouse.selection import select_spans

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "train_configs").glob("*.toml"))
CONTEXT_1M = ROOT / "train_configs" / "1m_context.toml"
DEBUG = ROOT / "train_configs" / "debug.toml"


def run_script(capsys, *args) -> str:
    plan_script.main([str(arg) for arg in args])
    return capsys.readouterr().out


def sizes_of(path: Path, world_size: int, *overrides: str) -> Sizes:
    config = load_config(["--job.config_file", str(path), *overrides])
    check_config(config, world_size, "cuda", is_start=False)
    return Sizes(config, world_size)


# ---- the program


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_plans_every_recipe(path, capsys):
    world_size = RANKS.get(path.stem, 1)
    args = (path, "--world-size", world_size, "--gpu", "B200")
    found = json.loads(run_script(capsys, *args, "--json"))
    sizes = sizes_of(path, world_size)
    sub_seq_len = sizes.attention.sub_seq_len(sizes.seq_len)
    if "1" in found["stages"]:
        assert found["attention"]["sub_seq_len"] == sub_seq_len
    assert sum(stage["steps"] for stage in found["stages"].values()) == found["run"]["steps"]
    hours = sum(stage["gpu_hours"] for stage in found["stages"].values())
    assert found["gpu_hours"] == pytest.approx(hours) and found["speed_up"] > 0
    for stage in found["stages"].values():
        assert stage["memory"]["peak"] == sum(stage["memory"]["parts"].values())
        assert all(seconds >= 0 for seconds in stage["seconds"].values())
    text = run_script(capsys, *args)
    assert "not measured" in text and (f"S {sub_seq_len:,}" in text) == ("1" in found["stages"])
    assert max(map(len, text.splitlines())) <= 110


def test_on_the_cpu_there_are_no_times(capsys):
    args = (DEBUG, "--world-size", 1, "--gpu", "cpu")
    found = json.loads(run_script(capsys, *args, "--json"))
    assert found["gpu"] is None and found["stages"]["1"]["seconds"] == {}
    assert "GPU-hours" not in run_script(capsys, *args)


MY_GPU = """
name = "Mine"
memory_gib = 10
peak_tflops = 50
bandwidth_gb_s = 500
attention_tflops = 20
"""


def test_a_gpu_of_ones_own(tmp_path, capsys):
    file = tmp_path / "my_gpu.toml"
    file.write_text(MY_GPU)
    gpu = read_gpu(file)
    assert (gpu.memory, gpu.peak_flops, gpu.datasheet_bandwidth) == (10 * 2**30, 50e12, 500e9)
    assert (gpu.attention_flops, gpu.attention_backward_flops) == (20e12, 0.6 * 50e12)
    text = run_script(capsys, DEBUG, "--world-size", 1, "--gpu", file)
    assert "1 x Mine: expected" in text and "of 9 GiB" in text


@pytest.mark.parametrize(
    "change, words",
    [
        (("peak_tflops = 50", ""), ("must set", "add peak_tflops")),
        (("peak", "peek"), ("add peak_tflops and remove peek_tflops",)),
        (("= 500", "= 0"), ("bandwidth_gb_s must be a number above 0", "got 0")),
        (("= 500", "= '500'"), ("bandwidth_gb_s must be a number above 0", "got '500'")),
        (("= 500", "="), ("--gpu must be one of", "TOML file")),
    ],
)
def test_a_gpu_that_cannot_be_is_told_in_one_line(change, words, tmp_path):
    file = tmp_path / "my_gpu.toml"
    file.write_text(MY_GPU.replace(*change))
    with refused(*words):
        read_gpu(file)
    with pytest.raises(ValueError, match=r"^--gpu must be one of .*none\.toml.*; correct it"):
        read_gpu(tmp_path / "none.toml")


def test_a_small_run_has_small_units(capsys):
    text = run_script(capsys, DEBUG, "--world-size", 1, "--gpu", "RTX4090")
    for words in ("MFLOP a token", "MiB of a rank", "µs a step", "GPU-ms", " 122,880 tokens"):
        assert words in text, words
    assert " 0.0 " not in text and "0.00" not in text
    large = run_script(capsys, CONTEXT_1M, "--world-size", 32, "--gpu", "H200")
    for words in ("GFLOP a token", "PFLOP a step", "GiB of a rank", "GPU-hours", "billion tokens"):
        assert words in large, words


def test_overrides_as_in_training(capsys):
    def planned(*overrides: str) -> dict:
        args = (DEBUG, "--world-size", 1, "--json", "--validation.no_enable", *overrides)
        return json.loads(run_script(capsys, *args))

    assert planned()["attention"]["sub_seq_len"] == 2048 // 16 + 2 * 4 * 128
    found = planned("--training.seq_len", "8192", "--lighthouse.topk", "512")
    assert found["attention"]["sub_seq_len"] == 8192 // 16 + 2 * 4 * 512
    assert found["attention"]["strata"] == 4
    found = planned("--lighthouse.full_attn_layers", "0", "-1", "--model.flavor", "268M")
    assert found["attention"]["dense_layers"] == [0, 29]
    assert planned("--lighthouse.stage1_steps=0")["attention"] == {}


def test_a_plan_is_not_a_start(tmp_path, capsys):
    (tmp_path / "dump" / "checkpoint" / "step-4").mkdir(parents=True)
    for folder in ("dump", "nowhere"):
        run_script(
            *(capsys, DEBUG, "--world-size", 2, "--job.dump_folder", tmp_path / folder),
            *("--checkpoint.load_step", 7, "--checkpoint.initial_load_path", "/nowhere/step-3"),
        )
    assert not (tmp_path / "nowhere").exists()


# ---- sizes and FLOPs


@pytest.mark.parametrize(
    ("flavor", "vocab_size", "printed"), [("530M", 128256, "530.1M"), ("268M", 320, "268.1M")]
)
def test_parameters_of_the_papers_model(flavor, vocab_size, printed, capsys):
    args = (CONTEXT_1M, "--world-size", 32, "--model.flavor", flavor)
    found = json.loads(run_script(capsys, *args, "--json"))["run"]["parameters"]
    layer = 4 * 1024**2 + 3 * 1024 * 1536 + 2 * 1024
    expected = 2 * vocab_size * 1024 + 30 * layer + 1024
    assert found["total"] == expected
    assert found["embedding"] + 30 * found["layer"] + found["head"] == expected
    assert f"{printed} parameters" in run_script(capsys, *args)


@pytest.mark.parametrize("degree", [1, 2])
def test_s_is_the_length_of_the_sub_sequence(degree):
    options = ["--training.seq_len", "4096", "--lighthouse.topk", "256", "--validation.no_enable"]
    options += ["--parallelism.context_parallel_degree", str(degree)]
    sizes = sizes_of(DEBUG, degree, *options)
    shard_len = sizes.seq_len // degree
    q = torch.rand(1, 2, shard_len, 8)
    config = LighthouseConfig(3, 4, 256 // degree)
    scores, coarsest = score(q, q, q, config)
    selection = select_spans(scores, config, shard_len)
    sub_q, _, _ = gather(q, q, q, coarsest, selection)
    assert sub_q.shape[2] * degree == sizes.attended_len(True)


def test_flops_of_a_token_by_hand():
    sizes = sizes_of(CONTEXT_1M, 32, "--lighthouse.full_attn_layers", "0", "-1")
    seq_len, sub_seq_len = 1048576, 65536
    linear = 30 * (4 * 1024**2 + 3 * 1024 * 1536)
    # q·k and p·v, with a multiplication and an addition each, over half of the square. The
    # backward pass has 2.5 times as many.
    dense = 3.5 * 2 * 1024 * seq_len
    sparse = 3.5 * 2 * 1024 * sub_seq_len**2 / seq_len
    assert flops_per_token(sizes, 1) == {
        "linear": 6 * linear,
        "attention": 2 * dense + 28 * sparse,
        "scoring": 0,
        "head": 6 * 128256 * 1024,
        "total": 6 * linear + 2 * dense + 28 * sparse + 6 * 128256 * 1024,
    }
    assert flops_per_token(sizes, 2)["attention"] == 30 * dense
    # The whole forward pass is recomputed.
    again = 2 * linear + (2 * dense + 28 * sparse) / 3.5
    assert recomputed_flops_per_token(sizes, 1) == pytest.approx(again)
    # torchtitan counts the whole square, twice as many FLOPs backward, and norms as weights.
    norms = 61 * 1024
    logged = 6 * (linear + norms + 128256 * 1024) + 12 / 7 * (2 * dense + 28 * sparse)
    assert logged_flops_per_token(sizes, 1) == pytest.approx(logged)


def test_dear_scores_are_counted_forward_and_never_computed_again():
    options = "--lighthouse.scorer dilated --lighthouse.dilation 4 --activation_checkpoint.mode "
    # Two passes over a quarter of the tokens, half of the square each. 4 layers, 2 heads of 64.
    scoring = 4 * 2 * 2 * (2 * 2048 / 4) * 64
    flops = {}
    for mode in ("none", "full"):
        sizes = sizes_of(DEBUG, 1, *(options + mode).split())
        assert flops_per_token(sizes, 1)["scoring"] == scoring
        assert flops_per_token(sizes, 2)["scoring"] == 0
        flops[mode] = recomputed_flops_per_token(sizes, 1)
    attention = 4 * 2 * 2 * sizes.attended_len(True) ** 2 / 2048 * 64
    linear = 4 * 2 * (4 * 128**2 + 3 * 128 * 512)
    assert flops == {"none": 0, "full": linear + attention}


def test_peak_rates_are_torchtitans():
    # A fresh copy of the module. The imported one may measure the CPU.
    spec = importlib.util.find_spec("torchtitan.tools.utils")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with mock.patch.object(module.subprocess, "run", side_effect=FileNotFoundError):
        for name, gpu in GPUS.items():
            logged = gpu.logged_peak_flops or gpu.peak_flops
            assert logged == module.get_peak_flops(f"NVIDIA {name}")


def test_seconds_follow_from_bytes_flops_and_rates():
    config = sizes_of(CONTEXT_1M, 32).config
    found = plan(config, 32, GPUS["H200"])
    stage1, stage2 = found.stages["1"], found.stages["2"]
    # Half of the square of a sequence, plus recomputation, on eight ranks.
    flops = 2 * 30 * 2 * 1024 * 1048576**2 / 8
    assert stage2.seconds["attend"] == pytest.approx(flops / 607e12)
    # S is a sixteenth of N.
    assert stage1.seconds["attend"] == pytest.approx(stage2.seconds["attend"] / 256)
    gathered = 30 * 2 * 24 * (16384 * (1 + 4 + 16 + 1) + 65536) * 256 / 8 / (0.9 * 4.8e12)
    assert stage1.seconds["gather"] == pytest.approx(gathered, rel=0.01)
    step = sum(stage2.seconds.values())
    assert stage2.tokens_per_second == pytest.approx(4 * 1048576 / step / 32)
    assert found.dense.gpu_hours == pytest.approx(1500 * step * 32 / 3600)


def test_stage_2_on_pieces_by_hand():
    """98K and 1M tokens on 32 B200, with stage 2 on pieces, with and without full-length steps."""
    configs = ROOT / "train_configs"
    c4 = sizes_of(configs / "c4_530m_98k_pieces.toml", 32, "--lighthouse.stage2_full_steps", "0")
    found = plan(c4.config, 32, GPUS["B200"])
    assert found.stages.keys() == {"1", "2"} and found.stages["2"].steps == 6000
    assert found.gpu_hours == pytest.approx(91, abs=0.5)
    whole = plan(sizes_of(configs / "c4_530m_98k.toml", 32).config, 32, GPUS["B200"])
    assert whole.gpu_hours == pytest.approx(165, abs=0.5)
    assert found.dense == whole.dense and found.stages["1"] == whole.stages["1"]
    pieces, full = found.stages["2"], whole.stages["2"]
    # Only attention changes, to a quarter.
    assert pieces.flops_per_token["attention"] == full.flops_per_token["attention"] / 4
    assert pieces.flops_per_token["linear"] == full.flops_per_token["linear"]
    assert pieces.seconds["attend"] == pytest.approx(full.seconds["attend"] / 4)
    logged = full.logged_flops_per_token - pieces.logged_flops_per_token
    assert logged == 12 * 30 * 1024 * (98304 - 24576)
    assert pieces.memory.peak == full.memory.peak

    million = sizes_of(configs / "1m_context_pieces.toml", 32)
    found = plan(million.config, 32, GPUS["B200"])
    assert {name: stage.steps for name, stage in found.stages.items()} == {
        **{"1": 1000, "2": 450, "2 full": 50}
    }
    assert sum(found.stages["2"].seconds.values()) == pytest.approx(4.46, abs=0.01)
    assert sum(found.stages["2 full"].seconds.values()) == pytest.approx(33.1, abs=0.1)
    assert not any("exchange" in name for name in found.stages["2"].traffic_per_step)
    assert found.stages["2 full"].traffic_per_step["exchange"] > 0
    # The rotation table and the loader's batch have full length.
    assert found.stages["2"].memory.always == found.stages["1"].memory.always
    tokens = {
        stage.flops_per_step / stage.flops_per_token["total"] for stage in [*found.stages.values()]
    }
    assert tokens == {4 * 1048576}


def test_checkpoints_by_hand():
    options = "--training.steps 25 --lighthouse.stage1_steps 12 --checkpoint.interval 5"
    sizes = sizes_of(DEBUG, 1, *options.split(), "--checkpoint.keep_latest_k", "2")
    full = 3 * 4 * sizes.parameters["total"]
    # Steps 15 and 20, the switch and the new step 25. Then 15 is removed.
    assert checkpoint_facts(sizes) == {
        "steps": [5, 10, 12, 15, 20, 25],
        "bytes": full,
        "last_bytes": full,
        "most_on_disk": 4 * full,
        "left": 3 * full,
    }
    model_only = ["--checkpoint.last_save_model_only", "--checkpoint.export_dtype", "bfloat16"]
    facts = checkpoint_facts(sizes_of(DEBUG, 1, *model_only))
    assert facts["steps"] == [20, 40, 60] and facts["last_bytes"] == full // 6
    assert checkpoint_facts(sizes_of(DEBUG, 1, "--checkpoint.no_enable"))["steps"] == []


# ---- bytes between two ranks


def options_of(folder: Path, corpus: Path, **overrides) -> list[str]:
    """Options of a run with one step in each stage."""
    defaults = {"training__steps": 2, "lighthouse__stage1_steps": 1, "checkpoint__enable": False}
    return command_line(folder, corpus, **(defaults | overrides))


class Traffic(TorchDispatchMode):
    """Counts the bytes that this rank sends in collectives, by purpose."""

    def __init__(self):
        super().__init__()
        self.sent = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, others = func.name(), dist.get_world_size() - 1
        if name == "c10d::_allgather_base_":
            self.sent["gather"] += args[1].nbytes * others
        elif name == "c10d::_reduce_scatter_base_":
            self.sent["reduce"] += args[0].nbytes * others
        elif name == "lighthouse::all_to_all":
            self.sent["exchange"] += args[0].nbytes * others // dist.get_world_size()
        return func(*args, **kwargs or {})

    def wrapped(self, function, others: int):
        """Wrap a collective of torch's ring that sends its tensor to `others` ranks."""

        def call(tensor, *args, **kwargs):
            self.sent["exchange"] += tensor.nbytes * others
            return function(tensor, *args, **kwargs)

        return call


def sent_by_stage(folder: Path, corpus: Path, runs: dict) -> dict[str, list[dict[str, int]]]:
    """Bytes that a rank sends in the step of each stage, by run."""
    return {
        name: sent_in_run(options_of(folder / name, corpus, **overrides))
        for name, overrides in runs.items()
    }


def sent_in_run(args: list[str]) -> list[dict[str, int]]:
    ring, ranks, result = torch_ring.ft_c, dist.get_world_size(), []
    # The names in torch 2.13 and 2.11.
    gather_name = next(x for x in ("all_gather_single", "all_gather_tensor") if hasattr(ring, x))
    with trainer_of(load_config(args), TwoStageTrainer) as trainer:
        batches = trainer.batch_generator(trainer.dataloader)
        while trainer.should_continue_training():
            trainer.step += 1
            traffic = Traffic()
            gather_all = traffic.wrapped(getattr(ring, gather_name), ranks - 1)
            permute = traffic.wrapped(ring.permute_tensor, 1)
            with (
                traffic,
                mock.patch.object(ring, gather_name, gather_all),
                mock.patch.object(ring, "permute_tensor", permute),
            ):
                trainer.train_step(batches)
            result.append(dict(traffic.sent))
    return result


SHARED = {"training__seq_len": 2048, "parallelism__context_parallel_degree": 2}
RUNS = {
    "ulysses, pieces": {**SHARED, "lighthouse__topk": 256, "lighthouse__stage2_seq_len": 512},
    "ring, pieces": {
        **SHARED,
        "lighthouse__context_parallel": "ring",
        "lighthouse__topk": 512,
        "lighthouse__stage2_seq_len": 1024,
    },
    "ulysses": {**SHARED, "lighthouse__topk": 256},
    "ring, full checkpointing": {
        **SHARED,
        "lighthouse__context_parallel": "ring",
        "lighthouse__topk": 512,
        "activation_checkpoint__mode": "full",
    },
    "fsdp, two micro-batches": {
        "training__global_batch_size": 4,
        "parallelism__fsdp_reshard_after_forward": "never",
    },
}


def test_bytes_sent_are_those_that_two_ranks_send(corpus, tmp_path):
    folder = tmp_path / "dump"
    sent = launch(sent_by_stage, 2, tmp_path / "ranks", folder, corpus, RUNS)
    for name, overrides in RUNS.items():
        sizes = Sizes(load_config(options_of(folder, corpus, **overrides)), 2, "cpu")
        for stage in (1, 2):
            planned = Counter()
            on_pieces = sizes.config.has_pieces and stage == 2
            planned_sizes = sizes.in_pieces() if on_pieces else sizes
            for purpose, size in step_traffic(planned_sizes, stage).items():
                kind = "exchange" if purpose.startswith("edges") else purpose.split()[0]
                planned[kind] += size
            # Ranks that hold whole pieces send nothing for attention.
            assert ("exchange" in planned) == (sizes.cp_scheme is not None and not on_pieces)
            for rank in sent:
                assert rank[name][stage - 1] == planned, name


# ---- memory


def measured_peak(args: list[str]) -> int:
    """Peak bytes of live tensors in the second step of a run on the CPU."""
    config = load_config(args)
    with trainer_of(config, TwoStageTrainer) as trainer:
        batches = trainer.batch_generator(trainer.dataloader)
        assert trainer.should_continue_training()
        trainer.step = 1
        trainer.train_step(batches)
        # Gradients of the first step do not count for the second.
        trainer.optimizers.zero_grad()
        states = trainer.optimizers.optimizers[0].state.values()
        tensors = [value for state in states for value in state.values()]
        tensors += [*trainer.model_parts[0].parameters(), *trainer.model_parts[0].buffers()]
        before = sum({x.untyped_storage().data_ptr(): x.nbytes for x in tensors}.values())
        trainer.step = 2
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            trainer.train_step(batches)
    allocations = []
    nodes = list(profiler.profiler.kineto_results.experimental_event_tree())
    while nodes:
        node = nodes.pop()
        if node.tag == torch._C._profiler._EventType.Allocation:
            allocations.append((node.start_time_ns, node.extra_fields))
        nodes += node.children
    alive, now, peak = set(), 0, 0
    for _, event in sorted(allocations, key=lambda allocation: allocation[0]):
        if event.alloc_size > 0:
            alive.add(event.ptr)
        elif event.ptr not in alive:
            # A release of an earlier allocation.
            continue
        now += event.alloc_size
        peak = max(peak, now)
    return before + peak


LIGHTHOUSE, DENSE = {"lighthouse__stage1_steps": -1}, {"lighthouse__stage1_steps": 0}
FULL = {"activation_checkpoint__mode": "full"}
BY_OP = {
    "activation_checkpoint__mode": "selective",
    "activation_checkpoint__selective_ac_option": "op",
}
EVERY_SECOND = BY_OP | {"activation_checkpoint__selective_ac_option": "2"}
CHUNKED = {"training__loss_chunk_size": 512}
COMPILED = {"compile__enable": True}


@pytest.mark.parametrize("checkpointing", ["full", "op"])
def test_dear_scores_are_kept(checkpointing, corpus, tmp_path):
    def kept(scorer: str, checkpointing: str) -> dict[str, int]:
        options = {"training__seq_len": 4096, "training__local_batch_size": 2}
        args = options_of(tmp_path, corpus, **LIGHTHOUSE, **options, lighthouse__scorer=scorer)
        return kept_tensors(Sizes(load_config(args), 1, "cpu"), True, checkpointing)

    # fp32 scores of queries and of keys. 2 sequences, 2 kv heads, L2 p2, so 2,048 spans.
    scores = {"scores": 2 * 2 * 2 * 2048 * 4}
    assert kept("gla", checkpointing) == kept("norm", checkpointing) | scores
    assert kept("dilated", checkpointing) == kept("gla", checkpointing)
    # The backward pass does not need them.
    assert kept("gla", "none") == kept("norm", "none")


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param({**LIGHTHOUSE, "training__seq_len": 8192}, id="lighthouse"),
        pytest.param({**DENSE, **FULL, "lighthouse__stage2_seq_len": 1024}, id="pieces, full"),
        pytest.param({**LIGHTHOUSE, **FULL, **CHUNKED}, id="lighthouse, full, chunked loss"),
        pytest.param({**DENSE, **FULL}, id="dense, full"),
        pytest.param({**LIGHTHOUSE, **BY_OP}, id="lighthouse, by op"),
        pytest.param(
            {**LIGHTHOUSE, **EVERY_SECOND, "lighthouse__full_attn_layers": [0, -1]},
            id="some layers dense, every second",
        ),
        pytest.param({**LIGHTHOUSE, **FULL, **COMPILED}, id="compiled", marks=pytest.mark.slow),
        pytest.param(
            {**LIGHTHOUSE, **COMPILED, **CHUNKED},
            id="compiled, chunked loss",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {**LIGHTHOUSE, "training__mixed_precision_param": "bfloat16"},
            id="autocast",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {**DENSE, "training__global_batch_size": 2},
            id="dense, two micro-batches",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_memory_is_within_5_percent_of_what_is_measured(overrides, corpus, tmp_path):
    defaults = {"training__seq_len": 4096, "lighthouse__num_levels": 3}
    defaults |= {"lighthouse__pooling_factor": 4, "lighthouse__full_attn_layers": []}
    args = options_of(tmp_path / "dump", corpus, **(defaults | overrides))
    sizes = Sizes(load_config(args), 1, "cpu")
    (stage,) = sizes.stages
    is_on_pieces = sizes.config.has_pieces
    memory = pieces_plan(sizes, None, 1).memory if is_on_pieces else stage_memory(sizes, stage)
    peak = measured_peak(args)
    # Activations and temporary tensors, without the model.
    assert memory.peak > 5 * sum(memory.always.values())
    assert memory.peak == pytest.approx(peak, rel=0.05), memory.parts
