"""A byte-level tokenizer. The id of a token is the value of its byte. 256 ends a document.

    encode("é", add_eos=True) == [0xC3, 0xA9, 256]

`write_byte_tokenizer` wrote the folder `assets/byte_tokenizer`. torchtitan's own tokenizer loads it
(`model.hf_assets_path`). A small model then needs no download and a vocabulary of only 257 tokens.
The characters `<|endoftext|>` in a text become id 256, as with every Hugging Face tokenizer.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BYTE_TOKENIZER_PATH = str(Path(__file__).parents[1] / "assets" / "byte_tokenizer")
"""Folder of the checked-in tokenizer, for `model.hf_assets_path`."""

EOS_TOKEN = "<|endoftext|>"
EOS_ID = 256


def byte_characters() -> list[str]:
    """The 256 characters that represent the bytes 0 to 255 in a `ByteLevel` tokenizer.

    A printable Latin-1 character represents its own byte. The other bytes, in order, get the code
    points from 256.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    unprintable = [byte for byte in range(256) if byte not in printable]
    return [
        chr(byte) if byte in printable else chr(256 + unprintable.index(byte))
        for byte in range(256)
    ]


def write_byte_tokenizer(folder: str | Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` to `folder`, created if missing.

    Raises:
        OSError: `folder` cannot be written.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocab = {character: byte for byte, character in enumerate(byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(EOS_TOKEN, special=True, normalized=False)])
    assert tokenizer.token_to_id(EOS_TOKEN) == EOS_ID

    save_tokenizer(folder, tokenizer)


def save_tokenizer(folder: str | Path, tokenizer: "Tokenizer", **tokens: str) -> None:
    """Write the files of a tokenizer whose documents end with `EOS_TOKEN`.

    Args:
        tokens: more special tokens, with transformers' names, such as `pad_token`.

    Raises:
        OSError: `folder` cannot be written.
    """
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS_TOKEN,
        **tokens,
        "clean_up_tokenization_spaces": False,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
