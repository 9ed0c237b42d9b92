"""JSON, TOML and regular files from outside: every fault of one is a `ValueError` of one line.

Whatever a file holds, `read_json` and `read_toml` return a value of the type that was asked for or
raise a `ValueError` with the path and the reason: no file, a folder, a pipe, bytes that are not
UTF-8, wrong syntax, brackets nested thousands deep, a number of thousands of digits, too many
bytes, another type.
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
"""Of a file that is read as a whole. Larger than any tokenizer, manifest or index in use."""

PARSE_ERRORS = (ValueError, RecursionError, OverflowError, MemoryError)
"""What parsers raise for a text that they cannot take."""

Record = TypeVar("Record")


def read_bytes(path: str | Path, max_bytes: int = MAX_BYTES) -> bytes:
    """The content of a regular file.

    Raises:
        ValueError: it cannot be read, is no regular file, or has more than `max_bytes`.
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
    """The status of a file. Raises ValueError for a pipe or a device, OSError where there is none.

    To open a pipe waits for a writer, which may never come.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
        raise ValueError(f"{str(path)!r} is {kind}, not a regular file")
    return status


def read_json(path: str | Path, annotation: Any = dict, max_bytes: int = MAX_BYTES) -> Any:
    """The JSON value in a file, which is checked to be of the type `annotation`; see `is_a`."""
    return _parsed(path, read_bytes(path, max_bytes), parse_json, annotation, "JSON")


def read_toml(path: str | Path) -> dict[str, Any]:
    """The values of a TOML file."""
    return _parsed(path, read_bytes(path), tomli.loads, dict, "TOML")


def parse_json(text: str | bytes) -> Any:
    """`json.loads`, all of whose errors are `ValueError`s of one line."""
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
    """A dataclass from the values of its fields.

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
    """Whether a value of JSON or TOML fits an annotation; true and false are no numbers."""
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


def reason_of(error: BaseException) -> str:
    """An error in one line."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, MemoryError):
        return "there is not enough memory for it"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
