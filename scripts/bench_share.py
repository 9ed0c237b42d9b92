#!/usr/bin/env python3
"""Measure one rank of a run on many ranks: tokens per second and peak memory, on one device.

    scripts/bench_share.py train_configs/1m_context.toml --world-size 32

Trains a few steps as rank 0 of the given number of ranks, with its part of the parameters, the
sequence and the heads. torchtitan's fake backend returns a rank's own data instead of that of other
ranks. Memory and computation are therefore those of the real run, but communication and losses are
not. Measures stage 1, or stage 2 with `--lighthouse.stage1_steps 0`, on pieces if the configuration
has them. The last line of the output is one JSON object. Further arguments override the
configuration.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from bench_training import WARM_UP, check_steps
from torchtitan.experiments.lighthouse.metrics import LOSS, TOKENS_PER_SECOND, read_metrics
from torchtitan.experiments.lighthouse.runtime.command_line import Parser


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--world-size", type=int, required=True)
    parser.add_argument("--steps", type=int, default=5)
    options, overrides = parser.parse_known_args()
    check_steps(parser, options.steps)
    title = f"{options.config.stem}, a share of 1/{options.world_size}, {' '.join(overrides)}"
    lines = train(options, overrides)[WARM_UP:]
    if not lines:
        print(f"{title}: does not fit into the memory of this device")
        return
    result = {
        "config": str(options.config),
        "ranks": options.world_size,
        "overrides": overrides,
        "stage": lines[-1]["stage"],
        "phase": lines[-1]["phase"],
        "tokens_per_second": statistics.median(line[TOKENS_PER_SECOND] for line in lines),
        "memory_gib": max(line["memory/max_active(GiB)"] for line in lines),
    }
    print(
        f"{title}: {result['tokens_per_second']:,.0f} tokens/s, "
        f"peak memory {result['memory_gib']:.1f} GiB"
    )
    print(json.dumps(result))


def train(options: argparse.Namespace, overrides: list[str]) -> list[dict]:
    """The metrics of each step of a run in a temporary folder. Empty if memory is short."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "torchtitan.experiments.lighthouse.train",
            "--job.config_file", str(options.config), "--job.dump_folder", folder,
            "--comm.mode", "fake_backend", "--training.dataset", "python_stdlib",
            "--training.steps", str(options.steps), "--lighthouse.stage1_steps", "-1",
            "--lighthouse.stage2_full_steps", "0",
            "--lr_scheduler.warmup_steps", "0",
            "--checkpoint.no_enable", "--validation.no_enable", "--metrics.log_freq", "1",
            *overrides,
        ]  # fmt: skip
        environment = {**os.environ, "NGPU": str(options.world_size)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if "OutOfMemoryError" in done.stderr:
            return []
        if done.returncode:
            raise SystemExit(done.stdout[-4000:] + done.stderr[-4000:])
        return read_metrics(Path(folder), LOSS)


if __name__ == "__main__":
    main()
