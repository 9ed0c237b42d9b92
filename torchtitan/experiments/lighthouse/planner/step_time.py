"""Expected seconds of a step, from stated rates.

A part takes its bytes divided by a bandwidth, or its FLOPs divided by a rate. The parts add up. No
time is measured. Assumptions:

- FSDP communication overlaps with the computation of a layer. Only the excess costs time.
- `ring` overlaps with attention. `ulysses` does not overlap.
- Compilation fuses the elementwise operations between two matrix products or attention into one
  kernel. The complex rotation is not compiled.

Not counted: data loading, logging, validation, checkpoints, compilation, and gaps between kernels.
"""

from torchtitan.experiments.lighthouse.planner.flops import (
    attention_costs,
    layer_weights,
    recomputed_steps,
    recomputed_weights,
)
from torchtitan.experiments.lighthouse.planner.gpus import GPUS_PER_NODE, Gpu
from torchtitan.experiments.lighthouse.planner.run_shape import Sizes
from torchtitan.experiments.lighthouse.planner.traffic import (
    fsdp_traffic,
    is_resharded_after_forward,
    layer_traffic,
)

from lighthouse.costs import floor_seconds


def step_seconds(sizes: Sizes, stage: int, gpu: Gpu) -> dict[str, float]:
    """Expected seconds of a step, by part."""
    total = {}
    # Lighthouse layers have all parts. They come first to give the order.
    for is_lighthouse, checkpointing in sorted(sizes.layers(stage), reverse=True):
        parts = layer_seconds(sizes, is_lighthouse, checkpointing, gpu)
        for name, size in parts.items():
            total[name] = total.get(name, 0.0) + size * sizes.micro_batches
    exposed = total.pop("exposed communication")
    total["head and loss"] = loss_seconds(sizes, gpu) * sizes.micro_batches
    total["optimizer"] = optimizer_seconds(sizes, gpu)
    # The first gather and the last reduction do not overlap with computation.
    ends = fsdp_traffic(sizes, sizes.parameters["embedding"], is_resharded_after_forward(sizes))
    ends = _fsdp_seconds(sizes, ends, gpu)
    for name in ("gather", "reduce", "all-reduce"):
        exposed += ends.get(name, 0.0) * sizes.micro_batches
    total["exposed communication"] = exposed
    return total


def layer_seconds(
    sizes: Sizes, is_lighthouse: bool, checkpointing: str, gpu: Gpu
) -> dict[str, float]:
    """Expected seconds of a layer and micro-batch, forward and backward, by part.

    The steps of attention are those of `lighthouse/costs.py`. Each rank has 1/W of their bytes and
    FLOPs. Recomputation is added to the part that is recomputed.
    """
    weights, tokens = layer_weights(sizes), sizes.rank_tokens
    product = 2 * tokens / gpu.matmul_flops
    elementwise = [size / gpu.bandwidth for size in elementwise_bytes(sizes)]
    steps = attention_seconds(sizes, is_lighthouse, gpu)
    forward = {name for name in steps if not name.endswith("backward")}
    again = recomputed_steps(sizes, steps, checkpointing)
    is_again = checkpointing != "none"

    compute = {
        "linear": product * (3 * weights + recomputed_weights(sizes, checkpointing)),
        "norms, rotation, SwiGLU": sum(elementwise) + elementwise[0] * is_again,
    }
    compute |= {name: steps[name] * (1 + (name in again)) for name in steps}
    forward_seconds = product * weights + elementwise[0] + sum(steps[name] for name in forward)
    backward_seconds = sum(compute.values()) - forward_seconds

    traffic = layer_traffic(sizes, is_lighthouse, checkpointing)
    fsdp = _fsdp_seconds(sizes, traffic, gpu)
    behind_forward = fsdp.pop("gather", 0.0)
    exposed = max(0.0, behind_forward - forward_seconds)
    exposed += max(0.0, sum(fsdp.values()) - backward_seconds)
    exposed += _exchange_seconds(sizes, traffic, steps, gpu)
    return compute | {"exposed communication": exposed}


def attention_seconds(sizes: Sizes, is_lighthouse: bool, gpu: Gpu) -> dict[str, float]:
    """Lower bound in seconds of each step of attention on a rank, by name, in order."""
    seconds = {}
    for name, cost in attention_costs(sizes, is_lighthouse).items():
        is_backward = name.endswith("backward")
        rate = gpu.attention_backward_flops if is_backward else gpu.attention_flops
        seconds |= floor_seconds({name: cost}, gpu.bandwidth, rate)
    seconds = {name: size / sizes.cp_degree for name, size in seconds.items()}
    if sizes.cp_scheme == "ring":
        # Each block's output is cast to fp32 (6 bytes per element) and merged (32 bytes per
        # element). Neither is compiled.
        rows = sizes.batch * sizes.attended_len(is_lighthouse) // sizes.cp_degree
        merged = sizes.cp_degree * rows * sizes.n_heads * sizes.head_dim * 38
        seconds["ring merge"] = merged / gpu.bandwidth
    return seconds


def elementwise_bytes(sizes: Sizes) -> tuple[int, int]:
    """Bytes that norms, residuals, rotation and SwiGLU move in a layer, forward and backward.

    Elements per token, read and written, in compiled layers:

        forward     norm 2 dim, residual and norm 4 dim, SwiGLU 3 hidden, residual 4 dim
        backward    SwiGLU 6 hidden (with its product recomputed), norm and residual 6 dim twice
        rotation    10 for each element of q and k, forward and backward: cast to fp32, multiply,
                    cast back. An fp32 element counts as two. 4 if everything is fp32.

    Without compilation, silu, its product and the norm on a CPU write intermediate results. They
    add half as much again.
    """
    dim, hidden_dim = sizes.model_args.dim, sizes.hidden_dim
    heads = (sizes.n_heads + sizes.n_kv_heads) * sizes.head_dim
    rotation = (10 if sizes.compute_bytes == 2 else 4) * heads
    forward, backward = 10 * dim + 3 * hidden_dim, 12 * dim + 6 * hidden_dim
    if not sizes.is_compiled("model"):
        forward, backward = forward * 3 // 2, backward * 3 // 2
    element = sizes.rank_tokens * sizes.compute_bytes
    return (forward + rotation) * element, (backward + rotation) * element


def loss_seconds(sizes: Sizes, gpu: Gpu) -> float:
    """Expected seconds of the head and the loss of a micro-batch, forward and backward.

    There are three matrix products, and bytes moved per logit. A compiled loss reads each logit
    twice and writes its gradient. An eager loss casts, computes the log-softmax and writes two
    gradients in fp32. The loss in chunks makes seven passes.
    """
    tokens, e = sizes.rank_tokens, sizes.compute_bytes
    vocab, dim = sizes.model_args.vocab_size, sizes.model_args.dim
    if sizes.is_compiled("loss"):
        per_logit = 3 * e
    elif sizes.config.training.loss_chunk_size:
        per_logit = 2 * e + 36
    else:
        per_logit = 24 if e == 4 else 36
    return 6 * tokens * vocab * dim / gpu.matmul_flops + tokens * vocab * per_logit / gpu.bandwidth


def optimizer_seconds(sizes: Sizes, gpu: Gpu) -> float:
    """Expected seconds of clipping and of Adam.

    Clipping reads the gradients twice and writes them once. Adam reads parameters, gradients and
    both moments, and writes all but the gradients. `fused` does that in one kernel. Otherwise there
    are eight passes that move 20 elements per parameter.
    """
    moved = 7 if sizes.config.optimizer.implementation == "fused" else 20
    shard = sizes.parameters["total"] / sizes.fsdp_degree * sizes.param_bytes
    return (moved + 3) * shard / gpu.bandwidth


def _fsdp_seconds(sizes: Sizes, traffic: dict[str, int], gpu: Gpu) -> dict[str, float]:
    """Seconds of FSDP's part of `traffic`, by purpose."""
    # A ring over several nodes uses the network links of all GPUs of a node.
    within = min(gpu.nvlink, GPUS_PER_NODE * gpu.network)
    rate = gpu.nvlink if sizes.fsdp_degree <= GPUS_PER_NODE else within
    rates = {"gather": rate, "gather backward": rate, "reduce": rate}
    rates["all-reduce"] = gpu.nvlink if sizes.world_size <= GPUS_PER_NODE else gpu.network
    return {name: traffic[name] / rates[name] for name in rates if name in traffic}


def _exchange_seconds(
    sizes: Sizes, traffic: dict[str, int], steps: dict[str, float], gpu: Gpu
) -> float:
    """Seconds per layer of context-parallel communication that does not overlap."""
    rate = gpu.nvlink if sizes.cp_degree <= GPUS_PER_NODE else gpu.network
    seconds = {
        name: size / rate for name, size in traffic.items() if name.startswith(("exch", "edges"))
    }
    if sizes.cp_scheme != "ring":
        return sum(seconds.values())
    is_gathered = sizes.config.parallelism.context_parallel_rotate_method == "allgather"
    degree, exposed = sizes.cp_degree, 0.0
    for name, size in seconds.items():
        if not name.startswith("exchange"):
            exposed += size
            continue
        is_backward = name.endswith("backward")
        block = steps["attend backward" if is_backward else "attend"] / degree
        rotated = seconds["exchange"]
        exposed += max(0.0, rotated - (block if is_gathered else (degree - 1) * block))
        if is_backward:
            # Gradients of k and v are sent after each block. The last send does not overlap.
            sums = size - rotated
            exposed += sums / degree + max(0.0, (degree - 1) * (sums / degree - block))
    return exposed
