"""Whether the files of a corpus are still those that a data position was saved with.

    print of a file     4 bytes: CRC-32 of its size and of samples of its content, or of its text

The samples are the whole of a file of up to 192 KiB, and the first, middle and last 64 KiB of a
longer one: a compressed file or a table that differs anywhere differs there.
"""

import zlib
from collections.abc import Iterator

import numpy as np
from torchtitan.experiments.lighthouse.data.readers import SourceFile, read_error
from torchtitan.experiments.lighthouse.data.retry import retrying
from torchtitan.tools.logging import logger

ACCEPT_FILES = "training.dataset_path"
"""Accepts changed files, in `checkpoint.accept_changes`."""

SAMPLE_BYTES = 2**16

_PRINT = np.dtype("<u4")


def file_prints(files: list[SourceFile]) -> bytes:
    """The prints of the files, one after the other.

    Raises:
        ValueError: where one cannot be read, or not in five attempts.
    """

    def read(start: int) -> Iterator[tuple[int, int]]:
        for number, file in enumerate(files[start:], start + 1):
            try:
                yield _print(file), number
            except OSError as error:
                raise read_error(error, file.field, f" in {str(file.path)!r}") from error

    return pack_prints([crc for crc, _ in retrying(read, 0)])


def pack_prints(prints: list[int]) -> bytes:
    return np.array(prints, dtype=_PRINT).tobytes()


def _print(file: SourceFile) -> int:
    crc = zlib.crc32(str(file.size).encode())
    with open(file.path, "rb") as opened:
        if file.size <= 3 * SAMPLE_BYTES:
            return zlib.crc32(opened.read(3 * SAMPLE_BYTES), crc)
        for begin in (0, (file.size - SAMPLE_BYTES) // 2, file.size - SAMPLE_BYTES):
            opened.seek(begin)
            crc = zlib.crc32(opened.read(SAMPLE_BYTES), crc)
    return crc


def check_prints(
    files: list[SourceFile], now: bytes, was: bytes, accepts_changes: bool | None
) -> None:
    """Compare the prints of files with those that a data position was saved with.

    Args:
        was: empty where none were saved.
        accepts_changes: whether a warning is enough; None where a change cannot be accepted.

    Raises:
        ValueError: the first file that differs.
    """
    if not was or was == now:
        return
    before, after = (np.frombuffer(prints, _PRINT) for prints in (was, now))
    if len(before) != len(after):
        what = f"{len(after)} files in place of {len(before)}"
    else:
        differing = np.flatnonzero(before != after)
        what = f"{str(files[differing[0]].path)!r} with other content"
        if len(differing) > 1:
            what += f", and {len(differing) - 1} other files"
    field = files[0].field
    if accepts_changes:
        logger.warning(
            f"{field} does not hold the files of the checkpoint's data position: {what}; what is "
            "ahead of it is read as it is now"
        )
        return
    accept = f', accept the change with checkpoint.accept_changes = ["{ACCEPT_FILES}"]'
    raise ValueError(
        f"{field} must hold the files of the checkpoint's data position, got {what}; restore them"
        f"{'' if accepts_changes is None else accept}, or begin the data anew with "
        'checkpoint.exclude_from_loading = ["dataloader"]'
    )
