"""Rules of how a sequence and a batch are shared by ranks, and of Lighthouse Attention itself."""

from dataclasses import replace

from torchtitan.experiments.lighthouse.config.job_config import JobConfig
from torchtitan.experiments.lighthouse.config.rule_helpers import (
    check_at_least,
    check_choice,
    require,
)
from torchtitan.experiments.lighthouse.flavors import FLAVORS

from lighthouse import LighthouseConfig
from lighthouse.config import SELECTED_PER_STRATUM, nearest_multiple
from lighthouse.context_parallel import CHUNKS_PER_RANK


def check_parallelism(config: JobConfig, world_size: int) -> None:
    parallelism = config.parallelism
    check_at_least("the number of processes", world_size, 1)
    for name in ("expert_parallel_degree", "expert_tensor_parallel_degree"):
        degree = getattr(parallelism, name)
        require(
            degree == 1,
            f"parallelism.{name}",
            "1, since no flavor has experts",
            degree,
            "remove it",
        )
    check_at_least("parallelism.context_parallel_degree", parallelism.context_parallel_degree, 1)
    if parallelism.pipeline_parallel_degree != 1:
        raise ValueError(
            "parallelism.pipeline_parallel_degree must be 1, since the stage switch works on whole "
            f"models, got {parallelism.pipeline_parallel_degree}; use data, context or tensor "
            "parallelism"
        )
    tensor_parallel = parallelism.tensor_parallel_degree
    check_at_least("parallelism.tensor_parallel_degree", tensor_parallel, 1)
    n_kv_heads = num_kv_heads(config)
    if n_kv_heads % tensor_parallel:
        raise ValueError(
            f"parallelism.tensor_parallel_degree must divide the {n_kv_heads} key/value heads of "
            f"{config.model.flavor}, got {tensor_parallel}; use {_divisors(n_kv_heads)}"
        )
    loss_chunk_size = config.training.loss_chunk_size
    if loss_chunk_size and tensor_parallel > 1:
        raise ValueError(
            "training.loss_chunk_size must be 0 with tensor parallelism, which shards the head by "
            f"vocabulary, got {loss_chunk_size}; set it to 0, or "
            "parallelism.tensor_parallel_degree to 1"
        )
    replicate = parallelism.data_parallel_replicate_degree
    check_at_least("parallelism.data_parallel_replicate_degree", replicate, 1)
    others = replicate * parallelism.context_parallel_degree * tensor_parallel
    shard = parallelism.data_parallel_shard_degree
    if world_size % others or shard not in (-1, world_size // others):
        remedies = []
        if world_size % others == 0:
            remedies.append(f"set it to -1 or {world_size // others}")
        if shard >= 1:
            remedies.append(f"start {shard * others} processes")
        elif world_size % others:
            remedies.append(f"start a multiple of {others} processes")
        raise ValueError(
            "parallelism.data_parallel_shard_degree times the other degrees must be the number of "
            f"processes, got {shard} times {others} for {world_size}; {', or '.join(remedies)}"
        )
    num_shards = world_size // others * parallelism.context_parallel_degree
    require(
        replicate == 1 or num_shards > 1 or tensor_parallel == 1,
        "parallelism.data_parallel_replicate_degree",
        "1 with tensor parallelism unless parameters are sharded, too",
        replicate,
        f"set it to 1, or start more than {world_size} processes",
    )
    require(
        num_shards > 1 or not config.training.enable_cpu_offload,
        "training.enable_cpu_offload",
        "false where parameters are not sharded",
        "true",
        "remove it, or start more processes",
    )
    per_step = config.training.local_batch_size * replicate * (world_size // others)
    global_batch = config.training.global_batch_size
    if global_batch != -1 and (global_batch < 1 or global_batch % per_step):
        nearest = nearest_multiple(global_batch, per_step)
        raise ValueError(
            "training.global_batch_size must be a multiple of local_batch_size times the data "
            f"parallel degree, {per_step}, got {global_batch}; nearest: {nearest}, or -1"
        )


def check_lighthouse(config: JobConfig) -> None:
    lighthouse, steps = config.lighthouse, config.training.steps
    check_at_least("lighthouse.telemetry_freq", lighthouse.telemetry_freq, 0)
    if not -1 <= lighthouse.stage1_steps <= steps:
        raise ValueError(
            f"lighthouse.stage1_steps must be from 0 to training.steps ({steps}), or -1 for no "
            f"switch, got {lighthouse.stage1_steps}; lower it or raise training.steps"
        )
    n_layers = FLAVORS[config.model.flavor].n_layers
    for layer in lighthouse.full_attn_layers:
        if not -n_layers <= layer < n_layers:
            raise ValueError(
                f"lighthouse.full_attn_layers must be from {-n_layers} to {n_layers - 1} for the "
                f"{n_layers} layers of {config.model.flavor}, got {layer}; remove it"
            )
    dense_layers = {layer % n_layers for layer in lighthouse.full_attn_layers}
    require(
        len(dense_layers) < n_layers or lighthouse.stage1_steps == 0,
        "lighthouse.full_attn_layers",
        f"fewer than all {n_layers} layers of {config.model.flavor}: nothing would be trained with "
        "Lighthouse",
        lighthouse.full_attn_layers,
        "leave some out, or set lighthouse.stage1_steps to 0 for a dense run",
    )
    degree = config.parallelism.context_parallel_degree
    num_chunks = degree * CHUNKS_PER_RANK[lighthouse.context_parallel] if degree > 1 else 1
    # torchtitan asks for the factor of two, in training, whatever the scheme and the degrees.
    divisor = 2 * degree * config.parallelism.tensor_parallel_degree
    try:
        attention = lighthouse.attention_config()
    except ValueError as error:
        message = str(error)
        rule, is_near, nearest = message.partition("; nearest: ")
        if rule.startswith("topk") and is_near and lighthouse.stage1_steps != 0:
            # One that fits the length, too.
            other = LighthouseConfig(lighthouse.num_levels, lighthouse.pooling_factor, int(nearest))
            message = f"{rule}; nearest: {_fitting(other, config, num_chunks, divisor)}"
        raise ValueError(f"lighthouse.{message}") from None
    for section in ["training"] + ["validation"] * config.validation.enable:
        seq_len = getattr(config, section).seq_len
        is_cut = divisor > 2 or (section == "training" and lighthouse.stage1_steps == 0)
        if is_cut and seq_len % divisor:
            nearest = None
            if lighthouse.stage1_steps != 0:
                nearest = attention.nearest_seq_len(seq_len, num_chunks, divisor)
            raise ValueError(
                f"{section}.seq_len must be a multiple of twice the context and tensor parallel "
                f"degrees, {divisor}, got {seq_len}; nearest: "
                f"{nearest or nearest_multiple(seq_len, divisor)}"
            )
        if lighthouse.stage1_steps == 0:
            continue
        try:
            attention.check_seq_len(seq_len, num_chunks, divisor)
        except ValueError as error:
            owner = section if str(error).startswith("seq_len") else "lighthouse"
            raise ValueError(f"{owner}.{error}") from None


def _fitting(attention: LighthouseConfig, config: JobConfig, num_chunks: int, divisor: int) -> str:
    """The `topk` nearest to that of `attention` with what else it needs to be legal."""
    seq_len = config.training.seq_len
    if topk := attention.nearest_topk(seq_len, num_chunks):
        return str(topk)
    step = SELECTED_PER_STRATUM * num_chunks
    topk = nearest_multiple(attention.topk, step)
    seq_len = replace(attention, topk=topk).nearest_seq_len(seq_len, num_chunks, divisor)
    other = f"seq_len {seq_len}" if seq_len else "fewer levels or a smaller factor"
    return f"{topk} with {other}"


def check_context_parallel(config: JobConfig, device_type: str) -> None:
    parallelism, lighthouse = config.parallelism, config.lighthouse
    degree, scheme = parallelism.context_parallel_degree, lighthouse.context_parallel
    check_choice("lighthouse.context_parallel", scheme, list(CHUNKS_PER_RANK))
    check_choice(
        "parallelism.context_parallel_rotate_method",
        parallelism.context_parallel_rotate_method,
        ["allgather", "alltoall"],
    )
    if parallelism.context_parallel_load_balancer != "headtail":
        raise ValueError(
            "parallelism.context_parallel_load_balancer must be 'headtail', since the layout "
            "follows from lighthouse.context_parallel, got "
            f"{parallelism.context_parallel_load_balancer!r}; leave it out"
        )
    if degree == 1:
        return
    if lighthouse.telemetry_freq:
        raise ValueError(
            "lighthouse.telemetry_freq must be 0 under context parallelism, where no rank has a "
            f"whole sequence, got {lighthouse.telemetry_freq}; set it to 0, or "
            "parallelism.context_parallel_degree to 1"
        )
    if lighthouse.scorer != "norm" and lighthouse.stage1_steps != 0:
        raise ValueError(
            "lighthouse.scorer must be norm under context parallelism, where each rank scores its "
            f"own tokens, got {lighthouse.scorer!r}; set it to norm, or "
            "parallelism.context_parallel_degree to 1"
        )
    if scheme == "ulysses":
        n_kv_heads = num_kv_heads(config) // parallelism.tensor_parallel_degree
        if n_kv_heads % degree:
            raise ValueError(
                "parallelism.context_parallel_degree must divide the key/value heads of a rank, "
                f"{n_kv_heads}, with lighthouse.context_parallel = 'ulysses', got {degree}; use "
                f"{_divisors(n_kv_heads)}, or 'ring'"
            )
    elif device_type != "cpu" and config.training.mixed_precision_param == "float32":
        raise ValueError(
            "training.mixed_precision_param must be bfloat16 with lighthouse.context_parallel = "
            "'ring', whose kernels take no other type on a GPU, got 'float32'; set it to bfloat16, "
            "or use 'ulysses'"
        )


def num_kv_heads(config: JobConfig) -> int:
    model = FLAVORS[config.model.flavor]
    return model.n_kv_heads or model.n_heads


def _divisors(number: int) -> str:
    return " or ".join(str(n) for n in range(1, number + 1) if number % n == 0)
