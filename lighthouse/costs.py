"""What a layer of Lighthouse Attention must move and compute: the floor of its time.

Bytes count each input once and each output once, in the smallest set that the step needs; FLOPs
count the two products of causal attention, half of the square, and two and a half times as many
backward. Nothing else of the layer has FLOPs worth counting. Time can not be below
`bytes / bandwidth` of every step but attention, plus `FLOPs / rate` of attention.
"""

from typing import NamedTuple

from lighthouse.config import LighthouseConfig


class Shape(NamedTuple):
    """Sizes of q [B, H, N, D] and k, v [B, Hkv, N, D]."""

    batch: int
    n_heads: int
    n_kv_heads: int
    seq_len: int
    head_dim: int
    itemsize: int
    """Bytes per element."""


class Cost(NamedTuple):
    """What one step needs."""

    bytes: int
    flops: int = 0


def attention_flops(batch: int, n_heads: int, length: int, head_dim: int) -> int:
    """FLOPs of one causal attention forward: q·k and p·v over half of the square."""
    return batch * n_heads * 2 * length**2 * head_dim


def dense_costs(shape: Shape) -> dict[str, Cost]:
    """Dense attention: q, k, v, out once forward; those and their gradients once backward."""
    rows = shape.batch * shape.seq_len * 2 * (shape.n_heads + shape.n_kv_heads)
    row = shape.head_dim * shape.itemsize
    flops = attention_flops(shape.batch, shape.n_heads, shape.seq_len, shape.head_dim)
    return {
        "attend": Cost(rows * row, flops),
        "attend backward": Cost(2 * rows * row, flops * 5 // 2),
    }


def layer_costs(shape: Shape, config: LighthouseConfig) -> dict[str, Cost]:
    """Every step of a Lighthouse layer, forward and backward, in order."""
    seq_len, row = shape.seq_len, shape.head_dim * shape.itemsize
    q_heads, kv_heads = shape.batch * shape.n_heads, shape.batch * shape.n_kv_heads
    heads = q_heads + 2 * kv_heads
    sub = config.sub_seq_len(seq_len)
    entries = config.num_entries(seq_len)
    coarsest = config.level_len(config.num_levels - 1, seq_len)
    candidates = config.pooling_factor * config.topk
    # Tokens below the entries of the sub-sequence that are finer than the coarsest.
    gathered = sum(candidates * config.span(level) for level in range(config.num_levels - 1))
    scores = 2 * 4 * kv_heads * (entries - seq_len)
    scores_read = 2 * 4 * kv_heads * (coarsest + (config.num_levels - 2) * candidates)
    entry_map, slot_map = 4 * kv_heads * sub, 4 * kv_heads * entries
    attend = dense_costs(shape._replace(seq_len=sub))
    return {
        "score": Cost(heads * (seq_len + coarsest) * row + scores),
        "select": Cost(scores_read + entry_map + slot_map),
        "gather": Cost(heads * (gathered + coarsest + sub) * row + entry_map),
        "attend": attend["attend"],
        "scatter back": Cost(q_heads * (sub + seq_len) * row + slot_map),
        "scatter back backward": Cost(q_heads * (seq_len + sub) * row + entry_map),
        "attend backward": attend["attend backward"],
        "gather backward": Cost(heads * (sub + seq_len) * row + slot_map),
    }


def floor_seconds(costs: dict[str, Cost], bandwidth: float, rate: float) -> dict[str, float]:
    """The least time of each step: bytes at `bandwidth` (bytes/s), or FLOPs at `rate` (FLOP/s)."""
    return {name: max(cost.bytes / bandwidth, cost.flops / rate) for name, cost in costs.items()}
