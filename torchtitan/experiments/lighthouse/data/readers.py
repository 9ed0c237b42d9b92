"""The rows of local files: of text files, of JSON lines, plain or gzipped, and of Parquet tables.

`READERS` read a file in chunks, for `tokenize.py` and for `SourceFile`, which is a file as a run
found it: it reads the rows while the file stays so, and names file and row where they are broken.
"""

import contextlib
import errno
import gzip
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torchtitan.experiments.lighthouse.data.long_documents import MAX_DOCUMENT_BYTES, check_length
from torchtitan.experiments.lighthouse.data.retry import TransientReadError, retrying
from torchtitan.experiments.lighthouse.runtime.read_files import check_regular, parse_json

TEXT_COLUMN = "text"

# Some hundred documents: what is sent to a worker of `tokenize.py` costs little beside tokenizing.
CHUNK_BYTES = 2**20
CHUNK_ROWS = 256

READ_ERRORS = (OSError, EOFError, zlib.error)
"""What reading raises where a file, or what lies under it, is broken."""

Row = bytes | str | None
"""A line or a file as it is stored, or what a table holds."""

MAX_WORKERS = max(64, 4 * (os.cpu_count() or 1))
"""Processes that read or tokenize: each takes some hundred MB of memory."""

_GO_ON = "start the same run again, which goes on from its last checkpoint"


@dataclass(frozen=True)
class SourceFile:
    """A file as it was when a run opened its corpus."""

    path: Path
    reader: str
    """A key of `READERS`, or `shard`, of whose tokens `tokenized.py` knows."""

    field: str
    """What names the corpus in an error."""

    size: int
    mtime_ns: int

    text_field: str = TEXT_COLUMN
    """The key of a JSON line, or the column of a table, that holds the text."""

    def rows(self) -> Iterator[tuple[int, Row]]:
        """Yields the rows, numbered from 1. A chunk is checked for a change after it is read.

        Raises:
            TransientReadError: where the file cannot be opened or read.
            ValueError: where it is broken, or has changed since the corpus was opened.
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
        """Returns the text of a row; see `document_text`."""
        place = row_location(self.reader, self.path, number)
        return document_text(row, self.reader, self.field, place, self.text_field)

    def check_unchanged(self) -> None:
        """Raises a `ValueError` unless size and time of modification are as they were."""
        status = os.stat(self.path)
        if (status.st_size, status.st_mtime_ns) != (self.size, self.mtime_ns):
            raise ValueError(
                f"{self.field} must hold files that stay as they are during a run, got "
                f"{str(self.path)!r} of {status.st_size} bytes, modified since the run opened it "
                f"with {self.size} bytes: restore the file, and {_GO_ON}"
            )


def stat_files(
    paths: Iterable[Path], reader: str, field: str, text_field: str = TEXT_COLUMN
) -> list[SourceFile]:
    """Returns the files as they are now.

    Raises:
        ValueError: where one is not there, or not in five attempts.
    """
    paths = list(paths)

    def read(start: int) -> Iterator[tuple[SourceFile, int]]:
        for number, path in enumerate(paths[start:], start + 1):
            try:
                status = check_regular(path)
            except OSError as error:
                raise read_error(error, field, f" in {str(path)!r}") from error
            except ValueError as error:
                raise ValueError(f"{field} must hold regular files: {error}: remove it") from None
            size, mtime_ns = status.st_size, status.st_mtime_ns
            yield SourceFile(path, reader, field, size, mtime_ns, text_field), number

    return [file for file, _ in retrying(read, 0)]


def read_error(error: Exception, field: str, place: str) -> TransientReadError | ValueError:
    """Returns what to raise for an error of reading: whether it can help to try again."""
    reason = " ".join(str(error).split())
    # What gzip and Arrow say of the content are `OSError`s, too, but without a number.
    if getattr(error, "errno", None) not in (None, errno.ELOOP, errno.EISDIR, errno.ENOTDIR):
        return TransientReadError(
            f"{field} must hold files that can be read, got an error{place}: {reason}",
            f"restore the file or its file system, and {_GO_ON}",
        )
    return ValueError(
        f"{field} must hold readable files, got an error{place}: {reason}: replace or remove the "
        f"file; where a run has begun, replace it, and {_GO_ON}, with checkpoint.accept_changes = "
        '["training.dataset_path"]'
    )


def row_location(reader: str, path: Path, number: int) -> str:
    """Says which row is meant; rows count from 1."""
    row = {"lines": f" line {number}", "parquet": f" row {number}"}.get(reader, "")
    return f" in {str(path)!r}{row}"


def document_text(
    row: Row, reader: str, field: str, place: str, text_field: str = TEXT_COLUMN
) -> str | None:
    """Returns the text of a row; None or "" where it has none.

    Raises:
        ValueError: in one line, for bytes that are not UTF-8, a line that is not a JSON object
            with a `text`, and what is not text; it names `field` and says the `place`.
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
    # As a file that is read as text has them.
    return text.replace("\r\n", "\n").replace("\r", "\n")


def json_text(line: str, field: str, place: str = "", text_field: str = TEXT_COLUMN) -> str | None:
    """Returns the text of a JSON line; None where the line is blank or its text is null.

    Raises:
        ValueError: for a line that is not a JSON object with a `text`; it names `field`, and
            says the `place` of the line.
    """
    if not line.strip():
        return None
    try:
        text = parse_json(line)[text_field]
        # JSON may spell half a surrogate pair, which no tokenizer takes.
        return None if text is None else text.encode("utf-8", "replace").decode()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{field} must hold one JSON object with a {text_field!r} per line, "
            f"got {line.strip()[:60]!r}{place}: convert the files to JSON lines, or name the key "
            f"of the text in {text_field_of(field)}"
        ) from error


def text_field_of(field: str) -> str:
    """The field that names the text, beside `field`, which names the corpus."""
    return field.replace("dataset_path", "text_field").replace("dataset-path", "text-field")


# ---- each yields chunks of rows, and the bytes of the file, as it is stored, that are read so far


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
            # A line of any length would be read whole before it could be refused.
            while line := lines.readline(MAX_DOCUMENT_BYTES + 1):
                number += 1
                check_length(len(line), field, row_location("lines", path, number))
                rows.append(line)
                size += len(line)
                if size >= CHUNK_BYTES:
                    yield rows, stored.tell()
                    rows, size = [], 0
        except (*READ_ERRORS, ValueError):
            # The rows before the one that breaks off are counted.
            yield rows, stored.tell()
            raise
        yield rows, stored.tell()


def _read_table(path: Path, field: str, text_field: str) -> Iterator[tuple[list[Row], int]]:
    """The bytes read are an estimate."""
    import pyarrow
    import pyarrow.parquet

    # Opened here, so that its errors of reading are those of Python, with their numbers.
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
    """Returns the values of an Arrow array; as bytes, where there are some that are not UTF-8."""
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
