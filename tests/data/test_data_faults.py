"""Data faults: retries, errors that end a run, and no token lost or read twice.

The results are compared with undisturbed reads. Read errors are injected below Python's files, in
the reads of their descriptors. Errors of the hub are injected into a stream of `datasets`.
"""

import errno
import functools
import gzip
import importlib
import io
import itertools
import json
import logging
import os
import random
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from refusals import refused
from test_data import (
    KINDS,
    SEQ_LEN,
    TOKENIZER,
    assert_same,
    documents_of,
    make_config,
    make_corpus,
    make_dataset,
    make_texts,
    stream_of,
    take,
    write_parquet,
)
from test_tokenized import write_tokenized
from torchtitan.experiments.lighthouse.data import readers, retry, tokenized
from torchtitan.experiments.lighthouse.data.byte_tokenizer import BYTE_TOKENIZER_PATH
from torchtitan.experiments.lighthouse.data.datasets import check_dataset, find_files
from torchtitan.experiments.lighthouse.data.loaders import build_dataloader
from torchtitan.experiments.lighthouse.data.retry import TransientReadError, retrying
from torchtitan.experiments.lighthouse.data.tokenize import prepare
from torchtitan.experiments.lighthouse.data.tokenized import TokenizedDataset


@pytest.fixture(autouse=True)
def waits(monkeypatch) -> list[float]:
    """The recorded waiting times. The test does not really wait."""
    waits = []
    monkeypatch.setattr(retry, "sleep", waits.append)
    return waits


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(readers, "CHUNK_BYTES", 50)
    monkeypatch.setattr(readers, "CHUNK_ROWS", 3)


def write_any(folder: Path, kind: str) -> tuple[list[Path], Callable]:
    """Write a corpus or tokenized data. Returns the files and a function that opens a dataset."""
    if kind == "tokenized":
        path = write_tokenized(folder, 1000)
        return sorted(Path(path, "train").glob("*.bin")), lambda: TokenizedDataset(path, SEQ_LEN)
    name, path = make_corpus(folder, kind, make_texts(40))
    return find_files(name, path), functools.partial(make_dataset, name, path)


# ---- trying again


class Flaky:
    """Read the numbers from 0 to 9, with an error before each listed number."""

    def __init__(self, *breaks: int) -> None:
        self.breaks, self.starts = list(breaks), []

    def __call__(self, start: int):
        self.starts.append(start)
        for number in range(start, 10):
            if self.breaks and self.breaks[0] == number:
                self.breaks.pop(0)
                raise TransientReadError("training.dataset must hold, got an error", "mend it")
            yield number, number + 1


def test_a_read_goes_on_behind_its_last_value_after_longer_and_longer_waits(waits, caplog):
    flaky = Flaky(0, 3, 3, 3, 3, 4, 9)
    with caplog.at_level(logging.WARNING):
        assert list(retrying(flaky, 0)) == [(n, n + 1) for n in range(10)]
    assert flaky.starts == [0, 0, 3, 3, 3, 3, 4, 9]
    # After a value, the next wait is short again.
    assert waits == [1, 1, 2, 4, 8, 1, 1]
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == len(waits)
    assert warnings[4] == "training.dataset must hold, got an error: try 5 of 5 in 8 s"


def test_the_fifth_failure_in_a_row_ends_it(waits):
    flaky = Flaky(2, *[3] * 5)
    values = []
    with refused("training.dataset must hold", "5th time in a row", ": mend it"):
        values.extend(retrying(flaky, 0))
    assert values == [(0, 1), (1, 2), (2, 3)]
    assert waits == [1, 1, 2, 4, 8]


# ---- every token, with errors of reading and kills


class FlakyFile(io.FileIO):
    """A file whose reads fail at random, as on a network file system."""

    errors = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET)
    reads_left = itertools.repeat(10**9)
    left, failed = 10**9, 0

    @classmethod
    def fail_at(cls, reads) -> None:
        """Make reads fail at these distances from each other."""
        cls.reads_left, cls.failed = iter(reads), 0
        cls.left = next(cls.reads_left)

    @classmethod
    def count(cls) -> None:
        cls.left -= 1
        if cls.left < 0:
            cls.left = next(cls.reads_left, 10**9)
            cls.failed += 1
            number = cls.errors[cls.failed % len(cls.errors)]
            raise OSError(number, os.strerror(number))

    def readinto(self, buffer):
        self.count()
        return super().readinto(buffer)

    def readall(self):
        self.count()
        return super().readall()

    def read(self, size=-1):
        self.count()
        return super().read(size)


@pytest.fixture
def flaky_files(monkeypatch):
    def flaky_open(path, mode):
        assert mode == "rb"
        FlakyFile.count()
        return io.BufferedReader(FlakyFile(path), 64)

    for module in (readers, tokenized):
        monkeypatch.setattr(module, "open", flaky_open, raising=False)
    yield FlakyFile
    FlakyFile.fail_at([10**9])


@pytest.mark.parametrize("dp_world_size", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_every_token_comes_once_and_in_order_whatever_happens(
    tmp_path, kind, dp_world_size, flaky_files, waits
):
    """Read errors at random places, and kills at random windows, also in the last epoch."""
    train = make_texts(24)
    name, path = make_corpus(tmp_path, kind, train)
    rng = random.Random(f"{kind} {dp_world_size}")
    documents, num_kills, num_failed = [], 0, 0
    for dp_rank in range(dp_world_size):
        share = {"dp_rank": dp_rank, "dp_world_size": dp_world_size}
        flaky_files.fail_at([10**9])
        # One epoch to count the reads, and six epochs in sequence.
        dataset = make_dataset(name, path, infinite=False, **share)
        tokens = stream_of(dataset)
        left = torch.frombuffer(bytearray(dataset.state_dict()["buffer"]), dtype=torch.int32)
        assert not tokens or tokens[-1] == left[0]
        read = documents_of([*tokens, *left.tolist()[bool(tokens) :]])
        assert abs(len(read) - len(train) / dp_world_size) < 4
        documents += read
        count = 6 * max(1, len(tokens) // SEQ_LEN)
        expected = take(make_dataset(name, path, **share), count)

        flaky_files.fail_at(rng.randrange(8, 50) for _ in itertools.count())
        seen, state = [], None
        while len(seen) < count:
            dataset = make_dataset(name, path, state, **share)
            # A kill loses this object and everything after the last window.
            for window in take(dataset, min(rng.randrange(1, 8), count - len(seen))):
                seen.append(window)
            state = dataset.state_dict()
            num_kills += 1
        assert_same(seen, expected)
        num_failed += flaky_files.failed
    # No document is left out or read by two ranks.
    assert Counter(documents) == Counter(train)
    assert num_kills > 6 and num_failed >= 5 and len(waits) == num_failed


def test_every_window_of_prepared_data_comes_once(tmp_path, flaky_files, waits):
    path = write_tokenized(tmp_path, 1000)
    expected = take(build_dataloader(1, 0, TOKENIZER, make_config("tokenized", path)), 70)
    rng = random.Random(0)
    flaky_files.fail_at(rng.randrange(2, 9) for _ in itertools.count())
    seen, state = [], {}
    while len(seen) < 70:
        loader = build_dataloader(1, 0, TOKENIZER, make_config("tokenized", path))
        loader.load_state_dict(state)
        seen += take(loader, min(rng.randrange(1, 9), 70 - len(seen)))
        state = loader.state_dict()
    assert_same(seen, expected)
    assert flaky_files.failed > 20 and waits
    labels = Counter(label for _, labels in seen[:63] for label in labels.flatten().tolist())
    assert set(labels) == set(range(1000)) and max(labels.values()) <= 3


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet", "c4_local", "tokenized"])
def test_a_file_that_cannot_be_read_ends_the_run_after_five_attempts(
    tmp_path, kind, flaky_files, waits
):
    _, open_dataset = write_any(tmp_path, kind)
    dataset = open_dataset()
    windows = iter(dataset)
    seen = take(windows, 2)
    state = dataset.state_dict()
    flaky_files.fail_at([0] * 5)
    with refused(
        *("training.dataset_path must hold files that can be read", str(tmp_path), "[Errno "),
        *("5th time in a row", "restore the file or its file system", "last checkpoint"),
    ):
        seen += windows
    assert waits == [1, 2, 4, 8]
    if kind != "tokenized":
        resumed = take(open_dataset(state), len(seen))
        assert_same(resumed[: len(seen) - 2], seen[2:])
        resumed = take(open_dataset(dataset.state_dict()), 5)
        assert_same(resumed, take(open_dataset(), len(seen) + 5)[len(seen) :])


# ---- what a file holds


def gz(path: Path, lines: list[bytes]) -> None:
    path.write_bytes(gzip.compress(b"".join(lines)))


def plain(path: Path, lines: list[bytes]) -> None:
    path.write_bytes(b"".join(lines))


def table(path: Path, lines: list[bytes]) -> None:
    # Not compressed, so that each byte belongs to a text.
    import pyarrow
    import pyarrow.parquet

    rows = [json.loads(line)["text"] for line in lines]
    pyarrow.parquet.write_table(
        pyarrow.table({"text": rows}), path, compression="none", use_dictionary=False
    )


def replace_line(line: bytes):
    def damage(path: Path) -> None:
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join([*lines[:4], line + b"\n", *lines[5:]]))

    return damage


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def cut_last_line(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def put_byte(path: Path) -> None:
    """Change one byte of a text."""
    content = path.read_bytes()
    at = content.index(b"MARK")
    path.write_bytes(content[:at] + b"\xff" + content[at + 1 :])


def gunzip(path: Path) -> None:
    path.write_bytes(gzip.decompress(path.read_bytes()))


def flip_checksum(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-6] ^= 1
    path.write_bytes(bytes(content))


def write_integers(path: Path) -> None:
    write_parquet(path, "text", list(range(9)))


def rename_column(path: Path) -> None:
    write_parquet(path, "content", ["x"])


def write_garbage(path: Path) -> None:
    path.write_bytes(b"garbage " * 99)


JSON_RULE = ("one JSON object with a 'text' per line", "convert the files")
REPLACE = "replace it, and start the same run again"
READABLE = ("must hold readable files", REPLACE)

FAULTS = {
    "json-truncated": ("jsonl", cut_last_line, (" line 9", *JSON_RULE)),
    "json-no-object": ("jsonl", replace_line(b"[1, 2]"), ("'[1, 2]'", " line 5")),
    "json-no-json": ("jsonl", replace_line(b"so\x00 what"), (" line 5", *JSON_RULE)),
    "json-without-text": ("jsonl", replace_line(b'{"txt": "x"}'), ('{"txt"', " line 5")),
    "json-number": ("jsonl", replace_line(b'{"text": 3}'), (" line 5", *JSON_RULE)),
    "json-list": ("jsonl", replace_line(b'{"text": ["a"]}'), (" line 5", *JSON_RULE)),
    "json-deep": ("jsonl", replace_line(b"[" * 99999), (" line 5", *JSON_RULE)),
    "json-not-utf8": ("jsonl", put_byte, ("UTF-8", "byte 0xff", " line 5", "convert")),
    "gzip-torn": ("c4_local", cut, (" line ", "end-of-stream", *READABLE)),
    "gzip-checksum": ("c4_local", flip_checksum, (" line 10", "CRC", *READABLE)),
    "gzip-garbage": ("c4_local", write_garbage, (" line 1:", "gzip", *READABLE)),
    "gzip-plain": ("c4_local", gunzip, (" line 1:", "gzip", *READABLE)),
    "parquet-torn": ("parquet", cut, (" row 1:", *READABLE)),
    "parquet-garbage": ("parquet", write_garbage, (" row 1:", *READABLE)),
    "parquet-integers": ("parquet", write_integers, (" row ", "got ", "convert the column")),
    "parquet-column": ("parquet", rename_column, ("column 'text'", "name the column of the text")),
    "parquet-not-utf8": ("parquet", put_byte, ("UTF-8", "0xff", " row 5", "convert")),
}
FORMATS = {
    "jsonl": ("{}.jsonl", plain),
    "c4_local": ("c4-train.{}.json.gz", gz),
    "parquet": ("{}.parquet", table),
}


def write_files(folder: Path, kind: str) -> list[Path]:
    """Write 4 files of 9 rows. Every fifth row has a mark."""
    name, write = FORMATS[kind]
    paths = [folder / name.format(i) for i in range(4)]
    texts = iter(make_texts(36))
    for path in paths:
        rows = [f"{next(texts)}{' MARK' * (row == 4)}" for row in range(9)]
        write(path, [json.dumps({"text": text}).encode() + b"\n" for text in rows])
    return paths


@pytest.mark.parametrize("dp_world_size", [1, 2, 3])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_file_ends_the_run_and_once_repaired_it_goes_on(
    tmp_path, waits, caplog, fault, dp_world_size
):
    kind, damage, parts = FAULTS[fault]
    path = write_files(tmp_path, kind)[2]
    whole, share = path.read_bytes(), {"dp_rank": 0, "dp_world_size": dp_world_size}
    damage(path)
    assert path.read_bytes() != whole

    # A rank that does not use the row must not fail on it.
    with refused("training.dataset_path", str(path), *parts):
        for dp_rank in range(dp_world_size):
            share["dp_rank"] = dp_rank
            dataset, seen, states = make_dataset(kind, str(tmp_path), **share), [], []
            for window in itertools.islice(dataset, 60):
                seen.append(window)
                states.append(dataset.state_dict())
    # A retry would not help.
    assert waits == []
    # Preparing the corpus names the same place, and leaves nothing behind.
    out = tmp_path.with_suffix(".out")
    remedy = "replace or remove the file and start the same command again"
    parts = [remedy if part == REPLACE else part for part in parts]
    with refused("--dataset-path", str(path), *parts):
        prepare(kind, str(tmp_path), out, BYTE_TOKENIZER_PATH, workers=dp_world_size)
    assert not out.exists()
    states.append(dataset.state_dict())
    path.write_bytes(whole)
    expected = take(make_dataset(kind, str(tmp_path), **share), 60)
    assert 0 < len(seen) < 60
    assert_same(seen, expected[: len(seen)])
    with refused("training.dataset_path", str(path), "other content", "accept_changes"):
        make_dataset(kind, str(tmp_path), states[-1], **share)
    for step, state in ((len(seen) - 2, states[-4]), (len(seen), states[-1])):
        resumed = make_dataset(kind, str(tmp_path), state, accepts_changes=True, **share)
        assert_same(take(resumed, 60 - step), expected[step:])
    assert "the rest of the data is read from the present files" in caplog.text


def test_the_rows_before_a_tear_are_read_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "CHUNK_BYTES", 2**20)
    path = tmp_path / "c4-train.0.json.gz"
    texts = [random.Random(i).randbytes(100).hex() for i in range(40)]
    gz(path, [json.dumps({"text": text}).encode() + b"\n" for text in texts])
    cut(path)
    whole = zlib.decompressobj(wbits=31).decompress(path.read_bytes()).count(b"\n")
    assert 10 < whole < 30
    seen = []
    with refused(f"{str(path)!r} line {whole + 1}: ", "end-of-stream"):
        for text, _ in make_dataset("c4_local", str(tmp_path))._documents.read(0, 0, 0, None):
            seen.append(text)
    assert seen == texts[:whole]


@pytest.mark.parametrize("kind", ["parquet", "c4_local"])
def test_refuses_a_file_of_0_bytes_at_the_start(tmp_path, kind):
    path = write_files(tmp_path, kind)[2]
    check_dataset(kind, str(tmp_path))
    path.write_bytes(b"")
    with refused("training.dataset_path", str(path), "0 bytes", "replace or remove"):
        check_dataset(kind, str(tmp_path))
    with refused("--dataset-path", str(path), "0 bytes", "replace or remove"):
        prepare(kind, str(tmp_path), tmp_path.with_suffix(".out"), BYTE_TOKENIZER_PATH)


def test_an_empty_file_of_lines_is_left_out(tmp_path):
    path = write_files(tmp_path, "jsonl")[2]
    path.write_bytes(b"")
    documents = make_dataset("jsonl", str(tmp_path))._documents.read(0, 0, 0, None)
    assert len(list(documents)) == 27


def test_refuses_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    """The run must not train on the other files."""
    write_files(tmp_path, "jsonl")
    (tmp_path / "sub").mkdir()
    listed = os.scandir

    def scandir(path):
        if Path(path).name == "sub":
            raise OSError(errno.EIO, "Input/output error", str(path))
        return listed(path)

    check_dataset("jsonl", str(tmp_path))
    monkeypatch.setattr(os, "scandir", scandir)
    with refused("training.dataset_path", "folders that can be listed", "sub", "read"):
        check_dataset("jsonl", str(tmp_path))
    with refused("--dataset-path", "sub", "Input/output error"):
        prepare("jsonl", str(tmp_path), tmp_path.with_suffix(".out"), BYTE_TOKENIZER_PATH)


# ---- a file that changes while a run reads


def touch(path: Path) -> None:
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))


def rewrite(path: Path) -> None:
    """The file gets other content of the same size."""
    path.write_bytes(path.read_bytes()[::-1])
    touch(path)


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b'{"text": "more"}\n')


def exchange(path: Path) -> None:
    other = path.with_suffix(".other")
    other.write_bytes(path.read_bytes() + b"\n")
    os.replace(other, path)


CHANGES = [touch, rewrite, append, exchange, cut]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("kind", ["text", "jsonl", "c4_local", "parquet", "tokenized"])
def test_a_file_that_changes_ends_the_run(tmp_path, waits, kind, change):
    """The change is noticed before a token of the changed file is used."""
    files, open_dataset = write_any(tmp_path, kind)
    expected = take(open_dataset(), 100)
    dataset = open_dataset()
    windows = iter(dataset)
    seen = take(windows, 2)
    status = [(file.read_bytes(), file.stat()) for file in files]
    for file in files:
        change(file)
    with refused(
        *("training.dataset_path must hold files that stay as they are", str(tmp_path)),
        *("modified", "restore the file", "last checkpoint"),
    ):
        seen.extend(itertools.islice(windows, 98))
    assert waits == []
    assert len(seen) < 40
    assert_same(seen, expected[: len(seen)])
    for file, (content, former) in zip(files, status, strict=True):
        file.write_bytes(content)
        os.utime(file, ns=(former.st_atime_ns, former.st_mtime_ns))
    if kind != "tokenized":
        # Started again with the restored files.
        resumed = open_dataset(dataset.state_dict())
        assert_same(take(resumed, 100 - len(seen)), expected[len(seen) :])


@pytest.mark.parametrize("comes_back", [True, False])
@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet", "tokenized"])
def test_a_file_that_vanishes_is_waited_for(tmp_path, monkeypatch, kind, comes_back):
    files, open_dataset = write_any(tmp_path, kind)
    expected = take(open_dataset(), 50)
    windows = iter(open_dataset())
    waits = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if comes_back and seconds == 4:
            for file in files:
                file.with_suffix(".away").rename(file)

    monkeypatch.setattr(retry, "sleep", sleep)
    seen = take(windows, 2)
    for file in files:
        file.rename(file.with_suffix(".away"))
    if comes_back:
        seen += itertools.islice(windows, 48)
        assert waits == [1, 2, 4]
    else:
        with refused("training.dataset_path", str(tmp_path), "No such file", "5th time"):
            seen.extend(itertools.islice(windows, 48))
        assert waits == [1, 2, 4, 8]
    assert_same(seen, expected[: len(seen)])


def test_a_position_in_rows_that_are_no_longer_there_is_refused(tmp_path):
    path = write_files(tmp_path, "jsonl")[0]
    dataset = make_dataset("jsonl", str(tmp_path))
    for _ in dataset:
        cursor = dataset.state_dict()["cursor"]
        if cursor["rows"] > 4:
            break
    assert cursor["file"] == 0
    lines = path.read_bytes().splitlines(keepends=True)
    changed = [lines[1], lines[0], *lines[2:]]
    for content, is_good in ((lines, True), (lines[:4], False), (changed, False)):
        path.write_bytes(b"".join(content))
        resumed = make_dataset("jsonl", str(tmp_path), dataset.state_dict(), accepts_changes=True)
        if is_good:
            take(resumed, 1)
            continue
        with refused(
            *("training.dataset must be the one", str(path), "other rows", "restore the file"),
            'exclude_from_loading = ["dataloader"]',
        ):
            take(resumed, 1)


# ---- workers


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "tokenized"])
def test_the_error_of_a_worker_keeps_its_line(tmp_path, kind):
    if kind == "tokenized":
        write_tokenized(tmp_path, 1000)
        path = tmp_path / "train" / "00001.bin"
    else:
        path = write_files(tmp_path, kind)[2]
    whole, former = path.read_bytes(), path.stat()
    config = make_config(kind, str(tmp_path), num_workers=1)
    expected = take(build_dataloader(1, 0, TOKENIZER, config), 12)
    if kind != "tokenized":
        put_byte(path)
    loader = build_dataloader(1, 0, TOKENIZER, config)
    if kind == "tokenized":
        touch(path)
    seen, state = [], {}
    try:
        for batch in loader:
            seen.append(batch)
            state = loader.state_dict()
    # Keep only the text. While the error's frames hold the loader, it waits for its worker.
    except ValueError as error:
        message = str(error)
    assert message.startswith("training.dataset_path must hold ")
    assert str(path) in message and "\n" not in message
    path.write_bytes(whole)
    os.utime(path, ns=(former.st_atime_ns, former.st_mtime_ns))
    assert (kind != "tokenized") <= len(seen) < 12
    resumed = build_dataloader(1, 0, TOKENIZER, config)
    resumed.load_state_dict(state)
    if kind != "tokenized":
        try:
            take(resumed, 1)
        except ValueError as error:
            message = str(error)
        assert "with other content; restore them" in message and "\n" not in message
        config.checkpoint.accept_changes = ["training.dataset_path"]
        resumed = build_dataloader(1, 0, TOKENIZER, config)
        resumed.load_state_dict(state)
    assert_same(take(resumed, 12 - len(seen)), expected[len(seen) :])


# ---- the hub


def http_errors() -> list[Exception]:
    """Errors of the installed clients that a stream may use."""
    found = [
        ConnectionError("Server Disconnected"),
        TimeoutError("timed out"),
        EOFError("Compressed file ended before the end-of-stream marker was reached"),
    ]
    for module, names in {
        "requests.exceptions": ["ConnectionError", "ChunkedEncodingError", "ReadTimeout"],
        "httpx": ["ReadTimeout", "RemoteProtocolError", "ConnectError"],
        "httpx2": ["ReadTimeout", "RemoteProtocolError", "ConnectError"],
        "urllib3.exceptions": ["ProtocolError"],
        "http.client": ["RemoteDisconnected"],
        "aiohttp": ["ClientPayloadError"],
        "huggingface_hub.errors": ["OfflineModeIsEnabled", "XetDownloadError"],
    }.items():
        try:
            errors = importlib.import_module(module)
        except ImportError:
            continue
        found += [getattr(errors, name)("lost\nit") for name in names]
    return found


class Hub:
    """Replaces the hub below `datasets.load_dataset` by a stream over local files.

    The iteration raises the listed errors, each given as (rows since the last error, error).
    """

    def __init__(self, monkeypatch, folder: Path) -> None:
        import datasets

        self.texts = make_texts(40)
        folder.mkdir()
        for i in range(4):
            write_parquet(folder / f"{i}.parquet", "text", self.texts[i::4])
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        self.rows = datasets.load_dataset(
            "parquet", data_files=str(folder / "*.parquet"), split="train", streaming=True
        )
        self.errors, self.loads, self.asked = [], [], []
        self._read = datasets.IterableDataset.__iter__
        monkeypatch.setattr(datasets.IterableDataset, "__iter__", lambda rows: self._iterate(rows))
        monkeypatch.setattr(datasets, "load_dataset", self._load)

    def _load(self, *args, **options):
        self.asked.append((args, options))
        if self.loads:
            raise self.loads.pop(0)
        return self.rows

    def _iterate(self, rows):
        # The row at which an error is raised has been read, and the stream's state is after it.
        for count, row in enumerate(self._read(rows)):
            if self.errors and count >= self.errors[0][0]:
                raise self.errors.pop(0)[1]
            yield row


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Hub:
    return Hub(monkeypatch, tmp_path / "hub")


@pytest.mark.parametrize("dp_world_size", [1, 2, 3])
def test_a_stream_that_drops_goes_on_where_it_was(hub, waits, dp_world_size):
    errors = http_errors()
    assert len(errors) >= 12
    rng, documents = random.Random(dp_world_size), []
    for dp_rank in range(dp_world_size):
        share = {"dp_rank": dp_rank, "dp_world_size": dp_world_size}
        hub.errors = []
        dataset = make_dataset("c4", None, infinite=False, **share)
        documents += [text for text, _ in dataset._documents.read(0, 0, 0, None)]
        expected = take(make_dataset("c4", None, **share), 90)
        hub.errors = [(rng.randrange(1, 5), error) for error in errors]
        hub.loads = [ConnectionError("offline"), TimeoutError()]
        waits.clear()
        seen, state = [], None
        while len(seen) < 90:
            dataset = make_dataset("c4", None, state, **share)
            seen += take(dataset, min(rng.randrange(1, 20), 90 - len(seen)))
            state = dataset.state_dict()
        assert_same(seen, expected)
        assert hub.errors == hub.loads == []
        assert len(waits) == len(errors) + 2
    assert Counter(documents) == Counter(hub.texts)
    assert hub.asked[0] == (("allenai/c4", "en"), {"split": "train", "streaming": True})


def test_a_stream_that_stays_away_ends_the_run(hub, waits):
    dataset = make_dataset("c4", None)
    expected = take(dataset, 20)
    windows = iter(dataset)
    seen = take(windows, 3)
    hub.errors = [(0, ConnectionError("Server\nDisconnected"))] * 9
    with refused(
        *("training.dataset must be a stream that can be read", "'c4'", "5th time in a row"),
        *("ConnectionError: Server Disconnected", "check the network and start the same run again"),
        "'c4_local'",
    ):
        # Errors in a row, without a document in between.
        while True:
            seen.append(next(windows))
            dataset = make_dataset("c4", None, dataset.state_dict())
            windows = iter(dataset)
    assert waits == [1, 2, 4, 8]
    hub.errors = []
    resumed = make_dataset("c4", None, dataset.state_dict())
    assert_same(take(resumed, 20 - len(seen)), expected[len(seen) :])


def test_a_stream_that_is_broken_is_not_tried_again(hub, waits):
    import pyarrow

    for broken in (pyarrow.ArrowInvalid("JSON parse error\nin row 3"), zlib.error("-3")):
        hub.errors = [(4, broken)]
        with refused("training.dataset must be a stream", "'c4'", type(broken).__name__):
            take(make_dataset("c4", None), 90)
    assert waits == []
