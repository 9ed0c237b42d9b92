"""The whole quick start with small sizes: runs, report, figures, reuse."""

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
        "seq_len = 16384": "seq_len = 2048",
        "\nsteps = 68\n": "\nsteps = 24\n",
        "stage1_steps = 60": "stage1_steps = 12",
        "freq = 8": "freq = 4",
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


def seconds_at(folder: Path) -> tuple[dict[tuple[int, int], float], dict[tuple[int, int], float]]:
    """Seconds of training before each validation, and its loss."""
    rates = metrics(folder, "throughput(tps)")
    validations = metrics(folder, "validation_metrics/loss")
    trained = {step: 2048 / rate for (step, _), rate in rates.items()}
    seconds = {key: sum(trained[s] for s in trained if s <= key[0]) for key in validations}
    return seconds, validations


def test_summary_is_what_the_runs_measured(output):
    summary = json.loads((output / "summary.json").read_text())
    two_seconds, two = seconds_at(output / "two_stages")
    dense_seconds, dense = seconds_at(output / "dense")
    equal = summary["equal_time"]
    assert equal["seconds"] == pytest.approx(min(two_seconds[24, 2], max(dense_seconds.values())))
    for name, seconds, losses in (
        ("two_stages", two_seconds, two),
        ("dense", dense_seconds, dense),
    ):
        keys = sorted(losses)
        expected = np.interp(
            equal["seconds"], [seconds[k] for k in keys], [losses[k] for k in keys]
        )
        assert equal[name] == pytest.approx(expected)
        assert summary["final_held_out_loss"][name] == losses[keys[-1]]
    assert summary["held_out_at_switch"]["lighthouse"] == two[12, 1]
    assert summary["held_out_at_switch"]["dense"] == two[12, 2]
    dense_rates = list(metrics(output / "dense", "throughput(tps)").values())
    assert summary["dense_seconds_for_all_tokens"] == pytest.approx(
        24 * 2048 / np.median(dense_rates)
    )


def test_dense_run_ends_once_it_trained_as_long(output):
    """The dense run may also end with its last step. With few tokens, either run may be faster."""
    seconds, _ = seconds_at(output / "two_stages")
    dense_seconds, losses = seconds_at(output / "dense")
    last = max(losses)
    assert last[0] == 24 or dense_seconds[last] >= seconds[24, 2]


def test_both_runs_read_the_same_tokens(output):
    two, dense = (
        metrics(output / run, "loss_metrics/global_avg_loss") for run in ("two_stages", "dense")
    )
    # The first step has the same parameters and the same batch with both kinds of attention.
    assert sorted(two) == [(step, 1 if step <= 12 else 2) for step in range(1, 25)]
    assert two[1, 1] == pytest.approx(dense[1, 2], rel=0.02)
    assert metrics(output / "two_stages", "n_tokens_seen")[24, 2] == 24 * 2048


def test_report_and_plots(output):
    summary = json.loads((output / "summary.json").read_text())
    report = (output / "report.md").read_text()
    assert f"{summary['equal_time']['two_stages']:.3f}" in report
    assert f"{summary['layer_milliseconds']['dense'][0]:,.1f}" in report
    assert "def read_lines(path):" in report
    for name in ("loss.png", "layer.png"):
        assert name in report
        assert (output / name).read_bytes().startswith(b"\x89PNG")


def test_second_call_reuses_the_runs(config, output):
    before = (output / "two_stages" / "metrics.jsonl").read_text()
    printed = run(config, output)
    assert printed.count("reusing") == 2
    assert (output / "two_stages" / "metrics.jsonl").read_text() == before
