"""What a run will do and need, before it starts: counted, and timed by stated rates.

    run_shape.py  tokens, ranks, shards, kinds of layers
    memory.py    the most that a rank holds
    here         FLOPs, bytes between ranks, seconds, checkpoints; `plan` puts all together
    gpus.py      the rates

FLOPs are those of matrix products: six for each weight and token, four of them backward, and half
of the square of attention, two and a half times as many backward (`lighthouse/costs.py`). What
activation checkpointing computes again is counted apart. torchtitan logs MFU by another count
(`logged_flops_per_token`): the whole square of attention, and twice as many backward.

Seconds are bytes over bandwidth or FLOPs over a rate, part by part, one after another. Nothing of
them is measured. Assumed is that

- FSDP gathers and reduces behind the computation of a layer, and what is longer than that waits;
- a ring moves keys and values behind attention, and ulysses exchanges behind nothing;
- compiled, elementwise operations are a kernel between two matrix products or attention; the
  rotation, in complex numbers, is not compiled.

Not counted: data loading, logging, validation, checkpoints, compilation, and gaps between kernels.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace

from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.experiments.lighthouse.apply_lighthouse import flops_saved_per_token
from torchtitan.experiments.lighthouse.config.job_config import JobConfig
from torchtitan.experiments.lighthouse.planner.gpus import GPUS_PER_NODE, Gpu
from torchtitan.experiments.lighthouse.planner.memory import Memory, stage_memory
from torchtitan.experiments.lighthouse.planner.run_shape import Sizes

from lighthouse.config import SELECTED_PER_STRATUM
from lighthouse.costs import (
    Cost,
    dense_costs,
    edge_bytes,
    exchange_bytes,
    floor_seconds,
    layer_costs,
)

USABLE_SHARE = 0.9
"""Of a GPU's memory, for what `memory.py` counts. Assumption: the rest is for what it does not."""

_KINDS = {True: "Lighthouse", False: "dense"}


@dataclass(frozen=True)
class StagePlan:
    """The steps of one stage. Bytes, FLOPs and seconds."""

    steps: int

    flops_per_token: dict[str, float]
    """Of the model, forward and backward, by part: linear, attention, scoring, head, total."""

    recomputed_flops_per_token: float
    """Forward once more, by activation checkpointing."""

    logged_flops_per_token: float
    """As torchtitan counts for MFU."""

    flops_per_step: float
    """On all ranks, without what is recomputed."""

    traffic_per_layer: dict[str, dict[str, int]]
    """Bytes that a rank sends for a layer and micro-batch, by kind of layer and by purpose; where
    only some layers are checkpointed, for one of those."""

    traffic_per_step: dict[str, int]
    """Bytes that a rank sends in a step, by purpose."""

    memory: Memory

    seconds: dict[str, float] = field(default_factory=dict)
    """Of a step, by part; nothing where the rates are not known."""

    tokens_per_second: float | None = None
    """Of one GPU."""

    mfu: float | None = None
    """Share of the peak rate, by `logged_flops_per_token`."""

    gpu_hours: float | None = None
    """Of all steps of the stage."""


@dataclass(frozen=True)
class Plan:
    """A whole run; see `plan`."""

    run: dict[str, object]
    attention: dict[str, object]
    stages: dict[str, StagePlan]
    """By number, those with at least one step."""

    dense: StagePlan
    """All steps with dense attention: the alternative."""

    checkpoints: dict[str, object]
    gpu: Gpu | None

    @property
    def gpu_hours(self) -> float | None:
        """Of all stages."""
        if self.gpu is None:
            return None
        return sum(stage.gpu_hours for stage in self.stages.values())

    def to_json(self) -> dict[str, object]:
        """Plain numbers, strings, lists and dictionaries; bytes, FLOPs and seconds."""
        result = asdict(self)
        for stage, found in [(self.dense, result["dense"])] + [
            (self.stages[name], result["stages"][name]) for name in self.stages
        ]:
            memory = stage.memory
            found["memory"] |= {
                "peak": memory.peak,
                "peak_moment": memory.peak_moment,
                "parts": memory.parts,
            }
        result["note"] = "expected from stated rates, not measured"
        if self.gpu is not None:
            result["gpu_hours"] = self.gpu_hours
            result["speed_up"] = self.dense.gpu_hours / self.gpu_hours
        return result


def plan(config: JobConfig, world_size: int, gpu: Gpu | None) -> Plan:
    """Plan a run that `preflight.check_config` has passed.

    Args:
        gpu: what it is to run on; None for the CPU, whose rates are not known.

    Raises:
        ValueError: what a plan does not cover (`Sizes`).
    """
    sizes = Sizes(config, world_size, "cpu" if gpu is None else "cuda")
    return Plan(
        run=run_facts(sizes),
        attention=attention_facts(sizes),
        stages={str(stage): stage_plan(sizes, stage, gpu) for stage in sizes.stages},
        dense=stage_plan(sizes, 2, gpu, config.training.steps),
        checkpoints=checkpoint_facts(sizes),
        gpu=gpu,
    )


def run_facts(sizes: Sizes) -> dict[str, object]:
    """Model, tokens and ranks."""
    model, config = sizes.model_args, sizes.config
    return {
        "flavor": config.model.flavor,
        "parameters": sizes.parameters,
        "n_layers": model.n_layers,
        "dim": model.dim,
        "hidden_dim": sizes.hidden_dim,
        "n_heads": sizes.n_heads,
        "n_kv_heads": sizes.n_kv_heads,
        "vocab_size": model.vocab_size,
        "seq_len": sizes.seq_len,
        "world_size": sizes.world_size,
        "context_parallel": {"degree": sizes.degree, "scheme": sizes.scheme},
        "replicas": sizes.replicas,
        "shards": sizes.shards,
        "micro_batches": sizes.micro_batches,
        "sequences_per_step": sizes.tokens_per_step // sizes.seq_len,
        "tokens_per_step": sizes.tokens_per_step,
        "tokens_per_rank": sizes.rank_tokens,
        "steps": config.training.steps,
        "stage_steps": {str(stage): sizes.stage_steps(stage) for stage in (1, 2)},
        "tokens": sizes.tokens_per_step * config.training.steps,
        "activation_checkpoint": config.activation_checkpoint.mode
        + (
            f" {config.activation_checkpoint.selective_ac_option}"
            if config.activation_checkpoint.mode == "selective"
            else ""
        ),
        "compiled": [part for part in ("model", "loss") if sizes.is_compiled(part)],
        "loss_chunk_size": config.training.loss_chunk_size,
    }


def attention_facts(sizes: Sizes) -> dict[str, object]:
    """The sub-sequence and its strata; nothing for a run without Lighthouse."""
    if 1 not in sizes.stages:
        return {}
    config, seq_len = sizes.attention, sizes.seq_len
    coarsest = config.level_len(config.num_levels - 1, seq_len)
    below = SELECTED_PER_STRATUM * config.pooling_factor
    return {
        "num_levels": config.num_levels,
        "pooling_factor": config.pooling_factor,
        "topk": config.topk,
        "scorer": config.scorer,
        "pool_rotary": sizes.config.lighthouse.pool_rotary,
        "sub_seq_len": config.sub_seq_len(seq_len),
        "square": (config.sub_seq_len(seq_len) / seq_len) ** 2,
        "level_lens": [config.level_len(level, seq_len) for level in range(config.num_levels)],
        "strata": config.num_strata,
        "chunks": sizes.num_chunks,
        "strata_per_rank": config.num_strata // sizes.degree,
        "strata_per_chunk": config.num_strata // sizes.num_chunks,
        # From the finest level up.
        "candidates_per_stratum": [below] * (config.num_levels - 1)
        + [coarsest // config.num_strata],
        "is_aligned_to_128": config.sub_seq_len(seq_len) % 128 == 0,
        "dense_layers": sorted(sizes.dense_layers),
    }


def stage_plan(sizes: Sizes, stage: int, gpu: Gpu | None, steps: int | None = None) -> StagePlan:
    """The steps of `stage`; `steps` of them in the place of its own number."""
    flops = flops_per_token(sizes, stage)
    kinds, checkpointing = map(set, zip(*_layers(sizes, stage), strict=True))
    checkpointing = max(checkpointing, key=["none", "op", "full"].index)
    result = StagePlan(
        steps=sizes.stage_steps(stage) if steps is None else steps,
        flops_per_token=flops,
        recomputed_flops_per_token=recomputed_flops_per_token(sizes, stage),
        logged_flops_per_token=logged_flops_per_token(sizes, stage),
        flops_per_step=flops["total"] * sizes.tokens_per_step,
        traffic_per_layer={
            _KINDS[kind]: layer_traffic(sizes, kind, checkpointing)
            for kind in sorted(kinds, reverse=True)
        },
        traffic_per_step=step_traffic(sizes, stage),
        memory=stage_memory(sizes, stage),
    )
    if gpu is None:
        return result
    seconds = step_seconds(sizes, stage, gpu)
    step = sum(seconds.values())
    rate = sizes.tokens_per_step / step / sizes.world_size
    return replace(
        result,
        seconds=seconds,
        tokens_per_second=rate,
        mfu=rate * result.logged_flops_per_token / gpu.peak_flops,
        gpu_hours=result.steps * step * sizes.world_size / 3600,
    )


# FLOPs.


def flops_per_token(sizes: Sizes, stage: int) -> dict[str, float]:
    """FLOPs per token of a forward and a backward pass, by part; scoring has no backward."""
    args, layers = sizes.model_args, _layers(sizes, stage)
    parts = {"linear": 6 * len(layers) * _layer_weights(sizes), "attention": 0.0, "scoring": 0.0}
    for is_lighthouse, _ in layers:
        for name, cost in attention_costs(sizes, is_lighthouse).items():
            part = "scoring" if name == "score" else "attention"
            parts[part] += cost.flops / sizes.batch / sizes.seq_len
    parts["head"] = 6 * args.vocab_size * args.dim
    return parts | {"total": sum(parts.values())}


def recomputed_flops_per_token(sizes: Sizes, stage: int) -> float:
    """FLOPs per token of what activation checkpointing computes once more."""
    total = 0.0
    for is_lighthouse, checkpointing in _layers(sizes, stage):
        total += 2 * _recomputed_weights(sizes, checkpointing)
        costs = attention_costs(sizes, is_lighthouse)
        again = _recomputed_steps(sizes, costs, checkpointing)
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


def _layers(sizes: Sizes, stage: int) -> list[tuple[bool, str]]:
    """Of each layer whether it has Lighthouse Attention, and how it is checkpointed."""
    return [
        (sizes.is_lighthouse(stage, layer), sizes.checkpointing(layer))
        for layer in range(sizes.model_args.n_layers)
    ]


def _layer_weights(sizes: Sizes) -> int:
    """Elements of the matrices of a layer."""
    return sum(p.numel() for p in sizes.model.layers["0"].parameters() if p.dim() == 2)


def _recomputed_steps(sizes: Sizes, steps: Iterable[str], checkpointing: str) -> set[str]:
    """Of the steps of attention those that are computed again: never the selection nor scores that
    are dear, and on a GPU, where `op` keeps the outputs of attention, only `full` attends again."""
    if checkpointing == "none":
        return set()
    is_kept = {"select"}
    if sizes.config.lighthouse.scorer != "norm":
        is_kept.add("score")
    if checkpointing == "op" and sizes.device_type == "cuda":
        is_kept |= {"attend", "ring merge"}
    return {name for name in steps if not name.endswith("backward")} - is_kept


def _recomputed_weights(sizes: Sizes, checkpointing: str) -> int:
    """Elements of the matrices of a layer whose products are computed again."""
    if checkpointing == "none":
        return 0
    if checkpointing == "full":
        return _layer_weights(sizes)
    layer = sizes.model.layers["0"]
    # In the order of the forward pass every second one is kept.
    again = (layer.attention.wk, layer.attention.wo, layer.feed_forward.w3)
    return sum(linear.weight.numel() for linear in again)


# Bytes between ranks.


def layer_traffic(sizes: Sizes, is_lighthouse: bool, checkpointing: str) -> dict[str, int]:
    """Bytes that a rank sends for one layer and micro-batch, by purpose.

        gather               parameters, in the compute dtype, forward
        gather backward      once more, unless they stay
        reduce               gradients, in the dtype of the reduction
        all-reduce           of shards of gradients between replicas
        exchange             for attention over sequences that ranks share: `lighthouse/costs.py`
        exchange recomputed  once more, by activation checkpointing
        exchange backward
        edges                and the like, for scatter-back to reach across chunks

    Tensor parallelism is not covered.
    """
    traffic = _fsdp_traffic(sizes, sizes.parameters["layer"], is_resharded=_is_resharded(sizes))
    if sizes.scheme is None:
        return traffic
    shape = sizes.attention_shape(sizes.attended_len(is_lighthouse))
    exchanged = exchange_bytes(shape, sizes.degree, sizes.scheme)
    if is_lighthouse:
        exchanged |= edge_bytes(shape, sizes.attention, sizes.degree, sizes.scheme)
    for name, size in exchanged.items():
        traffic[name] = size
        # The outputs of an all-to-all are kept by `op`; those of the ring on a GPU only.
        is_kept = name == "edges" or sizes.scheme == "ulysses" or sizes.device_type == "cuda"
        is_again = checkpointing == "full" or (checkpointing == "op" and not is_kept)
        if is_again and not name.endswith("backward"):
            traffic[f"{name} recomputed"] = size
    return traffic


def step_traffic(sizes: Sizes, stage: int) -> dict[str, int]:
    """Bytes that a rank sends in a step, by purpose, sums of a few numbers left out."""
    policy = sizes.config.parallelism.fsdp_reshard_after_forward
    parts = [layer_traffic(sizes, *layer) for layer in _layers(sizes, stage)]
    parameters = sizes.parameters
    parts.append(_fsdp_traffic(sizes, parameters["embedding"], _is_resharded(sizes)))
    parts.append(_fsdp_traffic(sizes, parameters["head"], is_resharded=policy == "always"))
    if sizes.shards == 1 and sizes.replicas > 1:
        parts.append({"all-reduce": _all_reduce(sizes, parameters["total"] * sizes.param_bytes)})
    total = {}
    for part in parts:
        for name, size in part.items():
            total[name] = total.get(name, 0) + size * sizes.micro_batches
    return total


def _is_resharded(sizes: Sizes) -> bool:
    """Whether a layer's parameters are given up after its forward pass."""
    return sizes.config.parallelism.fsdp_reshard_after_forward != "never"


def _fsdp_traffic(sizes: Sizes, parameters: int, is_resharded: bool) -> dict[str, int]:
    """Bytes that a rank sends for a group of `parameters` and a micro-batch."""
    if sizes.shards == 1:
        return {}
    others = parameters * (sizes.shards - 1) // sizes.shards
    traffic = {"gather": others * sizes.compute_bytes}
    if is_resharded:
        traffic["gather backward"] = others * sizes.compute_bytes
    traffic["reduce"] = others * sizes.reduce_bytes
    if sizes.replicas > 1:
        shard = parameters // sizes.shards * sizes.reduce_bytes
        traffic["all-reduce"] = _all_reduce(sizes, shard)
    return traffic


def _all_reduce(sizes: Sizes, size: int) -> int:
    """Bytes that a rank sends for the sum of `size` bytes over the replicas: in a ring."""
    return 2 * size * (sizes.replicas - 1) // sizes.replicas


# Seconds.


def step_seconds(sizes: Sizes, stage: int, gpu: Gpu) -> dict[str, float]:
    """Expected seconds of a step, by part."""
    total = {}
    # Those with Lighthouse first, which have all parts.
    for is_lighthouse, checkpointing in sorted(_layers(sizes, stage), reverse=True):
        parts = layer_seconds(sizes, is_lighthouse, checkpointing, gpu)
        for name, size in parts.items():
            total[name] = total.get(name, 0.0) + size * sizes.micro_batches
    exposed = total.pop("exposed communication")
    total["head and loss"] = loss_seconds(sizes, gpu) * sizes.micro_batches
    total["optimizer"] = optimizer_seconds(sizes, gpu)
    # The first gather and the last reduction have nothing to hide behind.
    ends = _fsdp_traffic(sizes, sizes.parameters["embedding"], _is_resharded(sizes))
    ends = _fsdp_seconds(sizes, ends, gpu)
    for name in ("gather", "reduce", "all-reduce"):
        exposed += ends.get(name, 0.0) * sizes.micro_batches
    total["exposed communication"] = exposed
    return total


def layer_seconds(
    sizes: Sizes, is_lighthouse: bool, checkpointing: str, gpu: Gpu
) -> dict[str, float]:
    """Expected seconds of a layer and micro-batch, forward and backward, by part.

    The steps of attention are those of `lighthouse/costs.py`; of their bytes and FLOPs a rank has
    the W-th part. What is computed again counts where it belongs.
    """
    weights, tokens = _layer_weights(sizes), sizes.rank_tokens
    product = 2 * tokens / gpu.matmul_flops
    elementwise = [size / gpu.bandwidth for size in elementwise_bytes(sizes)]
    steps = attention_seconds(sizes, is_lighthouse, gpu)
    forward = {name for name in steps if not name.endswith("backward")}
    again = _recomputed_steps(sizes, steps, checkpointing)
    is_again = checkpointing != "none"

    compute = {
        "linear": product * (3 * weights + _recomputed_weights(sizes, checkpointing)),
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
    """The least seconds of each step of attention on a rank, by name, in order."""
    seconds = {}
    for name, cost in attention_costs(sizes, is_lighthouse).items():
        is_backward = name.endswith("backward")
        rate = gpu.attention_backward_flops if is_backward else gpu.attention_flops
        seconds |= floor_seconds({name: cost}, gpu.bandwidth, rate)
    seconds = {name: size / sizes.degree for name, size in seconds.items()}
    if sizes.scheme == "ring":
        # Each block's output is cast to fp32 (6 bytes an element) and merged (32), not compiled.
        rows = sizes.batch * sizes.attended_len(is_lighthouse) // sizes.degree
        merged = sizes.degree * rows * sizes.n_heads * sizes.head_dim * 38
        seconds["ring merge"] = merged / gpu.bandwidth
    return seconds


def elementwise_bytes(sizes: Sizes) -> tuple[int, int]:
    """Bytes that norms, residuals, rotation and SwiGLU move in a layer, forward and backward.

    Compiled, in elements a token, read and written:

        forward     norm 2 dim, residual and norm 4 dim, SwiGLU 3 hidden, residual 4 dim
        backward    SwiGLU 6 hidden (its product once more), norm and residual 6 dim twice
        rotation    10 for each of q and k, both ways: cast to fp32, multiply, cast back, where an
                    fp32 element counts two; 4 where all is fp32

    Not compiled, silu, its product and the norm of a CPU make intermediate results beside; they
    are counted as half as much again.
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

    Three products, and bytes for each logit: compiled it is read, read again and replaced by its
    gradient. Not compiled, cast, log-softmax and two gradients in fp32; in chunks seven passes.
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

    Clipping reads the gradients twice and writes them; Adam reads parameters, gradients and both
    moments and writes all but the gradients, in one kernel if `fused`, else in eight passes that
    move 20 elements a parameter.
    """
    moved = 7 if sizes.config.optimizer.implementation == "fused" else 20
    shard = sizes.parameters["total"] / sizes.shards * sizes.param_bytes
    return (moved + 3) * shard / gpu.bandwidth


def _fsdp_seconds(sizes: Sizes, traffic: dict[str, int], gpu: Gpu) -> dict[str, float]:
    """Seconds of the part of `traffic` that FSDP makes, by purpose."""
    # A ring over nodes goes through the links of all GPUs of a node.
    within = min(gpu.nvlink, GPUS_PER_NODE * gpu.network)
    rate = gpu.nvlink if sizes.shards <= GPUS_PER_NODE else within
    rates = {"gather": rate, "gather backward": rate, "reduce": rate}
    rates["all-reduce"] = gpu.nvlink if sizes.world_size <= GPUS_PER_NODE else gpu.network
    return {name: traffic[name] / rates[name] for name in rates if name in traffic}


def _exchange_seconds(
    sizes: Sizes, traffic: dict[str, int], steps: dict[str, float], gpu: Gpu
) -> float:
    """Seconds of a layer that wait for what ranks that share a sequence exchange."""
    rate = gpu.nvlink if sizes.degree <= GPUS_PER_NODE else gpu.network
    seconds = {
        name: size / rate for name, size in traffic.items() if name.startswith(("exch", "edges"))
    }
    if sizes.scheme != "ring":
        return sum(seconds.values())
    is_gathered = sizes.config.parallelism.context_parallel_rotate_method == "allgather"
    degree, exposed = sizes.degree, 0.0
    for name, size in seconds.items():
        if not name.startswith("exchange"):
            exposed += size
            continue
        is_backward = name.endswith("backward")
        block = steps["attend backward" if is_backward else "attend"] / degree
        rotated = seconds["exchange"]
        if is_gathered:
            exposed += max(0.0, rotated - block)
        else:
            exposed += max(0.0, rotated - (degree - 1) * block)
        if is_backward:
            # Gradients of k and v follow each block; the last has none to hide behind.
            sums = size - rotated
            exposed += sums / degree + max(0.0, (degree - 1) * (sums / degree - block))
    return exposed


# Checkpoints.


def checkpoint_facts(sizes: Sizes) -> dict[str, object]:
    """Steps at which a checkpoint is saved, bytes of each, and the most on the disk at a time.

    One holds the parameters and their two moments. The old ones are removed when the next is
    saved; that of the stage switch stays.
    """
    checkpoint, steps = sizes.config.checkpoint, sizes.config.training.steps
    if not checkpoint.enable:
        return {"steps": [], "bytes": 0, "last_bytes": 0, "most_on_disk": 0, "left": 0}
    stage1_steps = sizes.config.lighthouse.stage1_steps
    switch = stage1_steps if 0 < stage1_steps < steps else None
    saved = {*range(checkpoint.interval, steps + 1, checkpoint.interval), steps}
    saved |= {switch} - {None}
    saved |= {1} if checkpoint.enable_first_step_checkpoint else set()
    parameters = sizes.parameters["total"]
    full = 3 * parameters * sizes.param_bytes
    last = full
    if checkpoint.last_save_model_only:
        last = parameters * TORCH_DTYPE_MAP[checkpoint.export_dtype].itemsize
    on_disk, most = [], 0

    def size(kept: list[int]) -> int:
        return sum(last if step == steps else full for step in kept)

    for step in sorted(saved):
        whole = list(on_disk)
        on_disk.append(step)
        most = max(most, size(on_disk))
        if checkpoint.async_mode == "disabled":
            whole.append(step)
        if checkpoint.keep_latest_k:
            kept = {*whole[-checkpoint.keep_latest_k :], switch, step}
            on_disk = [old for old in on_disk if old in kept]
    return {
        "steps": sorted(saved),
        "bytes": full,
        "last_bytes": last,
        "most_on_disk": most,
        "left": size(on_disk),
    }
