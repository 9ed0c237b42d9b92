"""Held-out loss on the same text at every validation, with the attention of the current stage.

torchtitan's validator reads only its own datasets and continues in them from one validation to the
next. This validator restarts its held-out text each time.
"""

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.validate import BaseValidator
from torchtitan.distributed import utils as dist_utils
from torchtitan.experiments.lighthouse.context_parallel import context_parallel_of, shard_batch
from torchtitan.experiments.lighthouse.data.loaders import build_validation_dataloader
from torchtitan.tools import utils


class HeldOutValidator(BaseValidator):
    """Mean loss per token over `validation.steps` batches per data-parallel rank.

    It runs every `validation.freq` steps, after the last step, and at the stage switch with both
    kinds of attention.
    """

    def __init__(
        self,
        job_config,
        dp_world_size,
        dp_rank,
        tokenizer,
        parallel_dims,
        loss_fn,
        validation_context,
        maybe_enable_amp,
        metrics_processor,
        **kwargs,
    ):
        super().__init__(job_config)
        self.parallel_dims = parallel_dims
        self.cp = context_parallel_of(
            parallel_dims.get_optional_mesh("cp"), job_config.lighthouse.context_parallel
        )
        self.loss_fn = loss_fn
        self.context = validation_context
        self.maybe_enable_amp = maybe_enable_amp
        self.metrics_processor = metrics_processor
        self.dataloader = build_validation_dataloader(dp_world_size, dp_rank, tokenizer, job_config)

    def should_validate(self, step: int) -> bool:
        ends = (self.job_config.training.steps, self.job_config.lighthouse.stage1_steps)
        return step % self.job_config.validation.freq == 0 or step in ends

    @torch.no_grad()
    def validate(self, model_parts: list[nn.Module], step: int) -> None:
        (model,) = model_parts
        model.eval()
        loss_sum = torch.zeros((), dtype=torch.float64, device=utils.device_type)
        num_tokens = torch.zeros_like(loss_sum)
        batches = iter(self.dataloader)
        for _ in range(self.job_config.validation.steps):
            inputs, labels = next(batches)
            inputs, labels = (x.to(utils.device_type) for x in (inputs["input"], labels))
            inputs, labels, extra_kwargs = shard_batch(inputs, labels, self.cp)
            with self.context(), self.maybe_enable_amp:
                loss = self.loss_fn(model(inputs, **extra_kwargs), labels)
            # Under tensor parallelism the vocabulary is sharded and the loss is a DTensor.
            loss_sum += loss.full_tensor() if isinstance(loss, DTensor) else loss
            num_tokens += (labels != IGNORE_INDEX).sum()
        # Count tokens of whole sequences, since logging divides by the ranks that share one.
        self.metrics_processor.ntokens_since_last_log = int(num_tokens) * self.parallel_dims.cp
        mesh = self.parallel_dims.get_optional_mesh("loss")
        loss = dist_utils.dist_sum(loss_sum, mesh) / dist_utils.dist_sum(num_tokens, mesh)
        self.metrics_processor.log_validation(loss=loss, step=step)
        reshard(model)
        model.train()


def reshard(model: nn.Module) -> None:
    """Reshard parameters that FSDP leaves gathered after a forward pass without a backward pass."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
