"""Read tokenized data in random order on any number of ranks.

    <dataset_path>/<split>/manifest.json   sources, tokenizer and shards (`Manifest`)
    <dataset_path>/<split>/00000.bin, ...  little-endian token ids of whole documents

`tokenize.py` writes these files. The shards in order are the T tokens of the corpus. The epochs
form one endless stream of tokens. Window k is the tokens k*S to k*S + S of the stream, S inputs and
S labels shifted by one. Every token except the very first is a label exactly once per epoch, as in
`packing.py`. The rest of an epoch shares a window with the start of the next one.

    epoch e    the windows that begin in it: e*T <= k*S < (e+1)*T
    order      a random permutation of the windows of each epoch
    rank r     of W takes the places r, r + W, r + 2W, ... of the order

The W ranks together read the order from start to end. A global batch is therefore the same for any
W, and the number of windows read by all ranks is the whole position. Finding the window at a place
takes constant time.
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
from torchtitan.experiments.lighthouse.data.retry import in_one_line, retried
from torchtitan.experiments.lighthouse.data.source_changes import check_prints, file_prints

# Four rounds suffice for a random permutation of a large domain. Small domains need more.
_FEISTEL_ROUNDS = 8


def check_tokenized(path: str, section: str, tokenizer_path: str, vocab_size: int) -> None:
    """Check the manifest and the sizes of the shards of a prepared split. No token is read.

    Args:
        path: `<section>.dataset_path`.
        section: "training" or "validation".
        tokenizer_path: `model.hf_assets_path`.
        vocab_size: vocabulary size of the model.

    Raises:
        ValueError: in one line. `read_manifest` fails, the tokenizer is not that of the run, an id
            exceeds the vocabulary, or a shard is missing or has another size.
    """
    field = f"{section}.dataset_path"
    split = next(split for split, its_section in SECTIONS.items() if its_section == section)
    manifest = read_manifest(path, split, field)
    if manifest.tokenizer_sha256 != tokenizer_digest(tokenizer_path):
        raise ValueError(
            f"{field} must be prepared with the tokenizer of model.hf_assets_path, "
            f"{tokenizer_path!r}, got {path!r}, prepared with another one of "
            f"{manifest.vocab_size} tokens: name that tokenizer, or prepare the corpus again"
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
                "start the same lighthouse prepare again, which writes it again"
            )


def shuffled(index: int, count: int, seed: int, epoch: int) -> int:
    """Element `index` of a random permutation of range(count), given by seed and epoch.

    A Feistel network permutes the numbers of 2 * `half` bits, at most 4 * `count` numbers. A result
    outside the range goes through the network again (cycle walking). Time and memory do not grow
    with the corpus. A shuffled list would need both again at each resume, for 10**8 windows of a
    trillion tokens.
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    while True:
        left, right = index >> half, index & (1 << half) - 1
        for turn in range(_FEISTEL_ROUNDS):
            # This digest is the same on every machine and in every version.
            digest = hashlib.blake2b(f"{seed} {epoch} {turn} {right}".encode(), digest_size=8)
            mixed = int.from_bytes(digest.digest(), "little") & (1 << half) - 1
            left, right = right, left ^ mixed
        index = left << half | right
        if index < count:
            return index


class TokenizedDataset(Dataset, Stateful):
    """The windows of a prepared split, by their place in the global order.

    `dataset[place]` is `({"input": [seq_len]}, labels [seq_len])`, both int64. Places start at 0.

    Args:
        path: `dataset_path`.
        seq_len: tokens per window.
        split: "train" or "validation".
        seed: seed of the order.
        infinite: whether the order is endless. If not, it has one epoch, without the last tokens
            that do not fill a window.
        accepts_changes: whether a loaded position may belong to shards that have changed since.

    Raises:
        ValueError: `read_manifest` fails, a shard is missing, or an epoch has not a single window
            if not `infinite`. While reading: a shard cannot be read or has changed.
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
        # Checkpoints hold no position in held-out windows.
        self._prints = file_prints(self._files) if split == "train" else b""
        self.seq_len, self.seed = seq_len, seed
        self.consumed = 0
        """Number of windows that all ranks have taken. The data loader counts them."""

        self.num_places = None if infinite else (self._ends[-1] - 1) // seq_len
        """Number of places in the order. None if it is endless."""

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
        """The epoch (from 0) and the number of windows that all ranks have taken."""
        return {"epoch": self._epoch(self.consumed), "windows": self.consumed}

    def state_dict(self) -> dict[str, Any]:
        """The position, equal on every rank, and the data that it belongs to."""
        return {
            # One string for both digests. With another key, older checkpoints could not be loaded.
            "corpus": f"{self._manifest.digest}:{self._prints.hex()}",
            "seq_len": self.seq_len,
            "seed": self.seed,
            "windows": self.consumed,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Set the position and seed from a `state_dict` of any rank, of any number of ranks.

        Raises:
            ValueError: the position belongs to other tokens or to other windows.
        """
        remedy = 'restart the data with checkpoint.exclude_from_loading = ["dataloader"]'
        digest, _, prints = state_dict["corpus"].partition(":")
        if digest != self._manifest.digest:
            raise ValueError(
                f"{self._section}.dataset_path must hold the tokens of the checkpoint's data "
                f"position, got other ones in {str(self._folder)!r}: restore the folder, or "
                f"{remedy}"
            )
        if state_dict["seq_len"] != self.seq_len:
            raise ValueError(
                f"{self._section}.seq_len must be {state_dict['seq_len']}, the length of the "
                "windows that the checkpoint's data position counts, got "
                f"{self.seq_len}: set it to that, or {remedy}"
            )
        check_prints(self._files, self._prints, bytes.fromhex(prints), self._accepts_changes)
        self.seed, self.consumed = state_dict["seed"], state_dict["windows"]

    def _epoch(self, place: int) -> int:
        return place * self.seq_len // self._ends[-1]

    def _window(self, place: int) -> int:
        """The number of the window at a place of the order."""
        if self.num_places is not None:
            return shuffled(place, self.num_places, self.seed, 0)
        epoch = self._epoch(place)
        # The first window that begins in this epoch, and the first one of the next epoch.
        first, last = (-(-e * self._ends[-1] // self.seq_len) for e in (epoch, epoch + 1))
        return first + shuffled(place - first, last - first, self.seed, epoch)

    def _read(self, begin: int, count: int) -> np.ndarray:
        """Tokens [count] of the endless stream, int64, from position `begin`."""
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
        """Read `length` tokens of a shard.

        The file is opened for each read, because a corpus may have more shards than a process can
        open. It is not memory-mapped, because a read error would then kill the process.
        """
        file, itemsize = self._files[number], self._manifest.itemsize
        offset = (self._manifest.shards[number].tokens - from_end) * itemsize

        def read() -> bytes:
            try:
                with open(file.path, "rb") as shard:
                    shard.seek(offset)
                    content = shard.read(length * itemsize)
                file.check_unchanged()
            except OSError as error:
                raise read_error(error, file.field, f" in {str(file.path)!r}") from error
            return content

        content = retried(read)
        if len(content) < length * itemsize:
            raise ValueError(
                f"{file.field} must hold every shard whole, got {file.size} bytes for the "
                f"{self._manifest.shards[number].tokens * itemsize} of {str(file.path)!r}: restore "
                "the file, or start the same lighthouse prepare again, which writes it again"
            )
        tokens = np.frombuffer(content, self._manifest.dtype)
        if tokens.max() > self._manifest.shards[number].max_id:
            raise ValueError(
                f"{file.field} must hold token ids up to {self._manifest.shards[number].max_id}, "
                f"got {tokens.max()} in {str(file.path)!r}: compare the shards with "
                "lighthouse prepare --verify, and prepare those that differ again"
            )
        return tokens


class TokenizedDataloader(ParallelAwareDataloader):
    """One rank's batches of a prepared split, `({"input": [B, S]}, labels [B, S])`.

    If the order has an end, all ranks stop after equally many windows. The state is that of the
    dataset. It does not depend on the rank or on windows that workers have prefetched, so a run can
    resume with any number of ranks and workers. `iter()` starts at the beginning. The first one
    after `load_state_dict` starts at the loaded position.
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
        # As in torchtitan, an empty state is not an error.
        if state_dict:
            self.dataset.load_state_dict(state_dict)
            self._resumed = True


@dataclass(frozen=True)
class _RankPlaces:
    """A sampler of a rank's places, after the windows that all ranks have taken."""

    dataset: TokenizedDataset
    dp_rank: int
    dp_world_size: int

    def __iter__(self) -> Iterator[int]:
        first, end = self.dataset.consumed + self.dp_rank, self.dataset.num_places
        if end is None:
            return itertools.count(first, self.dp_world_size)
        return iter(range(first, end - end % self.dp_world_size, self.dp_world_size))
