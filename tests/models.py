"""Small models with random weights, saved as a run saves them."""

import dataclasses
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torchtitan.experiments.lighthouse.config.job_config import SAVED_CONFIG
from torchtitan.experiments.lighthouse.data.byte_tokenizer import BYTE_TOKENIZER_PATH
from torchtitan.experiments.lighthouse.flavors import FLAVORS
from torchtitan.models.llama3 import Transformer, TransformerModelArgs

GQA = TransformerModelArgs(
    dim=96,
    n_layers=3,
    n_heads=6,
    n_kv_heads=2,
    vocab_size=320,
    multiple_of=40,
    ffn_dim_multiplier=1.3,
    norm_eps=1e-6,
    rope_theta=20000,
)
"""A model with two key/value heads for six query heads. No size has its default value."""


def random_model(args: TransformerModelArgs, max_seq_len: int, seed: int = 0) -> Transformer:
    """A model whose attention is far from uniform, so that wrong positions or heads are noticed."""
    torch.manual_seed(seed)
    model = Transformer(dataclasses.replace(args, max_seq_len=max_seq_len))
    with torch.no_grad():
        model.init_weights()
        for block in model.layers.values():
            for linear in (block.attention.wq, block.attention.wk):
                linear.weight *= 10
            for norm in (block.attention_norm, block.ffn_norm):
                norm.weight.uniform_(0.5, 1.5)
    return model.eval().requires_grad_(False)


def save(model: Transformer, dump_folder: Path, flavor: str | None) -> Path:
    """Write a checkpoint of `model`, with the configuration of its run if there is a flavor.

    Returns:
        The folder of the checkpoint.
    """
    checkpoint = dump_folder / "checkpoint" / "step-1"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save(model.state_dict(), checkpoint_id=checkpoint, no_dist=True)
    if flavor is not None:
        assert FLAVORS[flavor].dim == model.model_args.dim
        config = {
            "model": {"flavor": flavor, "hf_assets_path": BYTE_TOKENIZER_PATH},
            "training": {"seq_len": model.model_args.max_seq_len},
        }
        (dump_folder / SAVED_CONFIG).write_text(json.dumps(config))
    return checkpoint


def last_json(monkeypatch, capsys, main: Callable[[], None], *args) -> dict:
    """Call the `main` of a command with these arguments. Returns the JSON that it prints last."""
    monkeypatch.setattr(sys, "argv", ["lighthouse", *map(str, args)])
    main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])
