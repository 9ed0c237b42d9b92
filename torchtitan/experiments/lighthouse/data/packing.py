"""Pack documents into windows of tokens, with an exact position for checkpoints.

    for epoch in 0, 1, 2, ...:                      # only epoch 0 if not `infinite`
        for document in this rank's share:          # order and split: `documents.py`
            buffer += encode(document)              # with the tokenizer's BOS and EOS
            while len(buffer) > seq_len:
                yield buffer[:seq_len], buffer[1 : seq_len + 1]
                buffer = buffer[seq_len:]           # the last label is the next first input

Every token, except the very first one of a rank, is a label exactly once per epoch. The rest of the
buffer starts the next epoch. A long document is added in parts (`long_documents.py`).

A position holds the epoch, the documents consumed, the parts of the next document, and the buffer.
It also holds fingerprints of all files (`source_changes.py`), and the state of a streamed corpus. A
resumed run sees the same windows as an uninterrupted one. `tokenized.py` reads data that was
tokenized before training.
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

# Checkpoints are little-endian on every machine.
_TOKEN_DTYPE = np.dtype("<i4")


class PackedTextDataset(IterableDataset, Stateful):
    """One rank's documents, tokenized and packed into windows of `seq_len` tokens.

    Yields `({"input": [seq_len]}, labels [seq_len])`, both int64. `iter()` starts at the beginning.
    The first one after `load_state_dict` starts at the loaded position. Only the newest iterator
    may be used.

    Args:
        dataset: a key of `DATASETS`.
        dataset_path: the folder or file of the corpus, if it needs one.
        tokenizer: torchtitan's tokenizer.
        seq_len: tokens per window.
        split: "train", or "validation" for the held-out documents.
        seed: seed of the order of documents in a map-style corpus.
        dp_rank, dp_world_size: share of the documents to read.
        accepts_changes: whether a loaded position may belong to files that have changed since.
        infinite: whether the next epoch follows the last document. If not, the last tokens that do
            not fill a window are dropped.
        text_field: the key of JSON lines, or the column of tables, that holds the text.

    Raises:
        ValueError: `check_dataset` fails, or a rank has no documents. While iterating: a file or
            stream is broken or cannot be read, and the position stays before it. An epoch has no
            token, or not a single window if not `infinite`.
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
        """The epoch (from 0), the documents consumed in it, and the number of buffered tokens.

        These are counts of this rank. With a data-loading worker, the worker has the position. Use
        the `state_dict` of the data loader instead.
        """
        return {
            "epoch": self._epoch,
            "documents": self._consumed,
            "tokens_buffered": sum(map(len, self._buffer)),
        }

    def state_dict(self) -> dict[str, Any]:
        """The position: numbers, the buffered tokens as bytes, and the state of the stream."""
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
        """Set the position and seed from a `state_dict`.

        Raises:
            ValueError: the position belongs to other documents.
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
        # Number of parts of the current document that were added to the buffer.
        self._parts = 0
        self._cursor: dict[str, Any] | None = None

    def _windows(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        # The buffer of a loaded position may hold whole windows.
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
        """Add the remaining parts of a document to the buffer, and yield its windows."""
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
        """Yield the whole windows of the buffer. Each is removed before it is yielded."""
        if sum(map(len, self._buffer)) <= self.seq_len:
            return
        tokens = np.concatenate(self._buffer)
        while len(tokens) > self.seq_len:
            window = torch.from_numpy(tokens[: self.seq_len + 1].astype(np.int64))
            tokens = tokens[self.seq_len :]
            self._buffer = [tokens]
            yield {"input": window[:-1]}, window[1:]

    def _check_epoch(self) -> None:
        """Raise ValueError if the epoch was empty. All further epochs would be empty, too."""
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
