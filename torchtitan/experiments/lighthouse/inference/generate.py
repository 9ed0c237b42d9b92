"""Generate text with a trained model, with dense attention.

    lighthouse generate outputs/debug/checkpoint/step-60 --prompt "def read_lines(path):"

MODEL is a checkpoint, .../checkpoint/step-N of either stage, or a folder in Hugging Face's format.
The text ends after --num-tokens tokens, or before the end-of-document token.

    hidden = hidden_states(model, prompt)          # once, with fused causal attention
    repeat:
        token = sample(head(hidden of the last position))
        hidden = hidden_states(model, token)       # one query against the cached keys and values

Attention never stores S * S logits. The head is applied to the last position only.
"""

import argparse
import contextlib
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.experiments.lighthouse.config.rule_helpers import require
from torchtitan.experiments.lighthouse.inference.load_model import add_arguments, open_trained
from torchtitan.experiments.lighthouse.runtime.command_line import (
    Parser,
    check_device,
    exit_on_value_error,
)
from torchtitan.models.llama3 import Transformer


def main() -> None:
    parser = Parser(__doc__)
    on_gpu = torch.cuda.is_available()
    add = parser.add_argument
    add("model", metavar="MODEL", help="checkpoint or exported folder")
    add("--prompt", required=True, help="the text to continue")
    add("--num-tokens", type=int, default=200, help="maximum number of new tokens; default: 200")
    add("--temperature", type=float, default=0.7, help="0 is greedy decoding; default: 0.7")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if on_gpu else "cpu")
    add("--dtype", default="bfloat16" if on_gpu else "float32", choices=["float32", "bfloat16"])
    add_arguments(parser)
    options = parser.parse_args()
    with exit_on_value_error():
        print(continued(options))


def continued(options: argparse.Namespace) -> str:
    """The prompt and its continuation. Raises ValueError for illegal options."""
    check_device(options.device)
    num_tokens, temperature = options.num_tokens, options.temperature
    require(num_tokens >= 1, "--num-tokens", "at least 1", num_tokens, "use 1 or more")
    remedy = "use 0 for the likeliest token"
    require(0 <= temperature < math.inf, "--temperature", "at least 0", temperature, remedy)
    require(0 <= options.seed < 2**63, "--seed", "from 0 to 2**63 - 1", options.seed, "use 0")
    try:
        options.prompt.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"--prompt must be UTF-8, got {ascii(options.prompt)[:80]}; correct its bytes"
        ) from None
    trained = open_trained(options.model, options.flavor, options.max_seq_len, options.tokenizer)
    tokenizer = trained.tokenizer()
    prompt = tokenizer.encode(options.prompt, add_eos=False)
    longest = trained.args.max_seq_len
    if not prompt or len(prompt) + num_tokens > longest:
        raise ValueError(
            f"--prompt and --num-tokens must be at least 1 and at most {longest} tokens together, "
            f"got {len(prompt)} and {num_tokens}; shorten the prompt"
        )
    model = trained.load(options.device, TORCH_DTYPE_MAP[options.dtype])
    tokens = generate(model, prompt, num_tokens, temperature, options.seed)
    if tokenizer.eos_id in tokens:
        tokens = tokens[: tokens.index(tokenizer.eos_id)]
    return options.prompt + tokenizer.decode(tokens)


@torch.inference_mode()
def generate(
    model: Transformer, prompt: list[int], num_tokens: int, temperature: float, seed: int = 0
) -> list[int]:
    """Continue `prompt` by `num_tokens` tokens.

    Args:
        temperature: temperature of the softmax that a token is sampled from. 0 takes the likeliest
            token.
        seed: seed of the sampling.

    Raises:
        ValueError: the prompt is empty, or there are more tokens than `max_seq_len`.
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
    """Logits of the next token.

    Args:
        tokens: [B, S] int64. The first one is at position `start`.

    Returns:
        [B, V], in the dtype of the model.
    """
    return model.output(hidden_states(model, tokens, start)[:, -1])


def hidden_states(model: Transformer, tokens: torch.Tensor, start: int = 0) -> torch.Tensor:
    """Hidden states after the last norm, the input of the head.

    Args:
        tokens: [B, S] int64. The first one is at position `start`. Earlier tokens must be in the
            cache.

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
    """Inside this context, every layer caches the keys and values of one batch of sequences.

    Args:
        max_len: capacity in tokens. A layer caches 2 * B * Hkv * max_len * D numbers.
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
    """Causal attention with a cache. The first call takes the prompt, later calls one token."""

    def __init__(self, inner: nn.Module, max_len: int):
        super().__init__()
        self.inner, self.max_len = inner, max_len
        self.length = 0

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, enable_gqa: bool = False
    ) -> torch.Tensor:
        """The same as `inner`: q [B, H, S, D], k and v [B, Hkv, S, D] to [B, H, S, D]."""
        if self.length == 0:
            shape = (*k.shape[:2], self.max_len, k.shape[3])
            self.keys, self.values = k.new_empty(shape), v.new_empty(shape)
        start, self.length = self.length, self.length + k.shape[2]
        self.keys[:, :, start : self.length] = k
        self.values[:, :, start : self.length] = v
        if start == 0:
            return self.inner(q, k, v, enable_gqa=enable_gqa)
        # No mask is needed, because the single query comes after all keys.
        assert q.shape[2] == 1
        return F.scaled_dot_product_attention(
            q,
            self.keys[:, :, : self.length],
            self.values[:, :, : self.length],
            enable_gqa=enable_gqa,
        )
