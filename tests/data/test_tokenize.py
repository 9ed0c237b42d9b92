"""Preparing a corpus: its bytes, also after any number of kills, and errors."""

import gzip
import hashlib
import itertools
import json
import multiprocessing
import os
import select
import shutil
import signal
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from refusals import refused
from test_data import make_corpus, make_texts, write_parquet, write_shards
from torchtitan.experiments.lighthouse.data import partial_shard, readers
from torchtitan.experiments.lighthouse.data import tokenize as prepare_module
from torchtitan.experiments.lighthouse.data.byte_tokenizer import BYTE_TOKENIZER_PATH, EOS_ID
from torchtitan.experiments.lighthouse.data.datasets import find_files, is_held_out
from torchtitan.experiments.lighthouse.data.manifest import Manifest, verify
from torchtitan.experiments.lighthouse.data.prepare import main
from torchtitan.experiments.lighthouse.data.tokenize import prepare
from torchtitan.experiments.lighthouse.runtime import atomic_json

KINDS = ["text", "jsonl", "parquet", "c4_local"]


def make(name, path, out, tokenizer_path=BYTE_TOKENIZER_PATH, **options) -> Manifest:
    return prepare(name, path, out, tokenizer_path, **{"shard_size": 100, **options})


def write_lines(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "corpus").mkdir()
    write_lines(tmp_path / "corpus" / "a.jsonl", make_texts(20))
    return str(tmp_path / "corpus")


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


def texts_in_order(name: str, path: str, split: str) -> list[str]:
    """Read a corpus without the code under test."""
    texts = []
    for file in sorted(Path(path).iterdir()):
        if name == "text":
            texts.append(file.read_text(encoding="utf-8"))
        elif name == "parquet":
            import pyarrow.parquet

            texts += pyarrow.parquet.read_table(file)["text"].to_pylist()
        elif name == "jsonl" or f"c4-{split}." in file.name:
            opened = gzip.open if file.suffix == ".gz" else open
            with opened(file, "rt", encoding="utf-8") as lines:
                texts += [json.loads(line)["text"] for line in lines]
    if name == "c4_local":
        return texts
    return [text for text in texts if is_held_out(text) == (split == "validation")]


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_shards_are_the_documents_in_order(tmp_path, kind, split):
    name, path = make_corpus(tmp_path / "corpus", kind, make_texts(40))
    manifest = make(name, path, tmp_path / "out", split=split)
    texts = texts_in_order(name, path, split)
    expected = [token for text in texts for token in [*text.encode(), EOS_ID]]

    folder = tmp_path / "out" / split
    shards = [np.fromfile(folder / shard.file, "<u2") for shard in manifest.shards]
    assert np.concatenate(shards).tolist() == expected
    assert manifest.tokens == len(expected)
    assert (len(shards) > 3) == (split == "train")
    for i, (shard, tokens) in enumerate(zip(manifest.shards, shards, strict=True)):
        # A shard has the smallest number of whole documents that reaches its size.
        assert tokens[-1] == EOS_ID
        assert shard.documents == (tokens == EOS_ID).sum()
        if i < len(shards) - 1:
            last = np.flatnonzero(tokens[:-1] == EOS_ID)[-1] + 1
            assert last < 100 <= len(tokens) == shard.tokens
        assert shard.sha256 == hashlib.sha256((folder / shard.file).read_bytes()).hexdigest()
        assert shard.max_id == EOS_ID
    names = {file.name: file.stat().st_size for file in find_files(name, path, split)}
    assert manifest.sources == names
    assert {file.name for file in folder.iterdir()} == {
        "manifest.json", *(shard.file for shard in manifest.shards)
    }  # fmt: skip
    # A second call finds the split complete.
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert make(name, path, tmp_path / "out", split=split) == manifest
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == before


def test_a_large_vocabulary_takes_four_bytes(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(70000)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    (tmp_path / "words").mkdir()
    words.save(str(tmp_path / "words" / "tokenizer.json"))
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "w1 w69999 w65536"}))
    manifest = make("jsonl", str(tmp_path / "a.jsonl"), tmp_path / "out", str(tmp_path / "words"))
    assert manifest.dtype == "<u4" and manifest.vocab_size == 70000
    content = (tmp_path / "out" / "train" / "00000.bin").read_bytes()
    assert content == np.array([1, 69999, 65536], "<u4").tobytes()
    assert manifest.shards[0].max_id == 69999


@pytest.mark.parametrize("kind", ["c4_local", "text"])
def test_the_number_of_workers_changes_nothing(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(readers, "CHUNK_BYTES", 50)
    name, path = make_corpus(tmp_path / "corpus", kind, make_texts(40))
    make(name, path, tmp_path / "one")
    make(name, path, tmp_path / "two", workers=2)
    assert bytes_of(tmp_path / "two") == bytes_of(tmp_path / "one")


# ---- kills


class Killed(BaseException):
    pass


class Executioner:
    """Allows some calls that write, and kills at the next one, before or after it."""

    def __init__(self, monkeypatch):
        self.calls_left, self.after = None, False
        for owner, name in (
            (prepare_module.os, "replace"),
            (prepare_module.os, "fsync"),
            (partial_shard.PartialShard, "add"),
            (prepare_module.Path, "unlink"),
        ):
            monkeypatch.setattr(owner, name, self._watched(getattr(owner, name)))

    def _watched(self, function):
        def watched(*args, **options):
            if self.calls_left == 0 and not self.after:
                raise Killed
            result = function(*args, **options)
            if self.calls_left == 0:
                raise Killed
            if self.calls_left is not None:
                self.calls_left -= 1
            return result

        return watched


@pytest.fixture
def executioner(monkeypatch):
    monkeypatch.setattr(readers, "CHUNK_BYTES", 50)
    monkeypatch.setattr(readers, "CHUNK_ROWS", 3)
    return Executioner(monkeypatch)


@pytest.mark.parametrize(
    ("kind", "when"),
    [
        *[("text", "before"), ("jsonl", "after"), ("parquet", "after")],
        *[("c4_local", "before"), ("c4_local", "after")],
    ],
)
def test_a_preparation_killed_anywhere_ends_with_the_same_bytes(tmp_path, executioner, kind, when):
    name, path = make_corpus(tmp_path / "corpus", kind, make_texts(14))
    make(name, path, tmp_path / "whole", shard_size=50)
    expected = bytes_of(tmp_path / "whole")
    executioner.after = when == "after"
    for calls in itertools.count():
        executioner.calls_left = calls
        try:
            make(name, path, tmp_path / "out", shard_size=50)
            break
        except Killed:
            executioner.calls_left = None
            if (tmp_path / "out/train/manifest.json").exists():
                verify(tmp_path / "out")
            make(name, path, tmp_path / "out", shard_size=50)
            assert bytes_of(tmp_path / "out") == expected
            shutil.rmtree(tmp_path / "out")
    assert calls >= 30
    assert bytes_of(tmp_path / "out") == expected


def test_what_is_whole_is_not_tokenized_again(tmp_path, executioner, monkeypatch):
    name, path = make_corpus(tmp_path / "corpus", "c4_local", make_texts(20))
    whole = make(name, path, tmp_path / "whole")
    executioner.calls_left = 30
    with pytest.raises(Killed):
        make(name, path, tmp_path / "out")
    executioner.calls_left = None
    partial = json.loads((tmp_path / "out/train/manifest.partial.json").read_text())
    done = sum(shard["documents"] for shard in partial["shards"])
    assert 0 < done < 20

    texts = []
    encode = prepare_module.HuggingFaceTokenizer.encode

    def counted(self, text, **options):
        texts.append(text)
        return encode(self, text, **options)

    monkeypatch.setattr(prepare_module.HuggingFaceTokenizer, "encode", counted)
    assert make(name, path, tmp_path / "out") == whole
    assert texts == texts_in_order(name, path, "train")[done:]


def be_killed_with_workers() -> None:
    with ProcessPoolExecutor(2, initializer=prepare_module._live_as_long_as_the_parent) as pool:
        assert all(pool.map(abs, range(1, 5)))
        os.kill(os.getpid(), signal.SIGKILL)


def test_workers_do_not_outlive_a_kill():
    reading, writing = os.pipe()
    # The workers also hold the write end of the pipe.
    process = multiprocessing.get_context("fork").Process(target=be_killed_with_workers)
    process.start()
    os.close(writing)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert select.select([reading], [], [], 60)[0] == [reading]
    assert os.read(reading, 1) == b""
    os.close(reading)


@pytest.mark.parametrize("broken", [1, 2])
def test_a_file_that_was_repaired_is_read_anew(tmp_path, monkeypatch, broken):
    """A shard ends in the broken file, before the broken line. It is also written again."""
    monkeypatch.setattr(readers, "CHUNK_BYTES", 50)
    name, path = make_corpus(tmp_path / "corpus", "jsonl", make_texts(60), [])
    make(name, path, tmp_path / "whole")
    file = Path(path, f"{broken}.jsonl")
    whole = file.read_bytes()
    file.write_bytes(whole[:-3])
    with refused("--dataset-path", file.name, "line 20", "convert the files"):
        make(name, path, tmp_path / "out")
    partial = json.loads((tmp_path / "out/train/manifest.partial.json").read_text())
    assert partial["shards"][-1]["next"][0] == broken
    file.write_bytes(whole)
    make(name, path, tmp_path / "out")
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


# ---- checksums


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [flip, Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1])],
    ids=["flipped", "missing", "short"],
)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_damaged_shard_is_found_and_made_anew(tmp_path, split, damage):
    name, path = make_corpus(tmp_path / "corpus", "text", make_texts(20))
    for each in ("train", "validation"):
        make(name, path, tmp_path / "out", split=each, shard_size=30)
    assert [manifest.split for manifest in verify(tmp_path / "out")] == ["train", "validation"]
    expected = bytes_of(tmp_path / "out")
    shard = tmp_path / "out" / split / "00000.bin"
    damage(shard)
    with refused("--output", str(shard), "checksum", "remove the file"):
        verify(tmp_path / "out")
    shard.unlink(missing_ok=True)
    make(name, path, tmp_path / "out", split=split, shard_size=30)
    assert bytes_of(tmp_path / "out") == expected
    verify(tmp_path / "out")


# ---- refusals: the corpus


def test_refuses_a_file_that_cannot_be_read(tmp_path, corpus):
    Path(corpus, "b.jsonl").symlink_to(tmp_path / "nowhere")
    with refused("--dataset-path", "b.jsonl", "No such file", "replace or remove"):
        make("jsonl", corpus, tmp_path / "out")


@pytest.mark.parametrize("content", ["", '\n{"text": ""}\n{"text": null}\n'], ids=["none", "blank"])
def test_refuses_a_corpus_without_text(tmp_path, content):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.jsonl").write_text(content)
    with refused("--dataset-path", "train split", str(tmp_path / "corpus"), "add"):
        make("jsonl", str(tmp_path / "corpus"), tmp_path / "out")
    assert not (tmp_path / "out/train/manifest.json").exists()


# ---- refusals: the rest


@pytest.mark.parametrize("is_ended", [True, False], ids=["ended", "begun"])
def test_refuses_a_folder_of_other_data(tmp_path, corpus, is_ended):
    out = tmp_path / "out"
    make("jsonl", corpus, out)
    if not is_ended:
        (out / "train/manifest.json").rename(out / "train/manifest.partial.json")
    other = tmp_path / "other"
    shutil.copytree(BYTE_TOKENIZER_PATH, other)
    config = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps({**config, "add_eos_token": False}))
    before = bytes_of(out)
    for arguments, options, parts in (
        (("jsonl", corpus, out, str(other)), {}, ("this --tokenizer",)),
        (("jsonl", corpus, out), {"shard_size": 200}, ("this --shard-size", "100", "200")),
        (("parquet", corpus, out), {}, ("this --dataset", "'jsonl'", "'parquet'")),
    ):
        if arguments[0] == "parquet":
            write_parquet(Path(corpus) / "a.parquet", "text", ["x"])
        with refused("--output must be a new folder", str(out), *parts, "another folder"):
            make(*arguments, **options)
    write_lines(Path(corpus) / "a.jsonl", make_texts(21))
    with refused("--output must be a new folder", str(out), "names and sizes"):
        make("jsonl", corpus, out)
    assert bytes_of(out) == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize("file", ["00001.partial", "manifest.partial.tmp", "manifest.tmp"])
def test_a_full_disk_is_told_and_a_second_call_goes_on(tmp_path, corpus, file, monkeypatch):
    make("jsonl", corpus, tmp_path / "whole")

    def open_full(path):
        return open("/dev/full", "wb") if path.name == file else open_new(path)

    open_new = atomic_json.open_new
    for module in (partial_shard, atomic_json):
        monkeypatch.setattr(module, "open_new", open_full)
    with refused("--output", str(tmp_path / "out"), "No space left", "make room"):
        make("jsonl", corpus, tmp_path / "out")
    monkeypatch.undo()
    make("jsonl", corpus, tmp_path / "out")
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


# ---- the command line


def test_the_command_prepares_both_splits_and_verifies(tmp_path, capsys):
    name, path = make_corpus(tmp_path / "corpus", "c4_local", make_texts(20))
    out = ["--output", str(tmp_path / "out")]
    main([*out, "--dataset", name, "--dataset-path", path, "--shard-size", "100"])
    printed = capsys.readouterr().out.splitlines()
    # Without a terminal, there is a line for each shard.
    assert printed[0].startswith("train/00000.bin: ")
    assert printed[-3].startswith("train: ") or printed[-2].startswith("validation/")
    assert printed[-1].startswith("validation: ") and "3 documents in 1 shards" in printed[-1]
    main([*out, "--verify"])
    assert "as they were written" in capsys.readouterr().out.splitlines()[-1]
    flip(tmp_path / "out/validation/00000.bin")
    with pytest.raises(SystemExit) as exit:
        main([*out, "--verify"])
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --output must hold") and error.count("\n") == 1


def test_the_command_checks_both_splits_first(tmp_path, capsys):
    write_shards(tmp_path, "train", make_texts(3), 1)
    out = tmp_path.parent / f"{tmp_path.name}-out"
    with pytest.raises(SystemExit):
        main(["--output", str(out), "--dataset", "c4_local", "--dataset-path", str(tmp_path)])
    assert "c4-validation" in capsys.readouterr().err
    assert not out.exists()
