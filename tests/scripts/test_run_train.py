"""scripts/run_train.sh: what it starts. A script stands in for Python."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "run_train.sh"

# Finds 4 GPUs, and shows the arguments it is started with.
PYTHON = """#!/usr/bin/env bash
if [[ $1 == -c ]]; then echo 4; else printf '<%s>' "$@"; fi
"""


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of the script in a folder without .venv."""
    for name in ("scripts", "programs"):
        (tmp_path / name).mkdir()
    shutil.copy(SCRIPT, tmp_path / "scripts")
    (tmp_path / "programs" / "python3").write_text(PYTHON)
    (tmp_path / "programs" / "python3").chmod(0o755)
    (tmp_path / "a b.toml").write_text("")
    return tmp_path.resolve()


def call(checkout: Path, *args: str, **variables: str) -> subprocess.CompletedProcess:
    path = f"{checkout}/programs{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["../scripts/run_train.sh", *args],
        cwd=checkout / "programs",
        env=os.environ | {"PATH": path} | variables,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("variables", "num_processes"), [({}, "4"), ({"NPROC": "2"}, "2"), ({"NPROC": "1"}, "1")]
)
def test_a_process_for_each_gpu(checkout, variables, num_processes):
    overrides = ["--training.dataset_path", "c d; $(touch e)"]
    result = call(checkout, "../a b.toml", *overrides, **variables)
    assert result.returncode == 0, result.stderr
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", num_processes]
    assert result.stdout[1:-1].split("><") == [
        *(torchrun if num_processes != "1" else ()),
        *["-m", "torchtitan.experiments.lighthouse.train"],
        *["--job.config_file", f"{checkout}/a b.toml", *overrides],
    ]


def test_python_of_the_environment_comes_first(checkout):
    (checkout / ".venv" / "bin").mkdir(parents=True)
    shutil.move(checkout / "programs" / "python3", checkout / ".venv" / "bin" / "python")
    assert call(checkout, "../a b.toml").stdout.startswith("<-m><torch.distributed.run>")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "error: CONFIG must come first, got ''; scripts/run_train.sh CONFIG [overrides ...]"),
        (["--training.steps", "3"], "error: CONFIG must come first, got '--training.steps'; scri"),
        (["c d.toml"], "error: CONFIG must be a TOML file, got 'c d.toml', which is none"),
    ],
    ids=["none", "no-config", "missing"],
)
def test_a_wrong_call_ends_with_one_line(checkout, args, message):
    result = call(checkout, *args)
    assert result.returncode == 2
    assert not result.stdout
    (line,) = result.stderr.splitlines()
    assert line.startswith(message)
