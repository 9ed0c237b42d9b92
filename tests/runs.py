"""Tiny two-stage runs on the CPU, and their results, for the tests of the trainer.

A run has 7 steps, 3 of them with Lighthouse. The text is shorter than the run, so it is repeated.
To resume a stopped run, make the same call with more steps and the same folder.
"""

import contextlib
import gc
import hashlib
import itertools
import json
import os
import random
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torchtitan.train
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor
from torchtitan.experiments.lighthouse import metrics
from torchtitan.experiments.lighthouse.checkpoint import stage_switch
from torchtitan.experiments.lighthouse.config.load import load_config
from torchtitan.experiments.lighthouse.data.datasets import is_held_out
from torchtitan.experiments.lighthouse.preflight import check_config
from torchtitan.experiments.lighthouse.runtime import cpu_device
from torchtitan.experiments.lighthouse.runtime.launcher import check_environment
from torchtitan.experiments.lighthouse.train import TwoStageTrainer

STEPS = 7
STAGE1_STEPS = 3
N_LAYERS = 4
SEQ_LEN = 768

RANKS = {
    "1m_context": 32,
    "1m_context_pieces": 32,
    "cp_smoke_cpu": 2,
    "cp_smoke_gpu": 2,
    "llama3_8b_128k": 16,
}
"""Number of processes for the shipped configurations that need more than one."""


def write_corpus(folder: Path) -> Path:
    """Write 12 training documents and 3 held-out documents of about 300 bytes each."""
    folder.mkdir(parents=True)
    dice = random.Random(0)
    words = ["".join(dice.choices("abcdefgh", k=dice.randint(1, 6))) for _ in range(40)]
    wanted = {False: 12, True: 3}
    for i in itertools.count():
        text = " ".join(dice.choices(words, k=70))
        if wanted[is_held_out(text)]:
            wanted[is_held_out(text)] -= 1
            (folder / f"{i:04d}.txt").write_text(text)
        if not any(wanted.values()):
            return folder


def command_line(dump_folder: Path, corpus: Path, **overrides: Any) -> list[str]:
    """The command line of a run; ``section__field=value`` overrides."""
    options = {
        "job__dump_folder": dump_folder,
        "model__flavor": "debugmodel",
        "optimizer__lr": 1e-2,
        "optimizer__implementation": "foreach",
        # The rate rises and falls, so it differs before and after the switch.
        "lr_scheduler__warmup_steps": 2,
        "lr_scheduler__decay_ratio": 0.7,
        "lr_scheduler__total_steps": STEPS,
        "training__dataset": "text",
        "training__dataset_path": corpus,
        "training__local_batch_size": 1,
        "training__seq_len": SEQ_LEN,
        "training__steps": STEPS,
        "training__mixed_precision_param": "float32",
        "lighthouse__num_levels": 2,
        "lighthouse__pooling_factor": 2,
        "lighthouse__topk": 128,
        "lighthouse__full_attn_layers": [0, -1],
        "lighthouse__stage1_steps": STAGE1_STEPS,
        "activation_checkpoint__mode": "none",
        "metrics__log_freq": 1,
        "validation__dataset": "text",
        "validation__dataset_path": corpus,
        "validation__local_batch_size": 2,
        "validation__seq_len": SEQ_LEN,
        "validation__steps": 2,
        "checkpoint__enable": True,
        "checkpoint__interval": 100,
        "debug__seed": 0,
        **overrides,
    }
    args = []
    for name, value in options.items():
        section, _, field = name.rpartition("__")
        section = section.replace("__", ".")
        if isinstance(value, bool):
            args.append(f"--{section}.{field if value else f'no_{field}'}")
        else:
            values = value if isinstance(value, list) else [value]
            args += [f"--{section}.{field}", *map(str, values)]
    return args


class Recorded:
    """Mixin for a trainer that records the data, the attention and the counters of each step."""

    def __init__(self, job_config):
        self.batches = defaultdict(list)
        self.attention, self.flops_per_token, self.keys = {}, {}, {}
        super().__init__(job_config)

    def post_dataloading_process(self, input_dict, labels):
        tokens = torch.cat([input_dict["input"].flatten(), labels.flatten()])
        self.batches[self.step].append(hashlib.sha256(tokens.numpy()).hexdigest())
        blocks = self.model_parts[0].layers.values()
        self.attention[self.step] = [
            type(block.attention.inner_attention).__name__ for block in blocks
        ]
        self.flops_per_token[self.step] = self.metrics_processor.num_flops_per_token
        self.keys[self.step] = list(get_model_state_dict(self.model_parts[0]))
        return super().post_dataloading_process(input_dict, labels)


class RecordedTrainer(Recorded, TwoStageTrainer):
    """The trainer under test."""


class SharedTrainer(RecordedTrainer):
    """Gives the windows of one sequence to the data-parallel ranks in turn.

    Global batches are then the same for any number of ranks.
    """

    def windows(self) -> Iterator[torch.Tensor]:
        """Token ids, [N + 1], where N is a multiple of the sequence length."""
        raise NotImplementedError

    def batch_generator(self, data_iterable):
        dims, seq_len = self.parallel_dims, self.job_config.training.seq_len
        rank = dims.get_mesh("batch").get_local_rank() if dims.dp_enabled else 0
        degree = dims.dp_replicate * dims.dp_shard
        return super().batch_generator(
            ({"input": window[:-1].view(-1, seq_len)}, window[1:].view(-1, seq_len))
            for window in itertools.islice(self.windows(), rank, None, degree)
        )


class RecordedPlainTrainer(Recorded, torchtitan.train.Trainer):
    """torchtitan's own trainer."""


@dataclass
class Run:
    """The results of a run on one rank."""

    folder: Path
    """The dump folder."""

    losses: dict[int, float]
    """Losses by step, of all runs in the dump folder so far."""

    batches: dict[int, list[str]]
    """Digests of the token ids of each batch, by step."""

    attention: dict[int, list[str]]
    """Class of the attention of each layer, by step."""

    flops_per_token: dict[int, float]
    """Reported values, by step."""

    keys: dict[int, list[str]]
    """Digests of the model's state dict, by step."""

    parameters: dict[str, torch.Tensor]
    moments: dict[str, torch.Tensor]

    epoch: int
    """Epoch of the data, from 0."""

    exit_code: int


def train(
    args: list[str],
    trainer_class: type = RecordedTrainer,
    look: Callable[[Any], None] | None = None,
) -> Run:
    """Train in this process, as a rank of the group if there is one. Calls ``look(trainer)``."""
    config = load_config(args)
    with trainer_of(config, trainer_class) as trainer:
        trainer.train()
        # Rank 0 writes the losses.
        dist.barrier()
        if look is not None:
            look(trainer)
        # Keys are the names in a checkpoint.
        names = {
            parameter: name.replace("_checkpoint_wrapped_module.", "")
            for name, parameter in trainer.model_parts[0].named_parameters()
        }
        states = trainer.optimizers.optimizers[0].state
        return Run(
            folder=Path(config.job.dump_folder),
            losses=losses_of(config.job.dump_folder),
            batches=dict(trainer.batches),
            attention=trainer.attention,
            flops_per_token=trainer.flops_per_token,
            keys=trainer.keys,
            parameters={name: _local(parameter) for parameter, name in names.items()},
            moments={
                f"{names[parameter]}.{key}": _local(value)
                for parameter, state in states.items()
                for key, value in state.items()
            },
            epoch=stage_switch.data_positions(trainer)[0]["epoch"],
            exit_code=getattr(trainer, "exit_code", 0),
        )


@contextlib.contextmanager
def trainer_of(config, trainer_class: type = RecordedTrainer):
    """A trainer on the CPU that is closed at the end. Its ``train`` does not sleep."""
    cpu_device.use_cpu_device()
    alone = not dist.is_initialized()
    awake = SimpleNamespace(perf_counter=time.perf_counter, sleep=lambda seconds: None)
    with (
        mock.patch.dict(os.environ),
        mock.patch.object(torchtitan.train, "time", awake),
        # A fixed peak rate. Measuring it takes longer than a step.
        mock.patch.object(cpu_device, "measure_peak_flops", lambda: 1e12),
    ):
        check_environment()
        check_config(config, world_size=int(os.environ["WORLD_SIZE"]))
        trainer, num_threads = None, torch.get_num_threads()
        # Sums depend on the number of threads. A model this small is not faster with more threads.
        torch.set_num_threads(1)
        try:
            trainer = trainer_class(config)
            yield trainer
        finally:
            if trainer is not None:
                trainer.close()
            if alone and dist.is_initialized():
                dist.destroy_process_group()
            torch.set_num_threads(num_threads)
            # Every trainer turns the garbage collector off.
            gc.enable()


@contextlib.contextmanager
def start_two_processes(args: list[str], log: Path, until: str) -> Iterator[subprocess.Popen]:
    """``lighthouse train`` with two processes on the CPU, once its log contains ``until``."""
    config = log.with_suffix(".toml")
    config.write_text('[model]\nflavor = "debugmodel"\n')
    command = [sys.executable, "-m", "lighthouse_cli", "train", str(config), *args]
    command += ["--nproc-per-node", "2"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with (
        log.open("w") as file,
        subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment) as run,
    ):
        try:
            while until not in log.read_text():
                assert run.poll() is None, log.read_text()
                time.sleep(0.2)
            yield run
        finally:
            run.kill()


def losses_of(dump_folder: str | Path) -> dict[int, float]:
    lines = metrics.read_metrics(dump_folder, metrics.LOSS)
    return {line["step"]: line[metrics.LOSS] for line in lines}


def assert_same_state(run: Run, expected: Run) -> None:
    """Check that parameters and moments are equal in every bit."""
    for tensors, same in ((run.parameters, expected.parameters), (run.moments, expected.moments)):
        assert tensors and tensors.keys() == same.keys(), tensors.keys() ^ same.keys()
        differ = [name for name, tensor in tensors.items() if not torch.equal(tensor, same[name])]
        assert not differ, differ


def assert_continues(runs: list[Run], expected: Run) -> None:
    """Check that each step of ``expected`` ran once, with the same data, attention and result."""
    for what in ("batches", "attention", "flops_per_token"):
        steps = [item for run in runs for item in getattr(run, what).items()]
        assert steps == list(getattr(expected, what).items())
    assert_same_state(runs[-1], expected)


def handover_of(dump_folder: Path) -> dict[str, Any]:
    return json.loads((dump_folder / "handover.json").read_text())


def saved_keys(run: Run, step: int) -> set[str]:
    """The names of everything in a checkpoint of a run."""
    path = run.folder / "checkpoint" / f"step-{step}"
    return {*FileSystemReader(path).read_metadata().state_dict_metadata}


def _local(tensor: torch.Tensor) -> torch.Tensor:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.detach().clone()
