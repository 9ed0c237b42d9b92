"""Checkpoint manager of a two-stage run. It extends torchtitan's manager as follows.

- It saves a checkpoint at the stage switch, whatever the interval, and never purges it. This is the
  last state trained with Lighthouse Attention. A dense run can start from it.
- Only good checkpoints (`files.py`) count for `keep_latest_k`. Bad checkpoints older than the
  newest good one are purged. The newest good one is loaded.
- A checkpoint is marked as doubtful if its parameters are not sane, or if steps were skipped around
  it. Doubtful checkpoints are not good.
- Checksums are saved with each checkpoint and verified before loading (`checksums.py`). If a
  checkpoint cannot be loaded, the next older good one is tried, with a warning.
- A checkpoint can be saved at any step, when the run is asked to stop.
- Each checkpoint records the configuration it was trained with (`compatibility.py`).
- A folder without a good checkpoint stops the run. torchtitan would train from scratch.
- Optimizer hyperparameters come from the configuration. torchtitan would use the saved ones.
- A failed save ends the run with one line that names the last good checkpoint.
- Files that no run has written are never removed from the folder of a checkpoint.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchtitan.components.checkpoint import LR_SCHEDULER, MODEL, AsyncMode, CheckpointManager
from torchtitan.experiments.lighthouse.checkpoint.checksums import ChecksumWriter, checksum_fault
from torchtitan.experiments.lighthouse.checkpoint.compatibility import write_record
from torchtitan.experiments.lighthouse.checkpoint.files import (
    check_folder,
    checkpoint_faults,
    checkpoint_steps,
    foreign_files,
    mark_doubtful,
    remove_checkpoint,
    whole_steps,
)
from torchtitan.experiments.lighthouse.runtime.absent_ranks import is_of_communication
from torchtitan.experiments.lighthouse.runtime.errors import TrainingAborted
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import GarbageCollection

LARGEST_SANE = 1e6
"""Largest absolute value of a parameter in a working model. Parameters start below 1 and stay below
a few hundred."""

DOUBT_STEPS = 10
"""A checkpoint is doubtful if steps were skipped before and after it, each within this many."""


class TwoStageCheckpointManager(CheckpointManager):
    """The checkpoint manager that the module docstring describes."""

    saved_step: int | None = None
    """Step of the last checkpoint that this process saved."""

    wanted_step: int | None = None
    """A step to save whatever the interval."""

    def __init__(
        self,
        *args,
        switch_step: int | None,
        record: dict[str, Any],
        with_checksums: bool,
        check_step: Callable[[int], None],
        **kwargs,
    ):
        """
        Args:
            switch_step: last step of stage 1, or None for a run without a switch.
            record: the configuration to record in each checkpoint.
            with_checksums: whether checksums are written and verified.
            check_step: raises ValueError unless the run can resume from its checkpoint of a step.
        """
        self.switch_step, self.record = switch_step, record
        self._with_checksums, self._check_step = with_checksums, check_step
        self._left_out_step: int | None = None
        # Steps whose checkpoints look whole but could not be loaded.
        self._unloadable: set[int] = set()
        super().__init__(*args, **kwargs)

    def load(self, step: int = -1) -> bool:
        if not self.enable:
            return super().load(step)
        check_folder(self.folder)
        # There is one for each part of the model, and pipeline parallelism is refused.
        (scheduler,) = self.states[LR_SCHEDULER]
        configured = _hyperparameters(scheduler.optimizer)
        is_loaded = self._load_or_fall_back(step)
        if is_loaded:
            _use_hyperparameters(scheduler, configured)
        return is_loaded

    def _load_or_fall_back(self, step: int) -> bool:
        """Load a checkpoint. If this run saved several, load the newest that can be loaded."""
        is_own = os.path.exists(self.folder)
        is_free = is_own and step == -1
        while True:
            step = self._find_load_step() if is_free else step
            path = self._create_checkpoint_id(step) if is_own else self.initial_load_path
            is_loaded, fault = self._load_once(path, step, is_own)
            if fault is None:
                return is_loaded
            self._unloadable.add(step)
            older = self._good_steps()
            if not is_free or not older:
                raise TrainingAborted(
                    f"the checkpoint {path} cannot be loaded: {fault}; restore it, or name another "
                    "one with checkpoint.initial_load_path and another job.dump_folder"
                )
            logger.warning(f"{path} cannot be loaded: {fault}; an older checkpoint is tried")
            try:
                self._check_step(older[-1])
            except ValueError as error:
                raise TrainingAborted(str(error)) from None

    def _load_once(self, path: str | None, step: int, is_own: bool) -> tuple[bool, str | None]:
        """Returns whether a checkpoint was loaded, and the fault, which is equal on all ranks."""
        if path is not None and self._with_checksums:
            fault = checksum_fault(path, dist.get_rank(), dist.get_world_size())
            fault = _first_of_all_ranks(fault)
            if fault is not None:
                if is_own and dist.get_rank() == 0:
                    with contextlib.suppress(OSError):
                        mark_doubtful(path, fault)
                return False, fault
        is_loaded, fault = False, None
        try:
            is_loaded = super().load(step)
        except (Exception, CheckpointException) as error:
            if isinstance(error, torch.OutOfMemoryError) or is_of_communication(error):
                raise
            fault = _reason(error)
        return is_loaded, _first_of_all_ranks(fault)

    def is_good(self, step: int) -> bool:
        """Whether the checkpoint of `step` exists and is good."""
        return self.enable and step in self._good_steps()

    def _good_steps(self) -> list[int]:
        return [step for step in whole_steps(self.folder) if step not in self._unloadable]

    def save(self, curr_step: int, last_step: bool = False) -> None:
        if not self._should_save(curr_step, last_step):
            return
        with self._loudly(f"the checkpoint of step {curr_step}"):
            # An earlier asynchronous save must end before this folder is prepared.
            self._async_wait()
            doubt = self._doubt(curr_step)
            if dist.get_rank() == 0:
                self._prepare_folder(Path(self._create_checkpoint_id(curr_step)), doubt)
            dist.barrier()
            super().save(curr_step, last_step)
        self.saved_step = curr_step
        self._unloadable.discard(curr_step)

    def _prepare_folder(self, path: Path, doubt: str | None) -> None:
        """Empty the folder of a checkpoint, so that no file of a torn one counts as new."""
        if os.path.lexists(path):
            remove_checkpoint(path)
        write_record(path, self.record)
        if doubt is not None:
            mark_doubtful(path, doubt)
            logger.warning(f"{path} does not count as good: {doubt}")

    def _doubt(self, step: int) -> str | None:
        """Why a checkpoint of the current state would not be good, or None. Equal on all ranks."""
        largest = largest_parameter(self.states[MODEL].model)
        if not largest <= LARGEST_SANE:
            return f"its largest parameter is {largest:.3g}"
        if step == self._left_out_step:
            return f"step {step} was left out of training"
        return None

    def note_left_out(self, step: int) -> None:
        """Record a skipped step, the same on all ranks.

        A checkpoint saved between two skipped steps is marked as doubtful.
        """
        before, saved = self._left_out_step, self.saved_step
        self._left_out_step = step
        if not self.enable or None in (before, saved):
            return
        if saved - DOUBT_STEPS < before <= saved < step <= saved + DOUBT_STEPS:
            doubt = f"it was saved between the steps {before} and {step}, which were left out"
            # An asynchronous save may still be writing, but to other files.
            if dist.get_rank() == 0:
                mark_doubtful(self._create_checkpoint_id(saved), doubt)

    def dcp_save(
        self,
        state_dict: dict[str, Any],
        checkpoint_id: str,
        async_mode: AsyncMode,
        enable_garbage_collection: bool = False,
        to_hf: bool = False,
    ) -> Any:
        if to_hf or not self._with_checksums:
            return super().dcp_save(
                state_dict, checkpoint_id, async_mode, enable_garbage_collection, to_hf
            )
        options = {"storage_writer": ChecksumWriter(checkpoint_id)}
        if async_mode == AsyncMode.DISABLED:
            result = dcp.save(state_dict, **options)
        else:
            if async_mode == AsyncMode.ASYNC_WITH_PINNED_MEM:
                options["async_checkpointer_type"] = AsyncCheckpointerType.PROCESS
                options["async_stager"] = self.stager
            result = dcp.async_save(state_dict, process_group=self.pg, **options)
        if enable_garbage_collection:
            GarbageCollection.collect("after a checkpoint")
        return result

    @contextlib.contextmanager
    def _loudly(self, what: str) -> Iterator[None]:
        """Turn an error inside the context into a `TrainingAborted` of one line."""
        try:
            yield
        except (CheckpointException, OSError, RuntimeError) as error:
            raise TrainingAborted(
                f"{what} could not be saved ({_reason(error)}); {self.last_good()}; check the "
                "free space and the permissions of its folder"
            ) from error

    def last_good(self) -> str:
        """A clause for error messages that names the newest good checkpoint."""
        if not self.enable:
            return "nothing is saved"
        good = self._good_steps()
        if not good:
            return "there is no good checkpoint"
        return f"the last good checkpoint is {self._create_checkpoint_id(good[-1])}"

    def _async_wait(self) -> None:
        with self._loudly("a checkpoint"):
            super()._async_wait()

    def _find_load_step(self) -> int:
        faults = checkpoint_faults(self.folder)
        newest = max(self._good_steps(), default=-1)
        for step, fault in faults.items():
            if step > newest and fault is not None:
                logger.warning(
                    f"{self._create_checkpoint_id(step)} is torn: {fault}; resuming from "
                    f"{self._create_checkpoint_id(newest)}, the newest whole checkpoint"
                )
        return newest

    def save_now(self, step: int) -> bool:
        """Save `step` if it is not saved yet, and wait until it is written.

        Returns:
            Whether the checkpoint exists. False if saving is not enabled.
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
        if self.keep_latest_k <= 0 or dist.get_rank() != 0:
            return
        good = self._good_steps()
        kept = {*good[-self.keep_latest_k :], self.switch_step}
        newest = max(good, default=-1)
        for step in checkpoint_steps(self.folder):
            path = Path(self._create_checkpoint_id(step))
            if step in kept or step >= newest:
                continue
            if foreign_files(path):
                logger.warning(f"{path} is purged, but for files that no run has written")
                remove_checkpoint(path)
            else:
                self.purge_queue.put(str(path))


def largest_parameter(model_parts: list[torch.nn.Module]) -> float:
    """The largest absolute value of a parameter on all ranks. Infinite if a parameter is NaN."""
    parameters = [p.detach() for part in model_parts for p in part.parameters()]
    local = [p.to_local() if isinstance(p, DTensor) else p for p in parameters]
    norms = torch._foreach_norm([p for p in local if p.numel()], float("inf"))
    largest = torch.stack([norm.float() for norm in norms]).max().nan_to_num(nan=float("inf"))
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.item()


def _first_of_all_ranks(fault: str | None) -> str | None:
    """The fault of the first rank that has one. The result is equal on all ranks."""
    faults = [None] * dist.get_world_size()
    dist.all_gather_object(faults, fault)
    if len(faults) == 1:
        return fault
    return next((f"rank {rank}: {f}" for rank, f in enumerate(faults) if f is not None), None)


def _hyperparameters(optimizer: Optimizer) -> list[dict[str, Any]]:
    names = ("initial_lr", "betas", "eps", "weight_decay")
    return [{name: group[name] for name in names} for group in optimizer.param_groups]


def _use_hyperparameters(scheduler: LambdaLR, values: list[dict[str, Any]]) -> None:
    """Set the hyperparameters of the next step, which follows `scheduler.last_epoch` steps."""
    groups = scheduler.optimizer.param_groups
    for group, value, factor in zip(groups, values, scheduler.lr_lambdas, strict=True):
        group.update(value, lr=value["initial_lr"] * factor(scheduler.last_epoch))
    scheduler.base_lrs = [group["initial_lr"] for group in groups]
    scheduler._last_lr = [group["lr"] for group in groups]


def _reason(error: BaseException) -> str:
    """The error of the first failed rank, in one line."""
    if isinstance(error, CheckpointException):
        rank, (error, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {_reason(error)}"
    return f"{type(error).__name__}: {error}".split("\n")[0]
