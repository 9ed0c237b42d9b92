"""Checkpoints of a run in two stages: torchtitan's, with seven differences.

- One is saved at the stage switch, whatever the interval, and never purged: the last state
  trained with Lighthouse, from which a dense run can start.
- Checkpoints count for `keep_latest_k` only if they are whole (`files.py`); torn ones
  older than the newest whole one are removed with the old ones. The newest whole one is loaded.
- One can be saved at any step, when the run is asked to stop.
- Each says what it was trained with (`compatibility.py`).
- A folder without a whole checkpoint stops the run: torchtitan would train from scratch.
- The hyperparameters of the optimizer are those of the configuration: torchtitan would go on with
  those that were saved, whatever the configuration says.
- A save that fails ends the run with one line that names the last good checkpoint.
"""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchtitan.components.checkpoint import LR_SCHEDULER, CheckpointManager
from torchtitan.experiments.lighthouse.checkpoint.compatibility import write_record
from torchtitan.experiments.lighthouse.checkpoint.files import (
    check_folder,
    checkpoint_faults,
    checkpoint_steps,
    whole_steps,
)
from torchtitan.experiments.lighthouse.runtime.errors import TrainingAborted
from torchtitan.tools.logging import logger


class TwoStageCheckpointManager(CheckpointManager):
    """See the module."""

    switch_step: int | None = None
    """Last step of stage 1, or None for a run without a switch."""

    saved_step: int | None = None
    """Step of the newest checkpoint of this process."""

    wanted_step: int | None = None
    """A step that is saved whatever the interval."""

    record: dict[str, Any] | None = None
    """What checkpoints of this run are trained with."""

    @classmethod
    def adopt(
        cls,
        manager: CheckpointManager,
        switch_step: int | None,
        record: dict[str, Any] | None = None,
    ) -> None:
        """Turn the manager that torchtitan's trainer has made into one of this class."""
        manager.__class__ = cls
        manager.switch_step = switch_step
        manager.record = record

    def load(self, step: int = -1) -> bool:
        if not self.enable:
            return super().load(step)
        check_folder(self.folder)
        schedulers = list(self.states[LR_SCHEDULER])
        configured = [_hyperparameters(scheduler.optimizer) for scheduler in schedulers]
        is_loaded = super().load(step)
        if is_loaded:
            for scheduler, values in zip(schedulers, configured, strict=True):
                _use_hyperparameters(scheduler, values)
        return is_loaded

    def save(self, curr_step: int, last_step: bool = False) -> None:
        if not self._should_save(curr_step, last_step):
            return
        with self._loudly(f"the checkpoint of step {curr_step}"):
            # The save before, if it still goes on, belongs to another folder.
            self._async_wait()
            if torch.distributed.get_rank() == 0:
                self._prepare_folder(Path(self._create_checkpoint_id(curr_step)))
            torch.distributed.barrier()
            super().save(curr_step, last_step)
        self.saved_step = curr_step

    def _prepare_folder(self, path: Path) -> None:
        """Make the folder of a checkpoint anew: of one that was torn no file may count as new."""
        if path.exists():
            shutil.rmtree(path)
        if self.record is not None:
            write_record(path, self.record)

    @contextlib.contextmanager
    def _loudly(self, what: str) -> Iterator[None]:
        """A failure inside ends the run with one line."""
        try:
            yield
        except (CheckpointException, OSError, RuntimeError) as error:
            raise TrainingAborted(
                f"{what} could not be saved ({_reason(error)}); {self.last_good()}; see to "
                "the space and the rights of its folder"
            ) from error

    def last_good(self) -> str:
        """The newest whole checkpoint, as part of a sentence."""
        if not self.enable:
            return "nothing is saved"
        whole = whole_steps(self.folder)
        if not whole:
            return "there is no good checkpoint"
        return f"the last good checkpoint is {self._create_checkpoint_id(whole[-1])}"

    def _async_wait(self) -> None:
        with self._loudly("a checkpoint"):
            super()._async_wait()

    def _find_load_step(self, folder: str = "") -> int:
        if folder:
            return super()._find_load_step(folder)
        faults = checkpoint_faults(self.folder)
        newest = max((step for step, fault in faults.items() if fault is None), default=-1)
        for step, fault in faults.items():
            if step > newest:
                logger.warning(
                    f"{self._create_checkpoint_id(step)} is torn: {fault}; going on from "
                    f"{self._create_checkpoint_id(newest)}, the newest whole checkpoint"
                )
        return newest

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


def _hyperparameters(optimizer: Optimizer) -> list[dict[str, Any]]:
    names = ("initial_lr", "betas", "eps", "weight_decay")
    return [{name: group[name] for name in names} for group in optimizer.param_groups]


def _use_hyperparameters(scheduler: LambdaLR, values: list[dict[str, Any]]) -> None:
    """From the next step on, the one after `scheduler.last_epoch` others."""
    groups = scheduler.optimizer.param_groups
    for group, value, factor in zip(groups, values, scheduler.lr_lambdas, strict=True):
        group.update(value, lr=value["initial_lr"] * factor(scheduler.last_epoch))
    scheduler.base_lrs = [group["initial_lr"] for group in groups]
    scheduler._last_lr = [group["lr"] for group in groups]


def _reason(error: BaseException) -> str:
    """The error of the first rank that had one, in one line."""
    if isinstance(error, CheckpointException):
        rank, (error, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {_reason(error)}"
    return f"{type(error).__name__}: {error}".split("\n")[0]
