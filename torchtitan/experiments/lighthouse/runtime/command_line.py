"""What the programs have in common: a wrong call ends with one line, before any work.

error: --world-size must be ...; what to do
"""

import json
import os
from pathlib import Path

import torch
from tokenizers import Tokenizer

from lighthouse_cli.parser import Parser, exit_on_value_error

__all__ = [
    "Parser",
    "check_device",
    "check_output_folder",
    "exit_on_value_error",
    "open_tokenizer",
]


def check_output_folder(name: str, path: str | Path) -> None:
    """Raise ValueError, which calls it `name`, unless `path` is or can become a folder of files.

    Nothing is written.
    """
    whole = Path(path).absolute()
    try:
        # The system says what it would not take as a name.
        whole.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"{name} must be the name of a folder, got {str(path)[:80]!r} ({reason}); name another"
        ) from None
    found = next(folder for folder in (whole, *whole.parents) if os.path.lexists(folder))
    if not found.is_dir():
        raise ValueError(
            f"{name} must be a folder, got {str(path)!r}, where {found} is none; name another one"
        )
    if not os.access(found, os.W_OK | os.X_OK):
        raise ValueError(
            f"{name} must be a folder that can be written, got {str(path)!r} without permission "
            f"for {found}; name another one or change its mode"
        )


def check_device(device: str) -> None:
    """Raise ValueError unless --device names one of this machine."""
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": torch.mps.is_available()}
    try:
        named = torch.device(device)
    except RuntimeError:
        named = None
    if named is None or (named.index or 0) >= counts.get(named.type, 0):
        here = ", ".join(name for name, count in counts.items() if count)
        raise ValueError(f"--device must be one of {here}, got {device!r}; use cpu")


def open_tokenizer(name: str, path: str | Path) -> Tokenizer:
    """The tokenizer in the folder `path`, which an error calls `name`.

    Raises:
        ValueError: there is none, or its files cannot be read.
    """
    file, settings = Path(path) / "tokenizer.json", Path(path) / "tokenizer_config.json"
    if not file.is_file():
        raise ValueError(
            f"{name} must hold tokenizer.json, got {str(path)!r} without it; correct the path, or "
            "download the tokenizer into it"
        )
    try:
        tokenizer = Tokenizer.from_file(str(file))
        if settings.exists() and not isinstance(json.loads(settings.read_text()), dict):
            raise ValueError("tokenizer_config.json is no JSON object")
    except Exception as error:
        # Those of the tokenizers package have no type of their own.
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{name} must hold a readable tokenizer, got {str(path)!r} ({reason}); download it "
            "again"
        ) from None
    return tokenizer
