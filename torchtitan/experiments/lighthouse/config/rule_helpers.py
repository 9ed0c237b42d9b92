"""Fields by their names, and the one line that a broken rule ends a run with."""

import difflib
from dataclasses import fields, is_dataclass
from typing import Any

from torchtitan.experiments.lighthouse.config.job_config import JobConfig


def value_of(config: JobConfig, name: str) -> Any:
    """The value of a field by its name, as `training.steps`."""
    value = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def leaves(section: type, prefix: str = ""):
    """Names and annotations of all fields, as `training.steps`."""
    for f in fields(section):
        if is_dataclass(f.type):
            yield from leaves(f.type, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, f.type


def require(is_right: bool, name: str, rule: str, value: Any, remedy: str) -> None:
    if not is_right:
        raise ValueError(f"{name} must be {rule}, got {value!r}; {remedy}")


def check_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}; use {least} or more")


def check_choice(name: str, value: str, choices: list[str]) -> None:
    if value not in choices:
        remedy = did_you_mean(str(value), choices, "choose one of these")
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}; {remedy}")


def did_you_mean(value: str, choices, otherwise: str = "see --help for all") -> str:
    close = difflib.get_close_matches(value, list(choices), n=1)
    return f"did you mean {close[0]}?" if close else otherwise
