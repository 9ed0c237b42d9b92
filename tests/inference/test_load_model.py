"""Trained models on disk: their description is found, or a line asks for what is missing."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from models import GQA, random_model, save
from torchtitan.experiments.lighthouse.data.byte_tokenizer import BYTE_TOKENIZER_PATH
from torchtitan.experiments.lighthouse.flavors import FLAVORS, with_sizes
from torchtitan.experiments.lighthouse.inference.load_model import (
    given_fields,
    open_trained,
    output_folder,
)

NAMED = {"max_seq_len": 64, "tokenizer_path": BYTE_TOKENIZER_PATH}


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A checkpoint of a run without a saved configuration."""
    return save(random_model(FLAVORS["quickstart"], 64), tmp_path, None)


def test_a_run_says_what_it_is(tmp_path):
    folder = save(random_model(FLAVORS["quickstart"], 64), tmp_path, "quickstart")
    config = json.loads((tmp_path / "config.json").read_text())
    config["lighthouse"] = {"topk": 256, "a_field_of_another_version": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    trained = open_trained(folder)
    assert (trained.flavor, trained.args.max_seq_len) == ("quickstart", 64)
    assert trained.lighthouse.topk == 256 and trained.lighthouse.num_levels == 3
    # Without the field in its configuration, a run was trained with averaged phases.
    assert trained.lighthouse.pool_rotary == "averaged"
    assert open_trained(folder, max_seq_len=128).load().freqs_cis.shape[0] == 128


def test_the_flavor_follows_from_the_shapes(checkpoint):
    trained = open_trained(checkpoint, **NAMED)
    assert trained.flavor == "quickstart"
    expected = random_model(FLAVORS["quickstart"], 64)
    tokens = torch.arange(64)[None]
    assert torch.equal(trained.load()(tokens), expected(tokens))


def test_bf16_keeps_rope_in_fp32(checkpoint):
    trained = open_trained(checkpoint, **NAMED)
    model, exact = trained.load(dtype=torch.bfloat16), trained.load()
    assert model.freqs_cis.dtype == torch.complex64
    assert torch.equal(model.freqs_cis, exact.freqs_cis)
    logits = model(torch.arange(64)[None])
    assert logits.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in model.parameters())


def errors(*args, **kwargs) -> str:
    with pytest.raises(ValueError) as error:
        open_trained(*args, **kwargs)
    message = str(error.value)
    assert "\n" not in message and ";" in message
    return message


def test_what_is_not_known_is_asked_for(checkpoint, tmp_path):
    message = errors(checkpoint)
    assert "--max-seq-len" in message and "training.seq_len" in message
    message = errors(checkpoint, max_seq_len=64)
    assert "--tokenizer" in message and "model.hf_assets_path" in message
    message = errors(checkpoint, max_seq_len=64, tokenizer_path=str(tmp_path))
    assert "tokenizer.json" in message and str(tmp_path) in message


def test_a_wrong_flavor(checkpoint):
    message = errors(checkpoint, flavor="268M", **NAMED)
    assert "'268M'" in message and "tok_embeddings.weight is [320, 1024]" in message
    assert message.endswith("; use quickstart")


def test_flavors_that_only_their_parameters_do_not_tell_apart(checkpoint, monkeypatch):
    twin = dataclasses.replace(FLAVORS["quickstart"], rope_theta=500000)
    monkeypatch.setitem(FLAVORS, "twin", twin)
    assert errors(checkpoint, **NAMED).endswith("; use quickstart or twin")
    assert open_trained(checkpoint, flavor="twin", **NAMED).args.rope_theta == 500000


def test_no_flavor_fits(tmp_path):
    checkpoint = save(random_model(GQA, 64), tmp_path, None)
    assert "add its flavor to FLAVORS" in errors(checkpoint, **NAMED)
    deeper = dataclasses.replace(FLAVORS["quickstart"], n_layers=3)
    checkpoint = save(random_model(deeper, 64), tmp_path / "deeper", None)
    message = errors(checkpoint, flavor="quickstart", **NAMED)
    assert "fewer than in the checkpoint" in message


def test_a_folder_that_is_no_model(checkpoint):
    message = errors(checkpoint.parent)
    assert "which is neither" in message and message.endswith(f"name {checkpoint}")
    assert errors(checkpoint.with_name("step-9")).endswith(f"name {checkpoint}")
    # The folder of a run has a config.json, which is not that of a model.
    (checkpoint.parents[1] / "config.json").write_text("{}")
    try:
        assert errors(checkpoint.parents[1]).endswith(f"name {checkpoint}")
    finally:
        (checkpoint.parents[1] / "config.json").unlink()
    assert "correct the path" in errors(checkpoint / "none" / "at all")


def test_phases_are_chosen_by_name(checkpoint):
    trained = open_trained(checkpoint, **NAMED)
    assert given_fields(trained, ["pool_rotary=aligned"], 24576).pool_rotary == "aligned"
    with pytest.raises(ValueError, match="pool_rotary must be one of averaged, aligned, got 'no'"):
        given_fields(trained, ["pool_rotary=no"], 24576)


def test_figures_go_to_the_folder_of_the_run(tmp_path):
    checkpoint = save(random_model(FLAVORS["quickstart"], 64), tmp_path / "run", "quickstart")
    assert output_folder(checkpoint, "eval_loss") == tmp_path / "run" / "eval_loss" / "step-1"
    assert output_folder(tmp_path / "exported", "eval_loss") == tmp_path / "exported" / "eval_loss"


def test_sizes_of_a_kept_configuration_count(tmp_path):
    args = with_sizes(FLAVORS["quickstart"], {"n_layers": 3, "ffn_dim": 200})
    checkpoint = save(random_model(args, 64), tmp_path, "quickstart")
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["model"]["override"] = {"n_layers": 3, "ffn_dim": 200, "dim": None}
    path.write_text(json.dumps(config))
    trained = open_trained(checkpoint)
    assert (trained.flavor, trained.args.n_layers) == ("quickstart", 3)
    expected = random_model(args, 64)
    tokens = torch.arange(64)[None]
    assert torch.equal(trained.load()(tokens), expected(tokens))
