"""Train in two stages and dense on the same text, compare, and write down what came of it.

    outputs/quickstart/report.md      settings, losses at the switch and at the end, speed
    outputs/quickstart/loss.png       both loss curves, the switch marked
    outputs/quickstart/summary.json   the figures of the report

Both runs see the same batches in the same order, so that their difference, step by step, shows
the stage switch through the noise of the text. A finished run is reused, an unfinished one goes on
from its last checkpoint, and one with other settings starts again.
"""

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np
import tomli
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.experiments.lighthouse.byte_tokenizer import BYTE_TOKENIZER_PATH
from torchtitan.experiments.lighthouse.corpora import open_documents
from torchtitan.experiments.lighthouse.generate import generate, load_dense_model
from torchtitan.experiments.lighthouse.metrics import (
    LOSS,
    TOKENS_PER_SECOND,
    VALIDATION_LOSS,
    read_metrics,
)

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
WINDOW = 10
"""Steps over which losses are averaged around the switch and in the plot."""

PROMPT = "def read_lines(path):\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default=ROOT / "train_configs" / "quickstart.toml", type=Path)
    parser.add_argument("--output", default=ROOT / "outputs" / "quickstart", type=Path)
    options = parser.parse_args()
    runs = {
        "two stages": train("two stages", options.config, options.output / "two_stages"),
        "dense": train(
            "dense", options.config, options.output / "dense", "--lighthouse.stage1_steps", "0"
        ),
    }
    config = tomli.loads(options.config.read_text())
    summary = summarize(runs, config)
    sample = sample_text(runs["two stages"], config)
    (options.output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    (options.output / "report.md").write_text(report(summary, config, sample))
    plot(runs, summary, options.output / "loss.png")
    print(headline(summary))
    for name in ("report.md", "loss.png", "summary.json"):
        print(f"  {options.output / name}")


def train(name: str, config: Path, folder: Path, *overrides: str) -> Path:
    """Train, or finish, or reuse the run in `folder`; shows its progress. Returns the folder."""
    settings = config.read_text() + " ".join(overrides)
    steps = tomli.loads(config.read_text())["training"]["steps"]
    settings_file = folder / "settings.txt"
    if folder.exists() and (not settings_file.exists() or settings_file.read_text() != settings):
        shutil.rmtree(folder)
    finished = folder / "finished"
    if finished.exists():
        print(f"{name}: reusing {folder}")
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    settings_file.write_text(settings)
    command = [
        sys.executable, "-m", "torchtitan.experiments.lighthouse.train",
        "--job.config_file", str(config), "--job.dump_folder", str(folder), *overrides,
    ]  # fmt: skip
    start = time.monotonic()
    with (folder / "log.txt").open("a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        while process.poll() is None:
            show_progress(name, folder, steps, start)
            time.sleep(0.5)
    show_progress(name, folder, steps, start)
    print()
    if process.returncode:
        tail = "\n".join((folder / "log.txt").read_text().splitlines()[-20:])
        raise SystemExit(f"{tail}\n{name}: training failed; the whole log is {folder / 'log.txt'}")
    finished.touch()
    return folder


def show_progress(name: str, folder: Path, steps: int, start: float) -> None:
    if not (folder / "metrics.jsonl").exists() or not (lines := read_metrics(folder, LOSS)):
        status = "starting ..."
    else:
        last = lines[-1]
        done = round(20 * last["step"] / steps)
        attention = {1: "stage 1, Lighthouse", 2: "stage 2, dense"}[last["stage"]]
        status = (
            f"[{'#' * done}{'.' * (20 - done)}] step {last['step']}/{steps}  {attention}  "
            f"loss {last[LOSS]:.2f}  {last[TOKENS_PER_SECOND]:,.0f} tokens/s"
        )
    end = "\r" if sys.stdout.isatty() else "\n"
    line = f"{name}: {status}  {time.monotonic() - start:.0f} s"
    if end == "\r" or line.split("  ")[0] != getattr(show_progress, "last", None):
        print(line.ljust(110), end=end, flush=True)
    show_progress.last = line.split("  ")[0]


def summarize(runs: dict[str, Path], config: dict) -> dict:
    """The figures of the report, from the metrics of the runs."""
    switch, seq_len = config["lighthouse"]["stage1_steps"], config["training"]["seq_len"]
    two, dense = (losses(runs[name]) for name in ("two stages", "dense"))
    difference = smooth(two - dense)
    before = float(difference[switch - 1])
    after = difference[switch:]
    peak = float((two - dense)[switch : switch + WINDOW].max())
    recovered = np.flatnonzero(after <= before)
    held_out = {
        (line["step"], line["stage"]): line[VALIDATION_LOSS]
        for line in read_metrics(runs["two stages"], VALIDATION_LOSS)
    }
    handover = json.loads((runs["two stages"] / "handover.json").read_text())
    rate = {
        "stage 1, Lighthouse": throughput(runs["two stages"], 1),
        "stage 2, dense": throughput(runs["two stages"], 2),
        "dense run": throughput(runs["dense"], 2),
    }
    seconds = {name: training_seconds(folder, seq_len) for name, folder in runs.items()}
    return {
        "machine": f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}",
        "settings": config,
        "corpus_unigram_entropy_nats": unigram_entropy(),
        "switch_step": switch,
        "held_out_at_switch": {
            "lighthouse": held_out[switch, 1],
            "dense": held_out[switch, 2],
            "spike_nats": held_out[switch, 2] - held_out[switch, 1],
        },
        "training_at_switch": {
            "two_stages_minus_dense_before": before,
            "two_stages_minus_dense_peak": peak,
            "spike_nats": peak - before,
            "steps_to_recover": int(recovered[0]) + 1 if len(recovered) else None,
        },
        "final_training_loss": {"two_stages": mean_end(two), "dense": mean_end(dense)},
        "final_held_out_loss": {
            name.replace(" ", "_"): read_metrics(folder, VALIDATION_LOSS)[-1][VALIDATION_LOSS]
            for name, folder in runs.items()
        },
        "tokens_per_second": rate,
        "stage_1_speed_up": rate["stage 1, Lighthouse"] / rate["dense run"],
        "training_seconds": seconds,
        "whole_run_speed_up": seconds["dense"] / seconds["two stages"],
        "handover": handover,
    }


def losses(folder: Path) -> np.ndarray:
    """Training loss of every step."""
    return np.array([line[LOSS] for line in read_metrics(folder, LOSS)])


def smooth(values: np.ndarray) -> np.ndarray:
    """Mean of the last `WINDOW` values at every step."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    end = np.arange(1, len(values) + 1)
    start = np.maximum(0, end - WINDOW)
    return (sums[end] - sums[start]) / (end - start)


def mean_end(values: np.ndarray) -> float:
    return float(values[-WINDOW:].mean())


def throughput(folder: Path, stage: int) -> float:
    """Median tokens per second of a stage."""
    lines = [line for line in read_metrics(folder, LOSS) if line["stage"] == stage]
    return statistics.median(line[TOKENS_PER_SECOND] for line in lines)


def training_seconds(folder: Path, seq_len: int) -> float:
    """Seconds in training steps, validation and checkpoints left out."""
    return sum(seq_len / line[TOKENS_PER_SECOND] for line in read_metrics(folder, LOSS))


def unigram_entropy() -> float:
    """Entropy of a byte of the training text, in nats: what a model without context can reach."""
    documents = open_documents("python_stdlib", None, "train", 0, 1)
    counts = np.zeros(256)
    for text, _ in documents.read(0, 0, 0, None):
        counts += np.bincount(np.frombuffer(text.encode(), np.uint8), minlength=256)
    frequencies = counts[counts > 0] / counts.sum()
    return float(-(frequencies * np.log(frequencies)).sum())


def sample_text(folder: Path, config: dict) -> str:
    """What the final dense model makes of `PROMPT`."""
    checkpoint = folder / "checkpoint" / f"step-{config['training']['steps']}"
    model = load_dense_model(config["model"]["flavor"], checkpoint, max_seq_len=512)
    tokenizer = HuggingFaceTokenizer(BYTE_TOKENIZER_PATH)
    tokens = generate(model, tokenizer.encode(PROMPT), num_tokens=300, temperature=0.7, seed=0)
    return PROMPT + tokenizer.decode(tokens)


def headline(summary: dict) -> str:
    final, switch = summary["final_held_out_loss"], summary["training_at_switch"]
    steps = switch["steps_to_recover"]
    recovery = f"recovered in {steps} steps" if steps else "not recovered within the run"
    return (
        f"Stage 1 trained {summary['stage_1_speed_up']:.1f} times as fast as dense attention, the "
        f"whole run {summary['whole_run_speed_up']:.1f} times. The switch to dense attention after "
        f"step {summary['switch_step']} cost {switch['spike_nats']:.2f} nats, {recovery}. "
        f"Final held-out loss: {final['two_stages']:.3f} in two stages, {final['dense']:.3f} dense."
    )


def report(summary: dict, config: dict, sample: str) -> str:
    training, lighthouse = config["training"], config["lighthouse"]
    at_switch, spike = summary["held_out_at_switch"], summary["training_at_switch"]
    final, rate = summary["final_held_out_loss"], summary["tokens_per_second"]
    final_training = summary["final_training_loss"]
    seconds = summary["training_seconds"]
    recovery = spike["steps_to_recover"] or "more than the run has"
    rows = "\n".join(f"| {name} | {value:,.0f} |" for name, value in rate.items())
    return f"""# Quick start: sparse first, dense at the end

{headline(summary)}

![Training loss of both runs](loss.png)

## What was run

A model of flavor `{config["model"]["flavor"]}` read {training["steps"]} batches of
{training["seq_len"]:,} bytes of Python's standard library, once in two stages
({lighthouse["stage1_steps"]} steps with Lighthouse Attention, then
{training["steps"] - lighthouse["stage1_steps"]} dense) and once dense throughout, with the same
start, data and optimizer. Machine: {summary["machine"]}.

## What came of it

Losses are in nats per byte. A model that knows only how frequent each byte is reaches
{summary["corpus_unigram_entropy_nats"]:.2f}.

| | two stages | dense |
|---|---|---|
| final loss, held-out text | {final["two_stages"]:.3f} | {final["dense"]:.3f} |
| final loss, training text, mean of {WINDOW} steps | {final_training["two_stages"]:.3f} \
| {final_training["dense"]:.3f} |
| seconds in training steps | {seconds["two stages"]:.0f} | {seconds["dense"]:.0f} |

| at the switch, after step {summary["switch_step"]} | |
|---|---|
| held-out loss of the same weights, attended with Lighthouse | {at_switch["lighthouse"]:.3f} |
| held-out loss of the same weights, attended densely | {at_switch["dense"]:.3f} |
| training loss, two stages minus dense run, before | \
{spike["two_stages_minus_dense_before"]:+.3f} |
| the same, highest of the {WINDOW} steps after | {spike["two_stages_minus_dense_peak"]:+.3f} |
| spike | {spike["spike_nats"]:.3f} nats |
| steps until the difference was back | {recovery} |

| tokens per second | |
|---|---|
{rows}

The hand-over between the stages is recorded in `two_stages/handover.json`: parameters and optimizer
state before and after the switch have the same digests.

## What the dense model writes

Sampled at temperature 0.7 after the prompt `{PROMPT.strip()}`; {training["steps"]} small steps
make no programmer.

```
{sample}
```
"""


def plot(runs: dict[str, Path], summary: dict, path: Path) -> None:
    """Loss of both runs above, their difference below."""
    two, dense = (losses(runs[name]) for name in ("two stages", "dense"))
    steps, switch = np.arange(1, len(two) + 1), summary["switch_step"]
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(9, 7), sharex=True, height_ratios=[3, 2], layout="constrained"
    )
    for values, label, color in ((dense, "dense", "tab:gray"), (two, "two stages", "tab:orange")):
        top.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
        top.plot(steps, smooth(values), color=color, label=label)
    entropy = summary["corpus_unigram_entropy_nats"]
    top.axhline(entropy, color="tab:blue", linestyle=":", label="unigram entropy of the text")
    top.set(ylabel="training loss (nats per byte)", ylim=(min(two.min(), dense.min()) - 0.1, 5))
    top.set_title(
        f"Same data, same start: stage 1 at {summary['stage_1_speed_up']:.1f} times "
        "the speed of dense attention"
    )
    bottom.plot(steps, two - dense, color="tab:orange", alpha=0.35, linewidth=0.8)
    bottom.plot(steps, smooth(two - dense), color="tab:orange")
    bottom.axhline(0, color="black", linewidth=0.8)
    bottom.set(xlabel="step", ylabel="two stages minus dense")
    for axes in (top, bottom):
        axes.axvline(switch + 0.5, color="black", linestyle="--", linewidth=1)
    top.annotate(
        "switch: Lighthouse to dense", (switch + 0.5, 4.6), xytext=(6, 0),
        textcoords="offset points",
    )  # fmt: skip
    top.legend(loc="lower left")
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
