#!/usr/bin/env python3
"""Train for a long time and watch memory, open files, threads and processes of the run.

    scripts/soak.py train_configs/debug.toml --output outputs/soak --minutes 60 \\
        --training.steps 1000000 --lighthouse.stage1_steps 3000

Further arguments override the configuration. After --minutes, or on SIGTERM, SIGUSR1, SIGINT or
SIGHUP, the run is asked to stop. It ends with this program, however that ends. The samples come
from /proc every few seconds, so this needs Linux. The last quarter of the run is compared with the
second. The exit code is 1 if resident memory has grown by more than one percent, or the number of
files, threads or processes at all.

Writes samples.jsonl and soak.png to the folder of the run. The last printed line is JSON.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

from torchtitan.experiments.lighthouse.launch import (
    free_port,
    signals_to_stop,
    start,
    variables_of,
)
from torchtitan.experiments.lighthouse.metrics import LOSS, read_metrics
from torchtitan.experiments.lighthouse.runtime.command_line import Parser, check_output_folder
from torchtitan.experiments.lighthouse.runtime.plots import save, subplots
from torchtitan.experiments.lighthouse.runtime.signals import EXIT_CODE

MEMORY_GROWTH = 0.01
"""Allowed growth of resident memory from the second to the last quarter, as a share."""


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("config", type=Path, metavar="CONFIG")
    parser.add_argument("--output", type=Path, default=Path("outputs/soak"), metavar="FOLDER")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="until it is stopped")
    parser.add_argument("--every", type=float, default=5.0, metavar="SECONDS")
    options, overrides = parser.parse_known_args()
    for name in ("every", "minutes"):
        if not getattr(options, name) > 0:
            parser.error(f"--{name} must be above 0, got {getattr(options, name)}; leave it out")
    try:
        check_output_folder("--output", options.output)
    except ValueError as error:
        parser.error(str(error))
    options.output.mkdir(parents=True, exist_ok=True)
    args = ["--job.config_file", str(options.config), "--job.dump_folder", str(options.output)]
    samples, code = watch([*args, *overrides], options)
    if code not in (0, EXIT_CODE):
        raise SystemExit(f"the run ended with {code}; see {options.output}/log.txt")
    if len(samples) < 4:
        raise SystemExit(f"the run was too short to compare, with {len(samples)} samples")
    result = compare(samples, options.output)
    plot(samples, result, options.output / "soak.png")
    print(json.dumps(result))
    raise SystemExit(0 if result["is_flat"] else 1)


def watch(args: list[str], options: argparse.Namespace) -> tuple[list[dict], int]:
    """Train in a process of its own until it ends. Returns the samples and the exit code."""
    samples = []
    begin = time.monotonic()
    with (
        (options.output / "log.txt").open("w") as log,
        (options.output / "samples.jsonl").open("w") as file,
        signals_to_stop() as asked,
    ):
        # As a rank, the trainer ends when this process does.
        process = start(args, {**os.environ, **variables_of(0, 1, free_port())}, log)
        try:
            while process.poll() is None:
                seconds = time.monotonic() - begin
                if held := held_by(process.pid):
                    samples.append({"seconds": round(seconds, 1), **held})
                    file.write(json.dumps(samples[-1]) + "\n")
                    file.flush()
                if asked or seconds > 60 * options.minutes:
                    # The trainer ignores it until it handles signals.
                    process.terminate()
                time.sleep(options.every)
        finally:
            process.kill()
            process.wait()
    return samples, process.returncode


def held_by(pid: int) -> dict[str, int] | None:
    """What a process and its descendants hold now; None if it has ended."""
    held = {"memory_bytes": 0, "files": 0, "threads": 0, "processes": 0}
    waiting = [pid]
    try:
        while waiting:
            one = Path("/proc") / str(waiting.pop())
            pages = int((one / "statm").read_text().split()[1])
            held["memory_bytes"] += pages * os.sysconf("SC_PAGE_SIZE")
            held["files"] += len(list((one / "fd").iterdir()))
            tasks = list((one / "task").iterdir())
            held["threads"] += len(tasks)
            held["processes"] += 1
            for task in tasks:
                waiting += map(int, (task / "children").read_text().split())
    except (OSError, IndexError):
        # One ended while it was looked at.
        return None
    return held


def compare(samples: list[dict], folder: Path) -> dict:
    """The second quarter of a run and its last, each by its median; of memory by its largest."""
    quarter = len(samples) // 4
    parts = {"second": samples[quarter : 2 * quarter], "last": samples[3 * quarter :]}
    names = ("files", "threads", "processes")
    last_steps = {f"stage {line['stage']}": line["step"] for line in read_metrics(folder, LOSS)}
    result = {
        "minutes": round(samples[-1]["seconds"] / 60, 1),
        "last_step": last_steps,
        "samples": len(samples),
    }
    for part, found in parts.items():
        result[part] = {"memory_bytes": max(sample["memory_bytes"] for sample in found)} | {
            name: int(statistics.median(sample[name] for sample in found)) for name in names
        }
    second, last = result["second"], result["last"]
    result["memory_growth"] = round(last["memory_bytes"] / second["memory_bytes"] - 1, 5)
    result["is_flat"] = result["memory_growth"] <= MEMORY_GROWTH and all(
        last[name] <= second[name] for name in names
    )
    return result


def plot(samples: list[dict], result: dict, path: Path) -> None:
    """What was held over time."""
    figure, panels = subplots(2, 1, sharex=True, figsize=(8, 5))
    minutes = [sample["seconds"] / 60 for sample in samples]
    panels[0].plot(minutes, [sample["memory_bytes"] / 2**30 for sample in samples])
    panels[0].set_ylabel("resident memory (GiB)")
    panels[0].set_ylim(bottom=0)
    for name in ("files", "threads", "processes"):
        panels[1].plot(minutes, [sample[name] for sample in samples], label=name)
    panels[1].set_ylim(bottom=0)
    panels[1].legend()
    panels[1].set_xlabel("minutes")
    steps = max(result["last_step"].values())
    figure.suptitle(f"{result['minutes']} minutes, {steps:,} steps")
    save(figure, path)


if __name__ == "__main__":
    main()
