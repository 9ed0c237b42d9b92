"""Read the documents of a corpus on one data-parallel rank.

`ShuffledDocuments`, `FileDocuments` and `HubDocuments` have a method `read(seed, epoch, consumed,
cursor)`. It yields pairs (text, cursor). Called with the count and the cursor of a pair, it resumes
with the next pair. Read errors are retried as in `retry.py`. A file that has changed since the
corpus was opened ends the run.
"""

import os
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from torchtitan.experiments.lighthouse.data.datasets import (
    DATASETS,
    SECTIONS,
    corpus_root,
    find_files,
    is_held_out,
)
from torchtitan.experiments.lighthouse.data.readers import TEXT_COLUMN, SourceFile, stat_files
from torchtitan.experiments.lighthouse.data.retry import TransientReadError, retrying
from torchtitan.experiments.lighthouse.data.source_changes import (
    check_prints,
    file_prints,
    pack_prints,
)


def open_documents(
    name: str,
    path: str | None,
    split: str,
    dp_rank: int,
    dp_world_size: int,
    text_field: str = TEXT_COLUMN,
) -> "ShuffledDocuments | FileDocuments | HubDocuments":
    """Open one rank's share of a corpus whose name and path passed `check_dataset`.

    Raises:
        ValueError: a rank would have no document, or a text file cannot be read or is not UTF-8.
    """
    corpus, share = DATASETS[name], (dp_rank, dp_world_size)
    if corpus.reader == "hub":
        return HubDocuments(name, split, *share)
    field = f"{SECTIONS[split]}.dataset_path"
    files = stat_files(find_files(name, path, split), corpus.reader, field, text_field)
    if corpus.reader == "documents":
        return ShuffledDocuments(name, files, split, *share)
    return FileDocuments(name, corpus_root(name, path), files, split, *share)


class ShuffledDocuments:
    """A map-style corpus. Each epoch has its own permutation, given by (seed, epoch).

    Rank r of W reads the documents r, r + W, r + 2W, ... of the permutation.
    """

    def __init__(
        self, name: str, files: list[SourceFile], split: str, dp_rank: int, dp_world_size: int
    ) -> None:
        self._name, self._section = name, SECTIONS[split]
        self._dp_rank, self._dp_world_size = dp_rank, dp_world_size
        self._files = []
        self.fingerprint = zlib.crc32(name.encode())
        """Differs if a document or the order of documents differs."""
        prints = []
        for text, number in retrying(partial(_texts, files), 0):
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

        A change cannot be accepted, because the order depends on all documents.
        """
        if position["corpus"] != self.fingerprint:
            check_prints(self._files, self.prints, position.get("files", b""), None)
            raise _other_documents(self._section, self._name)

    def read(
        self, seed: int, epoch: int, consumed: int, cursor: None
    ) -> Iterator[tuple[str, None]]:
        """Yield this rank's documents of an epoch, without the first `consumed`."""
        order = permutation(len(self._files), seed, epoch)[self._dp_rank :: self._dp_world_size]
        files = [self._files[index] for index in order[consumed:]]
        for text, _ in retrying(partial(_texts, files), 0):
            yield text, None


def _texts(files: list[SourceFile], start: int) -> Iterator[tuple[str, int]]:
    """Yield the texts of `files[start:]`, each with the index of the next file."""
    for place, file in enumerate(files[start:], start + 1):
        for number, row in file.rows():
            yield file.text(number, row), place


class FileDocuments:
    """Documents that are rows of files, read in the order of the files.

    If W ranks can have equally many files each, rank r reads the files r, r + W, and so on.
    Otherwise rank (f + i) % W reads row i of file f. Neither depends on the content of other files.
    So a broken file may have another number of rows after a repair, and the run can still resume.

    A cursor holds the index of a file, the number of rows read, and the CRC-32 of those rows that
    this rank reads. Resuming reads these rows again and raises an error if they differ.
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
        text_fields = {file.text_field for file in files} - {TEXT_COLUMN}
        self.fingerprint = zlib.crc32(repr((name, names, *text_fields)).encode())
        """Differs if the name of a file or of the text field differs."""
        # Checkpoints hold no position in held-out documents.
        self.prints = file_prints(files) if split == "train" else b""

    def check_position(self, position: dict[str, Any], accepts_changes: bool) -> None:
        """Raise ValueError unless a data position belongs to the present content of these files.

        If changes are accepted, the content may differ. The rows already read of the current file
        must be the same.
        """
        if position["corpus"] != self.fingerprint:
            raise _other_documents(SECTIONS[self._split], self._name)
        check_prints(self._files, self.prints, position.get("files", b""), accepts_changes)

    def read(
        self, seed: int, epoch: int, consumed: int, cursor: dict[str, int] | None
    ) -> Iterator[tuple[str, dict[str, int]]]:
        """Yield this rank's documents of an epoch.

        Raises:
            ValueError: a file cannot be read, is broken or has changed, a row is not a document, or
                the cursor belongs to other documents.
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
            f"got {self._name!r} with {str(file.path)!r}, which has other rows than those already "
            "read: restore the file, or restart the data with "
            'checkpoint.exclude_from_loading = ["dataloader"]'
        )


def _row_crc(row: Any, crc: int) -> int:
    # A last line without a line end gets one when lines are appended.
    content = row.rstrip(b"\r\n") if isinstance(row, bytes) else repr(row).encode()
    return zlib.crc32(content + b"\n", crc)


class HubDocuments:
    """C4 streamed from the hub. `datasets` splits its files or its rows among the ranks."""

    def __init__(self, name: str, split: str, dp_rank: int, dp_world_size: int) -> None:
        self._name, self._split = name, split
        self._dp_rank, self._dp_world_size = dp_rank, dp_world_size
        self._rows = None
        self.fingerprint = zlib.crc32(repr((name, [])).encode())
        """Depends on the name only."""
        self.prints = b""

    def check_position(self, position: dict[str, Any], accepts_changes: bool) -> None:
        """Raise ValueError unless a data position belongs to this stream."""
        if position["corpus"] != self.fingerprint:
            raise _other_documents(SECTIONS[self._split], self._name)

    def read(
        self, seed: int, epoch: int, consumed: int, cursor: dict[str, Any] | None
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield this rank's documents of an epoch, each with the state of the stream after it.

        Raises:
            ValueError: the connection was lost in five attempts, or the stream is broken.
        """
        return retrying(self._read, cursor)

    def _read(self, cursor: dict[str, Any] | None) -> Iterator[tuple[str, dict[str, Any]]]:
        import datasets
        from datasets.distributed import split_dataset_by_node

        try:
            if self._rows is None:
                # Every rank would print its own bars into the log.
                datasets.disable_progress_bars()
                # It would send a request to count each load.
                datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
                self._rows = datasets.load_dataset(
                    "allenai/c4", "en", split=self._split, streaming=True
                )
            # Each epoch needs a new stream. A stream read twice would start at its loaded state
            # again, and loads a state only in its own epoch 0.
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
                    "check the network and start the same run again, which resumes from its last "
                    "checkpoint, or download the files for 'c4_local'",
                ) from error
            raise ValueError(
                f"{message} {self._name!r} with an error: {reason}: download the files for "
                "'c4_local' or 'tokenized'"
            ) from error


def _other_documents(section: str, name: str) -> ValueError:
    return ValueError(
        f"{section}.dataset must be the one of the checkpoint's data position, got {name!r} with "
        "other documents: restore the files, or restart the data with "
        'checkpoint.exclude_from_loading = ["dataloader"]'
    )


# Packages that raise connection errors. Each raises its own, or passes on those of another.
_CLIENTS = {
    *("aiohttp", "fsspec", "http", "httpcore", "httpcore2", "httpx", "httpx2"),
    *("huggingface_hub", "requests", "urllib3"),
}


def _is_of_the_connection(error: Exception) -> bool:
    """Whether an error of a stream may come from the network.

    `datasets` retries only errors of httpx and aiohttp. Newer hub clients raise errors of other
    packages. A stream that breaks off inside a gzipped file is an `EOFError`. Most other errors are
    `OSError`s.
    """
    packages = {base.__module__.partition(".")[0] for base in type(error).__mro__}
    return isinstance(error, OSError | EOFError) or bool(packages & _CLIENTS)


def permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """A random permutation [count] of int64, the same on every machine and with every numpy."""
    # The raw bits of a bit generator are the same in all versions of numpy. Distributions are not.
    # numpy accepts no negative seeds, but torch does.
    bits = np.random.PCG64([seed % 2**64, epoch]).random_raw(count)
    return np.argsort(bits, kind="stable")
