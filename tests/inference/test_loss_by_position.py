"""`lighthouse eval-loss`: losses of the model, by position and with both attentions."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from models import random_model, save
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.experiments.lighthouse.apply_lighthouse import use_lighthouse
from torchtitan.experiments.lighthouse.config.job_config import SAVED_CONFIG
from torchtitan.experiments.lighthouse.data.byte_tokenizer import BYTE_TOKENIZER_PATH
from torchtitan.experiments.lighthouse.data.packing import PackedTextDataset
from torchtitan.experiments.lighthouse.flavors import FLAVORS
from torchtitan.experiments.lighthouse.inference import loss_by_position as eval_loss
from torchtitan.experiments.lighthouse.inference.hf_export import export
from torchtitan.experiments.lighthouse.inference.load_model import HeldOutText, open_trained

from lighthouse import LighthouseConfig

SEQ_LEN = 272
FIELDS = ["num_levels=2", "pooling_factor=2", "topk=128", "full_attn_layers=0,-1"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    model = random_model(FLAVORS["debugmodel"], 2 * SEQ_LEN)
    return save(model, tmp_path_factory.mktemp("run"), "debugmodel")


@pytest.fixture
def script(corpus, tmp_path, monkeypatch, capsys):
    """Run the script, on `corpus` unless `text` names other data. Returns its JSON and output."""
    of_corpus = ("--dataset", "text", "--dataset-path", str(corpus))

    def main(*args, text=of_corpus) -> tuple[dict, str]:
        options = [*text, "--output", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", ["lighthouse eval-loss", *map(str, args), *options])
        eval_loss.main()
        printed = capsys.readouterr().out
        return json.loads(printed.splitlines()[-1]), printed

    return main


def expected_losses(corpus: Path, model) -> torch.Tensor:
    """Losses of all tokens of the first two held-out windows, by the model's own forward."""
    tokenizer = HuggingFaceTokenizer(BYTE_TOKENIZER_PATH)
    windows = iter(PackedTextDataset("text", str(corpus), tokenizer, SEQ_LEN, split="validation"))
    pairs = [next(windows) for _ in range(2)]
    return torch.stack(
        [F.cross_entropy(model(x["input"][None])[0], y, reduction="none") for x, y in pairs]
    ).double()


def test_losses_by_position_under_both_attentions(corpus, checkpoint, script, tmp_path):
    lengths = ["--seq-len", SEQ_LEN, "--windows", 2]
    result, printed = script(checkpoint, *lengths, "--lighthouse", *FIELDS)
    model = random_model(FLAVORS["debugmodel"], SEQ_LEN)
    losses = {"dense": expected_losses(corpus, model)}
    use_lighthouse(model, LighthouseConfig(num_levels=2, pooling_factor=2, topk=128), [0, -1], 4)
    losses["Lighthouse"] = expected_losses(corpus, model)
    assert not torch.allclose(*losses.values(), atol=1e-3)

    assert [entry["attention"] for entry in result["results"]] == ["dense", "Lighthouse"]
    for entry in result["results"]:
        expected = losses[entry["attention"]]
        assert entry["windows"] == 2
        assert entry["loss"] == pytest.approx(expected.mean().item(), abs=1e-5)
        means = expected.mean(1)
        assert entry["standard_error"] == pytest.approx((means[0] - means[1]).abs().item() / 2)
        edges = [(b["from"], b["to"]) for b in entry["by_position"]]
        assert edges == [(0, 64), (64, 128), (128, 256), (256, SEQ_LEN)]
        for (start, end), bucket in zip(edges, entry["by_position"], strict=True):
            part = expected[:, start:end].mean().item()
            assert bucket["loss"] == pytest.approx(part, abs=1e-5)
        assert f"{entry['loss']:.4f}" in printed
    # The difference is paired: its error is that of the differences, window by window.
    difference = losses["Lighthouse"] - losses["dense"]
    paired = result["results"][1]["minus_first"]
    assert paired["loss"] == pytest.approx(difference.mean().item(), abs=1e-5)
    means = difference.mean(1)
    error = (means[0] - means[1]).abs().item() / 2
    assert paired["standard_error"] == pytest.approx(error, abs=1e-5)
    last = paired["by_position"][-1]["loss"]
    assert last == pytest.approx(difference[:, 256:].mean().item(), abs=1e-5)
    assert "minus_first" not in result["results"][0]
    assert "minus the first" in printed and f"{paired['loss']:.4f}" in printed
    fields = result["results"][1]["fields"]
    assert (fields["topk"], fields["full_attn_layers"]) == (128, [0, -1])
    assert json.loads((tmp_path / "eval_loss.json").read_text()) == result
    assert (tmp_path / "eval_loss.png").read_bytes().startswith(b"\x89PNG")


def test_an_exported_folder_has_the_same_loss(checkpoint, script, tmp_path):
    export(open_trained(checkpoint), tmp_path / "out", "float32")
    result, _ = script(checkpoint, tmp_path / "out", "--seq-len", 128)
    first, second = (entry["loss"] for entry in result["results"])
    assert first == second
    assert result["results"][1]["minus_first"]["loss"] == 0
    # The text has fewer windows than requested.
    assert 2 < result["results"][0]["windows"] < 16


def test_the_logits_of_a_chunk_at_a_time_are_all_there_is(checkpoint, script, monkeypatch):
    whole, _ = script(checkpoint, "--seq-len", 128)
    monkeypatch.setattr(eval_loss, "CHUNK_SIZE", 48)
    chunked, _ = script(checkpoint, "--seq-len", 128)
    assert chunked["results"][0]["loss"] == pytest.approx(whole["results"][0]["loss"], abs=1e-6)


def checkpoint_of(folder: Path, **validation: str) -> Path:
    """A checkpoint of a run with this section [validation]."""
    checkpoint = save(random_model(FLAVORS["debugmodel"], SEQ_LEN), folder, "debugmodel")
    config = folder / SAVED_CONFIG
    config.write_text(json.dumps(json.loads(config.read_text()) | {"validation": validation}))
    return checkpoint


def test_the_text_is_the_validation_data_of_the_run(corpus, script, tmp_path):
    run = checkpoint_of(tmp_path / "run", dataset="text", dataset_path=str(corpus))
    expected, _ = script(run, "--windows", 2)
    result, printed = script(run, "--windows", 2, text=())
    assert result == expected and result["dataset_path"] == str(corpus)
    assert printed.startswith(f"Held-out loss, text in {corpus}, 2 windows of ")


def test_a_run_without_validation_data_has_those_of_training(tmp_path):
    run = checkpoint_of(tmp_path)
    config = json.loads((tmp_path / SAVED_CONFIG).read_text())
    config["training"] |= {"dataset": "jsonl", "dataset_path": "a", "text_field": "body"}
    (tmp_path / SAVED_CONFIG).write_text(json.dumps(config))
    assert open_trained(run).held_out == HeldOutText("jsonl", "a", "body")


def test_models_without_data_are_measured_on_those_of_the_others(checkpoint, tmp_path):
    options = SimpleNamespace(dataset=None, dataset_path=None, text_field=None)
    unknown = open_trained(checkpoint)
    known = open_trained(checkpoint_of(tmp_path, dataset="text", dataset_path="a"))
    assert eval_loss.held_out_text([unknown, known], options) == HeldOutText("text", "a")
    assert eval_loss.held_out_text([unknown], options) == HeldOutText("python_stdlib")


@pytest.mark.parametrize(
    "paths, args, words",
    [
        (["a", "b"], [], ("--dataset must be given", "text in a for", "text in b for", "name the")),
        (["a"], [], ("validation.dataset_path must exist", "'a'", "other data with --dataset")),
        (["a"], ["--dataset-path", "b"], ("--dataset-path must be", "'b'", "add --dataset")),
        (["a"], ["--text-field", "b"], ("--text-field must be", "'b'", "add --dataset")),
    ],
    ids=["different", "missing", "path", "field"],
)
def test_data_that_are_not_clear_are_refused(paths, args, words, script, tmp_path, capsys):
    runs = [checkpoint_of(tmp_path / p, dataset="text", dataset_path=p) for p in paths]
    with pytest.raises(SystemExit) as exit:
        script(*runs, text=args)
    assert exit.value.code == 2 and not (tmp_path / "eval_loss.json").exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(".*".join(map(re.escape, words)), line), line


@pytest.mark.parametrize(
    "args, words",
    [
        (["--lighthouse", "full_attn_layers=4"], ("full_attn_layers", "-4 to 3")),
        (["--lighthouse", *FIELDS, "--seq-len", "200"], ("seq_len 256",)),
        (["--seq-len", "5000"], ("less than the tokens", "5000")),
        (["--flavor", "8B"], ("--flavor", "use debugmodel")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(args, words, checkpoint, script, capsys):
    with pytest.raises(SystemExit) as exit:
        script(checkpoint, *args)
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and all(word in line for word in words), line
