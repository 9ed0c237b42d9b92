"""What lies in the folder of a checkpoint, read without running anything that it holds.

A distributed checkpoint is a file of tensors and values for each rank, and `.metadata`, written
last, that says which bytes of which file are what. It is whole if the metadata can be read and
every file is there to its last byte. The metadata and all values that are no tensors are pickles,
which may name any function to be called. Here they are read as what they should be, and anything
else is refused. torchtitan then loads the same bytes without such limits: look here first,
`check_safe`.
"""

import io
import json
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

METADATA, INDEX = ".metadata", "model.safetensors.index.json"
"""What is written last: of a distributed checkpoint, and of a model in Hugging Face's format."""

_METADATA_CLASSES = "torch.distributed.checkpoint.metadata"
_NAMES = {
    _METADATA_CLASSES: (
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "TensorStorageMetadata"),
        *("BytesStorageMetadata", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("PosixPath",),
    "pathlib._local": ("PosixPath",),
}
"""All that the metadata of a checkpoint may name, by module; data types of torch, too."""


def checkpoint_faults(folder: str | Path) -> dict[int, str | None]:
    """Steps of the checkpoints in `folder`, ascending, and what is wrong with each; see `fault`."""
    faults = {}
    folder = Path(folder)
    for path in folder.iterdir() if folder.is_dir() else ():
        match = re.fullmatch(r"step-(\d+)", path.name)
        if match and path.is_dir():
            faults[int(match.group(1))] = damage_reason(path)
    return dict(sorted(faults.items()))


def checkpoint_steps(folder: str | Path) -> dict[int, bool]:
    """Steps of the checkpoints in `folder`, ascending, and whether each is whole."""
    return {step: fault is None for step, fault in checkpoint_faults(folder).items()}


def whole_steps(folder: str | Path) -> list[int]:
    """Steps of the whole checkpoints in `folder`, ascending."""
    return [step for step, fault in checkpoint_faults(folder).items() if fault is None]


def is_whole(path: str | Path) -> bool:
    """Whether the checkpoint in the folder `path` is there to its last byte."""
    return damage_reason(path) is None


def damage_reason(path: str | Path) -> str | None:
    """What the checkpoint in the folder `path` lacks, in words; None if it is whole."""
    path = Path(path)
    try:
        if (path / METADATA).is_file():
            sizes = {}
            for info in read_metadata(path).storage_data.values():
                end = info.offset + info.length
                sizes[info.relative_path] = max(end, sizes.get(info.relative_path, 0))
        elif (path / INDEX).is_file():
            sizes = dict.fromkeys(json.loads((path / INDEX).read_text())["weight_map"].values(), 1)
        else:
            return f"{METADATA}, which is written last, is missing"
    except ValueError as error:
        return f"its metadata cannot be read ({error})"
    except (OSError, KeyError, TypeError, AttributeError) as error:
        return f"its metadata cannot be read ({error!r})"
    for name, size in sorted(sizes.items()):
        if Path(name).name != name:
            return f"{name!r} does not lie in it"
        try:
            found = (path / name).stat().st_size
        except OSError:
            # Never there, or purged while it is looked at.
            return f"{name} is missing"
        if found < size:
            return f"{name} ends after {found:,} of {size:,} bytes"
    return None


def read_metadata(path: str | Path) -> Metadata:
    """The metadata of the checkpoint `path`.

    Raises:
        ValueError: they are none, or name what has no place in them.
    """
    try:
        with (Path(path) / METADATA).open("rb") as file:
            metadata = _Unpickler(file).load()
    except (EOFError, pickle.UnpicklingError, AttributeError, IndexError, TypeError) as error:
        raise ValueError(f"{METADATA}: {error!r}") from None
    except ValueError as error:
        if "too many values to unpack" in str(error):
            # A field more in the properties of a tensor.
            raise ValueError(
                f"{METADATA} was written by torch 2.15 or newer, which torch {torch.__version__} "
                "cannot read; use the torch that wrote it, or a newer one"
            ) from None
        raise
    if not isinstance(metadata, Metadata):
        raise ValueError(f"{METADATA} holds {type(metadata).__name__}")
    return metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = None
        if name in _NAMES.get(module, ()):
            found = super().find_class(module, name)
        elif module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            found = getattr(torch, name)
        elif (module, name) == ("torch", "Size"):
            found = torch.Size
        if found is None:
            raise ValueError(f"{METADATA} names {module}.{name}, which has no place there")
        return found


def check_safe(path: str | Path) -> None:
    """Check that the whole checkpoint `path` holds tensors and plain values alone.

    Raises:
        ValueError: it holds what would be called when it is loaded, or it cannot be read.
    """
    path = Path(path)
    if not (path / METADATA).is_file():
        return
    try:
        metadata = read_metadata(path)
        values = {
            name
            for name, kind in metadata.state_dict_metadata.items()
            if isinstance(kind, BytesStorageMetadata)
        }
        by_file = {}
        for index, info in metadata.storage_data.items():
            if index.fqn in values:
                by_file.setdefault(info.relative_path, []).append((info, index.fqn))
        for name, found in by_file.items():
            with (path / name).open("rb") as file:
                for info, value in sorted(found, key=lambda pair: pair[0].offset):
                    file.seek(info.offset)
                    _check_plain(file.read(info.length), value)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the checkpoint {str(path)!r} must hold tensors and plain values alone, since loading "
            f"anything else runs code, got {error}; do not use it, or load it elsewhere and save "
            "it anew"
        ) from None


def _check_plain(data: bytes, name: str) -> None:
    try:
        value = torch.load(io.BytesIO(data), weights_only=True)
        if name.startswith("dataloader.") and isinstance(value, bytes):
            # A pickle in a pickle: the data position, of numbers, strings and containers.
            _Plain(io.BytesIO(value)).load()
    except Exception as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"{name}: {reason}") from None


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise ValueError(f"it names {module}.{name}")


def holds_training_state(path: str | Path) -> bool:
    """Whether training can go on from the whole checkpoint `path`; a model alone is not enough."""
    return (Path(path) / METADATA).is_file() and "train_state.step" in _keys(path)


def data_parallel_degree(path: str | Path) -> int | None:
    """Data-parallel ranks whose data position the whole checkpoint `path` holds; None if none.

    Raises:
        ValueError: its metadata cannot be read.
    """
    return sum(key.startswith("dataloader.dp_rank_") for key in _keys(path)) or None


def prepared_position(path: str | Path) -> dict[str, Any] | None:
    """Data position in prepared data, of all ranks, that the checkpoint `path` holds, or None.

    Raises:
        ValueError: its metadata cannot be read.
    """
    prefix = "dataloader."
    names = [key.removeprefix(prefix) for key in _keys(path) if key.startswith(prefix)]
    if "windows" not in names:
        return None
    state = {"dataloader": dict.fromkeys(names, "")}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(state, storage_reader=FileSystemReader(path), no_dist=True)
    return state["dataloader"]


def corpus_fingerprint(path: str | Path) -> int | None:
    """`corpora.fingerprint` of the documents that the data position in the whole, safe checkpoint
    `path` belongs to; None where it holds none of documents."""
    name = "dataloader.dp_rank_0"
    if name not in _keys(path):
        return None
    infos = read_metadata(path).storage_data
    (info,) = (info for index, info in infos.items() if index.fqn == name)
    with (Path(path) / info.relative_path).open("rb") as file:
        file.seek(info.offset)
        data = torch.load(io.BytesIO(file.read(info.length)), weights_only=True)
    # The loader's state has that of the dataset in it, at a depth that its workers decide.
    waiting = [_Plain(io.BytesIO(data)).load()]
    while waiting:
        state = waiting.pop()
        if {"corpus", "documents"} <= state.keys():
            return state["corpus"]
        waiting += [value for value in state.values() if isinstance(value, dict)]
    return None


def _keys(path: str | Path) -> list[str]:
    """What a checkpoint holds, by name: nothing where it is none."""
    return (
        list(read_metadata(path).state_dict_metadata) if (Path(path) / METADATA).is_file() else []
    )


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
        f"{state}; move the folder away to start from step 0 or from initial_load_path"
    )
