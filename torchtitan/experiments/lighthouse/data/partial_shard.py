"""Write a shard of tokens. It has a temporary name until all bytes are on the disk."""

import contextlib
import hashlib
import os
from pathlib import Path

import numpy as np
from torchtitan.experiments.lighthouse.data.manifest import Shard
from torchtitan.experiments.lighthouse.runtime.atomic_json import open_new


class PartialShard:
    """A shard that is being written. `finish` returns its entry for the manifest."""

    def __init__(self, path: Path) -> None:
        self._path, self._partial = path, path.with_suffix(".partial")
        self._file = open_new(self._partial)
        self._sha = hashlib.sha256()
        self.tokens = self._documents = self._max_id = 0

    def add(self, tokens: np.ndarray) -> None:
        """Add the tokens of a document."""
        self._file.write(tokens)
        self._sha.update(tokens)
        self.tokens += len(tokens)
        self._documents += 1
        self._max_id = max(self._max_id, int(tokens.max()))

    def finish(self, following: list[int]) -> Shard:
        """Sync the shard to disk and rename it. `following` is the start of the next shard."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._partial, self._path)
        return Shard(
            file=self._path.name,
            documents=self._documents,
            tokens=self.tokens,
            max_id=self._max_id,
            sha256=self._sha.hexdigest(),
            next=following,
        )

    def close(self) -> None:
        # An error of writing has been raised before.
        with contextlib.suppress(OSError):
            self._file.close()
