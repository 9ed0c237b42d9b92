"""The manifest of tokenized data describes the sources and the shards of each split.

    <dataset_path>/<split>/manifest.json           a finished split (`Manifest`)
    <dataset_path>/<split>/manifest.partial.json   a split in preparation, with its finished shards

`tokenize.py` writes both, `tokenized.py` reads the first.
"""

import dataclasses
import hashlib
import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torchtitan.experiments.lighthouse.data.datasets import SECTIONS
from torchtitan.experiments.lighthouse.runtime.read_files import read_json, read_record
from tqdm import tqdm

FORMAT = 1
"""Version of the file format. Other versions raise an error."""

MANIFEST = "manifest.json"
PARTIAL_MANIFEST = "manifest.partial.json"
"""The manifest of a split in preparation, with its finished shards."""


@dataclass(frozen=True)
class Shard:
    """A file of tokens."""

    file: str
    documents: int
    tokens: int
    max_id: int
    """The largest token id in the shard."""

    sha256: str
    next: list[int]
    """Start of the next shard: the index of the source file and the row in it, both from 0."""


@dataclass(frozen=True)
class Manifest:
    """The sources and the shards of a split.

    It holds no times and no absolute paths, so the same sources give the same bytes.
    """

    format: int
    dataset: str
    """A key of `datasets.DATASETS`."""

    split: str
    tokenizer_sha256: str
    """See `tokenizer_digest`."""

    vocab_size: int
    dtype: str
    """numpy dtype of the token ids, `<u2` or `<u4`."""

    shard_size: int
    """A shard ends after the document that reaches this number of tokens."""

    sources: dict[str, int]
    """Size of each file in bytes, by its path in the folder of the corpus, in reading order."""

    shards: list[Shard]

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def itemsize(self) -> int:
        """Bytes per token id."""
        return np.dtype(self.dtype).itemsize

    @property
    def digest(self) -> str:
        """A digest that differs if a token or a shard differs."""
        content = [self.tokenizer_sha256, self.dtype, [shard.sha256 for shard in self.shards]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def read_manifest(path: str | Path, split: str, field: str, name: str = MANIFEST) -> Manifest:
    """Read the manifest of a split.

    Args:
        path: `dataset_path`.
        split: "train" or "validation".
        field: name of the path in error messages.
        name: file name of the manifest.

    Raises:
        ValueError: in one line. The manifest is missing, cannot be read, or has another format.
    """
    folder = Path(path).expanduser() / split
    if not (folder / name).is_file():
        is_begun = (folder / PARTIAL_MANIFEST).is_file()
        raise ValueError(
            f"{field} must be a folder with a prepared {split} split, got {str(path)!r} "
            + (
                "whose preparation has not ended: start the same lighthouse prepare again"
                if is_begun
                else f"without {split}/{name}: make it with lighthouse prepare --output {path}"
            )
        )
    try:
        values = read_json(folder / name)
        version = values["format"]
        if version == FORMAT:
            if name == MANIFEST and not values["shards"]:
                raise ValueError("it names no shard")
            values["shards"] = [read_record(shard, Shard) for shard in values["shards"]]
            manifest = read_record(values, Manifest)
            _check_manifest(manifest)
            return manifest
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{field} must hold a readable manifest, got {str(folder / name)!r}: {error}: "
            f"restore it, or remove {folder} and prepare the corpus again"
        ) from None
    raise ValueError(
        f"{field} must hold data of format {FORMAT}, got {version!r} in {str(folder / name)!r}: "
        "prepare the corpus again, in another folder"
    )


def _check_manifest(manifest: Manifest) -> None:
    if manifest.dtype not in ("<u2", "<u4"):
        raise ValueError(f"dtype is {manifest.dtype!r}")
    for shard in manifest.shards:
        if Path(shard.file).name != shard.file or shard.tokens < 1 or shard.max_id < 0:
            raise ValueError(f"it names the shard {str(shard)[:100]}")
        if len(shard.next) != 2 or min(shard.next) < 0:
            raise ValueError(f"next of a shard is {shard.next}")


def has_size(folder: Path, shard: Shard, itemsize: int) -> bool:
    """Whether the file of a shard exists and has the right size."""
    path = folder / shard.file
    return path.is_file() and path.stat().st_size == shard.tokens * itemsize


def tokenizer_digest(path: str | Path) -> str:
    """SHA-256 of the files of a tokenizer, in hexadecimal."""
    sha = hashlib.sha256()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        content = Path(path, name).read_bytes() if Path(path, name).is_file() else b""
        sha.update(len(content).to_bytes(8, "little") + content)
    return sha.hexdigest()


def resume_manifest(out: str | Path, manifest: Manifest) -> tuple[Manifest, bool]:
    """Add the finished shards in `out` to the manifest.

    Returns:
        The manifest with the shards that are kept, and whether the split is complete.
    """
    folder = Path(out) / manifest.split
    names = [name for name in (MANIFEST, PARTIAL_MANIFEST) if (folder / name).exists()]
    if not names:
        return manifest, False
    found = read_manifest(out, manifest.split, "--output", names[0])
    flags = {
        "dataset": "--dataset",
        "tokenizer_sha256": "--tokenizer",
        "shard_size": "--shard-size",
    }
    for name, flag in flags.items():
        if getattr(found, name) != getattr(manifest, name):
            raise ValueError(
                f"--output must be a new folder or one begun with this {flag}, got "
                f"{str(folder)!r}, begun with {getattr(found, name)!r} and not "
                f"{getattr(manifest, name)!r}: name another folder, or the former value"
            )

    sources = [list(m.sources.items()) for m in (found, manifest)]

    def is_unchanged(shard: Shard) -> bool:
        file, row = shard.next
        count = file + (row > 0)
        return sources[0][:count] == sources[1][:count]

    is_ended = names[0] == MANIFEST
    kept = list(itertools.takewhile(is_unchanged, found.shards))
    if (sources[0] != sources[1]) if is_ended else (found.shards and not kept):
        raise ValueError(
            f"--output must be a new folder or one of the same files, got {str(folder)!r}, made of "
            f"{len(found.sources)} files whose names and sizes are not those of the "
            f"{len(manifest.sources)} here: name another folder, or the former --dataset-path"
        )
    kept = list(itertools.takewhile(lambda shard: has_size(folder, shard, found.itemsize), kept))
    is_whole = is_ended and len(kept) == len(found.shards)
    return dataclasses.replace(manifest, shards=kept), is_whole


def verify(out: str | Path) -> list[Manifest]:
    """Compare every shard of the prepared splits in `out` with its checksum.

    Raises:
        ValueError: in one line. A shard differs, or there is no split.
    """
    folders = [Path(out) / split for split in SECTIONS]
    manifests = [
        read_manifest(out, folder.name, "--output") for folder in folders if folder.is_dir()
    ]
    if not manifests:
        raise ValueError(f"--output must hold prepared data, got {str(out)!r}: correct the path")
    for manifest in manifests:
        total = manifest.tokens * manifest.itemsize
        with progress_bar(f"verify {manifest.split}", total) as bar:
            for shard in manifest.shards:
                file = Path(out) / manifest.split / shard.file
                if _file_sha256(file, bar) != shard.sha256:
                    raise ValueError(
                        f"--output must hold the shards as they were written, got {str(file)!r} "
                        "with another checksum or none: remove the file and start the same "
                        "preparation again, which writes it again"
                    )
    return manifests


def _file_sha256(path: Path, bar: tqdm) -> str | None:
    """SHA-256 of a file. None if it cannot be read."""
    sha = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while chunk := file.read(2**20):
                sha.update(chunk)
                bar.update(len(chunk))
    except OSError:
        return None
    return sha.hexdigest()


def progress_bar(name: str, total: int, done: int = 0) -> tqdm:
    """A progress bar in bytes, shown only on a terminal."""
    return tqdm(desc=name, total=total, initial=done, disable=None, unit="B", unit_scale=True)
