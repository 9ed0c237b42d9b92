"""Convert the configuration and weights of Llama 3 to and from Hugging Face format.

    config.json           sizes and RoPE, for `transformers.LlamaConfig`
    *.safetensors         weights, in one file or several

torchtitan and transformers compute the same function up to rounding. Parameter names differ, and so
does the row order of the q and k projections: torchtitan rotates neighbouring elements of a head,
and transformers rotates elements half a head apart. `Llama3Adapter` converts both. torchtitan
scales the RoPE frequencies in every model as Llama 3.1 does. `rope_scaling` records this.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.tensor import DTensor, Replicate
from torchtitan.experiments.lighthouse.checkpoint.files import INDEX
from torchtitan.experiments.lighthouse.flavors import sizes_of, with_sizes
from torchtitan.experiments.lighthouse.runtime.read_files import (
    check_regular,
    is_a,
    read_json,
    reason_of,
)
from torchtitan.models.llama3 import Transformer, TransformerModelArgs
from torchtitan.models.llama3.model.state_dict_adapter import Llama3StateDictAdapter

CONFIG = "config.json"

_FIXED = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
"""Fields with one allowed value. It is also the default if the field is missing."""


class Llama3Adapter(Llama3StateDictAdapter):
    """torchtitan's conversion of names and rows, corrected for sharded weights.

    DTensor cannot permute the rows of its shards if the ranks do not divide the heads. It raises an
    error. With torch 2.13 and one key/value head on two ranks, it silently gives the wrong order.
    This class gathers each weight, permutes it, and shards it again.
    """

    def __init__(self, model_args: TransformerModelArgs, hf_assets_path: str | None):
        # torchtitan warns about a folder without an index of weights, because it saves a model
        # with the same split into files. The folder of a tokenizer has no index.
        has_index = hf_assets_path is not None and (Path(hf_assets_path) / INDEX).is_file()
        super().__init__(model_args, hf_assets_path if has_index else None)
        self.hf_assets_path = hf_assets_path

    def _permute(self, w, *args):
        return _permute_whole(super()._permute, w, *args)

    def _reverse_permute(self, w, *args):
        return _permute_whole(super()._reverse_permute, w, *args)


def _permute_whole(permute: Callable, w: torch.Tensor, *args) -> torch.Tensor:
    if not isinstance(w, DTensor):
        return permute(w, *args)
    whole = permute(w.full_tensor(), *args)
    replicated = DTensor.from_local(
        whole, w.device_mesh, [Replicate()] * w.device_mesh.ndim, run_check=False
    )
    return replicated.redistribute(placements=w.placements)


def to_config(args: TransformerModelArgs) -> dict[str, Any]:
    """The fields of `config.json` that define what the model computes.

    `max_position_embeddings` is `args.max_seq_len`.
    """
    scaling = args.rope_scaling_args
    return {
        **_FIXED,
        "hidden_size": args.dim,
        "intermediate_size": sizes_of(args)["ffn_dim"],
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_kv_heads or args.n_heads,
        "head_dim": args.dim // args.n_heads,
        "vocab_size": args.vocab_size,
        "max_position_embeddings": args.max_seq_len,
        "rms_norm_eps": args.norm_eps,
        "rope_theta": float(args.rope_theta),
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": float(scaling.scaling_factor),
            "low_freq_factor": float(scaling.low_freq_factor),
            "high_freq_factor": float(scaling.high_freq_factor),
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        },
    }


def from_config(folder: str | Path) -> TransformerModelArgs:
    """The model arguments that the `config.json` in `folder` describes.

    Raises:
        ValueError: the file is missing, or torchtitan's Llama 3 cannot represent the model.
    """
    config = read_config(folder)
    rope = config["rope_scaling"]
    sizes = {
        "dim": config["hidden_size"],
        "n_layers": config["num_hidden_layers"],
        "n_heads": config["num_attention_heads"],
        "n_kv_heads": config["num_key_value_heads"],
        "ffn_dim": config["intermediate_size"],
        "vocab_size": config["vocab_size"],
        "norm_eps": config["rms_norm_eps"],
        "rope_theta": config["rope_theta"],
        "rope_scaling_factor": rope["factor"],
        "rope_low_freq_factor": rope["low_freq_factor"],
        "rope_high_freq_factor": rope["high_freq_factor"],
        "rope_original_seq_len": rope["original_max_position_embeddings"],
    }
    return with_sizes(TransformerModelArgs(max_seq_len=config["max_position_embeddings"]), sizes)


def read_config(folder: str | Path) -> dict[str, Any]:
    """Read the fields of `to_config` from the `config.json` in `folder`.

    The RoPE fields of both transformers 4 and 5 are accepted. Without scaling, the factor is 1.

    Raises:
        ValueError: the file is missing, or torchtitan's Llama 3 cannot represent the model.
    """
    path = Path(folder) / CONFIG
    try:
        config = read_json(path)
    except ValueError as error:
        raise ValueError(
            f"{str(path)!r} must be the configuration of a model ({error}); name a folder "
            "in the format of Hugging Face"
        ) from None
    for name, value in _FIXED.items():
        if config.get(name, value) != value:
            raise ValueError(
                f"{path}: {name} must be {value!r} for Llama 3, got {config[name]!r}; use another "
                "model"
            )
    known = to_config(TransformerModelArgs())
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{path}: rope_parameters must be an object, got {rope!r}; correct it")
    n_heads = config.get("num_attention_heads")
    for name in ("num_attention_heads", "hidden_size"):
        _check_kind(path, name, config.get(name), known[name])
    # Defaults of transformers for fields that are missing in older files.
    defaults = {
        **_FIXED,
        "num_key_value_heads": n_heads,
        "head_dim": (config.get("hidden_size") or 0) // (n_heads or 1),
        "rms_norm_eps": 1e-6,
        "rope_theta": rope.get("rope_theta", 10000.0),
    }
    result = {}
    for name in known:
        if name == "rope_scaling":
            continue
        value = config.get(name)
        result[name] = defaults.get(name) if value is None else value
        if result[name] is None:
            raise ValueError(f"{path}: {name} must be there, got none; complete the file")
        _check_kind(path, name, result[name], known[name])
    if result["head_dim"] * result["num_attention_heads"] != result["hidden_size"]:
        raise ValueError(
            f"{path}: head_dim must be hidden_size/num_attention_heads, got {result['head_dim']}; "
            "use another model"
        )
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        raise ValueError(
            f"{path}: rope_type must be llama3 or default, got {rope_type!r}; use another model"
        )
    unscaled = {**known["rope_scaling"], "factor": 1.0}
    given = {name: rope[name] for name in unscaled if name in rope} if rope_type == "llama3" else {}
    result["rope_scaling"] = {**unscaled, **given, "rope_type": "llama3"}
    for name, value in result["rope_scaling"].items():
        _check_kind(path, name, value, unscaled[name])
    return result


def _check_kind(path: Path, name: str, value: Any, like: Any) -> None:
    """Raise ValueError unless the value is None or has the type of `like`.

    Numbers must be positive.
    """
    is_number = is_a(like, float)
    is_right = is_a(value, type(like)) and (not is_number or 0 < value < 2**53)
    if value is not None and not is_right:
        kind = f"a positive {type(like).__name__}" if is_number else f"a {type(like).__name__}"
        raise ValueError(f"{path}: {name} must be {kind}, got {repr(value)[:60]}; correct it")


def check_flavor(folder: str | Path, args: TransformerModelArgs, flavor: str) -> None:
    """Check that training of a model with `args` can start from the weights in `folder`.

    Raises:
        ValueError: the model differs or cannot be read.
    """
    check_installed()
    got, expected = read_config(folder), to_config(args)
    if got["rope_scaling"]["factor"] == expected["rope_scaling"]["factor"] == 1:
        # With a factor of 1 the other scaling fields have no effect.
        got["rope_scaling"] = expected["rope_scaling"]
    # The model may be trained on longer sequences than before.
    got["max_position_embeddings"] = expected["max_position_embeddings"]
    for name in expected:
        if got[name] != expected[name]:
            raise ValueError(
                f"checkpoint.initial_load_path must hold the model {flavor}, with "
                f"{name} {expected[name]}, got {str(folder)!r} with {got[name]}; set "
                "model.hf_config to that folder, and its sizes are used"
            )
    check_weights("checkpoint.initial_load_path", folder, args)


def check_weights(field: str, folder: str | Path, args: TransformerModelArgs) -> None:
    """Check that the weight files in `folder` are complete and match the model `args`.

    Raises:
        ValueError: a file is missing or cannot be read, or a weight has another shape.
    """
    from safetensors import safe_open

    files, shapes = sorted(Path(folder).glob("*.safetensors")), {}
    if not files:
        raise ValueError(
            f"{field} must hold weights as *.safetensors, got {str(folder)!r} "
            "without; convert or download them"
        )
    for file in files:
        try:
            check_regular(file)
            with safe_open(str(file), framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    shapes[name] = torch.Size(opened.get_slice(name).get_shape())
        except Exception as error:
            # The error of the safetensors package derives from Exception alone.
            raise ValueError(
                f"{field} must hold readable weights, got {str(file)!r} ({reason_of(error)}); "
                "download it again"
            ) from None
    with torch.device("meta"):
        model = Transformer(args)
    expected = Llama3Adapter(args, None).to_hf(dict(model.named_parameters()))
    for name, parameter in expected.items():
        if shapes.get(name) != parameter.shape:
            found = "none" if name not in shapes else list(shapes[name])
            raise ValueError(
                f"{field} must hold {name} of shape {list(parameter.shape)}, got {found} in "
                f"{str(folder)!r}; download it again"
            )


def check_installed() -> None:
    """Raise ValueError unless the package safetensors is installed."""
    if importlib.util.find_spec("safetensors") is None:
        raise ValueError(
            "the format of Hugging Face needs the package safetensors, which is not installed; "
            "pip install safetensors"
        )


def load_weights(model: Transformer, folder: str | Path) -> None:
    """Load the weights in `folder` into `model`, converted to the dtype of its parameters."""
    adapter = Llama3Adapter(model.model_args, None)
    state_dict = adapter.to_hf(model.state_dict())
    dcp.load(state_dict, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    model.load_state_dict(adapter.from_hf(state_dict))
