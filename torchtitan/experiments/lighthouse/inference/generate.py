"""Text from a trained model, by the dense attention that training ends with.

    hidden = hidden_states(model, prompt)          # once, by fused causal attention
    repeat:
        token = sample(head(hidden of the last position))
        hidden = hidden_states(model, token)       # one query against the keys and values so far

Neither ever holds S * S logits of attention, and the head is applied to one position alone.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchtitan.experiments.lighthouse.flavors import FLAVORS
from torchtitan.experiments.lighthouse.inference.load_model import load_model
from torchtitan.models.llama3 import Transformer


def load_dense_model(flavor: str, checkpoint: str | Path, max_seq_len: int) -> Transformer:
    """The model of a training checkpoint with dense attention, in fp32 on the CPU.

    Args:
        flavor: `model.flavor` of the run.
        checkpoint: a checkpoint's folder, `.../step-N`.
        max_seq_len: the longest sequence the model will see, in tokens.
    """
    return load_model(FLAVORS[flavor], checkpoint, max_seq_len)


@torch.inference_mode()
def generate(
    model: Transformer, prompt: list[int], num_tokens: int, temperature: float, seed: int = 0
) -> list[int]:
    """Continue `prompt` by `num_tokens` tokens.

    Args:
        temperature: of the softmax that a token is drawn from; 0 takes the likeliest one.
        seed: of the draws.

    Raises:
        ValueError: no prompt, or more tokens than the model has positions for.
    """
    max_seq_len = model.model_args.max_seq_len
    if not prompt or len(prompt) + num_tokens > max_seq_len:
        raise ValueError(
            f"prompt and num_tokens must be at least 1 and at most {max_seq_len} tokens together, "
            f"the model's max_seq_len, got {len(prompt)} and {num_tokens}; shorten the prompt"
        )
    device = model.freqs_cis.device
    generator = torch.Generator(device).manual_seed(seed)
    tokens, new = list(prompt), prompt
    with key_value_cache(model, len(prompt) + num_tokens):
        for _ in range(num_tokens):
            start = len(tokens) - len(new)
            logits = next_token_logits(model, torch.tensor([new], device=device), start)[0]
            if temperature == 0:
                token = logits.argmax()
            else:
                probabilities = torch.softmax(logits.float() / temperature, -1)
                token = torch.multinomial(probabilities, 1, generator=generator)
            new = [int(token)]
            tokens += new
    return tokens[len(prompt) :]


def next_token_logits(model: Transformer, tokens: torch.Tensor, start: int = 0) -> torch.Tensor:
    """Logits of the token after the last one.

    Args:
        tokens: [B, S] int64, at the positions from `start` on.

    Returns:
        [B, V], in the dtype of the model.
    """
    return model.output(hidden_states(model, tokens, start)[:, -1])


def hidden_states(model: Transformer, tokens: torch.Tensor, start: int = 0) -> torch.Tensor:
    """What the head of the model takes.

    Args:
        tokens: [B, S] int64, at the positions from `start` on; those before must be in a cache.

    Returns:
        [B, S, dim], in the dtype of the model.
    """
    positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)[None]
    hidden = model.tok_embeddings(tokens)
    for layer in model.layers.values():
        hidden = layer(hidden, model.freqs_cis, attention_masks=None, positions=positions)
    return model.norm(hidden)


@contextlib.contextmanager
def key_value_cache(model: Transformer, max_len: int) -> Iterator[None]:
    """Within it, every layer remembers the keys and values of one batch of sequences.

    Args:
        max_len: tokens there is room for. Memory: 2 * B * Hkv * max_len * D numbers a layer.
    """
    attentions = [block.attention for block in model.layers.values()]
    for attention in attentions:
        attention.inner_attention = _CachedAttention(attention.inner_attention, max_len)
    try:
        yield
    finally:
        for attention in attentions:
            attention.inner_attention = attention.inner_attention.inner


class _CachedAttention(nn.Module):
    """Causal attention that is told a prompt first, and then one token at a time."""

    def __init__(self, inner: nn.Module, max_len: int):
        super().__init__()
        self.inner, self.max_len = inner, max_len
        self.length = 0

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, enable_gqa: bool = False
    ) -> torch.Tensor:
        """As `inner`: q [B, H, S, D], k and v [B, Hkv, S, D] to [B, H, S, D]."""
        if self.length == 0:
            shape = (*k.shape[:2], self.max_len, k.shape[3])
            self.keys, self.values = k.new_empty(shape), v.new_empty(shape)
        start, self.length = self.length, self.length + k.shape[2]
        self.keys[:, :, start : self.length] = k
        self.values[:, :, start : self.length] = v
        if start == 0:
            return self.inner(q, k, v, enable_gqa=enable_gqa)
        # Without a mask: the one query comes after all keys.
        assert q.shape[2] == 1
        return F.scaled_dot_product_attention(
            q,
            self.keys[:, :, : self.length],
            self.values[:, :, : self.length],
            enable_gqa=enable_gqa,
        )
