"""Skip training steps whose loss or gradient is not finite.

Before each optimizer step, every rank checks its losses and its part of the gradient. The result is
the same on all ranks. A step that is not finite is skipped, logged and counted: parameters and
moments stay the same, and the learning rate and the data advance.

After `training.max_skipped_steps` skipped steps, the next one stops the run before anything is
saved. The error names the step, the ranks and the last good checkpoint.
"""

import math

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torchtitan.experiments.lighthouse.runtime.errors import TrainingAborted
from torchtitan.tools.logging import logger

SKIPPED = "lighthouse/skipped_steps"


class FiniteSteps:
    """Wraps the optimizers of a trainer. `step` skips steps that are not finite.

    The trainer passes every loss to `record_loss`. Checkpoints and schedules use the wrapped
    optimizers directly.
    """

    def __init__(self, trainer):
        self.num_skipped = 0
        self._trainer = trainer
        self._container = trainer.optimizers
        self._losses = []

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """One for each part of the model."""
        return self._container.optimizers

    def zero_grad(self) -> None:
        self._container.zero_grad()

    def record_loss(self, loss: torch.Tensor) -> None:
        """Record the loss of a micro-batch, a scalar."""
        self._losses.append(loss.detach())

    def step(self) -> None:
        """Do an optimizer step, unless a loss or the gradient is not finite on some rank.

        Raises:
            TrainingAborted: the step is not finite, and `training.max_skipped_steps` were skipped.
        """
        loss = torch.stack([_local(loss).float() for loss in self._losses]).sum()
        self._losses.clear()
        if dist.get_backend() == "fake":
            # What simulated ranks send is memory that nobody has written.
            self._container.step()
            return
        norm = gradient_norm(self._trainer.model_parts).to(loss.device)
        found = torch.stack([loss, norm])
        if self._is_finite_everywhere(found):
            self._container.step()
            return
        self._leave_out(found)

    def _is_finite_everywhere(self, found: torch.Tensor) -> bool:
        # torchtitan has already clipped the gradient. An infinite norm makes it 0 on all ranks.
        worst = torch.stack([(~found.isfinite()).any().float(), found[1].nan_to_num(posinf=0.0)])
        if dist.get_world_size() > 1:
            dist.all_reduce(worst, dist.ReduceOp.MAX)
        is_bad, largest_norm = worst.tolist()
        return not is_bad and largest_norm > 0

    def _leave_out(self, found: torch.Tensor) -> None:
        trainer = self._trainer
        each = [torch.empty_like(found) for _ in range(dist.get_world_size())]
        dist.all_gather(each, found)
        said = _said([tuple(part.tolist()) for part in each])
        allowed = trainer.job_config.training.max_skipped_steps
        trainer.checkpointer.note_left_out(trainer.step)
        if self.num_skipped >= allowed:
            raise TrainingAborted(
                f"step {trainer.step}: {said}; {trainer.checkpointer.last_good()}; lower "
                "optimizer.lr, or leave such steps out with training.max_skipped_steps, now "
                f"{allowed}"
            )
        self.num_skipped += 1
        logger.warning(
            f"Step {trainer.step} is left out ({self.num_skipped} of at most {allowed}): {said}"
        )
        trainer.metrics_processor.logger.log({SKIPPED: self.num_skipped}, trainer.step)


def gradient_norm(model_parts: list[torch.nn.Module]) -> torch.Tensor:
    """Norm of this rank's part of the gradient, an fp32 scalar. Not finite if an element is not."""
    parameters = [p for part in model_parts for p in part.parameters() if p.grad is not None]
    norms = torch._foreach_norm([_local(p.grad) for p in parameters])
    return torch.stack([norm.float() for norm in norms]).norm()


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _said(found: list[tuple[float, float]]) -> str:
    """Describe the losses or gradient norms that are not finite, given those of all ranks."""
    for name, values in zip(("loss", "gradient"), zip(*found, strict=True), strict=True):
        ranks = [rank for rank, value in enumerate(values) if not math.isfinite(value)]
        if ranks:
            got = ", ".join(dict.fromkeys(f"{values[rank]:g}" for rank in ranks))
            on = ", ".join(map(str, ranks))
            return f"the {name} must be finite, got {got} on rank {on}"
    return "the gradient must be finite and not zero, got 0 on all ranks after clipping"
