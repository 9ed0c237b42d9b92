"""Sizes of models: what `model.flavor` may name, and the name of the model itself."""

from torchtitan.models.llama3 import TransformerModelArgs, llama3_args

MODEL_NAME = "llama3_lighthouse"

BYTE_VOCAB_SIZE = 320
"""256 bytes and the end of text, padded to a multiple of 64."""

# torchtitan takes 2/3 of 4*dim, times the multiplier, up to a multiple of 256: 1536.
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
    # Small enough to learn something from a million bytes, in minutes on two CPU cores.
    "quickstart": TransformerModelArgs(
        dim=128,
        n_layers=2,
        n_heads=2,
        vocab_size=BYTE_VOCAB_SIZE,
        multiple_of=128,
        rope_theta=10000,
    ),
    # Long contexts on a CPU: 10.1M parameters, most of them where they cost no attention.
    "10M": TransformerModelArgs(
        dim=256,
        n_layers=2,
        n_heads=4,
        vocab_size=BYTE_VOCAB_SIZE,
        ffn_dim_multiplier=9,
        multiple_of=256,
        rope_theta=500000,
    ),
    # The paper's model: 530.1M parameters, 262.7M of them for its vocabulary.
    "530M": TransformerModelArgs(vocab_size=128256, **_PAPER_BODY),
    # The same body with the vocabulary of the byte tokenizer: 268.0M parameters.
    "268M": TransformerModelArgs(vocab_size=BYTE_VOCAB_SIZE, **_PAPER_BODY),
    "8B": llama3_args["8B"],
}
