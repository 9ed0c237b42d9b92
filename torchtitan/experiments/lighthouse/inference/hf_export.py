"""A trained model as a folder that `transformers.LlamaForCausalLM.from_pretrained` loads.

    config.json, generation_config.json     what the model is (`hf_llama.py`)
    model.safetensors                       or several files of up to 5 GB and their index
    tokenizer.json, tokenizer_config.json   and what else belongs to the tokenizer

`check_export` loads such a folder with transformers and compares its logits with ours, both in
fp32 on the weights as they were written, and the tokens of both tokenizers.
"""

import argparse
import inspect
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.experiments.lighthouse.checkpoint import hf_llama
from torchtitan.experiments.lighthouse.data.bpe_tokenizer import PAD_TOKEN
from torchtitan.experiments.lighthouse.inference.load_model import ModelSource
from torchtitan.experiments.lighthouse.runtime.read_files import read_json
from torchtitan.models.llama3 import Transformer
from torchtitan.tools.logging import logger

TOLERANCE = 1e-4
"""Largest difference of two logits in fp32 that rounding explains."""

NUM_TOKENS = 1024
"""Tokens that the logits are compared on."""

MAX_FILE_SIZE = "5GB"
"""Of a file of weights, in units of 1e9 bytes: what hubs and file systems take without trouble."""

_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja"),
)


_PAD_TOKENS = (PAD_TOKEN, "<|finetune_right_pad_id|>", "<pad>", "[PAD]")
"""Names of tokens that pad, in tokenizers of Llamas and of others."""


def export(
    trained: ModelSource, folder: str | Path, dtype: str, max_file_size: str = MAX_FILE_SIZE
) -> None:
    """Write `trained` to `folder`.

    Args:
        folder: a new or empty folder.
        dtype: of the weights, float32 or bfloat16.
        max_file_size: of a file of weights.

    Raises:
        ValueError: `folder` holds something, or a package is missing.
    """
    hf_llama.check_installed()
    # Only here: it comes with `datasets`, and takes a while to import.
    from huggingface_hub import save_torch_state_dict

    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"--output must be a new or an empty folder, got {str(folder)!r}, which holds "
            "something; name another one or remove it"
        )
    if trained.stage == 1:
        logger.warning(
            f"{trained.folder} was saved in stage 1: made dense, such a model has a clearly higher "
            "loss; export a checkpoint of stage 2"
        )
    model = trained.load(dtype=TORCH_DTYPE_MAP[dtype])
    adapter = hf_llama.Llama3Adapter(model.model_args, None)
    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(adapter.to_hf(model.state_dict()), folder, max_shard_size=max_file_size)
    tokenizer = trained.tokenizer()
    special_ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    config = {
        "architectures": ["LlamaForCausalLM"],
        **hf_llama.to_config(model.model_args),
        # Left out they would be 1 and 2.
        **special_ids,
        "torch_dtype": dtype,
    }
    _write(folder / hf_llama.CONFIG, config)
    known_ids = {name: value for name, value in special_ids.items() if value is not None}
    _write(folder / "generation_config.json", known_ids)
    _write_tokenizer(trained, folder)


def _write_tokenizer(trained: ModelSource, folder: Path) -> None:
    """Copy the tokenizer, and complete what transformers needs: its class and a pad token."""
    for name in _TOKENIZER_FILES:
        if (Path(trained.tokenizer_path) / name).is_file():
            shutil.copyfile(Path(trained.tokenizer_path) / name, folder / name)
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    # transformers would take one that goes by the kind of model, and wants other files.
    completed = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    if completed.get("pad_token") is None:
        completed["pad_token"] = _pad_token(folder / "tokenizer.json", trained.args.vocab_size)
        if completed["pad_token"] is None:
            # No room for a token of its own. A padded position is masked, whatever stands there.
            completed["pad_token"] = config.get("eos_token")
    if completed != config:
        _write(path, completed)


def _pad_token(path: Path, vocab_size: int) -> str | None:
    """A token that pads: one of the tokenizer's own, or one added to its file where there is room.

    Args:
        path: of `tokenizer.json`.
        vocab_size: of the model; ids must be less.
    """
    tokenizer = Tokenizer.from_file(str(path))
    vocab = tokenizer.get_vocab()
    for token in _PAD_TOKENS:
        if token in vocab:
            return token
    if max(vocab.values()) + 1 != len(vocab) or len(vocab) >= vocab_size:
        return None
    tokenizer.add_special_tokens([AddedToken(PAD_TOKEN, special=True, normalized=False)])
    tokenizer.save(str(path))
    return PAD_TOKEN


@dataclass(frozen=True)
class Comparison:
    """How a folder, as transformers loads it, differs from our model."""

    num_tokens: int
    logit_difference: float
    """The largest of all tokens of the vocabulary at all positions, in fp32."""

    logit_magnitude: float
    """The largest logit of ours, without its sign."""

    same_tokens: bool
    """Whether both tokenizers make the same of the text."""

    @property
    def is_equal(self) -> bool:
        return self.same_tokens and self.logit_difference < TOLERANCE


def check_export(trained: ModelSource, folder: str | Path) -> Comparison:
    """Compare the model in `folder`, as transformers loads it, with `trained`.

    Both compute in fp32 with the weights rounded as they were written. The text is the source code
    of a module of Python's standard library.

    Raises:
        ImportError: transformers is not installed.
    """
    from transformers import AutoTokenizer, LlamaForCausalLM

    text = inspect.getsource(argparse)
    # Without what a tokenizer adds in front, which is up to the caller in both.
    tokens = trained.tokenizer().tokenizer.encode(text, add_special_tokens=False).ids
    their_tokens = AutoTokenizer.from_pretrained(folder).encode(text, add_special_tokens=False)
    length = min(NUM_TOKENS, trained.args.max_seq_len, len(tokens))
    inputs = torch.tensor([tokens[:length]])
    with torch.inference_mode():
        theirs = LlamaForCausalLM.from_pretrained(folder).float().eval()
        # One model in memory at a time.
        their_logits = theirs(inputs).logits
        dtype = _dtype_of(folder)
        del theirs
        ours = _in_fp32(trained.load(dtype=dtype))
        our_logits = ours(inputs)
    return Comparison(
        num_tokens=length,
        logit_difference=(our_logits - their_logits).abs().max().item(),
        logit_magnitude=our_logits.abs().max().item(),
        same_tokens=tokens == their_tokens,
    )


def _dtype_of(folder: str | Path) -> torch.dtype:
    config = read_json(Path(folder) / hf_llama.CONFIG)
    return TORCH_DTYPE_MAP[config["torch_dtype"]]


def _in_fp32(model: Transformer) -> Transformer:
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    return model


def _write(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
