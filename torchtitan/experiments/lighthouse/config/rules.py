"""Tables of rules for the values of fields. Each entry is a field, test, rule and remedy.

`check_values` checks them in order and raises an error for the first broken rule:

    {field} must be {rule}, got {value}; {remedy}

Rules for parallelism and Lighthouse Attention are in `parallel_rules.py`. Checks that read files
are in `preflight.py` and `checkpoint/resume.py`.
"""

import importlib.util
import math
import os
from typing import Any

from torchtitan.config import LRScheduler
from torchtitan.experiments.lighthouse.config.job_config import JobConfig
from torchtitan.experiments.lighthouse.config.rule_helpers import (
    Rule,
    at_least,
    leaves,
    one_of,
    require,
    unset,
    value_of,
)
from torchtitan.experiments.lighthouse.flavors import FLAVORS, MODEL_NAME

from lighthouse.sdpa import LONGEST_EFFICIENT

MOST_TOKENS = 2**31
"""Upper bound on the tokens of a micro-batch on one rank. No accelerator holds more."""

LARGEST_FACTOR = 1000
"""Upper bound on learning rate, eps and weight decay. No optimizer trains with more."""

RUN_FILES = ("metrics.jsonl", "handover.json", "config.json", ".lock")
"""Files of a run in its dump folder. No folder of the run may have one of these names."""


def validates(config: JobConfig, device_type: str) -> bool:
    return config.validation.enable


def on_cpu(config: JobConfig, device_type: str) -> bool:
    return device_type == "cpu"


def on_gpu(config: JobConfig, device_type: str) -> bool:
    return device_type == "cuda"


def is_profiled(config: JobConfig, device_type: str) -> bool:
    return config.profiling.enable_profiling


def compiles_model(config: JobConfig) -> bool:
    return config.compile.enable and "model" in config.compile.components


def total_steps(config: JobConfig) -> int:
    """Number of steps of the learning rate schedule."""
    steps = config.lr_scheduler.total_steps
    return config.training.steps if steps is None else steps


def of_loading(section: str) -> list[Rule]:
    """Rules of `training.dataloader` or `validation.dataloader`."""
    name = f"{section}.dataloader.prefetch_factor"

    def prefetches(config: JobConfig, device_type: str) -> bool:
        is_used = section == "training" or config.validation.enable
        return is_used and value_of(config, name) is not None

    def has_workers(value: Any, config: JobConfig) -> bool:
        return value_of(config, f"{section}.dataloader.num_workers") > 0

    remedy = f"set {section}.dataloader.num_workers to 1"
    return [
        at_least(name, 1, applies=prefetches),
        Rule(name, has_workers, "left out without workers", remedy, applies=prefetches),
    ]


def share(field: str, remedy: str) -> Rule:
    """A rule that the value is from 0 to 1, or not set."""
    return Rule(field, lambda x, _: x is None or 0 <= x <= 1, "from 0 to 1", remedy)


TRAINING_RULES = [
    Rule(
        "job.custom_config_module",
        lambda x, _: not x,
        "empty, because this package has its own configuration",
        "remove it",
    ),
    one_of("model.name", [MODEL_NAME]),
    # Evaluated late, because a program may add its own flavors.
    one_of("model.flavor", lambda: list(FLAVORS)),
    at_least("training.steps", 1),
    at_least("training.local_batch_size", 1),
    at_least("training.seq_len", 1),
    Rule(
        "training.local_batch_size",
        lambda x, config: x * config.training.seq_len < MOST_TOKENS,
        lambda config: f"less than {MOST_TOKENS // config.training.seq_len} at this seq_len",
        "lower it; training.global_batch_size may be larger",
        applies=lambda config, _: config.training.seq_len < MOST_TOKENS,
    ),
    at_least("training.loss_chunk_size", 0),
    at_least("training.max_skipped_steps", 0),
    Rule(
        "training.mixed_precision_param",
        lambda x, config: x != "float32" or config.training.seq_len <= LONGEST_EFFICIENT,
        f"bfloat16 on a GPU beyond {LONGEST_EFFICIENT} tokens, where no fused attention is "
        "correct in fp32",
        "set it to bfloat16",
        applies=on_gpu,
    ),
    Rule(
        "training.max_norm",
        lambda x, _: x > 0,
        "above 0",
        "1.0 is common, inf turns clipping off",
    ),
    at_least("training.gc_freq", 1),
    at_least("metrics.log_freq", 1),
    Rule(
        "debug.seed",
        lambda x, _: x is None or 0 <= x < 2**64,
        "from 0 to 2**64 - 1",
        "use such a number, or leave it out for a random one",
    ),
    *of_loading("training"),
    *of_loading("validation"),
    at_least("validation.steps", 1, applies=validates),
    at_least("validation.freq", 1, applies=validates),
    at_least("validation.local_batch_size", 1, applies=validates),
    Rule(
        "validation.seq_len",
        lambda x, config: 1 <= x <= config.training.seq_len,
        lambda config: f"from 1 to training.seq_len, {config.training.seq_len}",
        "lower it",
        applies=validates,
    ),
]
"""Rules for the model, training and validation."""

OPTIMIZER_RULES = [
    one_of("optimizer.name", ["Adam", "AdamW"]),
    *(
        Rule(
            field,
            lambda x, _: 0 < x <= LARGEST_FACTOR,
            f"a finite number above 0 and at most {LARGEST_FACTOR:g}",
            f"{common} is common",
        )
        for field, common in (("optimizer.lr", "1e-3"), ("optimizer.eps", "1e-8"))
    ),
    *(
        Rule(
            field, lambda x, _: 0 <= x < 1, "at least 0 and less than 1", "0.9 and 0.95 are common"
        )
        for field in ("optimizer.beta1", "optimizer.beta2")
    ),
    Rule(
        "optimizer.weight_decay",
        lambda x, _: 0 <= x <= LARGEST_FACTOR,
        f"a finite number of at least 0 and at most {LARGEST_FACTOR:g}",
        "0.1 is common",
    ),
    unset(
        "optimizer.early_step_in_backward",
        "",
        "remove it: gradients would neither be clipped nor accumulated",
    ),
    at_least("lr_scheduler.warmup_steps", 0),
    Rule(
        # Past the end of the schedule, the rate would be negative or the program would stop.
        "lr_scheduler.total_steps",
        lambda x, config: x is None or x >= config.training.steps,
        lambda config: f"at least training.steps, {config.training.steps}",
        "raise it or leave it out",
    ),
    Rule(
        # The default suits long runs. torchtitan shortens it and logs this.
        "lr_scheduler.warmup_steps",
        lambda x, config: x <= max(total_steps(config), LRScheduler.warmup_steps),
        lambda config: f"at most the {total_steps(config)} steps of the schedule",
        "lower it, or set lr_scheduler.total_steps to those of the whole schedule",
    ),
    share("lr_scheduler.decay_ratio", "give the decay as a share of all steps"),
    share("lr_scheduler.min_lr_factor", "give the last learning rate as a share of optimizer.lr"),
]
"""Rules for the optimizer and its schedule."""


def compile_backends() -> list[str]:
    # Imported here because the import is slow.
    from torch._dynamo import list_backends

    return list_backends(None)


COMPUTING_RULES = [
    one_of("compile.components", ["model", "loss"]),
    one_of(
        "compile.backend",
        compile_backends,
        applies=lambda config, _: config.compile.enable and config.compile.backend != "inductor",
    ),
    Rule(
        "activation_checkpoint.selective_ac_option",
        lambda x, _: x == "op" or (x.isdecimal() and int(x) > 0),
        "'op' or a number of at least 1",
        "use 2 for every second layer",
    ),
    share("activation_checkpoint.memory_budget", "0.5 is the default"),
    Rule(
        "activation_checkpoint.mode",
        lambda x, config: x != "memory_budget" or compiles_model(config),
        "selective, full or none unless the model is compiled",
        "set compile.enable to true, with 'model' in compile.components",
    ),
    one_of("activation_checkpoint.determinism_check", ["default", "none"]),
    unset(
        "parallelism.enable_async_tensor_parallel",
        " unless the model is compiled",
        "set compile.enable to true, with 'model' in compile.components",
        applies=lambda config, _: not compiles_model(config),
    ),
    one_of("model.converters", ["quantize.linear.float8", "quantize.linear.mx"]),
    Rule(
        "model.converters",
        lambda x, config: (
            x.endswith("float8")
            and config.quantize.linear.float8.emulate
            and not compiles_model(config)
        ),
        "left out on a CPU, which does not support it",
        "remove it",
        applies=on_cpu,
    ),
    Rule(
        "model.converters",
        lambda x, _: importlib.util.find_spec("torchao") is not None,
        "left out without the package torchao",
        "pip install torchao, or remove it",
    ),
]
"""Rules for compilation, activation checkpointing and converters."""


def is_inside(path: str | None, config: JobConfig) -> bool:
    """Whether a relative path stays inside the folder that it is appended to."""
    # An absolute path has an empty string before the first separator.
    return path is None or (
        path != "" and os.path.normpath(path).split(os.sep)[0] not in ("", ".", "..")
    )


def profiled_steps(config: JobConfig) -> int:
    return config.profiling.profiler_active + config.profiling.profiler_warmup


INSIDE_FIELDS = (
    *("checkpoint.folder", "comm.save_traces_folder", "job.save_config_file"),
    *("metrics.save_tb_folder", "profiling.save_memory_snapshot_folder"),
    "profiling.save_traces_folder",
)
"""Paths that torchtitan appends to job.dump_folder."""

OUTPUT_RULES = [
    Rule(
        "job.dump_folder",
        lambda x, _: x != "",
        "the name of a folder",
        "name one, or leave it out for ./outputs",
    ),
    *(
        Rule(
            field, is_inside, "a path inside job.dump_folder", "name one without a leading / or .."
        )
        for field in INSIDE_FIELDS
    ),
    *(
        Rule(
            field,
            lambda x, _: x is None or os.path.normpath(x).split(os.sep)[0] not in RUN_FILES,
            f"another name than {', '.join(RUN_FILES)}, which are files of the run",
            "name another folder",
        )
        for field in INSIDE_FIELDS
        if field != "job.save_config_file"
    ),
    at_least(
        "profiling.profile_freq",
        1,
        applies=lambda config, _: (
            config.profiling.enable_profiling or config.profiling.enable_memory_snapshot
        ),
    ),
    at_least("profiling.profiler_active", 1, applies=is_profiled),
    at_least("profiling.profiler_warmup", 0, applies=is_profiled),
    Rule(
        "profiling.profile_freq",
        lambda x, config: x >= profiled_steps(config),
        lambda config: f"at least {profiled_steps(config)}",
        lambda _, config: f"use {profiled_steps(config)} or more",
        applies=is_profiled,
    ),
    *(
        unset(field, " on a CPU, where torchtitan's profiler fails", applies=on_cpu)
        for field in ("profiling.enable_profiling", "profiling.enable_memory_snapshot")
    ),
    Rule(
        "checkpoint.async_mode",
        lambda x, config: not config.checkpoint.enable or x != "async_with_pinned_mem",
        "disabled or async on a CPU, which has no pinned memory",
        "use async",
        applies=on_cpu,
    ),
    unset(
        "checkpoint.initial_load_in_hf_quantized",
        " for a checkpoint in another format than Hugging Face's",
        "remove it, or set checkpoint.initial_load_in_hf to true",
        applies=lambda config, _: not config.checkpoint.initial_load_in_hf,
    ),
    unset(
        "training.gc_debug",
        " on a CPU, because it looks for cycles of tensors on a GPU",
        applies=on_cpu,
    ),
    at_least("comm.init_timeout_seconds", 1),
    at_least("comm.train_timeout_seconds", 1),
    at_least("comm.trace_buf_size", 0),
    one_of("comm.mode", ["default", "fake_backend"]),
    # torchtitan switches that other torchtitan programs use. They would be ignored here.
    unset("fault_tolerance.enable", ", because it has no effect"),
    unset(
        "memory_estimation.enable",
        ", because it has no effect",
        "lighthouse plan predicts what a run needs",
    ),
]
"""Rules for output folders, profiling, checkpoints and communication."""


class _Digits(int):
    """An integer with a short repr. Python refuses to print thousands of digits."""

    def __repr__(self) -> str:
        return f"{'-' * (self < 0)}2**{self.bit_length() - 1} or more"


def check_numbers(config: JobConfig) -> None:
    """Reject NaN and integers beyond 64 bits, so that the other rules can compare."""
    for name, _ in leaves(JobConfig):
        value = value_of(config, name)
        if isinstance(value, float):
            require(not math.isnan(value), name, "a number", value, "write one")
        elif isinstance(value, int) and name != "debug.seed":
            require(
                -(2**63) <= value < 2**63,
                name,
                "a number of 64 bits",
                _Digits(value),
                "write a smaller one",
            )
