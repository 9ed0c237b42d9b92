"""Bytes and FLOPs of each step of a Lighthouse layer, and the least time they take.

Bytes count each required input once and each output once. FLOPs count the two products of causal
attention over half of the square. Its backward pass counts 2.5 times as many. Scoring by `dilated`
and `gla` counts forward only. All other FLOPs of the layer are negligible. No step can take less
than `bytes / bandwidth` or `FLOPs / rate`.

Under context parallelism of degree W, each rank has 1/W of every step. It also exchanges data with
the other ranks (`exchange_bytes`, `edge_bytes`).
"""

from typing import NamedTuple

from lighthouse.config import LighthouseConfig
from lighthouse.context_parallel import CHUNKS_PER_RANK


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
    """Bytes and FLOPs of one step."""

    bytes: int
    flops: int = 0


def attention_flops(batch: int, n_heads: int, length: int, head_dim: int) -> int:
    """FLOPs of one causal attention forward: q·k and p·v over half of the square."""
    return batch * n_heads * 2 * length**2 * head_dim


def scored_positions(config: LighthouseConfig, seq_len: int, head_dim: int) -> float:
    """Positions that the scorer attends to per token and query head, not halved for causality.

    `dilated` attends twice to the N / dilation tokens of a residue class. `gla` updates and reads
    a D * D state twice. Each time costs as many FLOPs as q·k and p·v over D positions.
    """
    return {"norm": 0, "dilated": 2 * seq_len / config.dilation, "gla": 2 * head_dim}[config.scorer]


def scoring_flops(shape: Shape, config: LighthouseConfig) -> int:
    """FLOPs of scoring: q·k and p·v over `scored_positions`, half of them for `dilated`."""
    positions = scored_positions(config, shape.seq_len, shape.head_dim)
    tokens = shape.batch * shape.n_heads * shape.seq_len
    return int(tokens * (2 if config.scorer == "dilated" else 4) * positions * shape.head_dim)


def dense_costs(shape: Shape) -> dict[str, Cost]:
    """Dense attention. Forward moves q, k, v, out once. Backward also moves their gradients."""
    rows = shape.batch * shape.seq_len * 2 * (shape.n_heads + shape.n_kv_heads)
    row = shape.head_dim * shape.itemsize
    flops = attention_flops(shape.batch, shape.n_heads, shape.seq_len, shape.head_dim)
    return {
        "attend": Cost(rows * row, flops),
        "attend backward": Cost(2 * rows * row, flops * 5 // 2),
    }


def layer_costs(shape: Shape, config: LighthouseConfig, rotary_dim: int = 0) -> dict[str, Cost]:
    """Every step of a Lighthouse layer, forward and backward, in order.

    Args:
        rotary_dim: elements of a head that pooling rotates, R; 0 means no rotation.
    """
    seq_len, row = shape.seq_len, shape.head_dim * shape.itemsize
    q_heads, kv_heads = shape.batch * shape.n_heads, shape.batch * shape.n_kv_heads
    heads = q_heads + 2 * kv_heads
    sub = config.sub_seq_len(seq_len)
    entries = config.num_entries(seq_len)
    coarsest = config.level_len(config.num_levels - 1, seq_len)
    candidates = config.pooling_factor * config.topk
    # Tokens covered by the entries of the sub-sequence below the coarsest level.
    gathered = sum(candidates * config.span(level) for level in range(config.num_levels - 1))
    scores = 2 * 4 * kv_heads * (entries - seq_len)
    scores_read = 2 * 4 * kv_heads * (coarsest + (config.num_levels - 2) * candidates)
    entry_map, slot_map = 4 * kv_heads * sub, 4 * kv_heads * entries
    attend = dense_costs(shape._replace(seq_len=sub))
    # Cosines and sines in fp32 for each offset in the longest and in the second longest span.
    table = 4 * rotary_dim * config.span(config.num_levels - 1)
    finer_table = 4 * rotary_dim * config.span(config.num_levels - 2)
    score_bytes = heads * (seq_len + coarsest) * row + scores + table
    return {
        "score": Cost(score_bytes, scoring_flops(shape, config)),
        "select": Cost(scores_read + entry_map + slot_map),
        "gather": Cost(heads * (gathered + coarsest + sub) * row + entry_map + finer_table),
        "attend": attend["attend"],
        "scatter back": Cost(q_heads * (sub + seq_len) * row + slot_map),
        "scatter back backward": Cost(q_heads * (seq_len + sub) * row + entry_map),
        "attend backward": attend["attend backward"],
        "gather backward": Cost(heads * (sub + seq_len) * row + slot_map + table),
    }


def exchange_bytes(shape: Shape, degree: int, scheme: str) -> dict[str, int]:
    """Bytes that a rank sends to the other ranks to attend over a shared sequence.

        ulysses   forward: its shard of q, k, v and of the output
                  backward: as many bytes of gradients
        ring      forward: k and v of its shard, W-1 times
                  backward: k and v W-1 times, and their gradients in fp32 W times;
                  the same for `allgather` and `alltoall`

    Args:
        shape: sizes of the whole sequence of N tokens, or of the sub-sequence of S entries.
        degree: number of ranks that share the sequence, W.
    """
    rows = shape.batch * shape.seq_len // degree
    kv = 2 * rows * shape.n_kv_heads * shape.head_dim
    if scheme == "ring":
        forward = (degree - 1) * kv * shape.itemsize
        return {"exchange": forward, "exchange backward": forward + degree * kv * 4}
    qkv_out = 2 * rows * shape.n_heads * shape.head_dim + kv
    forward = qkv_out * shape.itemsize * (degree - 1) // degree
    return {"exchange": forward, "exchange backward": forward}


def edge_bytes(shape: Shape, config: LighthouseConfig, degree: int, scheme: str) -> dict[str, int]:
    """Bytes that a rank sends to the other ranks so that scatter-back can cross chunk boundaries.

    There is one row per head, level above the finest and local chunk. Each row has one receiver,
    and the all-to-all sends zeros to the other ranks.
    """
    rows = shape.batch * shape.n_heads * (config.num_levels - 1) * CHUNKS_PER_RANK[scheme]
    forward = rows * shape.head_dim * shape.itemsize * (degree - 1)
    return {"edges": forward, "edges backward": forward}


def floor_seconds(costs: dict[str, Cost], bandwidth: float, rate: float) -> dict[str, float]:
    """The least time of each step: bytes at `bandwidth` (bytes/s), or FLOPs at `rate` (FLOP/s)."""
    return {name: max(cost.bytes / bandwidth, cost.flops / rate) for name, cost in costs.items()}
