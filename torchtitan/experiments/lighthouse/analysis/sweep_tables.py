"""Tables and plots of the cells of a sweep.

A row is a dict that describes one cell. It holds `cell` (its name), the settings in `FIELDS`,
`state`, and figures of `summarize_run`, at least those in `COLUMNS`.
"""

import csv
import statistics
from pathlib import Path

from torchtitan.experiments.lighthouse.analysis.run_metrics import written
from torchtitan.experiments.lighthouse.runtime.atomic_json import write_json
from torchtitan.experiments.lighthouse.runtime.plots import (
    DENSE_COLOR,
    LIGHTHOUSE_COLOR,
    save,
    subplots,
)

FIELDS = [
    *("scorer", "pooling_factor", "num_levels", "topk", "dilation", "pool_rotary"),
    *("stage1_steps", "stage2_seq_len", "stage2_full_steps", "seed"),
]
"""Settings that distinguish cells: fields of [lighthouse], and debug.seed."""

COLUMNS = {
    "final_held_out_loss": ("held-out loss", ".4f"),
    "final_training_loss": ("training loss", ".4f"),
    "spike_nats": ("spike, nats", "+.3f"),
    "recovery_step": ("recovered at step", ","),
    "stage_1_tokens_per_second": ("stage 1, tokens/s", ",.0f"),
    "stage_2_tokens_per_second": ("stage 2, tokens/s", ",.0f"),
    "pieces_tokens_per_second": ("stage 2 in pieces, tokens/s", ",.0f"),
    "stage_1_speed_up": ("speed-up", ".2f"),
    "device_hours": ("device-hours", ".3g"),
}
"""Label and number format of each figure in table.md."""


def write_tables(rows: list[dict], out: Path) -> list[Path]:
    """Write table.md, table.csv, table.json and fields.png. Returns their paths.

    fields.png shows finished cells only. Without any, it is not written.
    """
    loss = loss_of(rows)
    rows = sorted(rows, key=lambda row: (row[loss] is None, row[loss]))
    paths = [out / name for name in ("table.md", "table.csv", "table.json")]
    paths[0].write_text(table(rows) + table_over_seeds(rows))
    with paths[1].open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
    write_json(paths[2], rows)
    if finished := [row for row in rows if row["state"] == "finished"]:
        paths.append(out / "fields.png")
        plot(finished, paths[-1])
    return paths


def loss_of(rows: list[dict]) -> str:
    """The loss to compare cells by: held-out loss if any cell has one, else training loss."""
    is_validated = any(row["final_held_out_loss"] is not None for row in rows)
    return "final_held_out_loss" if is_validated else "final_training_loss"


def table(rows: list[dict]) -> str:
    """The rows as a markdown table, in the given order."""
    header = [*FIELDS, "state", *(label for label, _ in COLUMNS.values())]
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    for row in rows:
        settings = [str(row[name]) for name in (*FIELDS, "state")]
        figures = [written(row[name], form) for name, (_, form) in COLUMNS.items()]
        lines.append(f"| {' | '.join([*settings, *figures])} |")
    return "\n".join(lines) + "\n"


def table_over_seeds(rows: list[dict]) -> str:
    """Mean and range over the seeds of finished cells. Empty if only one seed was used."""
    if len({row["seed"] for row in rows}) < 2:
        return ""
    settings = [name for name in FIELDS if name != "seed"]
    groups = {}
    for row in rows:
        if row["state"] == "finished":
            groups.setdefault(tuple(row[name] for name in settings), []).append(row)
    header = [*settings, "seeds", *(label for label, _ in COLUMNS.values())]
    lines = ["", f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    for values, group in groups.items():
        figures = []
        for name, (_, form) in COLUMNS.items():
            found = [row[name] for row in group if row[name] is not None]
            if len(found) < len(group):
                # A mean over only some of the cells would mislead.
                figures.append(f"in {len(found)} of {len(group)}" if found else "-")
                continue
            mean, low, high = (
                format(value, form) for value in (statistics.mean(found), min(found), max(found))
            )
            figures.append(f"{mean} ({low} to {high})")
        lines.append(f"| {' | '.join([*map(str, values), str(len(group)), *figures])} |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict], path: Path) -> None:
    """Plot final loss and speed by each field in which cells differ. A bar marks the median."""
    varied = [name for name in FIELDS if len({row[name] for row in rows}) > 1] or ["topk"]
    metrics = {
        loss_of(rows): "final loss (nats per token)",
        "stage_1_tokens_per_second": "stage 1 (tokens/s per device)",
    }
    figure, panels = subplots(
        *(len(metrics), len(varied)),
        figsize=(2 + 3 * len(varied), 3.5 * len(metrics)),
        squeeze=False,
        sharey="row",
        sharex="col",
    )
    for panel_row, (metric, label) in zip(panels, metrics.items(), strict=True):
        panel_row[0].set_ylabel(label)
        for axes, name in zip(panel_row, varied, strict=True):
            # A cell whose grid has no seeds may have none.
            values = sorted({row[name] for row in rows}, key=lambda x: (x is not None, x))
            groups = [
                [row[metric] for row in rows if row[name] == value and row[metric] is not None]
                for value in values
            ]
            for i, group in enumerate(groups):
                axes.plot([i] * len(group), group, "o", color=DENSE_COLOR, alpha=0.4)
                if group:
                    median = statistics.median(group)
                    axes.plot([i], [median], "_", color=LIGHTHOUSE_COLOR, markersize=30)
            axes.set_xticks(range(len(values)), [str(value) for value in values])
            axes.set_xlim(-0.5, len(values) - 0.5)
    for axes, name in zip(panels[-1], varied, strict=True):
        axes.set_xlabel(name)
    figure.suptitle("Final loss and speed by field (bar: median)")
    save(figure, path)
