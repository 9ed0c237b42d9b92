"""The console of a run: its lines, and the expected time left."""

import logging
import sys
from types import SimpleNamespace

import pytest
from torchtitan.experiments.lighthouse.runtime import console
from torchtitan.experiments.lighthouse.runtime.console import Console, Phase, StepClock
from torchtitan.tools.logging import logger

PHASES = [Phase("stage 1", 10, 2.0), Phase("stage 2", 15, 6.0)]
METRICS = {
    "loss_metrics/global_avg_loss": 2.5,
    "lr": 0.003,
    "grad_norm": 0.52,
    "throughput(tps)": 1500.0,
    "memory/max_reserved(GiB)": 1.0,
    "mfu(%)": 3.0,
}


def clock_of(times: list[float], phases=PHASES) -> StepClock:
    clock = StepClock(iter(times).__next__)
    clock.phases = list(phases)
    return clock


def test_the_time_left_counts_the_stages_by_their_costs():
    # Compilation takes 50 s of the first step. Then a step of stage 1 takes 4 s.
    clock = clock_of([100, 150, 158, 166])
    assert clock.times(1) == (50, None)
    # 7 more steps of stage 1, and 5 steps at three times the cost.
    assert clock.times(3) == (58, 7 * 4 + 5 * 12)
    assert clock.times(5) == (66, 5 * 4 + 5 * 12)


def test_a_stage_is_measured_anew():
    # A step of stage 2 takes 20 s instead of the 12 s that follow from its FLOPs.
    clock = clock_of([0, 0, 4, 100, 120])
    clock.times(8)
    clock.times(9)
    assert clock.times(11) == (100, 4 * 12)
    assert clock.times(12) == (120, 3 * 20)


def test_a_resumed_run_counts_the_steps_to_come():
    clock = clock_of([0, 10, 12])
    assert clock.times(12)[1] is None
    assert clock.times(13) == (12, 2 * 2)


@pytest.mark.parametrize(
    "step, num_ranks, words",
    [
        (4, 1, ["step 4/15", "stage 1, switch in 6 steps", "1,500 tokens/s"]),
        (9, 2, ["step 9/15", "stage 1, switch in 1 step", "3,000 tokens/s (1,500 a rank)"]),
        (11, 1, ["step 11/15", "stage 2", "1,500 tokens/s"]),
    ],
)
def test_a_line_says_where_the_run_is(step, num_ranks, words, monkeypatch):
    monkeypatch.setattr(console.torch.cuda, "is_available", lambda: False)
    out = Console(num_ranks)
    out.clock = clock_of([0, 3725, 3727])
    first = out.step_line(step, METRICS).split(" | ")
    stated = [*words[:2], "loss 2.5000", "lr 3.00e-03", "grad norm 0.52", words[2]]
    assert first == [*stated, "elapsed 1:02:05, left unknown"]
    assert out.step_line(step + 1, METRICS).split("left ")[1] != "unknown"


def test_a_gpu_shows_its_memory_and_mfu(monkeypatch):
    monkeypatch.setattr(console.torch.cuda, "is_available", lambda: True)
    out = Console(1)
    out.clock = clock_of([0, 1])
    assert "1.0 GiB | MFU 3.0%" in out.step_line(1, METRICS)


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_bar_is_drawn_on_a_terminal_alone(is_terminal, monkeypatch, capsys):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(getattr(sys, name), "isatty", lambda: is_terminal, raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    out = Console(1)
    out.clock.phases = PHASES
    for step in range(7, 12):
        out.advance(step)
    out.close()
    written = capsys.readouterr().err
    assert ("stage 2" in written and "11/15" in written) is is_terminal
    assert bool(written) is is_terminal


def test_only_torchtitans_own_lines_are_dropped():
    records = []
    handler = SimpleNamespace(level=0, handle=records.append)
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        with console.without_info():
            logger.info("step: 1")
            logger.warning("out of memory soon")
        logger.info("after")
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert [record.getMessage() for record in records] == ["out of memory soon", "after"]
