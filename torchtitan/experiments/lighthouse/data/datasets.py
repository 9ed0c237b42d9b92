"""The corpora: locations of their files, readers, and held-out documents.

A document is one file (`python_stdlib`, `text`), one JSON line (`jsonl`, `c4_local`), or one row
(`parquet`, `c4`). Documents without text are left out. `tokenized` holds tokens instead of
documents (`tokenized.py`).

C4 has its own validation split. In other corpora, a document is held out if the CRC-32 of its UTF-8
bytes is divisible by 32. Copies of a document are therefore in the same split. The split does not
depend on the order of documents or the number of ranks.
"""

import difflib
import fnmatch
import os
import sysconfig
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from torchtitan.experiments.lighthouse.data.readers import TEXT_COLUMN, SourceFile, stat_files
from torchtitan.experiments.lighthouse.data.retry import retried

# About 3 % of the documents are held out. That is enough for a stable loss, and not much for a
# small corpus.
HELD_OUT_MODULUS = 32

SECTIONS = {"train": "training", "validation": "validation"}
"""The TOML section that configures each split."""

# Left out of the standard library: third-party packages, tests and tables.
_STDLIB_LEFT_OUT = {
    *("site-packages", "dist-packages"),
    *("test", "tests", "idle_test"),
    *("encodings", "pydoc_data", "entities.py", "stringprep.py"),
}


@dataclass(frozen=True)
class Corpus:
    """How to find and read the documents of a corpus."""

    reader: str
    """`documents` (one per file), `lines` (JSON lines), `parquet`, `hub` (allenai/c4) or
    `tokenized` (tokens)."""

    patterns: tuple[str, ...] = ()
    """Shell patterns of the file names."""

    validation_patterns: tuple[str, ...] = ()
    """Shell patterns of the corpus's own validation split. Empty if it has none."""

    needs_path: bool = True
    """Whether `dataset_path` must be set. Otherwise it must not be set."""

    @property
    def held_out_by_content(self) -> bool:
        """Whether the training files also hold the validation documents."""
        return self.reader != "hub" and not self.validation_patterns

    def split_patterns(self, split: str) -> tuple[str, ...]:
        """Shell patterns of the files that hold `split`, "train" or "validation"."""
        own_validation = split == "validation" and self.validation_patterns
        return self.validation_patterns if own_validation else self.patterns


DATASETS: dict[str, Corpus] = {
    "python_stdlib": Corpus("documents", ("*.py",), needs_path=False),
    "text": Corpus("documents", ("*.txt", "*.md", "*.py", "*.rst")),
    "jsonl": Corpus("lines", ("*.jsonl", "*.json", "*.jsonl.gz", "*.json.gz")),
    "parquet": Corpus("parquet", ("*.parquet",)),
    "c4": Corpus("hub", needs_path=False),
    "c4_local": Corpus("lines", ("c4-train.*.json.gz",), ("c4-validation.*.json.gz",)),
    "tokenized": Corpus("tokenized", ("manifest.json",)),
}
"""The values of `training.dataset` and `validation.dataset`."""


def is_held_out(text: str) -> bool:
    """Whether a document is in the validation split of a corpus that is held out by content."""
    return zlib.crc32(text.encode("utf-8", "replace")) % HELD_OUT_MODULUS == 0


def find_files(name: str, path: str | None, split: str = "train") -> list[Path]:
    """List the files of a corpus, sorted by path. Hidden and linked folders are left out.

    Args:
        name: a key of `DATASETS`.
        path: `dataset_path`, one file or a folder that is searched with its subfolders.
        split: "train" or "validation".

    Returns:
        The files. None for `c4`, whose files are on the hub.

    Raises:
        OSError: a folder cannot be listed.
    """
    corpus = DATASETS[name]
    if corpus.reader == "hub":
        return []
    root = corpus_root(name, path)
    left_out = {"__pycache__"} | (_STDLIB_LEFT_OUT if name == "python_stdlib" else set())
    is_file = root.is_file()
    found = [root] if is_file else []
    # Without `onerror`, folders that cannot be listed would be left out silently.
    for folder, subfolders, file_names in [] if is_file else os.walk(root, onerror=_raise):
        subfolders[:] = [f for f in subfolders if f not in left_out and not f.startswith(".")]
        found += [Path(folder, name) for name in file_names if name not in left_out]
    patterns = corpus.split_patterns(split)
    return sorted(
        file for file in found if any(fnmatch.fnmatchcase(file.name, p) for p in patterns)
    )


def check_dataset(
    name: str,
    path: str | None,
    section: str = "training",
    must_exist: bool = True,
    text_field: str = TEXT_COLUMN,
) -> None:
    """Check a dataset's name, path and files. At most one document is read.

    Args:
        name: `<section>.dataset`.
        path: `<section>.dataset_path`.
        section: "training" or "validation", the TOML section that names them.
        must_exist: whether the path must exist. If False, a missing path is not checked.
        text_field: `<section>.text_field`.

    Raises:
        ValueError: in one line. The name is not in `DATASETS`. The path is missing, superfluous or
            does not exist. A folder cannot be listed or has no files of the split. All files are
            empty, or a gzipped file or table has 0 bytes. The first document has no text field. For
            `tokenized` only the path is checked here, and `check_tokenized` checks the rest.
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
    check_text_field(name, text_field, f"{section}.text_field")
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
    if corpus.reader == "tokenized":
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
    sources = stat_files(files, corpus.reader, field, text_field)
    for file in sources:
        if file.size == 0 and file.path.suffix in (".gz", ".parquet"):
            raise ValueError(
                f"{field} must hold readable files, got {str(file.path)!r} of 0 bytes, which is "
                "not a valid file even without text: replace or remove the file"
            )
    if not any(map(_holds_a_document, sources)):
        raise ValueError(
            f"{field} must hold text, got {str(root)!r} with {len(files)} files that are all "
            "empty: fill them or name another folder"
        )


def corpus_root(name: str, path: str | None) -> Path:
    """The folder or the file of a corpus on this machine."""
    if name == "python_stdlib":
        return Path(sysconfig.get_path("stdlib"))
    # Unlike Path.expanduser, it leaves the name of an unknown user as it is.
    return Path(os.path.expanduser(path))


def _raise(error: OSError) -> NoReturn:
    raise error


def _holds_a_document(file: SourceFile) -> bool:
    """Whether a file is not empty. Also checks the form of its first document."""
    if file.size == 0 or file.reader == "documents":
        return file.size > 0
    return retried(lambda: any(file.text(number, row) for number, row in file.rows()))


def check_text_field(name: str, text_field: str, field: str) -> None:
    """Raise ValueError if a text field is set for a dataset without fields."""
    if text_field != TEXT_COLUMN and DATASETS[name].reader not in ("lines", "parquet"):
        raise ValueError(
            f"{field} must be {TEXT_COLUMN!r} for dataset {name!r}, which has no fields to choose "
            f"from, got {text_field!r}: remove it"
        )
