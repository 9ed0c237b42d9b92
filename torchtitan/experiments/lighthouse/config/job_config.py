"""The configuration of a run: torchtitan's sections, our defaults, and [lighthouse].

A TOML file sets fields, the command line overrides them: `--lighthouse.topk 512`.
"""

from dataclasses import dataclass, field
from typing import Literal, get_args

from torchtitan.config import job_config as titan
from torchtitan.experiments.lighthouse.data.byte_tokenizer import BYTE_TOKENIZER_PATH

from lighthouse import LighthouseConfig

SAVED_CONFIG = "config.json"
"""File in the dump folder of a run that keeps its configuration."""


PoolRotary = Literal["averaged", "aligned"]
POOL_ROTARY = get_args(PoolRotary)
"""How q and k with rotary embeddings are pooled."""

POOL_ROTARY_BEFORE = "averaged"
"""`lighthouse.pool_rotary` of checkpoints and configurations that were saved without the field."""


LIGHTHOUSE, PIECES, FULL = "lighthouse", "pieces", "full"
"""Phases of training, in order: stage 1, stage 2 on pieces of a sequence, stage 2 on whole ones."""


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
    """What ranks the entries: norm, dilated or gla."""

    dilation: int = 4
    """Stride of the dilated scorer, in tokens."""

    pool_rotary: PoolRotary = "averaged"
    """Rotary phases of pooled entries. averaged: q and k are averaged as they are, each rotated by
    its own position, as in the code of the paper. aligned: tokens are rotated to the last position
    of their span first, as its authors have proposed since."""

    full_attn_layers: list[int] = field(default_factory=list)
    """Layers that stay dense in stage 1; negative ones count from the last."""

    stage1_steps: int = -1
    """Steps trained with Lighthouse before the switch to dense attention.
    0: dense from the start; -1: never switch."""

    stage2_seq_len: int = 0
    """Sequence length of stage 2 in tokens, a divisor of training.seq_len. Each batch [B, N] is cut
    into [B * N / n, n], and positions start at 0 in each piece. Under context parallelism each rank
    holds whole pieces. 0: training.seq_len."""

    stage2_full_steps: int = 0
    """Last steps of stage 2 that train at training.seq_len again; 0: none. Only with
    stage2_seq_len."""

    sdpa_backend: Literal["cudnn", "flash"] = "cudnn"
    """Kernel of attention on a GPU, in both stages; where it does not apply, the other one."""

    context_parallel: Literal["ulysses", "ring"] = "ulysses"
    """How attention is parallel over the sequence, in both stages, where
    parallelism.context_parallel_degree is more than 1. ulysses: contiguous shards, one all-to-all
    from sequence to heads and one back. ring: shards of a head and a tail chunk, keys and values
    go round as parallelism.context_parallel_rotate_method says; for degrees that do not divide the
    key/value heads."""

    telemetry_freq: int = 0
    """Steps of stage 1 between measurements of what is selected, telemetry/... in the metrics;
    0: none. Not under context parallelism."""

    def attention_config(self) -> LighthouseConfig:
        """The fields of the attention itself. Raises ValueError for an illegal one."""
        return LighthouseConfig(
            num_levels=self.num_levels,
            pooling_factor=self.pooling_factor,
            topk=self.topk,
            scorer=self.scorer,
            dilation=self.dilation,
        )

    def stage_of(self, step: int) -> int:
        """The stage, 1 or 2, that trains `step`; steps count from 1."""
        return 1 if self.stage1_steps == -1 or step <= self.stage1_steps else 2


@dataclass
class Job(titan.Job):
    save_config_file: str | None = SAVED_CONFIG


@dataclass
class Sizes:
    """Sizes of the model over those of `model.flavor`. What is left out is as in the flavor."""

    dim: int | None = None
    """Width of the model."""

    n_layers: int | None = None
    """Transformer blocks."""

    n_heads: int | None = None
    """Query heads; dim is a multiple of them."""

    n_kv_heads: int | None = None
    """Key/value heads; n_heads is a multiple of them."""

    ffn_dim: int | None = None
    """Width of the feed-forward layers, exactly. Left out, torchtitan's rule applies to dim."""

    vocab_size: int | None = None
    """At least the tokens of the tokenizer."""

    norm_eps: float | None = None
    """Added to the mean square in RMSNorm."""

    rope_theta: float | None = None
    """Base of the frequencies of rotary embeddings."""

    rope_scaling_factor: float | None = None
    """By which Llama 3.1 stretches long wavelengths of rotary embeddings; 1: no scaling."""

    rope_low_freq_factor: float | None = None
    """Wavelengths above rope_original_seq_len divided by this are stretched in full."""

    rope_high_freq_factor: float | None = None
    """Wavelengths below rope_original_seq_len divided by this are not stretched."""

    rope_original_seq_len: int | None = None
    """Tokens that the scaling starts from."""


@dataclass
class Model(titan.Model):
    name: str = "llama3_lighthouse"
    hf_assets_path: str = BYTE_TOKENIZER_PATH

    hf_config: str | None = None
    """Folder with the config.json of a Llama in Hugging Face's format. The run takes the sizes
    that [model.override] leaves out from there, and none from the flavor."""

    override: Sizes = field(default_factory=Sizes)


@dataclass
class Training(titan.Training):
    dataset: str = "python_stdlib"

    text_field: str = "text"
    """The key of JSON lines, or the column of Parquet tables, that holds the text."""

    loss_chunk_size: int = 0
    """Tokens whose logits exist at a time while the loss and its gradient are computed.
    0: those of the whole sequence."""

    max_skipped_steps: int = 0
    """Steps of a process whose loss or gradient is not finite that are left out of training; one
    more stops the run."""


@dataclass
class Validation(titan.Validation):
    dataset: str | None = None
    """Of the held-out text; by default the corpus, and the path, that is trained on."""

    text_field: str = "text"
    """The key of JSON lines, or the column of Parquet tables, that holds the text."""

    steps: int = 10
    """Batches per data-parallel rank, the same ones at every validation."""

    def __post_init__(self):
        # torchtitan asserts a rule here; ours stand in config/rules.py.
        pass


@dataclass
class Checkpoint(titan.Checkpoint):
    # A checkpoint without its optimizer cannot go on in stage 2.
    last_save_model_only: bool = False
    initial_load_model_only: bool = False

    checksums: bool = True
    """Save checksums with each checkpoint, and compare them before it is loaded."""

    accept_changes: list[str] = field(default_factory=list)
    """Fields that may differ from those a checkpoint was trained with when a run goes on from it,
    such as lighthouse.topk; see checkpoint/compatibility.py."""


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
        """The last step that trains on pieces, if any step of stage 2 does."""
        return self.training.steps - self.lighthouse.stage2_full_steps

    def phase_of(self, step: int) -> str:
        """The phase, `LIGHTHOUSE`, `PIECES` or `FULL`, that trains `step`; steps count from 1."""
        if self.lighthouse.stage_of(step) == 1:
            return LIGHTHOUSE
        return PIECES if self.has_pieces and step <= self.last_piece_step else FULL
