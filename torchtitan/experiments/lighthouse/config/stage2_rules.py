"""Rules for stage 2 on pieces of sequences. Other fields they use must be checked before."""

import math

from torchtitan.experiments.lighthouse.config.job_config import JobConfig
from torchtitan.experiments.lighthouse.config.rule_helpers import Rule


def has_whole_pieces(length: int, config: JobConfig) -> bool:
    """Whether a batch can be cut into pieces of `length` tokens, the same number on each rank."""
    training, parallelism = config.training, config.parallelism
    if length in (0, training.seq_len):
        return True
    if length < 0 or training.seq_len % length or length % parallelism.tensor_parallel_degree:
        return False
    num_pieces = training.local_batch_size * training.seq_len // length
    return num_pieces % parallelism.context_parallel_degree == 0


def nearest_lengths(length: int, config: JobConfig) -> str:
    """The nearest legal piece lengths below and above an illegal one."""
    seq_len = config.training.seq_len
    # Divisors come in pairs. The bound limits the search for unrealistically long sequences.
    small = [n for n in range(1, min(math.isqrt(seq_len), 2**20) + 1) if seq_len % n == 0]
    legal = {n for d in small for n in (d, seq_len // d) if has_whole_pieces(n, config)}
    below = max((n for n in legal if n < length), default=None)
    above = min((n for n in legal if n > length), default=None)
    return " or ".join(str(n) for n in (below, above) if n is not None)


def rule_of_pieces(config: JobConfig) -> str:
    rule = f"0 or a divisor of training.seq_len, {config.training.seq_len}"
    tensor_parallel = config.parallelism.tensor_parallel_degree
    if tensor_parallel > 1:
        rule += f", and a multiple of the tensor-parallel degree, {tensor_parallel}"
    if (degree := config.parallelism.context_parallel_degree) > 1:
        batch_size = config.training.local_batch_size
        rule += (
            f", that cuts a batch of {batch_size} into whole pieces for {degree} context-parallel "
            "ranks, the same number each"
        )
    return rule


def stage2_steps(config: JobConfig) -> int:
    stage1_steps = config.lighthouse.stage1_steps
    return 0 if stage1_steps == -1 else config.training.steps - stage1_steps


STAGE2_RULES = [
    Rule(
        "lighthouse.stage2_seq_len",
        has_whole_pieces,
        rule_of_pieces,
        lambda x, config: f"nearest: {nearest_lengths(x, config)}",
    ),
    Rule(
        "lighthouse.stage2_full_steps",
        lambda x, config: x == 0 or config.has_pieces,
        lambda config: (
            "0 unless lighthouse.stage2_seq_len is a part of training.seq_len, "
            f"{config.training.seq_len}"
        ),
        "set it to 0, or set lighthouse.stage2_seq_len",
    ),
    Rule(
        "lighthouse.stage2_full_steps",
        lambda x, config: 0 <= x <= stage2_steps(config),
        lambda config: f"from 0 to the steps of stage 2, {stage2_steps(config)}",
        lambda x, config: f"use {max(0, min(x, stage2_steps(config)))}",
    ),
]
