"""What a process is told by its launcher, and its end with the launcher's.

`lighthouse train` and torchrun set RANK, LOCAL_RANK and WORLD_SIZE and start the ranks as their
children. A launcher that is killed with SIGKILL cannot end them: each rank sees to that itself.
"""

import ctypes
import os
import signal
import sys
import threading
import time

LAUNCHED_BY_TORCHRUN = "TORCHELASTIC_RUN_ID"
"""An environment variable that torchrun sets."""

_STARTED_AS_CHILD = "LOCAL_WORLD_SIZE"
"""An environment variable of the launchers whose children the ranks are."""

POLL_SECONDS = 1.0

_PR_SET_PDEATHSIG = 1


def check_environment() -> None:
    """Check what a launcher sets, and set what it has not: one process.

    Raises:
        ValueError: a variable is no number, or the rank is none of the group.
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
    """The number of processes that the environment variable `name` says, 1 without it."""
    return check_number(name, 1, 2**31, "the number of processes", "1")


def check_number(name: str, least: int, largest: int, rule: str, default: str = "") -> int:
    """The number in an environment variable. Raises ValueError for what is none in the range."""
    value = os.environ.get(name, default)
    is_number = value.isascii() and value.isdecimal() and len(value) < 20
    if not is_number or not least <= int(value) <= largest:
        raise ValueError(
            f"{name} must be {rule}, got {value[:40]!r}; unset it, or start the run with torchrun"
        )
    return int(value)


def end_with_launcher() -> None:
    """End this process, at once, when the launcher that started it ends; without one do nothing.

    The kernel sends SIGKILL where it can (Linux). A thread watches the parent as well: the kernel
    is silent if the parent has ended before it was asked, and other systems have no such call.
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
