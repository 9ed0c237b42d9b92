"""Build and check the data loaders of a run, for training and for validation."""

from collections.abc import Iterator
from dataclasses import asdict

import torch
from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import JobConfig
from torchtitan.experiments.lighthouse.data.datasets import SECTIONS, check_dataset
from torchtitan.experiments.lighthouse.data.packing import PackedTextDataset
from torchtitan.experiments.lighthouse.data.readers import MAX_WORKERS
from torchtitan.experiments.lighthouse.data.retry import in_one_line
from torchtitan.experiments.lighthouse.data.source_changes import ACCEPT_FILES
from torchtitan.experiments.lighthouse.data.tokenized import TokenizedDataloader, TokenizedDataset


class TextDataloader(ParallelAwareDataloader):
    """Batches of one rank's windows. Errors of data-loading workers stay one line."""

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        return in_one_line(super().__iter__)


def check_data(job_config: JobConfig, must_exist: bool = True) -> None:
    """Check the data fields without loading the data. Validation is checked only if enabled.

    Args:
        must_exist: whether the paths must exist.

    Raises:
        ValueError: `check_dataset` fails, or the number of data-loading workers is illegal.
    """
    sections = ["training"] + ["validation"] * job_config.validation.enable
    for section in sections:
        options = getattr(job_config, section)
        check_dataset(
            options.dataset, options.dataset_path, section, must_exist, options.text_field
        )
        _check_num_workers(options.dataloader.num_workers, section, options.dataset)


def build_dataloader(
    dp_world_size: int, dp_rank: int, tokenizer: BaseTokenizer, job_config: JobConfig
) -> ParallelAwareDataloader:
    """Build the endless loader of `job_config.training`.

    Its batches are `({"input": [B, S]}, labels [B, S])` of int64, with B the local batch size. The
    seed `job_config.debug.seed` (None: 0) orders the documents, or the windows of tokenized data.

    Raises:
        ValueError: the dataset is illegal, or the number of workers is.
    """
    return _build("train", True, dp_world_size, dp_rank, tokenizer, job_config)


def build_validation_dataloader(
    dp_world_size: int, dp_rank: int, tokenizer: BaseTokenizer, job_config: JobConfig
) -> ParallelAwareDataloader:
    """Build the loader of the held-out documents, from `job_config.validation`.

    Each `iter()` gives the same batches, `({"input": [B, S]}, labels [B, S])` of int64. If
    `validation.steps` is -1, the loader passes over the split once. Otherwise it is endless and
    repeats a short text. Windows of tokenized data are always ordered by seed 0.

    Raises:
        ValueError: the dataset is illegal, or the number of workers is.
    """
    infinite = job_config.validation.steps != -1
    return _build("validation", infinite, dp_world_size, dp_rank, tokenizer, job_config)


def _build(
    split: str,
    infinite: bool,
    dp_world_size: int,
    dp_rank: int,
    tokenizer: BaseTokenizer,
    job_config: JobConfig,
) -> ParallelAwareDataloader:
    options = getattr(job_config, SECTIONS[split])
    _check_num_workers(options.dataloader.num_workers, SECTIONS[split], options.dataset)
    reading = {
        "split": split,
        "seed": job_config.debug.seed or 0,
        "infinite": infinite,
        "accepts_changes": ACCEPT_FILES in job_config.checkpoint.accept_changes,
    }
    rank = {"dp_rank": dp_rank, "dp_world_size": dp_world_size}
    loading = {**rank, "batch_size": options.local_batch_size, **asdict(options.dataloader)}
    if options.dataset == "tokenized":
        if split == "validation":
            # Losses of runs with different seeds are compared, so their held-out windows must be
            # equal.
            reading["seed"] = 0
        tokenized = TokenizedDataset(options.dataset_path, options.seq_len, **reading)
        return TokenizedDataloader(tokenized, **loading)
    dataset = PackedTextDataset(
        options.dataset,
        options.dataset_path,
        tokenizer,
        options.seq_len,
        text_field=options.text_field,
        **rank,
        **reading,
    )
    return TextDataloader(dataset, **loading)


def _check_num_workers(num_workers: int, section: str, dataset: str) -> None:
    if dataset == "tokenized":
        if not 0 <= num_workers <= MAX_WORKERS:
            raise ValueError(
                f"{section}.dataloader.num_workers must be from 0 to {MAX_WORKERS} on this "
                f"machine, got {num_workers}; use 0"
            )
    elif num_workers not in (0, 1):
        raise ValueError(
            f"{section}.dataloader.num_workers must be 0 or 1, got {num_workers}: the order of the "
            "documents and a resumed position would depend on the number of workers; set it to 1"
        )
