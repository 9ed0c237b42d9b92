"""Scorers: how much each span of each level matters (paper, section 3.1).

A scorer maps q, k, v to one query score and one key score per token and kv head. Entries of
the coarser levels take the maximum over the tokens they cover, separately for q and for k.
Scores rank entries and nothing else: they have no gradient and no parameters.

    norm    the L2 norm of q and of k; squared, which ranks the same

One pass over q, k, v gives the scores and, on the way, the pooled coarsest level, which the
gather would otherwise have to read everything again for.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from lighthouse.config import LighthouseConfig


class Scores(NamedTuple):
    """Scores of all entries above the finest level, levels 1 .. L-1 one after another."""

    q: torch.Tensor
    """Query scores, [B, Hkv, E - N], fp32."""

    k: torch.Tensor
    """Key scores, [B, Hkv, E - N], fp32."""


class CoarsestLevel(NamedTuple):
    """Means of q, k, v over the spans of the coarsest level, in their dtype. No gradient."""

    q: torch.Tensor
    """[B, H, N/p**(L-1), D]"""

    k: torch.Tensor
    """[B, Hkv, N/p**(L-1), D]"""

    v: torch.Tensor
    """[B, Hkv, N/p**(L-1), D]"""


def score(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, config: "LighthouseConfig"
) -> tuple[Scores, CoarsestLevel]:
    """Score every span and pool the coarsest level.

    Args:
        q: [B, H, N, D], any strides.
        k, v: [B, Hkv, N, D], any strides.
    """
    with torch.no_grad():
        return SCORERS[config.scorer](q, k, v, config)


def norm_scorer(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, config: "LighthouseConfig"
) -> tuple[Scores, CoarsestLevel]:
    """The L2 norm of q and of k; with GQA, the maximum over a group's query heads."""
    q_scores, k_scores, *coarsest = _norm_score_pool(
        q, k, v, config.num_levels, config.pooling_factor
    )
    return Scores(q_scores, k_scores), CoarsestLevel(*coarsest)


SCORERS = {"norm": norm_scorer}


def pool_scores(token_scores: torch.Tensor, num_levels: int, pooling_factor: int) -> torch.Tensor:
    """Scores of the levels above the finest, one after another.

    Args:
        token_scores: [B, Hkv, N].

    Returns:
        [B, Hkv, E - N]; an entry has the maximum of the tokens it covers.
    """
    levels = [token_scores]
    for _ in range(1, num_levels):
        levels.append(levels[-1].unflatten(-1, (-1, pooling_factor)).amax(-1))
    return torch.cat(levels[1:], -1)


def squared_norms(x: torch.Tensor, n_kv_heads: int) -> torch.Tensor:
    """Squared L2 norm per token, the maximum over the query heads of each kv head.

    Args:
        x: [B, H, N, D].

    Returns:
        [B, Hkv, N], fp32 (fp64 for fp64 input).
    """
    x = x if x.dtype == torch.float64 else x.float()
    return x.square().sum(-1).unflatten(1, (n_kv_heads, -1)).amax(2)


@torch.library.custom_op("lighthouse::norm_score_pool", mutates_args=())
def _norm_score_pool(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num_levels: int, pooling_factor: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    n_kv_heads = k.shape[1]
    span = pooling_factor ** (num_levels - 1)
    scores = [pool_scores(squared_norms(x, n_kv_heads), num_levels, pooling_factor) for x in (q, k)]
    coarsest = [_mean_pool(x, span) for x in (q, k, v)]
    return *scores, *coarsest


@_norm_score_pool.register_fake
def _(q, k, v, num_levels, pooling_factor):
    batch, n_kv_heads, seq_len, _ = k.shape
    num_scores = sum(seq_len // pooling_factor**level for level in range(1, num_levels))
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = [q.new_empty((batch, n_kv_heads, num_scores), dtype=dtype) for _ in range(2)]
    coarsest_len = seq_len // pooling_factor ** (num_levels - 1)
    coarsest = [x.new_empty((*x.shape[:2], coarsest_len, x.shape[3])) for x in (q, k, v)]
    return *scores, *coarsest


def _mean_pool(x: torch.Tensor, span: int) -> torch.Tensor:
    """Means over `span` tokens, accumulated in fp32: [B, H, N, D] to [B, H, N/span, D]."""
    accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
    pooled = x.unflatten(2, (-1, span)).mean(3, dtype=accumulate).to(x.dtype)
    return pooled.contiguous()


# On CUDA the ops run Triton kernels, which compute in fp32; fp64 takes the bodies above. The
# kernels are imported on first use: a machine without a GPU need not have triton.


@_norm_score_pool.register_kernel("cuda")
def _(q, k, v, num_levels, pooling_factor):
    if q.dtype == torch.float64:
        return _norm_score_pool._init_fn(q, k, v, num_levels, pooling_factor)
    from lighthouse.kernels import scorers as kernels

    return kernels.norm_score_pool(q, k, v, num_levels, pooling_factor)
