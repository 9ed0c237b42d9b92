"""Read the rows of text files, JSON lines (plain or gzipped), and Parquet tables.

`READERS` read a file in chunks, for `tokenize.py` and for `SourceFile`. A `SourceFile` raises an
error if the file changes during the run. Errors name the file and the row.
"""

import contextlib
import errno
import gzip
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torchtitan.experiments.lighthouse.data.long_documents import MAX_DOCUMENT_BYTES, check_length
from torchtitan.experiments.lighthouse.data.retry import TransientReadError, retried
from torchtitan.experiments.lighthouse.runtime.read_files import check_regular, parse_json

TEXT_COLUMN = "text"

# A few hundred documents. Sending them to a worker of `tokenize.py` is cheap compared to
# tokenizing them.
CHUNK_BYTES = 2**20
CHUNK_ROWS = 256

READ_ERRORS = (OSError, EOFError, zlib.error)
"""Errors of reading a broken file or file system."""

Row = bytes | str | None
"""A line or file as stored, or the value of a table."""

MAX_WORKERS = max(64, 4 * (os.cpu_count() or 1))
"""Maximum number of processes that read or tokenize. Each needs a few hundred MB of memory."""

_RESUME = "start the same run again, which resumes from its last checkpoint"


@dataclass(frozen=True)
class SourceFile:
    """A file, with its size and modification time when the run opened its corpus."""

    path: Path
    reader: str
    """A key of `READERS`, or `shard` for the files that `tokenized.py` reads."""

    field: str
    """Name of the corpus in error messages."""

    size: int
    mtime_ns: int

    text_field: str = TEXT_COLUMN
    """The key of a JSON line, or the column of a table, that holds the text."""

    def rows(self) -> Iterator[tuple[int, Row]]:
        """Yield the rows, numbered from 1. After each chunk, check that the file is unchanged.

        Raises:
            TransientReadError: the file cannot be opened or read.
            ValueError: the file is broken, or has changed since the corpus was opened.
        """
        count = 0
        try:
            self.check_unchanged()
            for chunk, _ in READERS[self.reader](self.path, self.field, self.text_field):
                self.check_unchanged()
                for row in chunk:
                    count += 1
                    yield count, row
        except READ_ERRORS as error:
            raise read_error(
                error, self.field, row_location(self.reader, self.path, count + 1)
            ) from error

    def text(self, number: int, row: Row) -> str | None:
        """The text of a row. See `document_text`."""
        place = row_location(self.reader, self.path, number)
        return document_text(row, self.reader, self.field, place, self.text_field)

    def check_unchanged(self) -> None:
        """Raise ValueError if the size or the modification time has changed."""
        status = os.stat(self.path)
        if (status.st_size, status.st_mtime_ns) != (self.size, self.mtime_ns):
            raise ValueError(
                f"{self.field} must hold files that stay as they are during a run, got "
                f"{str(self.path)!r} of {status.st_size} bytes, modified since the run opened it "
                f"with {self.size} bytes: restore the file, and {_RESUME}"
            )


def stat_files(
    paths: Iterable[Path], reader: str, field: str, text_field: str = TEXT_COLUMN
) -> list[SourceFile]:
    """Record the present size and modification time of files.

    Raises:
        ValueError: a file does not exist, or could not be accessed in five attempts.
    """

    def stat(path: Path) -> SourceFile:
        try:
            status = check_regular(path)
        except OSError as error:
            raise read_error(error, field, f" in {str(path)!r}") from error
        except ValueError as error:
            raise ValueError(f"{field} must hold regular files: {error}: remove it") from None
        return SourceFile(path, reader, field, status.st_size, status.st_mtime_ns, text_field)

    return [retried(partial(stat, path)) for path in paths]


def read_error(error: Exception, field: str, place: str) -> TransientReadError | ValueError:
    """The exception to raise for an error of reading. It is transient if a retry may help."""
    reason = " ".join(str(error).split())
    # gzip and Arrow raise `OSError`s about the content of a file, but without an error number.
    if getattr(error, "errno", None) not in (None, errno.ELOOP, errno.EISDIR, errno.ENOTDIR):
        return TransientReadError(
            f"{field} must hold files that can be read, got an error{place}: {reason}",
            f"restore the file or its file system, and {_RESUME}",
        )
    return ValueError(
        f"{field} must hold readable files, got an error{place}: {reason}: replace or remove the "
        f"file; for a run with checkpoints, replace it, and {_RESUME}, with "
        'checkpoint.accept_changes = ["training.dataset_path"]'
    )


def row_location(reader: str, path: Path, number: int) -> str:
    """The location of a row for error messages. Rows count from 1."""
    row = {"lines": f" line {number}", "parquet": f" row {number}"}.get(reader, "")
    return f" in {str(path)!r}{row}"


def document_text(
    row: Row, reader: str, field: str, place: str, text_field: str = TEXT_COLUMN
) -> str | None:
    """The text of a row. None or "" if it has none.

    Raises:
        ValueError: in one line with `field` and `place`. The bytes are not UTF-8, the line is not a
            JSON object with a text, or the value is not text.
    """
    if isinstance(row, str | bytes):
        check_length(len(row), field, place)
    if row is None or isinstance(row, str):
        return row
    if not isinstance(row, bytes):
        raise ValueError(
            f"{field} must hold tables with text, got {repr(row)[:60]}{place}: convert the column"
        )
    try:
        text = row.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{field} must hold UTF-8 text, got byte 0x{row[error.start]:02x} at "
            f"{error.start}{place}: convert or remove the file"
        ) from error
    if reader == "parquet":
        raise ValueError(
            f"{field} must hold tables with text, got {row[:60]!r}{place}: convert the column"
        )
    if reader == "lines":
        return json_text(text, field, place, text_field)
    # Python's text mode converts line ends in the same way.
    return text.replace("\r\n", "\n").replace("\r", "\n")


def json_text(line: str, field: str, place: str = "", text_field: str = TEXT_COLUMN) -> str | None:
    """The text of a JSON line. None if the line is blank or its text is null.

    Raises:
        ValueError: the line is not a JSON object with a text. The message has `field` and `place`.
    """
    if not line.strip():
        return None
    try:
        text = parse_json(line)[text_field]
        # JSON can encode half a surrogate pair, which tokenizers reject.
        return None if text is None else text.encode("utf-8", "replace").decode()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{field} must hold one JSON object with a {text_field!r} per line, "
            f"got {line.strip()[:60]!r}{place}: convert the files to JSON lines, or name the key "
            f"of the text in {text_field_of(field)}"
        ) from error


def text_field_of(field: str) -> str:
    """Name of the text field that belongs to `field`, the field of the corpus."""
    return field.replace("dataset_path", "text_field").replace("dataset-path", "text-field")


# Each reader yields chunks of rows, with the number of stored bytes read so far.


def _read_document(path: Path, field: str, text_field: str) -> Iterator[tuple[list[bytes], int]]:
    with open(path, "rb") as file:
        check_length(os.fstat(file.fileno()).st_size, field, f" in {str(path)!r}")
        content = file.read()
    yield [content], len(content)


def _read_lines(path: Path, field: str, text_field: str) -> Iterator[tuple[list[bytes], int]]:
    with contextlib.ExitStack() as stack:
        stored = lines = stack.enter_context(open(path, "rb"))
        if path.suffix == ".gz":
            if not stored.peek(1):
                raise EOFError("the file has 0 bytes, and an empty gzip file has some 20")
            lines = stack.enter_context(gzip.open(stored))
        rows, size, number = [], 0, 0
        try:
            # Without a limit, a line of any length would be read into memory before the check.
            while line := lines.readline(MAX_DOCUMENT_BYTES + 1):
                number += 1
                check_length(len(line), field, row_location("lines", path, number))
                rows.append(line)
                size += len(line)
                if size >= CHUNK_BYTES:
                    yield rows, stored.tell()
                    rows, size = [], 0
        except (*READ_ERRORS, ValueError):
            # Yield the rows before the broken one, so that they are counted.
            yield rows, stored.tell()
            raise
        yield rows, stored.tell()


def _read_table(path: Path, field: str, text_field: str) -> Iterator[tuple[list[Row], int]]:
    """The number of bytes read is an estimate."""
    import pyarrow
    import pyarrow.parquet

    # Opened by Python, so that read errors have error numbers.
    with open(path, "rb") as stored:
        size, done = os.fstat(stored.fileno()).st_size, 0
        try:
            table = pyarrow.parquet.ParquetFile(stored)
            names = table.schema_arrow.names
            if text_field in names:
                for batch in table.iter_batches(CHUNK_ROWS, columns=[text_field]):
                    done += len(batch)
                    yield _values(batch.column(0)), size * done // table.metadata.num_rows
                return
        except pyarrow.ArrowException as error:
            raise OSError(str(error)) from error
    raise ValueError(
        f"{field} must hold tables with a column {text_field!r}, got {str(path)!r} with "
        f"{', '.join(names)}: name the column of the text in {text_field_of(field)}"
    )


def _values(column) -> list[Row]:
    """The values of an Arrow array. Values that are not UTF-8 are bytes."""
    import pyarrow

    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        rows = column.cast(pyarrow.large_binary()).to_pylist()
        return [_decoded(row) for row in rows]


def _decoded(row: bytes | None) -> Row:
    try:
        return row if row is None else row.decode("utf-8")
    except UnicodeDecodeError:
        return row


READERS = {"documents": _read_document, "lines": _read_lines, "parquet": _read_table}
