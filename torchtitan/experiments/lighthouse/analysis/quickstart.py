"""Compare training in two stages with dense training for the same time, on the same text.

    outputs/quickstart/report.md      settings, losses after equal time and equal tokens, speed
    outputs/quickstart/loss.png       held-out loss of both runs over seconds, the switch marked
    outputs/quickstart/layer.png      milliseconds of a layer by sequence length
    outputs/quickstart/summary.json   the figures of the report

Both runs start from the same parameters and read the same batches in the same order. The dense run
stops at its first validation after the training time of the two stages. A finished run is reused,
an unfinished run resumes, and a run with other settings starts again.
"""

import dataclasses
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torchtitan.experiments.lighthouse.analysis.layer_times import (
    LayerTimes,
    measure_layer_times,
    plot_layer_times,
)
from torchtitan.experiments.lighthouse.analysis.run_metrics import Run, read_run, switch_of
from torchtitan.experiments.lighthouse.config.job_config import FULL, LIGHTHOUSE, PIECES
from torchtitan.experiments.lighthouse.flavors import FLAVORS
from torchtitan.experiments.lighthouse.inference.generate import generate
from torchtitan.experiments.lighthouse.inference.load_model import open_trained
from torchtitan.experiments.lighthouse.metrics import (
    FILE_NAME,
    LOSS,
    TOKENS_PER_SECOND,
    read_metrics,
)
from torchtitan.experiments.lighthouse.runtime.atomic_json import write_json
from torchtitan.experiments.lighthouse.runtime.command_line import Parser
from torchtitan.experiments.lighthouse.runtime.plots import (
    DENSE_COLOR,
    LIGHTHOUSE_COLOR,
    SWITCH_LINE,
    log_loss_axis,
    save,
    subplots,
)
from torchtitan.experiments.lighthouse.runtime.read_files import read_toml
from torchtitan.experiments.lighthouse.runtime.signals import EXIT_CODE
from tqdm import tqdm

from lighthouse import LighthouseConfig

PROMPT = "def read_lines(path):\n"
LAYER_LENGTHS = [2048, 4096, 8192, 16384]
"""Sequence lengths in layer.png, in tokens."""


def main(args: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--config", default=Path("train_configs/quickstart.toml"), type=Path)
    parser.add_argument("--output", default=Path("outputs/quickstart"), type=Path)
    options = parser.parse_args(args)
    config = read_toml(options.config)
    folders = {name: options.output / name for name in ("two_stages", "dense")}
    train(options.config, folders["two_stages"])
    two = read_run(folders["two_stages"])
    seconds = two.device_seconds()
    train(
        options.config,
        folders["dense"],
        *("--lighthouse.stage1_steps", "0"),
        *("--validation.freq", str(config["validation"]["freq"] // 2)),
        is_enough=lambda run: bool(run.held_out) and last_validated(run) >= seconds,
    )
    print("Measuring a layer at several lengths ...", flush=True)
    times = layer_times(config)
    dense = read_run(folders["dense"])
    summary = summarize(two, dense, times, config)
    write_json(options.output / "summary.json", summary)
    sample = sample_text(folders["two_stages"], config)
    (options.output / "report.md").write_text(report(summary, sample))
    plot(two, dense, summary, options.output / "loss.png")
    plot_layer_times(times, options.output / "layer.png")
    print(headline(summary))
    for name in ("report.md", "loss.png", "layer.png", "summary.json"):
        print(f"  {options.output / name}")


def train(
    config: Path,
    folder: Path,
    *overrides: str,
    is_enough: Callable[[Run], bool] = lambda run: False,
) -> None:
    """Train, resume or reuse the run in `folder`, with a progress bar.

    Args:
        is_enough: called repeatedly during the run. Once it returns True, the run is asked to save
            and stop.

    Raises:
        SystemExit: training failed.
    """
    name = folder.name.replace("_", " ")
    settings = config.read_text() + " ".join(overrides)
    settings_file, finished = folder / "settings.txt", folder / "finished"
    if folder.exists() and (not settings_file.exists() or settings_file.read_text() != settings):
        shutil.rmtree(folder)
    if finished.exists():
        print(f"{name}: reusing {folder}")
        return
    folder.mkdir(parents=True, exist_ok=True)
    settings_file.write_text(settings)
    command = [
        sys.executable, "-m", "torchtitan.experiments.lighthouse.train",
        "--job.config_file", str(config), "--job.dump_folder", str(folder), *overrides,
    ]  # fmt: skip
    progress = Progress(name, read_toml(config)["training"]["steps"])
    with (
        (folder / "log.txt").open("a") as log,
        progress.bar,
        subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT) as process,
    ):
        try:
            is_stopped = False
            while process.poll() is None:
                time.sleep(0.5)
                if (folder / FILE_NAME).exists() and (lines := read_metrics(folder, LOSS)):
                    progress.show(lines[-1])
                    if not is_stopped and is_enough(read_run(folder)):
                        is_stopped = True
                        process.send_signal(signal.SIGTERM)
        except BaseException:
            process.terminate()
            raise
    if process.returncode not in ((0, EXIT_CODE) if is_stopped else (0,)):
        tail = "\n".join((folder / "log.txt").read_text().splitlines()[-20:])
        raise SystemExit(f"{tail}\n{name}: training failed; the whole log is {folder / 'log.txt'}")
    finished.touch()


class Progress:
    """A progress bar on a terminal. Otherwise one line for each tenth of the run."""

    def __init__(self, name: str, steps: int):
        self.name, self.steps, self.tenth = name, steps, -1
        self.bar = tqdm(
            total=steps, desc=name, unit="step", disable=not sys.stdout.isatty(), file=sys.stdout
        )

    def show(self, line: dict) -> None:
        """Show a line of the metrics that has a training loss."""
        attention = {1: "Lighthouse", 2: "dense"}[line["stage"]]
        figures = f"{attention}, loss {line[LOSS]:.2f}, {line[TOKENS_PER_SECOND]:,.0f} tokens/s"
        self.bar.set_postfix_str(figures, refresh=False)
        self.bar.update(line["step"] - self.bar.n)
        tenth = 10 * line["step"] // self.steps
        if self.bar.disable and tenth != self.tenth:
            print(f"{self.name}: step {line['step']} of {self.steps}, {figures}", flush=True)
        self.tenth = tenth


def layer_times(config: dict) -> LayerTimes:
    """Layer times with the run's sizes, up to the run's sequence length."""
    model = FLAVORS[config["model"]["flavor"]]
    fields = {field.name for field in dataclasses.fields(LighthouseConfig)}
    attention = LighthouseConfig(**{k: v for k, v in config["lighthouse"].items() if k in fields})
    lengths = [n for n in LAYER_LENGTHS if n <= config["training"]["seq_len"]]
    return measure_layer_times(attention, model.n_heads, model.dim // model.n_heads, lengths)


def last_validated(run: Run) -> float:
    """Seconds of training until the last validation of a run on one device."""
    return float(run.at_validations(run.seconds())[-1])


def held_out_after(run: Run, amounts: np.ndarray, amount: float) -> float:
    """Held-out loss after `amount` of training, interpolated linearly between validations.

    Args:
        amounts: seconds or tokens so far, one for each line of the metrics.
        amount: seconds or tokens.
    """
    return float(np.interp(amount, run.at_validations(amounts), list(run.held_out.values())))


def summarize(two: Run, dense: Run, times: LayerTimes, config: dict) -> dict:
    """The figures of the report."""
    switch = switch_of(two)
    recovery = switch.recovery_step
    seconds = min(last_validated(two), last_validated(dense))
    tokens = min(two.tokens[-1], dense.tokens[-1])
    rates = {
        "stage 1, Lighthouse": two.rate(LIGHTHOUSE),
        "stage 2, dense in pieces": two.rate(PIECES),
        "stage 2, dense": two.rate(FULL),
        "dense run": dense.rate(FULL),
    }
    rates = {name: rate for name, rate in rates.items() if rate is not None}

    machine = [platform.machine(), platform.system(), f"Python {platform.python_version()}"]
    machine += [f"torch {torch.__version__}", f"{len(os.sched_getaffinity(0))} cores"]
    return {
        "machine": ", ".join(machine),
        "settings": config,
        "equal_time": {
            "seconds": seconds,
            "two_stages": held_out_after(two, two.seconds(), seconds),
            "dense": held_out_after(dense, dense.seconds(), seconds),
        },
        "equal_tokens": {
            "tokens": int(tokens),
            "two_stages": held_out_after(two, two.tokens, tokens),
            "dense": held_out_after(dense, dense.tokens, tokens),
        },
        "tokens_seen": {"two_stages": int(two.tokens[-1]), "dense": int(dense.tokens[-1])},
        "training_seconds": {
            "two_stages": two.device_seconds(),
            "dense": dense.device_seconds(),
        },
        "dense_seconds_for_all_tokens": float(two.tokens[-1] / rates["dense run"]),
        "held_out_at_switch": {
            "step": switch.step,
            "lighthouse": switch.lighthouse,
            "dense": switch.dense,
            "spike_nats": switch.spike,
            "steps_to_recover": None if recovery is None else recovery - switch.step,
        },
        "final_held_out_loss": {
            "two_stages": two.final_held_out(),
            "dense": dense.final_held_out(),
        },
        "tokens_per_second": rates,
        "stage_1_speed_up": rates["stage 1, Lighthouse"] / rates["dense run"],
        "layer_milliseconds": {**dataclasses.asdict(times), "crossing": times.crossing()},
    }


def sample_text(folder: Path, config: dict) -> str:
    """`PROMPT` with its continuation by the final dense model."""
    trained = open_trained(folder / "checkpoint" / f"step-{config['training']['steps']}")
    model, tokenizer = trained.load(max_seq_len=512), trained.tokenizer()
    tokens = generate(model, tokenizer.encode(PROMPT), num_tokens=300, temperature=0.7, seed=0)
    return PROMPT + tokenizer.decode(tokens)


def headline(summary: dict) -> str:
    """The result in three sentences."""
    equal, seen = summary["equal_time"], summary["tokens_seen"]
    difference = equal["dense"] - equal["two_stages"]
    order = "below" if difference > 0 else "above"
    return (
        f"After {equal['seconds']:.0f} seconds of training, the held-out loss of two stages is "
        f"{abs(difference):.2f} nats {order} that of dense attention: {equal['two_stages']:.3f} "
        f"against {equal['dense']:.3f}. Two stages read {seen['two_stages']:,} tokens. At its "
        f"measured speed, dense attention would need about "
        f"{summary['dense_seconds_for_all_tokens']:.0f} seconds for as many (an estimate)."
    )


def report(summary: dict, sample: str) -> str:
    """The text of report.md."""
    config = summary["settings"]
    training, lighthouse = config["training"], config["lighthouse"]
    return f"""# Quick start: two stages against dense attention

{headline(summary)}

![Held-out loss over seconds](loss.png)

## What was run

A Llama of flavor `{config["model"]["flavor"]}` was trained on Python's standard library, in
windows of {training["seq_len"]:,} bytes, from the same start with the same data and optimizer.

- Two stages: {lighthouse["stage1_steps"]} steps with Lighthouse Attention, then
  {training["steps"] - lighthouse["stage1_steps"]} steps with dense attention.
- Dense: dense attention throughout, for as many seconds.

Machine: {summary["machine"]}. All settings are in `summary.json`.
Losses are in nats per byte, on the same held-out text, in windows of
{config["validation"]["seq_len"]:,} tokens. Seconds are those of training
steps, without validation and checkpoints.

{results(summary)}
## What this shows

It shows the speed of training at one context length, as in the paper. It does not show that the
model uses distant context. A model this small hardly does. Dense training on short windows is then
a strong alternative, which this comparison leaves out. For 98,304 tokens and 16,000 steps, the
paper (arXiv 2605.06554) reports a final loss of 0.698 in two stages and 0.724 dense, at three
quarters of the cost.

`two_stages/handover.json` records the switch: parameters and optimizer state have the same digests
before and after it.

## What the dense model writes

Sampled at temperature 0.7 after the prompt `{PROMPT.strip()}`. A model this small does not learn to
program in {training["steps"]} steps.

```
{sample}
```
"""


def results(summary: dict) -> str:
    """The sections of report.md with tables."""
    time_, tokens = summary["equal_time"], summary["equal_tokens"]
    seen, switch = summary["tokens_seen"], summary["held_out_at_switch"]
    layer = summary["layer_milliseconds"]
    recovery = switch["steps_to_recover"]
    recovered = "did not recover within the run" if recovery is None else f"{recovery} steps"
    crossing = layer["crossing"]
    crossed = "One of them is faster at every length measured."
    if crossing is not None:
        crossed = f"Both take equally long at {crossing:,.0f} tokens."
    rates = "\n".join(f"| {name} | {v:,.0f} |" for name, v in summary["tokens_per_second"].items())
    layers = "\n".join(
        f"| {n:,} | {d:,.1f} | {s:,.1f} | {d / s:.2f} |"
        for n, d, s in zip(layer["seq_lens"], layer["dense"], layer["lighthouse"], strict=True)
    )
    return f"""## Results

| | two stages | dense |
|---|---|---|
| held-out loss after {time_["seconds"]:.0f} s | {time_["two_stages"]:.3f} | {time_["dense"]:.3f} |
| held-out loss after {tokens["tokens"]:,} tokens | {tokens["two_stages"]:.3f} | \
{tokens["dense"]:.3f} |
| tokens read | {seen["two_stages"]:,} | {seen["dense"]:,} |

Losses between two validations are interpolated linearly. After equal tokens, two stages may still
be in stage 1, where validation uses Lighthouse Attention. Its selection tells a little of later
tokens, so that loss is lower than a causal one.

| at the switch, after step {switch["step"]} | |
|---|---|
| held-out loss with Lighthouse Attention | {switch["lighthouse"]:.3f} |
| held-out loss of the same parameters with dense attention | {switch["dense"]:.3f} |
| dense steps until the loss recovered | {recovered} |

| tokens per second | |
|---|---|
{rates}

## One layer

Attention of one layer, forward and backward, in milliseconds. {crossed}

| tokens | dense | Lighthouse | dense / Lighthouse |
|---|---|---|---|
{layers}

![Milliseconds of a layer](layer.png)
"""


def plot(two: Run, dense: Run, summary: dict, path: Path) -> None:
    """Plot the held-out loss of both runs over seconds of training."""
    figure, axes = subplots(figsize=(10, 6))
    for name, run, color in (("dense", dense, DENSE_COLOR), ("two stages", two, LIGHTHOUSE_COLOR)):
        losses = list(run.held_out.values())
        axes.plot(run.at_validations(run.seconds()), losses, color=color, marker="o", label=name)
    switch = np.interp(two.switch_step, two.steps, two.seconds())
    label = "switch: Lighthouse to dense"
    axes.axvline(switch, color=LIGHTHOUSE_COLOR, label=label, **SWITCH_LINE)
    equal = summary["equal_time"]
    axes.set_title(
        f"After {equal['seconds']:.0f} s at {summary['settings']['training']['seq_len']:,} tokens: "
        f"{equal['two_stages']:.2f} in two stages, {equal['dense']:.2f} dense"
    )
    axes.set(xlabel="seconds of training", ylabel="held-out loss (nats per byte)")
    log_loss_axis(axes)
    axes.legend()
    save(figure, path)


if __name__ == "__main__":
    main()
