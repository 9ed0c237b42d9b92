"""The data path: documents become windows of tokens, and a checkpoint keeps the exact position.

    for epoch in 0, 1, 2, ...:                      # once, where not `infinite`
        for document in this rank's share:          # order and split: `documents.py`
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
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.stateful import Stateful
from torch.utils.data import IterableDataset
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.experiments.lighthouse.data.datasets import SECTIONS, check_dataset
from torchtitan.experiments.lighthouse.data.documents import open_documents
from torchtitan.experiments.lighthouse.data.long_documents import parts_of
from torchtitan.experiments.lighthouse.data.readers import TEXT_COLUMN

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
        text_field: the key of JSON lines, or the column of tables, that holds the text.

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
        text_field: str = TEXT_COLUMN,
        accepts_changes: bool = False,
    ) -> None:
        self._section = SECTIONS[split]
        check_dataset(dataset, dataset_path, self._section, text_field=text_field)
        self.dataset, self.split, self.seq_len = dataset, split, seq_len
        self.seed, self.infinite = seed, infinite
        self._tokenizer = tokenizer
        self._accepts_changes = accepts_changes
        self._documents = open_documents(
            dataset, dataset_path, split, dp_rank, dp_world_size, text_field
        )
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
