"""From a command line and its TOML file to a configuration: names and types of fields.

Each breach is one `ValueError` of one line: the field, the rule, the value, and what to do.
"""

import contextlib
import io
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import tomli
from torchtitan.config import ConfigManager
from torchtitan.experiments.lighthouse.config.job_config import JobConfig
from torchtitan.experiments.lighthouse.config.rule_helpers import check_choice, did_you_mean, leaves
from torchtitan.tools.logging import logger

_NO_CUSTOM_CONFIG = (
    "job.custom_config_module must be empty, since the configuration is this package's own, "
    "got {}; remove it"
)

_OLD_DATASETS = {"prepared": "tokenized"}


def load_config(args: list[str]) -> JobConfig:
    """The configuration of a command line, with the TOML file it names.

    Raises:
        ValueError: a file, a section, a field or a type that is wrong.
        SystemExit: after `--help`.
    """
    _check_flags(args)
    path = _flag_value(args, "--job.config_file")
    if path is not None:
        _check_toml(path)
    manager = ConfigManager(JobConfig)
    if {"-h", "--help"} & set(args):
        return manager.parse_args(args)
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message), contextlib.redirect_stdout(message):
            config = manager.parse_args(args)
    except ImportError as error:
        raise ValueError(_NO_CUSTOM_CONFIG.format(error)) from None
    except Exception as error:
        # torchtitan's own rule for old tokenizers has no type of its own.
        if type(error) is not Exception:
            raise
        raise ValueError(
            "model.hf_assets_path must be a folder with tokenizer.json, got the file of an old "
            "tokenizer.model; name the folder of the new one"
        ) from None
    except SystemExit:
        # The parser draws a box around what it has to say, and lines inside it.
        words = " ".join(re.sub(r"[^\x20-\x7e]+", " ", message.getvalue()).split())
        _, *parts = re.split(r" ?-{10,} ?", words)
        raise ValueError(f"command line: {parts[0] if parts else words}; see --help") from None
    _rename_old_values(config)
    return config


def _rename_old_values(config: JobConfig) -> None:
    """Replace values that had another name before, with a warning."""
    for name, section in (("training", config.training), ("validation", config.validation)):
        if new := _OLD_DATASETS.get(section.dataset):
            logger.warning(f"{name}.dataset = {section.dataset!r} is now called {new!r}; rename it")
            section.dataset = new


def _check_flags(args: list[str]) -> None:
    known = {"--help"}
    for name, annotation in leaves(JobConfig):
        section, _, leaf = name.rpartition(".")
        known.add(f"--{name}")
        if annotation is bool:
            known.add(f"--{section}.no_{leaf}")
    for arg in args:
        flag = arg.split("=")[0].replace("-", "_").replace("__", "--", 1)
        if arg.startswith("--") and flag not in known:
            raise ValueError(
                f"command line: {arg.split('=')[0]} is not a field; {did_you_mean(flag, known)}"
            )


def _flag_value(args: list[str], flag: str) -> str | None:
    """The value of a flag with underscores in its name, or None; it may stand there once."""
    values = []
    for i, arg in enumerate(args):
        name, is_joined, value = arg.partition("=")
        if name.replace("config-file", "config_file") == flag:
            if not is_joined:
                value = args[i + 1] if i + 1 < len(args) else ""
            if not value:
                raise ValueError(f"command line: {flag} must be followed by a file; name one")
            values.append(value)
    if len(values) > 1:
        raise ValueError(
            f"command line: {flag} must be given once, got {' and '.join(values)}; name one file"
        )
    return values[0] if values else None


def _check_toml(path: str) -> None:
    if Path(path).exists() and not Path(path).is_dir() and not Path(path).is_file():
        # Read twice, here and by torchtitan, and a pipe is empty then.
        raise ValueError(
            f"job.config_file must be a regular file, got {path!r}, which is a pipe or a device; "
            "write it to a file"
        )
    try:
        values = tomli.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"job.config_file must be a readable file, got {path!r} ({error}); correct the path"
        ) from None
    except tomli.TOMLDecodeError as error:
        raise ValueError(
            f"job.config_file must be valid TOML, got {path!r} ({error}); correct the line"
        ) from None
    if not values:
        raise ValueError(
            f"job.config_file must set a field, got {path!r}, which is empty; correct the path, or "
            "leave it out for the defaults"
        )
    _check_section("", values, JobConfig, path)


def _check_section(prefix: str, values: dict[str, Any], section: type, path: str) -> None:
    known = {f.name: f.type for f in fields(section)}
    for key, value in values.items():
        name = prefix + key
        if key not in known:
            raise ValueError(f"{path}: {name} is not a field; {did_you_mean(key, known)}")
        if is_dataclass(known[key]):
            if not isinstance(value, dict):
                raise ValueError(f"{path}: {name} must be a section, got {value!r}; write [{name}]")
            _check_section(f"{name}.", value, known[key], path)
        elif not _is_a(value, known[key]):
            if get_origin(known[key]) is Literal:
                check_choice(f"{path}: {name}", value, list(get_args(known[key])))
            is_class = isinstance(known[key], type) and get_origin(known[key]) is None
            expected = known[key].__name__ if is_class else str(known[key])
            raise ValueError(f"{path}: {name} must be {expected}, got {value!r}; change its type")


def _is_a(value: Any, annotation: Any) -> bool:
    """Whether a TOML value fits the annotation of a field."""
    origin, options = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return any(_is_a(value, option) for option in options)
    if origin is Literal:
        return value in options
    if origin is list:
        return isinstance(value, list) and all(_is_a(item, options[0]) for item in value)
    if annotation is NoneType:
        return value is None
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, annotation)
