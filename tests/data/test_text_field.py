"""The field of the text in JSON lines and tables, for training and for `lighthouse prepare`."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from refusals import refused
from test_data import TOKENIZER, make_config, make_dataset
from torchtitan.experiments.lighthouse.data.byte_tokenizer import BYTE_TOKENIZER_PATH
from torchtitan.experiments.lighthouse.data.datasets import check_dataset
from torchtitan.experiments.lighthouse.data.loaders import build_dataloader
from torchtitan.experiments.lighthouse.data.tokenize import prepare
from torchtitan.experiments.lighthouse.data.tokenized import TokenizedDataset

ROWS = [{"text": "no", "content": f"document {i} " * 9} for i in range(8)]


@pytest.fixture(params=["jsonl", "parquet"])
def corpus(request, tmp_path) -> tuple[str, str]:
    """Name and path of a corpus whose text is in `content`."""
    path = tmp_path / f"corpus.{request.param}"
    if request.param == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return request.param, str(path)


def text_of(tokens) -> str:
    return bytes(token for token in tokens.tolist() if token < 256).decode()


def test_training_reads_the_field(corpus):
    texts = []
    for options in ({}, {"text_field": "content"}):
        config = make_config(*corpus, seq_len=64, **options)
        batch, _ = next(iter(build_dataloader(1, 0, TOKENIZER, config)))
        texts.append(text_of(batch["input"][0]))
    assert set(texts[0]) == set("no")
    assert texts[1].startswith("document 0 document 0")


def test_another_field_is_another_corpus(corpus):
    position = make_dataset(*corpus).state_dict()
    with refused("training.dataset must be the one of the checkpoint"):
        make_dataset(*corpus, position, text_field="content")


def test_a_corpus_is_tokenized_by_the_field(corpus, tmp_path):
    name, path = corpus
    out = tmp_path / "out"
    prepare(name, path, out, BYTE_TOKENIZER_PATH, text_field="content")
    window, _ = next(iter(TokenizedDataset(str(out), 32, infinite=False)))
    assert "document" in text_of(window["input"])
    with refused("--output must be a new folder or one begun with"):
        prepare(name, path, out, BYTE_TOKENIZER_PATH)


def test_a_missing_field_is_told_in_one_line(corpus):
    name, path = corpus
    part = {"jsonl": "a 'body' per line", "parquet": "a column 'body'"}[name]
    with refused("training.dataset_path", part, path, "in training.text_field"):
        check_dataset(name, path, text_field="body")


def test_a_dataset_without_fields_takes_none(tmp_path):
    for name, path in (("python_stdlib", None), ("c4", None), ("text", str(tmp_path))):
        with refused("validation.text_field must be 'text' for dataset"):
            check_dataset(name, path, "validation", text_field="content")
