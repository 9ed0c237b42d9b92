"""Compare runs: their losses, what the switch to dense attention cost, and their speed.

    scripts/report.py outputs/two_stages outputs/other --dense outputs/dense --out outputs/report

Reads `metrics.jsonl` in the dump folder of each run, finished or not, and writes

    report.md   what the switch cost and when that was made up for, in words, and a table
    loss.png    training and held-out loss, each switch marked
"""

import os
from pathlib import Path

import matplotlib
import numpy as np
from torchtitan.experiments.lighthouse.analysis.run_metrics import (
    WINDOW,
    Run,
    read_run,
    smooth,
    summarize_run,
)
from torchtitan.experiments.lighthouse.runtime.command_line import (
    Parser,
    check_output_folder,
    exit_on_value_error,
)

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROWS = {
    "steps": ("steps", ","),
    "tokens_seen": ("tokens seen", ","),
    "final_held_out_loss": ("final loss, held-out text", ".4f"),
    "final_training_loss": (f"final loss, training text, mean of {WINDOW} lines", ".4f"),
    "switch_step": ("last step with Lighthouse", ","),
    "held_out_before_switch": ("held-out loss there, attended with Lighthouse", ".4f"),
    "held_out_after_switch": ("held-out loss there, attended densely", ".4f"),
    "spike_nats": ("spike at the switch, nats", "+.4f"),
    "recovery_step": ("spike made up for at step", ","),
    "crossing_step": ("held-out loss at most that of the dense run from step", ","),
    "stage_1_tokens_per_second": ("stage 1, Lighthouse, tokens/s per device", ",.0f"),
    "stage_2_tokens_per_second": ("stage 2, dense, tokens/s per device", ",.0f"),
    "stage_1_speed_up": ("speed-up of stage 1", ".2f"),
    "whole_run_speed_up": ("speed-up of the whole run", ".2f"),
    "device_hours": ("device-hours in training steps", ".3g"),
}
"""What the table calls each figure, and how it writes it."""


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="dump folder of a run")
    parser.add_argument("--dense", type=Path, metavar="RUN", help="the dense run to compare with")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="default: report/ in that of the first run",
    )
    options = parser.parse_args()
    options.out = options.out or options.runs[0] / "report"
    folders = options.runs + [options.dense] * (options.dense is not None)
    with exit_on_value_error():
        runs = dict(zip(names_of(folders), map(read_run, folders), strict=True))
        check_output_folder("--out", options.out)
    dense = list(runs)[-1] if options.dense else None
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "report.md").write_text(report(runs, dense))
    plot(runs, dense, options.out / "loss.png")
    print(options.out / "report.md")
    print(options.out / "loss.png")


def names_of(folders: list[Path]) -> list[str]:
    """The names of the folders, as short as they can be told apart."""
    paths = [folder.resolve() for folder in folders]
    if len({path.name for path in paths}) == len(paths):
        return [path.name for path in paths]
    if len(set(paths)) < len(paths):
        raise ValueError("every run must be another folder, got one twice; leave it out")
    root = os.path.commonpath(paths)
    return [str(path.relative_to(root)) for path in paths]


def report(runs: dict[str, Run], dense: str | None) -> str:
    """The text of report.md.

    Args:
        dense: name of the dense run, or None.
    """
    columns = {
        name: summarize_run(run, runs[dense] if dense not in (None, name) else None)
        for name, run in runs.items()
    }
    header = [f"{name} (the dense run)" if name == dense else name for name in columns]
    rows = [
        f"| {label} | {' | '.join(written(c[key], form) for c in columns.values())} |"
        for key, (label, form) in ROWS.items()
        if dense or any(c[key] is not None for c in columns.values())
    ]
    sentences = "\n".join(f"- {sentence(name, c)}" for name, c in columns.items())
    over = f"the dense run, {dense}" if dense else "stage 2 of the same run"
    return f"""# {" and ".join(columns) if len(columns) < 3 else f"{len(columns)} runs"}

{sentences}

![Training and held-out loss](loss.png)

| | {" | ".join(header)} |
|---|{"---:|" * len(columns)}
{chr(10).join(rows)}

Losses are in nats per token. The spike is the difference between the held-out losses of the same
weights, attended densely and with Lighthouse; it is made up for at the first step validated in
stage 2 whose loss is at or below that with Lighthouse. A dash stands for what did not happen or was
not measured. Speeds are medians over the logged steps of a stage; the speed-up of
stage 1 is that over {over}.
"""


def written(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def sentence(name: str, c: dict) -> str:
    """What came of one run, in words."""
    parts = [f"**{name}**: {c['steps']:,} steps, {c['tokens_seen']:,} tokens"]
    if c["spike_nats"] is not None:
        made_up = "not made up for by the end"
        if c["recovery_step"] is not None:
            made_up = f"made up for {c['recovery_step'] - c['switch_step']:,} steps later"
        parts.append(
            f"the switch after step {c['switch_step']:,} took the held-out loss from "
            f"{c['held_out_before_switch']:.3f} to {c['held_out_after_switch']:.3f}, {made_up}"
        )
    elif c["switch_step"] is not None:
        parts.append(f"switch after step {c['switch_step']:,}, without validation on both sides")
    if c["crossing_step"] is not None:
        parts.append(
            f"held-out loss at most that of the dense run from step {c['crossing_step']:,} on"
        )
    if c["stage_1_speed_up"] is not None:
        parts.append(f"stage 1 at {c['stage_1_speed_up']:.2f} times the speed of dense attention")
    if c["final_held_out_loss"] is not None:
        parts.append(f"final held-out loss {c['final_held_out_loss']:.3f}")
    return "; ".join(parts) + "."


def plot(runs: dict[str, Run], dense: str | None, path: Path) -> None:
    """Training loss above, held-out loss below, over the steps."""
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(9, 8), sharex=True, layout="constrained")
    for i, (name, run) in enumerate(runs.items()):
        color = "tab:gray" if name == dense else f"C{i}"
        top.plot(run.steps, run.losses, color=color, alpha=0.25, linewidth=0.8)
        top.plot(run.steps, smooth(run.losses), color=color, label=name)
        steps = [step for step, _ in run.held_out]
        bottom.plot(steps, list(run.held_out.values()), color=color, marker=".", label=name)
        for axes in (top, bottom):
            if run.switch_step is not None:
                axes.axvline(run.switch_step, color=color, linestyle="--", linewidth=1)
    top.plot([], [], color="black", linestyle="--", linewidth=1, label="switch to dense attention")
    shown = np.concatenate([later_losses(run) for run in runs.values()])
    margin = 0.05 * (shown.max() - shown.min()) + 0.01
    for axes, what in ((top, "training loss"), (bottom, "held-out loss")):
        axes.set(ylabel=f"{what} (nats per token)")
        axes.set(ylim=(shown.min() - margin, shown.max() + margin))
    bottom.set(xlabel="step")
    top.legend(loc="upper right")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def later_losses(run: Run) -> np.ndarray:
    """Losses after the first tenth of a run, which falls from so high that it would hide them."""
    start = run.steps[0] + (run.steps[-1] - run.steps[0]) / 10
    held_out = [loss for (step, _), loss in run.held_out.items() if step >= start]
    return np.concatenate([smooth(run.losses)[run.steps >= start], held_out])
