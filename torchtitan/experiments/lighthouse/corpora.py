"""The corpora: where their files lie, how they are read, and which documents are held out.

A document is one file (`python_stdlib`, `text`), one JSON line (`jsonl`, `c4_local`), or one row
(`parquet`, `c4`); one without text is left out; `prepared` holds no documents, but tokens already
(`prepared.py`). C4 brings a validation split of its own. Everywhere
else a document is held out iff the CRC-32 of its UTF-8 bytes is divisible by 32, so copies of a
document fall on one side, and the split depends neither on their order nor on the number of ranks.

`read(seed, epoch, consumed, cursor)` of `ShuffledDocuments` and `StreamedDocuments` yields pairs
(text, cursor). Called with the count and the cursor of a pair, it goes on with the pair after it.
"""

import difflib
import fnmatch
import glob
import gzip
import json
import os
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

TEXT_COLUMN = "text"

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
    """
    corpus = DATASETS[name]
    if corpus.reader == "hub":
        return []
    root = corpus_root(name, path)
    left_out = {"__pycache__"} | (_STDLIB_LEFT_OUT if name == "python_stdlib" else set())
    found = [root] if root.is_file() else []
    for folder, subfolders, file_names in os.walk(root):
        subfolders[:] = [f for f in subfolders if f not in left_out and not f.startswith(".")]
        found += [Path(folder, name) for name in file_names if name not in left_out]
    patterns = corpus.split_patterns(split)
    return sorted(
        file for file in found if any(fnmatch.fnmatchcase(file.name, p) for p in patterns)
    )


def check_dataset(name: str, path: str | None, section: str = "training") -> None:
    """Checks a dataset's name and path; lists the files and reads no further than a document.

    Args:
        name: `<section>.dataset`.
        path: `<section>.dataset_path`.
        section: "training" or "validation", the TOML section that names them.

    Raises:
        ValueError: in one line, for a name not in `DATASETS`, a path that is missing, superfluous
            or does not exist, a folder without the dataset's files (for validation on `c4_local`:
            without validation shards), files that are all empty, and a first document that is no
            JSON object with a `text`, or no table with such a column. Of `prepared` the path alone
            is checked here, and the rest by `check_prepared`.
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
        raise ValueError(f"{field} must exist, got {str(root)!r}: correct the path")
    if corpus.reader == "prepared":
        return
    files = find_files(name, path, split)
    if not files:
        remedy = "add such files or name another folder"
        if split == "validation" and corpus.validation_patterns:
            remedy = "add the corpus's validation shards or choose another validation.dataset"
        raise ValueError(
            f"{field} must hold {patterns} files for dataset {name!r}, got {str(root)!r} "
            f"without any: {remedy}"
        )
    if not any(_holds_a_document(corpus.reader, file, field) for file in files):
        raise ValueError(
            f"{field} must hold text, got {str(root)!r} with {len(files)} files that are all "
            "empty: fill them or name another folder"
        )


def open_documents(
    name: str, path: str | None, split: str, dp_rank: int, dp_world_size: int
) -> "ShuffledDocuments | StreamedDocuments":
    """Opens one rank's share of a corpus whose name and path passed `check_dataset`.

    Raises:
        ValueError: where a rank would have no document, or a text file is not UTF-8.
    """
    import datasets

    # Every rank would print its own bars between the lines of the log.
    datasets.disable_progress_bars()
    # It would ask the network to count each load of a local file, and wait where there is none.
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    corpus = DATASETS[name]
    files = find_files(name, path, split)
    # `datasets` takes file names for patterns.
    data_files = {"train": [glob.escape(str(file.absolute())) for file in files]}
    if corpus.reader == "documents":
        try:
            rows = datasets.load_dataset(
                "text", data_files=data_files, split="train", sample_by="document"
            )
        except datasets.exceptions.DatasetGenerationError:
            _check_encoding(files, f"{SECTIONS[split]}.dataset_path")
            raise
        return ShuffledDocuments(name, rows, split, dp_rank, dp_world_size)

    if corpus.reader == "hub":
        rows = datasets.load_dataset("allenai/c4", "en", split=split, streaming=True)
    elif corpus.reader == "parquet":
        rows = datasets.load_dataset(
            "parquet", data_files=data_files, split="train", streaming=True, columns=[TEXT_COLUMN]
        )
    else:
        # Read as lines: the json reader wants one schema for all fields of all files.
        rows = datasets.load_dataset("text", data_files=data_files, split="train", streaming=True)
    sizes = [(file.name, file.stat().st_size) for file in files]
    fingerprint = zlib.crc32(repr((name, sizes)).encode())
    return StreamedDocuments(name, rows, split, fingerprint, dp_rank, dp_world_size)


class ShuffledDocuments:
    """A map-style corpus: each epoch a permutation drawn from (seed, epoch), dealt to the ranks.

    Rank r of W reads the documents r, r + W, r + 2W, ... of the permutation.
    """

    def __init__(self, name: str, rows: Any, split: str, dp_rank: int, dp_world_size: int) -> None:
        self._rows, self._dp_rank, self._dp_world_size = rows, dp_rank, dp_world_size
        indices = []
        self.fingerprint = zlib.crc32(name.encode())
        """Changes whenever a document, or the order of the documents, does."""
        for index, row in enumerate(rows):
            text = row[TEXT_COLUMN]
            if text and is_held_out(text) == (split == "validation"):
                indices.append(index)
                self.fingerprint = zlib.crc32(text.encode(), self.fingerprint)
        if len(indices) < dp_world_size:
            raise ValueError(
                f"{SECTIONS[split]}.dataset must have a document for each of {dp_world_size} "
                f"data-parallel ranks, got {len(indices)} of {len(rows)} in the {split} split of "
                f"{name!r}: add documents or lower the data-parallel degree"
            )
        self._indices = np.array(indices)

    def read(
        self, seed: int, epoch: int, consumed: int, cursor: None
    ) -> Iterator[tuple[str, None]]:
        """Yields this rank's documents of an epoch but for the first `consumed`."""
        order = self._indices[permutation(len(self._indices), seed, epoch)]
        for index in order[self._dp_rank :: self._dp_world_size][consumed:]:
            yield self._rows[int(index)][TEXT_COLUMN], None


class StreamedDocuments:
    """A corpus read in file order; `datasets` splits its files or its rows among the ranks."""

    def __init__(
        self,
        name: str,
        rows: Any,
        split: str,
        fingerprint: int,
        dp_rank: int,
        dp_world_size: int,
    ) -> None:
        self._rows, self._split = rows, split
        self._is_lines = DATASETS[name].reader == "lines"
        self._all_rows = not DATASETS[name].held_out_by_content
        self._dp_rank, self._dp_world_size = dp_rank, dp_world_size
        self.fingerprint = fingerprint
        """Changes whenever the name or the size of a file does."""

    def read(
        self, seed: int, epoch: int, consumed: int, cursor: dict[str, Any] | None
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields this rank's documents of an epoch, each with the state of the stream behind it.

        Raises:
            ValueError: for a line that is not a JSON object with a `text`.
        """
        from datasets.distributed import split_dataset_by_node

        # A new stream for each epoch: one that is read a second time starts again where it was
        # once resumed, and its state is heeded only while its own count of epochs is 0.
        stream = split_dataset_by_node(self._rows, self._dp_rank, self._dp_world_size)
        if cursor is not None:
            stream.load_state_dict(cursor)
        field = f"{SECTIONS[self._split]}.dataset_path"
        for row in stream:
            text = row[TEXT_COLUMN]
            if self._is_lines:
                text = json_text(text, field)
            if text and (self._all_rows or is_held_out(text) == (self._split == "validation")):
                yield text, stream.state_dict()


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


def json_text(line: str, field: str, where: str = "") -> str | None:
    """Returns the text of a JSON line; None where the line is blank or its text is null.

    Raises:
        ValueError: for a line that is not a JSON object with a `text`; it names `field`, and
            says `where` the line is.
    """
    if not line.strip():
        return None
    try:
        text = json.loads(line)[TEXT_COLUMN]
        # JSON may spell half a surrogate pair, which no tokenizer takes.
        return None if text is None else text.encode("utf-8", "replace").decode()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{field} must hold one JSON object with a {TEXT_COLUMN!r} per line, "
            f"got {line[:60]!r}{where}: convert the files to JSON lines"
        ) from error


def _holds_a_document(reader: str, file: Path, field: str) -> bool:
    """Returns whether a file is not empty, and checks the form of its first document."""
    if file.stat().st_size == 0:
        return False
    if reader == "documents":
        return True
    try:
        return _holds_a_row(file, field) if reader == "parquet" else _holds_a_line(file, field)
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{field} must hold readable files, got {str(file)!r}: {reason}: replace or remove it"
        ) from error


def _holds_a_line(file: Path, field: str) -> bool:
    opened = gzip.open if file.suffix == ".gz" else open
    with opened(file, "rt", encoding="utf-8") as lines:
        return any(json_text(line, field) for line in lines)


def _holds_a_row(file: Path, field: str) -> bool:
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.read_metadata(file)
    except pyarrow.ArrowInvalid as error:
        raise OSError(str(error)) from error
    if TEXT_COLUMN not in metadata.schema.to_arrow_schema().names:
        raise ValueError(
            f"{field} must hold tables with a column {TEXT_COLUMN!r}, got {str(file)!r} without: "
            "rename its column"
        )
    return metadata.num_rows > 0


def _check_encoding(files: list[Path], field: str) -> None:
    for file in files:
        try:
            file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{field} must hold UTF-8 text, got {str(file)!r} with byte "
                f"0x{error.object[error.start]:02x} at {error.start}: convert or remove the file"
            ) from error
