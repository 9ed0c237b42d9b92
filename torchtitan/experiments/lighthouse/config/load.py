"""Load the configuration from a command line and its TOML file, and check field names and types.

Every error is a `ValueError` of one line with the field, the rule, the value, and what to do.
"""

import contextlib
import io
import re
from dataclasses import fields, is_dataclass
from typing import Any, Literal, get_args, get_origin

from torchtitan.config import ConfigManager
from torchtitan.experiments.lighthouse.config.job_config import JobConfig
from torchtitan.experiments.lighthouse.config.rule_helpers import check_choice, leaves
from torchtitan.experiments.lighthouse.runtime.read_files import is_a, read_toml
from torchtitan.tools.logging import logger

from lighthouse_cli.parser import did_you_mean


def load_config(args: list[str]) -> JobConfig:
    """Load the configuration from command-line arguments and the TOML file that they name.

    Raises:
        ValueError: a file, section, field or type is wrong.
        SystemExit: after `--help`.
    """
    if not args:
        raise ValueError(
            "command line: --job.config_file must name a TOML file, got no arguments; "
            "train_configs/debug.toml is a small one, --help lists all fields"
        )
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
        raise ValueError(
            "job.custom_config_module must be empty, since the configuration is this package's "
            f"own, got {error}; remove it"
        ) from None
    except Exception as error:
        # torchtitan raises a plain Exception for old tokenizers.
        if type(error) is not Exception:
            raise
        raise ValueError(
            "model.hf_assets_path must be a folder with tokenizer.json, got the file of an old "
            "tokenizer.model; name the folder of the new one"
        ) from None
    except SystemExit:
        # The parser prints its message inside a box with lines.
        words = " ".join(re.sub(r"[^\x20-\x7e]+", " ", message.getvalue()).split())
        _, *parts = re.split(r" ?-{10,} ?", words)
        raise ValueError(f"command line: {parts[0] if parts else words}; see --help") from None
    for name, section in (("training", config.training), ("validation", config.validation)):
        if section.dataset == "prepared":
            logger.warning(f"{name}.dataset = 'prepared' is now called 'tokenized'; rename it")
            section.dataset = "tokenized"
    _follow_training(config)
    return config


def _follow_training(config: JobConfig) -> None:
    """Use the training dataset for validation unless another one is named."""
    training, validation = config.training, config.validation
    if validation.dataset is None:
        validation.dataset = training.dataset
        validation.text_field = training.text_field
        if validation.dataset_path is None:
            validation.dataset_path = training.dataset_path


def _check_flags(args: list[str]) -> None:
    annotations = dict(leaves(JobConfig))
    known = {"--help", *(f"--{name}" for name in annotations)}
    for name, annotation in annotations.items():
        if annotation is bool:
            section, _, leaf = name.rpartition(".")
            known.add(f"--{section}.no_{leaf}")
    for arg, following in zip(args, [*args[1:], "--"], strict=False):
        flag = arg.split("=")[0].replace("-", "_").replace("__", "--", 1)
        if arg.startswith("--") and flag not in known:
            raise ValueError(
                f"command line: {arg.split('=')[0]} is not a field; "
                f"{_elsewhere(flag, '--') or did_you_mean(flag, known)}"
            )
        if arg.startswith("--"):
            value = arg.partition("=")[2] or ("" if following.startswith("--") else following)
            _check_value(flag.removeprefix("--"), value, annotations)


def _check_value(name: str, value: str, annotations: dict[str, Any]) -> None:
    """Explain the syntax of switches and lists, where the parser's message would not."""
    annotation = annotations.get(name)
    if annotation is bool and value.lower() in ("true", "false", "1", "0", "yes", "no"):
        section, _, leaf = name.rpartition(".")
        raise ValueError(
            f"command line: --{name} must stand without a value, got {value!r}; write --{name} for "
            f"true, or --{section}.no_{leaf} for false"
        )
    if annotation == list[int] and re.search(r"[\[\],]", value):
        items = " ".join(re.findall(r"-?\w+", value))
        raise ValueError(
            f"command line: --{name} must be numbers with spaces between, got {value!r}; write "
            f"--{name} {items}"
        )


def _elsewhere(name: str, prefix: str = "") -> str | None:
    """Suggest the right section for a field that is in a wrong section or in none."""
    section, _, leaf = name.removeprefix(prefix).rpartition(".")
    fields = [field for field, _ in leaves(JobConfig)]
    if section and not any(field.startswith(f"{section}.") for field in fields):
        return None
    names = [field for field in fields if field.rpartition(".")[2] == leaf]
    return f"did you mean {' or '.join(prefix + name for name in names)}?" if names else None


def _flag_value(args: list[str], flag: str) -> str | None:
    """The value of a flag, or None. The flag's name has underscores and may be given once."""
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
    # torchtitan reads the file again, so a pipe would be empty the second time.
    try:
        values = read_toml(path)
    except ValueError as error:
        raise ValueError(
            f"job.config_file must be a readable TOML file, got {error}; correct the file or path"
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
            remedy = _elsewhere(name) or did_you_mean(key, known)
            raise ValueError(f"{path}: {name} is not a field; {remedy}")
        if is_dataclass(known[key]):
            if not isinstance(value, dict):
                raise ValueError(f"{path}: {name} must be a section, got {value!r}; write [{name}]")
            _check_section(f"{name}.", value, known[key], path)
        elif not is_a(value, known[key]):
            if get_origin(known[key]) is Literal:
                check_choice(f"{path}: {name}", value, list(get_args(known[key])))
            is_class = isinstance(known[key], type) and get_origin(known[key]) is None
            expected = known[key].__name__ if is_class else str(known[key])
            remedy = "change its type"
            if known[key] is int and isinstance(value, float) and value.is_integer():
                remedy = f"write {value:.0f}"
            raise ValueError(f"{path}: {name} must be {expected}, got {value!r}; {remedy}")
