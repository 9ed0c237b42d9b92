"""Export a trained model to a folder for `transformers.LlamaForCausalLM.from_pretrained`.

    config.json, generation_config.json     description of the model (`hf_llama.py`)
    model.safetensors                       weights, or several files of up to 5 GB and an index
    tokenizer.json, tokenizer_config.json   the tokenizer, with its other files

`check_export` loads such a folder with transformers. It compares the logits of both models in fp32,
with the exported weights, and the tokens of both tokenizers.
"""

import argparse
import inspect
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.experiments.lighthouse.checkpoint import hf_llama
from torchtitan.experiments.lighthouse.data.bpe_tokenizer import PAD_TOKEN
from torchtitan.experiments.lighthouse.inference.load_model import ModelSource
from torchtitan.experiments.lighthouse.runtime.atomic_json import write_json
from torchtitan.experiments.lighthouse.runtime.read_files import read_json
from torchtitan.tools.logging import logger

TOLERANCE = 1e-4
"""Largest difference of two logits in fp32 that rounding explains."""

NUM_TOKENS = 1024
"""Tokens that the logits are compared on."""

MAX_FILE_SIZE = "5GB"
"""Maximum size of a file of weights (1 GB = 1e9 bytes). Hubs and file systems accept this size."""

_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja"),
)

_PAD_TOKENS = (PAD_TOKEN, "<|finetune_right_pad_id|>", "<pad>", "[PAD]")
"""Names of pad tokens in common tokenizers."""


def export(
    trained: ModelSource, folder: str | Path, dtype: str, max_file_size: str = MAX_FILE_SIZE
) -> None:
    """Write `trained` to `folder`.

    Args:
        folder: a new or empty folder.
        dtype: dtype of the weights, float32 or bfloat16.
        max_file_size: maximum size of a file of weights.

    Raises:
        ValueError: `folder` is not empty, or a package is missing.
    """
    hf_llama.check_installed()
    # Imported here, because it comes with `datasets` and imports slowly.
    from huggingface_hub import save_torch_state_dict

    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"--output must be a new or an empty folder, got {str(folder)!r}, which is not empty; "
            "name another one or remove it"
        )
    if trained.stage == 1:
        logger.warning(
            f"{trained.folder} was saved in stage 1. Its loss with dense attention is clearly "
            "higher; export a checkpoint of stage 2"
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
        # The defaults of transformers are 1 and 2.
        **special_ids,
        "torch_dtype": dtype,
    }
    write_json(folder / hf_llama.CONFIG, config)
    known_ids = {name: value for name, value in special_ids.items() if value is not None}
    write_json(folder / "generation_config.json", known_ids)
    _write_tokenizer(trained, folder)


def _write_tokenizer(trained: ModelSource, folder: Path) -> None:
    """Copy the tokenizer. Add its class and a pad token for transformers, if they are missing."""
    for name in _TOKENIZER_FILES:
        if (Path(trained.tokenizer_path) / name).is_file():
            shutil.copyfile(Path(trained.tokenizer_path) / name, folder / name)
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    # Without a class, transformers chooses one by the type of model, which needs other files.
    completed = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    if completed.get("pad_token") is None:
        completed["pad_token"] = _pad_token(folder / "tokenizer.json", trained.args.vocab_size)
        if completed["pad_token"] is None:
            # The vocabulary has no room for a pad token. Padded positions are masked, so any token
            # will do.
            completed["pad_token"] = config.get("eos_token")
    if completed != config:
        write_json(path, completed)


def _pad_token(path: Path, vocab_size: int) -> str | None:
    """The pad token of the tokenizer. If it has none and there is room, one is added to its file.

    Args:
        path: path of `tokenizer.json`.
        vocab_size: vocabulary size of the model. Token ids must be smaller.
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
    """Differences between our model and the folder as loaded by transformers."""

    num_tokens: int
    logit_difference: float
    """Largest difference of logits over all positions and all tokens of the vocabulary, in fp32."""

    logit_magnitude: float
    """Largest absolute logit of our model."""

    same_tokens: bool
    """Whether both tokenizers encode the text to the same tokens."""

    @property
    def is_equal(self) -> bool:
        return self.same_tokens and self.logit_difference < TOLERANCE


def check_export(trained: ModelSource, folder: str | Path) -> Comparison:
    """Load the model in `folder` with transformers and compare it with `trained`.

    Both models compute in fp32 with the weights rounded to the exported dtype. The text is the
    source code of a module of Python's standard library.

    Raises:
        ImportError: transformers is not installed.
    """
    from transformers import AutoTokenizer, LlamaForCausalLM

    text = inspect.getsource(argparse)
    # Without a beginning-of-text token. Both tokenizers leave that to the caller.
    tokens = trained.tokenizer().tokenizer.encode(text, add_special_tokens=False).ids
    their_tokens = AutoTokenizer.from_pretrained(folder).encode(text, add_special_tokens=False)
    length = min(NUM_TOKENS, trained.args.max_seq_len, len(tokens))
    inputs = torch.tensor([tokens[:length]])
    with torch.inference_mode():
        theirs = LlamaForCausalLM.from_pretrained(folder).float().eval()
        # One model in memory at a time.
        their_logits = theirs(inputs).logits
        del theirs
        dtype = TORCH_DTYPE_MAP[read_json(Path(folder) / hf_llama.CONFIG)["torch_dtype"]]
        our_logits = trained.load(dtype=dtype).float()(inputs)
    return Comparison(
        num_tokens=length,
        logit_difference=(our_logits - their_logits).abs().max().item(),
        logit_magnitude=our_logits.abs().max().item(),
        same_tokens=tokens == their_tokens,
    )
