"""The data path: documents become windows of tokens, and a checkpoint keeps the exact position.

    for epoch in 0, 1, 2, ...:                      # once, where not `infinite`
        for document in this rank's share:          # order and split: `datasets.py`
            buffer += encode(document)              # with the tokenizer's BOS and EOS
            while len(buffer) > seq_len:
                yield buffer[:seq_len], buffer[1 : seq_len + 1]
                buffer = buffer[seq_len:]           # the last label is the next first input

so that every token but a rank's very first is a label exactly once. What an epoch leaves in the
buffer opens the next one. A long document is taken up in parts (`long_documents.py`). A position is
(epoch, documents consumed, parts of the next one, buffer) and, where the corpus is streamed, the
stream's own state; it has prints of all files (`source_changes.py`). A run that is resumed, any
number of times and in any epoch, sees the windows that it would have seen. Data that was tokenized
beforehand is read by `tokenized.py` instead.
"""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.stateful import Stateful
from torch.utils.data import IterableDataset
from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import JobConfig
from torchtitan.experiments.lighthouse.data.datasets import (
    DATASETS,
    SECTIONS,
    Corpus,
    check_dataset,
    is_held_out,
    open_documents,
)
from torchtitan.experiments.lighthouse.data.long_documents import parts_of
from torchtitan.experiments.lighthouse.data.readers import MAX_WORKERS
from torchtitan.experiments.lighthouse.data.retry import in_one_line
from torchtitan.experiments.lighthouse.data.source_changes import ACCEPT_FILES
from torchtitan.experiments.lighthouse.data.tokenized import PreparedDataloader, PreparedDataset

__all__ = [
    "DATASETS",
    "Corpus",
    "PackedTextDataset",
    "build_dataloader",
    "build_validation_dataloader",
    "check_data",
    "check_dataset",
    "is_held_out",
]

# Little-endian in a checkpoint, whatever machine writes it.
_TOKEN_DTYPE = np.dtype("<i4")


class PackedTextDataset(IterableDataset, Stateful):
    """One rank's documents, tokenized and packed into windows of `seq_len` tokens.

    Yields `({"input": [seq_len]}, labels [seq_len])`, both int64. `iter()` starts at the beginning,
    or, the first time after `load_state_dict`, at the position loaded. Only the newest iterator may
    be used.

    Args:
        dataset: a key of `DATASETS`.
        dataset_path: the folder or file of the corpus, where it needs one.
        tokenizer: torchtitan's tokenizer.
        seq_len: tokens per window.
        split: "train", or "validation" for the held-out documents alone.
        seed: of the order of the documents, where the corpus is map-style.
        dp_rank, dp_world_size: which share of the documents to read.
        accepts_changes: whether a data position may be one of files that have changed since.
        infinite: start the next epoch after the last document, rather than stop. The tokens that
            do not fill a window are dropped when it stops.

    Raises:
        ValueError: what `check_dataset` raises; a rank without documents; while iterating, a file
            or a stream that is broken or cannot be read, whereafter the position stands before it,
            and an epoch without one token, or, where not `infinite`, without one window.
    """

    def __init__(
        self,
        dataset: str,
        dataset_path: str | None,
        tokenizer: BaseTokenizer,
        seq_len: int,
        *,
        split: str = "train",
        seed: int = 0,
        dp_rank: int = 0,
        dp_world_size: int = 1,
        infinite: bool = True,
        accepts_changes: bool = False,
    ) -> None:
        self._section = SECTIONS[split]
        check_dataset(dataset, dataset_path, self._section)
        self.dataset, self.split, self.seq_len = dataset, split, seq_len
        self.seed, self.infinite = seed, infinite
        self._tokenizer = tokenizer
        self._accepts_changes = accepts_changes
        self._documents = open_documents(dataset, dataset_path, split, dp_rank, dp_world_size)
        self._resumed = False
        self._rewind()

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        if not self._resumed:
            self._rewind()
        self._resumed = False
        return self._windows()

    def position(self) -> dict[str, int]:
        """Returns the epoch (from 0), the documents consumed in it, and the tokens not yet labels.

        This rank's own counts. With a data-loading worker, the position is the worker's: ask the
        dataloader's `state_dict`, not this.
        """
        return {
            "epoch": self._epoch,
            "documents": self._consumed,
            "tokens_buffered": sum(map(len, self._buffer)),
        }

    def state_dict(self) -> dict[str, Any]:
        """Returns the position: numbers, the buffer's tokens as bytes, and the stream's state."""
        return {
            "corpus": self._documents.fingerprint,
            "seed": self.seed,
            "epoch": self._epoch,
            "documents": self._consumed,
            "epoch_tokens": self._epoch_tokens,
            "buffer": b"".join(tokens.tobytes() for tokens in self._buffer),
            "cursor": self._cursor,
            "parts": self._parts,
            "files": self._documents.prints,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Moves to a position that `state_dict` returned, and to its seed.

        Raises:
            ValueError: where the position belongs to other documents.
        """
        self._documents.check_position(state_dict, self._accepts_changes)
        self.seed = state_dict["seed"]
        self._epoch = state_dict["epoch"]
        self._consumed = state_dict["documents"]
        self._epoch_tokens = state_dict["epoch_tokens"]
        self._buffer = [np.frombuffer(state_dict["buffer"], dtype=_TOKEN_DTYPE)]
        self._cursor = state_dict["cursor"]
        self._parts = state_dict.get("parts", 0)
        self._resumed = True

    def _rewind(self) -> None:
        self._buffer: list[np.ndarray] = []
        self._start_epoch(0)

    def _start_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        self._consumed = self._epoch_tokens = 0
        # Parts, of the document after those consumed, that are in the buffer or behind it.
        self._parts = 0
        self._cursor: dict[str, Any] | None = None

    def _windows(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        # A position that was loaded may hold whole windows.
        yield from self._cut()
        while True:
            documents = self._documents.read(self.seed, self._epoch, self._consumed, self._cursor)
            for text, cursor in documents:
                yield from self._windows_of(text, cursor)
            self._check_epoch()
            if not self.infinite:
                return
            self._start_epoch(self._epoch + 1)

    def _windows_of(
        self, text: str, cursor: Any
    ) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        """Takes up a document, part by part, but for the parts that are taken up already."""
        parts = list(parts_of(text))
        for number, part in enumerate(parts[self._parts :], self._parts + 1):
            is_last = number == len(parts)
            tokens = self._tokenizer.encode(part, add_bos=number == 1, add_eos=is_last)
            self._buffer.append(np.array(tokens, dtype=_TOKEN_DTYPE))
            self._epoch_tokens += len(tokens)
            self._parts = number
            if is_last:
                self._cursor, self._parts = cursor, 0
                self._consumed += 1
            yield from self._cut()

    def _cut(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        """Yields the whole windows of the buffer; each is out of it before it is yielded."""
        if sum(map(len, self._buffer)) <= self.seq_len:
            return
        tokens = np.concatenate(self._buffer)
        while len(tokens) > self.seq_len:
            window = torch.from_numpy(tokens[: self.seq_len + 1].astype(np.int64))
            tokens = tokens[self.seq_len :]
            self._buffer = [tokens]
            yield {"input": window[:-1]}, window[1:]

    def _check_epoch(self) -> None:
        """Refuses an epoch that gave nothing, since the next would not either."""
        what = f"the {self.split} split of {self.dataset!r}"
        if self._consumed == 0:
            raise ValueError(
                f"{self._section}.dataset must have a document for each data-parallel rank, got "
                f"none for this rank from {what}: add documents or lower the data-parallel degree"
            )
        if self._epoch_tokens == 0:
            raise ValueError(
                f"{self._section}.dataset must have text, got no token from the {self._consumed} "
                f"documents of this rank from {what}: fill the documents"
            )
        if not self.infinite and self._epoch_tokens <= self.seq_len:
            raise ValueError(
                f"{self._section}.seq_len must be less than the tokens of a rank, got "
                f"{self.seq_len} with {self._epoch_tokens} tokens from {what}: lower it, or set "
                f"{self._section}.steps to a number, for which the text is read again"
            )


class TextDataloader(ParallelAwareDataloader):
    """Batches of one rank's windows; the error of a data-loading worker keeps its one line."""

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        return in_one_line(super().__iter__)


def check_data(job_config: JobConfig, must_exist: bool = True) -> None:
    """Checks everything about the data that can be told without loading it.

    Args:
        must_exist: whether paths that do not exist are wrong.

    Raises:
        ValueError: what `check_dataset` raises, and for a number of data-loading workers that
            cannot be; for validation only where it is enabled.
    """
    sections = ["training"] + ["validation"] * job_config.validation.enable
    for section in sections:
        options = getattr(job_config, section)
        check_dataset(options.dataset, options.dataset_path, section, must_exist)
        _check_num_workers(options.dataloader.num_workers, section, options.dataset)


def build_dataloader(
    dp_world_size: int, dp_rank: int, tokenizer: BaseTokenizer, job_config: JobConfig
) -> ParallelAwareDataloader:
    """Builds the endless loader of `job_config.training`.

    Its batches are `({"input": [B, S]}, labels [B, S])` of int64, with B the local batch size. The
    documents, or the windows of prepared data, are ordered by `job_config.debug.seed`, or by 0
    where that is None.

    Raises:
        ValueError: what the dataset raises, and for a number of workers that cannot be.
    """
    return _build("train", True, dp_world_size, dp_rank, tokenizer, job_config)


def build_validation_dataloader(
    dp_world_size: int, dp_rank: int, tokenizer: BaseTokenizer, job_config: JobConfig
) -> ParallelAwareDataloader:
    """Builds the loader of the held-out documents, from `job_config.validation`.

    Each `iter()` gives the same batches, `({"input": [B, S]}, labels [B, S])` of int64. It is
    endless, wrapping around a short text, unless `validation.steps` is -1, the whole split once.
    The windows of prepared data are those of seed 0, whatever the run's.

    Raises:
        ValueError: what the dataset raises, and for a number of workers that cannot be.
    """
    infinite = job_config.validation.steps != -1
    return _build("validation", infinite, dp_world_size, dp_rank, tokenizer, job_config)


def _build(
    split: str,
    infinite: bool,
    dp_world_size: int,
    dp_rank: int,
    tokenizer: BaseTokenizer,
    job_config: JobConfig,
) -> ParallelAwareDataloader:
    options = getattr(job_config, SECTIONS[split])
    _check_num_workers(options.dataloader.num_workers, SECTIONS[split], options.dataset)
    seed = job_config.debug.seed or 0
    # torchtitan's own configuration has no such field.
    accepts_changes = ACCEPT_FILES in getattr(job_config.checkpoint, "accept_changes", ())
    loading = {
        "dp_rank": dp_rank,
        "dp_world_size": dp_world_size,
        "batch_size": options.local_batch_size,
        **asdict(options.dataloader),
    }
    if options.dataset == "prepared":
        # Held-out windows are the same for runs of different seeds, whose losses are compared.
        seed = 0 if split == "validation" else seed
        prepared = PreparedDataset(
            options.dataset_path,
            options.seq_len,
            split=split,
            seed=seed,
            infinite=infinite,
            accepts_changes=accepts_changes,
        )
        return PreparedDataloader(prepared, **loading)
    dataset = PackedTextDataset(
        options.dataset,
        options.dataset_path,
        tokenizer,
        options.seq_len,
        split=split,
        seed=seed,
        dp_rank=dp_rank,
        dp_world_size=dp_world_size,
        infinite=infinite,
        accepts_changes=accepts_changes,
    )
    return TextDataloader(dataset, **loading)


def _check_num_workers(num_workers: int, section: str, dataset: str) -> None:
    if dataset == "prepared":
        if not 0 <= num_workers <= MAX_WORKERS:
            raise ValueError(
                f"{section}.dataloader.num_workers must be from 0 to {MAX_WORKERS} on this "
                f"machine, got {num_workers}; use 0"
            )
    elif num_workers not in (0, 1):
        raise ValueError(
            f"{section}.dataloader.num_workers must be 0 or 1, got {num_workers}: the order of the "
            "documents and a resumed position would depend on the number of workers; set it to 1"
        )
