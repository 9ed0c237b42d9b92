"""Small Hugging Face models with random weights, in training mode."""

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from lighthouse import LighthouseConfig

CONFIG = LighthouseConfig(num_levels=2, pooling_factor=2, topk=128)
SEQ_LEN = 512
N_LAYERS = 3
VOCAB_SIZE = 64

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 4096,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

FAMILIES = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "llama-yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 1024,
        }
    },
    "mistral": {"sliding_window": None},
    "mixtral": {"sliding_window": None, "num_local_experts": 2},
    "qwen2": {},
    "phi": {"partial_rotary_factor": 0.5, "attention_dropout": 0.0},
    "phi3": {"sliding_window": None},
    "gpt_neox": {"rotary_pct": 0.25, "num_key_value_heads": None},
    "qwen3": {"head_dim": 8},
    "olmo2": {},
    "gemma3_text": {
        "head_dim": 8,
        "query_pre_attn_scalar": 16,
        "layer_types": ["full_attention"] * N_LAYERS,
        "sliding_window": 4096,
    },
}
"""Changes to `SIZES`, by `model_type` and variant."""

QK_NORM = ("qwen3", "olmo2", "gemma3_text")


def make_model(family: str = "llama", seed: int = 0, **changes) -> PreTrainedModel:
    """A model whose attention is far from uniform."""
    fields = SIZES | FAMILIES[family] | changes
    config = CONFIG_MAPPING[family.split("-")[0]](**fields)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("q_proj", "k_proj", "qkv_proj", "query_key_value")):
                parameter *= 10
    return model.train()


def make_tokens(batch: int = 1, seq_len: int = SEQ_LEN, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB_SIZE, (batch, seq_len), generator=generator)
