"""Cross-entropy in chunks of tokens: the logits of a whole sequence never exist.

    logits = hidden @ weight.T                                    # [C, V], one chunk of C tokens
    loss = sum over counted tokens of log(sum(exp(logits))) - logits[label]
    dlogits = (softmax(logits) - onehot(label)) * counted
    dhidden[chunk] = dlogits @ weight;  dweight += dlogits.T @ hidden[chunk]

The gradients are made in the forward pass, chunk by chunk, where any are wanted; the backward pass
multiplies them by its scalar. That is three matrix products per chunk, as without chunks; without
gradients one.

Numerics: products in the compute dtype (autocast's, else the weight's), softmax and loss in at
least fp32, dlogits rounded to the compute dtype as autograd would. Each chunk's part of dweight is
a product of that dtype, their sum is at least fp32 and rounded to the weight's dtype once, in the
backward pass. No atomics: the same input gives the same bits.

Memory in bytes, e for the compute dtype's (bf16 2, fp32 4), h and w for those of hidden and weight:

    logits      6 C V in bf16, 4 C V in fp32 (one buffer, dlogits take the place of the logits), or,
                while dweight is summed, e C V + e V dim, whichever is more; without gradients the
                former
    kept        h n dim for dhidden and 4 V dim for dweight, until the backward pass
    backward    the kept and, more, h n dim + w V dim: what it hands on
    autocast    e V dim more for the cast weight, in the forward pass

Nothing grows with n V. In bf16 a CPU, whose kernels copy what they cast, takes 4 V dim more.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FSDPModule
from torchtitan.components.loss import IGNORE_INDEX, LossFunction, build_cross_entropy_loss
from torchtitan.experiments.lighthouse.config.job_config import JobConfig
from torchtitan.tools.logging import logger


def build_loss(job_config: JobConfig, **kwargs) -> LossFunction:
    """torchtitan's hook for the loss of a model: in chunks where `loss_chunk_size` says so."""
    chunk_size = job_config.training.loss_chunk_size
    if chunk_size == 0:
        return build_cross_entropy_loss(job_config, **kwargs)
    loss_of_logits = replace_logits
    if job_config.compile.enable and "loss" in job_config.compile.components:
        logger.info("Compiling the loss of a chunk with torch.compile")
        loss_of_logits = torch.compile(replace_logits, backend=job_config.compile.backend)
    return ChunkedCrossEntropy(chunk_size, loss_of_logits)


class ChunkedCrossEntropy:
    """The sum of the cross-entropy, called as torchtitan calls a loss: `loss(model(...), labels)`.

    `attach` makes the model return the input of its head. The head stays where it is and what it
    is, for checkpoints, optimizer and FSDP; its weight is multiplied here.
    """

    head: nn.Linear | None = None

    def __init__(self, chunk_size: int, loss_of_logits: Callable | None = None):
        self.chunk_size = chunk_size
        self.loss_of_logits = loss_of_logits or replace_logits

    def attach(self, model: nn.Module) -> None:
        """Take over the head of a Transformer, after torchtitan has parallelised it."""
        self.head = model.output
        assert self.head.bias is None
        # An attribute of this one module: a subclass would be lost where a converter replaces the
        # head. The hooks of the module still run: FSDP gathers the weight and counts on its call.
        self.head.forward = lambda hidden: hidden

    def __call__(self, pred: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """
        Args:
            pred: what the model returns, [B, N, dim].
            labels: token ids, [B, N] int64; IGNORE_INDEX where none counts.

        Returns:
            The sum over all tokens, a scalar.
        """
        assert self.head is not None, "attach(model) comes first"
        if isinstance(self.head, FSDPModule):
            # Gathered still, unless parallelism.fsdp_reshard_after_forward is "always". The head is
            # in one group with the last norm, whose backward pass ends after that of the loss and
            # reduces the gradients of both.
            self.head.unshard()
        hidden, labels = pred.flatten(0, 1), labels.flatten()
        return chunked_cross_entropy(
            hidden, self.head.weight, labels, self.chunk_size, self.loss_of_logits
        )


def chunked_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    chunk_size: int,
    loss_of_logits: Callable | None = None,
) -> torch.Tensor:
    """The sum of the cross-entropy of `hidden @ weight.T`, differentiable once in both.

    Args:
        hidden: [n, dim], floating point.
        weight: [V, dim], the dtype of `hidden` unless autocast is on.
        labels: [n] int64 below V; IGNORE_INDEX where none counts.
        chunk_size: tokens whose logits exist at a time; the last chunk may have fewer.
        loss_of_logits: `replace_logits` or its compiled form.

    Returns:
        A scalar, fp32, or fp64 for fp64.
    """
    if not torch.is_grad_enabled():
        # A Function cannot tell; it looks at its inputs.
        hidden, weight = hidden.detach(), weight.detach()
    return _ChunkedCrossEntropy.apply(
        hidden, weight, labels, chunk_size, loss_of_logits or replace_logits
    )


def replace_logits(
    logits: torch.Tensor, labels: torch.Tensor, wants_gradient: bool
) -> torch.Tensor:
    """The loss of one chunk, a scalar of at least fp32; its gradient takes the place of `logits`.

    Args:
        logits: [C, V]; overwritten.
        labels: [C] int64; IGNORE_INDEX where none counts.
        wants_gradient: without it, what is left in `logits` means nothing.
    """
    is_counted = labels != IGNORE_INDEX
    index = labels.where(is_counted, 0).unsqueeze(1)
    # For fp32 and fp64 no copy.
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    x -= x.amax(1, keepdim=True)
    x_label = x.gather(1, index)
    total = x.exp_().sum(1, keepdim=True)
    is_counted = is_counted.unsqueeze(1)
    loss = (total.log() - x_label).where(is_counted, 0).sum()
    if wants_gradient:
        x *= is_counted / total
        logits.copy_(x)
        dlabel = (x_label.exp() / total - 1).where(is_counted, 0)
        logits.scatter_(1, index, dlabel.to(logits.dtype))
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, chunk_size, loss_of_logits):
        device = hidden.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else weight.dtype
        head = weight.to(dtype)
        sum_dtype = torch.promote_types(dtype, torch.float32)
        wants_dhidden, wants_dweight = ctx.needs_input_grad[:2]
        dhidden = torch.empty_like(hidden) if wants_dhidden else None
        dweight = torch.zeros_like(weight, dtype=sum_dtype) if wants_dweight else None
        losses = []
        buffer = hidden.new_empty(min(chunk_size, len(hidden)), len(weight), dtype=dtype)
        for start in range(0, len(hidden), chunk_size):
            rows = slice(start, start + chunk_size)
            hidden_c = hidden[rows].to(dtype)
            logits = buffer[: len(hidden_c)]
            torch.mm(hidden_c, head.t(), out=logits)
            loss = loss_of_logits(logits, labels[rows], wants_dhidden or wants_dweight)
            losses.append(loss)
            # The logits are their gradient now.
            if wants_dhidden:
                dhidden[rows] = logits @ head
            if wants_dweight:
                dweight += logits.t() @ hidden_c
        ctx.save_for_backward(dhidden, dweight)
        ctx.weight_dtype = weight.dtype
        return torch.stack(losses).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        dhidden, dweight = ctx.saved_tensors
        if dhidden is not None:
            dhidden = dhidden * dloss
        if dweight is not None:
            # Rounded as it is multiplied: no fp32 copy in between.
            out = torch.empty_like(dweight, dtype=ctx.weight_dtype)
            dweight = torch.mul(dweight, dloss, out=out)
        return dhidden, dweight, None, None, None
