"""Metrics with their stage, written to `metrics.jsonl`, and to TensorBoard and W&B if enabled.

`metrics.jsonl` in the dump folder has one JSON object per line: `step`, `stage`, `phase` and the
metrics under torchtitan's names. `phase` is `lighthouse`, `pieces` (stage 2 on pieces of a
sequence) or `full` (stage 2 on whole sequences). A resumed run appends to the file. If a step
occurs twice, the later line counts (`read_metrics`).
"""

import collections
import contextlib
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torchtitan.components.metrics import BaseLogger, MetricsProcessor, _get_metrics_rank
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.experiments.lighthouse.runtime.console import (
    Console,
    Phase,
    is_terminal,
    without_info,
)
from torchtitan.experiments.lighthouse.runtime.read_files import is_a, parse_json
from torchtitan.tools import utils
from torchtitan.tools.logging import logger

FILE_NAME = "metrics.jsonl"
LOSS = "loss_metrics/global_avg_loss"
VALIDATION_LOSS = "validation_metrics/loss"
TOKENS_PER_SECOND = "throughput(tps)"
TOKENS_SEEN = "n_tokens_seen"
SWITCH = "lighthouse/switch"
FULL_LENGTH = "lighthouse/full_length"
"""Marks the step after which stage 2 changes from pieces to whole sequences."""
SPIKE = "lighthouse/spike"

SPIKE_WINDOW = 20
SPIKE_DEVIATIONS = 6.0
"""A loss is a spike if it exceeds the mean of the previous SPIKE_WINDOW lines by more than
SPIKE_DEVIATIONS standard deviations. For normal noise the probability is about 1 in 10^9."""


class StagedMetricsProcessor(MetricsProcessor):
    """torchtitan's metrics, each marked with its stage."""

    def __init__(
        self,
        job_config: JobConfig,
        parallel_dims: ParallelDims,
        model_args=None,
        tag: str | None = None,
    ):
        super().__init__(job_config, parallel_dims, tag)
        path, self.console = None, None
        if torch.distributed.get_rank() == _get_metrics_rank(parallel_dims, job_config):
            path = Path(job_config.job.dump_folder) / FILE_NAME
            self.console = Console(torch.distributed.get_world_size())
            # The trainer replaces this by the phases of the run later.
            self.console.clock.phases = [Phase("training", job_config.training.steps, 1.0)]
        if not is_terminal():
            self.color = utils.NoColor()
        self.logger = StagedLogger(self.logger, path)
        self._losses = collections.deque(maxlen=SPIKE_WINDOW)

    def log(self, step, global_avg_loss, global_max_loss, grad_norm, extra_metrics=None) -> None:
        # torchtitan counts the tokens of a sequence once for each rank that shares it. This affects
        # the total number of tokens and the divisor of the largest loss of a rank.
        degree = self.parallel_dims.cp
        if extra_metrics and TOKENS_SEEN in extra_metrics:
            num_tokens = extra_metrics[TOKENS_SEEN] // degree
            extra_metrics = {**extra_metrics, TOKENS_SEEN: num_tokens}
        with without_info():
            super().log(step, global_avg_loss, global_max_loss * degree, grad_norm, extra_metrics)
        if self.console is not None:
            logger.info(self.console.step_line(step, self.logger.last))
        self._tell_spike(step, global_avg_loss)

    def log_validation(self, loss, step, extra_metrics=None) -> None:
        with without_info():
            super().log_validation(loss, step, extra_metrics)
        if self.console is not None:
            logger.info(f"step {step} | stage {self.logger.stage} | validation loss {loss:.4f}")

    def close(self) -> None:
        if self.console is not None:
            self.console.close()
        super().close()

    def _tell_spike(self, step: int, loss: float) -> None:
        losses = self._losses
        if len(losses) == SPIKE_WINDOW:
            mean, deviation = statistics.fmean(losses), statistics.pstdev(losses)
            if loss > mean + SPIKE_DEVIATIONS * deviation:
                logger.warning(
                    f"Spike in step {step}: the loss is {loss:.4f}, {loss - mean:.4f} above the "
                    f"mean of the {SPIKE_WINDOW} lines before"
                )
                self.logger.log({SPIKE: loss - mean}, step)
        if math.isfinite(loss):
            losses.append(loss)

    def enter_phase(self, stage: int, phase: str, num_flops_per_token: float) -> None:
        """Start measuring `phase`. Averages include nothing of the previous phase."""
        self.logger.stage = stage
        self.logger.phase = phase
        self.num_flops_per_token = num_flops_per_token
        self.restart_clock()

    @contextlib.contextmanager
    def stopped_clock(self) -> Iterator[None]:
        """Exclude the time spent inside from the throughput."""
        utils.device_module.synchronize()
        start = time.perf_counter()
        yield
        self.time_last_log += time.perf_counter() - start

    def restart_clock(self) -> None:
        """Exclude the time since the last line from the throughput."""
        self.ntokens_since_last_log = 0
        self.data_loading_times.clear()
        self.time_last_log = time.perf_counter()


class StagedLogger(BaseLogger):
    """Adds the stage, appends to `path` if given, and forwards to `inner`.

    A failure of `inner` affects neither the run nor its last checkpoint. For example, a signal that
    stops the run may also have ended W&B's service process. A full disk does not end the run
    either. Lines that cannot be written stay in memory and are retried with each further line.
    """

    def __init__(self, inner: BaseLogger, path: Path | None):
        self.inner = inner
        self.stage = 0
        self.phase = None
        self.last: dict[str, Any] = {}
        """The metrics of the newest line."""
        self._last_step = None
        self._file = None
        self._unwritten = b""
        self._fails = False
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b", buffering=0)
            if size := self._file.tell():
                self._file.seek(size - 1)
                # The last line may be incomplete.
                if self._file.read() != b"\n":
                    self._unwritten = b"\n"

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self.last = metrics
        if self._file is not None:
            line = {"step": step, "stage": self.stage, "phase": self.phase, **metrics}
            self._unwritten += (json.dumps(line) + "\n").encode()
            self._write()
        marked = self._marked(metrics, step)
        self._hand_on(lambda: self.inner.log(marked, step))

    def close(self) -> None:
        if self._file is not None:
            self._write()
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None
        self._hand_on(self.inner.close)

    def _write(self) -> None:
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            if not self._fails:
                logger.warning(
                    f"{FILE_NAME} cannot be written ({error}): its lines wait in memory, and are "
                    "lost if the run ends before there is room"
                )
            self._fails = True
        else:
            self._fails = False

    def _marked(self, metrics: dict[str, Any], step: int) -> dict[str, Any]:
        # W&B has one row per step, in which a later value replaces an earlier one. At the switch,
        # two values must not be replaced: the stage that trained the step, and the loss with the
        # attention of that stage.
        marked = dict(metrics)
        if step != self._last_step:
            marked["lighthouse/stage"] = self.stage
            self._last_step = step
        if VALIDATION_LOSS in metrics:
            marked[f"{VALIDATION_LOSS}_stage_{self.stage}"] = metrics[VALIDATION_LOSS]
        return marked

    def _hand_on(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            logger.warning(f"From now on, metrics go only to {FILE_NAME}: {error!r}")
            self.inner = BaseLogger()


def read_metrics(dump_folder: str | Path, metric: str) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` that contain `metric`, by step.

    The last of several lines for a step and stage counts. Lines cut short by a crash and other
    invalid lines are skipped.

    Raises:
        OSError: the file cannot be opened.
    """
    lines = {}
    with open(Path(dump_folder) / FILE_NAME, encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = parse_json(text)
            except ValueError:
                continue
            if isinstance(line, dict) and all(
                is_a(line.get(name), kind)
                for name, kind in (("step", int), ("stage", int), (metric, float))
            ):
                lines[line["step"], line["stage"]] = line
    return [lines[key] for key in sorted(lines)]
