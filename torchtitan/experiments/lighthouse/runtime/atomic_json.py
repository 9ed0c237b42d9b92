"""Atomic writes of JSON files."""

import json
import os
from pathlib import Path
from typing import Any, BinaryIO


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON to the file `path`. Its folder must exist.

    A temporary file is synced to disk and then renamed. A killed process or a power failure
    therefore leaves no partial file.
    """
    begun = path.with_suffix(".tmp")
    with open_new(begun) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())
    os.replace(begun, path)


def open_new(path: Path) -> BinaryIO:
    """Open a new file for writing, and replace any file of this name.

    A symbolic link is replaced, not followed.
    """
    path.unlink(missing_ok=True)
    return path.open("xb")
