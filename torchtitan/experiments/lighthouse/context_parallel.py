"""Context parallelism for torchtitan's Llama 3: sharding of batches, and attention over shards.

torchtitan gives every rank of the context-parallel mesh the same batch. `shard_batch` shards it by
the layout of the scheme. On a GPU, torchtitan has already turned each layer's attention into ring
attention. Under `ulysses`, and on the CPU, `use_context_parallel` replaces it in both stages.

If stage 2 trains on pieces, each rank holds whole pieces (`cut_batch`) and attends within them
without communication (`use_local_attention`). Validation sequences are still sharded.
"""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.experimental._attention import set_rotate_method
from torch.nn.attention import SDPBackend
from torchtitan.models.attention import ScaledDotProductAttentionWrapper

from lighthouse.context_parallel import ContextParallel, UlyssesAttention
from lighthouse.ring import RingAttention


def context_parallel_of(mesh: DeviceMesh | None, scheme: str) -> ContextParallel | None:
    """This rank's position in torchtitan's `cp` mesh; None without one."""
    return None if mesh is None else ContextParallel.of(mesh.get_group(), scheme)


def use_context_parallel(
    model: nn.Module, cp: ContextParallel, rotate_method: str, device_type: str
) -> None:
    """Make every layer attend over the whole sequence with the scheme of `cp`.

    Args:
        model: parallelised by torchtitan with this mesh; its layers are dense.
        rotate_method: `allgather` or `alltoall`, the way a ring exchanges keys and values.
    """
    # torchtitan 0.2.2 reads the method only in its own validation.
    set_rotate_method(rotate_method)
    for block in model.layers.values():
        attention = block.attention
        if cp.scheme == "ulysses":
            # The old module has the hooks of the ring, so a new one is needed.
            stock = ScaledDotProductAttentionWrapper()
            attention.inner_attention = UlyssesAttention(stock, cp)
        elif device_type == "cpu":
            attention.inner_attention = RingAttention(cp)


class LocalAttention(nn.Module):
    """Attention over local whole sequences in training, and over sharded sequences in validation.

    Args:
        stock: causal attention over whole sequences, used in training.
        shared: the layer's attention over sharded sequences, used in evaluation.
    """

    def __init__(self, stock: nn.Module, shared: nn.Module):
        super().__init__()
        self.stock = stock
        self.shared = shared

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **kwargs) -> torch.Tensor:
        """q: [B, H, n, D]; k, v: [B, Hkv, n, D]. Returns [B, H, n, D]."""
        attend = self.stock if self.training else self.shared
        return attend(q, k, v, **kwargs)


def use_local_attention(model: nn.Module, backends: list[SDPBackend]) -> None:
    """Make every layer attend to whole sequences on this rank in training, without communication.

    Args:
        model: prepared by `use_context_parallel`; its layers are dense.
        backends: attention kernels in order of preference.
    """
    for block in model.layers.values():
        stock = ScaledDotProductAttentionWrapper()
        stock.sdpa_backends = backends
        shared = block.attention.inner_attention
        block.attention.inner_attention = LocalAttention(stock, shared)


def use_shared_attention(model: nn.Module) -> None:
    """Undo `use_local_attention`. Other models stay unchanged."""
    for block in model.layers.values():
        if isinstance(block.attention.inner_attention, LocalAttention):
            block.attention.inner_attention = block.attention.inner_attention.shared


def cut_batch(
    inputs: torch.Tensor, labels: torch.Tensor, seq_len: int, context: ContextParallel | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's pieces of a batch, which are consecutive and whole.

    Args:
        inputs, labels: [B, N].
        seq_len: length of a piece in tokens, n.

    Returns:
        Both [B * N / n / W, n]; W is 1 without context parallelism.
    """
    inputs, labels = (x.reshape(-1, seq_len) for x in (inputs, labels))
    if context is None:
        return inputs, labels
    return inputs.chunk(context.degree)[context.rank], labels.chunk(context.degree)[context.rank]


def shard_batch(
    inputs: torch.Tensor, labels: torch.Tensor, cp: ContextParallel | None
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """This rank's tokens and labels, and their positions as an extra argument of the model.

    Args:
        inputs, labels: [B, N].

    Returns:
        Both [B, N / W], and `{"positions": [1, N / W]}`. Without context parallelism, the inputs
        unchanged and no extra arguments.
    """
    if cp is None:
        return inputs, labels, {}
    positions = torch.arange(inputs.shape[1], dtype=torch.int32, device=inputs.device)[None]
    inputs, labels, positions = (cp.shard(x, 1) for x in (inputs, labels, positions))
    return inputs, labels, {"positions": positions}
