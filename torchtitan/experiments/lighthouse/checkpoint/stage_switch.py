"""Record the stage switch, with digests that show the training state is unchanged.

`handover.json` in the dump folder holds these facts about the switch:

- the names of both phases and the sequence length of the new one
- the step, the learning rate and the number of tokens seen
- the data position of every data-parallel rank
- SHA-256 digests of all parameters and of all optimizer state, before and after the switch

If stage 2 changes from pieces to whole sequences, `full_length` holds the same facts about that
change.
"""

import contextlib
import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torchtitan.experiments.lighthouse.config.job_config import PIECES
from torchtitan.experiments.lighthouse.runtime.atomic_json import write_json
from torchtitan.experiments.lighthouse.runtime.read_files import read_json
from torchtitan.tools.logging import logger

FILE_NAME = "handover.json"

# Prefixes that activation checkpointing and compilation add to parameter names.
_WRAPPER = re.compile(r"(_checkpoint_wrapped_module|_orig_mod)\.")


def digest(named_tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 of the names and values of the shards of all ranks, in rank order."""
    sha = hashlib.sha256()
    for name, tensor in named_tensors:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        sha.update(name.encode())
        sha.update(local.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    shards = [None] * dist.get_world_size()
    dist.all_gather_object(shards, sha.hexdigest())
    return hashlib.sha256("".join(shards).encode()).hexdigest()


def state_digests(trainer) -> dict[str, str]:
    """Digests of the parameters and of the optimizer state of a trainer."""
    parameters = [item for part in trainer.model_parts for item in part.named_parameters()]
    parameters = [(_WRAPPER.sub("", name), parameter) for name, parameter in parameters]
    names = {parameter: name for name, parameter in parameters}
    moments = (
        (f"{names[parameter]}.{key}", torch.as_tensor(value))
        for optimizer in trainer.optimizers.optimizers
        for parameter, state in optimizer.state.items()
        for key, value in sorted(state.items())
    )
    return {"parameters": digest(parameters), "optimizer": digest(moments)}


def data_positions(trainer) -> list[Any]:
    """Data position of every rank. None for data loaded by a worker."""
    position = None
    if trainer.dataloader.num_workers == 0:
        # The loader applies a loaded position only at its next call.
        trainer.dataloader.state_dict()
        position = trainer.dataloader.dataset.position()
    positions = [None] * dist.get_world_size()
    dist.all_gather_object(positions, position)
    return positions


def write_handover(dump_folder: str, record: dict[str, Any]) -> Path:
    """Write the record atomically on rank 0.

    The run does not depend on the file. A failed write only logs a warning.
    """
    path = Path(dump_folder) / FILE_NAME
    if dist.get_rank() == 0:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if record["from"] == PIECES:
                former = {}
                # The record of the stage switch may be missing or invalid.
                with contextlib.suppress(ValueError):
                    former = read_json(path)
                record = {**former, "full_length": record}
            write_json(path, record)
        except OSError as error:
            logger.warning(f"{path} could not be written ({error}); training continues")
    return path
