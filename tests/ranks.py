"""Run a function on several gloo ranks, each in its own process on this machine."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def launch(function: Callable[..., Any], num_ranks: int, folder: Path, *args: Any) -> list[Any]:
    """Run ``function(*args)`` on ``num_ranks`` new processes of a group. Returns the results."""
    folder.mkdir(parents=True)
    # Functions are spawned by name. Each process imports the module of the function.
    torch.multiprocessing.spawn(_rank, (num_ranks, folder, function, args), nprocs=num_ranks)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(num_ranks)]


def _rank(rank: int, num_ranks: int, folder: Path, function: Callable[..., Any], args) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
    dist.init_process_group("gloo", f"file://{folder}/group", rank=rank, world_size=num_ranks)
    torch.save(function(*args), folder / f"{rank}.pt")
    dist.destroy_process_group()
    # Skip the interpreter's shutdown. A running thread of torch once aborted the process there
    # ("terminate called without an active exception").
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
