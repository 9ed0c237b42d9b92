"""The corpora: where their files lie, how they are read, and which documents are held out.

A document is one file (`python_stdlib`, `text`), one JSON line (`jsonl`, `c4_local`), or one row
(`parquet`, `c4`); one without text is left out; `prepared` holds no documents, but tokens already
(`tokenized.py`). C4 brings a validation split of its own. Everywhere
else a document is held out iff the CRC-32 of its UTF-8 bytes is divisible by 32, so copies of a
document fall on one side, and the split depends neither on their order nor on the number of ranks.

`read(seed, epoch, consumed, cursor)` of `ShuffledDocuments`, `FileDocuments` and `HubDocuments`
yields pairs (text, cursor). Called with the count and the cursor of a pair, it goes on with the
pair after it. What cannot be read is tried again or told as `retry.py` says; a file that is not
as it was when the corpus was opened ends the run.
"""

import difflib
import fnmatch
import functools
import os
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from torchtitan.experiments.lighthouse.data.readers import TEXT_COLUMN, SourceFile, stat_files
from torchtitan.experiments.lighthouse.data.retry import TransientReadError, retrying
from torchtitan.experiments.lighthouse.data.source_changes import (
    check_prints,
    file_prints,
    pack_prints,
)

# About 3 % of the documents: enough for a stable loss, little taken from a small corpus.
HELD_OUT_MODULUS = 32

SECTIONS = {"train": "training", "validation": "validation"}
"""The TOML section that configures each split."""

# Left out of the standard library: other packages, its tests, and tables.
_STDLIB_LEFT_OUT = {
    *("site-packages", "dist-packages"),
    *("test", "tests", "idle_test"),
    *("encodings", "pydoc_data", "entities.py", "stringprep.py"),
}


@dataclass(frozen=True)
class Corpus:
    """How the documents of a corpus are found and read."""

    reader: str
    """`documents` (a file each), `lines` (JSON lines), `parquet`, `hub` (allenai/c4) or `prepared`
    (tokens)."""

    patterns: tuple[str, ...] = ()
    """File names of the corpus, as shell patterns."""

    validation_patterns: tuple[str, ...] = ()
    """File names of the corpus's own validation split; empty where it is held out by content."""

    needs_path: bool = True
    """Whether `dataset_path` must be set; where it need not be, it must not."""

    @property
    def streamed(self) -> bool:
        """Whether it is read in file order while training, rather than loaded and shuffled."""
        return self.reader != "documents"

    @property
    def held_out_by_content(self) -> bool:
        """Whether validation documents lie among the training documents."""
        return self.reader != "hub" and not self.validation_patterns

    def split_patterns(self, split: str) -> tuple[str, ...]:
        """Returns the file names that hold `split`, "train" or "validation"."""
        own_validation = split == "validation" and self.validation_patterns
        return self.validation_patterns if own_validation else self.patterns


DATASETS: dict[str, Corpus] = {
    "python_stdlib": Corpus("documents", ("*.py",), needs_path=False),
    "text": Corpus("documents", ("*.txt", "*.md", "*.py", "*.rst")),
    "jsonl": Corpus("lines", ("*.jsonl", "*.json", "*.jsonl.gz", "*.json.gz")),
    "parquet": Corpus("parquet", ("*.parquet",)),
    "c4": Corpus("hub", needs_path=False),
    "c4_local": Corpus("lines", ("c4-train.*.json.gz",), ("c4-validation.*.json.gz",)),
    "prepared": Corpus("prepared", ("manifest.json",)),
}
"""The values of `training.dataset` and `validation.dataset`."""


def is_held_out(text: str) -> bool:
    """Returns whether a document belongs to the validation split of a corpus without its own."""
    return zlib.crc32(text.encode("utf-8", "replace")) % HELD_OUT_MODULUS == 0


def find_files(name: str, path: str | None, split: str = "train") -> list[Path]:
    """Lists the files of a corpus, sorted by path; hidden and linked folders are left out.

    Args:
        name: a key of `DATASETS`.
        path: `dataset_path`: a folder, searched through, or one file.
        split: "train" or "validation".

    Returns:
        The files; none for `c4`, whose files lie on the hub.

    Raises:
        OSError: for a folder that cannot be listed.
    """
    corpus = DATASETS[name]
    if corpus.reader == "hub":
        return []
    root = corpus_root(name, path)
    left_out = {"__pycache__"} | (_STDLIB_LEFT_OUT if name == "python_stdlib" else set())
    is_file = root.is_file()
    found = [root] if is_file else []
    # Without `onerror`, what cannot be listed would be left out in silence.
    for folder, subfolders, file_names in [] if is_file else os.walk(root, onerror=_raise):
        subfolders[:] = [f for f in subfolders if f not in left_out and not f.startswith(".")]
        found += [Path(folder, name) for name in file_names if name not in left_out]
    patterns = corpus.split_patterns(split)
    return sorted(
        file for file in found if any(fnmatch.fnmatchcase(file.name, p) for p in patterns)
    )


def check_dataset(
    name: str, path: str | None, section: str = "training", must_exist: bool = True
) -> None:
    """Checks a dataset's name and path; lists the files and reads no further than a document.

    Args:
        name: `<section>.dataset`.
        path: `<section>.dataset_path`.
        section: "training" or "validation", the TOML section that names them.
        must_exist: whether a path that does not exist is wrong; if not, nothing of it is checked.

    Raises:
        ValueError: in one line, for a name not in `DATASETS`, a path that is missing, superfluous
            or does not exist, a folder that cannot be listed or lacks the dataset's files (for
            validation on `c4_local`: validation shards), files that are all empty, a gzipped file
            or a table of 0 bytes, and a first document that is no JSON object with a `text`, or no
            table with such a column. Of `prepared` the path alone is checked here, and the rest by
            `check_prepared`.
    """
    if name not in DATASETS:
        nearest = difflib.get_close_matches(name, DATASETS, n=1, cutoff=0.5)
        remedy = f"did you mean {nearest[0]!r}?" if nearest else "choose one of these"
        raise ValueError(
            f"{section}.dataset must be one of {', '.join(DATASETS)}, got {name!r}: {remedy}"
        )
    corpus, field = DATASETS[name], f"{section}.dataset_path"
    split = "validation" if section == "validation" else "train"
    patterns = " or ".join(corpus.split_patterns(split))
    if not corpus.needs_path and path is not None:
        raise ValueError(
            f"{field} must not be set for dataset {name!r}, got {path!r}: remove it"
            + (", or choose 'c4_local' for downloaded shards" if name == "c4" else "")
        )
    if corpus.reader == "hub":
        return
    if corpus.needs_path and not path:
        raise ValueError(
            f"{field} must be set for dataset {name!r}, got {path!r}: "
            f"name the folder with the {patterns} files"
        )
    root = corpus_root(name, path)
    if not root.exists():
        if not must_exist:
            return
        raise ValueError(f"{field} must exist, got {str(root)!r}: correct the path")
    if corpus.reader == "prepared":
        return
    try:
        files = find_files(name, path, split)
    except OSError as error:
        raise ValueError(
            f"{field} must hold folders that can be listed, got {str(root)!r} with an error: "
            f"{error}: let them be read, or name another folder"
        ) from error
    if not files:
        remedy = "add such files or name another folder"
        if split == "validation" and corpus.validation_patterns:
            remedy = "add the corpus's validation shards or choose another validation.dataset"
        raise ValueError(
            f"{field} must hold {patterns} files for dataset {name!r}, got {str(root)!r} "
            f"without any: {remedy}"
        )
    sources = stat_files(files, corpus.reader, field)
    for file in sources:
        if file.size == 0 and file.path.suffix in (".gz", ".parquet"):
            raise ValueError(
                f"{field} must hold readable files, got {str(file.path)!r} of 0 bytes, where one "
                "without text has more: replace or remove the file"
            )
    if not any(map(_holds_a_document, sources)):
        raise ValueError(
            f"{field} must hold text, got {str(root)!r} with {len(files)} files that are all "
            "empty: fill them or name another folder"
        )


def open_documents(
    name: str, path: str | None, split: str, dp_rank: int, dp_world_size: int
) -> "ShuffledDocuments | FileDocuments | HubDocuments":
    """Opens one rank's share of a corpus whose name and path passed `check_dataset`.

    Raises:
        ValueError: where a rank would have no document, or a text file cannot be read or is not
            UTF-8.
    """
    corpus, share = DATASETS[name], (dp_rank, dp_world_size)
    if corpus.reader == "hub":
        return HubDocuments(name, split, *share)
    field = f"{SECTIONS[split]}.dataset_path"
    files = stat_files(find_files(name, path, split), corpus.reader, field)
    if corpus.reader == "documents":
        return ShuffledDocuments(name, files, split, *share)
    return FileDocuments(name, corpus_root(name, path), files, split, *share)


class ShuffledDocuments:
    """A map-style corpus: each epoch a permutation drawn from (seed, epoch), dealt to the ranks.

    Rank r of W reads the documents r, r + W, r + 2W, ... of the permutation.
    """

    def __init__(
        self, name: str, files: list[SourceFile], split: str, dp_rank: int, dp_world_size: int
    ) -> None:
        self._name, self._section = name, SECTIONS[split]
        self._dp_rank, self._dp_world_size = dp_rank, dp_world_size
        self._files = []
        self.fingerprint = zlib.crc32(name.encode())
        """Changes whenever a document, or the order of the documents, does."""
        prints = []
        for text, number in retrying(functools.partial(_texts, files), 0):
            if text and is_held_out(text) == (split == "validation"):
                self._files.append(files[number - 1])
                self.fingerprint = zlib.crc32(text.encode(), self.fingerprint)
                prints.append(zlib.crc32(text.encode()))
        self.prints = pack_prints(prints)
        if len(self._files) < dp_world_size:
            raise ValueError(
                f"{SECTIONS[split]}.dataset must have a document for each of {dp_world_size} "
                f"data-parallel ranks, got {len(self._files)} of {len(files)} in the {split} split "
                f"of {name!r}: add documents or lower the data-parallel degree"
            )

    def check_position(self, position: dict[str, Any], accepts_changes: bool) -> None:
        """Raise ValueError unless a data position belongs to these documents.

        A change cannot be accepted: the order is one of all documents.
        """
        if position["corpus"] != self.fingerprint:
            check_prints(self._files, self.prints, position.get("files", b""), None)
            raise _other_documents(self._section, self._name)

    def read(
        self, seed: int, epoch: int, consumed: int, cursor: None
    ) -> Iterator[tuple[str, None]]:
        """Yields this rank's documents of an epoch but for the first `consumed`."""
        order = permutation(len(self._files), seed, epoch)[self._dp_rank :: self._dp_world_size]
        files = [self._files[index] for index in order[consumed:]]
        for text, _ in retrying(functools.partial(_texts, files), 0):
            yield text, None


def _texts(files: list[SourceFile], start: int) -> Iterator[tuple[str, int]]:
    """Yields the texts of text files from a place in the list on, each with the next place."""
    for place, file in enumerate(files[start:], start + 1):
        for number, row in file.rows():
            yield file.text(number, row), place


class FileDocuments:
    """Documents that are rows of files, read in the order of the files.

    Where the ranks can have equally many files each, rank r of W reads the files r, r + W, ...;
    otherwise row i of file f is read by rank (f + i) % W. Neither depends on what other files
    hold, so that a broken file can be repaired before a run goes on, however many rows it has then.

    A cursor is a file, the number of its rows that are read, and the CRC-32 of those among them
    that are this rank's. Who goes on from it reads the rows again and refuses other ones.
    """

    def __init__(
        self,
        name: str,
        root: Path,
        files: list[SourceFile],
        split: str,
        dp_rank: int,
        dp_world_size: int,
    ) -> None:
        self._name, self._files, self._split = name, files, split
        self._all_rows = not DATASETS[name].held_out_by_content
        self._dp_rank, self._dp_world_size = dp_rank, dp_world_size
        self._whole_files = len(files) % dp_world_size == 0
        names = [os.path.relpath(file.path, root) for file in files]
        self.fingerprint = zlib.crc32(repr((name, names)).encode())
        """Changes whenever the name of a file does."""
        # No position is saved of held-out documents.
        self.prints = file_prints(files) if split == "train" else b""

    def check_position(self, position: dict[str, Any], accepts_changes: bool) -> None:
        """Raise ValueError unless a data position belongs to these files, as they are now.

        Where changes are accepted, files may hold others than they did, but for the rows that were
        read of the file that the position is in.
        """
        if position["corpus"] != self.fingerprint:
            raise _other_documents(SECTIONS[self._split], self._name)
        check_prints(self._files, self.prints, position.get("files", b""), accepts_changes)

    def read(
        self, seed: int, epoch: int, consumed: int, cursor: dict[str, int] | None
    ) -> Iterator[tuple[str, dict[str, int]]]:
        """Yields this rank's documents of an epoch.

        Raises:
            ValueError: for a file that cannot be read, is broken or has changed, a row that is not
                a document, and a cursor of other documents.
        """
        return retrying(self._read, cursor)

    def _read(self, cursor: dict[str, int] | None) -> Iterator[tuple[str, dict[str, int]]]:
        first, size = cursor["file"] if cursor else 0, self._dp_world_size
        for index, file in enumerate(self._files[first:], first):
            if self._whole_files and index % size != self._dp_rank:
                continue
            skipped = cursor["rows"] if cursor and index == first else 0
            number = crc = 0
            for number, row in file.rows():
                # Rows are numbered from 1.
                if not self._whole_files and (index + number - 1) % size != self._dp_rank:
                    continue
                crc = _row_crc(row, crc)
                if number <= skipped:
                    if number == skipped and crc != cursor["crc"]:
                        self._refuse_position(file)
                    continue
                text = file.text(number, row)
                if text and (self._all_rows or is_held_out(text) == (self._split == "validation")):
                    yield text, {"file": index, "rows": number, "crc": crc}
            if number < skipped:
                self._refuse_position(file)

    def _refuse_position(self, file: SourceFile) -> NoReturn:
        raise ValueError(
            f"{SECTIONS[self._split]}.dataset must be the one of the checkpoint's data position, "
            f"got {self._name!r} with {str(file.path)!r}, which holds other rows than those that "
            "were read of it: restore the file, or start anew with "
            'checkpoint.exclude_from_loading = ["dataloader"]'
        )


def _row_crc(row: Any, crc: int) -> int:
    # A line that was the last without an end has one when lines are added.
    content = row.rstrip(b"\r\n") if isinstance(row, bytes) else repr(row).encode()
    return zlib.crc32(content + b"\n", crc)


class HubDocuments:
    """C4 as it lies on the hub; `datasets` splits its files or its rows among the ranks."""

    def __init__(self, name: str, split: str, dp_rank: int, dp_world_size: int) -> None:
        self._name, self._split = name, split
        self._dp_rank, self._dp_world_size = dp_rank, dp_world_size
        self._rows = None
        self.fingerprint = zlib.crc32(repr((name, [])).encode())
        """Of the name alone."""
        self.prints = b""

    def check_position(self, position: dict[str, Any], accepts_changes: bool) -> None:
        """Raise ValueError unless a data position is one in this stream."""
        if position["corpus"] != self.fingerprint:
            raise _other_documents(SECTIONS[self._split], self._name)

    def read(
        self, seed: int, epoch: int, consumed: int, cursor: dict[str, Any] | None
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields this rank's documents of an epoch, each with the state of the stream behind it.

        Raises:
            ValueError: where the connection is lost again and again, or the stream is broken.
        """
        return retrying(self._read, cursor)

    def _read(self, cursor: dict[str, Any] | None) -> Iterator[tuple[str, dict[str, Any]]]:
        import datasets
        from datasets.distributed import split_dataset_by_node

        try:
            if self._rows is None:
                # Every rank would print its own bars between the lines of the log.
                datasets.disable_progress_bars()
                # It would ask the network to count each load.
                datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
                self._rows = datasets.load_dataset(
                    "allenai/c4", "en", split=self._split, streaming=True
                )
            # A new stream for each epoch: one that is read a second time starts again where it was
            # once resumed, and its state is heeded only while its own count of epochs is 0.
            stream = split_dataset_by_node(self._rows, self._dp_rank, self._dp_world_size)
            if cursor is not None:
                stream.load_state_dict(cursor)
            for row in stream:
                if row[TEXT_COLUMN]:
                    yield row[TEXT_COLUMN], stream.state_dict()
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            message = f"{SECTIONS[self._split]}.dataset must be a stream that can be read, got"
            if _is_of_the_connection(error):
                raise TransientReadError(
                    f"{message} {self._name!r} with its connection lost: {reason}",
                    "see to the network and start the same run again, which goes on from its last "
                    "checkpoint, or download the files for 'c4_local'",
                ) from error
            raise ValueError(
                f"{message} {self._name!r} with an error: {reason}: download the files for "
                "'c4_local' or 'prepared'"
            ) from error


# Packages whose errors are of a connection: one of them raises its own, or lets another's through.
_CLIENTS = {
    *("aiohttp", "fsspec", "http", "httpcore", "httpcore2", "httpx", "httpx2"),
    *("huggingface_hub", "requests", "urllib3"),
}


def _is_of_the_connection(error: Exception) -> bool:
    """Returns whether the network can have made an error of a stream.

    `datasets` tries again after errors of httpx and aiohttp alone, and the hub's client has since
    come to raise those of other packages. A stream that is cut short within a gzipped file is an
    `EOFError`; most others are `OSError`s.
    """
    packages = {base.__module__.partition(".")[0] for base in type(error).__mro__}
    return isinstance(error, OSError | EOFError) or bool(packages & _CLIENTS)


def permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """Returns a random permutation [count] of int64, the same wherever and whenever it is drawn."""
    # numpy keeps the raw bits of a bit generator across versions, but not what is made of them.
    # It takes no negative seed, and torch does.
    bits = np.random.PCG64([seed % 2**64, epoch]).random_raw(count)
    return np.argsort(bits, kind="stable")


def corpus_root(name: str, path: str | None) -> Path:
    """Returns the folder or the file that a corpus on this machine lies in."""
    if name == "python_stdlib":
        return Path(sysconfig.get_path("stdlib"))
    return Path(path).expanduser()


def _other_documents(section: str, name: str) -> ValueError:
    return ValueError(
        f"{section}.dataset must be the one of the checkpoint's data position, got {name!r} with "
        "other documents: restore the files, or start anew with "
        'checkpoint.exclude_from_loading = ["dataloader"]'
    )


def _raise(error: OSError) -> NoReturn:
    raise error


def _holds_a_document(file: SourceFile) -> bool:
    """Returns whether a file is not empty, and checks the form of its first document."""
    if file.size == 0 or file.reader == "documents":
        return file.size > 0

    def read(_: None) -> Iterator[tuple[bool, None]]:
        yield any(file.text(number, row) for number, row in file.rows()), None

    return next(retrying(read, None))[0]
