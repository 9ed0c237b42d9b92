"""Look up fields by name, define rules for them, and raise one-line errors for broken rules."""

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from torchtitan.experiments.lighthouse.config.job_config import JobConfig

from lighthouse_cli.parser import did_you_mean


def value_of(config: JobConfig, name: str) -> Any:
    """The value of a field by its dotted name, such as `training.steps`."""
    value = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def leaves(section: type, prefix: str = ""):
    """Dotted names, such as `training.steps`, and annotations of all fields."""
    for f in fields(section):
        if is_dataclass(f.type):
            yield from leaves(f.type, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, f.type


def require(is_right: bool, name: str, rule: str, value: Any, remedy: str) -> None:
    if not is_right:
        # TOML writes booleans in lower case.
        found = str(value).lower() if isinstance(value, bool) else repr(value)
        raise ValueError(f"{name} must be {rule}, got {found}; {remedy}")


@dataclass(frozen=True)
class Rule:
    """A rule for one field. For a list, it applies to each item."""

    field: str
    is_right: Callable[[Any, JobConfig | None], bool]
    """Test of the value, given the whole configuration."""

    rule: str | Callable[[JobConfig], str]
    """What the value must be."""

    remedy: str | Callable[[Any, JobConfig], str]
    """What to do if the rule is broken."""

    applies: Callable[[JobConfig, str], bool] = lambda config, device_type: True
    """Whether the rule applies to this configuration and type of device."""

    def check(self, config: JobConfig, device_type: str) -> None:
        """Raise ValueError if the rule is broken."""
        if not self.applies(config, device_type):
            return
        value = value_of(config, self.field)
        for item in value if isinstance(value, list) else [value]:
            self.check_value(item, config)

    def check_value(self, value: Any, config: JobConfig | None = None) -> None:
        """Check one value. `config` may be None if the rule does not use it."""
        if not self.is_right(value, config):
            rule = self.rule if isinstance(self.rule, str) else self.rule(config)
            remedy = self.remedy if isinstance(self.remedy, str) else self.remedy(value, config)
            require(False, self.field, rule, value, remedy)


def at_least(field: str, least: int, **kwargs) -> Rule:
    """A rule that the value is at least `least`."""
    return Rule(
        field, lambda x, _: x >= least, f"at least {least}", f"use {least} or more", **kwargs
    )


def one_of(field: str, choices: list[str] | Callable[[], list[str]], **kwargs) -> Rule:
    """A rule that the value is one of the choices. A callable is evaluated when needed."""

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
    """A rule that the value is false or empty. The message appends `reason` to 'false'."""
    return Rule(field, lambda x, _: not x, f"false{reason}", remedy, **kwargs)


def check_values(rules: list[Rule], config: JobConfig, device_type: str) -> None:
    """Raise ValueError for the first rule that is broken."""
    for rule in rules:
        rule.check(config, device_type)


def check_choice(name: str, value: Any, choices: list[str]) -> None:
    one_of(name, choices).check_value(value)
