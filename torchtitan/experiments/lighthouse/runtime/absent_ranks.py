"""Find the rank that caused a collective to fail or time out.

The error of a failed collective names the first broken connection. That is seldom the rank at
fault. So each rank that fails reports to the store of the process group, and waits for the reports
of the others. A rank without a report hangs or has ended.

The store must not be in the process of the rank that hangs. torchrun keeps it in its own process.
"""

import os
import socket
import time
from datetime import timedelta

import torch.distributed as dist

PREFIX = "lighthouse/rank"

REPORT_SECONDS = 15
"""Seconds to wait for the reports of the other ranks, which may fail a little later."""

_SIGNS = ("gloo", "nccl", "timed out", "timeout", "connection closed", "connection reset")
"""Words in the messages of communication errors. torch has no single type for them."""


def announce() -> None:
    """Publish the process id and host of this rank to the other ranks. Simulated ranks do not."""
    if dist.get_world_size() > 1 and dist.get_backend() != "fake":
        place = f"process {os.getpid()} on {socket.gethostname()}"
        _store().set(f"{PREFIX}/{dist.get_rank()}/place", place)


def is_of_communication(error: BaseException | None) -> bool:
    """Whether an error comes from a collective, and not from this rank alone."""
    if isinstance(error, dist.DistError):
        return True
    message = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in message for sign in _SIGNS)


def absent_ranks(step: int, seconds: float = REPORT_SECONDS) -> dict[int, str]:
    """Report this rank, and return the ranks that have not reported within `seconds`.

    Returns:
        The process and host of each such rank, by rank. Empty if all ranks have reported or the
        store does not answer.
    """
    world_size = dist.get_world_size()
    try:
        store = _store()
        store.set_timeout(timedelta(seconds=seconds))
        store.set(_key(dist.get_rank(), step), "here")
        end = time.monotonic() + seconds
        while True:
            absent = [rank for rank in range(world_size) if not store.check([_key(rank, step)])]
            if not absent or time.monotonic() > end:
                break
            time.sleep(0.2)
        return {rank: store.get(f"{PREFIX}/{rank}/place").decode() for rank in absent}
    except RuntimeError:
        return {}


def description(absent: dict[int, str], step: int) -> str:
    """An error message of one line about the absent ranks."""
    ranks = ", ".join(f"rank {rank} ({place})" for rank, place in absent.items())
    return (
        f"{ranks} did not reach step {step}, and the other ranks have timed out; check whether "
        "that process still runs, read its output, and see what it waits for with py-spy dump "
        "--pid; comm.train_timeout_seconds is how long the others wait"
    )


def _key(rank: int, step: int) -> str:
    return f"{PREFIX}/{rank}/failed/{step}"


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()
