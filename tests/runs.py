"""Tiny two-stage runs on the CPU, and their results, for the tests of the trainer.

A run has 7 steps, 3 of them with Lighthouse. The text is shorter than the run, so it is repeated.
To resume a stopped run, make the same call with more steps and the same folder.
"""

import contextlib
import gc
import hashlib
import itertools
import os
import random
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torchtitan.train
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor
from torchtitan.experiments.lighthouse import metrics
from torchtitan.experiments.lighthouse.checkpoint import stage_switch
from torchtitan.experiments.lighthouse.config.load import load_config
from torchtitan.experiments.lighthouse.data.datasets import is_held_out
from torchtitan.experiments.lighthouse.preflight import check_config
from torchtitan.experiments.lighthouse.runtime import cpu_device
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


class RecordedPlainTrainer(Recorded, torchtitan.train.Trainer):
    """torchtitan's own trainer."""


@dataclass
class Run:
    """The results of a run on one rank."""

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
        )


@contextlib.contextmanager
def trainer_of(config, trainer_class: type = RecordedTrainer):
    """A trainer on the CPU that is closed at the end. Its ``train`` does not sleep."""
    cpu_device.use_cpu_device()
    alone = not dist.is_initialized()
    env = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    env |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    awake = SimpleNamespace(perf_counter=time.perf_counter, sleep=lambda seconds: None)
    with (
        mock.patch.dict(os.environ, env if alone else {}),
        mock.patch.object(torchtitan.train, "time", awake),
        # A fixed peak rate. Measuring it takes longer than a step.
        mock.patch.object(cpu_device, "measure_peak_flops", lambda: 1e12),
    ):
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


def losses_of(dump_folder: str | Path) -> dict[int, float]:
    lines = metrics.read_metrics(dump_folder, metrics.LOSS)
    return {line["step"]: line[metrics.LOSS] for line in lines}


def assert_same_state(run: Run, expected: Run) -> None:
    """Check that parameters and moments are equal in every bit."""
    for tensors, same in ((run.parameters, expected.parameters), (run.moments, expected.moments)):
        assert tensors and tensors.keys() == same.keys(), tensors.keys() ^ same.keys()
        differ = [name for name, tensor in tensors.items() if not torch.equal(tensor, same[name])]
        assert not differ, differ


def _local(tensor: torch.Tensor) -> torch.Tensor:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.detach().clone()
