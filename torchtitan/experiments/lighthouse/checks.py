"""Every rule of a configuration, checked before process groups, data or compilation.

Each breach is one `ValueError` of one line: the field, the rule, the value, and what to do.
`load_config` checks names and types, `check_config` values and how they go together.
"""

import contextlib
import difflib
import io
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import tomli
from tokenizers import Tokenizer
from torchtitan.config import ConfigManager
from torchtitan.experiments.lighthouse import FLAVORS, MODEL_NAME, hugging_face
from torchtitan.experiments.lighthouse.checkpoint import (
    check_folder,
    checkpoint_steps,
    data_parallel_degree,
    is_whole,
    prepared_position,
)
from torchtitan.experiments.lighthouse.data import check_data
from torchtitan.experiments.lighthouse.job_config import JobConfig
from torchtitan.experiments.lighthouse.prepared import PreparedDataset, check_prepared
from torchtitan.tools import utils

from lighthouse.context_parallel import CHUNKS_PER_RANK
from lighthouse.sdpa import LONGEST_EFFICIENT

TRAINING_STATE = {"optimizer", "lr_scheduler", "dataloader", "train_state"}
"""What a checkpoint holds beside the model, by torchtitan's names."""

_NO_CUSTOM_CONFIG = (
    "job.custom_config_module must be empty, since the configuration is this package's own, "
    "got {}; remove it"
)


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
            return manager.parse_args(args)
    except ImportError as error:
        raise ValueError(_NO_CUSTOM_CONFIG.format(error)) from None
    except SystemExit:
        # The parser draws a box around what it has to say, and lines inside it.
        words = " ".join(re.sub(r"[^\x20-\x7e]+", " ", message.getvalue()).split())
        _, *parts = re.split(r" ?-{10,} ?", words)
        raise ValueError(f"command line: {parts[0] if parts else words}; see --help") from None


def check_config(
    config: JobConfig, world_size: int, device_type: str | None = None, is_start: bool = True
) -> None:
    """Check the values of a configuration for a run of `world_size` processes.

    Args:
        device_type: what the run is for, `cuda` or `cpu`; what is here by default.
        is_start: whether it is to start now, with the outputs, checkpoints and tokenizer that are
            there.

    Raises:
        ValueError: the first rule that is broken.
    """
    device_type = device_type or utils.device_type
    _check_model(config)
    _check_training(config, device_type)
    _check_choice("optimizer.name", config.optimizer.name, ["Adam", "AdamW"])
    _check_parallelism(config, world_size)
    _check_lighthouse(config)
    _check_context_parallel(config, device_type)
    if is_start or Path(config.model.hf_assets_path).exists():
        _check_tokenizer(config)
    check_data(config)
    _check_prepared(config)
    _check_checkpoint(config, world_size, is_start)


def _check_model(config: JobConfig) -> None:
    if config.job.custom_config_module:
        raise ValueError(_NO_CUSTOM_CONFIG.format(repr(config.job.custom_config_module)))
    _check_choice("model.name", config.model.name, [MODEL_NAME])
    _check_choice("model.flavor", config.model.flavor, list(FLAVORS))


def _check_training(config: JobConfig, device_type: str) -> None:
    training, validation = config.training, config.validation
    _check_at_least("training.steps", training.steps, 1)
    _check_at_least("training.local_batch_size", training.local_batch_size, 1)
    _check_at_least("training.seq_len", training.seq_len, 1)
    _check_at_least("training.loss_chunk_size", training.loss_chunk_size, 0)
    on_gpu = device_type == "cuda"
    if (
        on_gpu
        and training.mixed_precision_param == "float32"
        and training.seq_len > LONGEST_EFFICIENT
    ):
        raise ValueError(
            "training.mixed_precision_param must be bfloat16 on a GPU beyond "
            f"{LONGEST_EFFICIENT} tokens, got 'float32', for which no fused attention is right at "
            "that length; set it to bfloat16"
        )
    _check_at_least("metrics.log_freq", config.metrics.log_freq, 1)
    if validation.enable:
        _check_at_least("validation.steps", validation.steps, 1)
        _check_at_least("validation.freq", validation.freq, 1)
        _check_at_least("validation.local_batch_size", validation.local_batch_size, 1)
        if not 1 <= validation.seq_len <= training.seq_len:
            raise ValueError(
                f"validation.seq_len must be from 1 to training.seq_len, {training.seq_len}, got "
                f"{validation.seq_len}; lower it"
            )


def _check_parallelism(config: JobConfig, world_size: int) -> None:
    parallelism = config.parallelism
    _check_at_least("parallelism.context_parallel_degree", parallelism.context_parallel_degree, 1)
    if parallelism.pipeline_parallel_degree != 1:
        raise ValueError(
            "parallelism.pipeline_parallel_degree must be 1, since the stage switch works on whole "
            f"models, got {parallelism.pipeline_parallel_degree}; use data, context or tensor "
            "parallelism"
        )
    tensor_parallel = parallelism.tensor_parallel_degree
    _check_at_least("parallelism.tensor_parallel_degree", tensor_parallel, 1)
    n_kv_heads = _num_kv_heads(config)
    if n_kv_heads % tensor_parallel:
        raise ValueError(
            f"parallelism.tensor_parallel_degree must divide the {n_kv_heads} key/value heads of "
            f"{config.model.flavor}, got {tensor_parallel}; use {_divisors(n_kv_heads)}"
        )
    loss_chunk_size = config.training.loss_chunk_size
    if loss_chunk_size and tensor_parallel > 1:
        raise ValueError(
            "training.loss_chunk_size must be 0 with tensor parallelism, which shards the head by "
            f"vocabulary, got {loss_chunk_size}; set it to 0, or "
            "parallelism.tensor_parallel_degree to 1"
        )
    replicate = parallelism.data_parallel_replicate_degree
    _check_at_least("parallelism.data_parallel_replicate_degree", replicate, 1)
    others = replicate * parallelism.context_parallel_degree * tensor_parallel
    shard = parallelism.data_parallel_shard_degree
    if world_size % others or shard not in (-1, world_size // others):
        fitting = f"-1 or {world_size // others}" if world_size % others == 0 else "-1"
        processes = f"a multiple of {others}" if others > 1 else f"{shard}"
        raise ValueError(
            "parallelism.data_parallel_shard_degree times the other degrees must be the number of "
            f"processes, got {shard} times {others} for {world_size}; set it to {fitting}, or "
            f"start {processes} processes"
        )
    per_step = config.training.local_batch_size * replicate * (world_size // others)
    global_batch = config.training.global_batch_size
    if global_batch != -1 and (global_batch < 1 or global_batch % per_step):
        nearest = max(1, round(global_batch / per_step)) * per_step
        raise ValueError(
            "training.global_batch_size must be a multiple of local_batch_size times the data "
            f"parallel degree, {per_step}, got {global_batch}; nearest: {nearest}, or -1"
        )


def _num_kv_heads(config: JobConfig) -> int:
    model = FLAVORS[config.model.flavor]
    return model.n_kv_heads or model.n_heads


def _divisors(number: int) -> str:
    return " or ".join(str(n) for n in range(1, number + 1) if number % n == 0)


def _check_lighthouse(config: JobConfig) -> None:
    lighthouse, steps = config.lighthouse, config.training.steps
    _check_at_least("lighthouse.telemetry_freq", lighthouse.telemetry_freq, 0)
    if not -1 <= lighthouse.stage1_steps <= steps:
        raise ValueError(
            f"lighthouse.stage1_steps must be from 0 to training.steps ({steps}), or -1 for no "
            f"switch, got {lighthouse.stage1_steps}; lower it or raise training.steps"
        )
    n_layers = FLAVORS[config.model.flavor].n_layers
    for layer in lighthouse.full_attn_layers:
        if not -n_layers <= layer < n_layers:
            raise ValueError(
                f"lighthouse.full_attn_layers must be from {-n_layers} to {n_layers - 1} for the "
                f"{n_layers} layers of {config.model.flavor}, got {layer}; remove it"
            )
    try:
        attention = lighthouse.attention_config()
    except ValueError as error:
        raise ValueError(f"lighthouse.{error}") from None
    if lighthouse.stage1_steps == 0:
        return
    degree = config.parallelism.context_parallel_degree
    num_chunks = degree * CHUNKS_PER_RANK[lighthouse.context_parallel] if degree > 1 else 1
    for section in ["training"] + ["validation"] * config.validation.enable:
        try:
            attention.check_seq_len(getattr(config, section).seq_len, num_chunks)
        except ValueError as error:
            owner = section if str(error).startswith("seq_len") else "lighthouse"
            raise ValueError(f"{owner}.{error}") from None


def _check_context_parallel(config: JobConfig, device_type: str) -> None:
    parallelism, lighthouse = config.parallelism, config.lighthouse
    degree, scheme = parallelism.context_parallel_degree, lighthouse.context_parallel
    # torchtitan asks for the factor of two, in training, whatever the scheme and the degrees.
    divisor = 2 * degree * parallelism.tensor_parallel_degree
    for section in ["training"] + ["validation"] * (config.validation.enable and divisor > 2):
        seq_len = getattr(config, section).seq_len
        if seq_len % divisor:
            nearest = max(1, round(seq_len / divisor)) * divisor
            raise ValueError(
                f"{section}.seq_len must be a multiple of twice the context and tensor parallel "
                f"degrees, {divisor}, got {seq_len}; nearest: {nearest}"
            )
    _check_choice("lighthouse.context_parallel", scheme, list(CHUNKS_PER_RANK))
    _check_choice(
        "parallelism.context_parallel_rotate_method",
        parallelism.context_parallel_rotate_method,
        ["allgather", "alltoall"],
    )
    if parallelism.context_parallel_load_balancer != "headtail":
        raise ValueError(
            "parallelism.context_parallel_load_balancer must be 'headtail', since the layout "
            "follows from lighthouse.context_parallel, got "
            f"{parallelism.context_parallel_load_balancer!r}; leave it out"
        )
    if degree == 1:
        return
    if lighthouse.telemetry_freq:
        raise ValueError(
            "lighthouse.telemetry_freq must be 0 under context parallelism, where no rank has a "
            f"whole sequence, got {lighthouse.telemetry_freq}; set it to 0, or "
            "parallelism.context_parallel_degree to 1"
        )
    if lighthouse.scorer != "norm" and lighthouse.stage1_steps != 0:
        raise ValueError(
            "lighthouse.scorer must be norm under context parallelism, where each rank scores its "
            f"own tokens, got {lighthouse.scorer!r}; set it to norm, or "
            "parallelism.context_parallel_degree to 1"
        )
    if scheme == "ulysses":
        n_kv_heads = _num_kv_heads(config) // parallelism.tensor_parallel_degree
        if n_kv_heads % degree:
            raise ValueError(
                "parallelism.context_parallel_degree must divide the key/value heads of a rank, "
                f"{n_kv_heads}, with lighthouse.context_parallel = 'ulysses', got {degree}; use "
                f"{_divisors(n_kv_heads)}, or 'ring'"
            )
    elif device_type != "cpu" and config.training.mixed_precision_param == "float32":
        raise ValueError(
            "training.mixed_precision_param must be bfloat16 with lighthouse.context_parallel = "
            "'ring', whose kernels take no other type on a GPU, got 'float32'; set it to bfloat16, "
            "or use 'ulysses'"
        )


def _check_checkpoint(config: JobConfig, world_size: int, is_start: bool) -> None:
    checkpoint, lighthouse = config.checkpoint, config.lighthouse
    if not checkpoint.enable:
        if checkpoint.create_seed_checkpoint:
            raise ValueError(
                "checkpoint.enable must be true for checkpoint.create_seed_checkpoint, got false; "
                "set it to true"
            )
        return
    for in_hf, model_only in (
        ("last_save_in_hf", "last_save_model_only"),
        ("initial_load_in_hf", "initial_load_model_only"),
    ):
        if getattr(checkpoint, in_hf) and not getattr(checkpoint, model_only):
            raise ValueError(
                f"checkpoint.{in_hf} must go with checkpoint.{model_only} = true, since that "
                f"format holds the model alone, got false; set {model_only} to true"
            )
    _check_at_least("checkpoint.interval", checkpoint.interval, 1)
    if checkpoint.keep_latest_k < 0 or checkpoint.keep_latest_k == 1:
        raise ValueError(
            "checkpoint.keep_latest_k must be 0, for all, or at least 2, got "
            f"{checkpoint.keep_latest_k}; use 2 or more"
        )
    ends_in_stage_1 = lighthouse.stage_of(config.training.steps) == 1
    if ends_in_stage_1 and checkpoint.last_save_model_only:
        raise ValueError(
            "checkpoint.last_save_model_only must be false for a run that ends in stage 1, got "
            "true: the dense stage could not go on without the optimizer; set it to false"
        )
    for name in checkpoint.exclude_from_loading:
        _check_choice("checkpoint.exclude_from_loading", name, sorted({*TRAINING_STATE, "model"}))
    lost = TRAINING_STATE & set(checkpoint.exclude_from_loading)
    if lost and 0 < lighthouse.stage1_steps < config.training.steps:
        raise ValueError(
            "checkpoint.exclude_from_loading must keep the training state in a run of two stages, "
            f"got {', '.join(sorted(lost))}; remove it"
        )
    if not is_start:
        return
    folder = Path(config.job.dump_folder) / checkpoint.folder
    check_folder(folder)
    if checkpoint.load_step != -1 and not is_whole(folder / f"step-{checkpoint.load_step}"):
        raise ValueError(
            f"checkpoint.load_step must be -1 or the step of a whole checkpoint in {folder}, got "
            f"{checkpoint.load_step}; use -1 for the newest"
        )
    initial = checkpoint.initial_load_path
    if initial is None and checkpoint.initial_load_in_hf:
        initial = config.model.hf_assets_path
    if folder.exists():
        steps = checkpoint_steps(folder)
        newest = max(step for step, is_whole in steps.items() if is_whole)
        step = newest if checkpoint.load_step == -1 else checkpoint.load_step
        # Of a seed checkpoint, step 0, the model alone is loaded.
        if step:
            _check_data_position(config, folder / f"step-{step}", world_size)
        return
    if initial is None:
        return
    if not Path(initial).is_dir():
        raise ValueError(
            "checkpoint.initial_load_path must be the folder of a checkpoint, step number "
            f"included, got {initial!r}, which is none; correct the path"
        )
    if checkpoint.initial_load_in_hf:
        flavor = config.model.flavor
        hugging_face.check_flavor(initial, FLAVORS[flavor], flavor)
        return
    if not is_whole(initial):
        raise ValueError(
            f"checkpoint.initial_load_path must hold a whole checkpoint, got {initial!r}, which is "
            "torn or none; name an older one"
        )
    if not checkpoint.initial_load_model_only:
        _check_data_position(config, Path(initial), world_size)


def _check_data_position(config: JobConfig, path: Path, world_size: int) -> None:
    """A checkpoint holds the one position of all ranks in prepared data, for any number of them;
    otherwise the data position of each data-parallel rank, for as many ranks alone."""
    if "dataloader" in config.checkpoint.exclude_from_loading:
        return
    training = config.training
    saved, position = data_parallel_degree(path), prepared_position(path)
    is_prepared = training.dataset == "prepared"
    if (saved is not None and is_prepared) or (position is not None and not is_prepared):
        rule = "a corpus of documents" if is_prepared else "'prepared'"
        raise ValueError(
            f"training.dataset must be {rule} to go on at the data position of {path}, got "
            f"{training.dataset!r}; set it back, or begin the data anew with "
            'checkpoint.exclude_from_loading = ["dataloader"]'
        )
    if position is not None:
        PreparedDataset(training.dataset_path, training.seq_len).load_state_dict(position)
        return
    parallelism = config.parallelism
    model_parallel = parallelism.context_parallel_degree * parallelism.tensor_parallel_degree
    degree = world_size // model_parallel
    if saved not in (None, degree):
        raise ValueError(
            f"the data-parallel degree must be that of {path}, {saved}, to go on at its data "
            f"position, got {degree}: {world_size} processes over context times tensor parallel "
            f"{model_parallel}; start {saved * model_parallel} processes or change those degrees, "
            'or begin the data anew with checkpoint.exclude_from_loading = ["dataloader"]'
        )


def _check_tokenizer(config: JobConfig) -> None:
    path = Path(config.model.hf_assets_path)
    if not path.is_dir():
        raise ValueError(
            f"model.hf_assets_path must be a folder with a tokenizer, got {str(path)!r}, which is "
            "none; correct the path, or leave the field out for the byte tokenizer"
        )
    tokenizer = path / "tokenizer.json"
    if not tokenizer.is_file():
        raise ValueError(
            f"model.hf_assets_path must hold tokenizer.json, got {str(path)!r} without it; "
            "download the tokenizer of the model into it"
        )
    size = Tokenizer.from_file(str(tokenizer)).get_vocab_size()
    vocab_size = FLAVORS[config.model.flavor].vocab_size
    if size > vocab_size:
        raise ValueError(
            f"model.hf_assets_path must hold a tokenizer of at most {vocab_size} tokens for flavor "
            f"{config.model.flavor}, got {size} tokens; choose another flavor or tokenizer"
        )


def _check_prepared(config: JobConfig) -> None:
    vocab_size = FLAVORS[config.model.flavor].vocab_size
    for section in ["training"] + ["validation"] * config.validation.enable:
        options = getattr(config, section)
        if options.dataset == "prepared":
            path = config.model.hf_assets_path
            check_prepared(options.dataset_path, section, path, vocab_size)


def _check_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}; use {least} or more")


def _check_choice(name: str, value: str, choices: list[str]) -> None:
    if value not in choices:
        remedy = _did_you_mean(str(value), choices)
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}; {remedy}")


def _check_flags(args: list[str]) -> None:
    known = {"--help"}
    for name, annotation in _leaves(JobConfig):
        section, _, leaf = name.rpartition(".")
        known.add(f"--{name}")
        if annotation is bool:
            known.add(f"--{section}.no_{leaf}")
    for arg in args:
        flag = arg.split("=")[0].replace("-", "_").replace("__", "--", 1)
        if arg.startswith("--") and flag not in known:
            raise ValueError(
                f"command line: {arg.split('=')[0]} is not a field; {_did_you_mean(flag, known)}"
            )


def _flag_value(args: list[str], flag: str) -> str | None:
    for i, arg in enumerate(args):
        name, _, value = arg.partition("=")
        if name.replace("config-file", "config_file") == flag:
            if not value and i + 1 == len(args):
                raise ValueError(f"command line: {flag} must be followed by a file; name one")
            return value or args[i + 1]
    return None


def _check_toml(path: str) -> None:
    try:
        values = tomli.loads(Path(path).read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"job.config_file must be a readable file, got {path!r} ({error}); correct the path"
        ) from None
    except tomli.TOMLDecodeError as error:
        raise ValueError(
            f"job.config_file must be valid TOML, got {path!r} ({error}); correct the line"
        ) from None
    _check_section("", values, JobConfig, path)


def _check_section(prefix: str, values: dict[str, Any], section: type, path: str) -> None:
    known = {f.name: f.type for f in fields(section)}
    for key, value in values.items():
        name = prefix + key
        if key not in known:
            raise ValueError(f"{path}: {name} is not a field; {_did_you_mean(key, known)}")
        if is_dataclass(known[key]):
            if not isinstance(value, dict):
                raise ValueError(f"{path}: {name} must be a section, got {value!r}; write [{name}]")
            _check_section(f"{name}.", value, known[key], path)
        elif not _is_a(value, known[key]):
            if get_origin(known[key]) is Literal:
                _check_choice(f"{path}: {name}", value, list(get_args(known[key])))
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


def _leaves(section: type, prefix: str = ""):
    """Names and annotations of all fields, as `training.steps`."""
    for f in fields(section):
        if is_dataclass(f.type):
            yield from _leaves(f.type, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, f.type


def _did_you_mean(value: str, choices) -> str:
    close = difflib.get_close_matches(value, list(choices), n=1)
    return f"did you mean {close[0]}?" if close else "see --help for all"
