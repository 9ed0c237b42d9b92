"""Shared command-line helpers. A usage error prints one line before any work is done.

error: --world-size must be ...; what to do
"""

import os
from pathlib import Path

import torch
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.experiments.lighthouse.runtime.read_files import read_json, reason_of

from lighthouse_cli.parser import Parser, check_output_folder, exit_on_value_error

__all__ = [
    "Parser",
    "check_device",
    "check_output_folder",
    "exit_on_value_error",
    "open_tokenizer",
]


def check_device(device: str) -> None:
    """Raise ValueError unless --device names a device of this machine."""
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": torch.mps.is_available()}
    try:
        named = torch.device(device)
    except RuntimeError:
        named = None
    if named is None or (named.index or 0) >= counts.get(named.type, 0):
        here = ", ".join(name for name, count in counts.items() if count)
        raise ValueError(f"--device must be one of {here}, got {device!r}; use cpu")


def open_tokenizer(name: str, path: str | Path) -> HuggingFaceTokenizer:
    """Open the tokenizer in the folder `path` as training does. Errors call the folder `name`.

    Raises:
        ValueError: the tokenizer is missing or cannot be read.
    """
    file, settings = Path(path) / "tokenizer.json", Path(path) / "tokenizer_config.json"
    if not file.is_file():
        raise ValueError(
            f"{name} must hold tokenizer.json, got {str(path)!r} without it; correct the path, or "
            "download the tokenizer into it"
        )
    try:
        read_json(file)
        if os.path.lexists(settings):
            read_json(settings)
        tokenizer = HuggingFaceTokenizer(str(path))
    except (KeyboardInterrupt, SystemExit):
        raise
    # The tokenizers package has no error type of its own. Some of its errors are Rust panics, which
    # do not derive from Exception.
    except BaseException as error:
        raise ValueError(
            f"{name} must hold a readable tokenizer, got {str(path)!r} ({reason_of(error)}); "
            "download it again"
        ) from None
    return tokenizer
