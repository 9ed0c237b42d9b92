"""Cross-entropy in chunks of tokens, which never stores the logits of a whole sequence.

    logits = hidden @ weight.T                                    # [C, V], one chunk of C tokens
    loss = sum over counted tokens of log(sum(exp(logits))) - logits[label]
    dlogits = (softmax(logits) - onehot(label)) * counted
    dhidden[chunk] = dlogits @ weight;  dweight += dlogits.T @ hidden[chunk]

If gradients are needed, the forward pass computes them chunk by chunk. The backward pass multiplies
them by its scalar. This takes three matrix products per chunk, as without chunks, and one without
gradients.

Numerics: matrix products use the compute dtype (autocast's, else the weight's). Softmax and loss
use at least fp32. dlogits is rounded to the compute dtype, as in autograd. Each chunk's part of
dweight is a product in the compute dtype. Their sum is at least fp32 and is rounded to the weight's
dtype once, in the backward pass. There are no atomics, so results are bitwise reproducible.

Memory in bytes, where e, h and w are the bytes per element of the compute dtype (bf16 2, fp32 4),
of hidden and of weight:

    logits      the larger of two: 6 C V in bf16 or 4 C V in fp32 (one buffer for logits and
                dlogits), and e C V + e V dim while dweight is summed; without gradients, the first
    saved       h n dim for dhidden and 4 V dim for dweight, until the backward pass
    backward    the saved tensors, and h n dim + w V dim for its results
    autocast    e V dim more for the cast weight, in the forward pass

Nothing grows with n V. In bf16 a CPU needs 4 V dim more, because its kernels copy what they cast.
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
    """torchtitan's hook for the loss of a model, in chunks if `loss_chunk_size` is set."""
    chunk_size = job_config.training.loss_chunk_size
    if chunk_size == 0:
        return build_cross_entropy_loss(job_config, **kwargs)
    loss_of_logits = replace_logits
    if job_config.compile.enable and "loss" in job_config.compile.components:
        logger.info("Compiling the loss of a chunk with torch.compile")
        loss_of_logits = torch.compile(replace_logits, backend=job_config.compile.backend)
    return ChunkedCrossEntropy(chunk_size, loss_of_logits)


class ChunkedCrossEntropy:
    """The summed cross-entropy, with torchtitan's interface `loss(model(...), labels)`.

    `attach` makes the model return the input of its head. The head module stays unchanged for
    checkpoints, optimizer and FSDP. The multiplication by its weight happens here.
    """

    head: nn.Linear | None = None

    def __init__(self, chunk_size: int, loss_of_logits: Callable):
        self.chunk_size = chunk_size
        self.loss_of_logits = loss_of_logits

    def attach(self, model: nn.Module) -> None:
        """Bypass the head of a Transformer, after torchtitan has parallelised it."""
        self.head = model.output
        assert self.head.bias is None
        # Override forward on this instance, since a converter that replaces the head would drop a
        # subclass. The hooks of the module still run. FSDP needs them to gather the weight.
        self.head.forward = lambda hidden: hidden

    def __call__(self, pred: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """
        Args:
            pred: output of the model, [B, N, dim].
            labels: token ids, [B, N] int64; IGNORE_INDEX for tokens that do not count.

        Returns:
            The sum over all tokens, a scalar.
        """
        assert self.head is not None, "attach(model) comes first"
        if isinstance(self.head, FSDPModule):
            # The weight is still gathered unless parallelism.fsdp_reshard_after_forward is
            # "always". The head shares an FSDP group with the last norm. The backward pass of that
            # norm ends after that of the loss and reduces the gradients of both.
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
    """The summed cross-entropy of `hidden @ weight.T`, with first derivatives for both.

    Args:
        hidden: [n, dim], floating point.
        weight: [V, dim], the dtype of `hidden` unless autocast is on.
        labels: [n] int64 below V; IGNORE_INDEX for tokens that do not count.
        chunk_size: tokens per chunk; the last chunk may have fewer.
        loss_of_logits: `replace_logits` or its compiled form.

    Returns:
        A scalar, fp32, or fp64 for fp64.
    """
    if not torch.is_grad_enabled():
        # An autograd Function does not see this mode, only whether its inputs need gradients.
        hidden, weight = hidden.detach(), weight.detach()
    return _ChunkedCrossEntropy.apply(
        hidden, weight, labels, chunk_size, loss_of_logits or replace_logits
    )


def replace_logits(
    logits: torch.Tensor, labels: torch.Tensor, wants_gradient: bool
) -> torch.Tensor:
    """The loss of one chunk, a scalar of at least fp32. Its gradient overwrites `logits`.

    Args:
        logits: [C, V]; overwritten.
        labels: [C] int64; IGNORE_INDEX for tokens that do not count.
        wants_gradient: if False, the contents of `logits` are undefined afterwards.
    """
    is_counted = labels != IGNORE_INDEX
    index = labels.where(is_counted, 0).unsqueeze(1)
    # This makes no copy for fp32 and fp64.
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
            # `logits` now holds its gradient.
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
            # Rounding happens in the multiplication, without an fp32 copy in between.
            out = torch.empty_like(dweight, dtype=ctx.weight_dtype)
            dweight = torch.mul(dweight, dloss, out=out)
        return dhidden, dweight, None, None, None
