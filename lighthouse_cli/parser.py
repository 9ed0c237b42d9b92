"""Command-line parsing. A usage error prints one line on stderr before any work:

error: --world-size must be ...; what to do
"""

import argparse
import contextlib
import difflib
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """A parser that prints the docstring of the program's module as help.

    Unlike argparse, it prints no usage with an error. It accepts no abbreviated options, so that a
    misspelt option is never taken for another one.
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


def did_you_mean(value: str, choices: Iterable[str], otherwise: str = "see --help for all") -> str:
    """The remedy of an error about a wrong name: the nearest of `choices`, or `otherwise`."""
    close = difflib.get_close_matches(value, list(choices), n=1)
    return f"did you mean {close[0]}?" if close else otherwise


@contextlib.contextmanager
def exit_on_value_error() -> Iterator[None]:
    """Turn a ValueError inside into one line on stderr and exit code 2."""
    try:
        yield
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def check_output_folder(name: str, path: str | Path) -> None:
    """Raise ValueError unless `path` is, or can be created as, a writable folder.

    The error calls it `name`. Nothing is written.
    """
    if str(path).startswith("~"):
        # A shell expands it as a word of its own, but not in a TOML file or after an equals sign.
        raise ValueError(
            f"{name} must be a path without ~, got {str(path)!r}; write the path of the home folder"
        )
    whole = Path(path).absolute()
    try:
        # The operating system rejects invalid names.
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
