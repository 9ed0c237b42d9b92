"""The quick start from beginning to end, in small: runs, report, figures, reuse."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
MODULE = "torchtitan.experiments.lighthouse.analysis.quickstart"


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """The real configuration, shortened."""
    text = (ROOT / "train_configs" / "quickstart.toml").read_text()
    changes = {
        "seq_len = 4096": "seq_len = 2048",
        "\nsteps = 288\n": "\nsteps = 24\n",
        "stage1_steps = 208": "stage1_steps = 12",
        "\nsteps = 4\n": "\nsteps = 2\n",
        "freq = 16": "freq = 4",
    }
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    path = tmp_path_factory.mktemp("quickstart") / "quickstart.toml"
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def output(config) -> Path:
    output = config.parent / "output"
    run(config, output)
    return output


def run(config: Path, output: Path) -> str:
    command = [
        sys.executable, "-m", MODULE, "--config", str(config), "--output", str(output)
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=config.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def metrics(folder: Path, key: str) -> dict[tuple[int, int], float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {(line["step"], line["stage"]): line[key] for line in lines if key in line}


def test_summary_is_what_the_runs_measured(output):
    summary = json.loads((output / "summary.json").read_text())
    two = metrics(output / "two_stages", "loss_metrics/global_avg_loss")
    dense = metrics(output / "dense", "loss_metrics/global_avg_loss")
    assert sorted(two) == [(step, 1 if step <= 12 else 2) for step in range(1, 25)]
    assert sorted(dense) == [(step, 2) for step in range(1, 25)]
    difference = np.array([two[s, 1 if s <= 12 else 2] - dense[s, 2] for s in range(1, 25)])
    at_switch = summary["training_at_switch"]
    before = difference[2:12].mean()
    assert at_switch["two_stages_minus_dense_before"] == pytest.approx(before)
    assert at_switch["spike_nats"] == pytest.approx(difference[12:22].max() - before)
    held_out = metrics(output / "two_stages", "validation_metrics/loss")
    assert summary["held_out_at_switch"]["lighthouse"] == held_out[12, 1]
    assert summary["held_out_at_switch"]["dense"] == held_out[12, 2]
    assert summary["final_held_out_loss"]["two_stages"] == held_out[24, 2]
    assert 2.5 < summary["corpus_unigram_entropy_nats"] < np.log(256)


def test_both_runs_read_the_same_tokens(output):
    tokens = [metrics(output / run, "n_tokens_seen") for run in ("two_stages", "dense")]
    assert tokens[0][24, 2] == tokens[1][24, 2] == 24 * 2048


def test_report_and_plot(output):
    summary = json.loads((output / "summary.json").read_text())
    report = (output / "report.md").read_text()
    assert f"{summary['final_held_out_loss']['two_stages']:.3f}" in report
    assert f"{summary['stage_1_speed_up']:.1f} times" in report
    assert "def read_lines(path):" in report and "loss.png" in report
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_second_call_reuses_the_runs(config, output):
    before = (output / "two_stages" / "metrics.jsonl").read_text()
    printed = run(config, output)
    assert printed.count("reusing") == 2
    assert (output / "two_stages" / "metrics.jsonl").read_text() == before
