"""Figures of a run from its metrics: losses, the spike at the switch, speed, comparison of runs.

`read_run` reads a dump folder. `summarize_run` computes the figures for reports. Losses are in nats
per token, rates in tokens per second and device. A figure that was not measured is None. The switch
and the crossing need validation.
"""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torchtitan.experiments.lighthouse.config.job_config import FULL, LIGHTHOUSE, PIECES
from torchtitan.experiments.lighthouse.metrics import (
    FILE_NAME,
    LOSS,
    SWITCH,
    TOKENS_PER_SECOND,
    TOKENS_SEEN,
    VALIDATION_LOSS,
    read_metrics,
)

WINDOW = 10
"""Lines of the metrics over which training losses are averaged."""


@dataclass(frozen=True)
class Run:
    """The metrics of a run. Arrays have an element for each line with a training loss."""

    steps: np.ndarray
    phases: np.ndarray
    """`lighthouse`, `pieces` or `full`; see `metrics.py`."""

    losses: np.ndarray
    rates: np.ndarray
    """Tokens per second and device."""

    tokens: np.ndarray
    """Tokens that all ranks have seen so far."""

    held_out: dict[tuple[int, int], float]
    """Held-out loss by step and stage. The step of the switch has one for each stage."""

    switch_step: int | None
    """Last step of stage 1. None for a run that has not switched."""

    def rate(self, phase: str) -> float | None:
        """Median tokens per second and device in a phase."""
        rates = self.rates[self.phases == phase]
        return statistics.median(rates.tolist()) if len(rates) else None

    def tokens_trained(self) -> np.ndarray:
        """Tokens between each line and the previous one."""
        # A run that starts from another run's checkpoint counts from its first line.
        before = 0 if self.steps[0] == 1 else self.tokens[0]
        return np.diff(self.tokens, prepend=before)

    def seconds(self) -> np.ndarray:
        """Device-seconds in training steps up to each line, without validation and checkpoints."""
        return np.cumsum(self.tokens_trained() / self.rates)

    def device_seconds(self) -> float:
        """Device-seconds in the training steps of the whole run."""
        return float(self.seconds()[-1])

    def at_validations(self, values: np.ndarray) -> np.ndarray:
        """`values`, one for each line, interpolated at each validation of `held_out`."""
        return np.interp([step for step, _ in self.held_out], self.steps, values)

    def mean_rate(self) -> float | None:
        """Tokens per second and device in the training steps of the whole run."""
        seconds = self.device_seconds()
        return float(self.tokens_trained().sum()) / seconds if seconds else None

    def final_loss(self) -> float:
        """Mean training loss of the last `WINDOW` lines."""
        return float(self.losses[-WINDOW:].mean())

    def final_held_out(self) -> float | None:
        """The last held-out loss."""
        return self.held_out[max(self.held_out)] if self.held_out else None


@dataclass(frozen=True)
class Switch:
    """Held-out losses of the same weights at the switch, and the recovery."""

    step: int
    lighthouse: float
    """Loss with Lighthouse Attention, as in stage 1."""

    dense: float
    """Loss with dense attention, as in stage 2."""

    recovery_step: int | None
    """First validated step of stage 2 with at most the loss `lighthouse`. None without one."""

    @property
    def spike(self) -> float:
        return self.dense - self.lighthouse


def read_run(folder: str | Path) -> Run:
    """The run in a dump folder, finished or not.

    Raises:
        ValueError: the folder has no metrics, or no metrics of a training step.
    """
    path = Path(folder) / FILE_NAME
    if not path.is_file():
        raise ValueError(
            f"a run must be a folder with {FILE_NAME}, got {str(folder)!r}; correct the path"
        )
    lines = read_metrics(folder, LOSS)
    if not lines:
        raise ValueError(f"a run must have trained a step, got {str(folder)!r}; leave it out")
    for line in lines:
        # Earlier versions wrote no phase.
        line["phase"] = line.get("phase") or (LIGHTHOUSE if line["stage"] == 1 else FULL)
        for metric in (TOKENS_PER_SECOND, TOKENS_SEEN):
            if metric not in line:
                raise ValueError(
                    f"{FILE_NAME} must hold {metric} with every loss, got none for step "
                    f"{line['step']} in {str(folder)!r}; remove that line"
                )
    columns = {
        name: np.array([line[metric] for line in lines])
        for name, metric in {
            "steps": "step",
            "phases": "phase",
            "losses": LOSS,
            "rates": TOKENS_PER_SECOND,
            "tokens": TOKENS_SEEN,
        }.items()
    }
    held_out = {
        (line["step"], line["stage"]): line[VALIDATION_LOSS]
        for line in read_metrics(folder, VALIDATION_LOSS)
    }
    switches = read_metrics(folder, SWITCH)
    return Run(**columns, held_out=held_out, switch_step=switches[-1]["step"] if switches else None)


def switch_of(run: Run) -> Switch | None:
    """The losses at the switch. None without a switch, or without validation on both sides."""
    step = run.switch_step
    if (step, 1) not in run.held_out or (step, 2) not in run.held_out:
        return None
    level = run.held_out[step, 1]
    recovered = [
        later for (later, stage), loss in run.held_out.items() if stage == 2 and loss <= level
    ]
    return Switch(step, level, run.held_out[step, 2], min(recovered, default=None))


def crossing_step(run: Run, dense: Run) -> int | None:
    """The step from which the held-out loss stays at or below that of the dense run.

    The runs are compared after equally many tokens. The loss of the dense run is interpolated
    linearly between validations. Steps of stage 1 and steps beyond the end of the dense run do not
    count.
    """
    if not dense.held_out:
        return None
    dense_tokens = dense.at_validations(dense.tokens)
    dense_losses = list(dense.held_out.values())
    crossing = None
    validations = zip(run.held_out.items(), run.at_validations(run.tokens), strict=True)
    for ((step, stage), loss), tokens in validations:
        if stage == 1 or not dense_tokens[0] <= tokens <= dense_tokens[-1]:
            continue
        if loss > np.interp(tokens, dense_tokens, dense_losses):
            crossing = None
        elif crossing is None:
            crossing = step
    return crossing


def summarize_run(run: Run, dense: Run | None = None) -> dict[str, Any]:
    """The figures of a run, with a comparison to a dense run. Missing figures are None.

    The rate of stage 2 is that of its steps at full length. The speed-up of stage 1 is relative to
    the dense run, or else to stage 2. The speed-up of the whole run needs a dense run.
    """
    switch = switch_of(run)
    rates = {phase: run.rate(phase) for phase in (LIGHTHOUSE, PIECES, FULL)}
    dense_rate = rates[FULL] if dense is None else dense.rate(FULL)
    mean_rates = (run.mean_rate(), dense and dense.mean_rate())
    return {
        "steps": int(run.steps[-1]),
        "tokens_seen": int(run.tokens[-1]),
        "final_held_out_loss": run.final_held_out(),
        "final_training_loss": run.final_loss(),
        "switch_step": run.switch_step,
        "held_out_before_switch": switch and switch.lighthouse,
        "held_out_after_switch": switch and switch.dense,
        "spike_nats": switch and switch.spike,
        "recovery_step": switch and switch.recovery_step,
        "crossing_step": crossing_step(run, dense) if dense else None,
        "stage_1_tokens_per_second": rates[LIGHTHOUSE],
        "stage_2_tokens_per_second": rates[FULL],
        "pieces_tokens_per_second": rates[PIECES],
        "stage_1_speed_up": (
            rates[LIGHTHOUSE] / dense_rate if rates[LIGHTHOUSE] and dense_rate else None
        ),
        "whole_run_speed_up": mean_rates[0] / mean_rates[1] if all(mean_rates) else None,
        "device_hours": run.device_seconds() / 3600,
    }


def written(value: float | None, form: str) -> str:
    """A figure in a table. A dash if it was not measured."""
    return "-" if value is None else format(value, form)


def smooth(values: np.ndarray) -> np.ndarray:
    """Moving average over the last `WINDOW` values."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    end = np.arange(1, len(values) + 1)
    start = np.maximum(0, end - WINDOW)
    return (sums[end] - sums[start]) / (end - start)
