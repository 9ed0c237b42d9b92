"""Telemetry of a run: its measurements, and its absence of effects on training.

Runs are on one rank, compiled, and on two FSDP ranks.
"""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo.utils
from ranks import launch
from runs import (
    STAGE1_STEPS,
    RecordedTrainer,
    assert_same_state,
    command_line,
    train,
    trainer_of,
)
from torch import nn
from torchtitan.experiments.lighthouse import metrics, selection_metrics
from torchtitan.experiments.lighthouse.config.load import load_config
from torchtitan.models.llama3.model.model import apply_rotary_emb

from lighthouse import LighthouseAttention

OPTIONS = {"checkpoint__enable": False, "model__flavor": "debugmodel"}
KEYS = ["refined_share/level_1", "coverage/level_0", "coverage/level_1", "head_overlap/level_1"]


def telemetry_of(folder: Path) -> dict[int, dict]:
    """Telemetry by step, without the keys of every line."""
    lines = metrics.read_metrics(folder, "telemetry/layer_1/attention_on_level_0")
    assert all(line.pop("stage") == 1 for line in lines)
    assert all(line.pop("phase") == "lighthouse" for line in lines)
    return {line.pop("step"): line for line in lines}


def test_training_is_the_same_with_and_without(corpus, tmp_path):
    without = train(command_line(tmp_path / "without", corpus, **OPTIONS))
    args = command_line(tmp_path / "with", corpus, **OPTIONS, lighthouse__telemetry_freq=2)
    measured = train(args)
    assert measured.losses == without.losses and measured.batches == without.batches
    assert_same_state(measured, without)
    # Every second step of stage 1, for both layers with Lighthouse.
    found = telemetry_of(tmp_path / "with")
    assert list(found) == [2] and STAGE1_STEPS == 3
    assert found[2].keys() == {
        f"telemetry/layer_{layer}/{key}"
        for layer in (1, 2)
        for key in (*KEYS, "attention_on_level_0")
    }
    assert all(0 < value <= 1 for value in found[2].values())
    assert found[2]["telemetry/layer_1/refined_share/level_1"] == pytest.approx(128 / 384)
    assert not telemetry_of(tmp_path / "without")


def test_what_a_layer_attends_with_is_measured(corpus, tmp_path, monkeypatch):
    seen = {}

    def remember(q, k, v, config):
        assert not torch.is_grad_enabled()
        seen["q"], seen["k"], seen["v"] = q, k, v
        return {"seen": 1.0}

    monkeypatch.setattr(selection_metrics, "measure", remember)
    args = command_line(tmp_path, corpus, **OPTIONS, lighthouse__full_attn_layers=[1, 2, 3])
    with trainer_of(load_config(args)) as trainer:
        assert trainer.should_continue_training() and trainer.stage == 1
        (model,) = trainer.model_parts
        inputs = torch.randint(0, 256, (3, 768))
        assert selection_metrics.measure_layers(model, inputs) == {"telemetry/layer_0/seen": 1.0}
        block = model.layers["0"]
        with torch.no_grad():
            x = block.attention_norm(model.tok_embeddings(inputs[:1]))
            q, k, v = (
                linear(x).unflatten(-1, (2, 64))
                for linear in (block.attention.wq, block.attention.wk, block.attention.wv)
            )
            q, k = apply_rotary_emb(q, k, model.freqs_cis)
        for name, expected in (("q", q), ("k", k), ("v", v)):
            torch.testing.assert_close(seen[name], expected.transpose(1, 2))
        assert not block.attention.inner_attention._forward_pre_hooks


@pytest.mark.parametrize(
    ("full_attn_layers", "expected"),
    [([], "024"), ([0, 1, -1], "23"), ([0, 2, 4], "13"), ([0, 1, 2, 3], "4"), ([0], "134")],
)
def test_the_sampled_layers(full_attn_layers, expected):
    layers = {
        str(i): SimpleNamespace(
            attention=SimpleNamespace(inner_attention=LighthouseAttention(nn.Identity(), None))
        )
        for i in range(5)
    }
    for i in full_attn_layers:
        layers[str(i % 5)].attention.inner_attention = nn.Identity()
    found = selection_metrics.sampled_layers(SimpleNamespace(layers=layers))
    assert "".join(found) == expected
    assert all(found[name] is layers[name].attention.inner_attention for name in found)


class CountingTrainer(RecordedTrainer):
    """Records the number of compiled graphs at the end of each step."""

    def __init__(self, job_config):
        self.num_graphs = {}
        super().__init__(job_config)

    def train_step(self, data_iterator):
        super().train_step(data_iterator)
        self.num_graphs[self.step] = torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_compiled_layers_stay_as_they_are(corpus, tmp_path):
    options = {
        **OPTIONS,
        "model__flavor": "quickstart",
        "lighthouse__full_attn_layers": [0],
        # Traced in full with AOTAutograd, but without compiling kernels.
        "compile__enable": True,
        "compile__backend": "aot_eager",
        "activation_checkpoint__mode": "selective",
        "activation_checkpoint__selective_ac_option": "op",
        "training__steps": 3,
    }
    runs, num_graphs = [], []
    for freq in (0, 1):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        args = command_line(
            tmp_path / str(freq), corpus, **options, lighthouse__telemetry_freq=freq
        )
        runs.append(train(args, CountingTrainer, lambda t: num_graphs.append(t.num_graphs)))
    assert list(telemetry_of(tmp_path / "1")) == [1, 2, 3]
    # The number of graphs is the same, and all are compiled in the first step.
    assert num_graphs[0] == num_graphs[1]
    assert list(num_graphs[0]) == [1, 2, 3] and len({*num_graphs[0].values()}) == 1
    assert num_graphs[0][1] >= 2
    assert runs[0].losses == runs[1].losses
    assert_same_state(*runs)


def train_two_ranks(folder: Path, corpus: Path) -> list:
    """The run without telemetry and the run with it."""
    return [
        train(command_line(folder / str(freq), corpus, **OPTIONS, lighthouse__telemetry_freq=freq))
        for freq in (0, 1)
    ]


def test_two_ranks_train_the_same_with_and_without(corpus, tmp_path):
    for without, measured in launch(train_two_ranks, 2, tmp_path / "ranks", tmp_path, corpus):
        assert measured.losses == without.losses and measured.batches == without.batches
        assert_same_state(measured, without)
    # One rank writes one line per step.
    assert list(telemetry_of(tmp_path / "1")) == [1, 2, 3]
    assert len((tmp_path / "1" / "metrics.jsonl").read_text().splitlines()) == 7 + 1 + 3
