"""Retry transient read errors of data. Every final error is one line.

    while True:
        for value, cursor in read(cursor):      # resumes from the last cursor
            yield value
        if there was no error: return
        wait 1, 2, 4, 8 s; stop at the fifth error in a row

A reader raises `TransientReadError` if a retry may help, as for an error of the operating system or
a lost connection. Wrong content of a file is a `ValueError` without a retry. A cursor marks the
position after its value, so nothing is read twice or left out.
"""

from collections.abc import Callable, Iterator
from time import sleep
from typing import TypeVar

from torchtitan.tools.logging import logger

DELAYS = (1, 2, 4, 8)
"""Seconds before each further attempt. Their sum is well below the timeout of collectives."""

Value = TypeVar("Value")
Cursor = TypeVar("Cursor")


class TransientReadError(Exception):
    """A read error that may be retried. `str()` has the field, the rule and the place."""

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(message)
        self.remedy = remedy


def retrying(
    read: Callable[[Cursor], Iterator[tuple[Value, Cursor]]], cursor: Cursor
) -> Iterator[tuple[Value, Cursor]]:
    """Yield the values of `read(cursor)`, each with the cursor after it, with retries.

    Raises:
        ValueError: in one line, after five `TransientReadError`s in a row.
    """
    failures, behind = 0, cursor
    while True:
        try:
            for value, after in read(behind):
                failures, behind = 0, after
                yield value, behind
            return
        except TransientReadError as dropped:
            if failures == len(DELAYS):
                raise ValueError(
                    f"{dropped}, for the {failures + 1}th time in a row: {dropped.remedy}"
                ) from dropped
            delay = DELAYS[failures]
            failures += 1
            logger.warning(f"{dropped}: try {failures + 1} of {len(DELAYS) + 1} in {delay} s")
            sleep(delay)


def retried(read: Callable[[], Value]) -> Value:
    """The value of `read()`, with retries. Raises the same errors."""
    value, _ = next(retrying(lambda _: iter([(read(), None)]), None))
    return value


def in_one_line(open_batches: Callable[[], Iterator]) -> Iterator:
    """Yield the batches of a data loader. Strip the traceback from the error of a worker.

    `open_batches` starts the workers. A worker fails there if it cannot resume from its position.
    """
    try:
        yield from open_batches()
    except ValueError as error:
        if not str(error).startswith("Caught ValueError in DataLoader worker"):
            raise
        line = str(error).rstrip().splitlines()[-1].removeprefix("ValueError: ")
        raise ValueError(line) from error
