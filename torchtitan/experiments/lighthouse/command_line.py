"""What the programs have in common: a wrong call ends with one line, before any work.

error: --world-size must be ...; what to do
"""

import argparse
import os
import sys
from pathlib import Path
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """The parser of a program whose help is the docstring of its module.

    Other than argparse it does not print the usage with an error, and guesses no abbreviations:
    a misspelt option must not be taken for another one.
    """

    def __init__(self, doc: str | None):
        super().__init__(
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}; see --help", file=sys.stderr)
        raise SystemExit(2)


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
