"""Lighthouse Attention (paper, section 3): attend over a short, hierarchically chosen sequence.

    1. score        every span of every level by its strongest token; pool the coarsest level
    2. select       entries in a cascade from the coarsest level down
    3. gather       their means of q, k and v into a dense sub-sequence in causal order
    4. attend       stock causal attention, S instead of N long
    5. scatter back each entry's output to the tokens behind its span

It is a wrapper around causal attention, not a change of it: it has no parameters, and taking it
away leaves an ordinary dense model. Gradients flow through steps 5, 4 and 3; none through 1, 2.

Given the selection, output t depends on no input after t. Which entries are refined depends on
scores in the whole stratum, later tokens included, as in expert-choice routing: that is in the
nature of the method, which is for training only.
"""

from collections.abc import Callable

import torch
from torch import nn

from lighthouse.config import LighthouseConfig
from lighthouse.context_parallel import ContextParallel, exchange_edges
from lighthouse.gather import gather, scatter_back
from lighthouse.scorers import score
from lighthouse.sdpa import causal_sdpa
from lighthouse.selection import select_spans


def lighthouse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    config: LighthouseConfig,
    attend: Callable[..., torch.Tensor] = causal_sdpa,
    context: ContextParallel | None = None,
) -> torch.Tensor:
    """Causal attention over the selected entries of the pyramid.

    Args:
        q: queries, [B, H, N, D], any strides, fp16, bf16, fp32 or fp64.
        k, v: keys and values, [B, Hkv, N, D], in the dtype of q; Hkv divides H (GQA).
        config: fields of the method; N must be legal under it.
        attend: causal attention, called as `attend(q, k, v, enable_gqa=...)`.
        context: under context parallelism, this rank's place. q, k, v are its shard of N / W
            tokens, and so is the result; `config` is that of the whole sequence, and `attend`
            attends over the sub-sequence of all ranks.

    Returns:
        [B, H, N, D] in the dtype of q, with the strides of a contiguous [B, N, H, D].

    Raises:
        ValueError: shapes that do not fit together, or N that is not legal under `config`.
    """
    _check_shapes(q, k, v)
    seq_len = q.shape[2]
    if context is None:
        config.check_seq_len(seq_len)
    else:
        config = context.shard_config(config, seq_len)
    scores, coarsest = score(q, k, v, config)
    is_start = context is None or context.rank == 0
    selection = select_spans(scores, config, seq_len, is_start)
    sub_q, sub_k, sub_v = gather(q, k, v, coarsest, selection)  # [B, H or Hkv, S, D]
    sub_out = attend(sub_q, sub_k, sub_v, enable_gqa=q.shape[1] != k.shape[1])
    edges = None if context is None else exchange_edges(sub_out, selection, context)
    return scatter_back(sub_out, selection, edges)  # [B, H, N, D]


class LighthouseAttention(nn.Module):
    """Wraps a module of causal attention. It has no parameters and no buffers.

    Args:
        inner: causal attention, called as `inner(q, k, v, enable_gqa=...)`.
        config: fields of the method.
        context: this rank's place under context parallelism.
    """

    def __init__(
        self,
        inner: nn.Module,
        config: LighthouseConfig,
        context: ContextParallel | None = None,
    ):
        super().__init__()
        self.inner = inner
        self.config = config
        self.context = context

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, enable_gqa: bool = False
    ) -> torch.Tensor:
        """See `lighthouse_attention`; `enable_gqa` follows from the shapes."""
        return lighthouse_attention(q, k, v, self.config, self.inner, self.context)


def _check_shapes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    if q.dim() != 4 or k.shape != v.shape or q.shape[0::2] != k.shape[0::2]:
        raise ValueError(
            "q, k, v must be [B, H, N, D], [B, Hkv, N, D], [B, Hkv, N, D], "
            f"got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}; transpose or reshape them"
        )
    if q.shape[3] != k.shape[3] or q.shape[1] % k.shape[1]:
        raise ValueError(
            "the heads of q must be a multiple of those of k, with one head_dim, "
            f"got q {list(q.shape)} and k {list(k.shape)}; check n_heads and n_kv_heads"
        )
