"""Read the environment variables of the launcher, and end this process when the launcher ends.

`lighthouse train` and torchrun set RANK, LOCAL_RANK and WORLD_SIZE, and start the ranks as child
processes. A launcher killed with SIGKILL cannot end its ranks, so each rank watches the launcher.
"""

import ctypes
import os
import signal
import sys
import threading
import time

LAUNCHED_BY_TORCHRUN = "TORCHELASTIC_RUN_ID"
"""Environment variable that torchrun sets."""

_STARTED_AS_CHILD = "LOCAL_WORLD_SIZE"
"""Environment variable of launchers that start the ranks as child processes."""

POLL_SECONDS = 1.0

_PR_SET_PDEATHSIG = 1


def check_environment() -> None:
    """Check the launcher's environment variables. Missing ones get the values of a single process.

    Raises:
        ValueError: a variable is not a number or is out of range.
    """
    defaults = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": 0}
    for name, value in defaults.items():
        os.environ.setdefault(name, str(value))
    os.environ.setdefault("MASTER_ADDR", "localhost")
    world_size = count_of("WORLD_SIZE")
    for name in ("RANK", "LOCAL_RANK"):
        check_number(name, 0, world_size - 1, "the number of this process, from 0 to WORLD_SIZE-1")
    check_number("MASTER_PORT", 0, 65535, "a port, from 0 to 65535")


def count_of(name: str) -> int:
    """The number of processes in the environment variable `name`. 1 if it is not set."""
    return check_number(name, 1, 2**31, "the number of processes", "1")


def check_number(name: str, least: int, largest: int, rule: str, default: str = "") -> int:
    """The integer in an environment variable. Raises ValueError unless it is in the range."""
    value = os.environ.get(name, default)
    is_number = value.isascii() and value.isdecimal() and len(value) < 20
    if not is_number or not least <= int(value) <= largest:
        raise ValueError(
            f"{name} must be {rule}, got {value[:40]!r}; unset it, or start the run with torchrun"
        )
    return int(value)


def end_with_launcher() -> None:
    """End this process immediately when its launcher ends. Without a launcher, do nothing.

    On Linux the kernel sends SIGKILL. A thread also watches the parent process. It is needed on
    other systems, and if the parent ends before the kernel is asked.
    """
    if _STARTED_AS_CHILD not in os.environ:
        return
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)
