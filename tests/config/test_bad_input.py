"""Wrong command lines and files end every program with one line that says what to do.

A row is a call of a program and three parts of its message: the field, the value and the remedy.
For every row, the exit code is 2 and stderr has one line without a traceback. Nothing is written,
no process group is created, and the network is not used.
"""

import importlib
import json
import math
import os
import re
import resource
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from models import random_model, save
from runs import write_corpus
from torchtitan.experiments.lighthouse import train
from torchtitan.experiments.lighthouse.data.byte_tokenizer import BYTE_TOKENIZER_PATH
from torchtitan.experiments.lighthouse.flavors import FLAVORS
from torchtitan.tools.logging import logger

from lighthouse_cli import COMMANDS

ROOT = Path(__file__).parents[2]

LIMIT = 15
"""Limit of the CPU seconds of a process, as measured on an idle machine."""

HANGS = 300
"""Timeout in seconds, long enough for a busy machine."""

TRAINER = (
    "--job.dump_folder {dump} --model.flavor debugmodel --lighthouse.topk 128 "
    "--lighthouse.stage1_steps 40 --training.local_batch_size 1 --training.steps 60 "
    "--training.dataset text --training.dataset_path {corpus} "
    "--validation.dataset text --validation.dataset_path {corpus} "
)

LOGGED = re.compile(r"\[titan\] |\d{4}-\d\d-\d\d |W\d{4} ")


@dataclass(frozen=True)
class Row:
    """A wrong call."""

    program: str
    args: str
    """Arguments as typed. {dump}, {place}, {corpus} and {toml} are paths."""

    parts: tuple[str, ...]
    """Parts of the message: field, value, remedy."""

    toml: str | None = None
    env: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        what = f"{self.args.removeprefix(TRAINER)} {self.toml or ''}"
        return f"{self.program} {' '.join(what.split())[:160]} {self.env or ''}".strip()


def run(args: str, *parts: str, **env: str) -> Row:
    return Row("train", TRAINER + args, parts, env=env)


def wrong(
    name: str, value: Any, rule: str, remedy: str, right: str = "", num_ranks: int = 1
) -> Row:
    """A wrong value of a field of the trainer, after arguments that are `right`."""
    args = f"{right} --{name}" if value is True else f"{right} --{name} {value}"
    found = "got true" if value is True else f"got {value!r}"
    env = {"WORLD_SIZE": str(num_ranks)} if num_ranks > 1 else {}
    return run(args, f"{name} must be {rule}", found, remedy, **env)


def file(toml: str, *parts: str) -> Row:
    """A wrong TOML file as the only argument of the trainer."""
    return Row("train", "--job.dump_folder {dump} --job.config_file {toml}", parts, toml)


def config(path: str, *parts: str) -> Row:
    return Row("train", f"--job.dump_folder {{dump}} --job.config_file {path}", parts)


def script(name: str, args: str, *parts: str, toml: str | None = None) -> Row:
    return Row(name, args, parts, toml)


def calls_of(name: str, right: str) -> Callable[..., Row]:
    """Makes the wrong calls of a program whose first arguments are `right`."""
    return lambda args, *parts: script(name, f"{right} {args}", *parts)


HF = "--checkpoint.initial_load_in_hf --checkpoint.initial_load_model_only"
SAVES = "--checkpoint.enable"
VALIDATES = "--validation.enable"
TOKENIZED = "--training.dataset tokenized --training.dataset_path"
PIECES = "--lighthouse.stage2_seq_len 512"
SHARD = "parallelism.data_parallel_shard_degree"
REPLICATE = "parallelism.data_parallel_replicate_degree"
CP = "parallelism.context_parallel_degree"
TP = "parallelism.tensor_parallel_degree"

INSIDE = "a path inside job.dump_folder"

CP2 = f"--{CP} 2 --lighthouse.num_levels 2 --lighthouse.pooling_factor 2 --lighthouse.topk 256"
"""A legal shape for two ranks of context parallelism."""

RING = "--lighthouse.context_parallel ring"
RING4 = f"--{CP} 4 {RING} --lighthouse.stage1_steps 0"

COMMAND_LINES = [
    # Misspelt fields, wrong sections, wrong types.
    run("--training.stepz 4", "--training.stepz is not a field", "mean --training.steps?"),
    run("--trainin.steps 4", "--trainin.steps is not a field", "mean --training.steps?"),
    run("--steps 4", "--steps is not a field", "mean --training.steps or --validation.steps?"),
    run("--training 4", "--training is not a field", "mean --training.steps?"),
    run("--quux.a 4", "--quux.a is not a field", "see --help for all"),
    run("--lighthouse.top_k=4", "--lighthouse.top_k is not a field", "mean --lighthouse.topk?"),
    run("-training.steps 4", "Unrecognized options: -training.steps, 4", "see --help"),
    run("--training.steps 4 8", "Unrecognized options: 8", "see --help"),
    run("--training.steps four", "parsing --training.steps: ", "int() ", "'four'; see --help"),
    run("--training.steps 1e3", "parsing --training.steps: ", "int() ", "'1e3'; see --help"),
    run("--training.steps ''", "parsing --training.steps: ", "int() ", "''; see --help"),
    run("--training.steps", "Missing value for argument '--training.steps'", "see --help"),
    run("--optimizer.lr 0,001", "parsing --optimizer.lr: ", "to float: '0,001'; see --help"),
    run("--debug.seed x", "parsing --debug.seed: ", "int() ", "'x'; see --help"),
    run("--checkpoint.enable false", "--checkpoint.enable", "'false'", "--checkpoint.no_enable"),
    run("--checkpoint.enable=true", "--checkpoint.enable", "'true'", "write --checkpoint.enable"),
    Row("train", "", ("--job.config_file must name", "got no arguments", "debug.toml is a small")),
    run("--job.config_file", "--job.config_file must be followed by a file", "name one"),
    run("--optimizer.steps 4", "--optimizer.steps is not", "mean --training.steps or --validation"),
    run("--no-checkpoint.enable", "--no-checkpoint.enable is not", "mean --checkpoint.enable?"),
    run("--lighthouse.full_attn_layers [0,1]", "attn_layers must be", "'[0,1]'", "layers 0 1"),
    run("--lighthouse.full_attn_layers=0,-1", "attn_layers must be", "'0,-1'", "layers 0 -1"),
    *(
        run(f"{flag} {value}", f"choice '{value}' for argument '{flag.replace('_', '-')}'", choices)
        for flag, value, choices in (
            ("--lighthouse.sdpa_backend", "math", "one of ('cudnn', 'flash'"),
            ("--lighthouse.context_parallel", "rings", "one of ('ulysses', 'ring'"),
            ("--parallelism.context_parallel_rotate_method", "gather", "one of ('allgather', "),
            ("--activation_checkpoint.mode", "half", "one of ('selective', "),
            ("--checkpoint.async_mode", "maybe", "one of ('disabled', "),
            ("--checkpoint.export_dtype", "fp8", "one of ('float16', "),
            ("--training.mixed_precision_param", "float16", "one of ('bfloat16', "),
            ("--training.dtype", "fp16", "one of ('bfloat16', "),
            ("--lr_scheduler.decay_type", "exp", "one of ('linear', "),
        )
    ),
    run("--job.custom_config_module no.such", "custom_config_module", "'no'", "remove it"),
    # Numbers out of range.
    wrong("training.steps", -1, "at least 1", "use 1 or more"),
    run(
        f"--training.steps {10**25}",
        *("training.steps must be a number of 64 bits", "got 2**83 or more", "a smaller one"),
    ),
    wrong("training.seq_len", 0, "at least 1", "use 1 or more"),
    wrong("training.seq_len", 10**12, "a multiple of", "nearest with topk 128: 1073741824"),
    run(
        "--training.seq_len 2047", "training.seq_len must be", "= 16", "got 2047", "topk 128: 2048"
    ),
    run("--training.seq_len 1024", "lighthouse.topk must divide", "seq_len 1024", "seq_len 2048"),
    wrong("training.local_batch_size", -1, "at least 1", "use 1 or more"),
    wrong("training.local_batch_size", 2**40, "less than 1048576 at this seq_len", "lower it"),
    run(
        "--training.local_batch_size 4 --training.global_batch_size 6",
        *("training.global_batch_size must be a multiple", "got 6", "nearest: 4, or -1"),
    ),
    wrong("training.global_batch_size", -(10**18), "a multiple of", "nearest: 1, or -1"),
    wrong("training.global_batch_size", 3, "a multiple of", "nearest: 2, or -1", f"--{TP} 2", 4),
    wrong("training.loss_chunk_size", -1, "at least 0", "use 0 or more"),
    wrong("training.max_norm", 0.0, "above 0", "1.0 is common, inf turns clipping off"),
    wrong("training.max_norm", -1.5, "above 0", "1.0 is common, inf turns clipping off"),
    wrong("training.max_norm", math.nan, "a number", "write one"),
    wrong("training.max_skipped_steps", -1, "at least 0", "use 0 or more"),
    wrong("training.gc_freq", 0, "at least 1", "use 1 or more"),
    wrong("metrics.log_freq", -3, "at least 1", "use 1 or more"),
    wrong("optimizer.lr", 1e39, "a finite number above 0 and at most 1000", "1e-3 is common"),
    wrong("optimizer.lr", 0.0, "a finite number above 0 and at most 1000", "1e-3 is common"),
    run("--optimizer.lr -1e-3", "optimizer.lr must be a finite number", "got -0.001", "1e-3"),
    wrong("optimizer.lr", math.nan, "a number", "write one"),
    wrong("optimizer.lr", math.inf, "a finite number above 0 and at most 1000", "1e-3 is common"),
    wrong("optimizer.eps", 0.0, "a finite number above 0 and at most 1000", "1e-8 is common"),
    wrong("optimizer.beta1", 1.0, "at least 0 and less than 1", "0.9 and 0.95 are common"),
    wrong("optimizer.beta2", -0.1, "at least 0 and less than 1", "0.9 and 0.95 are common"),
    wrong("optimizer.weight_decay", -1.0, "a finite number of at least 0", "0.1 is common"),
    wrong("optimizer.name", "SGD", "one of Adam, AdamW", "choose one of these"),
    wrong("optimizer.early_step_in_backward", True, "false", "remove it: gradients would"),
    wrong("lr_scheduler.warmup_steps", -1, "at least 0", "use 0 or more"),
    wrong("lr_scheduler.warmup_steps", 300, "at most the 60 steps of the schedule", "lower it"),
    wrong("lr_scheduler.total_steps", 30, "at least training.steps, 60", "raise it or leave it"),
    wrong("lr_scheduler.decay_ratio", 1.5, "from 0 to 1", "give the decay as a share of all"),
    wrong("lr_scheduler.min_lr_factor", -1.0, "from 0 to 1", "give the last learning rate as"),
    wrong("debug.seed", -1, "from 0 to 2**64 - 1", "use such a number, or leave it out"),
    wrong("debug.seed", 2**64, "from 0 to 2**64 - 1", "use such a number, or leave it out"),
    wrong("comm.init_timeout_seconds", 0, "at least 1", "use 1 or more"),
    wrong("comm.train_timeout_seconds", -9, "at least 1", "use 1 or more"),
    wrong("comm.trace_buf_size", -1, "at least 0", "use 0 or more"),
    run(
        "--profiling.enable_profiling --profiling.profile_freq 0",
        *("profiling.profile_freq must be at least 1", "got 0", "use 1 or more"),
    ),
    run(
        "--profiling.enable_profiling --profiling.profile_freq 3",
        *("profiling.profile_freq must be at least 4", "got 3", "use 4 or more"),
    ),
    wrong("activation_checkpoint.memory_budget", 1.5, "from 0 to 1", "0.5 is the default"),
    wrong("activation_checkpoint.selective_ac_option", "0", "'op' or a number", "use 2 for every"),
    # Validation.
    wrong("validation.steps", 0, "at least 1", "use 1 or more", VALIDATES),
    wrong("validation.steps", -1, "at least 1", "use 1 or more", VALIDATES),
    wrong("validation.freq", -1, "at least 1", "use 1 or more", VALIDATES),
    wrong("validation.local_batch_size", 0, "at least 1", "use 1 or more", VALIDATES),
    wrong("validation.seq_len", 4096, "from 1 to training.seq_len, 2048", "lower it", VALIDATES),
    wrong("validation.seq_len", 100, "a multiple of", "nearest with topk 128: 2048", VALIDATES),
    run(f"{VALIDATES} --validation.seq_len 1024", "lighthouse.topk must divide", "seq_len 1024"),
    # Lighthouse, alone and together.
    wrong("lighthouse.num_levels", 1, "at least 2", "use 2 or more"),
    wrong("lighthouse.num_levels", 99999999, "at most 30", "use 30 or fewer"),
    wrong("lighthouse.pooling_factor", 3, "a power of two", "nearest: 2"),
    wrong("lighthouse.pooling_factor", 10**12 + 1, "a power of two of at", "nearest: 1073741824"),
    wrong("lighthouse.topk", -(10**12), "a positive multiple of 128", "nearest: 128"),
    wrong("lighthouse.topk", 1500, "a positive multiple of 128", "nearest: 128"),
    # This rule also applies to a dense run.
    wrong("lighthouse.topk", 200, "a positive", "nearest: 256", "--lighthouse.stage1_steps 0"),
    run("--lighthouse.topk 256", "lighthouse.topk", "got topk 256", "topk 128, or seq_len 4096"),
    run(
        "--lighthouse.num_levels 8",
        *("training.seq_len", "num_levels=8", "got 2048", "nearest with topk 128: 2097152"),
    ),
    wrong("lighthouse.scorer", "loud", "one of norm, dilated, gla", "choose one"),
    wrong("lighthouse.dilation", 0, "at least 1", "use 1 or more"),
    run("--lighthouse.full_attn_layers 0 4", "full_attn_layers must be", "got 4", "remove it"),
    run("--lighthouse.full_attn_layers -5", "full_attn_layers must be from -4 to 3", "got -5"),
    wrong("lighthouse.stage1_steps", 61, "from 0 to training.steps (60)", "lower it or raise"),
    wrong("lighthouse.stage1_steps", -2, "from 0 to training.steps (60), or -1", "lower it"),
    run(
        "--lighthouse.full_attn_layers 0 1 2 -1",
        *("full_attn_layers must be fewer than all 4", "[0, 1, 2, -1]", "stage1_steps to 0 for"),
    ),
    wrong(
        "lighthouse.stage2_seq_len", 768, "0 or a divisor of training.seq_len, 2048", "512 or 1024"
    ),
    wrong("lighthouse.stage2_seq_len", -1, "0 or a divisor of training.seq_len", "nearest: 1"),
    wrong("lighthouse.stage2_seq_len", 4096, "0 or a divisor of training.seq_len", "nearest: 2048"),
    wrong("lighthouse.stage2_full_steps", 2, "0 unless lighthouse.stage2_seq_len", "set it to 0"),
    run(
        "--lighthouse.stage2_seq_len 2048 --lighthouse.stage2_full_steps 1",
        *("stage2_full_steps must be 0 unless", "training.seq_len, 2048", "got 1", "set it to 0"),
    ),
    wrong(
        "lighthouse.stage2_full_steps", 21, "from 0 to the steps of stage 2, 20", "use 20", PIECES
    ),
    wrong("lighthouse.stage2_full_steps", -1, "from 0 to the steps of stage 2", "use 0", PIECES),
    run(
        f"{PIECES} --lighthouse.stage1_steps -1 --lighthouse.stage2_full_steps 1",
        *("stage2_full_steps must be from 0 to the steps of stage 2, 0, got 1", "use 0"),
    ),
    wrong("lighthouse.telemetry_freq", -1, "at least 0", "use 0 or more"),
    # Parallelism.
    wrong(TP, 0, "at least 1", "use 1 or more"),
    wrong(CP, 0, "at least 1", "use 1 or more"),
    wrong(REPLICATE, 0, "at least 1", "use 1 or more"),
    wrong(TP, 3, "a divisor of the 2 key/value heads of debugmodel", "use 1 or 2"),
    wrong(SHARD, 2, "the 1 processes divided by the other degrees, 1", "set it to -1 or 1"),
    wrong(SHARD, 3, "the 4 processes divided by the other degrees, 1", "-1 or 4", num_ranks=4),
    wrong(SHARD, 0, "the 4 processes divided by the other degrees, 1", "-1 or 4", num_ranks=4),
    wrong(SHARD, 3, "the 5 processes divided by the other degrees, 2", "start 6", f"--{TP} 2", 5),
    run(f"--{REPLICATE} 2", "the 1 processes", "degrees, 2, got -1", "start a multiple of 2"),
    run("", "WORLD_SIZE must be the number of processes", "got 'two'", "unset", WORLD_SIZE="two"),
    run("", "RANK must be the number of this", "got '5'", "unset it", RANK="5", LOCAL_RANK="5"),
    run("", "RANK must be the number of this process", "got '-1'", "unset it", RANK="-1"),
    run("", "LOCAL_RANK must be the number of this", "got 'one'", "unset it", LOCAL_RANK="one"),
    run("", "MASTER_PORT must be a port", "got 'http'", "unset it", MASTER_PORT="http"),
    run("", "MASTER_PORT must be a port", "got '70000'", "unset it", MASTER_PORT="70000"),
    run("", "WORLD_SIZE must be the number of", "got '0'", "unset it", WORLD_SIZE="0"),
    run("", "WORLD_SIZE must be the number of", "got '²'", "unset it", WORLD_SIZE="²"),
    run(
        f"--{CP} 2",
        *("topk must be a multiple of 256", "2 chunks", "got 128", "topk 256 with seq_len 4096"),
        WORLD_SIZE="2",
    ),
    run(
        f"{CP2} {RING}",
        *("lighthouse.topk must be a multiple of 512", "4 chunks", "got 256", "topk 512"),
        WORLD_SIZE="2",
    ),
    wrong(CP, 4, "a divisor of", "use 1 or 2, or 'ring'", "--lighthouse.stage1_steps 0", 4),
    run(
        f"{CP2} --{TP} 2",
        *(f"{CP} must be a divisor", "of a rank, 1,", "got 2", "use 1, or 'ring'"),
        WORLD_SIZE="4",
    ),
    run(
        f"{RING4} --lighthouse.stage2_seq_len 1024",
        *("stage2_seq_len", "batch of 1 into whole pieces for 4", "got 1024", "512 or 2048"),
        WORLD_SIZE="4",
    ),
    run(
        f"--{TP} 2 --lighthouse.stage2_seq_len 1",
        *("stage2_seq_len", "a multiple of the tensor-parallel degree, 2", "got 1", "nearest: 2"),
        WORLD_SIZE="2",
    ),
    wrong("training.seq_len", 2050, "a multiple of twice", "nearest: 2048", f"--{TP} 2", 2),
    run(
        f"{CP2} --training.seq_len 2050 --lighthouse.stage1_steps 0",
        *("training.seq_len must be a multiple of twice", "4, got 2050", "nearest: 2048"),
        WORLD_SIZE="2",
    ),
    wrong("lighthouse.scorer", "dilated", "norm under context", f"{CP} to 1", CP2, num_ranks=2),
    wrong("lighthouse.telemetry_freq", 10, "0 under context", f"{CP} to 1", CP2, num_ranks=2),
    wrong("parallelism.context_parallel_load_balancer", "ptrr", "'headtail'", "leave it", CP2, 2),
    wrong(REPLICATE, 2, "1 with tensor", "start more than 4 processes", f"--{TP} 2", num_ranks=4),
    wrong("training.loss_chunk_size", 64, "0 with tensor", f"{TP} to 1", f"--{TP} 2", num_ranks=2),
    wrong("parallelism.pipeline_parallel_degree", 2, "1", "use data, context or tensor"),
    wrong("parallelism.expert_parallel_degree", 2, "1", "remove it"),
    wrong("parallelism.enable_async_tensor_parallel", True, "false", "set compile.enable to true"),
    wrong("training.enable_cpu_offload", True, "false where", "remove it, or start more processes"),
    # Features that this machine or this program does not have.
    wrong("model.converters", "float8", "one of quantize.linear.float8", "choose one of these"),
    wrong("model.converters", "quantize.linear.float8", "left out on a CPU", "remove it"),
    run("--compile.components loss,modle", "compile.components", "got 'modle'", "mean model?"),
    run(
        "--compile.enable --compile.backend inductr",
        *("compile.backend must be one of", "got 'inductr'", "did you mean inductor?"),
    ),
    wrong("activation_checkpoint.mode", "memory_budget", "selective, full", "set compile.enable"),
    wrong("activation_checkpoint.determinism_check", "maybe", "one of default, none", "choose one"),
    wrong("profiling.enable_profiling", True, "false on a CPU, where torchtitan's", "remove it"),
    wrong("profiling.enable_memory_snapshot", True, "false on a CPU, where", "remove it"),
    wrong("checkpoint.async_mode", "async_with_pinned_mem", "disabled or", "use async", SAVES),
    wrong("training.gc_debug", True, "false on a CPU, because it looks", "remove it"),
    wrong("checkpoint.initial_load_in_hf_quantized", True, "false", "initial_load_in_hf to true"),
    wrong("comm.mode", "local_tensor", "one of default, fake_backend", "choose one of these"),
    wrong("comm.mode", "fake_backend", "default unless NGPU is the number", "set the variable"),
    wrong("fault_tolerance.enable", True, "false, because it has no effect", "remove it"),
    wrong("memory_estimation.enable", True, "false, because it has no effect", "lighthouse plan"),
    wrong("experimental.custom_import", "no_such_module", "a module that can be", "correct the"),
    # Model and tokenizer.
    wrong("model.name", "llama3", "one of llama3_lighthouse", "choose one of these"),
    wrong("model.flavor", "530m", "one of debugmodel", "did you mean 530M?"),
    run("--model.override.vocab_size 256", "at most 256 tokens", "got 257", "override.vocab_size"),
    run("--model.hf_assets_path {place}/no", "model.hf_assets_path", "/no'", "correct the path"),
    run("--model.hf_assets_path {place}/empty", "model.hf_assets_path", "/empty'", "download"),
    run("--model.hf_assets_path {place}/not_json", "model.hf_assets_path", "/not_json'", "again"),
    run("--model.hf_assets_path {place}/no_json", "model.hf_assets_path", "/no_json'", "again"),
    run(
        "--model.hf_assets_path {place}/old/tokenizer.model",
        *("model.hf_assets_path must be a folder", "got the file of an old", "name the folder"),
    ),
    # Data.
    run("--training.dataset txt", "training.dataset must be one of", "'txt'", "mean 'text'?"),
    run("--training.dataset_path {place}/no", "training.dataset_path", "/no'", "correct the path"),
    run("--training.dataset_path {place}/empty", "training.dataset_path", "/empty'", "add such"),
    run("--training.dataset jsonl", "dataset_path must hold *.jsonl", "/corpus'", "add such files"),
    run("--training.dataset python_stdlib", "training.dataset_path must not", "/corpus'", "remove"),
    run("--training.dataset c4", "training.dataset_path must not", "/corpus'", "choose 'c4_local'"),
    run("--training.dataset_path ''", "training.dataset_path must be set", "got ''", "name the"),
    run(f"{VALIDATES} --validation.dataset c4_locale", "n.dataset must", "mean 'c4_local'?"),
    run(f"{VALIDATES} --validation.dataset zzz", "validation.dataset must", "'zzz'", "choose one"),
    run(f"{VALIDATES} --validation.dataset_path {{place}}/no", "validation.dataset_path", "/no'"),
    wrong("validation.text_field", "body", "'text' for dataset 'text'", "remove it", VALIDATES),
    run(
        "--training.dataset tokenized",
        *("training.dataset_path must be a folder with a prepared", "/corpus'", "prepare --output"),
    ),
    run(
        f"{TOKENIZED} {{place}}/prepared",
        *("training.dataset_path must hold a readable manifest", "manifest.json'", "restore it"),
    ),
    run(
        f"{TOKENIZED} {{place}}/no", "training.dataset_path must exist", "/no'", "correct the path"
    ),
    *(
        wrong("training.dataloader.num_workers", n, "from 0 to", "use 0", f"{TOKENIZED} {{place}}")
        for n in (-1, 100_000)
    ),
    wrong("training.dataloader.num_workers", 2, "0 or 1", "set it to 1"),
    wrong("training.dataloader.prefetch_factor", 2, "left out without", "num_workers to 1"),
    # Output folders.
    run("--job.dump_folder ''", "job.dump_folder must be the name", "got ''", "./outputs"),
    run("--training.dataset_path ~no/x", "dataset_path must exist", "got '~no/x'", "correct the"),
    run("--job.dump_folder=~/run", "job.dump_folder must be", "'~/run'", "the home folder"),
    run("--job.dump_folder {place}/file", "job.dump_folder must be a folder", "/file'", "another"),
    run("--job.dump_folder {place}/file/run", "job.dump_folder must be", "/file/run'", "another"),
    run("--job.dump_folder /dev/null/run", "job.dump_folder must be", "/dev/null/run'", "another"),
    run(f"--job.dump_folder {{place}}/{'a' * 300}", "job.dump_folder", "aaa", "name another"),
    wrong("job.save_config_file", "../c.json", INSIDE, "without a leading"),
    wrong("metrics.save_tb_folder", "/tmp/tb", INSIDE, "without a leading"),
    wrong("profiling.save_traces_folder", "..", INSIDE, "without a leading"),
    wrong("comm.save_traces_folder", "a/../../b", INSIDE, "without a leading"),
    wrong("checkpoint.folder", "/tmp/c", INSIDE, "without a leading"),
    wrong("checkpoint.folder", "../c", INSIDE, "without a leading"),
    wrong("checkpoint.folder", "metrics.jsonl", "another name than", "another folder", SAVES),
    wrong("checkpoint.folder", ".", INSIDE, "without a leading"),
    # Checkpoints.
    wrong("checkpoint.interval", 0, "at least 1", "use 1 or more", SAVES),
    wrong("checkpoint.keep_latest_k", 1, "0, for all, or at least 2", "use 2 or more", SAVES),
    wrong("checkpoint.keep_latest_k", -1, "0, for all, or at least 2", "use 2 or more", SAVES),
    wrong("checkpoint.load_step", 7, "-1 or the step of a whole", "use -1", SAVES),
    run("--checkpoint.create_seed_checkpoint", "checkpoint.enable must", "got false", "set it to"),
    *(
        run(
            f"{SAVES} --checkpoint.last_save_model_only --lighthouse.stage1_steps {steps}",
            *("checkpoint.last_save_model_only must be false", "optimizer", "got true", "set it"),
        )
        for steps in (-1, 60)
    ),
    run(
        f"{SAVES} --checkpoint.exclude_from_loading optimizer,dataloader",
        *("checkpoint.exclude_from_loading must be without", "got 'optimizer'", "remove it"),
    ),
    wrong("checkpoint.exclude_from_loading", "lr_scheduler", "without", "remove it", SAVES),
    wrong("checkpoint.exclude_from_loading", "train_state", "without", "remove it", SAVES),
    wrong("checkpoint.exclude_from_loading", "optimiser", "one of", "mean optimizer?", SAVES),
    run(
        f"{SAVES} --checkpoint.last_save_in_hf",
        *("last_save_model_only must be true with checkpoint.last_save_in_hf", "got false"),
    ),
    run(
        f"{SAVES} --checkpoint.initial_load_in_hf",
        *("initial_load_model_only must be true with checkpoint.initial_load_in_hf", "got false"),
    ),
    run(
        f"{SAVES} --checkpoint.initial_load_path {{place}}/no",
        *("checkpoint.initial_load_path must be the folder", "step number", "/no'", "correct the"),
    ),
    run(
        f"{SAVES} --checkpoint.initial_load_path {{place}}/empty",
        *("initial_load_path must hold a whole", "/empty': .metadata, which", "name an older one"),
    ),
    run(
        f"{SAVES} {HF} --checkpoint.initial_load_path {{place}}/empty",
        *("config.json' must be the configuration of a model", "No such file", "name a folder"),
    ),
    run(
        f"{SAVES} {HF} --checkpoint.initial_load_path {{place}}/not_json",
        *("config.json' must be the configuration of a model", "Expecting", "name a folder"),
    ),
]
"""Calls of the trainer."""

TOML_FILE = "job.config_file must be a readable TOML file"

FILES = [
    config("{place}/no.toml", TOML_FILE, "no.toml'", "correct the file"),
    config("{place}/empty", TOML_FILE, "/empty'", "correct the file"),
    config("{place}/pipe", TOML_FILE, "/pipe'", "correct the file"),
    config("/dev/zero", TOML_FILE, "/dev/zero'", "correct the file"),
    config("{place}/random.bin", TOML_FILE, "random.bin'", "correct the file"),
    config("''", "--job.config_file must be followed by a file", "name one"),
    config(
        "{place}/no.toml --job.config_file=a.toml",
        *("--job.config_file must be given once", "no.toml and a.toml", "name one file"),
    ),
    file("", "job.config_file must set a field", "run.toml'", "correct the path"),
    file("# nothing\n", "job.config_file must set a field", "run.toml'", "correct the path"),
    file("steps: 60\n", TOML_FILE, "line 1", "correct the file"),
    file("[training\nsteps = 6", TOML_FILE, "line 1", "correct the file"),
    file("[training]\nsteps = 6\nsteps = 7", TOML_FILE, "Cannot overwrite a value", "correct the"),
    file("a = " + 9000 * "[", TOML_FILE, "too deeply", "correct the file"),
    file("[training]\nstep = 60", "training.step is not a field", "did you mean steps?"),
    file("[training]\nsteps = 1e2", "training.steps must be int", "got 100.0", "write 100"),
    file("[optimizer]\nseq_len = 60", "optimizer.seq_len is not", "mean training.seq_len or"),
    file("[trianing]\nsteps = 60", "trianing is not a field", "did you mean training?"),
    file("steps = 60", "steps is not a field", "mean training.steps or"),
    file("training = 60", "training must be a section", "got 60", "write [training]"),
    file('[training]\nsteps = "60"', "training.steps must be int", "got '60'", "change its type"),
    file("[training]\nsteps = 60.0", "training.steps must be int", "got 60.0", "write 60"),
    file("[training]\nsteps = true", "training.steps must be int", "got True", "change its type"),
    file('[optimizer]\nlr = "1e-3"', "optimizer.lr must be float", "got '1e-3'", "change its"),
    file("[optimizer]\nlr = nan", "optimizer.lr must be a number", "got nan", "write one"),
    file('[checkpoint]\nenable = "true"', "checkpoint.enable must be bool", "'true'", "change its"),
    file("[checkpoint]\nenable = 1", "checkpoint.enable must be bool", "got 1", "change its type"),
    file("[model]\nflavor = 530", "model.flavor must be str", "got 530", "change its type"),
    file("[lighthouse]\nfull_attn_layers = 0", "full_attn_layers must be", "got 0", "change its"),
    file('[lighthouse]\nfull_attn_layers = ["0"]', "must be list[int]", "got ['0']", "change its"),
    file('[compile]\ncomponents = "model"', "compile.components must", "got 'model'", "change its"),
    file('[lighthouse]\nsdpa_backend = "math"', "sdpa_backend must be one of", "'math'", "choose"),
    file('[training]\ndtype = "fp16"', "training.dtype must be one of", "got 'fp16'", "choose one"),
    file("[debug]\nseed = 'x'", "debug.seed must be int | None", "got 'x'", "change its type"),
    file("[training.dataloader]\nnum_worker = 1", "dataloader.num_worker is not", "num_workers?"),
    file('[job]\ncustom_config_module = "x"', "custom_config_module", "'x'", "remove it"),
    # Sizes of the model.
    *(
        file(f"[model.override]\ndim = 192\nn_heads = 3\n{size}", "model.override." + name, *parts)
        for size, name, *parts in (
            ("n_layers = 0", "n_layers must be at least 1", "got 0"),
            ("ffn_dim = -1", "ffn_dim must be at least 1", "got -1"),
            ("n_kv_heads = 2", "n_kv_heads must be a divisor", "got 2", "use 1 or 3"),
            ("rope_theta = 0.0", "rope_theta must be a finite number above 0", "got 0.0"),
            ("rope_scaling_factor = 0.5", "rope_scaling_factor must be at least 1", "got 0.5"),
            ("rope_low_freq_factor = 4.0", "rope_low_freq_factor must be less than", "got 4.0"),
            ("widht = 3", "widht is not a field"),
            ("norm_eps = true", "norm_eps must be float | None", "got True"),
        )
    ),
    file("[model.override]\ndim = 190\nn_heads = 3", "n_heads must be a divisor of dim, 190"),
    file("[model.override]\ndim = 189\nn_heads = 3", "even multiple", "got 189", "use 186"),
]
"""Files given to the trainer."""

MODEL = "{place}/run/checkpoint/step-1"
plan = calls_of("plan", "{place}/ok.toml")
sweep = calls_of("sweep", "{place}/ok.toml --output {dump}")
export = calls_of("export", MODEL)
eval_loss = calls_of("eval-loss", MODEL)
eval_passkey = calls_of("eval-passkey", MODEL)
generate = calls_of("generate", MODEL)
passkey_data = calls_of("eval-passkey", "--make-data 4 {dump}/x.jsonl --lengths 256")
report = calls_of("report", "--output {dump}")
prepare = calls_of("prepare", "--output {dump} --dataset text --dataset-path {place}/corpus")

SCRIPTS = [
    script("bench", "--seq-lens 8192 1000", "seq_len must be", "got 1000", "nearest with topk"),
    script("bench", "--topk 0", "topk must be a positive multiple of 128", "got 0", "nearest: 128"),
    script("bench", "--n-heads 0", "--n-heads must be at least 1", "got 0", "use 1 or more"),
    script("bench", "--n-kv-heads 3", "--n-kv-heads must be a divisor of", "got 3", "use 1"),
    script(
        "bench",
        "--pool-rotary averaged aligned --head-dim 33",
        *("--head-dim must be even", "got 33", "use 34"),
    ),
    script("bench", "--output {place}/file", "--output must be a folder", "/file'", "another one"),
    script("bench", "--output=~/bench", "--output must be", "'~/bench'", "the home folder"),
    script("plan", "", "the following arguments are required: config", "see --help"),
    script("plan", "{toml} --world-size two", "--world-size", "'two'", "see --help", toml="a = 1"),
    script("plan", "{place}/no.toml --world-size 1", "job.config_file", "no.toml'", "correct the"),
    plan("--world-size 0", "--world-size must be at least 1", "got 0", "use 1 or more"),
    plan("--world-size 1 --gpu H9", "--gpu must be one of", "'H9'", "choose one"),
    plan("--world-size 1 --jsn", "--jsn is not a field", "see --help"),
    plan(
        f"--world-size 3 --{CP} 2",
        *("data_parallel_shard_degree must be the 3", "got -1", "a multiple of 2 processes"),
    ),
    plan(f"--world-size 2 --{TP} 2", f"{TP} must be 1 for a plan", "got 2", "set it to 1"),
    plan(
        "--compile.enable --activation_checkpoint.mode memory_budget",
        *("mode must be none, selective or full for a plan", "'memory_budget'", "choose one"),
    ),
    # For a GPU, on a machine without one.
    plan(
        f"--training.seq_len {2**17} --training.mixed_precision_param float32",
        *("mixed_precision_param must be bfloat16", "got 'float32'", "set it to"),
    ),
    script("sweep", "{place}/ok.toml", "arguments are required: --output", "see --help"),
    script("sweep", "{place}/no.toml --output {dump}", "job.config_file", "no.toml'", "correct"),
    sweep("--output {place}/file", "--output must be a folder", "/file'", "another"),
    sweep("--world-size 0", "--world-size must be at least 1", "got 0", "use 1 or more"),
    sweep("--grid {place}/no.toml", "--grid must be a TOML file", "no.toml'", "correct it"),
    sweep("--grid {place}/random.bin", "--grid must be a TOML file", "random.bin'", "correct it"),
    sweep("--grid '{{topk = }}'", "--grid must be an inline table", "{topk = }", "correct it"),
    sweep("--grid '{{}}'", "--grid must name a field", "'{}'", "leave it out"),
    sweep("--grid '{{topks = [128]}}'", "--grid: topks is not a field", "use scorer"),
    sweep("--grid '{{topk = 128}}'", "--grid: topk must be a list", "got 128", "write one"),
    sweep("--grid '{{seed = [\"0\"]}}'", "seed must be a list of numbers", "got '0'", "change its"),
    sweep("--grid '{{stage1_share = [1.5]}}'", "must be from 0 to 1", "got 1.5", "as a part of"),
    sweep("--grid '{{pool_rotary = [\"no\"]}}'", "pool_rotary must be one of", "'no'", "choose"),
    sweep("--run --grid '{{topk = [100]}}'", "--grid must have a legal", "got none", "see --list"),
    sweep("--collect", "--output must hold cells", "got none", "use --run"),
    sweep(
        "--output {place}/grid --collect",
        *("--output must hold undamaged cell.json files", "cell.json'", "remove the folder"),
    ),
    *(
        sweep(f"--run {flag}", f"{flag} must not be given", "since a cell sets it", "leave it out")
        for flag in ("--job.dump-folder=x", "--lighthouse.topk=256", "--lighthouse.stage1_steps=3")
    ),
    sweep("--training.step 3", "--training.step is not a field", "mean --training.steps"),
    sweep(f"--grid '{{{{topk = {'[' * 9999}'", "--grid must be", "too deeply); correct it"),
    sweep("--grid /dev/zero", "--grid must be a TOML file", "is a pipe", "correct it"),
    script(
        "export", "{place}/no --output {dump}", "a model must be a whole", "/no'", "correct the"
    ),
    script(
        "export",
        "{place}/run/checkpoint --output {dump}",
        *("a model must be a whole", "/run/checkpoint'", "name /", "/step-1"),
    ),
    export("", "required: --output", "see --help"),
    export("{dump} --output {dump}", "unrecognized arguments", "see --help"),
    export("--output {place}/file", "--output must be a folder", "/file'", "another one"),
    export("--output {place}/corpus", "--output must be a new", "/corpus'", "another one"),
    export("--output {dump} --dtype float16", "--dtype", "'float16'", "choose from"),
    export("--output {dump} --flavor 53M", "--flavor must be one of", "'53M'", "choose the one"),
    export("--output {dump} --flavor 10M", "--flavor must be that of", "'10M'", "use debugmodel"),
    export("--output {dump} --max-seq-len 0", "--max-seq-len must be at", "got 0", "use 1 or more"),
    export(
        "--output {dump} --tokenizer {place}/not_json",
        *("--tokenizer must hold a readable tokenizer", "/not_json'", "download it again"),
    ),
    script("eval-loss", "", "the following arguments are required: MODEL", "see --help"),
    script("eval-loss", "{place}/no", "a model must be a whole", "/no'", "correct the path"),
    generate("--prompt a --seed -1", "--seed must be from 0", "got -1", "use 0"),
    generate("--prompt '\udcff'", "--prompt must be UTF-8", r"'\udcff'", "correct its bytes"),
    eval_loss("--windows 0", "--windows must be at least 1", "got 0", "use 1 or more"),
    eval_loss("--seq-len -4", "--seq-len must be at least 1", "got -4", "use 1 or more"),
    eval_loss("--device gpu", "--device must be one of", "'gpu'", "use cpu"),
    eval_loss("--device cuda:99", "--device must be one of", "'cuda:99'", "use cpu"),
    eval_loss("--output {place}/file", "--output must be a folder", "/file'", "another"),
    eval_loss("--dataset pile", "argument --dataset", "'pile'", "choose from"),
    eval_loss("--dataset text", "dataset_path must be set", "'text', got None", "name the folder"),
    eval_loss(
        "--lighthouse topk=12",
        *("--lighthouse for", "topk must be a positive multiple", "got 12", "nearest: 128"),
    ),
    eval_loss("--lighthouse k=12", "--lighthouse must set one of", "'k=12'", "write FIELD=VALUE"),
    eval_loss("--lighthouse topk=a", "--lighthouse topk", "'a'", "a number"),
    script("eval-loss", "{place}/not_json", "config.json' must be", "Expecting", "name a folder"),
    script("eval-passkey", "", "name either MODEL or --make-data N FILE", "see --help"),
    script("eval-passkey", "{place}/empty", "a model must be a whole", "/empty'", "correct the"),
    eval_passkey("--lengths 9", "--lengths must be at least 80", "got 9", "use longer ones"),
    eval_passkey("--lengths a", "argument --lengths", "'a'", "see --help"),
    eval_passkey("--device tpu", "--device must be one of", "'tpu'", "use cpu"),
    script(
        "eval-passkey",
        "--make-data 0 {dump}/x.jsonl --lengths 256",
        *("--make-data must be followed by a number and a file", "'0'", "give both"),
    ),
    passkey_data("--lengths 256 9", "--lengths must be at least 80", "got 9", "use longer ones"),
    passkey_data("--filler-words 2 -1", "--filler-words must be at least 0", "got -1", "use 0 for"),
    passkey_data("--questions 0", "--questions must be at least 1", "got 0", "use 1 for the form"),
    passkey_data("--min-distance -1", "--min-distance must be at least 0", "got -1", "use 0 for"),
    passkey_data(
        "--min-distance 256",
        *("--lengths must be at least", "--min-distance", "got 256", "use longer ones"),
    ),
    passkey_data(
        "--make-data 4 {place}/file/x.jsonl",
        *("the folder of --make-data FILE must be", "/file'", "name another one"),
    ),
    passkey_data(
        "--tokenizer {place}/no", "--tokenizer must hold tokenizer.json", "/no'", "correct"
    ),
    script("report", "", "the following arguments are required: RUN", "see --help"),
    report("{place}/no", "a run must be a folder with metrics.jsonl", "/no'", "correct the path"),
    report("{place}/silent", "a run must have trained a step", "/silent'", "leave it out"),
    report("{place}/garbled", "a run must have trained a step", "/garbled'", "leave it out"),
    report("{place}/binary", "a run must have trained a step", "/binary'", "leave it out"),
    report("{place}/partial", "metrics.jsonl must hold", "/partial'", "remove that line"),
    report("{place}/ran --output {place}/file", "--output must be a folder", "/file'", "another"),
    report("{place}/ran {place}/ran", "every run must be a different folder", "twice", "remove it"),
    script("prepare", "--out {dump}", "the following arguments are required: --output", "see"),
    script("prepare", "", "the following arguments are required: --output", "see --help"),
    script("prepare", "--output {dump}", "--dataset must be one of", "got None", "choose one"),
    script("prepare", "--output {dump} --dataset c4", "--dataset must be", "'c4'", "choose one"),
    script("prepare", "--output {dump} --dataset text", "-path must be set", "'text', got None"),
    script("prepare", "--output {dump} --verify", "must hold prepared data", "/dump'", "correct"),
    prepare("--dataset-path {place}/no", "--dataset-path must exist", "/no'", "correct the path"),
    prepare("--dataset-path ~no/x", "--dataset-path must exist", "'~no/x'", "correct the path"),
    prepare("--output ~no/x", "--output must be a path without ~", "'~no/x'", "home folder"),
    prepare("--dataset tokenized", "--dataset must be one of", "'tokenized'", "choose one"),
    prepare("--dataset python_stdlib", "--dataset-path must not be set", "/corpus'", "remove it"),
    prepare("--dataset jsonl", "--dataset-path must hold *.jsonl", "/corpus'", "add them"),
    prepare("--output {place}/corpus/a", "--output must lie outside", "corpus/a'", "name another"),
    prepare("--workers 100000", "--workers must be at most", "got 100000", "as it has cores"),
    prepare("--workers 0", "--workers must be at least 1", "got 0", "use 1 or more"),
    prepare("--shard-size 0", "--shard-size must be at least 1", "got 0", "use 1 or more"),
    prepare("--output {place}/file", "--output must be a folder", "/file'", "name another one"),
    prepare("--tokenizer {place}/empty", "must hold tokenizer.json", "/empty'", "correct the path"),
    *(
        prepare(
            f"--tokenizer {{place}}/{folder}",
            *("--tokenizer must hold a readable tokenizer", f"/{folder}'", "download it again"),
        )
        for folder in ("not_json", "old")
    ),
    script("prepare", "--output {dump} --split half", "argument --split", "'half'", "choose from"),
]

SHELL = [
    script("slurm/one_node.sbatch", "", "CONFIG must come first", "got ''", "sbatch scripts/slurm"),
    script("slurm/one_node.sbatch", "no.toml", "CONFIG must be a TOML", "'no.toml'", "correct it"),
    script(
        "slurm/one_node.sbatch", "--training.steps 3", "CONFIG must come first", "training.steps"
    ),
    *(
        script(
            "slurm/four_nodes.sbatch",
            f"{{place}}/ok.toml {flag}{value}",
            *(f"{flag} must not be given", "the job sets it", "run_root"),
        )
        for flag, value in (
            *(("--job.dump-folder", "=x"), ("--job.dump_folder", " x")),
            ("--job.config-file", "=a"),
        )
    ),
    Row(
        "slurm/one_node.sbatch",
        "{place}/ok.toml",
        ("sbatch must be called in the repository root", "not in /"),
        env={"SLURM_SUBMIT_DIR": "/"},
    ),
]
"""Shell scripts."""

ROWS = COMMAND_LINES + FILES + SCRIPTS


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """The files that the rows name: shards, models and files with mistakes."""
    place = tmp_path_factory.mktemp("place")
    write_corpus(place / "corpus")
    (place / "empty").mkdir()
    (place / "file").write_text("not a folder")
    (place / "random.bin").write_bytes(bytes(range(128, 256)))
    os.mkfifo(place / "pipe")
    (place / "ok.toml").write_text('[model]\nflavor = "debugmodel"\n[lighthouse]\ntopk = 128\n')
    for name, tokenizer, settings in (
        ("not_json", "not JSON", "{}"),
        ("no_json", (Path(BYTE_TOKENIZER_PATH) / "tokenizer.json").read_text(), "[1]"),
        ("old", "{}", "{}"),
    ):
        (place / name).mkdir()
        (place / name / "tokenizer.json").write_text(tokenizer)
        (place / name / "tokenizer_config.json").write_text(settings)
    (place / "not_json" / "config.json").write_text("not JSON")
    (place / "old" / "tokenizer.model").write_bytes(b"an old one")
    (place / "prepared" / "train").mkdir(parents=True)
    (place / "prepared" / "train" / "manifest.json").write_text('{"format": 1}')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        save(random_model(FLAVORS["debugmodel"], 2048), place / "run", "debugmodel")
    (place / "grid" / "topk128").mkdir(parents=True)
    (place / "grid" / "topk128" / "cell.json").write_text('{"fields": {"topk": 128}')
    line = {"step": 1, "stage": 1, "loss_metrics/global_avg_loss": 2.0, "n_tokens_seen": 8}
    line["throughput(tps)"] = 8.0
    for name, content in (
        ("ran", json.dumps(line).encode() + b"\n"),
        ("partial", b'{"step": 1, "stage": 1, "loss_metrics/global_avg_loss": 2.0}\n'),
        ("silent", b""),
        ("garbled", b'["loss_metrics/global_avg_loss"]\n'),
        ("binary", bytes(range(128, 256))),
    ):
        (place / name).mkdir()
        (place / name / "metrics.jsonl").write_bytes(content)
    return place


@pytest.fixture
def call(place, tmp_path):
    """Makes the arguments and the environment of a row, and checks the results of its program."""
    dump = tmp_path / "dump"

    def arguments(row: Row) -> list[str]:
        toml = tmp_path / "run.toml"
        if row.toml is not None:
            toml.write_text(row.toml)
        paths = {"dump": dump, "place": place, "corpus": place / "corpus", "toml": toml}
        return shlex.split(row.args.format(**paths))

    def files() -> dict[str, tuple[int, int]]:
        found = [*tmp_path.rglob("*"), *place.rglob("*")]
        return {str(path): path.lstat()[6:9:2] for path in found if path.suffix != ".toml"}

    before = files()

    def check(row: Row, exit_code: int, out: str, err: str) -> None:
        assert exit_code == 2, err
        (line,) = [line for line in err.splitlines() if not LOGGED.match(line)]
        assert line.startswith("error: "), line
        assert "Traceback" not in out + err
        # In this order, and not one within another.
        assert re.search(".*".join(map(re.escape, row.parts)), line), (row.parts, line)
        assert files() == before

    return arguments, check


def main_of(program: str):
    module = train if program == "train" else importlib.import_module(COMMANDS[program][0])
    return module.main


@pytest.fixture
def alone(monkeypatch):
    """Fail if the program creates a process group or opens a connection. Restore its changes."""
    asked = []
    for owner, name in ((socket.socket, "connect"), (torch.distributed, "init_process_group")):
        monkeypatch.setattr(owner, name, lambda *args, name=name, **options: asked.append(name))
    handlers, environment = list(logger.handlers), dict(os.environ)
    yield
    logger.handlers[:] = handlers
    os.environ.clear()
    os.environ.update(environment)
    assert not asked


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_one_line_says_what_to_do(row, call, alone, monkeypatch, capsys):
    arguments, check = call
    for name, value in row.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", [row.program, *arguments(row)])
    main = main_of(row.program)
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main()
    check(row, end.value.code, *capsys.readouterr())


@pytest.fixture(scope="module")
def slowest(request):
    """CPU and wall seconds of each process, by row. The longest are printed at the end."""
    seconds = {}
    yield seconds
    with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
        for name, (cpu, wall) in sorted(seconds.items(), key=lambda item: -item[1][0])[:5]:
            print(f"\n{cpu:.1f} s of CPU, {wall:.1f} s: {name}", end="")


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_so_does_the_program_itself(row, call, slowest, tmp_path):
    arguments, check = call
    program = ["-m", "lighthouse_cli", row.program]
    if row.program == "train":
        program = ["-m", "torchtitan.experiments.lighthouse.train"]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    result = subprocess.run(
        [sys.executable, *program, *arguments(row)],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **row.env},
        capture_output=True,
        text=True,
        timeout=HANGS,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    slowest[row.name] = (cpu, time.monotonic() - start)
    check(row, result.returncode, result.stdout, result.stderr)
    assert cpu < LIMIT


@pytest.mark.parametrize("row", SHELL, ids=[row.name for row in SHELL])
def test_a_program_of_the_shell_says_it_as_well(row, call, tmp_path):
    arguments, check = call
    # Use a copy, because jobs write into their repository.
    shutil.copytree(ROOT / "scripts", tmp_path / "checkout" / "scripts")
    job = {"SLURM_SUBMIT_DIR": str(tmp_path / "checkout"), "SLURM_JOB_ID": "1"}
    result = subprocess.run(
        ["bash", f"scripts/{row.program}", *arguments(row)],
        cwd=tmp_path / "checkout",
        env={**os.environ, **job, "SLURM_JOB_NAME": "test", "PYTHONPATH": "", **row.env},
        capture_output=True,
        text=True,
        timeout=HANGS,
    )
    assert not (tmp_path / "checkout" / "outputs").exists()
    shutil.rmtree(tmp_path / "checkout")
    check(row, result.returncode, result.stdout, result.stderr)


def test_the_table_is_long_enough_and_says_nothing_twice():
    names = [row.name for row in ROWS + SHELL]
    assert len(names) >= 100 and len({*names}) == len(names)
