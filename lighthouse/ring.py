"""Ring attention on the CPU, built on torch's ring. It implements the scheme `ring` without a GPU.

In torch's ring attention each rank keeps its queries, and keys and values pass from rank to rank.
Partial results are merged by their log-sum-exp. torch 2.13 does not dispatch CPU attention to it.
`RingAttention` calls torch's ring with the CPU's fused kernel instead of the GPU's. Layout,
rotation and merging are torch's code. That code is private and exists in torch 2.11 to 2.14, the
versions that this library supports.
"""

import torch
from torch import nn
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.tensor.experimental._context_parallel import _attention as torch_ring

from lighthouse.context_parallel import ContextParallel

_SEQ_DIM = 2


class RingAttention(nn.Module):
    """Causal attention over a sequence sharded in head and tail chunks over the ranks of a group.

    torch merges in fp32, also for fp64 inputs.

    Args:
        cp: this rank's position; its scheme is `ring`.
    """

    def __init__(self, cp: ContextParallel):
        super().__init__()
        self.cp = cp

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, enable_gqa: bool = False
    ) -> torch.Tensor:
        """q: [B, H, n, D]; k, v: [B, Hkv, n, D], n local tokens. Returns [B, H, n, D]."""
        # The kernel requires equal numbers of q, k and v heads.
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        out, _ = _ring(q, k, v, self.cp.group_name)
        return out


@torch.library.custom_op("lighthouse::ring_attention_cpu", mutates_args=())
def _ring(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group_name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = torch_ring._templated_ring_attention(
        _resolve_process_group(group_name),
        _SEQ_DIM,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
        query=q,
        key=k,
        value=v,
        is_causal=True,
    )
    return out.contiguous(), lse.contiguous()


@_ring.register_fake
def _(q, k, v, group_name):
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(
        q.shape[:3], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32
    )


@torch.library.custom_op("lighthouse::ring_attention_cpu_backward", mutates_args=())
def _ring_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    group_name: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grads = torch_ring._templated_ring_attention_backward(
        _resolve_process_group(group_name),
        _SEQ_DIM,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
        grad_out=dout.contiguous(),
        grad_out_name="grad_out",
        query=q,
        key=k,
        value=v,
        out=out,
        logsumexp=lse,
        is_causal=True,
        dropout_p=0.0,
    )
    # Two gradients share one buffer, which an op must not return.
    dq, dk, dv = (grad.clone(memory_format=torch.contiguous_format) for grad in grads)
    return dq, dk, dv


@_ring_backward.register_fake
def _(dout, q, k, v, out, lse, group_name):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _ring_setup(ctx, inputs, output):
    *qkv, group_name = inputs
    ctx.save_for_backward(*qkv, *output)
    ctx.group_name = group_name
    ctx.mark_non_differentiable(output[1])


def _ring_autograd(ctx, dout, dlse):
    return *_ring_backward(dout, *ctx.saved_tensors, ctx.group_name), None


_ring.register_autograd(_ring_autograd, setup_context=_ring_setup)
