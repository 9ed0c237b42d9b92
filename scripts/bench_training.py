#!/usr/bin/env python3
"""Measure tokens per second of each phase of a training run, on this machine's device.

    scripts/bench_training.py --breakdown                    # 268M, 98,304 tokens, one GPU
    scripts/bench_training.py --flavor debugmodel --seq-len 4096 --topk 128 --dtype float32

Trains a few steps with Lighthouse, a few dense steps on pieces, and a few dense steps at full
length, with the real trainer. Prints the median of each phase without the first steps. With
`--breakdown` on a GPU, a second run is profiled, and the kernels of the last step of each phase are
classified. The last line of the output is one JSON object.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torchtitan.experiments.lighthouse.config.job_config import FULL, LIGHTHOUSE, PIECES
from torchtitan.experiments.lighthouse.metrics import LOSS, TOKENS_PER_SECOND, read_metrics
from torchtitan.experiments.lighthouse.runtime.command_line import Parser

WARM_UP = 2
"""Warm-up steps of each phase that are not counted. They compile kernels and allocate memory."""

PHASES = (LIGHTHOUSE, PIECES, FULL)

KINDS = {
    "score": r"norm_score_pool_kernel",
    "select": r"select_kernel",
    "gather": r"_gather_kernel",
    "gather backward": r"gather_backward_kernel",
    "scatter back": r"scatter_back_kernel",
    "scatter back backward": r"scatter_back_backward_kernel",
    "attention": r"sdpa|flash|fmha",
    "matrix products": r"gemm|gemv|nvjet|cutlass",
    "between ranks": r"nccl",
    "optimizer": r"multi_tensor_apply",
}
"""Kinds of kernels by parts of their names. The first match counts. All others are `other`."""


def main() -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--flavor", default="268M")
    add("--seq-len", type=int, default=98304)
    add("--stage2-seq-len", type=int, help="tokens of a piece; default: a quarter of --seq-len")
    add("--topk", type=int, default=1536)
    add("--steps", type=int, default=6, help="of each phase")
    add("--dtype", "--device-dtype", default="bfloat16", choices=["bfloat16", "float32"])
    add("--compile", action="store_true")
    add("--activation-checkpoint", default="selective", choices=["none", "selective", "full"])
    add("--breakdown", action="store_true", help="profile a second run, on a GPU")
    options = parser.parse_args()
    check_steps(parser, options.steps)
    if options.stage2_seq_len is None:
        options.stage2_seq_len = options.seq_len // 4
    if options.breakdown and not torch.cuda.is_available():
        parser.error("--breakdown needs a GPU, and there is none here; leave it out")
    result = run(options)
    if options.breakdown:
        result["breakdown_ms"] = profiled(options)
        print_breakdown(result["breakdown_ms"])
    print(
        f"{options.flavor}, {options.seq_len:,} tokens: {result['lighthouse']:,.0f} tokens/s with "
        f"Lighthouse, {result['dense']:,.0f} dense: {result['speed_up']:.2f}x, "
        f"{result['pieces']:,.0f} dense on pieces of {options.stage2_seq_len:,}; peak memory "
        f"{', '.join(f'{size:.1f}' for size in result['memory_gib'])} GiB "
        "(Lighthouse, pieces, dense)"
    )
    print(json.dumps(result))


def check_steps(parser: Parser, steps: int) -> None:
    """Refuse --steps that leave nothing to count."""
    if steps <= WARM_UP:
        parser.error(
            f"--steps must be more than the {WARM_UP} of warm-up, got {steps}; "
            f"use {WARM_UP + 1} or more"
        )


def run(options: argparse.Namespace) -> dict:
    """Train in a temporary folder and read the metrics."""
    with tempfile.TemporaryDirectory() as folder:
        train(options, folder)
        lines = read_metrics(Path(folder), LOSS)
    rates, memory = [], []
    for phase in PHASES:
        counted = [line for line in lines if line["phase"] == phase][WARM_UP:]
        rates.append(statistics.median(line[TOKENS_PER_SECOND] for line in counted))
        memory.append(max(line["memory/max_active(GiB)"] for line in counted))
    return {
        **vars(options),
        "lighthouse": rates[0],
        "pieces": rates[1],
        "dense": rates[2],
        "speed_up": rates[0] / rates[2],
        "memory_gib": memory,
    }


def profiled(options: argparse.Namespace) -> list[dict[str, float]]:
    """Milliseconds of the kernels of the last step of each phase, by kind."""
    profiling = [
        "--profiling.enable_profiling", "--profiling.profile_freq", str(options.steps),
        "--profiling.profiler_warmup", "1",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        train(options, folder, *profiling)
        traces = Path(folder) / "profile_traces"
        return [
            kernel_times(traces / f"iteration_{step}" / "rank0_trace.json")
            for step in (options.steps, 2 * options.steps, 3 * options.steps)
        ]


def kernel_times(trace: Path) -> dict[str, float]:
    """Milliseconds by kind of the kernels, copies included, in a Chrome trace of one step."""
    times = dict.fromkeys([*KINDS, "other"], 0.0)
    for event in json.loads(trace.read_text())["traceEvents"]:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            fitting = (kind for kind, names in KINDS.items() if re.search(names, event["name"]))
            times[next(fitting, "other")] += event["dur"] / 1e3
    return times


def print_breakdown(phases: list[dict[str, float]]) -> None:
    print(f"{'ms of a step':<24}{'Lighthouse':>12}{'pieces':>12}{'dense':>12}")
    for kind in phases[0]:
        print(f"{kind:<24}" + "".join(f"{times[kind]:12.2f}" for times in phases))
    print(f"{'in all':<24}" + "".join(f"{sum(times.values()):12.2f}" for times in phases))


def train(options: argparse.Namespace, folder: str, *overrides: str) -> None:
    """Train equally many steps of each phase in `folder`."""
    command = [
        sys.executable, "-m", "torchtitan.experiments.lighthouse.train",
        "--job.dump_folder", folder, "--model.flavor", options.flavor,
        "--training.seq_len", str(options.seq_len), "--training.local_batch_size", "1",
        "--training.steps", str(3 * options.steps), "--training.mixed_precision_param",
        options.dtype, "--lighthouse.topk", str(options.topk),
        "--lighthouse.stage1_steps", str(options.steps),
        "--lighthouse.stage2_seq_len", str(options.stage2_seq_len),
        "--lighthouse.stage2_full_steps", str(options.steps),
        "--activation_checkpoint.mode", options.activation_checkpoint,
        "--activation_checkpoint.selective_ac_option", "op",
        "--optimizer.implementation", "foreach", "--metrics.log_freq", "1",
        *(["--compile.enable"] if options.compile else []), *overrides,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout[-4000:] + done.stderr[-4000:])


if __name__ == "__main__":
    main()
