"""The model of a run: its flavor and the sizes of [model.override].

`preflight.check_config` fills [model.override] from `model.hf_config`.
"""

from dataclasses import asdict, replace
from pathlib import Path

from torchtitan.experiments.lighthouse.config.job_config import JobConfig, Sizes
from torchtitan.experiments.lighthouse.config.rule_helpers import Rule, at_least, require, value_of
from torchtitan.experiments.lighthouse.flavors import FLAVORS, sizes_of, with_sizes
from torchtitan.models.llama3 import TransformerModelArgs


def model_args(config: JobConfig) -> TransformerModelArgs:
    """Arguments of the model of the run, for sequences of `training.seq_len`."""
    args = with_sizes(FLAVORS[config.model.flavor], asdict(config.model.override))
    return replace(args, max_seq_len=config.training.seq_len)


def model_name(config: JobConfig) -> str:
    """A short name of the model for messages."""
    if config.model.hf_config is not None:
        return str(Path(config.model.hf_config))
    is_changed = config.model.override != Sizes()
    return f"{config.model.flavor}{' with [model.override]' if is_changed else ''}"


def check_sizes(config: JobConfig) -> None:
    """Check each size that the run sets, and whether the sizes fit each other.

    Raises:
        ValueError: a size is too small, or sizes do not fit each other.
    """
    for rule in SIZE_RULES:
        if value_of(config, rule.field) is not None:
            rule.check(config, "")
    sizes = sizes_of(model_args(config))
    dim, n_heads, n_kv_heads = (sizes[name] for name in ("dim", "n_heads", "n_kv_heads"))
    require(
        dim % n_heads == 0,
        "model.override.n_heads",
        f"a divisor of dim, {dim}",
        n_heads,
        "change one of them",
    )
    require(
        dim // n_heads % 2 == 0,
        "model.override.dim",
        f"an even multiple of n_heads, {n_heads}, since rotary embeddings take pairs of elements",
        dim,
        f"use {2 * n_heads * max(1, dim // (2 * n_heads))}",
    )
    require(
        n_heads % n_kv_heads == 0,
        "model.override.n_kv_heads",
        f"a divisor of n_heads, {n_heads}",
        n_kv_heads,
        f"use {divisors(n_heads)}",
    )
    low, high = sizes["rope_low_freq_factor"], sizes["rope_high_freq_factor"]
    require(
        low < high,
        "model.override.rope_low_freq_factor",
        f"less than rope_high_freq_factor, {high}",
        low,
        "Llama 3.1 has 1 and 4",
    )


def divisors(number: int) -> str:
    return " or ".join(str(n) for n in range(1, number + 1) if number % n == 0)


SIZE_RULES = [
    *(
        at_least(f"model.override.{name}", 1)
        for name in (
            *("dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim", "vocab_size"),
            *("rope_scaling_factor", "rope_original_seq_len"),
        )
    ),
    *(
        Rule(
            f"model.override.{name}",
            lambda x, _: 0 < x < float("inf"),
            "a finite number above 0",
            f"{common} is common",
        )
        for name, common in (
            *(("norm_eps", "1e-5"), ("rope_theta", "10000 to 500000")),
            *(("rope_low_freq_factor", "1"), ("rope_high_freq_factor", "4")),
        )
    ),
]
"""Rules for each size that is set."""
