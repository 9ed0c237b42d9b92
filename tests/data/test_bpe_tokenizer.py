"""A byte-pair tokenizer of a corpus restores every text, in torchtitan and transformers."""

import json

import pytest
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.experiments.lighthouse.data import bpe_tokenizer
from torchtitan.experiments.lighthouse.data.bpe_tokenizer import (
    EOS_TOKEN,
    PAD_TOKEN,
    corpus_texts,
    train_tokenizer,
)
from transformers import AutoTokenizer

TEXTS = ["the lighthouse keeper lights the lighthouse lamp at night. " * 20, "ab" * 50]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe") / "tokenizer"
    assert train_tokenizer(TEXTS, 288, folder) == 288
    return folder


@pytest.mark.parametrize("text", [TEXTS[0], "unseen: zürich 灯台 \n\t  x\x00", "<|pad"])
def test_any_text_comes_back(folder, text):
    tokenizer = HuggingFaceTokenizer(str(folder))
    ids = tokenizer.encode(text, add_bos=True, add_eos=True)
    assert tokenizer.decode(ids[:-1]) == text and ids[-1] == tokenizer.eos_id
    assert AutoTokenizer.from_pretrained(folder).encode(text) == ids[:-1]


def test_common_words_become_few_tokens(folder):
    ids = HuggingFaceTokenizer(str(folder)).encode(TEXTS[0], add_bos=False, add_eos=False)
    assert len(ids) < len(TEXTS[0]) / 3


def test_transformers_pads_with_a_token_of_its_own(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.eos_token, tokenizer.pad_token) == (EOS_TOKEN, PAD_TOKEN)
    batch = tokenizer(["the", "the lighthouse keeper"], padding=True)
    assert batch["input_ids"][0][-1] == tokenizer.pad_token_id != tokenizer.eos_token_id
    assert batch["attention_mask"][0][-1] == 0


def test_the_same_texts_give_the_same_file(folder, tmp_path):
    train_tokenizer(iter(TEXTS), 288, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_a_vocabulary_too_small_and_no_text_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^vocab_size must be at least 258, .* got 257; "):
        train_tokenizer(TEXTS, 257, tmp_path / "out")
    with pytest.raises(ValueError, match=r"^texts must hold a document, got none; "):
        train_tokenizer([], 300, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_command_trains_on_the_training_split(tmp_path, capsys):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(
        "".join(json.dumps({"text": f"{text}{i}"}) + "\n" for i, text in enumerate(TEXTS * 20))
    )
    args = ["--dataset", "jsonl", "--dataset-path", str(corpus), "--vocab-size", "280"]
    bpe_tokenizer.main([*args, "--output", str(tmp_path / "out")])
    assert capsys.readouterr().out == f"280 tokens in {tmp_path / 'out'}\n"
    with pytest.raises(SystemExit, match="2"):
        bpe_tokenizer.main([*args[:4], "--vocab-size", "10", "--output", str(tmp_path / "small")])
    assert capsys.readouterr().err.startswith("error: vocab_size must be at least 258")


def test_no_more_bytes_are_read_than_asked_for(tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"text": "abcd"}\n' * 10)
    held_out = len(list(corpus_texts("jsonl", str(corpus), 100)))
    assert held_out == 10
    assert list(corpus_texts("jsonl", str(corpus), 11)) == ["abcd", "abcd"]
