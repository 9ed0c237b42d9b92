"""Train, resume, export, evaluate and import a model whose sizes are in the TOML file."""

import dataclasses
import inspect
import json
import logging
import sys
from pathlib import Path

import pytest
import torch
from runs import assert_same_state, command_line, train
from torchtitan.experiments.lighthouse.checkpoint.compatibility import FILE_NAME, read_record
from torchtitan.experiments.lighthouse.config.job_config import Sizes
from torchtitan.experiments.lighthouse.config.load import load_config
from torchtitan.experiments.lighthouse.config.model_args import model_args
from torchtitan.experiments.lighthouse.data.bpe_tokenizer import train_tokenizer
from torchtitan.experiments.lighthouse.flavors import FLAVORS, sizes_of, with_sizes
from torchtitan.experiments.lighthouse.inference import loss_by_position
from torchtitan.experiments.lighthouse.inference.generate import generate
from torchtitan.experiments.lighthouse.inference.hf_export import check_export, export
from torchtitan.experiments.lighthouse.inference.load_model import open_trained
from torchtitan.experiments.lighthouse.planner import render
from torchtitan.experiments.lighthouse.preflight import check_config
from torchtitan.models.llama3 import Transformer, TransformerModelArgs

SIZES = {
    "dim": 192,
    "n_layers": 6,
    "n_heads": 3,
    "ffn_dim": 500,
    "vocab_size": 512,
    "norm_eps": 1e-6,
    "rope_theta": 20000.0,
    "rope_scaling_factor": 1.0,
}

OPTIONS = {
    "training__seq_len": 256,
    "training__steps": 6,
    "lighthouse__stage1_steps": 4,
    "checkpoint__interval": 3,
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    assert train_tokenizer([inspect.getsource(inspect)], 512, folder) == 512
    return folder


@pytest.fixture(scope="module")
def files(corpus, tokenizer, tmp_path_factory):
    """Write a TOML file with other sizes. Returns the arguments of a run in another folder."""

    def write(name: str, **sizes) -> list[str]:
        folder = tmp_path_factory.mktemp(name)
        lines = "\n".join(f"{key} = {value}" for key, value in {**SIZES, **sizes}.items())
        file = folder / "run.toml"
        file.write_text(f"[model.override]\n{lines}\n")
        options = {**OPTIONS, "model__hf_assets_path": tokenizer}
        return ["--job.config_file", str(file), *command_line(folder / "run", corpus, **options)]

    return write


@pytest.fixture(scope="module")
def run(files):
    """A run of both stages: its arguments, its dump folder, and its results."""
    args = files("run")
    return args, Path(load_config(args).job.dump_folder), train(args)


@pytest.mark.parametrize("dim", [1, 64, 192, 1000, 4096, 5120])
@pytest.mark.parametrize("flavor", ["debugmodel", "10M", "530M"])
def test_the_feed_forward_width_is_exact(flavor, dim):
    for ffn_dim in (1, 2, 7, 500, 1536, 11008, 13696, 14336, 65537):
        args = with_sizes(FLAVORS[flavor], {"dim": 2 * dim, "n_layers": 1, "ffn_dim": ffn_dim})
        assert sizes_of(args)["ffn_dim"] == ffn_dim


def test_the_model_has_the_sizes(run):
    config = load_config(run[0])
    args = model_args(config)
    with torch.device("meta"):
        model = Transformer(args)
    block = model.layers["5"]
    assert len(model.layers) == 6 and model.output.weight.shape == (512, 192)
    assert block.feed_forward.w1.weight.shape == (500, 192)
    assert block.attention.wk.weight.shape == (192, 192) and block.attention.n_heads == 3
    assert block.attention_norm.eps == 1e-6
    plain = 20000.0 ** -(torch.arange(0, 64, 2) / 64)
    angles = torch.angle(Transformer(args).freqs_cis[1])
    assert torch.allclose(angles, plain)
    # The flavor itself does not change.
    assert FLAVORS["debugmodel"].dim == 128


@pytest.mark.parametrize("flavor", list(FLAVORS))
def test_sizes_of_a_flavor_are_those_of_its_model(flavor):
    args = dataclasses.replace(FLAVORS[flavor], n_layers=1)
    with torch.device("meta"):
        model = Transformer(args)
    assert model.layers["0"].feed_forward.w1.out_features == sizes_of(args)["ffn_dim"]
    again = with_sizes(TransformerModelArgs(), sizes_of(args))
    assert sizes_of(again) == sizes_of(args)


def test_a_stopped_run_goes_on(files, run, caplog):
    args = files("stopped")
    caplog.set_level(logging.INFO)
    before = train([*args, "--training.steps", "4"])
    after = train(args)
    assert sorted(before.batches) == [1, 2, 3, 4] and sorted(after.batches) == [5, 6]
    assert_same_state(after, run[2])
    # The log has our lines, but not torchtitan's or its warning about missing weights.
    assert "step 1/4 | stage 1 | loss " in caplog.text
    assert "step 5/6 | stage 2 | loss " in caplog.text
    assert "step:" not in caplog.text and "index.json not found" not in caplog.text
    assert "Nothing to train" not in caplog.text
    assert not train(args).batches
    assert "Nothing to train: all 6 steps of this run are done" in caplog.text


def test_config_and_checkpoint_hold_the_sizes(run):
    kept = json.loads((run[1] / "config.json").read_text())["model"]["override"]
    assert {name: value for name, value in kept.items() if value is not None} == SIZES
    record = read_record(run[1] / "checkpoint" / "step-6")
    assert SIZES.items() <= record["model.flavor"].items()


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("dim", 384, "dim is 384 and in the checkpoint 192"),
        ("ffn_dim", 512, "ffn_dim is 512 and in the checkpoint 500"),
        ("n_heads", 2, "n_heads is 3, got 2"),
        ("rope_theta", 10000.0, "rope_theta is 20000.0, got 10000.0"),
        ("rope_scaling_factor", 8.0, "rope_scaling_factor is 1.0, got 8.0"),
        ("norm_eps", 1e-5, "norm_eps is 1e-06, got 1e-05"),
    ],
)
def test_a_changed_size_is_refused_on_resume(name, value, words, run):
    config = load_config([*run[0], f"--model.override.{name}", str(value)])
    with pytest.raises(ValueError, match=r"model\.flavor must be ") as error:
        check_config(config, world_size=1)
    assert words in str(error.value) and "[model.override]" in str(error.value)


def test_a_record_of_an_older_checkpoint_is_understood(tmp_path):
    args = dataclasses.asdict(FLAVORS["530M"])
    args.pop("max_seq_len")
    old = {k: v for k, v in args.items() if isinstance(v, int | float | str | None)}
    (tmp_path / FILE_NAME).write_text(json.dumps({"model.flavor": old}))
    assert read_record(tmp_path)["model.flavor"] == sizes_of(FLAVORS["530M"])


def test_the_dense_model_is_exported_evaluated_and_imported(run, corpus, tmp_path, monkeypatch):
    trained = open_trained(run[1] / "checkpoint" / "step-6")
    assert sizes_of(trained.args).items() >= SIZES.items()
    folder = tmp_path / "exported"
    export(trained, folder, "float32")
    assert check_export(trained, folder).is_equal
    assert json.loads((folder / "config.json").read_text())["intermediate_size"] == 500
    assert len(generate(trained.load(), [65, 66], 4, temperature=0)) == 4

    options = ["--dataset", "text", "--dataset-path", str(corpus), "--windows", "2"]
    output = tmp_path / "eval"
    args = [str(trained.folder), str(folder), *options, "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["eval_loss", *args])
    loss_by_position.main()
    losses = [
        entry["loss"] for entry in json.loads((output / "eval_loss.json").read_text())["results"]
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and 0 < losses[0] < 10

    # The sizes come from the folder, although the flavor has others.
    imported = {
        "model__hf_config": folder,
        "model__hf_assets_path": folder,
        "checkpoint__initial_load_in_hf": True,
        "checkpoint__initial_load_model_only": True,
        "training__seq_len": 256,
        "training__steps": 1,
        "optimizer__lr": 1e-30,
        "lighthouse__stage1_steps": 0,
    }
    went_on = train(command_line(tmp_path / "imported", corpus, **imported))
    for name, parameter in run[2].parameters.items():
        assert torch.allclose(went_on.parameters[name], parameter), name
    kept = json.loads((tmp_path / "imported" / "config.json").read_text())["model"]["override"]
    assert None not in kept.values() and kept["ffn_dim"] == 500
    # The folder is not needed later.
    (folder / "config.json").rename(tmp_path / "away")
    assert open_trained(tmp_path / "imported" / "checkpoint" / "step-1").args.dim == 192


def test_a_plan_counts_the_sizes(run, capsys):
    args = [*run[0][1:], "--world-size", "1", "--gpu", "cpu"]
    render.main([*args, "--json"])
    planned = json.loads(capsys.readouterr().out)["run"]
    with torch.device("meta"):
        model = Transformer(model_args(load_config(run[0])))
    assert planned["parameters"]["total"] == sum(p.numel() for p in model.parameters())
    assert (planned["dim"], planned["hidden_dim"], planned["n_heads"]) == (192, 500, 3)
    render.main(args)
    assert capsys.readouterr().out.startswith("debugmodel with [model.override], 256 tokens")


def test_a_folder_without_a_configuration_is_told_in_one_line(files, tmp_path):
    config = load_config([*files("wrong"), "--model.hf_config", str(tmp_path)])
    with pytest.raises(ValueError, match=r"^model\.hf_config: .*config\.json' must be .*; "):
        check_config(config, world_size=1)


def test_set_sizes_win_over_those_of_a_folder(run, corpus, tmp_path, tokenizer):
    export(open_trained(run[1] / "checkpoint" / "step-6"), tmp_path / "out", "float32")
    options = {"model__hf_config": tmp_path / "out", "model__override__n_layers": 2}
    options |= {"model__hf_assets_path": tokenizer, **OPTIONS, "lighthouse__stage1_steps": 0}
    config = load_config(command_line(tmp_path / "dump", corpus, **options))
    assert config.model.override == Sizes(n_layers=2)
    check_config(config, world_size=1)
    assert (model_args(config).n_layers, model_args(config).dim) == (2, 192)
