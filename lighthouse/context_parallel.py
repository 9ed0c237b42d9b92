"""Context parallelism: one sequence sharded over W ranks, with the result of one rank.

The sequence is cut into chunks. Rank r holds

    ulysses   chunk r of W
    ring      chunks r and 2W-1-r of 2W, a head and a tail chunk, so that causal attention costs
              the same on every rank

Strata align with chunks. With `topk / W`, each rank scores, selects, pools and gathers its shard
like a whole sequence, and the selection equals that of a single device. Each rank holds S / W
entries of the sub-sequence, in the layout of the tokens. Three steps depend on other ranks:

- Forced selection. Only the first entries of the whole sequence, on rank 0, are always selected.
- Attention over the sub-sequence. `UlyssesAttention` exchanges sequence shards of all heads for
  whole sequences of some heads, runs standard attention, and exchanges back. Under `ring` the
  inner attention is torch's ring attention (`ring.py` on the CPU).
- Scatter-back. It shifts outputs across chunk boundaries. `exchange_edges` sends the output of the
  last entry of each level above the finest to the owner of the next chunk, L-1 rows per head.

Ulysses attention and scatter-back use one collective, an all-to-all that is its own backward pass.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.distributed_c10d import _resolve_process_group

from lighthouse.config import LighthouseConfig
from lighthouse.ops import register
from lighthouse.selection import Selection

CHUNKS_PER_RANK = {"ulysses": 1, "ring": 2}
"""Chunks of the sequence per rank, by scheme."""


@dataclass(frozen=True)
class ContextParallel:
    """This rank's position among the ranks that share a sequence.

        context = ContextParallel.of(group, "ulysses")
        tokens = context.shard(tokens, 1)
        attend = UlyssesAttention(causal_sdpa, context)
        out = lighthouse_attention(q, k, v, config, attend=attend, context=context)

    Stage 2 calls `attend(q, k, v, enable_gqa=...)` on the same shards.
    """

    group_name: str
    """Name of the process group."""

    rank: int
    degree: int
    """Number of ranks in the group, W."""

    scheme: str
    """`ulysses` or `ring`."""

    def __post_init__(self):
        if self.scheme not in CHUNKS_PER_RANK:
            raise ValueError(
                f"scheme must be one of {', '.join(CHUNKS_PER_RANK)}, got {self.scheme!r}; "
                "choose one"
            )

    @classmethod
    def of(cls, group: dist.ProcessGroup, scheme: str) -> "ContextParallel":
        """The position of this process in `group`."""
        return cls(group.group_name, dist.get_rank(group), dist.get_world_size(group), scheme)

    @property
    def chunks_per_rank(self) -> int:
        return CHUNKS_PER_RANK[self.scheme]

    @property
    def num_chunks(self) -> int:
        """Number of chunks of the whole sequence."""
        return self.degree * self.chunks_per_rank

    def chunks_of(self, rank: int) -> list[int]:
        """Chunks that `rank` holds, in order."""
        return [rank, self.num_chunks - 1 - rank][: self.chunks_per_rank]

    def owner(self, chunk: int) -> tuple[int, int]:
        """The rank that holds `chunk`, and the position among the chunks of that rank."""
        if chunk < self.degree:
            return chunk, 0
        return self.num_chunks - 1 - chunk, 1

    def shard(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """This rank's shard of the unsharded `x` along `dim`.

        Raises:
            ValueError: `x` does not divide into equal chunks.
        """
        if x.shape[dim] % self.num_chunks:
            raise ValueError(
                f"the sequence must divide into {self.num_chunks} equal chunks, got "
                f"{x.shape[dim]} tokens; use a multiple of {self.num_chunks}"
            )
        chunks = x.chunk(self.num_chunks, dim)
        return torch.cat([chunks[i] for i in self.chunks_of(self.rank)], dim)

    def shard_config(self, config: LighthouseConfig, shard_len: int) -> LighthouseConfig:
        """The configuration for this rank's shard of `shard_len` tokens as a sequence of its own.

        Raises:
            ValueError: the whole sequence is not legal under `config`, strata and chunks do not
                align, or the scorer needs tokens of other shards.
        """
        if config.scorer != "norm":
            raise ValueError(
                "scorer must be norm under context parallelism, where each rank scores its own "
                f"tokens, got {config.scorer!r}; set it to norm, or attend on one rank"
            )
        config.check_seq_len(shard_len * self.degree, self.num_chunks)
        return replace(config, topk=config.topk // self.degree)


def exchange_edges(
    sub_out: torch.Tensor, selection: Selection, cp: ContextParallel
) -> torch.Tensor:
    """The outputs that scatter-back carries into each chunk from the previous chunk.

    Args:
        sub_out: this rank's shard of the output of the sub-sequence, [B, H, S/W, D].

    Returns:
        [B, H, chunks of this rank, L-1, D]: the output of the last entry of levels 1 .. L-1 of
        the previous chunk. Entries absent from the sub-sequence and the first chunk get zeros.
    """
    edges = _last_outputs(sub_out, selection, cp)
    num_chunks = cp.num_chunks
    # Chunks send in a circle. Every rank then sends a tensor with a gradient and takes part in the
    # collective of the backward pass. The last chunk sends zeros to the first.
    send = edges.new_zeros((cp.degree, cp.chunks_per_rank, *edges[0].shape))
    for place, chunk in enumerate(cp.chunks_of(cp.rank)):
        send[cp.owner((chunk + 1) % num_chunks)] = edges[place]
    received = all_to_all(send, cp.group_name)
    # One rank owns the previous chunk. The other ranks have sent zeros.
    before = [
        received[cp.owner((chunk - 1) % num_chunks)[0], place]
        for place, chunk in enumerate(cp.chunks_of(cp.rank))
    ]
    return torch.stack(before, 2)


def _last_outputs(sub_out: torch.Tensor, selection: Selection, cp: ContextParallel) -> torch.Tensor:
    """Outputs of the last entry of each local chunk and level above the finest.

    Returns:
        [chunks, B, H, L-1, D], zero for absent entries and for the last chunk of the sequence.
    """
    config, seq_len = selection.config, selection.seq_len
    slots = []
    for place, chunk in enumerate(cp.chunks_of(cp.rank)):
        for level in range(1, config.num_levels):
            chunk_len = config.level_len(level, seq_len) // cp.chunks_per_rank
            last = config.level_offset(level, seq_len) + (place + 1) * chunk_len - 1
            is_end = chunk == cp.num_chunks - 1
            slot = selection.entry_to_slot[..., last]
            slots.append(torch.full_like(slot, -1) if is_end else slot)
    slots = torch.stack(slots, -1).long()  # [B, Hkv, chunks * (L-1)]
    slots = slots.repeat_interleave(sub_out.shape[1] // slots.shape[1], 1)[..., None]
    rows = sub_out.gather(2, slots.clamp(min=0).expand(-1, -1, -1, sub_out.shape[3]))
    rows = rows.masked_fill(slots < 0, 0)
    return rows.unflatten(2, (cp.chunks_per_rank, -1)).movedim(2, 0)


class UlyssesAttention(nn.Module):
    """Causal attention over a sequence sharded contiguously over the ranks of a group.

    Args:
        inner: causal attention over whole sequences, a module or function such as `causal_sdpa`,
            called as `inner(q, k, v, enable_gqa=...)`.
        context: its scheme is `ulysses`, and its degree divides Hkv.
    """

    def __init__(self, inner: Callable[..., torch.Tensor], context: ContextParallel):
        super().__init__()
        self.inner = inner
        self.cp = context

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, enable_gqa: bool = False
    ) -> torch.Tensor:
        """q: [B, H, n, D]; k, v: [B, Hkv, n, D], n local tokens. Returns [B, H, n, D]."""
        degree, group_name = self.cp.degree, self.cp.group_name
        if k.shape[1] % degree:
            raise ValueError(
                "the degree of ulysses must divide the key/value heads, got degree "
                f"{degree} and {k.shape[1]} heads; use another degree"
            )
        # Each rank receives its heads of q, k and v in one message.
        by_rank = [x.unflatten(1, (degree, -1)).movedim(1, 0) for x in (q, k, v)]
        received = all_to_all(torch.cat([x.flatten(1) for x in by_rank], 1), group_name)
        parts = received.split([x[0].numel() for x in by_rank], 1)
        whole = [
            part.view(x.shape).movedim(0, 2).flatten(2, 3)  # [B, heads / W, W * n, D]
            for part, x in zip(parts, by_rank, strict=True)
        ]
        out = self.inner(*whole, enable_gqa=enable_gqa)
        by_rank = out.unflatten(2, (degree, -1)).movedim(2, 0)
        return all_to_all(by_rank, group_name).movedim(0, 1).flatten(1, 2)  # [B, H, n, D]


def all_to_all_reference(x: torch.Tensor, group_name: str) -> torch.Tensor:
    """Send `x[r]` to rank r and receive as many: [W, ...], any strides, to contiguous [W, ...]."""
    received = torch.empty_like(x, memory_format=torch.contiguous_format)
    group = _resolve_process_group(group_name)
    dist.all_to_all_single(received, x.contiguous(), group=group)
    return received


def _all_to_all_fake(x, group_name):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _all_to_all_setup(ctx, inputs, output):
    ctx.group_name = inputs[1]


def _all_to_all_autograd(ctx, dreceived):
    return all_to_all(dreceived, ctx.group_name), None


all_to_all = register(
    "all_to_all",
    all_to_all_reference,
    _all_to_all_fake,
    backward=_all_to_all_autograd,
    setup_context=_all_to_all_setup,
)

all_to_all_op = torch.ops.lighthouse.all_to_all.default
"""The op, so that activation checkpointing can save its outputs."""
