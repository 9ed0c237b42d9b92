"""Changes of files between two starts are noticed, before and after the data position."""

import hashlib
import itertools
import os
from pathlib import Path

import numpy as np
import pytest
from refusals import refused
from test_data import SEQ_LEN, assert_same, make_dataset, make_texts, take
from test_tokenized import write_tokenized
from torchtitan.experiments.lighthouse.data import long_documents, readers
from torchtitan.experiments.lighthouse.data.byte_tokenizer import BYTE_TOKENIZER_PATH
from torchtitan.experiments.lighthouse.data.datasets import check_dataset
from torchtitan.experiments.lighthouse.data.long_documents import parts_of
from torchtitan.experiments.lighthouse.data.readers import stat_files
from torchtitan.experiments.lighthouse.data.source_changes import SAMPLE_BYTES, file_prints
from torchtitan.experiments.lighthouse.data.tokenize import prepare
from torchtitan.experiments.lighthouse.data.tokenized import TokenizedDataset


def write_lines(folder: Path) -> list[Path]:
    """Three files of equal size and other content."""
    paths = []
    for number in range(3):
        texts = [f"{number} {text[:4]:<4}" for text in make_texts(9)]
        paths.append(folder / f"{number}.jsonl")
        paths[-1].write_text("".join(f'{{"text": "{t.encode().hex()[:14]}"}}\n' for t in texts))
    assert len({path.stat().st_size for path in paths}) == 1
    return paths


def exchange(one: Path, other: Path) -> None:
    one.rename(one.with_suffix(".away"))
    other.rename(one)
    one.with_suffix(".away").rename(other)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda a, b, c: exchange(a, c), "0.jsonl' with other content, and 1 other"),
        (lambda a, b, c: exchange(b, c), "1.jsonl' with other content, and 1 other"),
        (lambda a, b, c: c.write_text(c.read_text()[:60]), "2.jsonl' with other content;"),
    ],
    ids=["read-and-unread", "both-ahead", "unread-cut-short"],
)
def test_files_that_change_places_or_end_early_stop_the_run(tmp_path, change, what):
    paths = write_lines(tmp_path)
    dataset = make_dataset("jsonl", str(tmp_path))
    take(dataset, 2)
    state = dataset.state_dict()
    make_dataset("jsonl", str(tmp_path), state)
    change(*paths)
    rule = "training.dataset_path must hold the files of the checkpoint's data position"
    with refused(f"{rule}, got '{tmp_path}/{what}"):
        make_dataset("jsonl", str(tmp_path), state)
    make_dataset("jsonl", str(tmp_path), state, accepts_changes=True)


def test_prepared_shards_that_change_places_stop_the_run(tmp_path):
    path = write_tokenized(tmp_path, 300)
    dataset = TokenizedDataset(path, SEQ_LEN)
    state = dataset.state_dict()
    TokenizedDataset(path, SEQ_LEN).load_state_dict(state)
    # A checkpoint of a version without prints.
    TokenizedDataset(path, SEQ_LEN).load_state_dict(state | {"corpus": state["corpus"][:64]})
    shards = sorted(Path(path, "train").glob("*.bin"))
    exchange(*shards[1:])
    with pytest.raises(ValueError, match=rf"{shards[1].name}' with other content, and 1 other"):
        TokenizedDataset(path, SEQ_LEN).load_state_dict(state)


def test_ids_beyond_those_of_the_manifest_are_refused(tmp_path):
    path = write_tokenized(tmp_path, 300)
    shard = Path(path, "train", "00001.bin")
    tokens = np.fromfile(shard, "<u2")
    tokens[:] = 60_000
    tokens.tofile(shard)
    dataset = TokenizedDataset(path, SEQ_LEN)
    with pytest.raises(ValueError, match=r"ids up to 199, got 60000 in .*00001\.bin'"):
        for place in range(300 // SEQ_LEN):
            dataset[place]


def test_a_long_file_is_sampled_at_both_ends_and_in_its_middle(tmp_path):
    path = tmp_path / "long"
    content = bytearray(10 * SAMPLE_BYTES)
    path.write_bytes(content)
    former = file_prints(stat_files([path], "lines", "field"))
    for place in (0, len(content) // 2, len(content) - 1):
        changed = content.copy()
        changed[place] = 1
        path.write_bytes(changed)
        assert file_prints(stat_files([path], "lines", "field")) != former


# ---- long documents


def test_the_parts_of_a_document_are_the_document(monkeypatch):
    monkeypatch.setattr(long_documents, "PART_CHARS", 2000)
    for text in ("", "short", "a" * 9000, "word " * 3000, "é\n" * 5000):
        parts = list(parts_of(text))
        assert "".join(parts) == text and max(map(len, parts)) <= 2000
    assert all(part.startswith(" ") for part in list(parts_of("word " * 3000))[1:])


def test_a_document_in_parts_gives_the_same_windows_and_resumes_within(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    text = "".join(map(chr, rng.integers(97, 123, 30_000)))
    (tmp_path / "a.jsonl").write_text(f'{{"text": "{text}"}}\n{{"text": "{text[::-1]}"}}\n')
    monkeypatch.setattr(
        "torchtitan.experiments.lighthouse.data.documents.is_held_out", lambda text: False
    )
    whole = take(make_dataset("jsonl", str(tmp_path)), 5000)
    monkeypatch.setattr(long_documents, "PART_CHARS", 1000)
    dataset = make_dataset("jsonl", str(tmp_path))
    windows, states = [], []
    for window in itertools.islice(dataset, 5000):
        windows.append(window)
        states.append(dataset.state_dict())
    assert_same(windows, whole)
    assert max(len(state["buffer"]) for state in states) < 4 * 1100
    for step in (1, 100, 2500):
        resumed = make_dataset("jsonl", str(tmp_path), states[step - 1])
        assert_same(take(resumed, 200), whole[step : step + 200])


def test_a_document_that_is_too_long_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(long_documents, "MAX_DOCUMENT_BYTES", 100)
    monkeypatch.setattr(readers, "MAX_DOCUMENT_BYTES", 100)
    (tmp_path / "a.jsonl").write_text('{"text": "short"}\n{"text": "' + 200 * "a" + '"}\n')
    with pytest.raises(ValueError, match=r"at most 100 bytes, got a longer one in .* line 2:"):
        take(make_dataset("jsonl", str(tmp_path)), 9)
    (tmp_path / "a.txt").write_text("a" * 200)
    with pytest.raises(ValueError, match=r"at most 100 bytes, got a longer one in .*a\.txt'"):
        make_dataset("text", str(tmp_path))


@pytest.mark.parametrize("name", ["text", "jsonl"])
def test_a_pipe_among_the_files_is_refused_and_not_waited_for(tmp_path, name):
    suffix = {"text": "txt", "jsonl": "jsonl"}[name]
    os.mkfifo(tmp_path / f"a.{suffix}")
    with pytest.raises(ValueError, match=r"must hold regular files: .* is a pipe"):
        check_dataset(name, str(tmp_path))
    with pytest.raises(ValueError, match=r"is a pipe"):
        prepare(name, str(tmp_path), tmp_path.parent / "out", BYTE_TOKENIZER_PATH)
    assert not (tmp_path.parent / "out").exists()


def test_a_loop_of_links_is_refused_at_once(tmp_path, monkeypatch):
    (tmp_path / "a.txt").symlink_to(tmp_path / "a.txt")
    with pytest.raises(ValueError, match="Too many levels of symbolic links"):
        check_dataset("text", str(tmp_path))
    (tmp_path / "b.txt").write_text("text")
    (tmp_path / "out").symlink_to(tmp_path / "out")
    with pytest.raises(ValueError, match=r"--output must be "):
        prepare("text", str(tmp_path / "b.txt"), tmp_path / "out", BYTE_TOKENIZER_PATH)


def test_two_preparations_into_one_folder_are_refused(tmp_path, monkeypatch):
    from torchtitan.experiments.lighthouse.runtime import run_lock

    monkeypatch.setattr(run_lock.FolderLock.__init__, "__defaults__", (0,))
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text(make_texts(1)[0])
    with (
        run_lock.FolderLock("--output", tmp_path / "out"),
        pytest.raises(ValueError, match=r"--output must be written by one run at a time"),
    ):
        prepare("text", str(tmp_path / "corpus"), tmp_path / "out", BYTE_TOKENIZER_PATH)
    manifest = prepare("text", str(tmp_path / "corpus"), tmp_path / "out", BYTE_TOKENIZER_PATH)
    shard = tmp_path / "out" / "train" / manifest.shards[0].file
    assert hashlib.sha256(shard.read_bytes()).hexdigest() == manifest.shards[0].sha256
