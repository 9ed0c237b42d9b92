"""Checks all rules of a configuration before process groups, data loading and compilation.

A violation raises a `ValueError` of one line with the field, the rule, the value and what to do.
"""

import importlib.util
import os
from pathlib import Path

from torchtitan.experiments.lighthouse.checkpoint import hf_llama
from torchtitan.experiments.lighthouse.checkpoint.resume import check_checkpointing
from torchtitan.experiments.lighthouse.config.job_config import JobConfig
from torchtitan.experiments.lighthouse.config.model_args import check_sizes, model_args, model_name
from torchtitan.experiments.lighthouse.config.parallel_rules import (
    DEGREE_RULES,
    LIGHTHOUSE_RULES,
    check_attention,
    process_rules,
)
from torchtitan.experiments.lighthouse.config.rule_helpers import check_values, require
from torchtitan.experiments.lighthouse.config.rules import (
    COMPUTING_RULES,
    OPTIMIZER_RULES,
    OUTPUT_RULES,
    TRAINING_RULES,
    check_numbers,
)
from torchtitan.experiments.lighthouse.config.stage2_rules import STAGE2_RULES
from torchtitan.experiments.lighthouse.data.loaders import check_data
from torchtitan.experiments.lighthouse.data.tokenized import check_tokenized
from torchtitan.experiments.lighthouse.flavors import sizes_of
from torchtitan.experiments.lighthouse.runtime import cpu_device
from torchtitan.experiments.lighthouse.runtime.command_line import (
    check_output_folder,
    open_tokenizer,
)


def check_config(
    config: JobConfig, world_size: int, device_type: str | None = None, is_start: bool = True
) -> None:
    """Check the values of a configuration for a run of `world_size` processes.

    The sizes in `model.hf_config` are written into `config.model.override`, so that the saved
    configuration describes the model without that folder.

    Args:
        device_type: device of the run, `cuda` or `cpu`; the device of this machine by default.
        is_start: whether the run starts now. If so, outputs, checkpoints, tokenizer and data on
            this machine are checked too.

    Raises:
        ValueError: the first violated rule.
    """
    device_type = device_type or cpu_device.device_type()
    check_numbers(config)
    require(world_size >= 1, "the number of processes", "at least 1", world_size, "use 1 or more")
    check_values([*TRAINING_RULES, *OPTIMIZER_RULES], config, device_type)
    _take_sizes(config)
    check_sizes(config)
    rules = [*DEGREE_RULES, *process_rules(world_size)]
    rules += [*COMPUTING_RULES, *OUTPUT_RULES, *LIGHTHOUSE_RULES]
    check_values(rules, config, device_type)
    if is_start:
        _check_surroundings(config)
    check_attention(config)
    check_values(STAGE2_RULES, config, device_type)
    if is_start or Path(config.model.hf_assets_path).exists():
        _check_tokenizer(config)
    check_data(config, must_exist=is_start)
    _check_tokenized(config, must_exist=is_start)
    check_checkpointing(config, world_size, device_type, is_start)


def _take_sizes(config: JobConfig) -> None:
    """Fill in unset sizes from the folder `model.hf_config`."""
    if config.model.hf_config is None:
        return
    try:
        found = sizes_of(hf_llama.from_config(config.model.hf_config))
    except ValueError as error:
        raise ValueError(f"model.hf_config: {error}") from None
    for name, value in found.items():
        if getattr(config.model.override, name) is None:
            setattr(config.model.override, name, value)


def warnings_of(config: JobConfig) -> list[str]:
    """Warnings about settings of a valid configuration that are perhaps unintended."""
    found = []
    steps, stage1_steps = config.training.steps, config.lighthouse.stage1_steps
    if config.lighthouse.stage_of(steps) == 1:
        found.append(
            f"lighthouse.stage1_steps is {stage1_steps}, so all {steps} steps train with "
            "Lighthouse and the loss with dense attention is clearly higher; to deploy the model, "
            "set lighthouse.stage1_steps below training.steps"
        )
    validation = config.validation
    if validation.enable and validation.dataset != config.training.dataset:
        found.append(
            f"validation.dataset is {validation.dataset!r}, but training.dataset is "
            f"{config.training.dataset!r}; leave it out to validate on held-out documents of that"
        )
    if "dataloader" in config.checkpoint.exclude_from_loading:
        found.append(
            'checkpoint.exclude_from_loading = ["dataloader"] restarts the data at every '
            "start; remove it before the next one"
        )
    return found


def _check_surroundings(config: JobConfig) -> None:
    """Check the output folder, environment variables and modules that a start needs."""
    check_output_folder("job.dump_folder", config.job.dump_folder)
    require(
        config.comm.mode != "fake_backend" or os.environ.get("NGPU", "").isdecimal(),
        "comm.mode",
        "default unless NGPU is the number of processes to play",
        config.comm.mode,
        "set the variable NGPU",
    )
    module = config.experimental.custom_import
    if module:
        try:
            is_there = importlib.util.find_spec(module) is not None
        except (ImportError, ValueError):
            is_there = False
        require(
            is_there,
            "experimental.custom_import",
            "a module that can be imported",
            module,
            "correct the name, or set PYTHONPATH",
        )


def _check_tokenizer(config: JobConfig) -> None:
    path = Path(config.model.hf_assets_path)
    if not path.is_dir():
        raise ValueError(
            f"model.hf_assets_path must be a folder with a tokenizer, got {str(path)!r}, which is "
            "none; correct the path, or leave the field out for the byte tokenizer"
        )
    found = open_tokenizer("model.hf_assets_path", path).tokenizer
    size = found.get_vocab_size()
    vocab_size = model_args(config).vocab_size
    if size > vocab_size:
        raise ValueError(
            f"model.hf_assets_path must hold a tokenizer of at most {vocab_size} tokens for "
            f"{model_name(config)}, got {size} tokens; set model.override.vocab_size, or choose "
            "another flavor or tokenizer"
        )
    largest = max(found.get_vocab().values(), default=0)
    require(
        largest < vocab_size,
        "model.hf_assets_path",
        f"a tokenizer with ids less than the {vocab_size} of {model_name(config)}",
        largest,
        "set model.override.vocab_size, or choose another flavor or tokenizer",
    )


def _check_tokenized(config: JobConfig, must_exist: bool) -> None:
    vocab_size = model_args(config).vocab_size
    for section in ["training"] + ["validation"] * config.validation.enable:
        options = getattr(config, section)
        if options.dataset != "tokenized":
            continue
        paths = (options.dataset_path, config.model.hf_assets_path)
        if must_exist or all(Path(path).expanduser().exists() for path in paths):
            check_tokenized(options.dataset_path, section, config.model.hf_assets_path, vocab_size)
