"""Check that the files of a corpus have not changed since a data position was saved.

A print is the 4-byte fingerprint of a file. It is the CRC-32 of the file's size and of samples of
its content, or of its text. A file of up to 192 KiB is one sample. A longer file has three: the
first, middle and last 64 KiB. Any change of a compressed file or table changes these samples.
"""

import zlib
from functools import partial

import numpy as np
from torchtitan.experiments.lighthouse.data.readers import SourceFile, read_error
from torchtitan.experiments.lighthouse.data.retry import retried
from torchtitan.tools.logging import logger

ACCEPT_FILES = "training.dataset_path"
"""Value of `checkpoint.accept_changes` that accepts changed files."""

SAMPLE_BYTES = 2**16

_PRINT = np.dtype("<u4")


def file_prints(files: list[SourceFile]) -> bytes:
    """The concatenated prints of the files.

    Raises:
        ValueError: a file cannot be read, or could not be read in five attempts.
    """
    return pack_prints([retried(partial(_print, file)) for file in files])


def pack_prints(prints: list[int]) -> bytes:
    return np.array(prints, dtype=_PRINT).tobytes()


def _print(file: SourceFile) -> int:
    crc = zlib.crc32(str(file.size).encode())
    try:
        with open(file.path, "rb") as opened:
            if file.size <= 3 * SAMPLE_BYTES:
                return zlib.crc32(opened.read(3 * SAMPLE_BYTES), crc)
            for begin in (0, (file.size - SAMPLE_BYTES) // 2, file.size - SAMPLE_BYTES):
                opened.seek(begin)
                crc = zlib.crc32(opened.read(SAMPLE_BYTES), crc)
    except OSError as error:
        raise read_error(error, file.field, f" in {str(file.path)!r}") from error
    return crc


def check_prints(
    files: list[SourceFile], now: bytes, was: bytes, accepts_changes: bool | None
) -> None:
    """Compare the present prints of files with those saved with a data position.

    Args:
        now: present prints.
        was: saved prints. Empty if none were saved.
        accepts_changes: whether a change only logs a warning. None if the configuration cannot
            accept a change.

    Raises:
        ValueError: a file differs. The message names the first one.
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
            f"{field} does not hold the files of the checkpoint's data position: {what}; the rest "
            "of the data is read from the present files"
        )
        return
    accept = f', accept the change with checkpoint.accept_changes = ["{ACCEPT_FILES}"]'
    raise ValueError(
        f"{field} must hold the files of the checkpoint's data position, got {what}; restore them"
        f"{'' if accepts_changes is None else accept}, or restart the data with "
        'checkpoint.exclude_from_loading = ["dataloader"]'
    )
