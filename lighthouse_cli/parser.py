"""Command-line parsing. A usage error prints one line on stderr before any work:

error: --world-size must be ...; what to do
"""

import argparse
import contextlib
import difflib
import sys
from collections.abc import Iterable, Iterator
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
