"""Reports of runs, for metrics with known figures."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from torchtitan.experiments.lighthouse.analysis import report
from torchtitan.experiments.lighthouse.analysis.run_metrics import (
    WINDOW,
    crossing_step,
    read_run,
    smooth,
    summarize_run,
    switch_of,
)


def write(folder: Path, *lines: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def trained(step: int, stage: int, loss: float, rate: float = 100.0, per_step: int = 50) -> dict:
    return {
        "step": step,
        "stage": stage,
        "loss_metrics/global_avg_loss": loss,
        "throughput(tps)": rate,
        "n_tokens_seen": step * per_step,
    }


def validated(step: int, stage: int, loss: float) -> dict:
    return {"step": step, "stage": stage, "validation_metrics/loss": loss}


def two_stages(folder: Path, held_out: list[tuple[int, int, float]]) -> Path:
    """40 steps, 20 of them with Lighthouse at twice the speed. The loss falls by 0.1 per step."""
    stages = {step: 1 if step <= 20 else 2 for step in range(1, 41)}
    lines = [trained(s, stage, 9 - s / 10, 200.0 / stage) for s, stage in stages.items()]
    switch = {"step": 20, "stage": 2, "lighthouse/switch": 1}
    return write(folder, *lines, switch, *(validated(*point) for point in held_out))


HELD_OUT = [
    *[(10, 1, 3.0), (20, 1, 2.5), (20, 2, 2.75)],
    *[(25, 2, 2.625), (30, 2, 2.5), (35, 2, 2.25), (40, 2, 2.0)],
]


def dense(folder: Path, losses: dict[int, float], per_step: int = 50) -> Path:
    lines = [trained(step, 2, 9 - step / 10, 80.0, per_step) for step in range(1, 41)]
    return write(folder, *lines, *(validated(step, 2, loss) for step, loss in losses.items()))


def test_figures_of_a_run(tmp_path):
    run = read_run(two_stages(tmp_path / "two", HELD_OUT))
    other = read_run(dense(tmp_path / "dense", {10: 2.9, 20: 2.6, 30: 2.4, 40: 2.1}))
    assert summarize_run(run, other) == {
        "steps": 40,
        "tokens_seen": 2000,
        "final_held_out_loss": 2.0,
        # The mean of steps 31 to 40.
        "final_training_loss": pytest.approx(9 - 3.55),
        "switch_step": 20,
        "held_out_before_switch": 2.5,
        "held_out_after_switch": 2.75,
        "spike_nats": 0.25,
        "recovery_step": 30,
        # At step 35 the loss of the dense run is 2.25, interpolated between two validations.
        "crossing_step": 35,
        "stage_1_tokens_per_second": 200.0,
        "stage_2_tokens_per_second": 100.0,
        "pieces_tokens_per_second": None,
        "stage_1_speed_up": 2.5,
        # 15 s against 25 s.
        "whole_run_speed_up": pytest.approx(25 / 15),
        "device_hours": pytest.approx(15 / 3600),
    }
    alone = summarize_run(run)
    assert alone["stage_1_speed_up"] == 2.0
    assert alone["crossing_step"] is None and alone["whole_run_speed_up"] is None


def test_pieces_are_no_measure_of_dense_attention(tmp_path):
    lines = [trained(1, 1, 5.0, 300.0), trained(2, 2, 4.0, 250.0) | {"phase": "pieces"}]
    found = summarize_run(read_run(write(tmp_path / "pieces", *lines)))
    assert found["pieces_tokens_per_second"] == 250.0
    assert found["stage_2_tokens_per_second"] is None and found["stage_1_speed_up"] is None
    lines.append(trained(3, 2, 4.0, 100.0) | {"phase": "full"})
    found = summarize_run(read_run(write(tmp_path / "finish", *lines)))
    assert found["stage_2_tokens_per_second"] == 100.0 and found["stage_1_speed_up"] == 3.0


def test_a_run_without_a_switch_or_validation(tmp_path):
    run = read_run(write(tmp_path, trained(1, 1, 5.0), trained(5, 1, 4.0)))
    found = summarize_run(run)
    assert found["final_training_loss"] == 4.5 and found["tokens_seen"] == 250
    assert {key for key, value in found.items() if value is None} == {
        *["final_held_out_loss", "switch_step", "held_out_before_switch", "held_out_after_switch"],
        *["spike_nats", "recovery_step", "crossing_step", "stage_2_tokens_per_second"],
        "pieces_tokens_per_second",
        *["stage_1_speed_up", "whole_run_speed_up"],
    }
    assert summarize_run(run, run)["crossing_step"] is None


def test_a_switch_without_validation_has_no_cost(tmp_path):
    run = read_run(two_stages(tmp_path, [(20, 1, 2.5), (30, 2, 2.4)]))
    assert run.switch_step == 20 and switch_of(run) is None


@pytest.mark.parametrize(
    ("after", "recovery_step"),
    [([2.75, 2.51, 2.51], None), ([2.75, 2.4, 2.6], 30), ([2.5, 2.6, 2.6], 20)],
    ids=["never", "once", "no-spike"],
)
def test_when_the_loss_recovers(tmp_path, after, recovery_step):
    points = [(20, 1, 2.5), *((20 + 10 * i, 2, loss) for i, loss in enumerate(after))]
    run = read_run(two_stages(tmp_path, points))
    assert switch_of(run).recovery_step == recovery_step
    assert switch_of(run).spike == pytest.approx(after[0] - 2.5)


@pytest.mark.parametrize(
    ("dense_losses", "per_step", "expected"),
    [
        # A lower loss only in stage 1 does not count.
        ({10: 3.5, 20: 2.6, 30: 2.4, 40: 1.9}, 50, None),
        # The loss falls below, rises above, and stays below to the end.
        ({10: 3.5, 20: 2.6, 25: 2.7, 30: 2.4, 35: 2.3, 40: 2.1}, 50, 35),
        # The dense run has twice the tokens per step. Its step 20 is compared with step 40.
        ({10: 2.6, 15: 2.3, 20: 2.1, 40: 1.0}, 100, 40),
        ({}, 50, None),
    ],
    ids=["never", "back-and-forth", "by-tokens", "not-validated"],
)
def test_the_crossing_with_the_dense_run(tmp_path, dense_losses, per_step, expected):
    run = read_run(two_stages(tmp_path / "two", HELD_OUT))
    assert crossing_step(run, read_run(dense(tmp_path / "d", dense_losses, per_step))) == expected


def test_a_run_from_the_checkpoint_of_another_counts_its_own_seconds(tmp_path):
    run = read_run(write(tmp_path, *[trained(step, 2, 3.0) for step in (110, 120, 130)]))
    assert run.device_seconds() == pytest.approx(20 * 50 / 100.0)
    assert run.mean_rate() == pytest.approx(100.0)


def test_smoothing_is_the_mean_of_the_lines_before():
    values = np.random.default_rng(0).random(25)
    expected = [values[max(0, i - WINDOW + 1) : i + 1].mean() for i in range(25)]
    assert smooth(values) == pytest.approx(expected)


# ---- the script


@pytest.fixture
def script(monkeypatch):
    """Runs `lighthouse report` with arguments in this process."""

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["report.py", *map(str, args)])
        report.main()

    return call


def test_report_and_plot(script, tmp_path, capsys):
    run = two_stages(tmp_path / "a" / "run", HELD_OUT)
    other = two_stages(tmp_path / "b" / "run", [])
    base = dense(tmp_path / "dense", {10: 2.9, 20: 2.6, 30: 2.4, 40: 2.1})
    out = tmp_path / "out"
    script(run, other, "--dense", base, "--output", out)
    assert capsys.readouterr().out.split() == [str(out / "report.md"), str(out / "loss.png")]
    text = (out / "report.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    # Two runs with the same name.
    assert rows[0] == ["a/run", "b/run", "dense (the dense run)"]
    table = {label: values for label, *values in rows[1:]}
    assert table["tokens seen"] == ["2,000"] * 3
    assert table["final loss, held-out text"] == ["2.0000", "-", "2.1000"]
    assert table["spike at the switch, nats"] == ["+0.2500", "-", "-"]
    assert table["loss recovered at step"] == ["30", "-", "-"]
    assert table["held-out loss at most that of the dense run from step"] == ["35", "-", "-"]
    assert table["speed-up of stage 1"] == ["2.50", "2.50", "-"]
    assert "from 2.500 to 2.750 and recovered 10 steps later" in text
    assert "without validation on both sides" in text
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_report_of_one_run_lies_in_its_folder(script, tmp_path):
    script(two_stages(tmp_path / "run", HELD_OUT))
    text = (tmp_path / "run" / "report" / "report.md").read_text()
    assert "| speed-up of stage 1 | 2.00 |" in text and "stage 2 of the same run" in text
    assert "dense run" not in text
