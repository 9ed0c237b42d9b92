"""Context parallelism for torchtitan's Llama 3: how a batch is cut, and what attends over it.

torchtitan gives every rank of the context-parallel mesh the same batch. `shard_batch` cuts it as
the scheme wants it. torchtitan has made each layer's attention a ring by then, on a GPU; under
`ulysses`, and on the CPU, `use_context_parallel` puts ours in its place, in both stages alike.
"""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.experimental._attention import set_rotate_method
from torchtitan.models.attention import ScaledDotProductAttentionWrapper

from lighthouse.context_parallel import ContextParallel, UlyssesAttention
from lighthouse.ring import RingAttention


def context_parallel_of(mesh: DeviceMesh | None, scheme: str) -> ContextParallel | None:
    """This rank's place in torchtitan's `cp` mesh; None without one."""
    return None if mesh is None else ContextParallel.of(mesh.get_group(), scheme)


def use_context_parallel(
    model: nn.Module, cp: ContextParallel, rotate_method: str, device_type: str
) -> None:
    """Make every layer attend over the whole sequence by the scheme of `cp`.

    Args:
        model: parallelised by torchtitan with this mesh; its layers are dense.
        rotate_method: `allgather` or `alltoall`, how a ring moves keys and values.
    """
    # torchtitan 0.2.2 reads the method for its validation only.
    set_rotate_method(rotate_method)
    for block in model.layers.values():
        attention = block.attention
        if cp.scheme == "ulysses":
            # A new one: the old one is hooked into the ring.
            stock = ScaledDotProductAttentionWrapper()
            attention.inner_attention = UlyssesAttention(stock, cp)
        elif device_type == "cpu":
            attention.inner_attention = RingAttention(cp)


def shard_batch(
    inputs: torch.Tensor, labels: torch.Tensor, cp: ContextParallel | None
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """This rank's tokens and labels, and the positions that its model is to be told.

    Args:
        inputs, labels: [B, N].

    Returns:
        Both [B, N / W], and `{"positions": [1, N / W]}`; without context parallelism what came in
        and nothing to tell.
    """
    if cp is None:
        return inputs, labels, {}
    positions = torch.arange(inputs.shape[1], dtype=torch.int32, device=inputs.device)[None]
    inputs, labels, positions = (cp.shard(x, 1) for x in (inputs, labels, positions))
    return inputs, labels, {"positions": positions}
