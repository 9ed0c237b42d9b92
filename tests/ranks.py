"""Several ranks on this machine, in processes of their own, over gloo."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def launch(function: Callable[..., Any], num_ranks: int, folder: Path, *args: Any) -> list[Any]:
    """What ``function(*args)`` returns on each of ``num_ranks`` new processes, one group."""
    folder.mkdir(parents=True)
    # Spawned by name: each process imports the module of the function.
    torch.multiprocessing.spawn(_rank, (num_ranks, folder, function, args), nprocs=num_ranks)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(num_ranks)]


def _rank(rank: int, num_ranks: int, folder: Path, function: Callable[..., Any], args) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
    dist.init_process_group("gloo", f"file://{folder}/group", rank=rank, world_size=num_ranks)
    torch.save(function(*args), folder / f"{rank}.pt")
    dist.destroy_process_group()
    # Not by way of the interpreter's end, where a thread of torch that still stands aborts the
    # process (seen once: "terminate called without an active exception").
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
