"""Compare the configuration of a run with that of the checkpoint it resumes from.

Every checkpoint holds `trained_with.json`. It records the model, the digest of the tokenizer, and
the configuration fields that a resumed run must share. Each kind of loading adds requirements:

    the model alone     the same model and tokenizer
    training state      also the same optimizer; the data is compared with its position
    the same run        also the same batches, optimizer hyperparameters, schedule and stages

Resuming with a changed field raises an error that names the field. `checkpoint.accept_changes`
lists fields that may differ. The parameter shapes must always match. torchtitan's own checkpoints
do not have the file, so only their parameter shapes are compared.
"""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from torchtitan.experiments.lighthouse.checkpoint.files import METADATA, read_metadata
from torchtitan.experiments.lighthouse.config.job_config import POOL_ROTARY_BEFORE, JobConfig
from torchtitan.experiments.lighthouse.config.model_args import model_args, model_name
from torchtitan.experiments.lighthouse.config.rule_helpers import value_of
from torchtitan.experiments.lighthouse.data.manifest import tokenizer_digest
from torchtitan.experiments.lighthouse.data.source_changes import ACCEPT_FILES
from torchtitan.experiments.lighthouse.flavors import sizes_of
from torchtitan.experiments.lighthouse.runtime.atomic_json import write_json
from torchtitan.experiments.lighthouse.runtime.read_files import is_a, read_json
from torchtitan.models.llama3 import Transformer, TransformerModelArgs

FILE_NAME = "trained_with.json"

OF_MODEL = ("model.flavor", "model.hf_assets_path")
OF_STATE = ("optimizer.name",)
STAGE2_SEQ_LEN, STAGE2_FULL_STEPS = "lighthouse.stage2_seq_len", "lighthouse.stage2_full_steps"
OF_STAGES = (
    *("lighthouse.stage1_steps", "lighthouse.num_levels", "lighthouse.pooling_factor"),
    *("lighthouse.topk", "lighthouse.scorer", "lighthouse.dilation", "lighthouse.pool_rotary"),
    *("lighthouse.full_attn_layers", STAGE2_SEQ_LEN, STAGE2_FULL_STEPS),
)
OF_RUN = (
    *("training.seq_len", "training.global_batch_size", "training.max_norm"),
    *(f"optimizer.{name}" for name in ("lr", "beta1", "beta2", "eps", "weight_decay")),
    *("lr_scheduler.total_steps", "lr_scheduler.warmup_steps", "lr_scheduler.decay_ratio"),
    *("lr_scheduler.decay_type", "lr_scheduler.min_lr_factor"),
    *OF_STAGES,
)
FIELDS = (*OF_MODEL, *OF_STATE, *OF_RUN)
"""Names of the fields that are compared."""

ACCEPTABLE = (*FIELDS, ACCEPT_FILES)
"""Values that `checkpoint.accept_changes` may contain."""

_KINDS = {"lr_scheduler.decay_ratio": float | None, "training.max_norm": float}
"""Types of fields whose current value does not show every type that is allowed."""


def record_of(config: JobConfig, data_parallel_degree: int) -> dict[str, Any]:
    """The values of `FIELDS` in this run, as JSON types.

    Args:
        data_parallel_degree: of the run. A global batch size that is not set follows from it.
    """
    record = {name: value_of(config, name) for name in FIELDS}
    record["model.flavor"] = sizes_of(model_args(config))
    record["model.hf_assets_path"] = tokenizer_digest(config.model.hf_assets_path)
    if record["training.global_batch_size"] == -1:
        batch_size = config.training.local_batch_size * data_parallel_degree
        record["training.global_batch_size"] = batch_size
    if record["lr_scheduler.total_steps"] is None:
        record["lr_scheduler.total_steps"] = config.training.steps
    if not config.has_pieces:
        record[STAGE2_SEQ_LEN] = 0
    # This value is not compared. It gives the last step on pieces, with `stage2_full_steps`.
    record["training.steps"] = config.training.steps
    return json.loads(json.dumps(record))


def write_record(path: str | Path, record: dict[str, Any]) -> None:
    """Write the record atomically into the folder of a checkpoint."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    write_json(path / FILE_NAME, record)


def check_checkpoint(
    path: str | Path,
    config: JobConfig,
    data_parallel_degree: int,
    step: int | None,
    model_only: bool,
) -> None:
    """Check that the run can resume from the complete checkpoint `path`.

    Args:
        step: step of the checkpoint if this run saved it. None for a checkpoint of another run.
        model_only: whether only the parameters are loaded.

    Raises:
        ValueError: a field differs.
    """
    path = Path(path)
    now = record_of(config, data_parallel_degree)
    was = read_record(path, now)
    if (path / METADATA).is_file() and (found := shape_difference(path, model_args(config))):
        sizes, saved = now["model.flavor"], (was or {}).get("model.flavor", {})
        differing = [name for name in sizes if saved.get(name, sizes[name]) != sizes[name]]
        if differing:
            name = differing[0]
            found = f"{name} is {sizes[name]} and in the checkpoint {saved[name]}"
        raise ValueError(
            f"model.flavor must be the model of {path}, got {model_name(config)!r}, whose {found}; "
            "name the flavor it was trained with, or set its sizes in [model.override]"
        )
    if was is None:
        return
    was.setdefault("lighthouse.pool_rotary", POOL_ROTARY_BEFORE)
    # In records without these fields, stage 2 was at full length.
    was.setdefault(STAGE2_SEQ_LEN, 0)
    was.setdefault(STAGE2_FULL_STEPS, 0)
    names = [*OF_MODEL]
    if not model_only:
        left_out = config.checkpoint.exclude_from_loading
        names += OF_STATE if "optimizer" not in left_out else ()
        names += OF_RUN if step is not None else ()
    accepted = config.checkpoint.accept_changes
    for name in names:
        if name not in was or name in accepted:
            continue
        is_same = was[name] == now[name] and name != STAGE2_FULL_STEPS
        if is_same or (name in OF_STAGES and not _affects_remaining_steps(name, was, now, step)):
            continue
        field = name
        if name == "lr_scheduler.total_steps" and config.lr_scheduler.total_steps is None:
            field = "training.steps, which lr_scheduler.total_steps follows,"
        elsewhere = "start another job.dump_folder, or " if step is not None else ""
        raise ValueError(
            f"{field} must be that of {path}, {_said(name, was, now)}; "
            f"{_set_back(name, was, now)}, {elsewhere}"
            f'accept the change with checkpoint.accept_changes = ["{name}"]'
        )


def read_record(path: str | Path, now: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """Read the record of the checkpoint `path`, with sizes as in `sizes_of`. None if it has none.

    Args:
        now: a record. The fields read must have the same types as in it.
    """
    file = Path(path) / FILE_NAME
    if not os.path.lexists(file):
        return None
    try:
        record = read_json(file)
        model = record.get("model.flavor", {})
        if not is_a(model, dict):
            raise ValueError(f"model.flavor is {repr(model)[:60]}")
        if "multiple_of" in model:
            # An older record holds torchtitan's arguments.
            known = {field.name for field in dataclasses.fields(TransformerModelArgs)}
            args = {name: value for name, value in model.items() if name in known}
            record["model.flavor"] = sizes_of(TransformerModelArgs(**args))
        for name in (now or {}).keys() & record.keys():
            kinds = _KINDS.get(name, type(now[name]))
            if not is_a(record[name], float if kinds is int else kinds):
                raise ValueError(f"{name} is {repr(record[name])[:60]}")
    except (TypeError, ArithmeticError, ValueError) as error:
        raise ValueError(
            f"{file} must record the configuration of the checkpoint, got {error}; remove it to "
            "resume without this check"
        ) from None
    return record


def shape_difference(path: str | Path, args: TransformerModelArgs) -> str | None:
    """Describe the first parameter of the checkpoint `path` whose shape differs from the model."""
    metadata = read_metadata(path).state_dict_metadata
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Transformer(args).named_parameters()}
    for name, shape in shapes.items():
        if name not in metadata:
            return f"{name} is not in the checkpoint"
        found = getattr(metadata[name], "size", ())
        if found != shape:
            return f"{name} is {list(shape)} and in the checkpoint {list(found)}"
    layers = {name for name in metadata if name.startswith("layers.")}
    if layers - shapes.keys():
        return f"layers are {args.n_layers}, fewer than in the checkpoint"
    return None


def _affects_remaining_steps(
    name: str, was: dict[str, Any], now: dict[str, Any], step: int
) -> bool:
    """Whether a change after `step` steps contradicts past steps or alters a phase already begun.

    The stage switch may move if neither its old nor its new step has passed. The same holds for the
    last step on pieces in stage 2. Fields of stage 1 may change after stage 1. The piece length may
    change before the first and after the last step on pieces.
    """
    stage1_steps = _stage1_steps(now)
    if name == "lighthouse.stage1_steps":
        return min(step, stage1_steps) != min(step, _stage1_steps(was))
    ends = [_last_piece_step(record) for record in (was, now) if record[STAGE2_SEQ_LEN]]
    if name == STAGE2_SEQ_LEN:
        return stage1_steps < step < max(ends)
    if name == STAGE2_FULL_STEPS:
        return len({min(step, end) for end in ends}) > 1
    if name == "lighthouse.dilation" and now["lighthouse.scorer"] != "dilated":
        return False
    return step < stage1_steps


def _stage1_steps(record: dict[str, Any]) -> float:
    stage1_steps = record["lighthouse.stage1_steps"]
    return math.inf if stage1_steps == -1 else stage1_steps


def _last_piece_step(record: dict[str, Any]) -> int:
    """The last step on pieces. The record must have pieces in stage 2."""
    return record["training.steps"] - record[STAGE2_FULL_STEPS]


def _said(name: str, was: dict[str, Any], now: dict[str, Any]) -> str:
    if name == "model.flavor":
        differing = [key for key in now[name] if was[name].get(key) != now[name][key]]
        key = differing[0] if differing else next(iter(was[name].keys() - now[name].keys()))
        return f"whose {key} is {was[name].get(key)!r}, got {now[name].get(key)!r}"
    if name == "model.hf_assets_path":
        return "got a folder with another tokenizer"
    if name == STAGE2_FULL_STEPS:
        return f"whose last step on pieces is {_last_piece_step(was)}, got {_last_piece_step(now)}"
    return f"{was[name]!r}, got {now[name]!r}"


def _set_back(name: str, was: dict[str, Any], now: dict[str, Any]) -> str:
    if name == "model.flavor":
        return "name the one it was trained with, or set its sizes in [model.override]"
    if name in OF_MODEL:
        return "name the one it was trained with"
    if name == STAGE2_FULL_STEPS:
        return f"set it to {max(0, now['training.steps'] - _last_piece_step(was))}"
    if was[name] is None:
        return "leave it out"
    return f"set it to {was[name]!r}"
