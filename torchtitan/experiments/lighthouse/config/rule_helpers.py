"""Fields by their names, rules of them, and the one line that a broken rule ends a run with."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
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
        # As TOML writes it.
        found = str(value).lower() if isinstance(value, bool) else repr(value)
        raise ValueError(f"{name} must be {rule}, got {found}; {remedy}")


def did_you_mean(value: str, choices, otherwise: str = "see --help for all") -> str:
    close = difflib.get_close_matches(value, list(choices), n=1)
    return f"did you mean {close[0]}?" if close else otherwise


@dataclass(frozen=True)
class Rule:
    """A rule of one field, or of each item of a field that is a list."""

    field: str
    is_right: Callable[[Any, JobConfig | None], bool]
    """Of the value and the whole configuration."""

    rule: str | Callable[[JobConfig], str]
    """What the value must be."""

    remedy: str | Callable[[Any, JobConfig], str]
    """What to do otherwise."""

    applies: Callable[[JobConfig, str], bool] = lambda config, device_type: True
    """Whether the rule holds, from the configuration and the type of device."""

    def check(self, config: JobConfig, device_type: str) -> None:
        """Raise ValueError if the rule is broken."""
        if not self.applies(config, device_type):
            return
        value = value_of(config, self.field)
        for item in value if isinstance(value, list) else [value]:
            self.check_value(item, config)

    def check_value(self, value: Any, config: JobConfig | None = None) -> None:
        """The same for one value; without the configuration if the rule does not look at it."""
        if not self.is_right(value, config):
            rule = self.rule if isinstance(self.rule, str) else self.rule(config)
            remedy = self.remedy if isinstance(self.remedy, str) else self.remedy(value, config)
            require(False, self.field, rule, value, remedy)


def at_least(field: str, least: int, **kwargs) -> Rule:
    """A number of `least` or more."""
    return Rule(
        field, lambda x, _: x >= least, f"at least {least}", f"use {least} or more", **kwargs
    )


def one_of(field: str, choices: list[str] | Callable[[], list[str]], **kwargs) -> Rule:
    """One of the choices, which a function may look up when they are needed."""

    def known() -> list[str]:
        return choices() if callable(choices) else choices

    return Rule(
        field,
        lambda x, _: x in known(),
        lambda _: f"one of {', '.join(known())}",
        lambda x, _: did_you_mean(str(x), known(), "choose one of these"),
        **kwargs,
    )


def unset(field: str, reason: str, remedy: str = "remove it", **kwargs) -> Rule:
    """A switch that must be off; `reason` goes on after 'false'."""
    return Rule(field, lambda x, _: not x, f"false{reason}", remedy, **kwargs)


def check_values(rules: list[Rule], config: JobConfig, device_type: str) -> None:
    """Raise ValueError for the first rule that is broken."""
    for rule in rules:
        rule.check(config, device_type)


def check_choice(name: str, value: Any, choices: list[str]) -> None:
    one_of(name, choices).check_value(value)
