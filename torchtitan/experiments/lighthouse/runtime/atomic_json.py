"""Atomic writes of JSON files."""

import json
import os
from pathlib import Path
from typing import Any, BinaryIO


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON to the file `path`, whose folder is there.

    The file gets its name once its bytes are on the disk, so that neither a killed process nor one
    without power leaves a part of it.
    """
    begun = path.with_suffix(".tmp")
    with open_new(begun) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())
    os.replace(begun, path)


def open_new(path: Path) -> BinaryIO:
    """Open a new file for writing in the place of what has this name.

    A symbolic link of this name is replaced, not followed.
    """
    path.unlink(missing_ok=True)
    return path.open("xb")
