"""Read untrusted JSON, TOML and regular files. Every error is a `ValueError` of one line.

`read_json` and `read_toml` return a value of the requested type, or raise a `ValueError` with the
path and the reason. Reasons are a missing file, a folder, a pipe, bytes that are not UTF-8, wrong
syntax, deep nesting, numbers with thousands of digits, too many bytes, and a wrong type.
"""

import json
import os
import stat
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import tomli

MAX_BYTES = 2**28
"""Size limit of a file that is read at once. Tokenizers, manifests and indices are smaller."""

PARSE_ERRORS = (ValueError, RecursionError, OverflowError, MemoryError)
"""Errors that parsers raise for invalid text."""

Record = TypeVar("Record")


def read_bytes(path: str | Path, max_bytes: int = MAX_BYTES) -> bytes:
    """Read a regular file.

    Raises:
        ValueError: it cannot be read, is not a regular file, or has more than `max_bytes`.
    """
    try:
        check_regular(path)
        with open(path, "rb") as file:
            content = file.read(max_bytes + 1)
    except (OSError, MemoryError) as error:
        raise ValueError(f"{str(path)!r} cannot be read ({reason_of(error)})") from None
    if len(content) > max_bytes:
        raise ValueError(f"{str(path)!r} has more than {max_bytes:,} bytes")
    return content


def check_regular(path: str | Path) -> os.stat_result:
    """The status of a regular file.

    Opening a pipe would block until a writer opens it.

    Raises:
        ValueError: it is not a regular file.
        OSError: it does not exist or cannot be accessed.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
        raise ValueError(f"{str(path)!r} is {kind}, not a regular file")
    return status


def read_json(path: str | Path, annotation: Any = dict, max_bytes: int = MAX_BYTES) -> Any:
    """Read a JSON file and check that its value has the type `annotation`. See `is_a`."""
    return _parsed(path, read_bytes(path, max_bytes), parse_json, annotation, "JSON")


def read_toml(path: str | Path) -> dict[str, Any]:
    """Read a TOML file."""
    return _parsed(path, read_bytes(path), tomli.loads, dict, "TOML")


def parse_json(text: str | bytes) -> Any:
    """Like `json.loads`, but every error is a `ValueError` of one line."""
    try:
        return json.loads(text)
    except PARSE_ERRORS as error:
        raise ValueError(reason_of(error)) from None


def _parsed(
    path: str | Path, content: bytes, parse: Callable[[str], Any], annotation: Any, syntax: str
) -> Any:
    try:
        value = parse(content.decode("utf-8"))
    except PARSE_ERRORS as error:
        raise ValueError(f"{str(path)!r} is not valid {syntax} ({reason_of(error)})") from None
    if not is_a(value, annotation):
        expected = getattr(annotation, "__name__", str(annotation))
        raise ValueError(f"{str(path)!r} must hold a {expected}, got {repr(value)[:60]}")
    return value


def read_record(values: Any, record: type[Record]) -> Record:
    """Make an instance of a dataclass from a dictionary of its fields.

    Raises:
        ValueError: a field is missing, unknown, or of another type.
    """
    expected = {f.name: f.type for f in fields(record)}
    if not isinstance(values, dict) or values.keys() != expected.keys():
        found = sorted(values) if isinstance(values, dict) else values
        raise ValueError(f"it must have the fields {', '.join(expected)}, got {repr(found)[:60]}")
    for name, annotation in expected.items():
        if not is_a(values[name], annotation):
            raise ValueError(f"{name} must be {annotation}, got {repr(values[name])[:60]}")
    return record(**values)


def is_a(value: Any, annotation: Any) -> bool:
    """Whether a JSON or TOML value has the annotated type. Booleans do not count as numbers."""
    origin, options = get_origin(annotation), get_args(annotation)
    if annotation is Any:
        return True
    if origin in (Union, UnionType):
        return any(is_a(value, option) for option in options)
    if origin is Literal:
        return value in options
    if origin is list:
        return isinstance(value, list) and all(is_a(item, options[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            is_a(key, options[0]) and is_a(item, options[1]) for key, item in value.items()
        )
    if annotation is NoneType:
        return value is None
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, annotation)


def is_file_name(name: str) -> bool:
    """Whether `name` can be the name of a file in a folder, and fits into an error message."""
    return Path(name).name == name and len(name) <= 255 and name.isprintable()


def reason_of(error: BaseException) -> str:
    """Describe an error in one line."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, MemoryError):
        return "there is not enough memory for it"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
