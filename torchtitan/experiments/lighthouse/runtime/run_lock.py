"""One process writes to a folder at a time.

    with FolderLock("job.dump_folder", folder):
        ...

The lock is `flock(2)` on the file `.lock` in the folder. The kernel gives it up when the process
that holds it ends, however it ends. On Linux it holds across machines on NFS, Lustre and GPFS where
their locks are enabled; on a file system without locks a warning says that nothing is locked. The
file tells who holds it: host, process id, start.
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
"""How long to wait for a holder that is about to end."""


class FolderLock:
    """Holds the folder from `__enter__` to `__exit__`; the folder is made where it is missing.

    Args:
        field: what names the folder in an error.
        folder: to be locked.
        grace_seconds: how long to wait for another holder.

    Raises:
        ValueError: on entry, in one line, where another process holds the folder.
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
            # Who waits for the lock of a removed file looks for a new one.
            if self._lock.is_locked and not self.is_gone():
                self._path.unlink()
        except OSError:
            # It stays, and no one holds it.
            pass
        finally:
            self._lock.release()

    def is_gone(self) -> bool:
        """Whether the folder is no longer the one that was locked: removed, or unmounted."""
        if not self._lock.is_locked:
            return False
        try:
            return not os.path.samestat(os.stat(self._path), self._status)
        except FileNotFoundError:
            return True
        except OSError:
            # A file system that does not answer now may answer later.
            return False

    def _write_holder(self) -> None:
        start = time.strftime("%Y-%m-%d %H:%M:%S")
        text = f'{{"host": "{socket.gethostname()}", "pid": {os.getpid()}, "start": "{start}"}}\n'
        # What the lock is on is not replaced.
        with contextlib.suppress(OSError):
            self._path.write_text(text)
        self._status = os.stat(self._path)

    def _holder(self) -> str:
        try:
            holder = read_json(self._path, max_bytes=1000)
            return f"process {holder['pid']} on {holder['host']} since {holder['start']}"
        except (ValueError, KeyError):
            return "another process"
