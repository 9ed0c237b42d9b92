"""Models in Hugging Face format: conversion of their configuration and weights, and training."""

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from models import GQA, random_model, save
from ranks import launch
from refusals import refused
from runs import STEPS, command_line, train, trainer_of
from safetensors.torch import save_file
from torchtitan.experiments.lighthouse.checkpoint import hf_llama
from torchtitan.experiments.lighthouse.config.load import load_config
from torchtitan.experiments.lighthouse.flavors import FLAVORS
from torchtitan.experiments.lighthouse.inference.hf_export import export
from torchtitan.experiments.lighthouse.inference.load_model import open_trained
from torchtitan.experiments.lighthouse.preflight import check_config
from torchtitan.models.llama3 import Transformer
from torchtitan.models.llama3.model.args import RoPEScalingArgs

SEQ_LEN = 768
ONE_HEAD = dataclasses.replace(GQA, dim=64, n_heads=2, n_kv_heads=1)


@pytest.fixture(scope="module", autouse=True)
def flavors():
    with pytest.MonkeyPatch.context() as patch:
        register(patch)
        yield


def register(patch) -> None:
    patch.setitem(FLAVORS, "gqa", GQA)
    patch.setitem(FLAVORS, "one_head", ONE_HEAD)


def exported(flavor: str, folder: Path) -> tuple[Transformer, Path]:
    """A random model, and the folder it was exported to."""
    model = random_model(FLAVORS[flavor], SEQ_LEN)
    export(open_trained(save(model, folder / "run", flavor)), folder / "out", "float32")
    return model, folder / "out"


def imported(dump_folder: Path, corpus: Path, folder: Path, flavor: str, **overrides) -> list[str]:
    return command_line(
        dump_folder,
        corpus,
        model__flavor=flavor,
        checkpoint__initial_load_path=folder,
        checkpoint__initial_load_in_hf=True,
        checkpoint__initial_load_model_only=True,
        **overrides,
    )


def loaded_parameters(args: list[str]) -> dict[str, torch.Tensor]:
    """The full parameters that a run starts from."""
    with pytest.MonkeyPatch.context() as patch:
        register(patch)
        with trainer_of(load_config(args)) as trainer:
            trainer.checkpointer.load()
            return {
                name: p.full_tensor() if hasattr(p, "full_tensor") else p.clone()
                for name, p in trainer.model_parts[0].state_dict().items()
            }


@pytest.mark.parametrize("flavor", ["debugmodel", "gqa"])
def test_a_folder_loads_as_the_model_that_was_exported(flavor, tmp_path):
    model, folder = exported(flavor, tmp_path)
    again = open_trained(folder)
    assert again.args.max_seq_len == SEQ_LEN
    tokens = torch.arange(300)[None]
    assert torch.equal(again.load()(tokens), model(tokens))


@pytest.mark.parametrize("flavor", ["debugmodel", "gqa"])
def test_training_goes_on_from_a_folder(flavor, tmp_path, corpus):
    model, folder = exported(flavor, tmp_path)
    args = imported(tmp_path / "dump", corpus, folder, flavor)
    parameters = loaded_parameters(args)
    assert parameters.keys() == model.state_dict().keys()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameters[name], parameter), name

    run = train(args)
    assert sorted(run.losses) == list(range(1, STEPS + 1))
    assert "LighthouseAttention" in run.attention[1] and run.losses[STEPS] < run.losses[1]


@pytest.mark.parametrize(
    "flavor, num_ranks",
    [
        # Each of two ranks has half a head.
        ("one_head", 2),
        pytest.param("debugmodel", 2, marks=pytest.mark.slow),
        pytest.param("gqa", 4, marks=pytest.mark.slow),
    ],
)
def test_ranks_load_their_shards(flavor, num_ranks, tmp_path, corpus):
    model, folder = exported(flavor, tmp_path)
    args = imported(tmp_path / "dump", corpus, folder, flavor)
    for parameters in launch(loaded_parameters, num_ranks, tmp_path / "ranks", args):
        for name, parameter in model.named_parameters():
            assert torch.equal(parameters[name], parameter), name


@pytest.mark.parametrize("flavor", list(FLAVORS))
def test_the_configuration_survives_the_way_there_and_back(flavor, tmp_path):
    expected = hf_llama.to_config(FLAVORS[flavor])
    (tmp_path / "config.json").write_text(json.dumps(expected))
    assert hf_llama.to_config(hf_llama.from_config(tmp_path)) == expected


def test_the_file_of_transformers_5_is_understood(tmp_path):
    # Imported here, because ranks also import this module.
    from transformers import LlamaConfig

    expected = hf_llama.to_config(GQA)
    # transformers writes `rope_parameters`, and changes its arguments.
    LlamaConfig.from_dict(copy.deepcopy(expected)).save_pretrained(tmp_path)
    assert "rope_scaling" not in json.loads((tmp_path / "config.json").read_text())
    assert hf_llama.read_config(tmp_path) == expected


def test_no_scaling_of_rope_is_a_factor_of_one(tmp_path):
    config = {**hf_llama.to_config(GQA), "rope_scaling": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    args = hf_llama.from_config(tmp_path)
    assert args.rope_scaling_args.scaling_factor == 1
    weights = hf_llama.Llama3Adapter(GQA, None).to_hf(Transformer(GQA).state_dict())
    save_file(weights, tmp_path / "model.safetensors")
    unscaled = RoPEScalingArgs(scaling_factor=1.0, low_freq_factor=2.0)
    flavor = dataclasses.replace(GQA, rope_scaling_args=unscaled)
    hf_llama.check_flavor(tmp_path, flavor, "gqa")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"tie_word_embeddings": True}, ("tie_word_embeddings", "False", "True")),
        ({"model_type": "mistral"}, ("model_type", "'llama'", "'mistral'")),
        ({"head_dim": 32}, ("head_dim", "hidden_size/num_attention_heads", "32")),
        ({"rope_scaling": {"rope_type": "yarn"}}, ("rope_type", "llama3", "'yarn'")),
        ({"hidden_size": None}, ("hidden_size", "must be there")),
        ({"rope_theta": 1e6}, ("model gqa", "rope_theta 20000.0", "1000000.0")),
        ({"vocab_size": 128256}, ("model gqa", "vocab_size 320", "128256")),
        ({}, ("*.safetensors",)),
    ],
    ids=lambda value: next(iter(value), "no_weights") if isinstance(value, dict) else "",
)
def test_a_folder_that_cannot_be_trained_on(change, words, tmp_path):
    config = {**hf_llama.to_config(GQA), **change}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with refused(*words, ";"):
        hf_llama.check_flavor(tmp_path, GQA, "gqa")


def test_the_check_stands_before_the_start(tmp_path, corpus):
    _, folder = exported("gqa", tmp_path)
    config = load_config(imported(tmp_path / "dump", corpus, folder, "debugmodel"))
    with pytest.raises(ValueError, match=r"^checkpoint.initial_load_path must hold the model "):
        check_config(config, world_size=1)
    config = load_config(imported(tmp_path / "dump", corpus, folder / "none", "gqa"))
    with pytest.raises(ValueError, match=r"^checkpoint.initial_load_path must be the folder"):
        check_config(config, world_size=1)
