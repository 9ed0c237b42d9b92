"""Tokenized data: a corpus tokenized once, read in windows of any number of ranks, in any order.

    <dataset_path>/<split>/manifest.json   what was tokenized, by what, and the shards (`Manifest`)
    <dataset_path>/<split>/00000.bin, ...  token ids, little-endian, of whole documents

`tokenize.py` writes it. The shards, one after the other, are the T tokens of the corpus; epochs
follow each other in one endless stream of tokens, and window k is the tokens k*S to k*S + S of it,
S inputs and the S labels one further. Every token but the very first is thus a label exactly once
an epoch, as in `data.py`, and what is left of an epoch opens a window with the next one.

    epoch e    the windows that begin in it: those with e*T <= k*S < (e+1)*T
    order      within an epoch a random permutation of its windows
    rank r     of W takes the places r, r + W, r + 2W, ... of that order

so that the W ranks together read the order as it is, whatever W: a global batch is the same, and
the number of windows that all ranks have read together is the whole position. Finding the window
of a place takes the same time everywhere in the stream.
"""

import bisect
import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.stateful import Stateful
from torch.utils.data import Dataset
from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.experiments.lighthouse.data.datasets import SECTIONS
from torchtitan.experiments.lighthouse.data.manifest import (
    has_size,
    read_manifest,
    tokenizer_digest,
)
from torchtitan.experiments.lighthouse.data.readers import read_error, stat_files
from torchtitan.experiments.lighthouse.data.retry import in_one_line, retrying
from torchtitan.experiments.lighthouse.data.source_changes import check_prints, file_prints

# More than the four that make a random permutation of a large domain: small ones need them.
_FEISTEL_ROUNDS = 8


def check_tokenized(path: str, section: str, tokenizer_path: str, vocab_size: int) -> None:
    """Checks a prepared split without reading a token: its manifest, and the sizes of its shards.

    Args:
        path: `<section>.dataset_path`.
        section: "training" or "validation".
        tokenizer_path: `model.hf_assets_path`.
        vocab_size: token ids that the model knows.

    Raises:
        ValueError: in one line, what `read_manifest` raises, for another tokenizer than the run's,
            for ids beyond the vocabulary, and for a shard that is missing or of another size.
    """
    field = f"{section}.dataset_path"
    split = next(split for split, its_section in SECTIONS.items() if its_section == section)
    manifest = read_manifest(path, split, field)
    if manifest.tokenizer_sha256 != tokenizer_digest(tokenizer_path):
        raise ValueError(
            f"{field} must be prepared with the tokenizer of model.hf_assets_path, "
            f"{tokenizer_path!r}, got {path!r}, prepared with another one of "
            f"{manifest.vocab_size} tokens: name that tokenizer, or prepare the corpus anew"
        )
    max_id = max(shard.max_id for shard in manifest.shards)
    if max_id >= vocab_size:
        raise ValueError(
            f"{field} must hold token ids less than the {vocab_size} of the model, got {max_id} "
            f"in {path!r}: raise model.override.vocab_size, or choose another flavor"
        )
    folder = Path(path).expanduser() / split
    for shard in manifest.shards:
        if not has_size(folder, shard, manifest.itemsize):
            file = folder / shard.file
            found = f"{file.stat().st_size} bytes" if file.is_file() else "none"
            raise ValueError(
                f"{field} must hold every shard whole, got {found} for the "
                f"{shard.tokens * manifest.itemsize} bytes of {str(file)!r}: restore the file, or "
                "start the same lighthouse prepare again, which makes it anew"
            )


def shuffled(index: int, count: int, seed: int, epoch: int) -> int:
    """Returns what a random permutation of range(count), given by seed and epoch, has at `index`.

    A Feistel network permutes the numbers of twice `half` bits, at most four times `count`; a
    result beyond the range goes through it again until it is within (cycle walking). Unlike a list
    of shuffled indices, which a resume would have to draw anew, it takes no time and no memory
    that grows with the corpus: a trillion tokens are some 10**8 windows.
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    while True:
        left, right = index >> half, index & (1 << half) - 1
        for turn in range(_FEISTEL_ROUNDS):
            # The same on every machine and with every version.
            digest = hashlib.blake2b(f"{seed} {epoch} {turn} {right}".encode(), digest_size=8)
            mixed = int.from_bytes(digest.digest(), "little") & (1 << half) - 1
            left, right = right, left ^ mixed
        index = left << half | right
        if index < count:
            return index


class TokenizedDataset(Dataset, Stateful):
    """The windows of a prepared split, by their place in the global order.

    `dataset[place]` is `({"input": [seq_len]}, labels [seq_len])`, both int64, for any place from
    0: the order is endless.

    Args:
        path: `dataset_path`.
        seq_len: tokens per window.
        split: "train" or "validation".
        seed: of the order.
        infinite: if not, the order ends after one epoch, of the windows that lie within the corpus;
            the tokens that do not fill one are left out.
        accepts_changes: whether a data position may be one of shards that have changed since.

    Raises:
        ValueError: what `read_manifest` raises; a shard that is missing; where not `infinite`, an
            epoch without one window. While windows are read, a shard that cannot be read or has
            changed.
    """

    def __init__(
        self,
        path: str,
        seq_len: int,
        *,
        split: str = "train",
        seed: int = 0,
        infinite: bool = True,
        accepts_changes: bool = False,
    ) -> None:
        self._section = SECTIONS[split]
        self._accepts_changes = accepts_changes
        self._folder = Path(path).expanduser() / split
        field = f"{self._section}.dataset_path"
        self._manifest = read_manifest(path, split, field)
        shards = [self._folder / shard.file for shard in self._manifest.shards]
        self._files = stat_files(shards, "shard", field)
        self._ends = list(itertools.accumulate(shard.tokens for shard in self._manifest.shards))
        # No position is saved of held-out windows.
        self._prints = file_prints(self._files) if split == "train" else b""
        self.seq_len, self.seed = seq_len, seed
        self.consumed = 0
        """Windows that all ranks together have taken; their loader counts."""

        self.num_places = None if infinite else (self._ends[-1] - 1) // seq_len
        """Places in the order; None: without an end."""

        if self.num_places == 0:
            raise ValueError(
                f"{self._section}.seq_len must be less than the tokens of the {split} split, got "
                f"{seq_len} with {self._ends[-1]} tokens in {path!r}: lower it, or set "
                f"{self._section}.steps to a number, for which they are read again"
            )

    def __getitem__(self, place: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        window = torch.from_numpy(self._read(self._window(place) * self.seq_len, self.seq_len + 1))
        return {"input": window[:-1]}, window[1:]

    def position(self) -> dict[str, int]:
        """Returns the epoch (from 0) and the windows that all ranks together have taken."""
        return {"epoch": self._epoch(self.consumed), "windows": self.consumed}

    def state_dict(self) -> dict[str, Any]:
        """Returns the position, the same on every rank, and what it belongs to."""
        return {
            # One string: a checkpoint with a further key could not be loaded from an older one.
            "corpus": f"{self._manifest.digest}:{self._prints.hex()}",
            "seq_len": self.seq_len,
            "seed": self.seed,
            "windows": self.consumed,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Moves to a position that `state_dict` returned on any rank of any number, and its seed.

        Raises:
            ValueError: where the position belongs to other tokens or to other windows.
        """
        anew = 'start anew with checkpoint.exclude_from_loading = ["dataloader"]'
        digest, _, prints = state_dict["corpus"].partition(":")
        if digest != self._manifest.digest:
            raise ValueError(
                f"{self._section}.dataset_path must hold the tokens of the checkpoint's data "
                f"position, got other ones in {str(self._folder)!r}: restore the folder, or {anew}"
            )
        if state_dict["seq_len"] != self.seq_len:
            raise ValueError(
                f"{self._section}.seq_len must be {state_dict['seq_len']}, the length of the "
                "windows that the checkpoint's data position counts, got "
                f"{self.seq_len}: set it to that, or {anew}"
            )
        check_prints(self._files, self._prints, bytes.fromhex(prints), self._accepts_changes)
        self.seed, self.consumed = state_dict["seed"], state_dict["windows"]

    def _epoch(self, place: int) -> int:
        return place * self.seq_len // self._ends[-1]

    def _window(self, place: int) -> int:
        """Returns the number of the window at a place of the order."""
        if self.num_places is not None:
            return shuffled(place, self.num_places, self.seed, 0)
        epoch = self._epoch(place)
        # The first windows that begin in this epoch and in the next.
        first, last = (-(-e * self._ends[-1] // self.seq_len) for e in (epoch, epoch + 1))
        return first + shuffled(place - first, last - first, self.seed, epoch)

    def _read(self, begin: int, count: int) -> np.ndarray:
        """Returns `count` tokens [count] of the endless stream, int64."""
        tokens = np.empty(count, dtype=np.int64)
        done = 0
        while done < count:
            start = (begin + done) % self._ends[-1]
            number = bisect.bisect_right(self._ends, start)
            length = min(count - done, self._ends[number] - start)
            tokens[done : done + length] = self._tokens(number, self._ends[number] - start, length)
            done += length
        return tokens

    def _tokens(self, number: int, from_end: int, length: int) -> np.ndarray:
        """Returns `length` tokens of a shard. It is opened for as long as they are read: a corpus
        can have more shards than a process may hold open. It is not mapped to memory, where an
        error of reading would end the process without a word."""
        file, itemsize = self._files[number], self._manifest.itemsize
        offset = (self._manifest.shards[number].tokens - from_end) * itemsize

        def read(_: None) -> Iterator[tuple[bytes, None]]:
            try:
                with open(file.path, "rb") as shard:
                    shard.seek(offset)
                    content = shard.read(length * itemsize)
                file.check_unchanged()
            except OSError as error:
                raise read_error(error, file.field, f" in {str(file.path)!r}") from error
            yield content, None

        content, _ = next(retrying(read, None))
        if len(content) < length * itemsize:
            raise ValueError(
                f"{file.field} must hold every shard whole, got {file.size} bytes for the "
                f"{self._manifest.shards[number].tokens * itemsize} of {str(file.path)!r}: restore "
                "the file, or start the same lighthouse prepare again, which makes it anew"
            )
        tokens = np.frombuffer(content, self._manifest.dtype)
        if tokens.max() > self._manifest.shards[number].max_id:
            raise ValueError(
                f"{file.field} must hold token ids up to {self._manifest.shards[number].max_id}, "
                f"got {tokens.max()} in {str(file.path)!r}: compare the shards with "
                "lighthouse prepare --verify, and prepare those that differ anew"
            )
        return tokens


class TokenizedDataloader(ParallelAwareDataloader):
    """One rank's batches of a prepared split, `({"input": [B, S]}, labels [B, S])`.

    Where the order has an end, all ranks stop after equally many windows. Its state is the
    dataset's alone. It names no rank, and any number of ranks can go on from it; what workers have
    read ahead is not counted, so that any number of workers can, too. `iter()` starts at the
    beginning, or, the first time after `load_state_dict`, at the position loaded.
    """

    def __init__(
        self,
        dataset: TokenizedDataset,
        dp_rank: int,
        dp_world_size: int,
        batch_size: int,
        **options: Any,
    ) -> None:
        places = _RankPlaces(dataset, dp_rank, dp_world_size)
        super().__init__(
            dataset, dp_rank, dp_world_size, batch_size=batch_size, sampler=places, **options
        )
        self._resumed = False

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        if not self._resumed:
            self.dataset.consumed = 0
        self._resumed = False
        return self._counted(in_one_line(super().__iter__))

    def _counted(self, batches: Iterator) -> Iterator:
        for batch in batches:
            self.dataset.consumed += len(batch[1]) * self.dp_world_size
            yield batch

    def state_dict(self) -> dict[str, Any]:
        return self.dataset.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # As in torchtitan: nothing to load is no mistake.
        if state_dict:
            self.dataset.load_state_dict(state_dict)
            self._resumed = True


@dataclass(frozen=True)
class _RankPlaces:
    """A sampler: the places of a rank, from what all ranks have taken on."""

    dataset: TokenizedDataset
    dp_rank: int
    dp_world_size: int

    def __iter__(self) -> Iterator[int]:
        first, end = self.dataset.consumed + self.dp_rank, self.dataset.num_places
        if end is None:
            return itertools.count(first, self.dp_world_size)
        return iter(range(first, end - end % self.dp_world_size, self.dp_world_size))
