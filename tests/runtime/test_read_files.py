"""Reading any file returns a value of the requested type, or raises one line."""

import dataclasses
import os
from pathlib import Path

import pytest
from refusals import refused
from torchtitan.experiments.lighthouse.runtime import read_files
from torchtitan.experiments.lighthouse.runtime.atomic_json import open_new, write_json
from torchtitan.experiments.lighthouse.runtime.command_line import open_tokenizer
from torchtitan.experiments.lighthouse.runtime.read_files import (
    is_a,
    read_bytes,
    read_json,
    read_record,
    read_toml,
)

BAD = {
    "empty": b"",
    "not UTF-8": b'{"a": "\xff"}',
    "not JSON": b"{",
    "nested too deeply": b"[" * 100_000,
    "another nesting": b'{"a":' * 100_000,
    "thousands of digits": b'{"a": ' + b"9" * 10_000 + b"}",
    "a list": b"[1]",
    "null": b"null",
    "a NUL": b"\0",
}


# An empty file and a table header are TOML.
NOT_TOML = [name for name in BAD if name not in ("empty", "a list")]


@pytest.mark.parametrize(
    ("read", "name"),
    [*((read_json, name) for name in BAD), *((read_toml, name) for name in NOT_TOML)],
)
def test_bad_content_is_one_line(tmp_path, name, read):
    (tmp_path / "file").write_bytes(BAD[name])
    with pytest.raises(ValueError, match=str(tmp_path / "file")) as error:
        read(tmp_path / "file")
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, reason in (
        ("folder", "a folder"),
        ("pipe", "a pipe"),
        ("loop", "symbolic links"),
        ("none", "No such file"),
    ):
        with pytest.raises(ValueError, match=reason):
            read_json(tmp_path / name)


def test_a_file_that_is_too_long_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"123456")
    assert read_bytes(tmp_path / "file", 6) == b"123456"
    with pytest.raises(ValueError, match="has more than 5 bytes"):
        read_bytes(tmp_path / "file", 5)


def test_a_parser_without_memory_is_one_line(tmp_path, monkeypatch):
    def fail(text):
        raise MemoryError

    (tmp_path / "file").write_text("{}")
    monkeypatch.setattr(read_files.json, "loads", fail)
    with pytest.raises(ValueError, match="not enough memory"):
        read_json(tmp_path / "file")


@dataclasses.dataclass
class Record:
    name: str
    sizes: list[int]
    share: float | None


@pytest.mark.parametrize(
    "values",
    [
        {"name": 1, "sizes": [], "share": None},
        {"name": "a", "sizes": [1.5], "share": None},
        {"name": "a", "sizes": [True], "share": 1},
        {"name": "a", "sizes": [], "share": "b"},
        {"name": "a", "sizes": []},
        {"name": "a", "sizes": [], "share": 1, "more": 2},
        ["name", "sizes", "share"],
    ],
)
def test_a_record_of_other_fields_or_types_is_refused(values):
    with pytest.raises(ValueError):
        read_record(values, Record)


def test_a_record_of_the_right_types_is_read():
    values = {"name": "a", "sizes": [1, 2], "share": 0.5}
    assert read_record(values, Record) == Record(**values)
    assert is_a({"a": [1, 2]}, dict[str, list[int]]) and not is_a({"a": "b"}, dict[str, list[int]])


def test_a_link_in_the_place_of_a_file_that_is_written_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("kept")
    (tmp_path / "handover.tmp").symlink_to(victim)
    write_json(tmp_path / "handover.json", {"step": 1})
    assert victim.read_text() == "kept"
    assert read_json(tmp_path / "handover.json") == {"step": 1}
    (tmp_path / "shard").symlink_to(victim)
    with open_new(tmp_path / "shard") as file:
        file.write(b"new")
    assert victim.read_text() == "kept" and (tmp_path / "shard").read_text() == "new"


@pytest.mark.parametrize(
    "tokenizer, settings",
    [
        ("[" * 10_000, "{}"),
        ('{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}', "{}"),
        (None, '{"bos_token": 5}'),
        (None, '{"added_tokens_decoder": {"x": {"content": "a"}}}'),
        (None, "[" * 10_000),
    ],
)
def test_a_tokenizer_that_training_could_not_open_is_refused(tmp_path, tokenizer, settings):
    from torchtitan.experiments.lighthouse.data.byte_tokenizer import BYTE_TOKENIZER_PATH

    right = Path(BYTE_TOKENIZER_PATH, "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(tokenizer or right)
    (tmp_path / "tokenizer_config.json").write_text(settings)
    with refused("must hold a readable tokenizer"):
        open_tokenizer("--tokenizer", tmp_path)
