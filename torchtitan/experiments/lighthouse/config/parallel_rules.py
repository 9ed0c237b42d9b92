"""Rules for parallelism, for the batch size and for Lighthouse Attention.

The tables have the format of those in `rules.py`. A rule relies on the ones before it.
"""

from dataclasses import replace

from torchtitan.experiments.lighthouse.config.job_config import JobConfig
from torchtitan.experiments.lighthouse.config.model_args import divisors, model_args, model_name
from torchtitan.experiments.lighthouse.config.rule_helpers import (
    Rule,
    at_least,
    one_of,
    require,
    unset,
)

from lighthouse import LighthouseConfig
from lighthouse.config import SELECTED_PER_STRATUM, nearest_multiple
from lighthouse.context_parallel import CHUNKS_PER_RANK


def num_kv_heads(config: JobConfig) -> int:
    model = model_args(config)
    return model.n_kv_heads or model.n_heads


def num_layers(config: JobConfig) -> int:
    return model_args(config).n_layers


DEGREE_RULES = [
    *(
        Rule(
            f"parallelism.{name}",
            lambda x, _: x == 1,
            "1, since no flavor has experts",
            "remove it",
        )
        for name in ("expert_parallel_degree", "expert_tensor_parallel_degree")
    ),
    at_least("parallelism.context_parallel_degree", 1),
    Rule(
        "parallelism.pipeline_parallel_degree",
        lambda x, _: x == 1,
        "1, since the stage switch works on whole models",
        "use data, context or tensor parallelism",
    ),
    at_least("parallelism.tensor_parallel_degree", 1),
    Rule(
        "parallelism.tensor_parallel_degree",
        lambda x, config: num_kv_heads(config) % x == 0,
        lambda config: (
            f"a divisor of the {num_kv_heads(config)} key/value heads of {model_name(config)}"
        ),
        lambda _, config: f"use {divisors(num_kv_heads(config))}",
    ),
    Rule(
        "training.loss_chunk_size",
        lambda x, _: x == 0,
        "0 with tensor parallelism, which shards the head by vocabulary",
        "set it to 0, or parallelism.tensor_parallel_degree to 1",
        applies=lambda config, _: config.parallelism.tensor_parallel_degree > 1,
    ),
    at_least("parallelism.data_parallel_replicate_degree", 1),
]
"""Rules for each degree of parallelism alone."""


def process_rules(world_size: int) -> list[Rule]:
    """Rules that the degrees and the batch must satisfy for `world_size` processes."""

    def other_degrees(config: JobConfig) -> int:
        """Product of all degrees other than the data-parallel shard degree."""
        parallelism = config.parallelism
        return (
            parallelism.data_parallel_replicate_degree
            * parallelism.context_parallel_degree
            * parallelism.tensor_parallel_degree
        )

    def is_whole(shard: int, config: JobConfig) -> bool:
        others = other_degrees(config)
        return world_size % others == 0 and shard in (-1, world_size // others)

    def make_whole(shard: int, config: JobConfig) -> str:
        others = other_degrees(config)
        remedies = []
        if world_size % others == 0:
            remedies.append(f"set it to -1 or {world_size // others}")
        if shard >= 1:
            remedies.append(f"start {shard * others} processes")
        elif world_size % others:
            remedies.append(f"start a multiple of {others} processes")
        return ", or ".join(remedies)

    def is_sharded(config: JobConfig) -> bool:
        replicated = other_degrees(config) // config.parallelism.context_parallel_degree
        return world_size > replicated

    def sequences(config: JobConfig) -> int:
        """Number of sequences of one forward pass on all ranks."""
        parallelism = config.parallelism
        per_sequence = parallelism.context_parallel_degree * parallelism.tensor_parallel_degree
        return config.training.local_batch_size * (world_size // per_sequence)

    return [
        Rule(
            "parallelism.data_parallel_shard_degree",
            is_whole,
            lambda config: (
                f"the {world_size} processes divided by the other degrees, {other_degrees(config)}"
            ),
            make_whole,
        ),
        Rule(
            "parallelism.data_parallel_replicate_degree",
            lambda x, config: x == 1 or is_sharded(config),
            "1 with tensor parallelism unless parameters are sharded, too",
            f"set it to 1, or start more than {world_size} processes",
            applies=lambda config, _: config.parallelism.tensor_parallel_degree > 1,
        ),
        unset(
            "training.enable_cpu_offload",
            " where parameters are not sharded",
            "remove it, or start more processes",
            applies=lambda config, _: not is_sharded(config),
        ),
        Rule(
            "training.global_batch_size",
            lambda x, config: x == -1 or (x >= 1 and x % sequences(config) == 0),
            lambda config: (
                "a multiple of local_batch_size times the data parallel degree, "
                f"{sequences(config)}"
            ),
            lambda x, config: f"nearest: {nearest_multiple(x, sequences(config))}, or -1",
        ),
    ]


def shares_sequence(config: JobConfig, device_type: str) -> bool:
    return config.parallelism.context_parallel_degree > 1


def uses_ulysses(config: JobConfig, device_type: str) -> bool:
    scheme = config.lighthouse.context_parallel
    return shares_sequence(config, device_type) and scheme == "ulysses"


def rings_on_gpu(config: JobConfig, device_type: str) -> bool:
    scheme = config.lighthouse.context_parallel
    return shares_sequence(config, device_type) and scheme == "ring" and device_type != "cpu"


def rank_kv_heads(config: JobConfig) -> int:
    """Number of key/value heads per tensor-parallel rank."""
    return num_kv_heads(config) // config.parallelism.tensor_parallel_degree


LIGHTHOUSE_RULES = [
    at_least("lighthouse.telemetry_freq", 0),
    Rule(
        "lighthouse.stage1_steps",
        lambda x, config: -1 <= x <= config.training.steps,
        lambda config: f"from 0 to training.steps ({config.training.steps}), or -1 for no switch",
        "lower it or raise training.steps",
    ),
    Rule(
        "lighthouse.full_attn_layers",
        lambda x, config: -num_layers(config) <= x < num_layers(config),
        lambda config: (
            f"from {-num_layers(config)} to {num_layers(config) - 1} for the "
            f"{num_layers(config)} layers of {model_name(config)}"
        ),
        "remove it",
    ),
    one_of("lighthouse.context_parallel", list(CHUNKS_PER_RANK)),
    one_of("parallelism.context_parallel_rotate_method", ["allgather", "alltoall"]),
    Rule(
        "parallelism.context_parallel_load_balancer",
        lambda x, _: x == "headtail",
        "'headtail', since the layout follows from lighthouse.context_parallel",
        "leave it out",
    ),
    Rule(
        "lighthouse.telemetry_freq",
        lambda x, _: x == 0,
        "0 under context parallelism, where no rank has a whole sequence",
        "set it to 0, or parallelism.context_parallel_degree to 1",
        applies=shares_sequence,
    ),
    Rule(
        "lighthouse.scorer",
        lambda x, config: x == "norm" or config.lighthouse.stage1_steps == 0,
        "norm under context parallelism, where each rank scores its own tokens",
        "set it to norm, or parallelism.context_parallel_degree to 1",
        applies=shares_sequence,
    ),
    Rule(
        "parallelism.context_parallel_degree",
        lambda x, config: rank_kv_heads(config) % x == 0,
        lambda config: (
            f"a divisor of the key/value heads of a rank, {rank_kv_heads(config)}, with "
            "lighthouse.context_parallel = 'ulysses'"
        ),
        lambda _, config: f"use {divisors(rank_kv_heads(config))}, or 'ring'",
        applies=uses_ulysses,
    ),
    Rule(
        "training.mixed_precision_param",
        lambda x, _: x != "float32",
        "bfloat16 with lighthouse.context_parallel = 'ring', whose kernels take no other type on "
        "a GPU",
        "set it to bfloat16, or use 'ulysses'",
        applies=rings_on_gpu,
    ),
]
"""Rules for the stages, and for attention under context parallelism."""


def check_attention(config: JobConfig) -> None:
    """Check the fields of Lighthouse Attention against each other, the lengths and the degrees.

    The rules are in `lighthouse.config`. This function adds the name of the field to the error.

    Raises:
        ValueError: a rule is broken. Only the first one is reported.
    """
    lighthouse = config.lighthouse
    n_layers = num_layers(config)
    require(
        len({layer % n_layers for layer in lighthouse.full_attn_layers}) < n_layers
        or lighthouse.stage1_steps == 0,
        "lighthouse.full_attn_layers",
        f"fewer than all {n_layers} layers of {model_name(config)}: nothing would be trained with "
        "Lighthouse",
        lighthouse.full_attn_layers,
        "leave some out, or set lighthouse.stage1_steps to 0 for a dense run",
    )
    degree = config.parallelism.context_parallel_degree
    num_chunks = degree * CHUNKS_PER_RANK[lighthouse.context_parallel] if degree > 1 else 1
    # In training, torchtitan requires the factor of 2 for every scheme and degree.
    divisor = 2 * degree * config.parallelism.tensor_parallel_degree
    try:
        attention = lighthouse.attention_config()
    except ValueError as error:
        message = str(error)
        rule, is_near, nearest = message.partition("; nearest: ")
        if rule.startswith("topk") and is_near and lighthouse.stage1_steps != 0:
            # Suggest a topk that also fits the length.
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
    """The legal `topk` nearest to that of `attention`, and other changes that it requires."""
    seq_len = config.training.seq_len
    if topk := attention.nearest_topk(seq_len, num_chunks):
        return str(topk)
    step = SELECTED_PER_STRATUM * num_chunks
    topk = nearest_multiple(attention.topk, step)
    seq_len = replace(attention, topk=topk).nearest_seq_len(seq_len, num_chunks, divisor)
    other = f"seq_len {seq_len}" if seq_len else "fewer levels or a smaller factor"
    return f"{topk} with {other}"
