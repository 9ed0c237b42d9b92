"""Faults of the data while a run reads it: tried again where that can help, and told in one line.

    while True:
        for value, cursor in read(cursor):      # from the last cursor on
            yield value
        unless it broke off: return
        wait 1, 2, 4, 8 s; the fifth time in a row: stop

A reader raises `TransientReadError` where trying again can help: an error of the operating system,
a lost connection. What a file holds does not get better, and is a `ValueError` at once. Since a
cursor stands behind the value it came with, nothing is read twice and nothing is left out.
"""

from collections.abc import Callable, Iterator
from time import sleep
from typing import TypeVar

from torchtitan.tools.logging import logger

DELAYS = (1, 2, 4, 8)
"""Seconds before each further attempt. Together well below the time that ranks wait for each other
before they give up."""

Value = TypeVar("Value")
Cursor = TypeVar("Cursor")


class TransientReadError(Exception):
    """Reading broke off and can be tried again. `str()` has the field, the rule and the place."""

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(message)
        self.remedy = remedy


def retrying(
    read: Callable[[Cursor], Iterator[tuple[Value, Cursor]]], cursor: Cursor
) -> Iterator[tuple[Value, Cursor]]:
    """Yields what `read(cursor)` does: values, each with the cursor behind it.

    Raises:
        ValueError: in one line, after five `TransientReadError`s without a value in between.
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


def in_one_line(open_batches: Callable[[], Iterator]) -> Iterator:
    """Yields the batches of a dataloader; the error of a worker keeps its line, and no traceback
    around it. A worker may fail when it is started, at a position that it cannot go on from."""
    try:
        yield from open_batches()
    except ValueError as error:
        if not str(error).startswith("Caught ValueError in DataLoader worker"):
            raise
        line = str(error).rstrip().splitlines()[-1].removeprefix("ValueError: ")
        raise ValueError(line) from error
