"""Metrics with the stage: every line to `metrics.jsonl`, and to TensorBoard and W&B if enabled.

`metrics.jsonl` in the dump folder holds one JSON object a line: `step`, `stage` and the
metrics under torchtitan's names. A resumed run appends; where a step stands twice, the later line
counts (`read_metrics`).
"""

import json
import time
from pathlib import Path
from typing import Any

import torch
from torchtitan.components.metrics import BaseLogger, MetricsProcessor, _get_metrics_rank
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims

FILE_NAME = "metrics.jsonl"
LOSS = "loss_metrics/global_avg_loss"
VALIDATION_LOSS = "validation_metrics/loss"
TOKENS_PER_SECOND = "throughput(tps)"


class StagedMetricsProcessor(MetricsProcessor):
    """torchtitan's metrics, each marked with the stage it was measured in."""

    def __init__(self, job_config: JobConfig, parallel_dims: ParallelDims, tag: str | None = None):
        super().__init__(job_config, parallel_dims, tag)
        path = None
        if torch.distributed.get_rank() == _get_metrics_rank(parallel_dims, job_config):
            path = Path(job_config.job.dump_folder) / FILE_NAME
        self.logger = StagedLogger(self.logger, path)

    def enter_stage(self, stage: int, num_flops_per_token: float) -> None:
        """Measure from here on in `stage`: nothing of the stage before is averaged in."""
        self.logger.stage = stage
        self.num_flops_per_token = num_flops_per_token
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave out of the throughput what has happened since the last line."""
        self.ntokens_since_last_log = 0
        self.data_loading_times.clear()
        self.time_last_log = time.perf_counter()


class StagedLogger(BaseLogger):
    """Adds the stage, hands on to `inner` and appends to `path` if there is one."""

    def __init__(self, inner: BaseLogger, path: Path | None):
        self.inner = inner
        self.stage = 0
        self._file = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            is_torn = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
            self._file = path.open("a")
            if is_torn:
                self._file.write("\n")

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self.inner.log({**metrics, "lighthouse/stage": self.stage}, step)
        if self._file is not None:
            line = {"step": step, "stage": self.stage, **metrics}
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def close(self) -> None:
        self.inner.close()
        if self._file is not None:
            self._file.close()


def build_metrics_processor(
    job_config: JobConfig, parallel_dims: ParallelDims, model_args=None, tag: str | None = None
) -> StagedMetricsProcessor:
    """torchtitan's hook for the metrics of a model."""
    return StagedMetricsProcessor(job_config, parallel_dims, tag)


def read_metrics(dump_folder: str | Path, metric: str) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` that hold `metric`, by step.

    Of several for a step and stage the last; a line cut short by a crash is passed over.
    """
    lines = {}
    for text in (Path(dump_folder) / FILE_NAME).read_text().splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if metric in line:
            lines[line["step"], line["stage"]] = line
    return [lines[key] for key in sorted(lines)]
