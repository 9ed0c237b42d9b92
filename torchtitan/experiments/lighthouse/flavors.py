"""Model sizes: the values of `model.flavor`, and overrides of single sizes.

`sizes_of` and `with_sizes` translate between torchtitan's arguments and one number per size:

    sizes_of(FLAVORS["debugmodel"])["ffn_dim"] == 512
    with_sizes(FLAVORS["debugmodel"], {"ffn_dim": 384})
"""

from dataclasses import replace
from typing import Any

from torchtitan.models.llama3 import TransformerModelArgs, llama3_args

MODEL_NAME = "llama3_lighthouse"

BYTE_VOCAB_SIZE = 320
"""256 bytes and an end-of-text token, padded to a multiple of 64."""

# torchtitan multiplies 2/3 of 4*dim by the multiplier and rounds up to a multiple of 256: 1536.
_PAPER_BODY = {
    "dim": 1024,
    "n_layers": 30,
    "n_heads": 8,
    "ffn_dim_multiplier": 0.5625,
    "multiple_of": 256,
    "rope_theta": 500000,
}

FLAVORS = {
    "debugmodel": TransformerModelArgs(
        dim=128, n_layers=4, n_heads=2, vocab_size=BYTE_VOCAB_SIZE, rope_theta=500000
    ),
    # Small enough to learn from a million bytes within minutes on two CPU cores.
    "quickstart": TransformerModelArgs(
        dim=128,
        n_layers=2,
        n_heads=2,
        vocab_size=BYTE_VOCAB_SIZE,
        multiple_of=128,
        rope_theta=10000,
    ),
    # For long contexts on a CPU: 10.1M parameters, most of them outside attention.
    "10M": TransformerModelArgs(
        dim=256,
        n_layers=2,
        n_heads=4,
        vocab_size=BYTE_VOCAB_SIZE,
        ffn_dim_multiplier=9,
        multiple_of=256,
        rope_theta=500000,
    ),
    # The paper's model: 530.1M parameters, of which 262.7M depend on the vocabulary.
    "530M": TransformerModelArgs(vocab_size=128256, **_PAPER_BODY),
    # The same body with the vocabulary of the byte tokenizer: 268.0M parameters.
    "268M": TransformerModelArgs(vocab_size=BYTE_VOCAB_SIZE, **_PAPER_BODY),
    "8B": llama3_args["8B"],
}

_PLAIN = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "norm_eps", "rope_theta")
_ROPE_SCALING = {
    "rope_scaling_factor": "scaling_factor",
    "rope_low_freq_factor": "low_freq_factor",
    "rope_high_freq_factor": "high_freq_factor",
    "rope_original_seq_len": "original_max_position_embeddings",
}


def sizes_of(args: TransformerModelArgs) -> dict[str, int | float]:
    """The sizes that determine the shapes and function of a model, named as in `with_sizes`."""
    sizes = {name: getattr(args, name) for name in _PLAIN}
    sizes["n_kv_heads"] = args.n_kv_heads or args.n_heads
    sizes["ffn_dim"] = _ffn_dim(args)
    scaling = args.rope_scaling_args
    return sizes | {name: getattr(scaling, theirs) for name, theirs in _ROPE_SCALING.items()}


def with_sizes(args: TransformerModelArgs, sizes: dict[str, Any]) -> TransformerModelArgs:
    """`args` with other sizes.

    Args:
        sizes: any of the sizes of `sizes_of`. None keeps the value of `args`. `ffn_dim` is the
            exact width of the feed-forward layers. Without it, torchtitan's rule applies to the
            new `dim`.
    """
    sizes = {name: value for name, value in sizes.items() if value is not None}
    scaling = {theirs: sizes[name] for name, theirs in _ROPE_SCALING.items() if name in sizes}
    args = replace(
        args,
        **{name: sizes[name] for name in _PLAIN if name in sizes},
        rope_scaling_args=replace(args.rope_scaling_args, **scaling),
    )
    if "ffn_dim" in sizes:
        # torchtitan multiplies by this and truncates. Adding 0.5 absorbs rounding errors.
        multiplier = (sizes["ffn_dim"] + 0.5) / int(2 * 4 * args.dim / 3)
        args = replace(args, multiple_of=1, ffn_dim_multiplier=multiplier)
    return args


def _ffn_dim(args: TransformerModelArgs) -> int:
    """The width of torchtitan's FeedForward."""
    width = int(2 * 4 * args.dim / 3)
    if args.ffn_dim_multiplier is not None:
        width = int(args.ffn_dim_multiplier * width)
    return -(-width // args.multiple_of) * args.multiple_of
