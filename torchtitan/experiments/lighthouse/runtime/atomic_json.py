"""Files that are there whole or not at all."""

import json
import os
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON to the file `path`, whose folder is there.

    The file gets its name once its bytes are on the disk, so that neither a killed process nor one
    without power leaves a part of it.
    """
    begun = path.with_suffix(".tmp")
    with open(begun, "w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(begun, path)
