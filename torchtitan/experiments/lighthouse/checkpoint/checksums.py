"""Checksums of checkpoint files, saved with the checkpoint and verified before loading.

    __0_0.distcp, __1_0.distcp, ...               files of the ranks
    __0_checksums.json, __1_checksums.json, ...   CRC-32 and size of the files of each rank
    metadata_checksums.json                       CRC-32 and size of .metadata

CRC-32 detects any change within 32 consecutive bits, and misses one in 4 billion other changes.
The checksum is computed from the bytes as they are written. The file is not read back.
"""

import contextlib
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem
from torchtitan.experiments.lighthouse.runtime.atomic_json import write_json
from torchtitan.experiments.lighthouse.runtime.read_files import (
    is_file_name,
    read_json,
    reason_of,
)

SUFFIX = "checksums.json"

_CHUNK_BYTES = 2**22


class ChecksumWriter(FileSystemWriter):
    """torch's writer of a distributed checkpoint, extended to write checksums."""

    def __init__(self, path: str):
        super().__init__(path)
        self.fs = _ChecksumFileSystem()

    def write_data(self, plan, planner):
        result = super().write_data(plan, planner)
        self.fs.write_checksums(Path(self.path) / f"{plan.storage_data.prefix}{SUFFIX}")
        return result


class _ChecksumFileSystem(FileSystem):
    def __init__(self):
        self._sums: dict[str, list[int]] = {}

    @contextlib.contextmanager
    def create_stream(self, path, mode: str) -> Iterator[Any]:
        # torch's writer opens no file for reading.
        with super().create_stream(path, mode) as stream:
            counted = _CountedStream(stream)
            yield counted
        self._sums[Path(path).name] = [counted.crc, counted.size]

    def rename(self, path, new_path) -> None:
        # torch renames the metadata file last, after all other files are written.
        self._sums[Path(new_path).name] = self._sums.pop(Path(path).name)
        self.write_checksums(Path(new_path).parent / f"metadata_{SUFFIX}")
        super().rename(path, new_path)

    def write_checksums(self, path: Path) -> None:
        sums, self._sums = self._sums, {}
        write_json(path, sums)


class _CountedStream:
    """Wraps a file open for writing, and computes the CRC-32 and size of what is written."""

    def __init__(self, stream):
        self._stream = stream
        self.crc = self.size = 0

    def write(self, data) -> int:
        self.crc = zlib.crc32(data, self.crc)
        self.size += memoryview(data).nbytes
        return self._stream.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def checksum_fault(path: str | Path, part: int = 0, num_parts: int = 1) -> str | None:
    """Describe the first file of the checkpoint `path` that fails its checksum, or return None.

    A checkpoint without checksums passes.

    Args:
        part: which of `num_parts` equal parts of the files to check. Each rank checks one part.
    """
    path, sums = Path(path), {}
    try:
        for file in sorted(path.glob(f"*{SUFFIX}")):
            sums |= read_json(file, dict[str, list[int]])
    except ValueError as error:
        return str(error)
    for name in sorted(sums)[part::num_parts]:
        if not is_file_name(name) or len(sums[name]) != 2:
            return f"{name[:80]!r} is no file of it"
        try:
            found = _checksum(path / name)
        except OSError as error:
            return f"{name} cannot be read ({reason_of(error)})"
        if found != sums[name]:
            return f"{name} is not as it was written: its checksum differs"
    return None


def _checksum(path: Path) -> list[int]:
    crc = size = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            crc, size = zlib.crc32(chunk, crc), size + len(chunk)
    return [crc, size]
