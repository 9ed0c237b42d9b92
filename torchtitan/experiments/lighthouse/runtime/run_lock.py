"""A lock that lets one process at a time write to a folder.

    with FolderLock("job.dump_folder", folder):
        ...

The lock is `flock(2)` on the file `.lock` in the folder. The kernel releases it when the process
ends for any reason. On Linux it works across machines on NFS, Lustre and GPFS if locks are enabled
there. A file system without locks causes a warning, and nothing is locked. The file holds the host,
process id and start time of the holder.
"""

import contextlib
import os
import socket
import time
from pathlib import Path

import filelock
from torchtitan.experiments.lighthouse.runtime.read_files import read_json
from torchtitan.tools.logging import logger

FILE_NAME = ".lock"

GRACE_SECONDS = 6
"""Seconds to wait for a holder that is about to end."""


class FolderLock:
    """A context manager that locks a folder. A missing folder is created.

    Args:
        field: name of the folder in error messages.
        folder: the folder to lock.
        grace_seconds: seconds to wait for another holder.

    Raises:
        ValueError: on entry, if another process holds the lock.
    """

    def __init__(self, field: str, folder: str | Path, grace_seconds: float = GRACE_SECONDS):
        self._field, self._folder = field, Path(folder)
        self._path = self._folder / FILE_NAME
        self._grace_seconds = grace_seconds
        self._lock = filelock.FileLock(self._path, fallback_to_soft=False)

    def __enter__(self) -> "FolderLock":
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=self._grace_seconds)
        except filelock.Timeout:
            raise ValueError(
                f"{self._field} must be written by one run at a time, got {str(self._folder)!r}, "
                f"which {self._holder()} writes to; wait until it has ended, or name another folder"
            ) from None
        except (OSError, NotImplementedError) as error:
            logger.warning(
                f"{self._path} cannot be locked ({error}): do not start another run in this folder"
            )
            return self
        self._write_holder()
        return self

    def __exit__(self, *exception) -> None:
        try:
            # A process that waits for the lock of a removed file opens a new file.
            if self._lock.is_locked and not self.is_gone():
                self._path.unlink()
        except OSError:
            # The file remains, but the lock is released.
            pass
        finally:
            self._lock.release()

    def is_gone(self) -> bool:
        """Whether the locked folder was removed, replaced or unmounted."""
        if not self._lock.is_locked:
            return False
        try:
            return not os.path.samestat(os.stat(self._path), self._status)
        except FileNotFoundError:
            return True
        except OSError:
            # A file system that does not respond now may respond later.
            return False

    def _write_holder(self) -> None:
        start = time.strftime("%Y-%m-%d %H:%M:%S")
        text = f'{{"host": "{socket.gethostname()}", "pid": {os.getpid()}, "start": "{start}"}}\n'
        # Write in place, because replacing the file would drop the lock.
        with contextlib.suppress(OSError):
            self._path.write_text(text)
        self._status = os.stat(self._path)

    def _holder(self) -> str:
        try:
            holder = read_json(self._path, max_bytes=1000)
            return f"process {holder['pid']} on {holder['host']} since {holder['start']}"
        except (ValueError, KeyError):
            return "another process"
