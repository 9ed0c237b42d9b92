"""The set-up scripts report wrong arguments before they install anything."""

import os
import subprocess
from pathlib import Path

SCRIPTS = Path(__file__).parents[2] / "scripts"


def run(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(SCRIPTS / script), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def test_an_old_python_is_refused(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.10.13 || exit 1\n')
    python.chmod(0o755)
    done = run("setup.sh", PYTHON=str(python), VENV=str(tmp_path / "venv"))
    assert done.returncode == 2
    assert (
        done.stderr
        == "error: Python must be 3.11 or newer, got Python 3.10.13; set PYTHON to one\n"
    )
    assert not (tmp_path / "venv").exists()


def test_a_torch_that_is_not_supported_is_refused():
    done = run("test_torch.sh", "2.10.0")
    assert done.returncode == 2
    assert done.stderr.startswith("error: the version of torch must be 2.11 to 2.14, got 2.10.0")
    assert run("test_torch.sh").returncode == 2
