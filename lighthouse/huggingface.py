"""Lighthouse Attention for Hugging Face models, using the attention interface of transformers.

    register_lighthouse(LighthouseConfig(topk=1536), full_attn_layers=(0, 1, -2, -1))
    Trainer(model, args, train_dataset=data, callbacks=[LighthouseSwitch(stage1_steps=10_000)])

A layer uses Lighthouse in training mode. It uses dense attention in `eval()` mode, if it is one of
`full_attn_layers`, and if a cache holds earlier tokens. `LighthouseSwitch` chooses the stage; a
custom training loop calls `use_lighthouse` and `use_dense`. No parameter is added and `config.json`
does not change, so the saved model is a standard model.

Each sequence of a training batch holds one document and has a legal length. Lighthouse has no mask,
so padding and packed documents raise an error. Padding would also affect the result, since padding
tokens would compete with all others in the selection. Other attention features (sliding window,
softcap, sinks, dropout, position bias) raise an error that names the feature.

This is the only module of the library that imports transformers.
"""

import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.trainer_callback import TrainerCallback

from lighthouse.attention import lighthouse_attention
from lighthouse.config import LighthouseConfig
from lighthouse.context_parallel import ContextParallel, UlyssesAttention
from lighthouse.ops import OPS_TO_SAVE
from lighthouse.rotary import RotaryPhases
from lighthouse.sdpa import causal_sdpa

logger = logging.getLogger(__name__)

ROTARY_MODELS = (
    *("gemma3_text", "gpt_neox", "llama", "mistral", "mixtral", "olmo2", "phi", "phi3"),
    *("qwen2", "qwen3"),
)
"""`model_type` of the models that `pool_rotary="aligned"` supports. Their rotary embedding was
compared with their q and k: every layer rotates, in halves, by the table of the model's module."""

_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")

_QK_NORMS = {
    *("q_norm", "k_norm", "qk_norm", "query_norm", "key_norm"),
    *("q_layernorm", "k_layernorm", "query_layernorm", "key_layernorm"),
}
"""Names of the modules that normalise q or k in transformers models."""

_WITHOUT_EFFECT = {
    *("cache_position", "num_items_in_batch", "output_hidden_states", "output_router_logits"),
    *("past_key_values", "position_ids", "return_dict", "shift_labels", "use_cache"),
}
"""Arguments of the attention interface that do not change causal attention over one document."""

_DENSE_SUFFIX = "_dense"


def register_lighthouse(
    config: LighthouseConfig,
    *,
    full_attn_layers: Sequence[int] = (),
    name: str = "lighthouse",
    pool_rotary: str = "averaged",
    context: ContextParallel | None = None,
) -> None:
    """Register `attn_implementation=name` with transformers. A second call replaces the first.

    Args:
        full_attn_layers: layers that stay dense; negative ones count from the last.
        pool_rotary: `averaged` pools q and k as they are. `aligned` first rotates them to the last
            position of a span, using the model's own rotary embedding; it needs `use_lighthouse`.
        context: this rank's position; its scheme is `ulysses`. Each rank passes its shard of the
            tokens and of their `position_ids`. It also passes `shift_labels`, because labels cross
            shard boundaries.

    Raises:
        ValueError: the name of another attention implementation, an unknown `pool_rotary` or a
            scheme other than `ulysses`.
    """
    if name == "eager" or not isinstance(AttentionInterface().get(name), _Attention | None):
        raise ValueError(
            f"name must not be that of another attention implementation, got {name!r}; choose "
            "another name"
        )
    if pool_rotary not in ("averaged", "aligned"):
        raise ValueError(
            f"pool_rotary must be averaged or aligned, got {pool_rotary!r}; choose one"
        )
    if context is not None and context.scheme != "ulysses":
        raise ValueError(
            f"the scheme must be ulysses for a Hugging Face model, got {context.scheme!r}; use it"
        )
    layers = tuple(full_attn_layers)
    attend = causal_sdpa if context is None else UlyssesAttention(causal_sdpa, context)
    for suffix in ("", _DENSE_SUFFIX):
        always_dense = suffix == _DENSE_SUFFIX
        attention = _Attention(config, layers, pool_rotary, context, attend, always_dense)
        AttentionInterface.register(name + suffix, attention)
        AttentionMaskInterface.register(name + suffix, _causal_mask)


def use_lighthouse(model: PreTrainedModel, name: str = "lighthouse") -> None:
    """Switch `model` to Lighthouse Attention for training, after checking every layer.

    Raises:
        ValueError: `name` is not registered, a layer cannot use Lighthouse, or all layers stay
            dense.
    """
    attention = AttentionInterface().get(name)
    if not isinstance(attention, _Attention):
        raise ValueError(f"{name!r} must be registered, got none; call register_lighthouse before")
    all_layers = [
        module
        for module in model.modules()
        if type(module).__name__.endswith("Attention") and hasattr(module, "layer_idx")
    ]
    layers = [layer for layer in all_layers if not attention.is_dense(layer)]
    if not layers and not attention.always_dense:
        raise ValueError(
            "full_attn_layers must leave a layer for Lighthouse Attention, got "
            f"{list(attention.full_attn_layers)} for {len(all_layers)} layers; "
            "remove one of them"
        )
    for layer in layers:
        attention.check_layer(layer)
    logger.info(f"Lighthouse Attention in {len(layers)} of {len(all_layers)} layers")
    if attention.pool_rotary == "aligned":
        span = attention.config.span(attention.config.num_levels - 1)
        for layer in layers:
            layer.lighthouse_rotary = _rotary_phases(model, layer, span)
    _set_attention(model, name)


def use_dense(model: PreTrainedModel) -> None:
    """Switch `model` to dense causal attention: `sdpa`, or Ulysses under context parallelism."""
    name = model.config._attn_implementation
    attention = AttentionInterface().get(name)
    is_sharded = isinstance(attention, _Attention) and attention.context is not None
    if is_sharded:
        name = name.removesuffix(_DENSE_SUFFIX) + _DENSE_SUFFIX
    logger.info("Dense attention in all layers")
    _set_attention(model, name if is_sharded else "sdpa")


def gradient_checkpointing_kwargs() -> dict[str, Any]:
    """Arguments for `model.gradient_checkpointing_enable` that save the selections.

    Other settings recompute the selections in the backward pass, which raises an error. The
    arguments also work as `gradient_checkpointing_kwargs` of `TrainingArguments`, except with
    `report_to="tensorboard"`, which writes them as JSON and cannot write a function.
    """
    return {"use_reentrant": False, "context_fn": _keep_selections}


class LighthouseSwitch(TrainerCallback):
    """Trains the first steps with Lighthouse and the remaining steps with dense attention.

    The stage depends only on the number of finished optimizer steps, so a resumed run is in the
    correct stage.

    Args:
        stage1_steps: optimizer steps with Lighthouse. 0 means dense throughout, -1 no switch.
        name: the registered name.

    Raises:
        ValueError: `stage1_steps` is below -1.
    """

    def __init__(self, stage1_steps: int, name: str = "lighthouse"):
        if stage1_steps < -1:
            raise ValueError(
                f"stage1_steps must be at least -1, got {stage1_steps}; use -1 for no switch"
            )
        self.stage1_steps = stage1_steps
        self.name = name

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        # This checks the layers before the first batch.
        self._choose_stage(state.global_step, model)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        is_lighthouse = model.config._attn_implementation == self.name
        if is_lighthouse != self._is_stage_1(state.global_step):
            self._choose_stage(state.global_step, model)

    def _is_stage_1(self, step: int) -> bool:
        return self.stage1_steps == -1 or step < self.stage1_steps

    def _choose_stage(self, step: int, model: PreTrainedModel) -> None:
        if self._is_stage_1(step):
            use_lighthouse(model, self.name)
        else:
            use_dense(model)


@dataclass(eq=False)
class _Attention:
    """The function registered under one name, which transformers calls for each layer."""

    config: LighthouseConfig
    full_attn_layers: tuple[int, ...]
    pool_rotary: str
    context: ContextParallel | None
    attend: Callable[..., torch.Tensor]
    always_dense: bool

    def __call__(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, None]:
        """query: [B, H, N, D]; key, value: [B, Hkv, N, D]. Returns [B, N, H, D] and no weights."""
        if kwargs.get("s_aux") is not None:
            raise ValueError(_has("attention sinks (s_aux)", module, "use another model"))
        has_earlier_tokens = key.shape[2] != query.shape[2]
        is_dense = not module.training or has_earlier_tokens or self.is_dense(module)
        if is_dense and self.context is None:
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout, scaling, **kwargs
            )
        if has_earlier_tokens:
            raise ValueError("context parallelism must train without a cache; set use_cache=False")
        self.check_layer(module, is_dense)
        _check_arguments(module, query.shape[2], attention_mask, dropout, kwargs)
        if scaling is not None and scaling != query.shape[3] ** -0.5:
            # Standard attention divides by sqrt(D). Scaling q here also scales the scorers' logits.
            query = query * (scaling * query.shape[3] ** 0.5)
        if is_dense:
            enable_gqa = query.shape[1] != key.shape[1]
            out = self.attend(query, key, value, enable_gqa=enable_gqa)
        else:
            rotary = self._rotary(module, query.device)
            out = lighthouse_attention(
                *(query, key, value, self.config),
                rotary=rotary,
                attend=self.attend,
                context=self.context,
            )
        return out.transpose(1, 2).contiguous(), None  # [B, N, H, D]

    def is_dense(self, module: nn.Module) -> bool:
        """Whether the layer of `module` stays dense during training."""
        if self.always_dense or not self.full_attn_layers:
            return self.always_dense
        n_layers = module.config.num_hidden_layers
        for layer in self.full_attn_layers:
            if not -n_layers <= layer < n_layers:
                raise ValueError(
                    f"full_attn_layers must be from {-n_layers} to {n_layers - 1}, got {layer}; "
                    "remove it"
                )
        return module.layer_idx in [layer % n_layers for layer in self.full_attn_layers]

    def check_layer(self, module: nn.Module, is_dense: bool = False) -> None:
        """Raise ValueError unless the layer of `module` can use this attention."""
        if not getattr(module, "is_causal", True):
            raise ValueError(_has("attention that is not causal", module, "use another model"))
        if hasattr(module, "sinks"):
            raise ValueError(_has("attention sinks", module, "use another model"))
        norms = _QK_NORMS & {name for name, _ in module.named_children()}
        if norms and self.config.scorer == "norm" and not is_dense:
            raise ValueError(
                f"scorer must not be norm for {type(module).__name__}, whose {sorted(norms)[0]} "
                "makes the norms of q or k nearly equal, so that they rank noise; use "
                "scorer='dilated'"
            )

    def _rotary(self, module: nn.Module, device: torch.device) -> RotaryPhases | None:
        if self.pool_rotary == "averaged":
            return None
        if not hasattr(module, "lighthouse_rotary"):
            raise ValueError(
                "pool_rotary='aligned' needs the table of the model, got none; call "
                "use_lighthouse(model) before training"
            )
        rotary = module.lighthouse_rotary
        return rotary if rotary is None else rotary.to(device)


def _check_arguments(
    module: nn.Module,
    seq_len: int,
    attention_mask: torch.Tensor | None,
    dropout: float,
    kwargs: dict[str, Any],
) -> None:
    """Raise ValueError for anything that is not plain causal attention over one document."""
    if dropout:
        raise ValueError(
            f"attention_dropout must be 0 for Lighthouse Attention, got {dropout}; set it to 0 in "
            "the configuration of the model"
        )
    window = kwargs.pop("sliding_window", None)
    if window is not None and window < seq_len:
        raise ValueError(
            _has(f"a sliding window of {window} tokens", module, "add it to full_attn_layers")
        )
    if kwargs.pop("is_causal", None) is False:
        raise ValueError(_has("attention that is not causal", module, "use another model"))
    for name, value in kwargs.items():
        if name not in _WITHOUT_EFFECT and value is not None and value is not False:
            raise ValueError(
                _has(name, module, "leave it out, or add the layer to full_attn_layers")
            )
    if attention_mask is not None:
        raise ValueError(
            "attention_mask must be all ones for Lighthouse Attention in training, got a mask; "
            "pack sequences to config.nearest_seq_len, without padding, or call use_dense(model)"
        )
    if (position_ids := kwargs.get("position_ids")) is not None:
        _require((position_ids.diff(dim=-1) == 1).all(), _PACKED)


def _has(what: str, module: nn.Module, remedy: str) -> str:
    layer = f"layer {getattr(module, 'layer_idx', None)} ({type(module).__name__})"
    return f"Lighthouse Attention does not support {what}, got it in {layer}; {remedy}"


_PADDED = (
    "attention_mask must be all ones for Lighthouse Attention in training, got padding; drop the "
    "collator's padding and pack sequences to config.nearest_seq_len, or call use_dense(model)"
)
_PACKED = (
    "position_ids must rise by 1 for Lighthouse Attention in training, got ones that start again, "
    "as packed documents do; leave them out, so that documents attend to each other, or give every "
    "document a sequence of its own"
)
_NOT_CAUSAL = (
    "the mask must be causal for Lighthouse Attention in training, got another mask function; use "
    "another model, or call use_dense(model)"
)


def _require(condition: torch.Tensor, message: str) -> None:
    """Raise ValueError unless `condition` holds. Compiled code raises RuntimeError at run time."""
    if torch.compiler.is_compiling():
        torch._assert_async(condition, message)
    elif not condition:
        raise ValueError(message)


def _causal_mask(**kwargs) -> torch.Tensor | None:
    """The mask of a batch: None in training, where other masks raise; the mask of `sdpa` elsewhere.

    A mask [B, 1, N, N] of a long sequence would not fit into memory, so training never builds it. A
    batch counts as a training batch if gradients are enabled.

    Args:
        kwargs: the arguments of `sdpa_mask`, which transformers passes by name.
    """
    seq_len, local_size = kwargs["q_length"], kwargs.get("local_size")
    is_training = torch.is_grad_enabled() and seq_len == kwargs["kv_length"]
    if not is_training or (local_size is not None and local_size < seq_len):
        return sdpa_mask(**kwargs)
    attention_mask, mask_function = kwargs.get("attention_mask"), kwargs["mask_function"]
    if attention_mask is not None:
        _require(attention_mask.all(), _PADDED)
    if kwargs.get("use_vmap"):
        raise ValueError(_NOT_CAUSAL)
    rows = torch.arange(kwargs["batch_size"], device=kwargs.get("device"))[:, None]
    tokens = torch.arange(seq_len, device=kwargs.get("device"))
    # Every token attends to the first token of its sequence. No token attends to the next one.
    _require(mask_function(rows, 0, tokens, tokens[:1]).all(), _PACKED)
    _require(~mask_function(rows, 0, tokens[:-1], tokens[1:]).any(), _NOT_CAUSAL)
    return None


def _set_attention(model: PreTrainedModel, name: str) -> None:
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        raise ValueError(
            f"{type(model).__name__} must use the attention interface of transformers, got a model "
            "that does not; use another model"
        )


def _rotary_phases(model: PreTrainedModel, layer: nn.Module, span: int) -> RotaryPhases | None:
    """The first `span` rows of the model's own rotary table; None without a rotary embedding."""
    embeddings = [x for x in model.modules() if type(x).__name__.endswith("RotaryEmbedding")]
    model_type = layer.config.model_type
    if not embeddings and not hasattr(layer.config, "rope_parameters"):
        return None
    if model_type not in ROTARY_MODELS or len(embeddings) != 1:
        raise ValueError(
            f"pool_rotary must be averaged for the model type {model_type}, got aligned, which "
            f"takes {', '.join(ROTARY_MODELS)}; use averaged"
        )
    (embedding,) = embeddings
    layer_type = {}
    rope_type = embedding.rope_type
    if "layer_type" in inspect.signature(embedding.forward).parameters:
        layer_type = {"layer_type": layer.config.layer_types[layer.layer_idx]}
        rope_type = rope_type[layer_type["layer_type"]]
    if rope_type in _LENGTH_DEPENDENT_ROPE:
        raise ValueError(
            f"pool_rotary must be averaged for rope_type {rope_type!r}, whose frequencies depend "
            "on the length of the sequence, got aligned; use averaged"
        )
    device = next(layer.parameters()).device
    positions = torch.arange(span, device=device)[None]
    # The embedding returns the dtype of this tensor.
    like = torch.empty(1, dtype=torch.float32, device=device)
    cos, sin = embedding(like, positions, **layer_type)  # [1, span, R]
    # Some models include a scale of q and k in the table. The first row holds this factor.
    factor, half = cos[0, 0, 0], cos.shape[2] // 2
    return RotaryPhases(cos[0, :, :half] / factor, sin[0, :, :half] / factor, interleaved=False)


def _keep_selections():
    return create_selective_checkpoint_contexts(OPS_TO_SAVE)
