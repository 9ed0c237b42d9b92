"""Lighthouse Attention: hierarchical selection around stock causal attention.

Paper: "Long Context Pre-Training with Lighthouse Attention", arXiv 2605.06554.
`attention.py` holds the algorithm. `config.py` holds its fields, rules and derived sizes.

Letters used for shapes in every module:

    B    batch
    H    query heads
    Hkv  key/value heads; H is a multiple of Hkv (GQA)
    N    tokens (seq_len)
    D    head_dim
    L    levels of the pyramid (num_levels); level 0 is the finest, one token per entry
    p    pooling_factor; an entry of level l spans p**l tokens
    k    topk, entries selected per level
    T    strata, k / 128
    S    entries of the sub-sequence that attention sees
    E    entries of all levels together, N + N/p + ... + N/p**(L-1)
    R    elements of a head that a rotary embedding rotates; R <= D
"""

from lighthouse.attention import LighthouseAttention, lighthouse_attention
from lighthouse.config import LighthouseConfig
from lighthouse.context_parallel import ContextParallel, UlyssesAttention
from lighthouse.ops import OPS_TO_SAVE
from lighthouse.rotary import RotaryPhases
from lighthouse.sdpa import causal_sdpa
from lighthouse.selection import Selection, select

__all__ = [
    "OPS_TO_SAVE",
    "ContextParallel",
    "LighthouseAttention",
    "LighthouseConfig",
    "RotaryPhases",
    "Selection",
    "UlyssesAttention",
    "causal_sdpa",
    "lighthouse_attention",
    "select",
]
