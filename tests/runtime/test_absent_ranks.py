"""The error names the rank that is absent, not the one whose connection broke first."""

import os
import re
import signal
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from runs import command_line, start_two_processes
from torchtitan.experiments.lighthouse.runtime import absent_ranks as module
from torchtitan.experiments.lighthouse.runtime.absent_ranks import (
    absent_ranks,
    announce,
    description,
    is_of_communication,
)


@pytest.fixture
def as_rank(monkeypatch):
    """Makes this process act as each of three ranks in turn."""
    store, current = dist.HashStore(), {}
    monkeypatch.setattr(module, "_store", lambda: store)
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(dist, "get_backend", lambda: "gloo")
    monkeypatch.setattr(dist, "get_rank", lambda: current["rank"])
    for current["rank"] in range(3):
        announce()
    return lambda rank: current.update(rank=rank)


def test_who_has_not_reported_is_absent_and_told_by_its_place(as_rank, monkeypatch):
    monkeypatch.setattr(module.socket, "gethostname", lambda: "other")
    as_rank(1)
    announce()
    as_rank(0)
    assert absent_ranks(7, 0.1).keys() == {1, 2}
    as_rank(2)
    absent = absent_ranks(7, 0.1)
    assert absent.keys() == {1}
    line = description(absent, 7)
    assert line.startswith("rank 1 (process ") and " on other) did not reach step 7" in line
    assert "py-spy" in line and "\n" not in line
    as_rank(1)
    assert absent_ranks(7, 0.1) == {}


def test_the_reports_of_another_step_do_not_count(as_rank):
    for rank in range(3):
        as_rank(rank)
        absent_ranks(6, 0)
    assert absent_ranks(7, 0.1).keys() == {0, 1}


def test_a_store_that_does_not_answer_names_no_one(as_rank, monkeypatch):
    as_rank(0)

    def fail():
        raise dist.DistNetworkError("broken pipe")

    monkeypatch.setattr(module, "_store", fail)
    assert absent_ranks(7, 0.1) == {}


def test_an_error_of_one_rank_alone_is_none_of_communication():
    assert is_of_communication(RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed"))
    assert is_of_communication(dist.DistBackendError("NCCL error"))
    assert not is_of_communication(RuntimeError("CUDA out of memory"))
    assert not is_of_communication(ValueError("Connection closed by peer"))
    assert not is_of_communication(None)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_rank_that_hangs_ends_a_run_of_two_with_one_line(corpus, tmp_path):
    # It never gets so far.
    steps = {"training__steps": 100_000, "lr_scheduler__total_steps": 100_000}
    args = command_line(tmp_path / "run", corpus, **steps, comm__train_timeout_seconds=5)
    log = tmp_path / "log.txt"
    with start_two_processes(args, log, until="step 3/") as run:
        hung = pid_of_rank(1, run.pid)
        os.kill(hung, signal.SIGSTOP)
        assert run.wait(timeout=300) == 1
    text = log.read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert re.match(rf"error: rank 1 \(process {hung} on .+\) did not reach step \d+, and", line)
    assert "Traceback" not in text
    assert not Path(f"/proc/{hung}").exists()


def pid_of_rank(rank: int, launcher: int) -> int:
    """The process of one rank, among the children of its launcher."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    wanted = f"RANK={rank}".encode()
    (pid,) = [
        int(pid)
        for pid in children
        if wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    ]
    return pid
