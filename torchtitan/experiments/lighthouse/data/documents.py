"""The documents of a corpus, as one data-parallel rank reads them.

`read(seed, epoch, consumed, cursor)` of `ShuffledDocuments`, `FileDocuments` and `HubDocuments`
yields pairs (text, cursor). Called with the count and the cursor of a pair, it goes on with the
pair after it. What cannot be read is tried again or told as `retry.py` says; a file that is not
as it was when the corpus was opened ends the run.
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
    """Opens one rank's share of a corpus whose name and path passed `check_dataset`.

    Raises:
        ValueError: where a rank would have no document, or a text file cannot be read or is not
            UTF-8.
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
        for text, _ in retrying(partial(_texts, files), 0):
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
        text_fields = {file.text_field for file in files} - {TEXT_COLUMN}
        self.fingerprint = zlib.crc32(repr((name, names, *text_fields)).encode())
        """Changes whenever the name of a file does, or that of the text's field."""
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
                "'c4_local' or 'tokenized'"
            ) from error


def _other_documents(section: str, name: str) -> ValueError:
    return ValueError(
        f"{section}.dataset must be the one of the checkpoint's data position, got {name!r} with "
        "other documents: restore the files, or start anew with "
        'checkpoint.exclude_from_loading = ["dataloader"]'
    )


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
