"""Tokens per second of a training run in both stages, on this machine's device.

    scripts/bench_training.py                                # 268M, 98,304 tokens, one GPU
    scripts/bench_training.py --flavor debugmodel --seq-len 4096 --topk 128 --device-dtype float32

Trains a few steps with Lighthouse and a few dense through the trainer itself and prints the median
of each stage, the first steps left out. The last line of the output is one JSON object.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from torchtitan.experiments.lighthouse.metrics import LOSS, TOKENS_PER_SECOND, read_metrics

WARM_UP = 2
"""Steps of each stage that are not counted: kernels compile, memory is first taken."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--flavor", default="268M")
    add("--seq-len", type=int, default=98304)
    add("--topk", type=int, default=1536)
    add("--steps", type=int, default=6, help="of each stage")
    add("--device-dtype", default="bfloat16", choices=["bfloat16", "float32"])
    add("--compile", action="store_true")
    add("--activation-checkpoint", default="selective", choices=["none", "selective", "full"])
    options = parser.parse_args()
    result = run(options)
    print(
        f"{options.flavor}, {options.seq_len:,} tokens: {result['lighthouse']:,.0f} tokens/s with "
        f"Lighthouse, {result['dense']:,.0f} dense: {result['speed_up']:.2f}x; peak memory "
        f"{result['memory_gib'][0]:.1f} and {result['memory_gib'][1]:.1f} GiB"
    )
    print(json.dumps(result))


def run(options: argparse.Namespace) -> dict:
    """Train in a folder of its own and read the metrics."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "torchtitan.experiments.lighthouse.train",
            "--job.dump_folder", folder, "--model.flavor", options.flavor,
            "--training.seq_len", str(options.seq_len), "--training.local_batch_size", "1",
            "--training.steps", str(2 * options.steps), "--training.mixed_precision_param",
            options.device_dtype, "--lighthouse.topk", str(options.topk),
            "--lighthouse.stage1_steps", str(options.steps),
            "--activation_checkpoint.mode", options.activation_checkpoint,
            "--activation_checkpoint.selective_ac_option", "op",
            "--optimizer.implementation", "foreach", "--metrics.log_freq", "1",
            *(["--compile.enable"] if options.compile else []),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stdout[-4000:] + done.stderr[-4000:])
        lines = read_metrics(Path(folder), LOSS)
    rates, memory = [], []
    for stage in (1, 2):
        counted = [line for line in lines if line["stage"] == stage][WARM_UP:]
        rates.append(statistics.median(line[TOKENS_PER_SECOND] for line in counted))
        memory.append(max(line["memory/max_active(GiB)"] for line in counted))
    return {
        **vars(options),
        "lighthouse": rates[0],
        "dense": rates[1],
        "speed_up": rates[0] / rates[1],
        "memory_gib": memory,
    }


if __name__ == "__main__":
    main()
