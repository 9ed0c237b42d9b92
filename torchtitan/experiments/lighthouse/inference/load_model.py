"""Load a trained model from a checkpoint of either stage, or from a Hugging Face folder.

    trained = open_trained("outputs/debug/checkpoint/step-40")
    model = trained.load(device="cuda", dtype=torch.bfloat16)      # dense, ready for inference

`trained_with.json` in a checkpoint holds the sizes of the model. The configuration saved in the
dump folder of the run names the sequence length and the tokenizer. Without `trained_with.json`, the
flavor is taken from that configuration or from the shapes of the parameters. Without the
configuration, the caller must name the sequence length and the tokenizer.
"""

import argparse
import dataclasses
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.experiments.lighthouse.apply_lighthouse import use_fused_attention
from torchtitan.experiments.lighthouse.checkpoint import hf_llama
from torchtitan.experiments.lighthouse.checkpoint.checksums import checksum_fault
from torchtitan.experiments.lighthouse.checkpoint.compatibility import (
    read_record,
    shape_difference,
)
from torchtitan.experiments.lighthouse.checkpoint.files import (
    METADATA,
    check_safe,
    damage_reason,
    whole_steps,
)
from torchtitan.experiments.lighthouse.config.job_config import (
    POOL_ROTARY,
    POOL_ROTARY_BEFORE,
    SAVED_CONFIG,
    Lighthouse,
)
from torchtitan.experiments.lighthouse.config.rule_helpers import require
from torchtitan.experiments.lighthouse.data.readers import TEXT_COLUMN
from torchtitan.experiments.lighthouse.flavors import FLAVORS, with_sizes
from torchtitan.experiments.lighthouse.runtime.command_line import open_tokenizer
from torchtitan.experiments.lighthouse.runtime.read_files import is_a, read_json
from torchtitan.models.llama3 import Transformer, TransformerModelArgs

from lighthouse import LighthouseConfig

LIGHTHOUSE_FIELDS = [
    *(f.name for f in dataclasses.fields(LighthouseConfig)),
    *("pool_rotary", "full_attn_layers"),
]
"""Fields that `given_fields` accepts."""


class HeldOutText(NamedTuple):
    """The corpus whose held-out part is read. The fields are those of [validation]."""

    dataset: str
    dataset_path: str | None = None
    text_field: str = TEXT_COLUMN

    def __str__(self) -> str:
        return self.dataset + (f" in {self.dataset_path}" if self.dataset_path else "")


_READ_FIELDS = {
    "model": {"flavor": str, "hf_assets_path": str},
    "training": {"seq_len": int, **HeldOutText.__annotations__},
    "validation": HeldOutText.__annotations__,
    "lighthouse": {f.name: f.type for f in dataclasses.fields(Lighthouse)},
}
"""Fields of a saved configuration that this module reads, with their types."""


@dataclass(frozen=True)
class ModelSource:
    """The folder and the description of a model."""

    folder: Path
    args: TransformerModelArgs
    """Sizes of the model. `max_seq_len` is the sequence length of training."""

    tokenizer_path: str
    lighthouse: Lighthouse
    """Fields of stage 1. Unknown fields have their defaults."""

    flavor: str | None = None
    """`model.flavor` of the run. None for a folder in Hugging Face's format."""

    stage: int | None = None
    """The last stage that the model was trained in, 1 or 2. None if unknown."""

    held_out: HeldOutText | None = None
    """The validation data of the run. None if unknown."""

    def tokenizer(self) -> HuggingFaceTokenizer:
        return HuggingFaceTokenizer(self.tokenizer_path)

    def load(
        self,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        max_seq_len: int | None = None,
    ) -> Transformer:
        """Load the model for inference, with fused dense attention.

        Args:
            dtype: dtype of parameters and activations. RoPE stays in fp32.
            max_seq_len: the longest sequence that the model will see, in tokens. The default is
                that of training.
        """
        max_seq_len = max_seq_len or self.args.max_seq_len
        with torch.device("meta"):
            model = Transformer(dataclasses.replace(self.args, max_seq_len=max_seq_len))
        model.to_empty(device="cpu")
        with warnings.catch_warnings():
            # The warning is expected with a single process.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            if self.flavor is None:
                hf_llama.load_weights(model, self.folder)
            else:
                dcp.load(model.state_dict(), checkpoint_id=self.folder, no_dist=True)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(device, dtype)
        # `model.to(dtype)` would make these complex numbers real.
        model.freqs_cis = model._precompute_freqs_cis().to(device)
        use_fused_attention(model, dtype, max_seq_len, prefer="cudnn")
        return model.eval().requires_grad_(False)


def open_trained(
    folder: str | Path,
    flavor: str | None = None,
    max_seq_len: int | None = None,
    tokenizer_path: str | None = None,
) -> ModelSource:
    """Describe the model in `folder` without loading it.

    Args:
        folder: `.../checkpoint/step-N` of a run, or a folder in Hugging Face's format.
        flavor: `model.flavor` of the run.
        max_seq_len: `training.seq_len` of the run, in tokens.
        tokenizer_path: a folder with a `tokenizer.json`, `model.hf_assets_path` of the run.

    Raises:
        ValueError: there is no model in `folder`, it has another flavor, or an argument is
            missing that the folder does not determine.
    """
    folder = Path(folder)
    if (folder / METADATA).is_file():
        if damage := damage_reason(folder) or checksum_fault(folder):
            raise ValueError(
                f"a model must be a whole checkpoint, got {str(folder)!r}: {damage}; name another"
            )
        check_safe(folder)
        settings = _saved_config(folder)
        model = settings.get("model", {})
        flavor, args = _model_of(folder, flavor, model)
        if max_seq_len is None:
            max_seq_len = settings.get("training", {}).get("seq_len")
        tokenizer_path = tokenizer_path or model.get("hf_assets_path")
    elif (folder / hf_llama.CONFIG).is_file() and not _steps_in(folder / "checkpoint"):
        settings = {}
        if flavor is not None:
            raise ValueError(
                f"--flavor must not be given for {str(folder)!r}, whose {hf_llama.CONFIG} "
                f"describes the model, got {flavor!r}; remove it"
            )
        hf_llama.check_installed()
        args = hf_llama.from_config(folder)
        hf_llama.check_weights("a model", folder, args)
        max_seq_len = args.max_seq_len if max_seq_len is None else max_seq_len
        tokenizer_path = tokenizer_path or str(folder)
    else:
        places = (folder, folder / "checkpoint", folder.parent)
        steps = next((found for place in places if (found := _steps_in(place))), ())
        remedy = f"name {' or '.join(map(str, steps))}" if steps else "correct the path"
        raise ValueError(
            "a model must be a whole checkpoint, .../checkpoint/step-N, or a folder in the format "
            f"of Hugging Face, got {str(folder)!r}, which is neither; {remedy}"
        )
    for name, value, field in (
        ("--max-seq-len", max_seq_len, "training.seq_len"),
        ("--tokenizer", tokenizer_path, "model.hf_assets_path"),
    ):
        if value is None:
            raise ValueError(
                f"{name} must be given for {str(folder)!r}, whose run kept no {SAVED_CONFIG}, got "
                f"none; add {name} with {field} of the run"
            )
    require(max_seq_len >= 1, "--max-seq-len", "at least 1", max_seq_len, "use 1 or more")
    open_tokenizer("--tokenizer", tokenizer_path)
    saved = {"pool_rotary": POOL_ROTARY_BEFORE, **settings.get("lighthouse", {})}
    known = dataclasses.fields(Lighthouse)
    return ModelSource(
        folder=folder,
        args=dataclasses.replace(args, max_seq_len=max_seq_len),
        tokenizer_path=tokenizer_path,
        lighthouse=Lighthouse(**{f.name: saved[f.name] for f in known if f.name in saved}),
        flavor=flavor,
        stage=_stage_of(folder, settings),
        held_out=_held_out_text(settings),
    )


def _steps_in(folder: Path) -> list[Path]:
    """The whole checkpoints in a folder."""
    return [folder / f"step-{step}" for step in whole_steps(folder)]


def _stage_of(checkpoint: Path, settings: dict[str, Any]) -> int | None:
    match = re.fullmatch(r"step-([1-9]\d{0,17})", checkpoint.name, re.ASCII)
    stage1_steps = settings.get("lighthouse", {}).get("stage1_steps")
    if match is None or stage1_steps is None:
        return None
    return Lighthouse(stage1_steps=stage1_steps).stage_of(int(match.group(1)))


def _held_out_text(settings: dict[str, Any]) -> HeldOutText | None:
    for section in ("validation", "training"):
        found = settings.get(section, {})
        if found.get("dataset"):
            # Older runs saved no text field.
            return HeldOutText(**{k: found[k] for k in HeldOutText._fields if found.get(k)})
    return None


def output_folder(model: str | Path, name: str) -> Path:
    """Default output folder for the figures of a model.

    For `RUN/checkpoint/step-40` it is `RUN/name/step-40`. Otherwise it is `name` in the folder.
    """
    folder = Path(model).absolute()
    if (folder / METADATA).is_file():
        return folder.parents[1] / name / folder.name
    return folder / name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `open_trained` to a command line."""
    add = parser.add_argument
    add("--flavor", help="model.flavor of the run, if the checkpoint does not determine it")
    add("--max-seq-len", type=int, help=f"training.seq_len, if the run saved no {SAVED_CONFIG}")
    add("--tokenizer", help=f"model.hf_assets_path, if the run saved no {SAVED_CONFIG}")


def _saved_config(checkpoint: Path) -> dict[str, Any]:
    """The configuration of the run that wrote `checkpoint`. Empty if the run saved none."""
    path = checkpoint.absolute().parents[1] / SAVED_CONFIG
    if not path.is_file():
        return {}
    try:
        settings = read_json(path)
        for section, kinds in _READ_FIELDS.items():
            found = settings.setdefault(section, {})
            for name, kind in kinds.items():
                if not is_a(found, dict) or not is_a(found.get(name), kind | None):
                    raise ValueError(f"[{section}] is {repr(found)[:60]}")
    except ValueError as error:
        raise ValueError(
            f"{path} must be the configuration of the run ({error}); repair it or move it away"
        ) from None
    return settings


def _model_of(
    checkpoint: Path, flavor: str | None, saved: dict[str, Any]
) -> tuple[str, TransformerModelArgs]:
    """The flavor and the sizes of a checkpoint's model.

    Args:
        flavor: value of --flavor.
        saved: section `model` of the saved configuration. Empty if the run saved none.
    """
    if flavor is None:
        name, sizes = saved.get("flavor"), (read_record(checkpoint) or {}).get("model.flavor")
        if sizes:
            return name or "model", with_sizes(TransformerModelArgs(), sizes)
        if name in FLAVORS and any((saved.get("override") or {}).values()):
            return name, with_sizes(FLAVORS[name], saved["override"])
        flavor = name
    flavor = _flavor_of(checkpoint, flavor)
    return flavor, FLAVORS[flavor]


def _flavor_of(checkpoint: Path, flavor: str | None) -> str:
    """`flavor`, or the only flavor whose parameters have the shapes of the checkpoint."""
    rule = f"one of {', '.join(FLAVORS)}"
    require(flavor in {None, *FLAVORS}, "--flavor", rule, flavor, "choose the one of the run")
    differences = {name: shape_difference(checkpoint, args) for name, args in FLAVORS.items()}
    fitting = [name for name, difference in differences.items() if difference is None]
    remedy = f"use {' or '.join(fitting)}" if fitting else "add its flavor to FLAVORS"
    if flavor is None and len(fitting) != 1:
        raise ValueError(
            f"--flavor must be given for {str(checkpoint)!r}, whose parameters are those of "
            f"{' and '.join(fitting) or 'no flavor'}, got none; {remedy}"
        )
    if flavor is not None and flavor not in fitting:
        raise ValueError(
            f"--flavor must be that of {str(checkpoint)!r}, got {flavor!r}, whose "
            f"{differences[flavor]}; {remedy}"
        )
    return flavor or fitting[0]


def given_fields(model: ModelSource, assignments: list[str], seq_len: int) -> Lighthouse:
    """The Lighthouse fields of the run, changed by --lighthouse FIELD=VALUE.

    Args:
        seq_len: length in tokens of the sequences that the model will see.

    Raises:
        ValueError: an assignment is wrong, or the fields do not fit `seq_len`.
    """
    changes = {}
    for assignment in assignments:
        name, _, value = assignment.partition("=")
        if name not in LIGHTHOUSE_FIELDS:
            raise ValueError(
                f"--lighthouse must set one of {', '.join(LIGHTHOUSE_FIELDS)}, got {assignment!r}; "
                "write FIELD=VALUE"
            )
        current = getattr(model.lighthouse, name)
        try:
            if isinstance(current, list):
                changes[name] = [int(item) for item in value.split(",") if item]
            else:
                changes[name] = type(current)(value)
        except ValueError:
            raise ValueError(
                f"--lighthouse {name} must be like {current!r}, got {value!r}; write a number, or "
                "several with commas between"
            ) from None
    lighthouse = dataclasses.replace(model.lighthouse, **changes)
    name, rule = "--lighthouse pool_rotary", f"one of {', '.join(POOL_ROTARY)}"
    require(lighthouse.pool_rotary in POOL_ROTARY, name, rule, lighthouse.pool_rotary, "choose one")
    n_layers = model.args.n_layers
    name, rule = "--lighthouse full_attn_layers", f"from {-n_layers} to {n_layers - 1}"
    for layer in lighthouse.full_attn_layers:
        require(-n_layers <= layer < n_layers, name, rule, layer, "remove it")
    try:
        lighthouse.attention_config().check_seq_len(seq_len)
    except ValueError as error:
        raise ValueError(f"--lighthouse for {str(model.folder)!r}: {error}") from None
    return lighthouse
