"""The examples and the snippets of the documentation run."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from hf_models import make_tokens
from torchtitan.experiments.lighthouse.inference import passkey as eval_passkey
from transformers import AutoTokenizer, LlamaForCausalLM

ROOT = Path(__file__).parents[2]


def run_example(name, *options):
    path = str(ROOT / "examples" / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [path, *map(str, options)])
        runpy.run_path(path, run_name="__main__")


@pytest.mark.parametrize("name", ["train_hf.py", "attention_only.py"])
def test_an_example_is_short(name):
    # Lines without the docstring, imports and empty lines.
    code = (ROOT / "examples" / name).read_text().split('"""', 2)[2].split("\n\n\n", 1)[1]
    assert len([line for line in code.splitlines() if line.strip()]) <= 60


def test_attention_only(capsys):
    run_example("attention_only.py", "--steps", 10, "--stage1-steps", 5, "--seq-len", 512)
    steps = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [(step[1], step[2]) for step in steps] == [("5", "lighthouse"), ("10", "dense")]
    assert float(steps[1][4]) < 5


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of the example, stopped after its first stage and resumed."""
    folder = tmp_path_factory.mktemp("train_hf")
    options = ["--output", folder, "--seq-len", 512, "--stage1-steps", 1, "--save-steps", 1]
    run_example("train_hf.py", *options, "--steps", 1)
    run_example("train_hf.py", *options, "--steps", 2)
    return folder


def test_train_hf_resumes_and_leaves_an_ordinary_model(trained):
    assert {"checkpoint-1", "checkpoint-2", "model"} <= {x.name for x in trained.iterdir()}
    assert "lighthouse" not in (trained / "model" / "config.json").read_text()
    model = LlamaForCausalLM.from_pretrained(trained / "model")
    text = "def f(x): # é"
    tokens = AutoTokenizer.from_pretrained(trained / "model")(text, return_tensors="pt").input_ids
    assert tokens[0].tolist() == list(text.encode())
    assert model(input_ids=tokens).logits.shape == (1, len(text.encode()), 256)


def test_pass_keys_are_measured_on_the_folder(trained, tmp_path, monkeypatch, capsys):
    options = [trained / "model", "--lengths", 128, "--output", tmp_path]
    monkeypatch.setattr(sys, "argv", ["eval_passkey.py", *map(str, options)])
    eval_passkey.main()
    assert "Pass key retrieval" in capsys.readouterr().out


def test_the_snippet_of_the_documentation(tmp_path):
    page = (ROOT / "docs" / "huggingface.md").read_text()
    snippet = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0]
    names = {"tokens": make_tokens(batch=4, seq_len=1024), "output_folder": tmp_path}
    exec(snippet, names)
    assert names["trainer"].state.global_step == 4
    assert names["model"].config._attn_implementation == "sdpa"
    assert all(torch.isfinite(p).all() for p in names["model"].parameters())
