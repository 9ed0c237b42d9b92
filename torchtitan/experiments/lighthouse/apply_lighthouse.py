"""Wrap the attention of a torchtitan model in Lighthouse, and remove the wrapper.

torchtitan's `Attention` calls `self.inner_attention(q, k, v, enable_gqa=...)` on [B, H, N, D].
`use_lighthouse` wraps that module after torchtitan has parallelised the model. This leaves
torchtitan's context parallelism (hooks on the inner module), activation checkpointing and FSDP
unchanged. Compilation is lazy and includes the wrapper. No parameter is added or renamed, so the
checkpoints are standard Llama 3 checkpoints in both stages.
"""

import functools
from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from torchtitan.experiments.lighthouse.config.job_config import Lighthouse
from torchtitan.models.attention import ScaledDotProductAttentionWrapper
from torchtitan.models.llama3.model.args import TransformerModelArgs

from lighthouse import OPS_TO_SAVE, LighthouseAttention, LighthouseConfig, RotaryPhases
from lighthouse.context_parallel import ContextParallel, all_to_all_op
from lighthouse.costs import scored_positions
from lighthouse.sdpa import fused_backends


def use_lighthouse(
    model: nn.Module,
    config: LighthouseConfig,
    full_attn_layers: list[int],
    n_layers: int,
    pool_rotary: str = "averaged",
    cp: ContextParallel | None = None,
) -> None:
    """Wrap the attention of all layers except `full_attn_layers`.

    Args:
        model: a Transformer, or the part of one in a pipeline stage.
        full_attn_layers: layers that stay dense; negative ones count from the last.
        n_layers: number of layers of the whole model.
        pool_rotary: `averaged` pools q and k as they are. `aligned` first rotates them to the last
            position of a span, using the model's own rotary embedding.
        cp: this rank's position under context parallelism.
    """
    dense = dense_layers(full_attn_layers, n_layers)
    rotary = rotary_phases(model, config) if pool_rotary == "aligned" else None
    for name, block in model.layers.items():
        if int(name) not in dense:
            attention = block.attention
            assert not isinstance(attention.inner_attention, LighthouseAttention)
            attention.inner_attention = LighthouseAttention(
                attention.inner_attention, config, rotary, cp
            )


def use_stage_1(
    model: nn.Module,
    lighthouse: Lighthouse,
    n_layers: int,
    cp: ContextParallel | None = None,
) -> None:
    """Call `use_lighthouse` with the fields of the section [lighthouse]."""
    use_lighthouse(
        model,
        lighthouse.attention_config(),
        lighthouse.full_attn_layers,
        n_layers,
        lighthouse.pool_rotary,
        cp,
    )


def rotary_phases(model: nn.Module, config: LighthouseConfig) -> RotaryPhases:
    """The first rows of the model's own rotary table, with its frequency scaling."""
    phases = model.freqs_cis[: config.span(config.num_levels - 1)]  # [p**(L-1), D/2], complex
    return RotaryPhases(phases.real, phases.imag, interleaved=True)


def use_dense(model: nn.Module) -> None:
    """Restore the original attention of every layer. A dense model stays unchanged."""
    for block in model.layers.values():
        if isinstance(block.attention.inner_attention, LighthouseAttention):
            block.attention.inner_attention = block.attention.inner_attention.inner


def use_fused_attention(model: nn.Module, dtype: torch.dtype, seq_len: int, prefer: str) -> None:
    """Allow only fused kernels in every layer. torchtitan's list also has one that is not fused.

    Args:
        dtype: of q, k, v.
        seq_len: tokens of the longest sequence.
        prefer: `cudnn` or `flash`.
    """
    for module in model.modules():
        if isinstance(module, ScaledDotProductAttentionWrapper):
            module.sdpa_backends = fused_backends(dtype, seq_len, prefer)


def save_selections(model: nn.Module) -> None:
    """Make activation checkpointing save the selections, which must not be recomputed.

    A recomputation can resolve a near-tie between scores differently. The new selection would not
    match the saved outputs, and the gradients would be wrong without an error. Expensive scores
    are saved too. Per-op checkpointing still saves its own ops, and also the all-to-all outputs.
    """
    for module in model.modules():
        if isinstance(module, CheckpointWrapper):
            checkpoint = module.checkpoint_fn
            context_fn = _keep_selections
            if by_op := checkpoint.keywords.get("context_fn"):
                context_fn = functools.partial(_keep_more, by_op)
            module.checkpoint_fn = functools.partial(checkpoint, context_fn=context_fn)


def _keep_selections():
    return create_selective_checkpoint_contexts(OPS_TO_SAVE)


def _keep_more(context_fn: Callable):
    """Contexts that also save our ops. The policy of `context_fn` decides about all other ops."""
    policy = context_fn()[0].policy_fn

    def keep(ctx, op, *args, **kwargs):
        if op in OPS_TO_SAVE or op == all_to_all_op:
            return CheckpointPolicy.MUST_SAVE
        return policy(ctx, op, *args, **kwargs)

    return create_selective_checkpoint_contexts(keep)


def flops_saved_per_token(
    model_args: TransformerModelArgs,
    config: LighthouseConfig,
    full_attn_layers: list[int],
    seq_len: int,
) -> float:
    """FLOPs per token, forward and backward, that Lighthouse saves compared with dense attention.

    The count follows torchtitan: six per head dimension and attended position for q·k, six for
    p·v, not halved for causality. Attention over S entries costs S * S instead of N * N for N
    tokens. Scoring has no backward pass, so a position that it attends to costs a third. Scoring
    by norms and pooling is not counted, since its FLOPs are negligible.
    """
    dense = dense_layers(full_attn_layers, model_args.n_layers)
    n_layers = model_args.n_layers - len(dense)
    head_dim = model_args.dim // model_args.n_heads
    per_position = 6 * n_layers * model_args.n_heads * 2 * head_dim
    attended = config.sub_seq_len(seq_len) ** 2 / seq_len
    attended += scored_positions(config, seq_len, head_dim) / 3
    return per_position * (seq_len - attended)


def flops_saved_by_pieces(model_args: TransformerModelArgs, seq_len: int, piece_len: int) -> float:
    """FLOPs per token, forward and backward, saved by dense attention over pieces of `piece_len`
    tokens compared with whole sequences. The count is that of `flops_saved_per_token`."""
    head_dim = model_args.dim // model_args.n_heads
    return 6 * model_args.n_layers * model_args.n_heads * 2 * head_dim * (seq_len - piece_len)


def dense_layers(full_attn_layers: list[int], n_layers: int) -> set[int]:
    """Indices of the layers that stay dense, counted from 0."""
    return {layer % n_layers for layer in full_attn_layers}
