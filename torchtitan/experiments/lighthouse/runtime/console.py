"""Console output of a run: one line per logged step, and a progress bar on a terminal.

step 6/12 | stage 1, switch in 2 steps | loss 3.7636 | lr 3.00e-03 | grad norm 2.13 |
2,241 tokens/s (1,120 a rank) | elapsed 0:00:04, left 0:00:02
"""

import contextlib
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
from torchtitan.tools.logging import logger
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

_BAR = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps"


@dataclass(frozen=True)
class Phase:
    """A range of steps of one kind, up to and including `last_step`."""

    name: str
    last_step: int

    cost: float
    """FLOPs per token, for the relative cost of a step."""


class StepClock:
    """Elapsed and expected time of a run, in seconds.

    The time per step is measured between the logged steps of a phase. It includes checkpoints and
    validation. For a phase that has not begun, it is scaled by the ratio of the costs.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.phases: list[Phase] = []
        self._clock = clock
        self._start = clock()
        self._first: tuple[Phase, int, float] | None = None
        self._seconds_per_cost: float | None = None

    def phase_of(self, step: int) -> Phase:
        """The phase that trains `step`. The last phase for later steps."""
        return next((p for p in self.phases if step <= p.last_step), self.phases[-1])

    def times(self, step: int) -> tuple[float, float | None]:
        """Seconds since the start of this process, and expected seconds of the remaining steps.

        The second value is None until two steps are logged.
        """
        now, phase = self._clock(), self.phase_of(step)
        if self._first is None or self._first[0] != phase:
            self._first = (phase, step, now)
        elif step > self._first[1]:
            per_step = (now - self._first[2]) / (step - self._first[1])
            self._seconds_per_cost = per_step / phase.cost
        if self._seconds_per_cost is None:
            return now - self._start, None
        cost, done = 0.0, step
        for phase in self.phases:
            cost += phase.cost * max(0, phase.last_step - done)
            done = max(done, phase.last_step)
        return now - self._start, cost * self._seconds_per_cost


class Console:
    """Formats the log lines of a run, and draws the bar if stdout and stderr are terminals."""

    def __init__(self, num_ranks: int) -> None:
        self.clock = StepClock()
        self._num_ranks = num_ranks
        self._is_terminal = is_terminal()
        self._bar = None
        self._redirection = contextlib.ExitStack()

    def step_line(self, step: int, metrics: dict[str, float]) -> str:
        """The line of a logged step. The keys of `metrics` are torchtitan's names."""
        phases, phase = self.clock.phases, self.clock.phase_of(step)
        elapsed, left = self.clock.times(step)
        parts = [f"step {step}/{phases[-1].last_step}", phase.name]
        if phase != phases[-1]:
            steps = phase.last_step - step
            parts[-1] += f", switch in {steps} step{'s' * (steps != 1)}"
        parts.append(f"loss {metrics['loss_metrics/global_avg_loss']:.4f}")
        if "lr" in metrics:
            parts.append(f"lr {metrics['lr']:.2e}")
        parts.append(f"grad norm {metrics['grad_norm']:.2f}")
        parts.append(self._speed(metrics["throughput(tps)"]))
        if torch.cuda.is_available():
            parts.append(f"{metrics['memory/max_reserved(GiB)']:.1f} GiB")
            parts.append(f"MFU {metrics['mfu(%)']:.1f}%")
        remaining = "unknown" if left is None else duration(left)
        parts.append(f"elapsed {duration(elapsed)}, left {remaining}")
        return " | ".join(parts)

    def _speed(self, per_rank: float) -> str:
        total = f"{per_rank * self._num_ranks:,.0f} tokens/s"
        return total if self._num_ranks == 1 else f"{total} ({per_rank:,.0f} a rank)"

    def advance(self, step: int) -> None:
        """Move the bar to `step`."""
        if not self._is_terminal:
            return
        if self._bar is None:
            # Print log lines above the bar.
            self._redirection.enter_context(logging_redirect_tqdm())
            total = self.clock.phases[-1].last_step
            # tqdm's own time estimate is left out, since it assumes that all steps are alike.
            self._bar = tqdm(
                total=total, initial=step - 1, unit="step", dynamic_ncols=True, bar_format=_BAR
            )
        self._bar.set_description(self.clock.phase_of(step).name, refresh=False)
        self._bar.update(step - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._redirection.close()


def is_terminal() -> bool:
    """Whether stdout and stderr are terminals. Colours and bars are only for terminals."""
    return sys.stdout.isatty() and sys.stderr.isatty()


def quiet_start() -> None:
    """Silence misleading warnings at the start of a run."""

    # torchrun sets this variable to 1, and torchtitan always changes it.
    def is_kept(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("ENV[TORCH_NCCL_ASYNC_ERROR_HANDLING] = 1 will")

    logger.addFilter(is_kept)
    # torchdata makes this call.
    warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
    # A process group of one rank does not communicate and has no timeout.
    warnings.filterwarnings("ignore", message="Set timeout is now only supported for either nccl")


@contextlib.contextmanager
def without_info() -> Iterator[None]:
    """Drop torchtitan's log lines inside the context, except warnings and errors."""

    def is_kept(record: logging.LogRecord) -> bool:
        return record.levelno > logging.INFO

    logger.addFilter(is_kept)
    try:
        yield
    finally:
        logger.removeFilter(is_kept)


def duration(seconds: float) -> str:
    """A duration as hours, minutes and seconds, and days if any."""
    return str(timedelta(seconds=round(seconds)))
