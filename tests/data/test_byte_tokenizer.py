"""The byte tokenizer, loaded by torchtitan."""

import json
from pathlib import Path

import pytest
from texts import TEXTS
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.experiments.lighthouse.data.byte_tokenizer import (
    BYTE_TOKENIZER_PATH,
    EOS_ID,
    EOS_TOKEN,
    byte_characters,
    write_byte_tokenizer,
)


@pytest.fixture(scope="module")
def tokenizer() -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(BYTE_TOKENIZER_PATH)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_ids_are_the_bytes_and_decode_returns_the_text(tokenizer, text):
    ids = tokenizer.encode(text, add_bos=True, add_eos=True)
    assert ids == [*text.encode(), EOS_ID]
    assert tokenizer.decode(ids) == text


def test_every_byte_has_its_own_value_as_id(tokenizer):
    assert tokenizer.get_vocab_size() == 257
    assert [tokenizer.token_to_id(character) for character in byte_characters()] == list(range(256))


def test_only_the_end_of_a_document_is_special(tokenizer):
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eos_token) == (None, EOS_ID, EOS_TOKEN)
    assert tokenizer.encode("a") == [97]


def test_checked_in_files_are_what_the_generator_writes(tmp_path):
    write_byte_tokenizer(tmp_path)
    names = sorted(file.name for file in Path(BYTE_TOKENIZER_PATH).iterdir())
    assert names == sorted(file.name for file in tmp_path.iterdir())
    for name in names:
        checked_in = json.loads(Path(BYTE_TOKENIZER_PATH, name).read_text(encoding="utf-8"))
        assert checked_in == json.loads((tmp_path / name).read_text(encoding="utf-8"))
