"""The sizes of a run, computed from its configuration and its number of processes.

All counts of the planner follow from these sizes. Nothing is measured and there is no process
group. The model is torchtitan's own, on the meta device.
"""

import copy
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.experiments.lighthouse.apply_lighthouse import dense_layers
from torchtitan.experiments.lighthouse.config.job_config import JobConfig
from torchtitan.experiments.lighthouse.config.model_args import model_args
from torchtitan.models.llama3 import Transformer, TransformerModelArgs

from lighthouse import LighthouseConfig
from lighthouse.context_parallel import CHUNKS_PER_RANK
from lighthouse.costs import Shape


@dataclass(frozen=True)
class Sizes:
    """A run of `config` on `world_size` processes that `preflight.check_config` has passed.

    Raises:
        ValueError: the configuration uses a feature that a plan does not cover. These are tensor
            parallelism, CPU offloading, model converters, and activation checkpointing by a memory
            budget.
    """

    config: JobConfig
    world_size: int
    device_type: str = "cuda"
    """`cuda` or `cpu`."""

    def __post_init__(self):
        config = self.config
        for name, value, covered in (
            ("parallelism.tensor_parallel_degree", config.parallelism.tensor_parallel_degree, 1),
            ("training.enable_cpu_offload", config.training.enable_cpu_offload, False),
            ("model.converters", config.model.converters, []),
        ):
            if value != covered:
                raise ValueError(
                    f"{name} must be {covered!r} for a plan, which does not count its effect, "
                    f"got {value!r}; set it to {covered!r}"
                )
        if config.activation_checkpoint.mode == "memory_budget":
            raise ValueError(
                "activation_checkpoint.mode must be none, selective or full for a plan, got "
                "'memory_budget', where the compiler decides what to save; choose one of them"
            )

    # The model.

    @cached_property
    def model_args(self) -> TransformerModelArgs:
        return model_args(self.config)

    @cached_property
    def model(self) -> Transformer:
        """The model on the meta device, which allocates no memory."""
        with torch.device("meta"):
            return Transformer(self.model_args)

    @cached_property
    def parameters(self) -> dict[str, int]:
        """Parameters of the embedding, of one layer, of the head with the last norm, and of all."""
        model = self.model
        parts = {
            "embedding": [model.tok_embeddings],
            "layer": [model.layers["0"]],
            "head": [model.norm, model.output],
            "total": [model],
        }
        return {
            name: sum(p.numel() for module in modules for p in module.parameters())
            for name, modules in parts.items()
        }

    @property
    def n_heads(self) -> int:
        return self.model_args.n_heads

    @property
    def n_kv_heads(self) -> int:
        return self.model_args.n_kv_heads or self.model_args.n_heads

    @property
    def head_dim(self) -> int:
        return self.model_args.dim // self.model_args.n_heads

    @property
    def hidden_dim(self) -> int:
        """Width of the SwiGLU."""
        return self.model.layers["0"].feed_forward.w1.out_features

    # Attention.

    @property
    def attention(self) -> LighthouseConfig:
        return self.config.lighthouse.attention_config()

    @property
    def stages(self) -> list[int]:
        """The stages with at least one step."""
        return [stage for stage in (1, 2) if self.stage_steps(stage)]

    def stage_steps(self, stage: int) -> int:
        """Steps of stage 1 or 2."""
        steps, stage1 = self.config.training.steps, self.config.lighthouse.stage1_steps
        stage1 = steps if stage1 == -1 else stage1
        return stage1 if stage == 1 else steps - stage1

    @property
    def dense_layers(self) -> set[int]:
        """Layers that stay dense in stage 1."""
        return dense_layers(self.config.lighthouse.full_attn_layers, self.model_args.n_layers)

    def layers(self, stage: int) -> list[tuple[bool, str]]:
        """For each layer, whether it has Lighthouse Attention, and its `checkpointing`."""
        return [
            (stage == 1 and layer not in self.dense_layers, self.checkpointing(layer))
            for layer in range(self.model_args.n_layers)
        ]

    def attended_len(self, is_lighthouse: bool) -> int:
        """Number of positions that a layer attends over on all ranks together: S or N."""
        return self.attention.sub_seq_len(self.seq_len) if is_lighthouse else self.seq_len

    def attention_shape(self, seq_len: int) -> Shape:
        """Shape of q, k, v over `seq_len` tokens or entries."""
        kv_heads = self.n_kv_heads
        if self.cp_scheme == "ring" and self.device_type == "cpu":
            # The CPU kernel needs as many heads of k and v as of q.
            kv_heads = self.n_heads
        return Shape(self.batch, self.n_heads, kv_heads, seq_len, self.head_dim, self.compute_bytes)

    def in_pieces(self) -> "Sizes":
        """The sizes of stage 2 on pieces.

        Sequences are shorter, each rank has as many tokens as before, and there is no context
        parallelism.
        """
        config = copy.deepcopy(self.config)
        training, seq_len = config.training, config.lighthouse.stage2_seq_len
        training.local_batch_size = self.rank_tokens // seq_len
        if training.global_batch_size > 0:
            training.global_batch_size *= self.seq_len // seq_len
        training.seq_len = seq_len
        config.parallelism.context_parallel_degree = 1
        return replace(self, config=config)

    # Tokens and ranks.

    @property
    def seq_len(self) -> int:
        return self.config.training.seq_len

    @property
    def batch(self) -> int:
        """Sequences of a micro-batch."""
        return self.config.training.local_batch_size

    @property
    def cp_degree(self) -> int:
        """Ranks that share a sequence, W."""
        return self.config.parallelism.context_parallel_degree

    @property
    def cp_scheme(self) -> str | None:
        """`ulysses`, `ring`, or None without context parallelism."""
        return self.config.lighthouse.context_parallel if self.cp_degree > 1 else None

    @property
    def num_chunks(self) -> int:
        """Chunks that a sequence is cut into."""
        return self.cp_degree * CHUNKS_PER_RANK[self.cp_scheme] if self.cp_scheme else 1

    @property
    def dp_replicate(self) -> int:
        """Ranks, or groups of ranks, that hold the same parameters."""
        return self.config.parallelism.data_parallel_replicate_degree

    @property
    def fsdp_degree(self) -> int:
        """Ranks that the parameters are sharded over."""
        return self.world_size // self.dp_replicate

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a step (gradient accumulation)."""
        per_micro_batch = self.batch * self.world_size // self.cp_degree
        global_batch = self.config.training.global_batch_size
        return 1 if global_batch < 0 else global_batch // per_micro_batch

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.micro_batches * self.world_size // self.cp_degree * self.seq_len

    @property
    def rank_tokens(self) -> int:
        """Tokens of a micro-batch on one rank."""
        return self.batch * self.seq_len // self.cp_degree

    # Bytes per element.

    @property
    def param_bytes(self) -> int:
        """Bytes per element of parameters, their gradients and their moments."""
        return TORCH_DTYPE_MAP[self.config.training.dtype].itemsize

    @property
    def compute_bytes(self) -> int:
        """Bytes per element of the inputs and outputs of matrix products."""
        return TORCH_DTYPE_MAP[self.config.training.mixed_precision_param].itemsize

    @property
    def reduce_bytes(self) -> int:
        """Bytes per element of gradients in a reduction."""
        return TORCH_DTYPE_MAP[self.config.training.mixed_precision_reduce].itemsize

    @property
    def is_autocast(self) -> bool:
        """Whether autocast, not FSDP, casts to the compute dtype. Parameters and residuals keep
        their dtype under autocast."""
        return self.fsdp_degree == 1 and self.compute_bytes < self.param_bytes

    @property
    def residual_bytes(self) -> int:
        """Bytes per element of the residual stream, and of the weights in the modules."""
        return self.param_bytes if self.is_autocast else self.compute_bytes

    # Compilation and activation checkpointing.

    def is_compiled(self, component: str) -> bool:
        """Whether `model` (its layers) or `loss` is compiled."""
        return self.config.compile.enable and component in self.config.compile.components

    def checkpointing(self, layer: int) -> str:
        """Activation checkpointing of `layer`: `none`, `op` (selective, by operation) or `full`."""
        options = self.config.activation_checkpoint
        if options.mode != "selective":
            return options.mode
        if options.selective_ac_option == "op":
            return "op"
        return "none" if (layer + 1) % int(options.selective_ac_option) else "full"
