"""`scripts/slurm/launch.sh` finds the folder of its run. Scripts replace the commands of SLURM."""

import os
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "scripts" / "slurm" / "launch.sh"


@pytest.fixture
def start(tmp_path):
    """Starts a job in `tmp_path` and returns its exit code, stderr and the trainer's command."""
    (tmp_path / "bin").mkdir()
    for name, body in {"srun": 'echo "$@" >command', "scontrol": "echo host"}.items():
        program = tmp_path / "bin" / name
        program.write_text(f"#!/bin/sh\n{body}\n")
        program.chmod(0o755)
    (tmp_path / "run.toml").write_text("[job]\n")

    def start(args: str = "run.toml --training.steps 8", **variables: str) -> tuple[int, str, str]:
        (tmp_path / "command").unlink(missing_ok=True)
        job = {"SUBMIT_DIR": str(tmp_path), "JOB_NAME": "job", "JOB_ID": "7", "NTASKS": "2"}
        job |= {"JOB_NODELIST": "host", "RESTART_COUNT": "0"}
        variables = {f"SLURM_{name}": value for name, value in job.items()} | variables
        settings = "run_root=runs port=1 interface=; activate() { :; }"
        done = subprocess.run(
            ["bash", "-c", f"{settings}; source {LAUNCH} {args}"],
            cwd=tmp_path,
            env={"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", **variables},
            capture_output=True,
            text=True,
        )
        command = tmp_path / "command"
        return done.returncode, done.stderr, command.read_text() if command.exists() else ""

    return start


def test_another_job_continues_in_the_folder_of_an_ended_one(start, tmp_path):
    code, _, first = start()
    assert code == 0 and "--job.dump_folder runs/job-7 --training.steps 8" in first
    # The configuration of the folder is used, not the file of today.
    (tmp_path / "run.toml").write_text("changed")
    code, _, second = start(SLURM_JOB_ID="8", RUN="runs/job-7")
    assert code == 0 and second == first
    assert (tmp_path / "runs/job-7/config.toml").read_text() == "[job]\n"
    assert len((tmp_path / "runs/job-7/starts.txt").read_text().splitlines()) == 2
    assert not (tmp_path / "runs/job-8").exists()


def test_a_folder_without_a_run_is_refused(start, tmp_path):
    code, error, command = start(RUN="runs/job-6")
    assert code == 2 and not command
    assert error == (
        "error: RUN must be the folder of a run, got 'runs/job-6' without config.toml; correct it\n"
    )
    assert not (tmp_path / "runs").exists()


def test_the_folder_of_a_new_job_must_not_exist(start):
    start()
    code, error, _ = start()
    assert code == 2
    assert error == "error: runs/job-7 must not exist before the job first starts; move it away\n"
    assert start(SLURM_RESTART_COUNT="1")[0] == 0
