"""Exported folders: transformers computes the same, and differences are noticed."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import GQA, random_model, save
from runs import command_line, train, write_corpus
from safetensors.torch import load_file
from texts import TEXTS
from torchtitan.experiments.lighthouse.data.byte_tokenizer import (
    BYTE_TOKENIZER_PATH,
    EOS_ID,
    EOS_TOKEN,
)
from torchtitan.experiments.lighthouse.flavors import FLAVORS
from torchtitan.experiments.lighthouse.inference import export as export_hf
from torchtitan.experiments.lighthouse.inference.hf_export import check_export, export
from torchtitan.experiments.lighthouse.inference.load_model import open_trained
from torchtitan.models.llama3.model.model import precompute_freqs_cis
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

SEQ_LEN = 512


@pytest.fixture(scope="module", autouse=True)
def gqa_flavor():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FLAVORS, "gqa", GQA)
        yield


@pytest.fixture(scope="module", params=["debugmodel", "gqa"])
def run(request, tmp_path_factory):
    """The checkpoints of a run of seven steps, in stages 1 and 2."""
    folder = tmp_path_factory.mktemp(request.param)
    train(command_line(folder, write_corpus(folder / "text"), model__flavor=request.param))
    return folder / "checkpoint"


@pytest.fixture(scope="module", params=["debugmodel", "gqa"])
def random(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    model = random_model(FLAVORS[request.param], SEQ_LEN)
    return open_trained(save(model, folder, request.param))


@pytest.mark.parametrize(("step", "is_warned"), [(3, True), (7, False)])
def test_transformers_computes_the_same_after_training(run, tmp_path, caplog, step, is_warned):
    trained = open_trained(run / f"step-{step}")
    export(trained, tmp_path / "out", "float32")
    line = f"{trained.folder} was saved in stage 1. Its loss with dense attention is clearly"
    assert any(line in message for message in caplog.messages) == is_warned
    result = check_export(trained, tmp_path / "out")
    assert result.num_tokens == 768
    assert result.logit_difference < 1e-4 < result.logit_magnitude
    assert result.is_equal


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_computes_the_same_with_random_weights(random, tmp_path, dtype):
    export(random, tmp_path, dtype)
    result = check_export(random, tmp_path)
    assert result.logit_difference < 1e-4
    assert result.is_equal
    weights = load_file(tmp_path / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {getattr(torch, dtype)}
    assert sum(w.numel() for w in weights.values()) == sum(
        p.numel() for p in random.load().parameters()
    )


@pytest.mark.parametrize(
    "change",
    [{"rope_scaling": None}, {"rope_theta": 10000.5e3}, {"rms_norm_eps": 1e-2}],
    ids=lambda change: next(iter(change)),
)
def test_another_function_is_noticed(random, tmp_path, change):
    export(random, tmp_path, "float32")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    assert not check_export(random, tmp_path).is_equal


@pytest.mark.parametrize("factor", [8.0, 32.0, 1.0])
def test_rope_is_the_same_far_beyond_what_is_scaled(factor, random, tmp_path):
    args = random.args
    scaling = dataclasses.replace(args.rope_scaling_args, scaling_factor=factor)
    args = dataclasses.replace(args, rope_scaling_args=scaling, max_seq_len=1 << 17)
    export(dataclasses.replace(random, args=args), tmp_path, "float32")
    theirs = LlamaRotaryEmbedding(LlamaConfig.from_pretrained(tmp_path))
    positions = torch.arange(args.max_seq_len)[None]
    cos, sin = theirs(torch.zeros(1), positions)
    head_dim = args.dim // args.n_heads
    ours = precompute_freqs_cis(head_dim, args.max_seq_len, args.rope_theta, scaling)
    # The angles are the same fp32 numbers, except for interpolated ones. These may differ in their
    # last bit, by at most 2**-23 of the largest one.
    largest = ours.shape[0] * args.rope_theta ** (-2 / head_dim)
    tolerance = max(1e-6, largest * 2**-23)
    half = cos[0, :, : head_dim // 2], sin[0, :, : head_dim // 2]
    for got, expected in zip(half, (ours.real, ours.imag), strict=True):
        assert (got - expected).abs().max() < tolerance


def test_large_models_come_in_several_files(random, tmp_path):
    export(random, tmp_path, "float32", max_file_size="300KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 2 and {*index["weight_map"].values()} == {file.name for file in files}
    assert check_export(random, tmp_path).is_equal
    expected = random.load().state_dict()
    for name, parameter in open_trained(tmp_path).load().named_parameters():
        assert torch.equal(parameter, expected[name]), name


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_the_tokenizer_makes_the_same_tokens(random, tmp_path, text):
    export(random, tmp_path, "float32")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer(text + EOS_TOKEN).input_ids
    assert ids == [*text.encode(), EOS_ID]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.eos_token_id == EOS_ID


def test_files_of_the_tokenizer_are_copied_or_completed(random, tmp_path):
    export(random, tmp_path / "out", "float32")
    names = ["tokenizer.json", "tokenizer_config.json"]
    copied, kept = (
        json.loads(Path(folder, names[1]).read_text())
        for folder in (tmp_path / "out", BYTE_TOKENIZER_PATH)
    )
    assert copied == {**kept, "pad_token": "<|pad|>"}

    # Only tokenizer.json, which is enough for torchtitan.
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / names[0]).write_bytes(Path(BYTE_TOKENIZER_PATH, names[0]).read_bytes())
    without = dataclasses.replace(random, tokenizer_path=str(bare))
    export(without, tmp_path / "out2", "float32")
    assert AutoTokenizer.from_pretrained(tmp_path / "out2")("é").input_ids == [0xC3, 0xA9]
    config = json.loads((tmp_path / "out2" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (None, None)


def test_a_tokenizer_pads_with_a_token_of_its_own_where_there_is_room(random, tmp_path):
    export(random, tmp_path / "out", "float32")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    batch = tokenizer(["é", "long text"], padding=True, padding_side="right")
    assert batch["input_ids"][0][:2] == [0xC3, 0xA9]
    assert set(batch["input_ids"][0][2:]) == {tokenizer.pad_token_id} == {EOS_ID + 1}

    # A full vocabulary of 257 tokens.
    full = random_model(dataclasses.replace(random.args, vocab_size=257), SEQ_LEN)
    checkpoint = save(full, tmp_path / "full", None)
    (checkpoint.parents[1] / "config.json").unlink(missing_ok=True)
    source = dataclasses.replace(random, folder=checkpoint, args=full.model_args)
    export(source, tmp_path / "out2", "float32")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out2")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == EOS_ID

    # A pad token of the tokenizer is kept.
    again = open_trained(tmp_path / "out")
    export(again, tmp_path / "out3", "float32")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out3" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_transformers_generates_with_its_settings(random, tmp_path):
    export(random, tmp_path, "float32")
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    assert (model.config.bos_token_id, model.config.eos_token_id) == (None, EOS_ID)
    assert model.generation_config.eos_token_id == EOS_ID
    assert model.config.max_position_embeddings == SEQ_LEN
    prompt = torch.tensor([[*b"def f"]])
    tokens = model.generate(prompt, max_new_tokens=5, do_sample=False)
    assert tokens.shape[1] <= 10 and torch.equal(tokens[:, :5], prompt)


def test_the_command(tmp_path):
    checkpoint = save(random_model(FLAVORS["debugmodel"], SEQ_LEN), tmp_path, "debugmodel")
    command = [sys.executable, "-m", "lighthouse_cli", "export", checkpoint, "--output"]
    command += [tmp_path / "out", "--dtype", "bfloat16"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "debugmodel, 512 tokens, bfloat16" in done.stdout
    assert done.stdout.endswith("tokenizers agree.\ntransformers computes the same.\n")


@pytest.fixture
def script(monkeypatch):
    """Call the script's `main` in this process with a command line."""

    def main(*args):
        monkeypatch.setattr(sys, "argv", ["lighthouse export", *map(str, args)])
        export_hf.main()

    return main


def test_a_difference_is_exit_code_1(random, script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torchtitan.experiments.lighthouse.inference.hf_export.TOLERANCE", 0.0)
    with pytest.raises(SystemExit) as exit:
        script(random.folder, "--output", tmp_path / "out")
    assert exit.value.code == 1
    assert "is not the model of the checkpoint" in capsys.readouterr().err


def test_without_the_comparison(random, script, tmp_path, capsys):
    script(random.folder, "--output", tmp_path / "out", "--no-verify")
    assert capsys.readouterr().out.endswith("Not compared with transformers.\n")


def test_an_exported_folder_is_exported_again(random, script, tmp_path, capsys):
    script(random.folder, "--output", tmp_path / "out", "--no-verify")
    capsys.readouterr()
    script(tmp_path / "out", "--output", tmp_path / "again", "--no-verify")
    out = capsys.readouterr().out
    assert out.startswith(f"Llama, {SEQ_LEN} tokens, float32, in {tmp_path / 'again'}:\n")
