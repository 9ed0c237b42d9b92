"""Wrong command lines and files end every program with one line that says what to do.

A row is a call of a program and three parts of its message: the field, the value and the remedy.
For every row, the exit code is 2 and stderr has one line without a traceback. Nothing is written,
no process group is created, and the network is not used.
"""

import importlib
import json
import os
import re
import resource
import shlex
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

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
    "--training.dataset text --training.dataset_path {place}/corpus "
    "--validation.dataset text --validation.dataset_path {place}/corpus "
)

LOGGED = re.compile(r"\[titan\] |\d{4}-\d\d-\d\d |W\d{4} ")


@dataclass(frozen=True)
class Row:
    """A wrong call."""

    program: str
    args: str
    """Arguments as typed. {dump}, {place} and {toml} are paths."""

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


def file(toml: str, *parts: str) -> Row:
    """A wrong TOML file as the only argument of the trainer."""
    return Row("train", "--job.dump_folder {dump} --job.config_file {toml}", parts, toml)


def config(path: str, *parts: str) -> Row:
    return Row("train", f"--job.dump_folder {{dump}} --job.config_file {path}", parts)


def script(name: str, args: str, *parts: str, toml: str | None = None) -> Row:
    return Row(name, args, parts, toml)


HF = "--checkpoint.initial_load_in_hf --checkpoint.initial_load_model_only"

COMMAND_LINES = [
    # Misspelt fields, wrong sections, wrong types.
    run("--training.stepz 4", "--training.stepz is not a field", "mean --training.steps?"),
    run("--trainin.steps 4", "--trainin.steps is not a field", "mean --training.steps?"),
    run("--steps 4", "--steps is not a field", "mean --training.steps or --validation.steps?"),
    run("-training.steps 4", "Unrecognized options: -training.steps, 4", "see --help"),
    run("--training.steps 4 8", "Unrecognized options: 8", "see --help"),
    run("--training.steps four", "parsing --training.steps: ", "int() ", "'four'; see --help"),
    run("--training.steps 1e3", "parsing --training.steps: ", "int() ", "'1e3'; see --help"),
    run("--training.steps ''", "parsing --training.steps: ", "int() ", "''; see --help"),
    run("--training.steps", "Missing value for argument '--training.steps'", "see --help"),
    run("--optimizer.lr 0,001", "parsing --optimizer.lr: ", "to float: '0,001'; see --help"),
    run("--checkpoint.enable false", "--checkpoint.enable", "'false'", "--checkpoint.no_enable"),
    run("--checkpoint.enable=true", "--checkpoint.enable", "'true'", "write --checkpoint.enable"),
    Row("train", "", ("--job.config_file must name", "got no arguments", "debug.toml is a small")),
    run("--optimizer.steps 4", "--optimizer.steps is not", "mean --training.steps or --validation"),
    run("--no-checkpoint.enable", "--no-checkpoint.enable is not", "mean --checkpoint.enable?"),
    run("--lighthouse.full_attn_layers [0,1]", "attn_layers must be", "'[0,1]'", "layers 0 1"),
    run("--lighthouse.full_attn_layers=0,-1", "attn_layers must be", "'0,-1'", "layers 0 -1"),
    *(
        run(f"{flag} {value}", f"choice '{value}' for argument '{flag.replace('_', '-')}'", choices)
        for flag, value, choices in (
            ("--lighthouse.sdpa_backend", "math", "one of ('cudnn', 'flash'"),
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
    run("--training.steps -1", "training.steps must be at least 1", "got -1", "use 1 or more"),
    run(
        f"--training.steps {10**25}",
        *("training.steps must be a number of 64 bits", "got 2**83 or more", "a smaller one"),
    ),
    run("--training.seq_len 0", "training.seq_len must be at least 1", "got 0", "use 1 or more"),
    run("--training.seq_len -5", "training.seq_len must be at least 1", "got -5", "use 1 or more"),
    run(
        "--training.seq_len 1000000000000",
        *("training.seq_len must be", "got 1000000000000", "nearest with topk 128: 1073741824"),
    ),
    run(
        "--training.local_batch_size -1",
        *("training.local_batch_size must be at least 1", "got -1", "use 1 or more"),
    ),
    run(
        "--training.local_batch_size 4 --training.global_batch_size 6",
        *("training.global_batch_size must be a multiple", "got 6", "nearest: 4, or -1"),
    ),
    run(
        f"--training.global_batch_size -{10**18}",
        *("training.global_batch_size must be a multiple", f"got -{10**18}", "nearest: 1, or -1"),
    ),
    run("--training.max_norm 0", "training.max_norm must be above 0", "got 0", "1.0 is common"),
    run("--training.max_norm -1.5", "training.max_norm must be above 0", "got -1.5", "1.0 is"),
    run("--training.max_norm nan", "training.max_norm must be a number", "got nan", "write one"),
    run(
        f"--training.local_batch_size {2**40}",
        *("training.local_batch_size must be less than 1048576", f"got {2**40}", "lower it"),
    ),
    run("--training.max_skipped_steps -1", "max_skipped_steps must be", "got -1", "use 0 or more"),
    run("--optimizer.lr 1e39", "optimizer.lr must be a finite", "at most 1000, got 1e+39", "1e-3"),
    run("--training.gc_freq 0", "training.gc_freq must be at least 1", "got 0", "use 1 or more"),
    run("--metrics.log_freq -3", "metrics.log_freq must be at least 1", "got -3", "use 1 or more"),
    run("--optimizer.lr 0", "optimizer.lr must be a finite number above 0", "got 0.0", "1e-3"),
    run("--optimizer.lr -1e-3", "optimizer.lr must be a finite number", "got -0.001", "1e-3"),
    run("--optimizer.lr nan", "optimizer.lr must be a number", "got nan", "write one"),
    run("--optimizer.lr inf", "optimizer.lr must be a finite number", "got inf", "1e-3"),
    run("--optimizer.eps 0", "optimizer.eps must be a finite number", "got 0.0", "1e-8"),
    run("--optimizer.beta1 1", "optimizer.beta1 must be at least 0", "got 1.0", "0.9 and 0.95"),
    run("--optimizer.beta2 -0.1", "optimizer.beta2 must be", "got -0.1", "0.9 and 0.95"),
    run("--optimizer.weight_decay -1", "optimizer.weight_decay must", "got -1.0", "0.1 is"),
    run("--optimizer.name SGD", "optimizer.name must be one of Adam, AdamW", "'SGD'", "choose one"),
    run(
        "--optimizer.early_step_in_backward",
        *("optimizer.early_step_in_backward must be false", "got true", "remove it"),
    ),
    run("--lr_scheduler.warmup_steps -1", "lr_scheduler.warmup_steps", "got -1", "use 0 or more"),
    run(
        "--lr_scheduler.warmup_steps 300",
        *("lr_scheduler.warmup_steps must be at most the 60 steps", "got 300", "lower it"),
    ),
    run(
        "--lr_scheduler.total_steps 30",
        *("lr_scheduler.total_steps must be at least training.steps, 60", "got 30", "raise it"),
    ),
    run("--lr_scheduler.decay_ratio 1.5", "lr_scheduler.decay_ratio", "got 1.5", "a share of all"),
    run("--lr_scheduler.min_lr_factor -1", "lr_scheduler.min_lr_factor", "got -1.0", "a share of"),
    run("--debug.seed -1", "debug.seed must be from 0 to 2**64 - 1", "got -1", "leave it out"),
    run(f"--debug.seed {2**64}", "debug.seed must be from 0", f"got {2**64}", "leave it out"),
    run("--comm.init_timeout_seconds 0", "comm.init_timeout_seconds", "got 0", "use 1 or more"),
    run("--comm.train_timeout_seconds -9", "comm.train_timeout_seconds", "got -9", "use 1 or"),
    run("--comm.trace_buf_size -1", "comm.trace_buf_size", "got -1", "use 0 or more"),
    run(
        "--profiling.enable_profiling --profiling.profile_freq 0",
        *("profiling.profile_freq must be at least 1", "got 0", "use 1 or more"),
    ),
    run(
        "--profiling.enable_profiling --profiling.profile_freq 3",
        *("profiling.profile_freq must be at least 4", "got 3", "use 4 or more"),
    ),
    run(
        "--activation_checkpoint.memory_budget 1.5",
        *("activation_checkpoint.memory_budget must be from 0 to 1", "got 1.5", "0.5 is"),
    ),
    run(
        "--activation_checkpoint.selective_ac_option 0",
        *("activation_checkpoint.selective_ac_option must be 'op' or", "got '0'", "use 2"),
    ),
    # Validation.
    run("--validation.enable --validation.steps 0", "validation.steps", "got 0", "use 1 or more"),
    run("--validation.enable --validation.freq -1", "validation.freq", "got -1", "use 1 or more"),
    run(
        "--validation.enable --validation.seq_len 4096",
        *("validation.seq_len must be from 1 to training.seq_len, 2048", "got 4096", "lower it"),
    ),
    run(
        "--validation.enable --validation.seq_len 100",
        *("validation.seq_len must be a multiple", "got 100", "nearest with topk 128: 2048"),
    ),
    # Lighthouse, alone and together.
    run("--lighthouse.num_levels 1", "lighthouse.num_levels must be", "got 1", "use 2 or more"),
    run("--lighthouse.num_levels 99999999", "lighthouse.num_levels", "got 99999999", "use 30 or"),
    run("--lighthouse.pooling_factor 3", "lighthouse.pooling_factor", "got 3", "nearest: 2"),
    run(
        "--lighthouse.pooling_factor 1000000000001",
        *("lighthouse.pooling_factor", "got 1000000000001", "nearest: 1073741824"),
    ),
    run(
        "--lighthouse.topk -1000000000000", "lighthouse.topk", "got -1000000000000", "nearest: 128"
    ),
    run("--lighthouse.topk 1500", "lighthouse.topk", "got 1500", "nearest: 128"),
    run("--lighthouse.topk 256", "lighthouse.topk", "got topk 256", "topk 128, or seq_len 4096"),
    run(
        "--lighthouse.num_levels 8",
        *("training.seq_len", "num_levels=8", "got 2048", "nearest with topk 128: 2097152"),
    ),
    run("--lighthouse.scorer loud", "lighthouse.scorer must be one of norm", "'loud'", "choose"),
    run("--lighthouse.dilation 0", "lighthouse.dilation must be", "got 0", "use 1 or more"),
    run("--lighthouse.full_attn_layers 0 4", "full_attn_layers must be", "got 4", "remove it"),
    run("--lighthouse.stage1_steps 61", "lighthouse.stage1_steps must", "got 61", "raise training"),
    run("--lighthouse.stage1_steps -2", "lighthouse.stage1_steps must", "got -2", "lower it"),
    run(
        "--lighthouse.full_attn_layers 0 1 2 -1",
        *("full_attn_layers must be fewer than all 4", "[0, 1, 2, -1]", "stage1_steps to 0 for"),
    ),
    run(
        "--lighthouse.stage2_seq_len 768", "stage2_seq_len must", "got 768", "nearest: 512 or 1024"
    ),
    run("--lighthouse.stage2_full_steps 2", "stage2_full_steps must be 0", "got 2", "set it to 0"),
    run(
        "--lighthouse.stage2_seq_len 512 --lighthouse.stage2_full_steps 21",
        *("stage2_full_steps must be from 0", "got 21", "use 20"),
    ),
    run("--lighthouse.telemetry_freq -1", "lighthouse.telemetry_freq", "got -1", "use 0 or more"),
    # Parallelism.
    run("--parallelism.tensor_parallel_degree 0", "tensor_parallel_degree", "got 0", "use 1"),
    run(
        "--parallelism.tensor_parallel_degree 3",
        *("parallelism.tensor_parallel_degree must be a divisor of the 2", "got 3", "use 1 or 2"),
    ),
    run(
        "--parallelism.data_parallel_shard_degree 2",
        *("data_parallel_shard_degree must be the 1 processes", "got 2", "set it to -1 or 1"),
    ),
    run(
        "--parallelism.data_parallel_shard_degree 3 --parallelism.tensor_parallel_degree 2",
        *("must be the 5 processes divided by the other degrees, 2", "got 3", "start 6 processes"),
        WORLD_SIZE="5",
    ),
    run("", "WORLD_SIZE must be the number of processes", "got 'two'", "unset", WORLD_SIZE="two"),
    run("", "RANK must be the number of this", "got '5'", "unset it", RANK="5", LOCAL_RANK="5"),
    run("", "RANK must be the number of this process", "got '-1'", "unset it", RANK="-1"),
    run("", "LOCAL_RANK must be the number of this", "got 'one'", "unset it", LOCAL_RANK="one"),
    run("", "MASTER_PORT must be a port", "got 'http'", "unset it", MASTER_PORT="http"),
    run(
        "--parallelism.context_parallel_degree 2",
        *("lighthouse.topk must be a multiple of 256", "got 128", "topk 256 with seq_len 4096"),
        WORLD_SIZE="2",
    ),
    run(
        "--parallelism.context_parallel_degree 4 --lighthouse.stage1_steps 0",
        *(
            "parallelism.context_parallel_degree must be a divisor of",
            "got 4",
            "use 1 or 2, or 'ring'",
        ),
        WORLD_SIZE="4",
    ),
    run(
        "--parallelism.tensor_parallel_degree 2 --training.seq_len 2050",
        *("training.seq_len must be a multiple of twice", "got 2050", "nearest: 2048"),
        WORLD_SIZE="2",
    ),
    run(
        "--parallelism.data_parallel_replicate_degree 2 --parallelism.tensor_parallel_degree 2",
        *("parallelism.data_parallel_replicate_degree must be 1", "got 2", "more than 4 processes"),
        WORLD_SIZE="4",
    ),
    run(
        "--parallelism.pipeline_parallel_degree 2",
        *("parallelism.pipeline_parallel_degree must be 1", "got 2", "use data, context or"),
    ),
    run(
        "--parallelism.expert_parallel_degree 2",
        *("parallelism.expert_parallel_degree must be 1", "got 2", "remove it"),
    ),
    run(
        "--parallelism.enable_async_tensor_parallel",
        *("parallelism.enable_async_tensor_parallel", "got true", "set compile.enable to true"),
    ),
    run(
        "--training.enable_cpu_offload",
        *("training.enable_cpu_offload must be false", "got true", "start more processes"),
    ),
    # Features that this machine or this program does not have.
    run("--model.converters float8", "model.converters must be one of", "got 'float8'", "choose"),
    run(
        "--model.converters quantize.linear.float8",
        *("model.converters must be left out on a CPU", "got 'quantize.linear.float8'", "remove"),
    ),
    run("--compile.components loss,modle", "compile.components", "got 'modle'", "mean model?"),
    run(
        "--compile.enable --compile.backend inductr",
        *("compile.backend must be one of", "got 'inductr'", "did you mean inductor?"),
    ),
    run(
        "--activation_checkpoint.mode memory_budget",
        *("activation_checkpoint.mode must be", "got 'memory_budget'", "set compile.enable to"),
    ),
    run(
        "--activation_checkpoint.determinism_check maybe",
        *("activation_checkpoint.determinism_check must be one of", "got 'maybe'", "choose one"),
    ),
    run(
        "--profiling.enable_profiling",
        *("profiling.enable_profiling must be false on a CPU", "got true", "remove it"),
    ),
    run(
        "--profiling.enable_memory_snapshot",
        *("profiling.enable_memory_snapshot must be false on a CPU", "got true", "remove it"),
    ),
    run(
        "--checkpoint.enable --checkpoint.async_mode async_with_pinned_mem",
        *("checkpoint.async_mode must be", "got 'async_with_pinned_mem'", "use async"),
    ),
    run("--training.gc_debug", "training.gc_debug must be false on a CPU", "got true", "remove it"),
    run(
        "--checkpoint.initial_load_in_hf_quantized",
        *(
            "checkpoint.initial_load_in_hf_quantized must be false",
            "got true",
            "initial_load_in_hf to true",
        ),
    ),
    run("--comm.mode local_tensor", "comm.mode must be one of", "'local_tensor'", "choose one"),
    run("--comm.mode fake_backend", "comm.mode must be", "got 'fake_backend'", "set the variable"),
    run("--fault_tolerance.enable", "fault_tolerance.enable must", "got true", "remove it"),
    run("--memory_estimation.enable", "memory_estimation.enable", "got true", "lighthouse plan"),
    run(
        "--experimental.custom_import no_such_module",
        *("experimental.custom_import must be a module", "got 'no_such_module'", "correct the"),
    ),
    # Model and tokenizer.
    run("--model.name llama3", "model.name must be one of", "got 'llama3'", "choose one"),
    run("--model.flavor 530m", "model.flavor must be one of", "got '530m'", "did you mean 530M?"),
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
    run("--training.dataset jsonl", "training.dataset_path", "/corpus'", "add such files"),
    run("--training.dataset python_stdlib", "training.dataset_path must not", "/corpus'", "remove"),
    run(
        "--training.dataset tokenized",
        *(
            "training.dataset_path must be a folder with a prepared",
            "/corpus'",
            "lighthouse prepare",
        ),
    ),
    run(
        "--training.dataset tokenized --training.dataset_path {place}/prepared",
        *("training.dataset_path must hold a readable manifest", "manifest.json'", "restore it"),
    ),
    run("--training.dataloader.num_workers 2", "dataloader.num_workers", "got 2", "set it to 1"),
    run(
        "--training.dataloader.prefetch_factor 2",
        *("training.dataloader.prefetch_factor", "got 2", "num_workers to 1"),
    ),
    # Output folders.
    run("--job.dump_folder ''", "job.dump_folder must be the name", "got ''", "./outputs"),
    run("--job.dump_folder {place}/file", "job.dump_folder must be a folder", "/file'", "another"),
    run("--job.dump_folder {place}/file/run", "job.dump_folder must be", "/file/run'", "another"),
    run("--job.dump_folder /dev/null/run", "job.dump_folder must be", "/dev/null/run'", "another"),
    run(f"--job.dump_folder {{place}}/{'a' * 300}", "job.dump_folder", "aaa", "name another"),
    run("--job.save_config_file ../c.json", "job.save_config_file", "got '../c.json'", "without"),
    run("--metrics.save_tb_folder /tmp/tb", "metrics.save_tb_folder", "got '/tmp/tb'", "without"),
    run("--profiling.save_traces_folder ..", "profiling.save_traces_folder", "'..'", "without"),
    run("--comm.save_traces_folder a/../../b", "comm.save_traces_folder", "a/../../b", "without"),
    run("--checkpoint.folder /tmp/c", "checkpoint.folder must be", "got '/tmp/c'", "without a"),
    run("--checkpoint.folder ../c", "checkpoint.folder must be", "got '../c'", "without a"),
    run(
        "--checkpoint.enable --checkpoint.folder metrics.jsonl",
        *("checkpoint.folder must be another name", "got 'metrics.jsonl'", "name another folder"),
    ),
    run("--checkpoint.folder .", "checkpoint.folder must be", "got '.'", "without a leading"),
    # Checkpoints.
    run("--checkpoint.enable --checkpoint.interval 0", "checkpoint.interval", "got 0", "use 1"),
    run("--checkpoint.enable --checkpoint.keep_latest_k 1", "keep_latest_k must", "got 1", "use 2"),
    run("--checkpoint.enable --checkpoint.load_step 7", "checkpoint.load_step", "got 7", "use -1"),
    run("--checkpoint.create_seed_checkpoint", "checkpoint.enable must", "got false", "set it to"),
    run(
        "--checkpoint.enable --checkpoint.exclude_from_loading optimiser",
        *("checkpoint.exclude_from_loading", "got 'optimiser'", "did you mean optimizer?"),
    ),
    run(
        "--checkpoint.enable --checkpoint.initial_load_path {place}/no",
        *("checkpoint.initial_load_path must be the folder", "/no'", "correct the path"),
    ),
    run(
        "--checkpoint.enable --checkpoint.initial_load_path {place}/empty",
        *("checkpoint.initial_load_path must hold a whole", "/empty'", "name an older one"),
    ),
    run(
        f"--checkpoint.enable {HF} --checkpoint.initial_load_path {{place}}/empty",
        *("config.json' must be the configuration of a model", "No such file", "name a folder"),
    ),
    run(
        f"--checkpoint.enable {HF} --checkpoint.initial_load_path {{place}}/not_json",
        *("config.json' must be the configuration of a model", "Expecting", "name a folder"),
    ),
]
"""Calls of the trainer."""

FILES = [
    config(
        "{place}/no.toml", "job.config_file must be a readable TOML file", "no.toml'", "correct the"
    ),
    config(
        "{place}/empty", "job.config_file must be a readable TOML file", "/empty'", "correct the"
    ),
    config("{place}/pipe", "job.config_file must be a readable TOML file", "/pipe'", "correct the"),
    config(
        "/dev/zero", "job.config_file must be a readable TOML file", "/dev/zero'", "correct the"
    ),
    config("{place}/random.bin", "job.config_file must be a readable", "random.bin'", "correct"),
    config("''", "--job.config_file must be followed by a file", "name one"),
    config(
        "{place}/no.toml --job.config_file=a.toml",
        *("--job.config_file must be given once", "no.toml and a.toml", "name one file"),
    ),
    file("", "job.config_file must set a field", "run.toml'", "correct the path"),
    file("# nothing\n", "job.config_file must set a field", "run.toml'", "correct the path"),
    file("steps: 60\n", "job.config_file must be a readable TOML file", "line 1", "correct the"),
    file(
        "[training\nsteps = 6",
        "job.config_file must be a readable TOML file",
        "line 1",
        "correct the",
    ),
    file(
        "[training]\nsteps = 6\nsteps = 7",
        "must be a readable TOML file",
        "Cannot overwrite a value",
        "correct",
    ),
    file("[training]\nstep = 60", "training.step is not a field", "did you mean steps?"),
    file("[training]\nsteps = 1e2", "training.steps must be int", "got 100.0", "write 100"),
    file("[optimizer]\nseq_len = 60", "optimizer.seq_len is not", "mean training.seq_len or"),
    file("a = " + 9000 * "[", "job.config_file must be a readable TOML", "too deeply", "correct"),
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
    file(
        '[lighthouse]\nfull_attn_layers = ["0"]',
        *("lighthouse.full_attn_layers must be list[int]", "got ['0']", "change its type"),
    ),
    file('[compile]\ncomponents = "model"', "compile.components must", "got 'model'", "change its"),
    file('[lighthouse]\nsdpa_backend = "math"', "sdpa_backend must be one of", "'math'", "choose"),
    file('[training]\ndtype = "fp16"', "training.dtype must be one of", "got 'fp16'", "choose one"),
    file("[debug]\nseed = 'x'", "debug.seed must be int | None", "got 'x'", "change its type"),
    file(
        "[training.dataloader]\nnum_worker = 1", "dataloader.num_worker is not", "mean num_workers?"
    ),
    file('[job]\ncustom_config_module = "x"', "custom_config_module", "'x'", "remove it"),
]
"""Files given to the trainer."""

MODEL = "{place}/run/checkpoint/step-1"

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
    script("plan", "", "the following arguments are required: config", "see --help"),
    script("plan", "{toml} --world-size two", "--world-size", "'two'", "see --help", toml="a = 1"),
    script("plan", "{place}/ok.toml --world-size 0", "--world-size must", "got 0", "use 1 or more"),
    script("plan", "{place}/no.toml --world-size 1", "job.config_file", "no.toml'", "correct the"),
    script("plan", "{place}/ok.toml --world-size 1 --gpu H9", "--gpu must", "'H9'", "choose one"),
    script("plan", "{place}/ok.toml --world-size 1 --jsn", "--jsn is not a field", "see --help"),
    script(
        "plan",
        "{place}/ok.toml --world-size 3 --parallelism.context_parallel_degree 2",
        *("data_parallel_shard_degree must be the 3", "got -1", "a multiple of 2 processes"),
    ),
    script(
        "plan",
        "{place}/ok.toml --world-size 2 --parallelism.tensor_parallel_degree 2",
        *("parallelism.tensor_parallel_degree must be 1", "got 2", ";"),
    ),
    script("sweep", "{place}/ok.toml", "arguments are required: --output", "see --help"),
    script(
        "sweep", "{place}/no.toml --output {dump}", "job.config_file", "no.toml'", "correct the"
    ),
    script(
        "sweep", "{place}/ok.toml --output {place}/file", "--output must be", "/file'", "another"
    ),
    script(
        "sweep",
        "{place}/ok.toml --output {dump} --nproc 0",
        "--world-size",
        "got 0",
        "use 1 or more",
    ),
    script(
        "sweep",
        "{place}/ok.toml --output {dump} --grid {place}/no.toml",
        *("--grid must be a TOML file", "no.toml'", "correct it"),
    ),
    script(
        "sweep",
        "{place}/ok.toml --output {dump} --grid {place}/random.bin",
        *("--grid must be a TOML file", "random.bin'", "correct it"),
    ),
    script(
        "sweep",
        "{place}/ok.toml --output {dump} --grid '{{topk = }}'",
        *("--grid must be an inline table", "{topk = }", "correct it"),
    ),
    script(
        "sweep",
        "{place}/ok.toml --output {dump} --grid '{{}}'",
        *("--grid must name a field", "'{}'", "leave it out"),
    ),
    script(
        "sweep",
        "{place}/ok.toml --output {dump} --grid '{{topks = [128]}}'",
        *("--grid: topks is not a field", "use scorer, pooling_factor"),
    ),
    script(
        "sweep",
        "{place}/ok.toml --output {dump} --grid '{{topk = 128}}'",
        *("--grid: topk must be a list", "got 128", "write one"),
    ),
    script(
        "sweep",
        "{place}/ok.toml --output {dump} --grid '{{seed = [\"0\"]}}'",
        *("--grid: seed must be a list of numbers", "got '0'", "change its type"),
    ),
    script(
        "sweep",
        "{place}/ok.toml --output {dump} --grid '{{stage1_share = [1.5]}}'",
        *("--grid: stage1_share must be from 0 to 1", "got 1.5", "as a part of training.steps"),
    ),
    script(
        "sweep",
        "{place}/ok.toml --output {dump} --run --grid '{{topk = [100]}}'",
        *("--grid must have a legal cell", "got none", "see --list"),
    ),
    script(
        "sweep",
        "{place}/ok.toml --output {dump} --collect",
        *("--output must hold cells", "got none", "use --run"),
    ),
    script(
        "sweep",
        "{place}/ok.toml --output {place}/grid --collect",
        *("--output must hold undamaged cell.json files", "cell.json'", "remove the folder"),
    ),
    script(
        "sweep",
        "{place}/ok.toml --output {dump} --run --job.dump_folder elsewhere",
        *("--job.dump_folder must not be given", "since a cell sets it", "leave it out"),
    ),
    script("export", MODEL, "--output FOLDER must be given", "see --help"),
    script(
        "export",
        "{place}/no --output {dump}",
        "a model must be a whole",
        "/no'",
        "correct the path",
    ),
    script(
        "export",
        "{place}/run/checkpoint --output {dump}",
        *("a model must be a whole", "/run/checkpoint'", "name /", "/step-1"),
    ),
    script(
        "export",
        f"{MODEL} --output {{place}}/file",
        "--output must be a folder",
        "/file'",
        "another one",
    ),
    script(
        "export",
        f"{MODEL} --output {{place}}/corpus",
        "--output must be a new",
        "/corpus'",
        "another",
    ),
    script(
        "export",
        f"{MODEL} --output {{dump}} --dtype float16",
        "--dtype",
        "'float16'",
        "choose from",
    ),
    script(
        "export", f"{MODEL} --output {{dump}} --flavor 53M", "--flavor must be", "'53M'", "choose"
    ),
    script(
        "export",
        f"{MODEL} --output {{dump}} --flavor 10M",
        "--flavor must be",
        "'10M'",
        "use debug",
    ),
    script(
        "export",
        f"{MODEL} --output {{dump}} --max-seq-len 0",
        *("--max-seq-len must", "got 0", "use 1"),
    ),
    script(
        "export",
        f"{MODEL} --output {{dump}} --tokenizer {{place}}/not_json",
        *("--tokenizer must hold a readable tokenizer", "/not_json'", "download it again"),
    ),
    script("eval-loss", "", "the following arguments are required: MODEL", "see --help"),
    script("eval-loss", "{place}/no", "a model must be a whole", "/no'", "correct the path"),
    script("eval-loss", f"{MODEL} --windows 0", "--windows must be", "got 0", "use 1 or more"),
    script("eval-loss", f"{MODEL} --seq-len -4", "--seq-len must be", "got -4", "use 1 or more"),
    script("eval-loss", f"{MODEL} --device gpu", "--device must be", "'gpu'", "use cpu"),
    script("eval-loss", f"{MODEL} --device cuda:99", "--device must be", "'cuda:99'", "use cpu"),
    script("eval-loss", f"{MODEL} --output {{place}}/file", "--output must", "/file'", "another"),
    script("eval-loss", f"{MODEL} --dataset pile", "argument --dataset", "'pile'", "choose from"),
    script(
        "eval-loss", f"{MODEL} --dataset text", "dataset_path must be", "'text', got None", "the"
    ),
    script(
        "eval-loss",
        f"{MODEL} --lighthouse topk=12",
        *("--lighthouse for", "topk must be a positive multiple", "got 12", "nearest: 128"),
    ),
    script("eval-loss", f"{MODEL} --lighthouse k=12", "--lighthouse must set", "'k=12'", "write"),
    script("eval-loss", f"{MODEL} --lighthouse topk=a", "--lighthouse topk", "'a'", "a number"),
    script("eval-loss", "{place}/not_json", "config.json' must be", "Expecting", "name a folder"),
    script("eval-passkey", "", "name either MODEL or --make-data N FILE", "see --help"),
    script("eval-passkey", "{place}/empty", "a model must be a whole", "/empty'", "correct the"),
    script("eval-passkey", f"{MODEL} --lengths 9", "--lengths must be", "got 9", "use longer ones"),
    script("eval-passkey", f"{MODEL} --lengths a", "argument --lengths", "'a'", "see --help"),
    script("eval-passkey", f"{MODEL} --device tpu", "--device must be", "'tpu'", "use cpu"),
    script(
        "eval-passkey",
        "--make-data 0 {dump}/x.jsonl --lengths 256",
        *("--make-data must be followed by a number and a file", "'0'", "give both"),
    ),
    script(
        "eval-passkey",
        "--make-data 4 {dump}/x.jsonl --lengths 256 9",
        *("--lengths must be at least", "got 9", "use longer ones"),
    ),
    script(
        "eval-passkey",
        "--make-data 4 {dump}/x.jsonl --lengths 256 --filler-words 2 -1",
        *("--filler-words must be at least 0", "got -1", "use 0 for a new word"),
    ),
    script(
        "eval-passkey",
        "--make-data 4 {dump}/x.jsonl --lengths 256 --questions 0",
        *("--questions must be at least 1", "got 0", "use 1 for the form"),
    ),
    script(
        "eval-passkey",
        "--make-data 4 {dump}/x.jsonl --lengths 256 --min-distance -1",
        *("--min-distance must be at least 0", "got -1", "use 0 for any distance"),
    ),
    script(
        "eval-passkey",
        "--make-data 4 {dump}/x.jsonl --lengths 256 --min-distance 256",
        *("--lengths must be at least", "--min-distance", "got 256", "use longer ones"),
    ),
    script(
        "eval-passkey",
        "--make-data 4 {place}/file/x.jsonl --lengths 256",
        *("the folder of --make-data FILE must be", "/file'", "name another one"),
    ),
    script(
        "eval-passkey",
        "--make-data 4 {dump}/x.jsonl --lengths 256 --tokenizer {place}/no",
        *("--tokenizer must hold tokenizer.json", "/no'", "correct the path"),
    ),
    script("report", "", "the following arguments are required: RUN", "see --help"),
    script("report", "{place}/no --output {dump}", "a run must be a folder", "/no'", "correct the"),
    script(
        "report", "{place}/silent --output {dump}", "a run must have", "/silent'", "leave it out"
    ),
    script("report", "{place}/garbled --output {dump}", "a run must have", "/garbled'", "leave it"),
    script("report", "{place}/binary --output {dump}", "a run must have", "/binary'", "leave it"),
    script(
        "report", "{place}/partial --output {dump}", "metrics.jsonl", "/partial'", "remove that"
    ),
    script(
        "report", "{place}/ran --output {place}/file", "--output must be", "/file'", "another one"
    ),
    script(
        "report",
        "{place}/ran {place}/ran --output {dump}",
        *("every run must be a different folder", "got one twice", "remove it"),
    ),
    script("prepare", "", "the following arguments are required: --output", "see --help"),
    script("prepare", "--output {dump}", "--dataset must be one of", "got None", "choose one"),
    script("prepare", "--output {dump} --dataset c4", "--dataset must be", "'c4'", "choose one"),
    script("prepare", "--output {dump} --dataset text", "--dataset-path must", "'text', got None"),
    script("prepare", "--output {dump} --verify", "--output must hold", "'", "correct the path"),
    script(
        "prepare",
        "--output {dump} --dataset text --dataset-path {place}/no",
        *("--dataset-path must exist", "/no'", "correct the path"),
    ),
    script(
        "prepare",
        "--output {dump} --dataset text --dataset-path {place}/corpus --workers 0",
        *("--workers must be at least 1", "got 0", "use 1 or more"),
    ),
    script(
        "prepare",
        "--output {dump} --dataset text --dataset-path {place}/corpus --shard-size -1",
        *("--shard-size must be at least 1", "got -1", "use 1 or more"),
    ),
    script(
        "prepare",
        "--output {place}/file --dataset text --dataset-path {place}/corpus",
        *("--output must be a folder", "/file'", "name another one"),
    ),
    script(
        "prepare",
        "--output {dump} --dataset text --dataset-path {place}/corpus --tokenizer {place}/not_json",
        *("--tokenizer must hold a readable", "/not_json'", "download it"),
    ),
    script("prepare", "--output {dump} --split half", "argument --split", "'half'", "choose from"),
]

SHELL = [
    script("slurm/one_node.sbatch", "", "CONFIG must come first", "got ''", "sbatch scripts/slurm"),
    script("slurm/one_node.sbatch", "no.toml", "CONFIG must be a TOML", "'no.toml'", "correct it"),
    script(
        "slurm/four_nodes.sbatch",
        "{place}/ok.toml --job.dump-folder=x",
        *("--job.dump-folder must not be given", "the job sets it", "run_root"),
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
        return shlex.split(row.args.format(dump=dump, place=place, toml=toml))

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
