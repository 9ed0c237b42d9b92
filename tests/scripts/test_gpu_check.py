"""`scripts/gpu_check.sh` runs all parts and names those that failed. A script replaces Python."""

import os
import subprocess
from pathlib import Path

import pytest

STAND_IN = """#!/bin/sh
echo "called with $*"
case "$*" in scripts/*|*bench*) echo '{"json": 1}' ;; esac
case "$*" in *FAILING*) exit 1 ;; esac
"""
SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu_check.sh"


@pytest.fixture
def check(tmp_path):
    """Call the script with parts. Programs with `failing` in their arguments fail."""

    def call(*parts: str, failing: str = "none") -> subprocess.CompletedProcess:
        python = tmp_path / "python"
        python.write_text(STAND_IN.replace("FAILING", failing))
        python.chmod(0o755)
        return subprocess.run(
            ["bash", str(SCRIPT), str(tmp_path / "out"), *parts],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHON": str(python)},
        )

    return call


def test_all_parts_run_and_are_collected(check, tmp_path):
    done = check()
    assert done.returncode == 0, done.stderr
    calls = [line for line in done.stdout.splitlines() if line.startswith("called")]
    assert len(calls) == 8 and "lighthouse_cli bench" in calls[-1]
    report = (tmp_path / "out" / "gpu.md").read_text()
    assert all(call in report for call in calls) and "json" not in report


def test_a_part_that_fails_is_told_and_stops_no_other(check):
    done = check(failing="test_gpu.py")
    assert done.returncode == 1
    assert done.stderr.startswith("failed: tests; see")
    assert "lighthouse_cli bench" in done.stdout


def test_parts_can_be_chosen(check):
    assert check("share").stdout.count("called") == 3
    done = check("share", "shares")
    assert done.returncode == 2 and "got shares" in done.stderr
    assert "called" not in done.stdout
