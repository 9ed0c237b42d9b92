"""Ranks end when their launcher ends, also when it is killed."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
from torchtitan.experiments.lighthouse.runtime import launcher


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def rank_of_a_killed_launcher() -> int:
    """The process id of a rank whose launcher has been killed."""
    read, write = os.pipe()
    parent = os.fork()
    if not parent:
        rank = os.fork()
        if not rank:
            launcher.end_with_launcher()
            os.write(write, str(os.getpid()).encode())
        time.sleep(1000)
    rank = int(os.read(read, 20))
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    return rank


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("by_kernel", [True, False])
def test_a_rank_ends_when_its_launcher_is_killed(monkeypatch, by_kernel):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setattr(launcher, "POLL_SECONDS", 1000 if by_kernel else 0.05)
    if not by_kernel:
        monkeypatch.setattr(launcher.sys, "platform", "other")
    rank = rank_of_a_killed_launcher()
    deadline = time.monotonic() + 20
    while is_running(rank) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_running(rank)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_run_without_a_launcher_outlives_its_shell(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    rank = rank_of_a_killed_launcher()
    time.sleep(0.3)
    assert is_running(rank)
    os.kill(rank, signal.SIGKILL)
