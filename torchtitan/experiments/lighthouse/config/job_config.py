"""The configuration of a run: torchtitan's sections, our defaults, and [lighthouse].

A TOML file sets fields. The command line overrides them, as in `--lighthouse.topk 512`.
"""

from dataclasses import dataclass, field
from typing import Literal, get_args

from torchtitan.config import job_config as titan
from torchtitan.experiments.lighthouse.data.byte_tokenizer import BYTE_TOKENIZER_PATH

from lighthouse import LighthouseConfig

SAVED_CONFIG = "config.json"
"""File in the dump folder that holds the configuration of the run."""


PoolRotary = Literal["averaged", "aligned"]
POOL_ROTARY = get_args(PoolRotary)
"""Ways to pool q and k with rotary embeddings."""

POOL_ROTARY_BEFORE = "averaged"
"""`lighthouse.pool_rotary` of checkpoints and configurations that were saved without the field."""


LIGHTHOUSE, PIECES, FULL = "lighthouse", "pieces", "full"
"""Phases of training, in order: stage 1, stage 2 on pieces, stage 2 on whole sequences."""


@dataclass
class Lighthouse:
    """Lighthouse Attention and the two stages."""

    num_levels: int = 3
    """Levels of the pyramid, at least 2."""

    pooling_factor: int = 4
    """Children per entry, a power of two."""

    topk: int = 1536
    """Entries selected per level, a multiple of 128."""

    scorer: str = "norm"
    """How entries are scored: norm, dilated or gla."""

    dilation: int = 4
    """Stride of the dilated scorer, in tokens."""

    pool_rotary: PoolRotary = "averaged"
    """Rotary phases of pooled entries. averaged: q and k are rotated by their own positions and
    then averaged, as in the paper's code. aligned: q and k are rotated to the last position of
    their span and then averaged, as the paper's authors proposed later."""

    full_attn_layers: list[int] = field(default_factory=list)
    """Layers that use dense attention in stage 1. Negative indices count from the last layer."""

    stage1_steps: int = -1
    """Steps trained with Lighthouse Attention before the switch to dense attention.
    0: dense from the start. -1: never switch."""

    stage2_seq_len: int = 0
    """Sequence length n of stage 2 in tokens, a divisor of training.seq_len. Each batch [B, N] is
    cut into pieces, [B * N / n, n]. Positions start at 0 in each piece. Under context parallelism
    each rank holds whole pieces. 0: training.seq_len."""

    stage2_full_steps: int = 0
    """Number of steps at the end of stage 2 that train at training.seq_len again. 0: none.
    Requires stage2_seq_len."""

    sdpa_backend: Literal["cudnn", "flash"] = "cudnn"
    """Attention kernel on a GPU, in both stages. Inputs that it does not support use the other
    one."""

    context_parallel: Literal["ulysses", "ring"] = "ulysses"
    """Context parallelism of attention, in both stages. It applies where
    parallelism.context_parallel_degree is more than 1. ulysses: contiguous shards, one all-to-all
    from sequence to heads and one back. ring: each shard is a head chunk and a tail chunk, and
    parallelism.context_parallel_rotate_method says how keys and values are exchanged. Use ring for
    degrees that do not divide the key/value heads."""

    telemetry_freq: int = 0
    """Steps of stage 1 between measurements of the selection, telemetry/... in the metrics.
    0: none. Not available under context parallelism."""

    def attention_config(self) -> LighthouseConfig:
        """The fields of the attention operator. Raises ValueError for an illegal value."""
        return LighthouseConfig(
            num_levels=self.num_levels,
            pooling_factor=self.pooling_factor,
            topk=self.topk,
            scorer=self.scorer,
            dilation=self.dilation,
        )

    def stage_of(self, step: int) -> int:
        """The stage, 1 or 2, that trains `step`. Steps count from 1."""
        return 1 if self.stage1_steps == -1 or step <= self.stage1_steps else 2


@dataclass
class Job(titan.Job):
    save_config_file: str | None = SAVED_CONFIG


@dataclass
class Sizes:
    """Overrides of the sizes of `model.flavor`. A size that is not set is that of the flavor."""

    dim: int | None = None
    """Width of the model."""

    n_layers: int | None = None
    """Transformer blocks."""

    n_heads: int | None = None
    """Number of query heads. dim must be a multiple of it."""

    n_kv_heads: int | None = None
    """Number of key/value heads. n_heads must be a multiple of it."""

    ffn_dim: int | None = None
    """Exact width of the feed-forward layers. If not set, torchtitan computes it from dim."""

    vocab_size: int | None = None
    """Size of the vocabulary, at least that of the tokenizer."""

    norm_eps: float | None = None
    """Added to the mean square in RMSNorm."""

    rope_theta: float | None = None
    """Base of the frequencies of rotary embeddings."""

    rope_scaling_factor: float | None = None
    """Factor by which long wavelengths of rotary embeddings are scaled, as in Llama 3.1.
    1: no scaling."""

    rope_low_freq_factor: float | None = None
    """Wavelengths above rope_original_seq_len divided by this are scaled by the full factor."""

    rope_high_freq_factor: float | None = None
    """Wavelengths below rope_original_seq_len divided by this are not scaled."""

    rope_original_seq_len: int | None = None
    """Sequence length before scaling, in tokens."""


@dataclass
class Model(titan.Model):
    name: str = "llama3_lighthouse"
    hf_assets_path: str = BYTE_TOKENIZER_PATH

    hf_config: str | None = None
    """Folder with the config.json of a Llama in Hugging Face format. Sizes that [model.override]
    does not set come from this file. The sizes of the flavor are not used."""

    override: Sizes = field(default_factory=Sizes)


@dataclass
class Training(titan.Training):
    dataset: str = "python_stdlib"

    text_field: str = "text"
    """The key of JSON lines, or the column of Parquet tables, that holds the text."""

    loss_chunk_size: int = 0
    """Number of tokens per chunk in the computation of the loss and its gradient. Only the logits
    of one chunk are in memory at a time. 0: the whole sequence."""

    max_skipped_steps: int = 0
    """Maximum number of steps that a process skips because the loss or gradient is not finite. One
    more stops the run."""


@dataclass
class Validation(titan.Validation):
    dataset: str | None = None
    """Dataset of the held-out text. Default: the dataset and path of training."""

    text_field: str = "text"
    """The key of JSON lines, or the column of Parquet tables, that holds the text."""

    steps: int = 10
    """Batches per data-parallel rank. Every validation uses the same batches."""

    def __post_init__(self):
        # torchtitan asserts a rule here. Our rules are in config/rules.py.
        pass


@dataclass
class Checkpoint(titan.Checkpoint):
    # Stage 2 cannot resume from a checkpoint without optimizer state.
    last_save_model_only: bool = False
    initial_load_model_only: bool = False

    checksums: bool = True
    """Save checksums with each checkpoint, and verify them before loading."""

    accept_changes: list[str] = field(default_factory=list)
    """Fields, such as lighthouse.topk, that may differ from those of the checkpoint when a run
    resumes. See checkpoint/compatibility.py."""


@dataclass
class JobConfig(titan.JobConfig):
    """A whole run."""

    job: Job = field(default_factory=Job)
    model: Model = field(default_factory=Model)
    training: Training = field(default_factory=Training)
    validation: Validation = field(default_factory=Validation)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    lighthouse: Lighthouse = field(default_factory=Lighthouse)

    @property
    def has_pieces(self) -> bool:
        """Whether stage 2 trains on pieces of a sequence."""
        return self.lighthouse.stage2_seq_len not in (0, self.training.seq_len)

    @property
    def last_piece_step(self) -> int:
        """The last step of stage 2 that trains on pieces, if any does."""
        return self.training.steps - self.lighthouse.stage2_full_steps

    def phase_of(self, step: int) -> str:
        """The phase, `LIGHTHOUSE`, `PIECES` or `FULL`, that trains `step`. Steps count from 1."""
        if self.lighthouse.stage_of(step) == 1:
            return LIGHTHOUSE
        return PIECES if self.has_pieces and step <= self.last_piece_step else FULL

    def last_steps(self) -> dict[str, int]:
        """The phases of the run in order, each with its last step."""
        steps = self.training.steps
        ends = {self.lighthouse.stage1_steps, self.last_piece_step, steps}
        return {self.phase_of(step): step for step in sorted(ends) if 1 <= step <= steps}
