"""Compare runs: losses, the spike at the switch to dense attention, and speed.

    lighthouse report outputs/two_stages outputs/other --dense outputs/dense --output outputs/report

Reads `metrics.jsonl` in the dump folder of each run, finished or not, and writes

    report.md   the spike at the switch and the recovery in sentences, and a table
    loss.png    training and held-out loss over steps, tokens and time, each switch marked
"""

import os
from pathlib import Path

import numpy as np
from torchtitan.experiments.lighthouse.analysis.run_metrics import (
    WINDOW,
    Run,
    read_run,
    smooth,
    summarize_run,
    written,
)
from torchtitan.experiments.lighthouse.runtime.command_line import (
    Parser,
    check_output_folder,
    exit_on_value_error,
)
from torchtitan.experiments.lighthouse.runtime.plots import (
    DENSE_COLOR,
    LIGHTHOUSE_COLOR,
    OTHER_COLORS,
    SWITCH_LINE,
    log_loss_axis,
    save,
    subplots,
)

ROWS = {
    "steps": ("steps", ","),
    "tokens_seen": ("tokens seen", ","),
    "final_held_out_loss": ("final loss, held-out text", ".4f"),
    "final_training_loss": (f"final loss, training text, mean of {WINDOW} lines", ".4f"),
    "switch_step": ("last step with Lighthouse", ","),
    "held_out_before_switch": ("held-out loss there, Lighthouse Attention", ".4f"),
    "held_out_after_switch": ("held-out loss there, dense attention", ".4f"),
    "spike_nats": ("spike at the switch, nats", "+.4f"),
    "recovery_step": ("loss recovered at step", ","),
    "crossing_step": ("held-out loss at most that of the dense run from step", ","),
    "stage_1_tokens_per_second": ("stage 1, Lighthouse, tokens/s per device", ",.0f"),
    "stage_2_tokens_per_second": ("stage 2, dense, tokens/s per device", ",.0f"),
    "pieces_tokens_per_second": ("stage 2 in pieces, dense, tokens/s per device", ",.0f"),
    "stage_1_speed_up": ("speed-up of stage 1", ".2f"),
    "whole_run_speed_up": ("speed-up of the whole run", ".2f"),
    "device_hours": ("device-hours in training steps", ".3g"),
}
"""Label and number format of each figure in the table."""


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="dump folder of a run")
    parser.add_argument("--dense", type=Path, metavar="RUN", help="the dense run to compare with")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="default: report/ in the folder of the first run",
    )
    options = parser.parse_args()
    options.output = options.output or options.runs[0] / "report"
    folders = options.runs + [options.dense] * (options.dense is not None)
    with exit_on_value_error():
        runs = dict(zip(names_of(folders), map(read_run, folders), strict=True))
        check_output_folder("--output", options.output)
    dense = list(runs)[-1] if options.dense else None
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "report.md").write_text(report(runs, dense))
    plot(runs, dense, options.output / "loss.png")
    print(options.output / "report.md")
    print(options.output / "loss.png")


def names_of(folders: list[Path]) -> list[str]:
    """The shortest names that are different for all folders."""
    paths = [folder.resolve() for folder in folders]
    if len({path.name for path in paths}) == len(paths):
        return [path.name for path in paths]
    if len(set(paths)) < len(paths):
        raise ValueError("every run must be a different folder, got one twice; remove it")
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

Losses are in nats per token. The spike is the held-out loss with dense attention minus the loss
with Lighthouse Attention, for the same weights. The loss has recovered at the first validation of
stage 2 at or below the loss with Lighthouse Attention. A dash marks what did not happen or was not
measured. Speeds are medians over the logged steps of a stage. The speed-up of stage 1 is relative
to {over}.
"""


def sentence(name: str, c: dict) -> str:
    """One sentence on the results of a run."""
    parts = [f"**{name}**: {c['steps']:,} steps, {c['tokens_seen']:,} tokens"]
    if c["spike_nats"] is not None:
        recovery = "did not recover by the end"
        if c["recovery_step"] is not None:
            recovery = f"recovered {c['recovery_step'] - c['switch_step']:,} steps later"
        parts.append(
            f"at the switch after step {c['switch_step']:,} the held-out loss went from "
            f"{c['held_out_before_switch']:.3f} to {c['held_out_after_switch']:.3f} and {recovery}"
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
    """Plot the held-out loss, and faintly the training loss, over steps, tokens and time."""
    figure, panels = subplots(1, 3, figsize=(18, 6.5), sharey=True)
    colors = iter((LIGHTHOUSE_COLOR, *OTHER_COLORS) * len(runs))
    for name, run in runs.items():
        color = DENSE_COLOR if name == dense else next(colors)
        minutes = run.seconds() / 60
        has_held_out = bool(run.held_out)
        for axes, x in zip(panels, (run.steps, run.tokens, minutes), strict=True):
            faint = {"alpha": 0.35, "linewidth": 1} if has_held_out else {"label": name}
            axes.plot(x, smooth(run.losses), color=color, **faint)
            if has_held_out:
                axes.plot(
                    run.at_validations(x),
                    list(run.held_out.values()),
                    color=color,
                    marker="o",
                    label=name,
                )
            if run.switch_step is not None:
                axes.axvline(np.interp(run.switch_step, run.steps, x), color=color, **SWITCH_LINE)
    if any(run.switch_step is not None for run in runs.values()):
        panels[0].plot([], [], color="black", label="switch to dense attention", **SWITCH_LINE)
    for axes, label in zip(panels, ("step", "tokens", "device-minutes of training"), strict=True):
        axes.set_xlabel(label)
    panels[0].set_ylabel("loss (nats per token)")
    log_loss_axis(panels[0])
    panels[0].legend()
    figure.suptitle(f"Held-out loss (faint: training loss, mean of {WINDOW} lines)")
    save(figure, path)
