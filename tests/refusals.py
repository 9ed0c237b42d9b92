"""Errors of users: one line that names field, value and remedy."""

import contextlib
from collections.abc import Iterator

import pytest


@contextlib.contextmanager
def refused(*parts: str) -> Iterator[None]:
    """Expect a `ValueError` of one line with these parts."""
    with pytest.raises(ValueError) as error:
        yield
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, f"{part!r} is not in {message!r}"
