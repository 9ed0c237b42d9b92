"""Tokenize a corpus and write the shards that `tokenized.py` reads.

    for rows in the files of the corpus, in order:       # this process; `_Rows`
        tokens = encode(text of each document)           # worker processes; with BOS and EOS
        shard += tokens of a document                    # in the order of the rows
        when the shard has shard_size tokens:
            rename it from its partial name, and enter it in the partial manifest

The manifest gets its final name last. The output depends on the sources, the tokenizer and
`shard_size`, but not on the number of workers. The entry of a shard records where the next shard
starts in the sources. A killed preparation therefore resumes from the last whole shard, and its
final output has the same bytes as without the kill.
"""

import contextlib
import dataclasses
import functools
import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.experiments.lighthouse.data.datasets import (
    DATASETS,
    check_text_field,
    corpus_root,
    find_files,
    is_held_out,
)
from torchtitan.experiments.lighthouse.data.long_documents import parts_of
from torchtitan.experiments.lighthouse.data.manifest import (
    FORMAT,
    MANIFEST,
    PARTIAL_MANIFEST,
    Manifest,
    Shard,
    progress_bar,
    resume_manifest,
    tokenizer_digest,
)
from torchtitan.experiments.lighthouse.data.partial_shard import PartialShard
from torchtitan.experiments.lighthouse.data.readers import (
    MAX_WORKERS,
    READ_ERRORS,
    READERS,
    TEXT_COLUMN,
    Row,
    document_text,
    row_location,
)
from torchtitan.experiments.lighthouse.runtime.atomic_json import write_json
from torchtitan.experiments.lighthouse.runtime.command_line import (
    check_output_folder,
    open_tokenizer,
)
from torchtitan.experiments.lighthouse.runtime.read_files import check_regular
from torchtitan.experiments.lighthouse.runtime.run_lock import FILE_NAME as LOCK
from torchtitan.experiments.lighthouse.runtime.run_lock import FolderLock

SOURCES = [name for name, corpus in DATASETS.items() if corpus.reader not in ("hub", "tokenized")]
"""Datasets that can be prepared. Their files are on this machine."""

SHARD_SIZE = 100_000_000
"""Tokens per shard. 200 MB for a small vocabulary, 400 MB for a large one."""

_FIELD = "--dataset-path"


@dataclass(frozen=True)
class _Rows:
    """Consecutive rows of a source: lines, texts of a table, or a whole text file as one row."""

    path: Path
    file: int
    """Index of the source."""

    first: int
    """Number of the first row in its file, from 0."""

    rows: list[Row]
    read: int
    """Stored bytes of the file that were read so far. An estimate for tables."""


@dataclass(frozen=True)
class _Encoding:
    """The settings that turn rows into tokens."""

    reader: str
    split: str
    all_rows: bool
    tokenizer_path: str
    dtype: str
    text_field: str


def prepare(
    dataset: str,
    dataset_path: str | None,
    out: str | Path,
    tokenizer_path: str,
    *,
    split: str = "train",
    shard_size: int = SHARD_SIZE,
    workers: int = 1,
    text_field: str = TEXT_COLUMN,
) -> Manifest:
    """Prepare a split of a corpus in `out`, or resume its preparation. A finished split is kept.

    Shows a progress bar on a terminal. Otherwise prints a line for each shard.

    Args:
        dataset: one of `SOURCES`.
        dataset_path: folder or file of the dataset, if it needs one.
        tokenizer_path: folder of the tokenizer.
        split: "train" or "validation".
        shard_size: a shard ends after the document that reaches this number of tokens.
        workers: number of processes that tokenize. 1: this process.
        text_field: the key of JSON lines, or the column of tables, that holds the text.

    Raises:
        ValueError: in one line. An argument is illegal. A file cannot be read or holds no text
            (with file and line). The split has no text. `out` holds other data or cannot be
            written.
    """
    files = source_files(dataset, dataset_path, split)
    check_text_field(dataset, text_field, "--text-field")
    _check_arguments(dataset, dataset_path, out, shard_size, workers)
    tokenizer = open_tokenizer("--tokenizer", tokenizer_path).tokenizer
    root = corpus_root(dataset, dataset_path)
    folder = Path(out) / split
    manifest = Manifest(
        format=FORMAT,
        # The same files with another text field are another corpus.
        dataset=dataset if text_field == TEXT_COLUMN else f"{dataset}:{text_field}",
        split=split,
        tokenizer_sha256=tokenizer_digest(tokenizer_path),
        vocab_size=tokenizer.get_vocab_size(),
        dtype="<u2" if max(tokenizer.get_vocab().values()) < 2**16 else "<u4",
        shard_size=shard_size,
        sources={_name(file, root): _size(file) for file in files},
        shards=[],
    )
    # Raises an error for a folder of other data before anything is written.
    resume_manifest(out, manifest)
    corpus = DATASETS[dataset]
    encoding = _Encoding(
        corpus.reader,
        split,
        not corpus.held_out_by_content,
        tokenizer_path,
        manifest.dtype,
        text_field,
    )
    with _writing(out), FolderLock("--output", folder.parent):
        is_new = not folder.exists()
        try:
            return _prepare_locked(out, manifest, files, encoding, workers)
        except ValueError:
            if is_new:
                _remove_empty(folder)
            raise


def _prepare_locked(
    out: str | Path, manifest: Manifest, files: list[Path], encoding: _Encoding, workers: int
) -> Manifest:
    folder = Path(out) / manifest.split
    # Another process may have written to it until now.
    manifest, is_whole = resume_manifest(out, manifest)
    with _writing(out):
        if is_whole:
            (folder / PARTIAL_MANIFEST).unlink(missing_ok=True)
            return manifest
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / PARTIAL_MANIFEST, dataclasses.asdict(manifest))
        (folder / MANIFEST).unlink(missing_ok=True)
    for whole in _write_shards(out, manifest, files, encoding, workers):
        manifest = dataclasses.replace(manifest, shards=[*manifest.shards, whole])
        if whole.tokens >= manifest.shard_size:
            with _writing(out):
                write_json(folder / PARTIAL_MANIFEST, dataclasses.asdict(manifest))
    if not manifest.shards:
        raise ValueError(
            f"--dataset-path must hold text, got none for the {manifest.split} split in the "
            f"{len(files)} files in {os.path.commonpath(files)!r}: add documents, or leave this "
            "split out with --split"
        )
    # A shard below `shard_size` is the last one. Only the final manifest lists it.
    with _writing(out):
        write_json(folder / MANIFEST, dataclasses.asdict(manifest))
        (folder / PARTIAL_MANIFEST).unlink()
    return manifest


def _remove_empty(folder: Path) -> None:
    """Remove the folder of a new split without finished shards."""
    if any(folder.glob("*.bin")):
        return
    with contextlib.suppress(OSError):
        for file in (*folder.glob("*.partial"), folder / PARTIAL_MANIFEST):
            file.unlink(missing_ok=True)
        folder.rmdir()
        if [file.name for file in folder.parent.iterdir()] == [LOCK]:
            (folder.parent / LOCK).unlink()
            folder.parent.rmdir()


def source_files(dataset: str, dataset_path: str | None, split: str) -> list[Path]:
    """List the files of a split in reading order.

    Raises:
        ValueError: the dataset cannot be prepared. The path is missing, superfluous or does not
            exist, or has no files of the split.
    """
    if dataset not in SOURCES:
        raise ValueError(
            f"--dataset must be one of {', '.join(SOURCES)}, whose files are on this machine, got "
            f"{dataset!r}: choose one of these"
        )
    needs_path = DATASETS[dataset].needs_path
    if needs_path != bool(dataset_path):
        rule, remedy = ("be set", "name its folder") if needs_path else ("not be set", "remove it")
        raise ValueError(
            f"--dataset-path must {rule} for {dataset!r}, got {dataset_path!r}: {remedy}"
        )
    root = corpus_root(dataset, dataset_path)
    if not root.exists():
        raise ValueError(f"--dataset-path must exist, got {str(root)!r}: correct the path")
    try:
        files = find_files(dataset, dataset_path, split)
    except OSError as error:
        raise _unreadable(f" in {str(root)!r}", error) from error
    if not files:
        patterns = " or ".join(DATASETS[dataset].split_patterns(split))
        raise ValueError(
            f"--dataset-path must hold {patterns} files for the {split} split of {dataset!r}, got "
            f"{str(root)!r} without any: add them, or leave this split out with --split"
        )
    return files


def _check_arguments(
    dataset: str, dataset_path: str | None, out: str | Path, shard_size: int, workers: int
) -> None:
    for name, value in (("--shard-size", shard_size), ("--workers", workers)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}: use 1 or more")
    if workers > MAX_WORKERS:
        raise ValueError(
            f"--workers must be at most {MAX_WORKERS} on this machine, got {workers}: use as many "
            "as it has cores"
        )
    check_output_folder("--output", out)
    # Unlike Path.resolve, realpath accepts a loop of symbolic links.
    root = os.path.realpath(corpus_root(dataset, dataset_path))
    if Path(os.path.realpath(out)).is_relative_to(root):
        raise ValueError(
            f"--output must lie outside of the corpus, got {str(out)!r} within {str(root)!r}: its "
            "files could be taken for documents; name another folder"
        )


def _name(file: Path, root: Path) -> str:
    return file.name if file == root else file.relative_to(root).as_posix()


def _size(file: Path) -> int:
    try:
        return check_regular(file).st_size
    except (OSError, ValueError) as error:
        raise _unreadable(f" in {str(file)!r}", error) from error


def _unreadable(where: str, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())
    return ValueError(
        f"--dataset-path must hold readable files, got an error{where}: {reason}: replace or "
        "remove the file and start the same command again"
    )


@functools.cache
def _tokenizer(path: str) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(path)


def _read_rows(files: list[Path], encoding: _Encoding, start: list[int]) -> Iterator[_Rows]:
    """Yield the rows of the files from `start`, the index of a file and a row in it.

    Raises:
        ValueError: a file cannot be read to its end.
    """
    reader = READERS[encoding.reader]
    for file in range(start[0], len(files)):
        skipped = start[1] if file == start[0] else 0
        row = 0
        try:
            for rows, num_bytes in reader(files[file], _FIELD, encoding.text_field):
                begin = max(0, skipped - row)
                if begin < len(rows):
                    yield _Rows(files[file], file, row + begin, rows[begin:], num_bytes)
                row += len(rows)
        except READ_ERRORS as error:
            place = row_location(encoding.reader, files[file], row + 1)
            raise _unreadable(place, error) from error


def _encode(rows: _Rows, encoding: _Encoding) -> tuple[np.ndarray, list[int]]:
    """The tokens of the documents in `rows`, and the number of tokens of each row."""
    tokenizer = _tokenizer(encoding.tokenizer_path)
    tokens, counts = [], []
    for number, row in enumerate(rows.rows, rows.first + 1):
        place = row_location(encoding.reader, rows.path, number)
        text = document_text(row, encoding.reader, _FIELD, place, encoding.text_field)
        before = len(tokens)
        if text and (encoding.all_rows or is_held_out(text) == (encoding.split == "validation")):
            parts = list(parts_of(text))
            for part_number, part in enumerate(parts, 1):
                is_last = part_number == len(parts)
                ids = tokenizer.encode(part, add_bos=part_number == 1, add_eos=is_last)
                tokens.append(np.array(ids, dtype=encoding.dtype))
        counts.append(sum(map(len, tokens[before:])))
    return np.concatenate([np.empty(0, dtype=encoding.dtype), *tokens]), counts


def _encoded(
    chunks: Iterable[_Rows], encoding: _Encoding, workers: int
) -> Iterator[tuple[_Rows, np.ndarray, list[int]]]:
    """Yield the rows in order, with their tokens."""
    if workers == 1:
        for rows in chunks:
            yield rows, *_encode(rows, encoding)
        return
    with ProcessPoolExecutor(workers, initializer=_live_as_long_as_the_parent) as pool:
        pending = deque()
        try:
            for rows in chunks:
                pending.append((rows, pool.submit(_encode, rows, encoding)))
                # Read far enough ahead that no worker waits, but bound the memory.
                if len(pending) > 2 * workers:
                    rows, result = pending.popleft()
                    yield rows, *result.result()
            for rows, result in pending:
                yield rows, *result.result()
        except BrokenProcessPool as error:
            raise ValueError(
                f"--workers must be as many as fit in memory, got {workers}, of which one "
                "was killed: start the same command again with fewer"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _live_as_long_as_the_parent() -> None:
    """End a worker when its parent process ends, for whatever reason, but not on Ctrl-C."""

    def end() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()
    # The parent handles the interrupt and then ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _write_shards(
    out: str | Path, manifest: Manifest, files: list[Path], encoding: _Encoding, workers: int
) -> Iterator[Shard]:
    """Write the shards after those of the manifest, and yield each finished one."""
    folder = Path(out) / manifest.split
    start = manifest.shards[-1].next if manifest.shards else [0, 0]
    numbers = itertools.count(len(manifest.shards))
    # Total bytes of the files before each file, and of all files.
    before = [0, *itertools.accumulate(manifest.sources.values())]
    read, shard = before[start[0]], None

    def finish(following: list[int]) -> Shard:
        with _writing(out):
            whole = shard.finish(following)
        if bar.disable:
            print(
                f"{manifest.split}/{whole.file}: {whole.tokens:,} tokens of {whole.documents:,} "
                f"documents, {read / before[-1]:.0%} of the files",
                flush=True,
            )
        return whole

    with progress_bar(manifest.split, before[-1], read) as bar:
        try:
            chunks = _read_rows(files, encoding, start)
            for rows, tokens, counts in _encoded(chunks, encoding, workers):
                read = before[rows.file] + rows.read
                bar.update(read - bar.n)
                ends = np.cumsum(counts)
                for row, (count, end) in enumerate(zip(counts, ends, strict=True), rows.first + 1):
                    if not count:
                        continue
                    with _writing(out):
                        shard = shard or PartialShard(folder / f"{next(numbers):05d}.bin")
                        shard.add(tokens[end - count : end])
                    if shard.tokens >= manifest.shard_size:
                        yield finish([rows.file, row])
                        shard = None
            if shard:
                yield finish([len(files), 0])
        finally:
            if shard:
                shard.close()


@contextlib.contextmanager
def _writing(out: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"--output must be a folder that can be written and has room, got {str(out)!r}: "
            f"{error}: make room and start the same command again, which resumes from the last "
            "whole shard"
        ) from error
