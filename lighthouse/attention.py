"""Lighthouse Attention (paper, section 3): attend over a short, hierarchically chosen sequence.

    1. score        every span of every level by its strongest token; pool the coarsest level
    2. select       entries level by level, from the coarsest level down
    3. gather       the means of q, k and v of these entries into a dense sub-sequence in causal
                    order; rotary q and k are rotated to the last position of the span
    4. attend       standard causal attention over S entries instead of N tokens
    5. scatter back each entry's output to p**l tokens, starting at the last token of its span

Lighthouse wraps causal attention and has no parameters. Removing the wrapper leaves a standard
dense model. Gradients flow through steps 5, 4 and 3, and not through steps 2 and 1.

Given the selection, output t depends on no input after t. The selection itself depends on the
scores of the whole stratum, including later tokens, as in expert-choice routing. The method is
therefore for training only.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.autograd import forward_ad

from lighthouse.config import LighthouseConfig
from lighthouse.context_parallel import ContextParallel, exchange_edges
from lighthouse.gather import gather, scatter_back
from lighthouse.rotary import RotaryPhases
from lighthouse.scorers import score
from lighthouse.sdpa import causal_sdpa
from lighthouse.selection import select_spans

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def lighthouse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    config: LighthouseConfig,
    *,
    rotary: RotaryPhases | None = None,
    attend: Callable[..., torch.Tensor] = causal_sdpa,
    context: ContextParallel | None = None,
) -> torch.Tensor:
    """Causal attention over the selected entries of the pyramid.

    Args:
        q: queries, [B, H, N, D], any strides, fp16, bf16, fp32 or fp64.
        k, v: keys and values, [B, Hkv, N, D], in the dtype of q; Hkv divides H (GQA). Under
            autocast q, k and v are first cast to its dtype, as by standard attention.
        config: settings of the method; N must be legal under it.
        rotary: the table of the rotary embedding applied to q and k. With it, tokens are rotated
            to the last position of their span before averaging. Without it, q and k are averaged
            as they are, which is correct for models without rotary embeddings.
        attend: causal attention, called as `attend(q, k, v, enable_gqa=...)`.
        context: this rank's position under context parallelism. q, k, v and the result are then
            this rank's shard of N / W tokens. `config` describes the whole sequence, and `attend`
            attends over the sub-sequence of all ranks.

    Returns:
        [B, H, N, D] in the dtype of q, under autocast in its dtype, with the strides of a
        contiguous [B, N, H, D].

    Raises:
        ValueError: inconsistent shapes, dtypes or devices, an empty input, N that is not legal
            under `config`, or a table that does not fit.
        NotImplementedError: forward-mode differentiation, and second derivatives.
    """
    q, k, v = _autocast(q, k, v)
    _check_inputs(q, k, v)
    seq_len = q.shape[2]
    if context is None:
        config.check_seq_len(seq_len)
    else:
        config = context.shard_config(config, seq_len)
    if rotary is not None:
        rotary.check(config.span(config.num_levels - 1), q)
    scores, coarsest = score(q, k, v, config, rotary)
    is_start = context is None or context.rank == 0
    selection = select_spans(scores, config, seq_len, is_start)
    sub_q, sub_k, sub_v = gather(q, k, v, coarsest, selection, rotary)  # [B, H or Hkv, S, D]
    # The conditional gives torch.compile a bool where sizes are symbolic.
    enable_gqa = True if q.shape[1] != k.shape[1] else False  # noqa: SIM210
    sub_out = attend(sub_q, sub_k, sub_v, enable_gqa=enable_gqa)
    edges = None if context is None else exchange_edges(sub_out, selection, context)
    return scatter_back(sub_out, selection, edges)  # [B, H, N, D]


class LighthouseAttention(nn.Module):
    """Wraps a causal attention module. It has no parameters and no buffers.

    Activation checkpointing must save the selection instead of recomputing it. A recomputation
    can resolve a near-tie between scores differently, which makes gradients wrong without an
    error. Checkpoint a layer with the operations of `lighthouse.OPS_TO_SAVE`:

        context_fn = partial(create_selective_checkpoint_contexts, lighthouse.OPS_TO_SAVE)
        torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False, context_fn=context_fn)

    Args:
        inner: causal attention, called as `inner(q, k, v, enable_gqa=...)` with projected q, k
            and v. It is not a module that has the projections.
        config: settings of the method.
        rotary: the table of the rotary embedding. It moves with the module to another device and
            keeps its dtype.
        context: this rank's position under context parallelism.
    """

    def __init__(
        self,
        inner: nn.Module,
        config: LighthouseConfig,
        rotary: RotaryPhases | None = None,
        context: ContextParallel | None = None,
    ):
        super().__init__()
        self.inner = inner
        self.config = config
        self.rotary = rotary
        self.context = context

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, enable_gqa: bool = False
    ) -> torch.Tensor:
        """See `lighthouse_attention`; `enable_gqa` follows from the shapes."""
        return lighthouse_attention(
            q, k, v, self.config, rotary=self.rotary, attend=self.inner, context=self.context
        )

    def _apply(self, fn, recurse=True):
        if self.rotary is not None:
            self.rotary = self.rotary.to(fn(self.rotary.cos).device)
        return super()._apply(fn, recurse)


def _autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Cast to the dtype of autocast where it is on. Autocast leaves fp64 as it is."""
    device_type = tensors[0].device.type
    # PyTorch has no autocast for the meta device, and torch 2.11 cannot compile the question.
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(x.to(dtype) if x.dtype in DTYPES[:3] else x for x in tensors)


def _check_inputs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    is_4d = q.dim() == k.dim() == 4
    if not is_4d or k.shape != v.shape or q.shape[0::2] != k.shape[0::2]:
        raise ValueError(
            "q, k, v must be [B, H, N, D], [B, Hkv, N, D], [B, Hkv, N, D], "
            f"got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}; transpose or reshape them"
        )
    if 0 in q.shape or 0 in k.shape:
        raise ValueError(
            "q, k, v must not be empty in any dimension, got "
            f"{list(q.shape)}, {list(k.shape)}, {list(v.shape)}; skip an empty batch"
        )
    if q.shape[3] != k.shape[3] or q.shape[1] % k.shape[1]:
        raise ValueError(
            "the heads of q must be a multiple of those of k, with one head_dim, "
            f"got q {list(q.shape)} and k {list(k.shape)}; check n_heads and n_kv_heads"
        )
    if q.shape[1] > q.shape[2]:
        raise ValueError(
            f"q must be [B, H, N, D] with more tokens than heads, got {list(q.shape)}; transpose "
            "dimensions 1 and 2 of q, k and v"
        )
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            "q, k, v must have one dtype, fp16, bf16, fp32 or fp64, "
            f"got {q.dtype}, {k.dtype}, {v.dtype}; convert them"
        )
    if not q.device == k.device == v.device:
        raise ValueError(
            f"q, k, v must be on one device, got {q.device}, {k.device}, {v.device}; move them"
        )
    if not torch.compiler.is_compiling() and any(
        forward_ad.unpack_dual(x).tangent is not None for x in (q, k, v)
    ):
        raise NotImplementedError(
            "Lighthouse Attention has no forward-mode derivatives; differentiate backward, or use "
            "dense attention"
        )
