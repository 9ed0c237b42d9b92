"""Check that a run can start from the existing checkpoints and can save new ones."""

import shutil
from pathlib import Path
from typing import Any

import torch
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.experiments.lighthouse.checkpoint import hf_llama
from torchtitan.experiments.lighthouse.checkpoint.checksums import checksum_fault
from torchtitan.experiments.lighthouse.checkpoint.compatibility import (
    ACCEPTABLE,
    check_checkpoint,
)
from torchtitan.experiments.lighthouse.checkpoint.files import (
    STEP,
    check_folder,
    check_safe,
    checkpoint_faults,
    damage_reason,
    whole_steps,
)
from torchtitan.experiments.lighthouse.config.job_config import JobConfig
from torchtitan.experiments.lighthouse.config.model_args import model_args, model_name
from torchtitan.experiments.lighthouse.config.rule_helpers import (
    Rule,
    at_least,
    check_values,
    one_of,
    unset,
)
from torchtitan.experiments.lighthouse.data.datasets import DATASETS
from torchtitan.experiments.lighthouse.data.documents import open_documents
from torchtitan.experiments.lighthouse.data.source_changes import ACCEPT_FILES
from torchtitan.experiments.lighthouse.data.tokenized import TokenizedDataset
from torchtitan.experiments.lighthouse.metrics import FILE_NAME as METRICS
from torchtitan.experiments.lighthouse.metrics import LOSS, read_metrics
from torchtitan.experiments.lighthouse.runtime.read_files import is_a
from torchtitan.models.llama3 import Transformer

TRAINING_STATE = {"optimizer", "lr_scheduler", "dataloader", "train_state"}
"""Parts of a checkpoint other than the model, by torchtitan's names."""

RESTART_DATA = 'restart the data with checkpoint.exclude_from_loading = ["dataloader"]'


def saves(config: JobConfig, device_type: str) -> bool:
    return config.checkpoint.enable


def has_two_stages(config: JobConfig, device_type: str) -> bool:
    is_switched = 0 < config.lighthouse.stage1_steps < config.training.steps
    return saves(config, device_type) and is_switched


def ends_in_stage_1(config: JobConfig, device_type: str) -> bool:
    is_stage_1 = config.lighthouse.stage_of(config.training.steps) == 1
    return saves(config, device_type) and is_stage_1


def goes_with(in_hf: str, model_only: str) -> Rule:
    """A rule that Hugging Face format is used only for the model alone."""
    return Rule(
        f"checkpoint.{model_only}",
        lambda x, config: x or not getattr(config.checkpoint, in_hf),
        f"true with checkpoint.{in_hf}, since that format holds the model alone",
        "set it to true",
        applies=saves,
    )


CHECKPOINT_RULES = [
    Rule(
        "checkpoint.enable",
        lambda x, config: x or not config.checkpoint.create_seed_checkpoint,
        "true for checkpoint.create_seed_checkpoint",
        "set it to true",
    ),
    goes_with("last_save_in_hf", "last_save_model_only"),
    goes_with("initial_load_in_hf", "initial_load_model_only"),
    at_least("checkpoint.interval", 1, applies=saves),
    Rule(
        "checkpoint.keep_latest_k",
        lambda x, _: x == 0 or x >= 2,
        "0, for all, or at least 2",
        "use 2 or more",
        applies=saves,
    ),
    unset(
        "checkpoint.last_save_model_only",
        " for a run that ends in stage 1, since the dense stage needs the optimizer's state",
        "set it to false",
        applies=ends_in_stage_1,
    ),
    one_of("checkpoint.accept_changes", list(ACCEPTABLE), applies=saves),
    one_of("checkpoint.exclude_from_loading", sorted({*TRAINING_STATE, "model"}), applies=saves),
    Rule(
        "checkpoint.exclude_from_loading",
        lambda x, _: x not in TRAINING_STATE - {"dataloader"},
        "without the training state, but for dataloader, in a run of two stages",
        "remove it",
        applies=has_two_stages,
    ),
]
"""Rules for saving and loading."""


def check_checkpointing(
    config: JobConfig, world_size: int, device_type: str, is_start: bool
) -> None:
    """Check the checkpoint fields. If the run starts now, also check the files on disk."""
    if is_start and not config.checkpoint.enable:
        _check_not_superseded(config)
    check_values(CHECKPOINT_RULES, config, device_type)
    if is_start and config.checkpoint.enable:
        _check_start(config, world_size)


def _check_start(config: JobConfig, world_size: int) -> None:
    """Check the checkpoint to start from, and the disk space for new ones."""
    checkpoint = config.checkpoint
    folder = Path(config.job.dump_folder) / checkpoint.folder
    check_folder(folder)
    whole = whole_steps(folder)
    if not whole:
        _check_not_lost(config, folder)
    if checkpoint.load_step not in (-1, *whole):
        raise ValueError(
            f"checkpoint.load_step must be -1 or the step of a whole checkpoint in {folder}, got "
            f"{checkpoint.load_step}; use -1 for the newest"
        )
    if whole:
        newest = whole[-1]
        if checkpoint.load_step not in (-1, newest):
            raise ValueError(
                f"checkpoint.load_step must be the newest in {folder}, {newest}, because new "
                f"checkpoints of earlier steps would be purged first, got {checkpoint.load_step}; "
                "move newer ones away, or start another job.dump_folder with "
                "checkpoint.initial_load_path"
            )
        _check_own_steps(config, world_size, whole if checkpoint.load_step == -1 else [newest])
    _check_space(config, folder, len(whole))
    initial = checkpoint.initial_load_path
    if initial is None and checkpoint.initial_load_in_hf:
        initial = config.model.hf_assets_path
    if whole or initial is None:
        return
    steps = whole_steps(initial) or whole_steps(Path(initial) / "checkpoint")
    if not Path(initial).is_dir() or steps:
        remedy = f"name {' or '.join(f'step-{step}' for step in steps)} in it"
        raise ValueError(
            "checkpoint.initial_load_path must be the folder of a checkpoint, step number "
            f"included, got {initial!r}, which is none; {remedy if steps else 'correct the path'}"
        )
    if checkpoint.initial_load_in_hf:
        hf_llama.check_flavor(initial, model_args(config), model_name(config))
        return
    if torn := damage_reason(initial):
        raise ValueError(
            f"checkpoint.initial_load_path must hold a whole checkpoint, got {initial!r}: {torn}; "
            "name an older one"
        )
    _check_load(config, Path(initial), world_size, None, checkpoint.initial_load_model_only)


def _check_own_steps(config: JobConfig, world_size: int, steps: list[int]) -> None:
    """Check the newest of this run's checkpoints whose checksums match.

    Checkpoints with wrong checksums are skipped, as they are when loading.
    """
    for step in reversed(steps):
        try:
            return check_own_step(config, world_size, step)
        except ValueError:
            if step == steps[0] or checksum_fault(_own_path(config, step)) is None:
                raise


def check_own_step(config: JobConfig, world_size: int, step: int) -> None:
    """Check that the run can resume from its own whole checkpoint of `step`.

    Raises:
        ValueError: it cannot. The message is one line with the reason.
    """
    # Only the model is loaded from a seed checkpoint, which is step 0.
    _check_load(config, _own_path(config, step), world_size, step or None, model_only=not step)


def _own_path(config: JobConfig, step: int) -> Path:
    return Path(config.job.dump_folder) / config.checkpoint.folder / f"step-{step}"


def _check_not_superseded(config: JobConfig) -> None:
    """Reject a run without checkpoints in the dump folder of a run with checkpoints.

    The new run would start at step 0, and its metrics would replace those of the saved run.
    """
    dump_folder = Path(config.job.dump_folder)
    if not (dump_folder / METRICS).is_file():
        return
    for folder in sorted(dump_folder.iterdir()):
        if folder.is_dir() and (steps := checkpoint_faults(folder)):
            raise ValueError(
                f"checkpoint.enable must be true in the folder of a run that was saved, got false "
                f"for {str(dump_folder)!r} with {folder.name}/step-{max(steps)}, whose metrics "
                "would be replaced; set it to true to resume, or name another job.dump_folder"
            )


def _check_not_lost(config: JobConfig, folder: Path) -> None:
    """Raise ValueError if checkpoints are missing that the run must have saved.

    Metrics of steps after the first save show that checkpoints existed.
    """
    checkpoint, dump_folder = config.checkpoint, Path(config.job.dump_folder)
    if not (dump_folder / METRICS).exists():
        return
    steps = [line["step"] for line in read_metrics(dump_folder, LOSS)]
    saved = [checkpoint.interval]
    saved += [1] * checkpoint.enable_first_step_checkpoint
    saved += [config.lighthouse.stage1_steps] * (config.lighthouse.stage1_steps > 0)
    if steps and steps[-1] > min(saved):
        raise ValueError(
            f"checkpoint.folder must exist if a run has saved checkpoints, got no {str(folder)!r} "
            f"with {METRICS} up to step {steps[-1]}; put it back, name another job.dump_folder, or "
            f"move {METRICS} away to start from step 0"
        )


def _check_space(config: JobConfig, folder: Path, num_whole: int) -> None:
    """Check that the disk has space for all checkpoints that the run keeps at one time.

    Args:
        num_whole: number of whole checkpoints in `folder`.
    """
    checkpoint, training = config.checkpoint, config.training
    with torch.device("meta"):
        model = Transformer(model_args(config))
    # Each parameter has two optimizer moments.
    elements = 3 * sum(parameter.numel() for parameter in model.parameters())
    size = elements * TORCH_DTYPE_MAP[training.dtype].itemsize
    has_switch = 0 < config.lighthouse.stage1_steps < training.steps
    saves = -(-training.steps // checkpoint.interval) + has_switch
    if checkpoint.keep_latest_k:
        # An old checkpoint is purged only after the new one is complete.
        saves = min(saves, checkpoint.keep_latest_k + 1 + has_switch)
    needed = max(1, saves - num_whole) * size
    there = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise ValueError(
            f"job.dump_folder must have room for {needed / size:.0f} more checkpoints of "
            f"{size / 1e9:,.2f} GB, got {free / 1e9:,.2f} GB free in {there}; free some, lower "
            "checkpoint.keep_latest_k, or name a folder elsewhere"
        )


def _check_load(
    config: JobConfig, path: Path, world_size: int, step: int | None, model_only: bool
) -> None:
    """Check that a run with `world_size` processes can load the whole checkpoint `path`.

    Args:
        step: step of the checkpoint if this run saved it. None for a checkpoint of another run.
        model_only: whether only the parameters are loaded.
    """
    values = check_safe(path)
    found = values.get(STEP)
    if step is not None and is_a(found, int) and found != step:
        raise ValueError(
            f"the checkpoint {str(path)!r} must be of the step in its name, got one of step "
            f"{found}; rename it to step-{found}, or move it away"
        )
    if not model_only and STEP not in values:
        raise ValueError(
            f"the checkpoint {str(path)!r} must hold the training state to resume from it, got "
            "only the model; move it away to use an older one, or start another job.dump_folder "
            "from it with checkpoint.initial_load_path and initial_load_model_only"
        )
    parallelism = config.parallelism
    model_parallel = parallelism.context_parallel_degree * parallelism.tensor_parallel_degree
    degree = world_size // model_parallel
    check_checkpoint(path, config, degree, step, model_only)
    if not model_only and "dataloader" not in config.checkpoint.exclude_from_loading:
        _check_data_position(config, path, values, degree, model_parallel)


def _check_data_position(
    config: JobConfig, path: Path, values: dict[str, Any], degree: int, model_parallel: int
) -> None:
    """Check that the run can resume at the data position in the `values` of the checkpoint `path`.

    For tokenized data, all ranks share one position, which fits any number of ranks. For other
    data, each data-parallel rank has its own position, so the number of ranks must be equal.
    """
    training = config.training
    saved = sum(name.startswith("dataloader.dp_rank_") for name in values)
    is_shared, is_tokenized = "dataloader.windows" in values, training.dataset == "tokenized"
    if (saved and is_tokenized) or (is_shared and not is_tokenized):
        rule = "a corpus of documents" if is_tokenized else "'tokenized'"
        raise ValueError(
            f"training.dataset must be {rule} to resume at the data position of {path}, got "
            f"{training.dataset!r}; set it back, or {RESTART_DATA}"
        )
    accepts_changes = ACCEPT_FILES in config.checkpoint.accept_changes
    if is_shared:
        dataset = TokenizedDataset(
            training.dataset_path, training.seq_len, accepts_changes=accepts_changes
        )
        dataset.load_state_dict(
            {name.removeprefix("dataloader."): value for name, value in values.items()}
        )
        return
    if saved not in (0, degree):
        raise ValueError(
            f"the data-parallel degree must be that of {path}, {saved}, to resume at its data "
            f"position, got {degree}: {degree * model_parallel} processes over context times "
            f"tensor parallel {model_parallel}; start {saved * model_parallel} processes or change "
            f"those degrees, or {RESTART_DATA}"
        )
    # A dataset on the hub is not queried before the run starts.
    is_here = DATASETS[training.dataset].reader != "hub"
    if is_here and (state := documents_state(values.get("dataloader.dp_rank_0"))):
        documents = open_documents(
            training.dataset, training.dataset_path, "train", 0, 1, training.text_field
        )
        documents.check_position(state, accepts_changes)


def documents_state(state: Any) -> dict[str, Any] | None:
    """The state that `packing.py` saved, in the state of a data loader. None if it has none."""
    # Its depth depends on the number of workers. A file from outside can hold itself.
    waiting, seen = [state], set()
    while waiting:
        state = waiting.pop()
        if isinstance(state, dict) and id(state) not in seen:
            if {"corpus", "documents"} <= state.keys():
                return state
            seen.add(id(state))
            waiting += state.values()
    return None
