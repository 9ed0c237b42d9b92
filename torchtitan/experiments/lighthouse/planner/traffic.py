"""Bytes that a rank sends to others, by purpose."""

from collections import Counter

from torchtitan.experiments.lighthouse.planner.run_shape import Sizes

from lighthouse.costs import edge_bytes, exchange_bytes

KINDS = {True: "Lighthouse", False: "dense"}


def layer_traffic(sizes: Sizes, is_lighthouse: bool, checkpointing: str) -> dict[str, int]:
    """Bytes that a rank sends for one layer and micro-batch, by purpose.

        gather               parameters in the compute dtype, for the forward pass
        gather backward      parameters again, if they were resharded after the forward pass
        reduce               gradients in the dtype of the reduction
        all-reduce           shards of gradients, between replicas
        exchange             attention under context parallelism (`lighthouse/costs.py`)
        exchange recomputed  the same again, by activation checkpointing
        exchange backward    gradients of the exchanged tensors
        edges                scatter-back across the edges of chunks

    `edges` may also be recomputed and has a backward pass. Tensor parallelism is not covered.
    """
    traffic = fsdp_traffic(
        sizes, sizes.parameters["layer"], is_resharded=is_resharded_after_forward(sizes)
    )
    if sizes.cp_scheme is None:
        return traffic
    shape = sizes.attention_shape(sizes.attended_len(is_lighthouse))
    exchanged = exchange_bytes(shape, sizes.cp_degree, sizes.cp_scheme)
    if is_lighthouse:
        exchanged |= edge_bytes(shape, sizes.attention, sizes.cp_degree, sizes.cp_scheme)
    for name, size in exchanged.items():
        traffic[name] = size
        # `op` saves the outputs of an all-to-all. It saves those of the ring only on a GPU.
        is_kept = name == "edges" or sizes.cp_scheme == "ulysses" or sizes.device_type == "cuda"
        is_again = checkpointing == "full" or (checkpointing == "op" and not is_kept)
        if is_again and not name.endswith("backward"):
            traffic[f"{name} recomputed"] = size
    return traffic


def step_traffic(sizes: Sizes, stage: int) -> dict[str, int]:
    """Bytes that a rank sends in a step, by purpose, without sums of a few numbers."""
    policy = sizes.config.parallelism.fsdp_reshard_after_forward
    parts = [layer_traffic(sizes, *layer) for layer in sizes.layers(stage)]
    parameters = sizes.parameters
    parts.append(fsdp_traffic(sizes, parameters["embedding"], is_resharded_after_forward(sizes)))
    parts.append(fsdp_traffic(sizes, parameters["head"], is_resharded=policy == "always"))
    if sizes.fsdp_degree == 1 and sizes.dp_replicate > 1:
        parts.append(
            {"all-reduce": all_reduce_bytes(sizes, parameters["total"] * sizes.param_bytes)}
        )
    total = Counter()
    for part in parts:
        total.update(part)
    return {name: size * sizes.micro_batches for name, size in total.items()}


def is_resharded_after_forward(sizes: Sizes) -> bool:
    """Whether a layer's parameters are freed after its forward pass and gathered again."""
    return sizes.config.parallelism.fsdp_reshard_after_forward != "never"


def fsdp_traffic(sizes: Sizes, parameters: int, is_resharded: bool) -> dict[str, int]:
    """Bytes that a rank sends for a group of `parameters` and a micro-batch."""
    if sizes.fsdp_degree == 1:
        return {}
    others = parameters * (sizes.fsdp_degree - 1) // sizes.fsdp_degree
    traffic = {"gather": others * sizes.compute_bytes}
    if is_resharded:
        traffic["gather backward"] = others * sizes.compute_bytes
    traffic["reduce"] = others * sizes.reduce_bytes
    if sizes.dp_replicate > 1:
        shard = parameters // sizes.fsdp_degree * sizes.reduce_bytes
        traffic["all-reduce"] = all_reduce_bytes(sizes, shard)
    return traffic


def all_reduce_bytes(sizes: Sizes, size: int) -> int:
    """Bytes that a rank sends in a ring all-reduce of `size` bytes over the replicas."""
    return 2 * size * (sizes.dp_replicate - 1) // sizes.dp_replicate
