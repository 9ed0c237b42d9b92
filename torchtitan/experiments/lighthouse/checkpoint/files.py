"""Inspect the folder of a checkpoint without executing code that its pickles may name.

A distributed checkpoint has one file of tensors and values per rank. `.metadata` is written last.
It maps each tensor and value to a byte range of a file. A checkpoint is whole if the metadata can
be read and no file is missing or truncated.

The metadata and all values other than tensors are pickles, which can call any function. This module
accepts only the expected types. torchtitan loads the same bytes without this restriction, so call
`check_safe` first.
"""

import io
import os
import pickle
import re
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torchtitan.experiments.lighthouse.runtime.atomic_json import write_json
from torchtitan.experiments.lighthouse.runtime.read_files import (
    PARSE_ERRORS,
    check_regular,
    is_a,
    is_file_name,
    read_bytes,
    read_json,
    reason_of,
)

METADATA, INDEX = ".metadata", "model.safetensors.index.json"
"""The files written last in a distributed checkpoint and in a model in Hugging Face format."""

DOUBTFUL = "doubtful.json"
"""File that marks a checkpoint as not safe to resume from. It holds the reason."""

STEP = "train_state.step"
"""The key of the step in a checkpoint of a run."""

_FILES = re.compile(
    r"\.metadata(\.tmp)?|__\d+_\d+\.distcp|(__\d+|metadata)_checksums\.(json|tmp)"
    r"|(trained_with|doubtful)\.(json|tmp)|.*\.safetensors|.*\.safetensors\.index\.json|sharded"
)
"""Names of the files that a run writes into a checkpoint."""

_METADATA_CLASSES = "torch.distributed.checkpoint.metadata"
_NAMES = {
    _METADATA_CLASSES: (
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata"),
        *("BytesStorageMetadata", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("PosixPath",),
    "pathlib._local": ("PosixPath",),
}
"""Names that the metadata of a checkpoint may use, by module. torch dtypes are also allowed."""


class NewerTorchError(ValueError):
    """A checkpoint is one that this torch cannot read. It is not damaged."""


def checkpoint_faults(folder: str | Path) -> dict[int, str | None]:
    """Steps of the checkpoints in `folder`, ascending, and the `damage_reason` of each.

    Raises:
        NewerTorchError: one was written by a newer torch. Nothing may be loaded or purged then.
    """
    faults = {}
    folder = Path(folder)
    for path in folder.iterdir() if folder.is_dir() else ():
        # Names with leading zeros, such as step-007, are neither written nor loaded.
        match = re.fullmatch(r"step-(0|[1-9]\d{0,17})", path.name, re.ASCII)
        if match and path.is_dir():
            faults[int(match.group(1))] = damage_reason(path)
    return dict(sorted(faults.items()))


def checkpoint_steps(folder: str | Path) -> dict[int, bool]:
    """Steps of the checkpoints in `folder`, ascending, and whether each is whole."""
    return {step: fault is None for step, fault in checkpoint_faults(folder).items()}


def whole_steps(folder: str | Path) -> list[int]:
    """Steps of the whole checkpoints in `folder`, ascending."""
    return [step for step, fault in checkpoint_faults(folder).items() if fault is None]


def damage_reason(path: str | Path) -> str | None:
    """Describe why the checkpoint in the folder `path` is not good, or return None.

    A checkpoint is good if it is whole and not marked as doubtful.

    Raises:
        NewerTorchError: it was written by a newer torch.
    """
    path = Path(path)
    if os.path.lexists(path / DOUBTFUL):
        try:
            return str(read_json(path / DOUBTFUL)["reason"])
        except (ValueError, KeyError):
            return f"{DOUBTFUL} in it cannot be read"
    try:
        if (path / METADATA).is_file():
            sizes = {}
            for info in read_metadata(path).storage_data.values():
                end = info.offset + info.length
                sizes[info.relative_path] = max(end, sizes.get(info.relative_path, 0))
        elif (path / INDEX).is_file():
            index = read_json(path / INDEX)
            if not is_a(index.get("weight_map"), dict[str, str]):
                return f"{INDEX} names no files"
            sizes = dict.fromkeys(index["weight_map"].values(), 1)
        else:
            return f"{METADATA}, which is written last, is missing"
    except NewerTorchError:
        raise
    except ValueError as error:
        return f"its metadata cannot be read ({error})"
    for name, size in sorted(sizes.items()):
        if not is_file_name(name):
            return f"{name[:80]!r} does not lie in it"
        try:
            found = check_regular(path / name).st_size
        except (OSError, ValueError):
            # The file was never written, or is being purged.
            return f"{name} is missing"
        if found < size:
            return f"{name} ends after {found:,} of {size:,} bytes"
    return None


def mark_doubtful(path: str | Path, reason: str) -> None:
    """Mark the checkpoint `path` as doubtful, so that it is no longer good."""
    write_json(Path(path) / DOUBTFUL, {"reason": reason})


def foreign_files(path: str | Path) -> list[str]:
    """Names of files in the folder of a checkpoint that no run has written."""
    return sorted(file.name for file in Path(path).iterdir() if not _FILES.fullmatch(file.name))


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint, but keep files that no run has written."""
    if path.is_symlink():
        path.unlink()
    elif not foreign_files(path):
        shutil.rmtree(path)
    else:
        for file in path.iterdir():
            if _FILES.fullmatch(file.name):
                shutil.rmtree(file) if file.is_dir() else file.unlink()


def read_metadata(path: str | Path) -> Metadata:
    """Read the metadata of the checkpoint `path`.

    Raises:
        NewerTorchError: it was written by a newer torch.
        ValueError: the file is not valid metadata, or contains names that are not allowed.
    """
    try:
        metadata = _Unpickler(io.BytesIO(read_bytes(Path(path) / METADATA, 2**31))).load()
        is_right = _is_right(metadata)
    except NewerTorchError:
        raise NewerTorchError(
            f"the checkpoint {str(path)!r} was written by torch 2.15 or newer, which torch "
            f"{torch.__version__} cannot read; use the torch that wrote it, or move it away to go "
            "on without it"
        ) from None
    except Exception as error:
        # Unpickling arbitrary bytes can raise any type of error. Attributes can be missing.
        raise ValueError(f"{METADATA}: {type(error).__name__}: {reason_of(error)}") from None
    if not is_right:
        raise ValueError(f"{METADATA} does not hold what it should")
    return metadata


def _is_right(metadata: Any) -> bool:
    """Whether the attributes have the right types. A pickle can set them to anything."""
    kinds = TensorStorageMetadata | BytesStorageMetadata
    return (
        isinstance(metadata, Metadata)
        and is_a(metadata.state_dict_metadata, dict[str, kinds])
        and is_a(metadata.storage_data, dict[MetadataIndex, _StorageInfo])
        and all(
            isinstance(index.fqn, str)
            and isinstance(info.relative_path, str)
            and all(is_a(n, int) and 0 <= n < 2**62 for n in (info.offset, info.length))
            for index, info in metadata.storage_data.items()
        )
        and all(
            isinstance(kind, BytesStorageMetadata) or isinstance(kind.size, torch.Size)
            for kind in metadata.state_dict_metadata.values()
        )
    )


class _TensorProperties(TensorProperties):
    """torch 2.15 added a sixth value. Older versions unpack exactly five."""

    def __setstate__(self, state: Any) -> None:
        try:
            super().__setstate__(state)
        except ValueError:
            if isinstance(state, tuple) and len(state) > 5:
                raise NewerTorchError from None
            raise


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == (_METADATA_CLASSES, "TensorProperties"):
            return _TensorProperties
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _NAMES.get(module, ()):
            return super().find_class(module, name)
        raise ValueError(f"{METADATA} names {module}.{name}, which has no place there")


def check_safe(path: str | Path) -> dict[str, Any]:
    """Check that the whole checkpoint `path` holds only tensors and plain values.

    Returns:
        The values other than tensors, by name. Data positions of ranks are unpickled. Empty if
        `path` is not a distributed checkpoint.

    Raises:
        ValueError: loading it would call a function, or it cannot be read.
    """
    path, values = Path(path), {}
    if not (path / METADATA).is_file():
        return values
    try:
        metadata, by_file = read_metadata(path), defaultdict(list)
        for index, info in metadata.storage_data.items():
            if isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
                by_file[info.relative_path].append((info.offset, info.length, index.fqn))
        for file_name, found in by_file.items():
            with (path / file_name).open("rb") as file:
                for offset, length, name in sorted(found):
                    file.seek(offset)
                    values[name] = _plain_value(file.read(length), name)
    except (OSError, *PARSE_ERRORS) as error:
        raise ValueError(
            f"the checkpoint {str(path)!r} must hold only tensors and plain values, because "
            f"loading anything else runs code, got {error}; do not use it, or load it elsewhere "
            "and save it again"
        ) from None
    return values


def _plain_value(data: bytes, name: str) -> Any:
    try:
        value = torch.load(io.BytesIO(data), weights_only=True)
        if name.startswith("dataloader.") and isinstance(value, bytes):
            # The data position is a pickle inside a pickle. It may hold numbers, strings and
            # containers.
            value = _Plain(io.BytesIO(value)).load()
        return value
    except Exception as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"{name}: {reason}") from None


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise ValueError(f"it names {module}.{name}")


def check_folder(folder: str | Path) -> None:
    """Raise ValueError if `folder` exists but holds no whole checkpoint."""
    if not Path(folder).exists():
        return
    faults = checkpoint_faults(folder)
    if None in faults.values():
        return
    found = ", ".join(f"step-{step}: {fault}" for step, fault in faults.items())
    state = f"only torn checkpoints ({found})" if found else "no checkpoint"
    raise ValueError(
        f"checkpoint.folder must hold a whole checkpoint if it exists, got {str(folder)!r} with "
        f"{state}; move the folder and metrics.jsonl away to start from step 0 or from "
        "initial_load_path"
    )
