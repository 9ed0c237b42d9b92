"""metrics.jsonl has one line per step and stage, also after stops and kills."""

import collections
import json
import math
import random
import statistics
import time
from types import SimpleNamespace

import pytest
from torchtitan.components.metrics import BaseLogger, MetricsProcessor
from torchtitan.experiments.lighthouse.metrics import (
    LOSS,
    SPIKE,
    SPIKE_WINDOW,
    VALIDATION_LOSS,
    StagedLogger,
    StagedMetricsProcessor,
    read_metrics,
)
from torchtitan.experiments.lighthouse.runtime.cpu_device import CpuDevice
from torchtitan.tools import utils


def write(folder, *lines) -> None:
    texts = [line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines]
    (folder / "metrics.jsonl").write_text("".join(texts))


PHASES = {1: "lighthouse", 2: "pieces"}


def line_of(step: int, stage: int, loss: float, metric: str = LOSS) -> dict:
    return {"step": step, "stage": stage, metric: loss}


def test_lines_come_by_step_and_of_two_for_a_step_the_later_counts(tmp_path):
    losses = ((10, 3.0), (9, 2.0), (2, 4.0), (9, 2.5))
    lines = [line_of(step, 1, loss) | {"lr": 0.5} for step, loss in losses]
    write(tmp_path, *lines)
    assert read_metrics(tmp_path, LOSS) == [lines[2], lines[3], lines[0]]


@pytest.mark.parametrize("torn", ['{"step": 3, "sta', '{"step": 3, "stage": 1', "{"])
def test_a_line_cut_short_is_passed_over(tmp_path, torn):
    write(tmp_path, line_of(1, 1, 3.0), line_of(2, 1, 2.0), torn)
    assert [line["step"] for line in read_metrics(str(tmp_path), LOSS)] == [1, 2]


def test_a_resumed_run_goes_on_behind_a_line_cut_short(tmp_path):
    write(tmp_path, line_of(1, 1, 3.0), '{"step": 2, "sta')
    for step in (2, 3):
        logger = StagedLogger(BaseLogger(), tmp_path / "metrics.jsonl")
        logger.stage = 1
        logger.log({LOSS: float(step)}, step)
        logger.close()
    assert [line["step"] for line in read_metrics(tmp_path, LOSS)] == [1, 2, 3]


def test_both_stages_of_a_step_count(tmp_path):
    """At the switch, validation uses both kinds of attention."""
    lines = [line_of(3, stage, stage / 2, VALIDATION_LOSS) for stage in (2, 1)]
    write(tmp_path, line_of(3, 1, 9.0), *lines, line_of(4, 2, 8.0))
    assert read_metrics(tmp_path, VALIDATION_LOSS) == lines[::-1]
    assert [line["step"] for line in read_metrics(tmp_path, LOSS)] == [3, 4]
    assert read_metrics(tmp_path, "nothing") == []


def test_the_logger_adds_the_stage_and_hands_on(tmp_path):
    logged = []
    inner = SimpleNamespace(
        log=lambda metrics, step: logged.append((metrics, step)),
        close=lambda: logged.append("closed"),
    )
    path = tmp_path / "new" / "metrics.jsonl"
    logger = StagedLogger(inner, path)
    for stage in (1, 2):
        logger.stage, logger.phase = stage, PHASES[stage]
        logger.log({LOSS: 0.1}, 7)
        # Read during the run.
        assert len(path.read_text().splitlines()) == stage
    logger.close()
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    assert lines == [line_of(7, stage, 0.1) | {"phase": PHASES[stage]} for stage in (1, 2)]
    # The stage that trained the step. The line after the switch does not replace its line.
    assert logged == [({LOSS: 0.1, "lighthouse/stage": 1}, 7), ({LOSS: 0.1}, 7), "closed"]


def test_the_loss_under_each_attention_has_a_name_of_its_own():
    row = {}
    logger = StagedLogger(SimpleNamespace(log=lambda metrics, step: row.update(metrics)), None)
    for stage, loss in ((1, 2.5), (2, 2.75)):
        logger.stage = stage
        logger.log({VALIDATION_LOSS: loss}, 3)
    assert row == {
        VALIDATION_LOSS: 2.75,
        f"{VALIDATION_LOSS}_stage_1": 2.5,
        f"{VALIDATION_LOSS}_stage_2": 2.75,
        "lighthouse/stage": 1,
    }


def test_a_stopped_clock_leaves_out_what_happens_inside(monkeypatch):
    monkeypatch.setattr(utils, "device_module", CpuDevice)
    processor = StagedMetricsProcessor.__new__(StagedMetricsProcessor)
    processor.time_last_log, processor.ntokens_since_last_log = 100.0, 4096
    start = time.perf_counter()
    with processor.stopped_clock():
        time.sleep(0.01)
    stopped = processor.time_last_log - 100.0
    assert 0.01 <= stopped <= time.perf_counter() - start
    assert processor.ntokens_since_last_log == 4096


def test_a_stage_starts_with_nothing_of_the_one_before():
    processor = StagedMetricsProcessor.__new__(StagedMetricsProcessor)
    processor.logger = SimpleNamespace(stage=1)
    processor.ntokens_since_last_log, processor.data_loading_times = 4096, [0.5]
    processor.num_flops_per_token, processor.time_last_log = 1.0, 0.0
    processor.enter_phase(2, "full", 7.0)
    assert vars(processor.logger) == {"stage": 2, "phase": "full"}
    assert processor.num_flops_per_token == 7.0
    assert processor.ntokens_since_last_log == 0 and processor.data_loading_times == []
    assert processor.time_last_log > 0.0


class BrokenLogger(BaseLogger):
    """Replaces W&B, without its service."""

    def __init__(self):
        self.calls = []

    def log(self, metrics, step):
        self.calls.append(step)
        raise ConnectionResetError("Connection lost")

    def close(self):
        self.calls.append("close")
        raise ConnectionResetError("Connection lost")


def test_the_lines_outlive_the_other_loggers(tmp_path, caplog):
    broken = BrokenLogger()
    logger = StagedLogger(broken, tmp_path / "metrics.jsonl")
    logger.stage = 1
    for step in (1, 2):
        logger.log({LOSS: float(step)}, step)
    logger.close()
    assert [line["step"] for line in read_metrics(tmp_path, LOSS)] == [1, 2]
    # W&B is turned off, with one warning.
    assert broken.calls == [1]
    assert caplog.text.count("metrics go only to metrics.jsonl") == 1
    assert "Connection lost" in caplog.text

    broken = BrokenLogger()
    StagedLogger(broken, None).close()
    assert broken.calls == ["close"]


def test_a_spike_is_told_and_noise_is_not(monkeypatch, caplog):
    monkeypatch.setattr(MetricsProcessor, "log", lambda self, *args: None)
    processor = StagedMetricsProcessor.__new__(StagedMetricsProcessor)
    processor.parallel_dims = SimpleNamespace(cp=1)
    lines = []
    processor.logger = SimpleNamespace(log=lambda metrics, step: lines.append((step, metrics)))
    processor.console = None
    processor._losses = collections.deque(maxlen=SPIKE_WINDOW)
    dice = random.Random(0)
    losses = [3 - step / 100 + dice.gauss(0, 0.05) for step in range(1, 200)]
    # An early spike has nothing to compare with and does not count. nan is handled elsewhere.
    losses[3] = 9.0
    losses[150] = 4.0
    losses[170] = math.nan
    for step, loss in enumerate(losses, 1):
        processor.log(step, loss, loss, 1.0)
    expected = 4.0 - statistics.fmean(losses[130:150])
    assert lines == [(151, {SPIKE: pytest.approx(expected)})]
    assert caplog.text.count("Spike in step 151: the loss is 4.0000, ") == 1
