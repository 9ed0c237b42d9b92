"""The field of the text in JSON lines and tables, for training and for `lighthouse prepare`."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.experiments.lighthouse.config.load import load_config
from torchtitan.experiments.lighthouse.data.byte_tokenizer import BYTE_TOKENIZER_PATH
from torchtitan.experiments.lighthouse.data.datasets import check_dataset
from torchtitan.experiments.lighthouse.data.documents import open_documents
from torchtitan.experiments.lighthouse.data.loaders import build_dataloader
from torchtitan.experiments.lighthouse.data.packing import PackedTextDataset
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


def text_of(window) -> str:
    return bytes(token for token in window["input"].tolist() if token < 256).decode()


def test_training_reads_the_field(corpus):
    name, path = corpus
    args = ["--training.dataset", name, "--training.dataset_path", path, "--training.seq_len", "64"]
    tokenizer = HuggingFaceTokenizer(BYTE_TOKENIZER_PATH)
    config = load_config([*args, "--training.local_batch_size", "1"])
    assert set(
        text_of({"input": next(iter(build_dataloader(1, 0, tokenizer, config)))[0]["input"][0]})
    ) == set("no")
    config.training.text_field = "content"
    batch, _ = next(iter(build_dataloader(1, 0, tokenizer, config)))
    assert text_of({"input": batch["input"][0]}).startswith("document 0 document 0")


def test_another_field_is_another_corpus(corpus):
    name, path = corpus
    position = PackedTextDataset(name, path, HuggingFaceTokenizer(BYTE_TOKENIZER_PATH), 64)
    other = PackedTextDataset(
        name, path, HuggingFaceTokenizer(BYTE_TOKENIZER_PATH), 64, text_field="content"
    )
    with pytest.raises(ValueError, match=r"^training\.dataset must be the one of the checkpoint"):
        other.load_state_dict(position.state_dict())
    documents = open_documents(name, path, "train", 0, 1, "content")
    assert documents.fingerprint == other.state_dict()["corpus"]


def test_a_corpus_is_tokenized_by_the_field(corpus, tmp_path):
    name, path = corpus
    out = tmp_path / "out"
    prepare(name, path, out, BYTE_TOKENIZER_PATH, text_field="content")
    window, _ = next(iter(TokenizedDataset(str(out), 32, infinite=False)))
    assert "document" in text_of(window)
    with pytest.raises(ValueError, match=r"^--output must be a new folder or one begun with"):
        prepare(name, path, out, BYTE_TOKENIZER_PATH)


def test_a_missing_field_is_told_in_one_line(corpus):
    name, path = corpus
    with pytest.raises(ValueError, match=r"a 'body'|column 'body'") as error:
        check_dataset(name, path, text_field="body")
    assert "training.text_field" in str(error.value) and "\n" not in str(error.value)


def test_a_dataset_without_fields_takes_none(tmp_path):
    for name, path in (("python_stdlib", None), ("c4", None), ("text", str(tmp_path))):
        with pytest.raises(ValueError, match=r"^validation\.text_field must be 'text' for dataset"):
            check_dataset(name, path, "validation", text_field="content")
