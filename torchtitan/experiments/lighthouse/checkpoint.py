"""Checkpoints of a run in two stages: torchtitan's, with four differences.

- One is saved at the stage switch, whatever the interval, and never purged: the last state
  trained with Lighthouse, from which a dense run can start.
- Checkpoints count for `keep_latest_k` only if they are whole; torn ones older than the newest
  whole one are removed with the old ones.
- One can be saved at any step, when the run is asked to stop.
- A folder without a whole checkpoint stops the run: torchtitan would train from scratch.
"""

import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torchtitan.components.checkpoint import CheckpointManager


class TwoStageCheckpointManager(CheckpointManager):
    """See the module."""

    switch_step: int | None = None
    """Last step of stage 1, or None for a run without a switch."""

    saved_step: int | None = None
    """Step of the newest checkpoint of this process."""

    wanted_step: int | None = None
    """A step that is saved whatever the interval."""

    @classmethod
    def adopt(cls, manager: CheckpointManager, switch_step: int | None) -> None:
        """Turn the manager that torchtitan's trainer has made into one of this class."""
        manager.__class__ = cls
        manager.switch_step = switch_step

    def load(self, step: int = -1) -> bool:
        if self.enable:
            check_folder(self.folder)
        return super().load(step)

    def save(self, curr_step: int, last_step: bool = False) -> None:
        if self._should_save(curr_step, last_step):
            self.saved_step = curr_step
        super().save(curr_step, last_step)

    def save_now(self, step: int) -> bool:
        """Save `step` unless it is saved, and wait until it is written.

        Returns:
            Whether there is a checkpoint of it: not where saving is not enabled.
        """
        if not self.enable or self.load_only:
            return False
        if self.saved_step != step:
            self.wanted_step = step
            self.save(step)
        self._async_wait()
        return True

    def _should_save(self, curr_step: int, last_step: bool = False) -> bool:
        is_due = curr_step in (self.switch_step, self.wanted_step)
        return (self.enable and not self.load_only and is_due) or super()._should_save(
            curr_step, last_step
        )

    def _purge_stale_checkpoints(self) -> None:
        if self.keep_latest_k <= 0 or torch.distributed.get_rank() != 0:
            return
        steps = checkpoint_steps(self.folder)
        whole = [step for step, is_whole in steps.items() if is_whole]
        kept = {*whole[-self.keep_latest_k :], self.switch_step}
        newest = max(whole, default=-1)
        for step in steps:
            if step not in kept and step < newest:
                self.purge_queue.put(self._create_checkpoint_id(step))


def checkpoint_steps(folder: str | Path) -> dict[int, bool]:
    """Steps of the checkpoints in `folder`, ascending, and whether each is whole.

    Distributed checkpoints write their metadata last: one without it is torn.
    """
    steps = {}
    folder = Path(folder)
    for path in folder.iterdir() if folder.is_dir() else ():
        match = re.fullmatch(r"step-(\d+)", path.name)
        if match and path.is_dir():
            steps[int(match.group(1))] = is_whole(path)
    return dict(sorted(steps.items()))


def is_whole(path: str | Path) -> bool:
    """Whether the checkpoint in the folder `path` was written to its end."""
    return any(
        (Path(path) / name).is_file() for name in (".metadata", "model.safetensors.index.json")
    )


def data_parallel_degree(path: str | Path) -> int | None:
    """Data-parallel ranks whose data position the whole checkpoint `path` holds; None if none.

    Raises:
        ValueError: its metadata cannot be read.
    """
    return sum(key.startswith("dataloader.dp_rank_") for key in _keys(path)) or None


def prepared_position(path: str | Path) -> dict[str, Any] | None:
    """Data position in prepared data, of all ranks, that the checkpoint `path` holds, or None.

    Raises:
        ValueError: its metadata cannot be read.
    """
    prefix = "dataloader."
    names = [key.removeprefix(prefix) for key in _keys(path) if key.startswith(prefix)]
    if "windows" not in names:
        return None
    state = {"dataloader": dict.fromkeys(names, "")}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(state, storage_reader=FileSystemReader(path), no_dist=True)
    return state["dataloader"]


def _keys(path: str | Path) -> list[str]:
    """What a checkpoint holds, by name: nothing where it is none."""
    if not (Path(path) / ".metadata").is_file():
        return []
    try:
        return list(FileSystemReader(path).read_metadata().state_dict_metadata)
    except (OSError, EOFError, pickle.UnpicklingError, AttributeError) as error:
        raise ValueError(
            f"the checkpoint {str(path)!r} must have readable metadata, got {error!r}; move it "
            "away, and an older one is used"
        ) from None


def check_folder(folder: str | Path) -> None:
    """Raise ValueError if `folder` exists but holds no whole checkpoint."""
    if not Path(folder).exists():
        return
    steps = checkpoint_steps(folder)
    if any(steps.values()):
        return
    found = ", ".join(f"step-{step}" for step in steps)
    state = f"only torn checkpoints ({found})" if found else "no checkpoint"
    raise ValueError(
        f"checkpoint.folder must hold a whole checkpoint if it exists, got {str(folder)!r} with "
        f"{state}; move the folder away to start from step 0 or from initial_load_path"
    )
