"""FLOPs of a run, by part.

A matrix product has 6 FLOPs per weight and token, 4 of them in the backward pass. Attention counts
half of the square, and 2.5 times as many FLOPs in the backward pass (`lighthouse/costs.py`).
Recomputation by activation checkpointing is counted separately. torchtitan logs MFU with another
count (`logged_flops_per_token`): the whole square of attention, and twice as many backward.
"""

from collections.abc import Iterable

from torchtitan.experiments.lighthouse.apply_lighthouse import flops_saved_per_token
from torchtitan.experiments.lighthouse.planner.run_shape import Sizes

from lighthouse.costs import Cost, dense_costs, layer_costs


def flops_per_token(sizes: Sizes, stage: int) -> dict[str, float]:
    """FLOPs per token of a forward and a backward pass, by part. Scoring has no backward pass."""
    args, layers = sizes.model_args, sizes.layers(stage)
    parts = {"linear": 6 * len(layers) * layer_weights(sizes), "attention": 0.0, "scoring": 0.0}
    for is_lighthouse, _ in layers:
        for name, cost in attention_costs(sizes, is_lighthouse).items():
            part = "scoring" if name == "score" else "attention"
            parts[part] += cost.flops / sizes.batch / sizes.seq_len
    parts["head"] = 6 * args.vocab_size * args.dim
    return parts | {"total": sum(parts.values())}


def recomputed_flops_per_token(sizes: Sizes, stage: int) -> float:
    """FLOPs per token that activation checkpointing recomputes."""
    total = 0.0
    for is_lighthouse, checkpointing in sizes.layers(stage):
        total += 2 * recomputed_weights(sizes, checkpointing)
        costs = attention_costs(sizes, is_lighthouse)
        again = recomputed_steps(sizes, costs, checkpointing)
        total += sum(costs[name].flops for name in again) / sizes.batch / sizes.seq_len
    return total


def attention_costs(sizes: Sizes, is_lighthouse: bool) -> dict[str, Cost]:
    """Bytes and FLOPs of each step of attention, of all ranks that share a sequence, in order."""
    shape = sizes.attention_shape(sizes.seq_len)
    if not is_lighthouse:
        return dense_costs(shape)
    is_aligned = sizes.config.lighthouse.pool_rotary == "aligned"
    return layer_costs(shape, sizes.attention, sizes.head_dim if is_aligned else 0)


def logged_flops_per_token(sizes: Sizes, stage: int) -> float:
    """FLOPs per token as torchtitan counts them and its log computes MFU with.

    For attention 12 per head dimension and attended position, causal or not, where
    `flops_per_token` has 7: half of the square, but one product more backward.
    """
    args, seq_len = sizes.model_args, sizes.seq_len
    _, flops = args.get_nparams_and_flops(sizes.model, seq_len)
    if stage == 1:
        layers = sizes.config.lighthouse.full_attn_layers
        flops -= flops_saved_per_token(args, sizes.attention, layers, seq_len)
    return flops


def layer_weights(sizes: Sizes) -> int:
    """Number of elements in the weight matrices of a layer."""
    return sum(p.numel() for p in sizes.model.layers["0"].parameters() if p.dim() == 2)


def recomputed_steps(sizes: Sizes, steps: Iterable[str], checkpointing: str) -> set[str]:
    """The steps of attention that are recomputed.

    The selection and expensive scores are never recomputed. On a GPU, `op` saves the outputs of
    attention, so only `full` recomputes attention.
    """
    if checkpointing == "none":
        return set()
    is_kept = {"select"}
    if sizes.config.lighthouse.scorer != "norm":
        is_kept.add("score")
    if checkpointing == "op" and sizes.device_type == "cuda":
        is_kept |= {"attend", "ring merge"}
    return {name for name in steps if not name.endswith("backward")} - is_kept


def recomputed_weights(sizes: Sizes, checkpointing: str) -> int:
    """Number of elements in the weight matrices of a layer whose products are recomputed."""
    if checkpointing == "none":
        return 0
    if checkpointing == "full":
        return layer_weights(sizes)
    layer = sizes.model.layers["0"]
    # In the order of the forward pass every second one is kept.
    again = (layer.attention.wk, layer.attention.wo, layer.feed_forward.w3)
    return sum(linear.weight.numel() for linear in again)
