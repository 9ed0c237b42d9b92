"""Every rule of a configuration, checked before process groups, data or compilation.

Each breach is one `ValueError` of one line: the field, the rule, the value, and what to do.
`load_config` checks names and types, `check_config` values and how they go together.
"""

import contextlib
import difflib
import importlib.util
import io
import math
import os
import re
import shutil
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import tomli
import torch
from torchtitan.config import TORCH_DTYPE_MAP, ConfigManager, LRScheduler
from torchtitan.experiments.lighthouse import FLAVORS, MODEL_NAME, hugging_face
from torchtitan.experiments.lighthouse.checkpoint_files import (
    check_folder,
    check_safe,
    corpus_fingerprint,
    data_parallel_degree,
    fault,
    holds_training_state,
    is_whole,
    prepared_position,
    whole_steps,
)
from torchtitan.experiments.lighthouse.command_line import check_output_folder, open_tokenizer
from torchtitan.experiments.lighthouse.corpora import DATASETS, fingerprint
from torchtitan.experiments.lighthouse.data import check_data
from torchtitan.experiments.lighthouse.job_config import JobConfig
from torchtitan.experiments.lighthouse.metrics import FILE_NAME as METRICS
from torchtitan.experiments.lighthouse.metrics import LOSS, read_metrics
from torchtitan.experiments.lighthouse.prepared import PreparedDataset, check_prepared
from torchtitan.experiments.lighthouse.provenance import FIELDS, check_checkpoint
from torchtitan.models.llama3 import Transformer
from torchtitan.tools import utils

from lighthouse import LighthouseConfig
from lighthouse.config import SELECTED_PER_STRATUM, nearest_multiple
from lighthouse.context_parallel import CHUNKS_PER_RANK
from lighthouse.sdpa import LONGEST_EFFICIENT

TRAINING_STATE = {"optimizer", "lr_scheduler", "dataloader", "train_state"}
"""What a checkpoint holds beside the model, by torchtitan's names."""

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

_NO_CUSTOM_CONFIG = (
    "job.custom_config_module must be empty, since the configuration is this package's own, "
    "got {}; remove it"
)


def load_config(args: list[str]) -> JobConfig:
    """The configuration of a command line, with the TOML file it names.

    Raises:
        ValueError: a file, a section, a field or a type that is wrong.
        SystemExit: after `--help`.
    """
    _check_flags(args)
    path = _flag_value(args, "--job.config_file")
    if path is not None:
        _check_toml(path)
    manager = ConfigManager(JobConfig)
    if {"-h", "--help"} & set(args):
        return manager.parse_args(args)
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message), contextlib.redirect_stdout(message):
            return manager.parse_args(args)
    except ImportError as error:
        raise ValueError(_NO_CUSTOM_CONFIG.format(error)) from None
    except Exception as error:
        # torchtitan's own rule for old tokenizers has no type of its own.
        if type(error) is not Exception:
            raise
        raise ValueError(
            "model.hf_assets_path must be a folder with tokenizer.json, got the file of an old "
            "tokenizer.model; name the folder of the new one"
        ) from None
    except SystemExit:
        # The parser draws a box around what it has to say, and lines inside it.
        words = " ".join(re.sub(r"[^\x20-\x7e]+", " ", message.getvalue()).split())
        _, *parts = re.split(r" ?-{10,} ?", words)
        raise ValueError(f"command line: {parts[0] if parts else words}; see --help") from None


def check_config(
    config: JobConfig, world_size: int, device_type: str | None = None, is_start: bool = True
) -> None:
    """Check the values of a configuration for a run of `world_size` processes.

    Args:
        device_type: what the run is for, `cuda` or `cpu`; what is here by default.
        is_start: whether it is to start now, with the outputs, checkpoints, tokenizer and data that
            are there.

    Raises:
        ValueError: the first rule that is broken.
    """
    device_type = device_type or utils.device_type
    _check_numbers(config)
    _check_model(config)
    _check_training(config, device_type)
    _check_optimizer(config)
    _check_parallelism(config, world_size)
    _check_computing(config, device_type)
    _check_surroundings(config, device_type, is_start)
    _check_lighthouse(config)
    _check_context_parallel(config, device_type)
    if is_start or Path(config.model.hf_assets_path).exists():
        _check_tokenizer(config)
    check_data(config, must_exist=is_start)
    _check_prepared(config, must_exist=is_start)
    _check_checkpoint(config, world_size, is_start)


def _check_model(config: JobConfig) -> None:
    if config.job.custom_config_module:
        raise ValueError(_NO_CUSTOM_CONFIG.format(repr(config.job.custom_config_module)))
    _check_choice("model.name", config.model.name, [MODEL_NAME])
    _check_choice("model.flavor", config.model.flavor, list(FLAVORS))


def _check_training(config: JobConfig, device_type: str) -> None:
    training, validation = config.training, config.validation
    _check_at_least("training.steps", training.steps, 1)
    _check_at_least("training.local_batch_size", training.local_batch_size, 1)
    _check_at_least("training.seq_len", training.seq_len, 1)
    _check_at_least("training.loss_chunk_size", training.loss_chunk_size, 0)
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
    _require(
        training.max_norm > 0,
        "training.max_norm",
        "above 0",
        training.max_norm,
        "1.0 is common, inf clips nothing",
    )
    _check_at_least("training.gc_freq", training.gc_freq, 1)
    _check_at_least("metrics.log_freq", config.metrics.log_freq, 1)
    seed = config.debug.seed
    _require(
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
            _check_at_least(name, loading.prefetch_factor, 1)
            _require(
                loading.num_workers > 0,
                name,
                "left out without workers",
                loading.prefetch_factor,
                f"set {section}.dataloader.num_workers to 1",
            )
    if validation.enable:
        _check_at_least("validation.steps", validation.steps, 1)
        _check_at_least("validation.freq", validation.freq, 1)
        _check_at_least("validation.local_batch_size", validation.local_batch_size, 1)
        if not 1 <= validation.seq_len <= training.seq_len:
            raise ValueError(
                f"validation.seq_len must be from 1 to training.seq_len, {training.seq_len}, got "
                f"{validation.seq_len}; lower it"
            )


def _check_optimizer(config: JobConfig) -> None:
    optimizer, scheduler = config.optimizer, config.lr_scheduler
    _check_choice("optimizer.name", optimizer.name, ["Adam", "AdamW"])
    for name, value in (("lr", optimizer.lr), ("eps", optimizer.eps)):
        example = "1e-3" if name == "lr" else "1e-8"
        _require(
            0 < value < math.inf,
            f"optimizer.{name}",
            "a finite number above 0",
            value,
            f"{example} is common",
        )
    for name in ("beta1", "beta2"):
        value = getattr(optimizer, name)
        _require(
            0 <= value < 1,
            f"optimizer.{name}",
            "at least 0 and less than 1",
            value,
            "0.9 and 0.95 are common",
        )
    _require(
        0 <= optimizer.weight_decay < math.inf,
        "optimizer.weight_decay",
        "a finite number of at least 0",
        optimizer.weight_decay,
        "0.1 is common",
    )
    _require(
        not optimizer.early_step_in_backward,
        "optimizer.early_step_in_backward",
        "false",
        "true",
        "remove it: gradients would neither be clipped nor accumulated",
    )
    _check_at_least("lr_scheduler.warmup_steps", scheduler.warmup_steps, 0)
    steps = config.training.steps
    total_steps = steps if scheduler.total_steps is None else scheduler.total_steps
    _require(
        # Behind its end the rate would be negative, or the program end.
        total_steps >= steps,
        "lr_scheduler.total_steps",
        f"at least training.steps, {steps}",
        total_steps,
        "raise it or leave it out",
    )
    _require(
        # The default is one for long runs; torchtitan says how it shortens it.
        scheduler.warmup_steps <= max(total_steps, LRScheduler.warmup_steps),
        "lr_scheduler.warmup_steps",
        f"at most the {total_steps} steps of the schedule",
        scheduler.warmup_steps,
        "lower it, or set lr_scheduler.total_steps to those of the whole schedule",
    )
    ratio, factor = scheduler.decay_ratio, scheduler.min_lr_factor
    _require(
        ratio is None or 0 <= ratio <= 1,
        "lr_scheduler.decay_ratio",
        "from 0 to 1",
        ratio,
        "give the decay as a part of all steps",
    )
    _require(
        0 <= factor <= 1,
        "lr_scheduler.min_lr_factor",
        "from 0 to 1",
        factor,
        "give the last learning rate as a part of optimizer.lr",
    )


def _check_computing(config: JobConfig, device_type: str) -> None:
    """Compilation, activation checkpointing, converters."""
    compiling, checkpointing = config.compile, config.activation_checkpoint
    for name in compiling.components:
        _check_choice("compile.components", name, ["model", "loss"])
    compiles_model = compiling.enable and "model" in compiling.components
    if compiling.enable and compiling.backend != "inductor":
        # Imported here, for it takes a while.
        from torch._dynamo import list_backends

        _check_choice("compile.backend", compiling.backend, list_backends(None))
    option = checkpointing.selective_ac_option
    _require(
        option == "op" or (option.isdecimal() and int(option) > 0),
        "activation_checkpoint.selective_ac_option",
        "'op' or a number of at least 1",
        option,
        "use 2 for every second layer",
    )
    _require(
        0 <= checkpointing.memory_budget <= 1,
        "activation_checkpoint.memory_budget",
        "from 0 to 1",
        checkpointing.memory_budget,
        "0.5 is the default",
    )
    _require(
        checkpointing.mode != "memory_budget" or compiles_model,
        "activation_checkpoint.mode",
        "selective, full or none unless the model is compiled",
        checkpointing.mode,
        "set compile.enable to true, with 'model' in compile.components",
    )
    checks = ["default", "none"]
    _check_choice(
        "activation_checkpoint.determinism_check", checkpointing.determinism_check, checks
    )
    _require(
        compiles_model or not config.parallelism.enable_async_tensor_parallel,
        "parallelism.enable_async_tensor_parallel",
        "false unless the model is compiled",
        "true",
        "set compile.enable to true, with 'model' in compile.components",
    )
    for name in config.model.converters:
        _check_choice("model.converters", name, ["quantize.linear.float8", "quantize.linear.mx"])
        is_emulated = name.endswith("float8") and config.quantize.linear.float8.emulate
        _require(
            device_type != "cpu" or (is_emulated and not compiles_model),
            "model.converters",
            "left out on a CPU, which has no such arithmetic",
            name,
            "remove it",
        )
        _require(
            importlib.util.find_spec("torchao") is not None,
            "model.converters",
            "left out without the package torchao",
            name,
            "pip install torchao, or remove it",
        )


def _check_surroundings(config: JobConfig, device_type: str, is_start: bool) -> None:
    """Where a run writes, what it records beside its metrics, and how its processes talk."""
    job, comm, profiling = config.job, config.comm, config.profiling
    _require(
        job.dump_folder != "",
        "job.dump_folder",
        "the name of a folder",
        job.dump_folder,
        "name one, or leave it out for ./outputs",
    )
    for name in IN_THE_RUN:
        path = _value_of(config, name)
        if path is not None:
            top = os.path.normpath(path).split(os.sep)[0]
            _require(
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
        _check_at_least("profiling.profile_freq", profiling.profile_freq, 1)
    if profiling.enable_profiling:
        _check_at_least("profiling.profiler_active", profiling.profiler_active, 1)
        _check_at_least("profiling.profiler_warmup", profiling.profiler_warmup, 0)
        _check_at_least(
            "profiling.profile_freq",
            profiling.profile_freq,
            profiling.profiler_active + profiling.profiler_warmup,
        )
    for name in ("enable_profiling", "enable_memory_snapshot"):
        _require(
            device_type != "cpu" or not getattr(profiling, name),
            f"profiling.{name}",
            "false on a CPU, where torchtitan's profiler ends",
            "true",
            "remove it",
        )
    checkpoint = config.checkpoint
    _require(
        not checkpoint.enable
        or device_type != "cpu"
        or checkpoint.async_mode != "async_with_pinned_mem",
        "checkpoint.async_mode",
        "disabled or async on a CPU, which pins no memory",
        checkpoint.async_mode,
        "use async",
    )
    _require(
        checkpoint.initial_load_in_hf or not checkpoint.initial_load_in_hf_quantized,
        "checkpoint.initial_load_in_hf_quantized",
        "false for a checkpoint in another format than Hugging Face's",
        "true",
        "remove it, or set checkpoint.initial_load_in_hf to true",
    )
    _require(
        device_type != "cpu" or not config.training.gc_debug,
        "training.gc_debug",
        "false on a CPU, since it looks for cycles of tensors on a GPU",
        "true",
        "remove it",
    )
    for name in ("init_timeout_seconds", "train_timeout_seconds"):
        _check_at_least(f"comm.{name}", getattr(comm, name), 1)
    _check_at_least("comm.trace_buf_size", comm.trace_buf_size, 0)
    _check_choice("comm.mode", comm.mode, ["default", "fake_backend"])
    if is_start and comm.mode == "fake_backend":
        _require(
            os.environ.get("NGPU", "").isdecimal(),
            "comm.mode",
            "default unless NGPU is the number of processes to play",
            comm.mode,
            "set the variable NGPU",
        )
    for name in NOT_OURS:
        remedy = "scripts/plan.py says what a run needs" if "memory" in name else "remove it"
        _require(not _value_of(config, name), name, "false, for it has no effect", "true", remedy)
    module = config.experimental.custom_import
    if is_start and module:
        try:
            is_there = importlib.util.find_spec(module) is not None
        except (ImportError, ValueError):
            is_there = False
        _require(
            is_there,
            "experimental.custom_import",
            "a module that can be imported",
            module,
            "correct the name, or set PYTHONPATH",
        )


def _check_parallelism(config: JobConfig, world_size: int) -> None:
    parallelism = config.parallelism
    _check_at_least("the number of processes", world_size, 1)
    for name in ("expert_parallel_degree", "expert_tensor_parallel_degree"):
        degree = getattr(parallelism, name)
        _require(
            degree == 1,
            f"parallelism.{name}",
            "1, since no flavor has experts",
            degree,
            "remove it",
        )
    _check_at_least("parallelism.context_parallel_degree", parallelism.context_parallel_degree, 1)
    if parallelism.pipeline_parallel_degree != 1:
        raise ValueError(
            "parallelism.pipeline_parallel_degree must be 1, since the stage switch works on whole "
            f"models, got {parallelism.pipeline_parallel_degree}; use data, context or tensor "
            "parallelism"
        )
    tensor_parallel = parallelism.tensor_parallel_degree
    _check_at_least("parallelism.tensor_parallel_degree", tensor_parallel, 1)
    n_kv_heads = _num_kv_heads(config)
    if n_kv_heads % tensor_parallel:
        raise ValueError(
            f"parallelism.tensor_parallel_degree must divide the {n_kv_heads} key/value heads of "
            f"{config.model.flavor}, got {tensor_parallel}; use {_divisors(n_kv_heads)}"
        )
    loss_chunk_size = config.training.loss_chunk_size
    if loss_chunk_size and tensor_parallel > 1:
        raise ValueError(
            "training.loss_chunk_size must be 0 with tensor parallelism, which shards the head by "
            f"vocabulary, got {loss_chunk_size}; set it to 0, or "
            "parallelism.tensor_parallel_degree to 1"
        )
    replicate = parallelism.data_parallel_replicate_degree
    _check_at_least("parallelism.data_parallel_replicate_degree", replicate, 1)
    others = replicate * parallelism.context_parallel_degree * tensor_parallel
    shard = parallelism.data_parallel_shard_degree
    if world_size % others or shard not in (-1, world_size // others):
        remedies = []
        if world_size % others == 0:
            remedies.append(f"set it to -1 or {world_size // others}")
        if shard >= 1:
            remedies.append(f"start {shard * others} processes")
        elif world_size % others:
            remedies.append(f"start a multiple of {others} processes")
        raise ValueError(
            "parallelism.data_parallel_shard_degree times the other degrees must be the number of "
            f"processes, got {shard} times {others} for {world_size}; {', or '.join(remedies)}"
        )
    num_shards = world_size // others * parallelism.context_parallel_degree
    _require(
        replicate == 1 or num_shards > 1 or tensor_parallel == 1,
        "parallelism.data_parallel_replicate_degree",
        "1 with tensor parallelism unless parameters are sharded, too",
        replicate,
        f"set it to 1, or start more than {world_size} processes",
    )
    _require(
        num_shards > 1 or not config.training.enable_cpu_offload,
        "training.enable_cpu_offload",
        "false where parameters are not sharded",
        "true",
        "remove it, or start more processes",
    )
    per_step = config.training.local_batch_size * replicate * (world_size // others)
    global_batch = config.training.global_batch_size
    if global_batch != -1 and (global_batch < 1 or global_batch % per_step):
        nearest = nearest_multiple(global_batch, per_step)
        raise ValueError(
            "training.global_batch_size must be a multiple of local_batch_size times the data "
            f"parallel degree, {per_step}, got {global_batch}; nearest: {nearest}, or -1"
        )


def _num_kv_heads(config: JobConfig) -> int:
    model = FLAVORS[config.model.flavor]
    return model.n_kv_heads or model.n_heads


def _divisors(number: int) -> str:
    return " or ".join(str(n) for n in range(1, number + 1) if number % n == 0)


def _check_lighthouse(config: JobConfig) -> None:
    lighthouse, steps = config.lighthouse, config.training.steps
    _check_at_least("lighthouse.telemetry_freq", lighthouse.telemetry_freq, 0)
    if not -1 <= lighthouse.stage1_steps <= steps:
        raise ValueError(
            f"lighthouse.stage1_steps must be from 0 to training.steps ({steps}), or -1 for no "
            f"switch, got {lighthouse.stage1_steps}; lower it or raise training.steps"
        )
    n_layers = FLAVORS[config.model.flavor].n_layers
    for layer in lighthouse.full_attn_layers:
        if not -n_layers <= layer < n_layers:
            raise ValueError(
                f"lighthouse.full_attn_layers must be from {-n_layers} to {n_layers - 1} for the "
                f"{n_layers} layers of {config.model.flavor}, got {layer}; remove it"
            )
    degree = config.parallelism.context_parallel_degree
    num_chunks = degree * CHUNKS_PER_RANK[lighthouse.context_parallel] if degree > 1 else 1
    # torchtitan asks for the factor of two, in training, whatever the scheme and the degrees.
    divisor = 2 * degree * config.parallelism.tensor_parallel_degree
    try:
        attention = lighthouse.attention_config()
    except ValueError as error:
        message = str(error)
        rule, is_near, nearest = message.partition("; nearest: ")
        if rule.startswith("topk") and is_near and lighthouse.stage1_steps != 0:
            # One that fits the length, too.
            other = LighthouseConfig(lighthouse.num_levels, lighthouse.pooling_factor, int(nearest))
            message = f"{rule}; nearest: {_fitting(other, config, num_chunks, divisor)}"
        raise ValueError(f"lighthouse.{message}") from None
    for section in ["training"] + ["validation"] * config.validation.enable:
        seq_len = getattr(config, section).seq_len
        is_cut = divisor > 2 or (section == "training" and lighthouse.stage1_steps == 0)
        if is_cut and seq_len % divisor:
            nearest = None
            if lighthouse.stage1_steps != 0:
                nearest = attention.nearest_seq_len(seq_len, num_chunks, divisor)
            raise ValueError(
                f"{section}.seq_len must be a multiple of twice the context and tensor parallel "
                f"degrees, {divisor}, got {seq_len}; nearest: "
                f"{nearest or nearest_multiple(seq_len, divisor)}"
            )
        if lighthouse.stage1_steps == 0:
            continue
        try:
            attention.check_seq_len(seq_len, num_chunks, divisor)
        except ValueError as error:
            owner = section if str(error).startswith("seq_len") else "lighthouse"
            raise ValueError(f"{owner}.{error}") from None


def _fitting(attention: LighthouseConfig, config: JobConfig, num_chunks: int, divisor: int) -> str:
    """The `topk` nearest to that of `attention` with what else it needs to be legal."""
    seq_len = config.training.seq_len
    if topk := attention.nearest_topk(seq_len, num_chunks):
        return str(topk)
    step = SELECTED_PER_STRATUM * num_chunks
    topk = nearest_multiple(attention.topk, step)
    seq_len = replace(attention, topk=topk).nearest_seq_len(seq_len, num_chunks, divisor)
    other = f"seq_len {seq_len}" if seq_len else "fewer levels or a smaller factor"
    return f"{topk} with {other}"


def _check_context_parallel(config: JobConfig, device_type: str) -> None:
    parallelism, lighthouse = config.parallelism, config.lighthouse
    degree, scheme = parallelism.context_parallel_degree, lighthouse.context_parallel
    _check_choice("lighthouse.context_parallel", scheme, list(CHUNKS_PER_RANK))
    _check_choice(
        "parallelism.context_parallel_rotate_method",
        parallelism.context_parallel_rotate_method,
        ["allgather", "alltoall"],
    )
    if parallelism.context_parallel_load_balancer != "headtail":
        raise ValueError(
            "parallelism.context_parallel_load_balancer must be 'headtail', since the layout "
            "follows from lighthouse.context_parallel, got "
            f"{parallelism.context_parallel_load_balancer!r}; leave it out"
        )
    if degree == 1:
        return
    if lighthouse.telemetry_freq:
        raise ValueError(
            "lighthouse.telemetry_freq must be 0 under context parallelism, where no rank has a "
            f"whole sequence, got {lighthouse.telemetry_freq}; set it to 0, or "
            "parallelism.context_parallel_degree to 1"
        )
    if lighthouse.scorer != "norm" and lighthouse.stage1_steps != 0:
        raise ValueError(
            "lighthouse.scorer must be norm under context parallelism, where each rank scores its "
            f"own tokens, got {lighthouse.scorer!r}; set it to norm, or "
            "parallelism.context_parallel_degree to 1"
        )
    if scheme == "ulysses":
        n_kv_heads = _num_kv_heads(config) // parallelism.tensor_parallel_degree
        if n_kv_heads % degree:
            raise ValueError(
                "parallelism.context_parallel_degree must divide the key/value heads of a rank, "
                f"{n_kv_heads}, with lighthouse.context_parallel = 'ulysses', got {degree}; use "
                f"{_divisors(n_kv_heads)}, or 'ring'"
            )
    elif device_type != "cpu" and config.training.mixed_precision_param == "float32":
        raise ValueError(
            "training.mixed_precision_param must be bfloat16 with lighthouse.context_parallel = "
            "'ring', whose kernels take no other type on a GPU, got 'float32'; set it to bfloat16, "
            "or use 'ulysses'"
        )


def _check_checkpoint(config: JobConfig, world_size: int, is_start: bool) -> None:
    checkpoint, lighthouse = config.checkpoint, config.lighthouse
    if not checkpoint.enable:
        if checkpoint.create_seed_checkpoint:
            raise ValueError(
                "checkpoint.enable must be true for checkpoint.create_seed_checkpoint, got false; "
                "set it to true"
            )
        return
    for in_hf, model_only in (
        ("last_save_in_hf", "last_save_model_only"),
        ("initial_load_in_hf", "initial_load_model_only"),
    ):
        if getattr(checkpoint, in_hf) and not getattr(checkpoint, model_only):
            raise ValueError(
                f"checkpoint.{in_hf} must go with checkpoint.{model_only} = true, since that "
                f"format holds the model alone, got false; set {model_only} to true"
            )
    _check_at_least("checkpoint.interval", checkpoint.interval, 1)
    if checkpoint.keep_latest_k < 0 or checkpoint.keep_latest_k == 1:
        raise ValueError(
            "checkpoint.keep_latest_k must be 0, for all, or at least 2, got "
            f"{checkpoint.keep_latest_k}; use 2 or more"
        )
    ends_in_stage_1 = lighthouse.stage_of(config.training.steps) == 1
    if ends_in_stage_1 and checkpoint.last_save_model_only:
        raise ValueError(
            "checkpoint.last_save_model_only must be false for a run that ends in stage 1, got "
            "true: the dense stage could not go on without the optimizer; set it to false"
        )
    for name in checkpoint.accept_changes:
        _check_choice("checkpoint.accept_changes", name, list(FIELDS))
    for name in checkpoint.exclude_from_loading:
        _check_choice("checkpoint.exclude_from_loading", name, sorted({*TRAINING_STATE, "model"}))
    lost = TRAINING_STATE & set(checkpoint.exclude_from_loading)
    if lost and 0 < lighthouse.stage1_steps < config.training.steps:
        raise ValueError(
            "checkpoint.exclude_from_loading must keep the training state in a run of two stages, "
            f"got {', '.join(sorted(lost))}; remove it"
        )
    if not is_start:
        return
    folder = Path(config.job.dump_folder) / checkpoint.folder
    check_folder(folder)
    if not folder.exists():
        _check_not_lost(config, folder)
    if checkpoint.load_step != -1 and not is_whole(folder / f"step-{checkpoint.load_step}"):
        raise ValueError(
            f"checkpoint.load_step must be -1 or the step of a whole checkpoint in {folder}, got "
            f"{checkpoint.load_step}; use -1 for the newest"
        )
    initial = checkpoint.initial_load_path
    if initial is None and checkpoint.initial_load_in_hf:
        initial = config.model.hf_assets_path
    parallelism = config.parallelism
    degree = world_size // (
        parallelism.context_parallel_degree * parallelism.tensor_parallel_degree
    )
    if folder.exists():
        whole = whole_steps(folder)
        newest = whole[-1]
        step = newest if checkpoint.load_step == -1 else checkpoint.load_step
        if step < newest:
            raise ValueError(
                f"checkpoint.load_step must be the newest in {folder}, {newest}, since what is "
                f"saved before that would be purged first, got {step}; move newer ones away, or "
                "start another job.dump_folder with checkpoint.initial_load_path"
            )
        # Of a seed checkpoint, step 0, the model alone is loaded.
        _check_load(config, folder / f"step-{step}", degree, step or None, model_only=not step)
        _check_space(config, folder, len(whole))
        return
    _check_space(config, folder, 0)
    if initial is None:
        return
    if not Path(initial).is_dir():
        raise ValueError(
            "checkpoint.initial_load_path must be the folder of a checkpoint, step number "
            f"included, got {initial!r}, which is none; correct the path"
        )
    if checkpoint.initial_load_in_hf:
        flavor = config.model.flavor
        hugging_face.check_flavor(initial, FLAVORS[flavor], flavor)
        return
    if torn := fault(initial):
        raise ValueError(
            f"checkpoint.initial_load_path must hold a whole checkpoint, got {initial!r}: {torn}; "
            "name an older one"
        )
    _check_load(config, Path(initial), degree, None, checkpoint.initial_load_model_only)


def _check_not_lost(config: JobConfig, folder: Path) -> None:
    """Where metrics tell of steps after the first that is saved, there were checkpoints."""
    checkpoint, dump_folder = config.checkpoint, Path(config.job.dump_folder)
    if not (dump_folder / METRICS).exists():
        return
    steps = [line["step"] for line in read_metrics(dump_folder, LOSS)]
    saved = [checkpoint.interval]
    saved += [1] * checkpoint.enable_first_step_checkpoint
    saved += [config.lighthouse.stage1_steps] * (config.lighthouse.stage1_steps > 0)
    if steps and steps[-1] > min(saved):
        raise ValueError(
            f"checkpoint.folder must be there where a run has been, got no {str(folder)!r} beside "
            f"{METRICS} up to step {steps[-1]}; put it back, name another job.dump_folder, or move "
            f"{METRICS} away to start from step 0"
        )


def _check_space(config: JobConfig, folder: Path, num_whole: int) -> None:
    """There must be room for the checkpoints that will be there at a time, beside those that are.

    Args:
        num_whole: checkpoints in `folder` that are whole.
    """
    checkpoint, training = config.checkpoint, config.training
    with torch.device("meta"):
        model = Transformer(FLAVORS[config.model.flavor])
    # Two moments for each parameter.
    elements = 3 * sum(parameter.numel() for parameter in model.parameters())
    size = elements * TORCH_DTYPE_MAP[training.dtype].itemsize
    has_switch = 0 < config.lighthouse.stage1_steps < training.steps
    saves = -(-training.steps // checkpoint.interval) + has_switch
    if checkpoint.keep_latest_k:
        # A new one is whole before an old one goes.
        saves = min(saves, checkpoint.keep_latest_k + 1 + has_switch)
    needed = max(1, saves - num_whole) * size
    there = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise ValueError(
            f"job.dump_folder must have room for {needed / size:.0f} more checkpoints of "
            f"{size / 1e9:,.2f} GB, got {free / 1e9:,.2f} GB free in {there}; free some, lower "
            "checkpoint.keep_latest_k, or name a folder elsewhere"
        )


def _check_load(
    config: JobConfig, path: Path, degree: int, step: int | None, model_only: bool
) -> None:
    """The whole checkpoint `path` must be one to go on from, with `degree` data-parallel ranks.

    Args:
        step: of the checkpoint, where it is the run's own; None for one of another run.
        model_only: whether the parameters alone are loaded.
    """
    check_safe(path)
    if not model_only and not holds_training_state(path):
        raise ValueError(
            f"the checkpoint {str(path)!r} must hold the state of training to go on from it, got "
            "the model alone; move it away, and an older one is used, or start another "
            "job.dump_folder from it with checkpoint.initial_load_path and initial_load_model_only"
        )
    check_checkpoint(path, config, degree, step, model_only)
    if not model_only:
        _check_data_position(config, path, degree)


def _check_data_position(config: JobConfig, path: Path, degree: int) -> None:
    """A checkpoint holds the one position of all ranks in prepared data, for any number of them;
    otherwise the data position of each data-parallel rank, for as many ranks alone."""
    if "dataloader" in config.checkpoint.exclude_from_loading:
        return
    training = config.training
    saved, position = data_parallel_degree(path), prepared_position(path)
    is_prepared = training.dataset == "prepared"
    if (saved is not None and is_prepared) or (position is not None and not is_prepared):
        rule = "a corpus of documents" if is_prepared else "'prepared'"
        raise ValueError(
            f"training.dataset must be {rule} to go on at the data position of {path}, got "
            f"{training.dataset!r}; set it back, or begin the data anew with "
            'checkpoint.exclude_from_loading = ["dataloader"]'
        )
    if position is not None:
        PreparedDataset(training.dataset_path, training.seq_len).load_state_dict(position)
        return
    if saved not in (None, degree):
        parallelism = config.parallelism
        model_parallel = parallelism.context_parallel_degree * parallelism.tensor_parallel_degree
        raise ValueError(
            f"the data-parallel degree must be that of {path}, {saved}, to go on at its data "
            f"position, got {degree}: {degree * model_parallel} processes over context times "
            f"tensor parallel {model_parallel}; start {saved * model_parallel} processes or change "
            "those degrees, or begin the data anew with "
            'checkpoint.exclude_from_loading = ["dataloader"]'
        )
    # That of the hub is not asked before the run starts.
    found = None if DATASETS[training.dataset].reader == "hub" else corpus_fingerprint(path)
    if found is not None and found != fingerprint(training.dataset, training.dataset_path):
        raise ValueError(
            f"training.dataset must be the corpus of the data position of {path}, got "
            f"{training.dataset!r} with other documents; restore them, or begin the data anew with "
            'checkpoint.exclude_from_loading = ["dataloader"]'
        )


def _check_tokenizer(config: JobConfig) -> None:
    path = Path(config.model.hf_assets_path)
    if not path.is_dir():
        raise ValueError(
            f"model.hf_assets_path must be a folder with a tokenizer, got {str(path)!r}, which is "
            "none; correct the path, or leave the field out for the byte tokenizer"
        )
    found = open_tokenizer("model.hf_assets_path", path)
    size = found.get_vocab_size()
    vocab_size = FLAVORS[config.model.flavor].vocab_size
    if size > vocab_size:
        raise ValueError(
            f"model.hf_assets_path must hold a tokenizer of at most {vocab_size} tokens for flavor "
            f"{config.model.flavor}, got {size} tokens; choose another flavor or tokenizer"
        )
    largest = max(found.get_vocab().values(), default=0)
    _require(
        largest < vocab_size,
        "model.hf_assets_path",
        f"a tokenizer with ids less than the {vocab_size} of flavor {config.model.flavor}",
        largest,
        "choose another flavor or tokenizer",
    )


def _check_prepared(config: JobConfig, must_exist: bool) -> None:
    vocab_size = FLAVORS[config.model.flavor].vocab_size
    for section in ["training"] + ["validation"] * config.validation.enable:
        options = getattr(config, section)
        if options.dataset != "prepared":
            continue
        paths = (options.dataset_path, config.model.hf_assets_path)
        if must_exist or all(Path(path).expanduser().exists() for path in paths):
            check_prepared(options.dataset_path, section, config.model.hf_assets_path, vocab_size)


class _Digits(int):
    """Written in short: Python refuses to write thousands of digits."""

    def __repr__(self) -> str:
        return f"{'-' * (self < 0)}2**{self.bit_length() - 1} or more"


def _check_numbers(config: JobConfig) -> None:
    """No rule below has to think of what is no number, or of one beyond 64 bits."""
    for name, _ in _leaves(JobConfig):
        value = _value_of(config, name)
        if isinstance(value, float):
            _require(not math.isnan(value), name, "a number", value, "write one")
        elif isinstance(value, int) and name != "debug.seed":
            _require(
                -(2**63) <= value < 2**63,
                name,
                "a number of 64 bits",
                _Digits(value),
                "write a smaller one",
            )


def _value_of(config: JobConfig, name: str) -> Any:
    """The value of a field by its name, as `training.steps`."""
    value = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _require(is_right: bool, name: str, rule: str, value: Any, remedy: str) -> None:
    if not is_right:
        raise ValueError(f"{name} must be {rule}, got {value!r}; {remedy}")


def _check_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}; use {least} or more")


def _check_choice(name: str, value: str, choices: list[str]) -> None:
    if value not in choices:
        remedy = _did_you_mean(str(value), choices, "choose one of these")
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}; {remedy}")


def _check_flags(args: list[str]) -> None:
    known = {"--help"}
    for name, annotation in _leaves(JobConfig):
        section, _, leaf = name.rpartition(".")
        known.add(f"--{name}")
        if annotation is bool:
            known.add(f"--{section}.no_{leaf}")
    for arg in args:
        flag = arg.split("=")[0].replace("-", "_").replace("__", "--", 1)
        if arg.startswith("--") and flag not in known:
            raise ValueError(
                f"command line: {arg.split('=')[0]} is not a field; {_did_you_mean(flag, known)}"
            )


def _flag_value(args: list[str], flag: str) -> str | None:
    """The value of a flag with underscores in its name, or None; it may stand there once."""
    values = []
    for i, arg in enumerate(args):
        name, is_joined, value = arg.partition("=")
        if name.replace("config-file", "config_file") == flag:
            if not is_joined:
                value = args[i + 1] if i + 1 < len(args) else ""
            if not value:
                raise ValueError(f"command line: {flag} must be followed by a file; name one")
            values.append(value)
    if len(values) > 1:
        raise ValueError(
            f"command line: {flag} must be given once, got {' and '.join(values)}; name one file"
        )
    return values[0] if values else None


def _check_toml(path: str) -> None:
    if Path(path).exists() and not Path(path).is_dir() and not Path(path).is_file():
        # Read twice, here and by torchtitan, and a pipe is empty then.
        raise ValueError(
            f"job.config_file must be a regular file, got {path!r}, which is a pipe or a device; "
            "write it to a file"
        )
    try:
        values = tomli.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"job.config_file must be a readable file, got {path!r} ({error}); correct the path"
        ) from None
    except tomli.TOMLDecodeError as error:
        raise ValueError(
            f"job.config_file must be valid TOML, got {path!r} ({error}); correct the line"
        ) from None
    if not values:
        raise ValueError(
            f"job.config_file must set a field, got {path!r}, which is empty; correct the path, or "
            "leave it out for the defaults"
        )
    _check_section("", values, JobConfig, path)


def _check_section(prefix: str, values: dict[str, Any], section: type, path: str) -> None:
    known = {f.name: f.type for f in fields(section)}
    for key, value in values.items():
        name = prefix + key
        if key not in known:
            raise ValueError(f"{path}: {name} is not a field; {_did_you_mean(key, known)}")
        if is_dataclass(known[key]):
            if not isinstance(value, dict):
                raise ValueError(f"{path}: {name} must be a section, got {value!r}; write [{name}]")
            _check_section(f"{name}.", value, known[key], path)
        elif not _is_a(value, known[key]):
            if get_origin(known[key]) is Literal:
                _check_choice(f"{path}: {name}", value, list(get_args(known[key])))
            is_class = isinstance(known[key], type) and get_origin(known[key]) is None
            expected = known[key].__name__ if is_class else str(known[key])
            raise ValueError(f"{path}: {name} must be {expected}, got {value!r}; change its type")


def _is_a(value: Any, annotation: Any) -> bool:
    """Whether a TOML value fits the annotation of a field."""
    origin, options = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return any(_is_a(value, option) for option in options)
    if origin is Literal:
        return value in options
    if origin is list:
        return isinstance(value, list) and all(_is_a(item, options[0]) for item in value)
    if annotation is NoneType:
        return value is None
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, annotation)


def _leaves(section: type, prefix: str = ""):
    """Names and annotations of all fields, as `training.steps`."""
    for f in fields(section):
        if is_dataclass(f.type):
            yield from _leaves(f.type, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, f.type


def _did_you_mean(value: str, choices, otherwise: str = "see --help for all") -> str:
    close = difflib.get_close_matches(value, list(choices), n=1)
    return f"did you mean {close[0]}?" if close else otherwise
