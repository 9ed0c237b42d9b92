"""Rules of the values of fields: model, training, optimizer, computing, outputs."""

import importlib.util
import math
import os

from torchtitan.config import LRScheduler
from torchtitan.experiments.lighthouse.config.job_config import JobConfig
from torchtitan.experiments.lighthouse.config.load import NO_CUSTOM_CONFIG
from torchtitan.experiments.lighthouse.config.rule_helpers import (
    check_at_least,
    check_choice,
    leaves,
    require,
    value_of,
)
from torchtitan.experiments.lighthouse.flavors import FLAVORS, MODEL_NAME
from torchtitan.experiments.lighthouse.runtime.command_line import check_output_folder

from lighthouse.sdpa import LONGEST_EFFICIENT

IN_THE_RUN = (
    "checkpoint.folder",
    "comm.save_traces_folder",
    "job.save_config_file",
    "metrics.save_tb_folder",
    "profiling.save_memory_snapshot_folder",
    "profiling.save_traces_folder",
)
"""Paths that torchtitan appends to job.dump_folder."""


NOT_OURS = (
    "fault_tolerance.enable",
    "memory_estimation.enable",
)
"""Switches of torchtitan for programs of its own: here they would be passed over."""


class _Digits(int):
    """Written in short: Python refuses to write thousands of digits."""

    def __repr__(self) -> str:
        return f"{'-' * (self < 0)}2**{self.bit_length() - 1} or more"


def check_numbers(config: JobConfig) -> None:
    """No rule below has to think of what is no number, or of one beyond 64 bits."""
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


def check_model(config: JobConfig) -> None:
    if config.job.custom_config_module:
        raise ValueError(NO_CUSTOM_CONFIG.format(repr(config.job.custom_config_module)))
    check_choice("model.name", config.model.name, [MODEL_NAME])
    check_choice("model.flavor", config.model.flavor, list(FLAVORS))


def check_training(config: JobConfig, device_type: str) -> None:
    training, validation = config.training, config.validation
    check_at_least("training.steps", training.steps, 1)
    check_at_least("training.local_batch_size", training.local_batch_size, 1)
    check_at_least("training.seq_len", training.seq_len, 1)
    check_at_least("training.loss_chunk_size", training.loss_chunk_size, 0)
    on_gpu = device_type == "cuda"
    if (
        on_gpu
        and training.mixed_precision_param == "float32"
        and training.seq_len > LONGEST_EFFICIENT
    ):
        raise ValueError(
            "training.mixed_precision_param must be bfloat16 on a GPU beyond "
            f"{LONGEST_EFFICIENT} tokens, got 'float32', for which no fused attention is right at "
            "that length; set it to bfloat16"
        )
    require(
        training.max_norm > 0,
        "training.max_norm",
        "above 0",
        training.max_norm,
        "1.0 is common, inf clips nothing",
    )
    check_at_least("training.gc_freq", training.gc_freq, 1)
    check_at_least("metrics.log_freq", config.metrics.log_freq, 1)
    seed = config.debug.seed
    require(
        seed is None or 0 <= seed < 2**64,
        "debug.seed",
        "from 0 to 2**64 - 1",
        seed,
        "use such a number, or leave it out for a random one",
    )
    for section in ["training"] + ["validation"] * validation.enable:
        loading = getattr(config, section).dataloader
        if loading.prefetch_factor is not None:
            name = f"{section}.dataloader.prefetch_factor"
            check_at_least(name, loading.prefetch_factor, 1)
            require(
                loading.num_workers > 0,
                name,
                "left out without workers",
                loading.prefetch_factor,
                f"set {section}.dataloader.num_workers to 1",
            )
    if validation.enable:
        check_at_least("validation.steps", validation.steps, 1)
        check_at_least("validation.freq", validation.freq, 1)
        check_at_least("validation.local_batch_size", validation.local_batch_size, 1)
        if not 1 <= validation.seq_len <= training.seq_len:
            raise ValueError(
                f"validation.seq_len must be from 1 to training.seq_len, {training.seq_len}, got "
                f"{validation.seq_len}; lower it"
            )


def check_optimizer(config: JobConfig) -> None:
    optimizer, scheduler = config.optimizer, config.lr_scheduler
    check_choice("optimizer.name", optimizer.name, ["Adam", "AdamW"])
    for name, value in (("lr", optimizer.lr), ("eps", optimizer.eps)):
        example = "1e-3" if name == "lr" else "1e-8"
        require(
            0 < value < math.inf,
            f"optimizer.{name}",
            "a finite number above 0",
            value,
            f"{example} is common",
        )
    for name in ("beta1", "beta2"):
        value = getattr(optimizer, name)
        require(
            0 <= value < 1,
            f"optimizer.{name}",
            "at least 0 and less than 1",
            value,
            "0.9 and 0.95 are common",
        )
    require(
        0 <= optimizer.weight_decay < math.inf,
        "optimizer.weight_decay",
        "a finite number of at least 0",
        optimizer.weight_decay,
        "0.1 is common",
    )
    require(
        not optimizer.early_step_in_backward,
        "optimizer.early_step_in_backward",
        "false",
        "true",
        "remove it: gradients would neither be clipped nor accumulated",
    )
    check_at_least("lr_scheduler.warmup_steps", scheduler.warmup_steps, 0)
    steps = config.training.steps
    total_steps = steps if scheduler.total_steps is None else scheduler.total_steps
    require(
        # Behind its end the rate would be negative, or the program end.
        total_steps >= steps,
        "lr_scheduler.total_steps",
        f"at least training.steps, {steps}",
        total_steps,
        "raise it or leave it out",
    )
    require(
        # The default is one for long runs; torchtitan says how it shortens it.
        scheduler.warmup_steps <= max(total_steps, LRScheduler.warmup_steps),
        "lr_scheduler.warmup_steps",
        f"at most the {total_steps} steps of the schedule",
        scheduler.warmup_steps,
        "lower it, or set lr_scheduler.total_steps to those of the whole schedule",
    )
    ratio, factor = scheduler.decay_ratio, scheduler.min_lr_factor
    require(
        ratio is None or 0 <= ratio <= 1,
        "lr_scheduler.decay_ratio",
        "from 0 to 1",
        ratio,
        "give the decay as a part of all steps",
    )
    require(
        0 <= factor <= 1,
        "lr_scheduler.min_lr_factor",
        "from 0 to 1",
        factor,
        "give the last learning rate as a part of optimizer.lr",
    )


def check_computing(config: JobConfig, device_type: str) -> None:
    """Compilation, activation checkpointing, converters."""
    compiling, checkpointing = config.compile, config.activation_checkpoint
    for name in compiling.components:
        check_choice("compile.components", name, ["model", "loss"])
    compiles_model = compiling.enable and "model" in compiling.components
    if compiling.enable and compiling.backend != "inductor":
        # Imported here, for it takes a while.
        from torch._dynamo import list_backends

        check_choice("compile.backend", compiling.backend, list_backends(None))
    option = checkpointing.selective_ac_option
    require(
        option == "op" or (option.isdecimal() and int(option) > 0),
        "activation_checkpoint.selective_ac_option",
        "'op' or a number of at least 1",
        option,
        "use 2 for every second layer",
    )
    require(
        0 <= checkpointing.memory_budget <= 1,
        "activation_checkpoint.memory_budget",
        "from 0 to 1",
        checkpointing.memory_budget,
        "0.5 is the default",
    )
    require(
        checkpointing.mode != "memory_budget" or compiles_model,
        "activation_checkpoint.mode",
        "selective, full or none unless the model is compiled",
        checkpointing.mode,
        "set compile.enable to true, with 'model' in compile.components",
    )
    checks = ["default", "none"]
    check_choice("activation_checkpoint.determinism_check", checkpointing.determinism_check, checks)
    require(
        compiles_model or not config.parallelism.enable_async_tensor_parallel,
        "parallelism.enable_async_tensor_parallel",
        "false unless the model is compiled",
        "true",
        "set compile.enable to true, with 'model' in compile.components",
    )
    for name in config.model.converters:
        check_choice("model.converters", name, ["quantize.linear.float8", "quantize.linear.mx"])
        is_emulated = name.endswith("float8") and config.quantize.linear.float8.emulate
        require(
            device_type != "cpu" or (is_emulated and not compiles_model),
            "model.converters",
            "left out on a CPU, which has no such arithmetic",
            name,
            "remove it",
        )
        require(
            importlib.util.find_spec("torchao") is not None,
            "model.converters",
            "left out without the package torchao",
            name,
            "pip install torchao, or remove it",
        )


def check_surroundings(config: JobConfig, device_type: str, is_start: bool) -> None:
    """Where a run writes, what it records beside its metrics, and how its processes talk."""
    job, comm, profiling = config.job, config.comm, config.profiling
    require(
        job.dump_folder != "",
        "job.dump_folder",
        "the name of a folder",
        job.dump_folder,
        "name one, or leave it out for ./outputs",
    )
    for name in IN_THE_RUN:
        path = value_of(config, name)
        if path is not None:
            top = os.path.normpath(path).split(os.sep)[0]
            require(
                # Of an absolute path nothing is before the first separator.
                path != "" and top not in ("", ".", ".."),
                name,
                "a path inside job.dump_folder",
                path,
                "name one without a leading / or ..",
            )
    if is_start:
        check_output_folder("job.dump_folder", job.dump_folder)
    if profiling.enable_profiling or profiling.enable_memory_snapshot:
        check_at_least("profiling.profile_freq", profiling.profile_freq, 1)
    if profiling.enable_profiling:
        check_at_least("profiling.profiler_active", profiling.profiler_active, 1)
        check_at_least("profiling.profiler_warmup", profiling.profiler_warmup, 0)
        check_at_least(
            "profiling.profile_freq",
            profiling.profile_freq,
            profiling.profiler_active + profiling.profiler_warmup,
        )
    for name in ("enable_profiling", "enable_memory_snapshot"):
        require(
            device_type != "cpu" or not getattr(profiling, name),
            f"profiling.{name}",
            "false on a CPU, where torchtitan's profiler ends",
            "true",
            "remove it",
        )
    checkpoint = config.checkpoint
    require(
        not checkpoint.enable
        or device_type != "cpu"
        or checkpoint.async_mode != "async_with_pinned_mem",
        "checkpoint.async_mode",
        "disabled or async on a CPU, which pins no memory",
        checkpoint.async_mode,
        "use async",
    )
    require(
        checkpoint.initial_load_in_hf or not checkpoint.initial_load_in_hf_quantized,
        "checkpoint.initial_load_in_hf_quantized",
        "false for a checkpoint in another format than Hugging Face's",
        "true",
        "remove it, or set checkpoint.initial_load_in_hf to true",
    )
    require(
        device_type != "cpu" or not config.training.gc_debug,
        "training.gc_debug",
        "false on a CPU, since it looks for cycles of tensors on a GPU",
        "true",
        "remove it",
    )
    for name in ("init_timeout_seconds", "train_timeout_seconds"):
        check_at_least(f"comm.{name}", getattr(comm, name), 1)
    check_at_least("comm.trace_buf_size", comm.trace_buf_size, 0)
    check_choice("comm.mode", comm.mode, ["default", "fake_backend"])
    if is_start and comm.mode == "fake_backend":
        require(
            os.environ.get("NGPU", "").isdecimal(),
            "comm.mode",
            "default unless NGPU is the number of processes to play",
            comm.mode,
            "set the variable NGPU",
        )
    for name in NOT_OURS:
        remedy = "scripts/plan.py says what a run needs" if "memory" in name else "remove it"
        require(not value_of(config, name), name, "false, for it has no effect", "true", remedy)
    module = config.experimental.custom_import
    if is_start and module:
        try:
            is_there = importlib.util.find_spec(module) is not None
        except (ImportError, ValueError):
            is_there = False
        require(
            is_there,
            "experimental.custom_import",
            "a module that can be imported",
            module,
            "correct the name, or set PYTHONPATH",
        )
