"""Activation checkpointing computes the selection once per layer and step, in every mode."""

import pytest
import torch
from torchtitan.config.job_config import ActivationCheckpoint
from torchtitan.distributed.activation_checkpoint import apply_ac
from torchtitan.experiments.lighthouse import apply_lighthouse
from torchtitan.models.llama3 import Transformer, TransformerModelArgs
from torchtitan.models.llama3.infra.parallelize import _op_sac_save_list

from lighthouse import LighthouseConfig, attention, scorers, selection

SEQ_LEN = 512
N_LAYERS = 2
MODES = {
    "none": None,
    "full": ActivationCheckpoint(mode="full"),
    "selective-op": ActivationCheckpoint(mode="selective", selective_ac_option="op"),
    "selective-1": ActivationCheckpoint(mode="selective", selective_ac_option="1"),
}


def gradients(mode: str, compiled: bool = False, scorer: str = "norm") -> list[torch.Tensor]:
    """Loss and gradients of one step of a small model."""
    torch.manual_seed(0)
    args = TransformerModelArgs(
        dim=32, n_layers=N_LAYERS, n_heads=2, vocab_size=64, max_seq_len=SEQ_LEN, multiple_of=32
    )
    model = Transformer(args)
    with torch.no_grad():
        model.init_weights()
    if MODES[mode] is not None:
        apply_ac(model, MODES[mode], op_sac_save_list=_op_sac_save_list)
    apply_lighthouse.use_lighthouse(
        model, LighthouseConfig(2, 2, 128, scorer), [], N_LAYERS, "aligned"
    )
    apply_lighthouse.save_selections(model)
    if compiled:
        for name, block in model.layers.named_children():
            model.layers.register_module(
                name, torch.compile(block, backend="aot_eager", fullgraph=True)
            )
    tokens = torch.randint(64, (1, SEQ_LEN))
    loss = torch.nn.functional.cross_entropy(model(tokens)[0], tokens[0].roll(-1))
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


@pytest.fixture
def count_selections(monkeypatch):
    """Number of cascade levels computed so far."""
    calls = []
    best = selection._best_by_q_then_k
    monkeypatch.setattr(
        selection, "_best_by_q_then_k", lambda *scores: calls.append(1) or best(*scores)
    )
    return calls


@pytest.fixture
def count_scorings(monkeypatch):
    """Number of passes of scoring by attention so far."""
    calls = []
    for name in ("causal_sdpa", "gated_linear_attention"):
        attend = getattr(scorers, name)
        monkeypatch.setattr(
            scorers, name, lambda *qkv, attend=attend: calls.append(1) or attend(*qkv)
        )
    return calls


@pytest.mark.parametrize("mode", MODES)
def test_selects_once_a_layer(mode, count_selections):
    gradients(mode)
    # With two levels, a selection computes one level of the cascade.
    assert len(count_selections) == N_LAYERS


@pytest.mark.parametrize(
    ("mode", "compiled"),
    [*((mode, False) for mode in MODES), ("full", True), ("selective-op", True)],
)
@pytest.mark.parametrize("scorer", ["dilated", "gla"])
def test_scores_by_attention_once_a_layer(scorer, mode, compiled, count_selections, count_scorings):
    found = gradients(mode, compiled, scorer)
    assert len(count_selections) == N_LAYERS
    assert len(count_scorings) == 2 * N_LAYERS  # both ways
    for expected, gradient in zip(gradients("none", scorer=scorer), found, strict=True):
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_recomputed_selection_is_an_error(compiled, monkeypatch):
    monkeypatch.setattr(apply_lighthouse, "save_selections", lambda model: None)
    with pytest.raises(RuntimeError, match="must keep the selections"):
        gradients("full", compiled)


@pytest.mark.parametrize("mode", ["full", "selective-op", "selective-1"])
def test_gradients_are_those_without_it(mode):
    for expected, found in zip(gradients("none"), gradients(mode), strict=True):
        assert torch.equal(expected, found)


def test_a_near_tie_that_flips_in_the_recomputation_does_no_harm(monkeypatch):
    """Gradients do not change if recomputed scores differ from the first ones."""
    expected = gradients("none")
    calls = []

    select_spans = selection.select_spans

    # Both passes have the same operations. Otherwise checkpointing itself would raise an error.
    order = torch.arange(SEQ_LEN // 2)
    orders = [order] * N_LAYERS + [order.flip(0)] * N_LAYERS

    def flip_in_recomputation(scores, *args):
        order = orders[len(calls)]
        calls.append(1)
        return select_spans(type(scores)(*(x.index_select(-1, order) for x in scores)), *args)

    monkeypatch.setattr(attention, "select_spans", flip_in_recomputation)
    found = gradients("full")
    assert len(calls) == 2 * N_LAYERS
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("mode", ["none", "full", "selective-op"])
def test_compiles_in_one_graph(mode, count_selections):
    expected = gradients(mode)
    count_selections.clear()
    found = gradients(mode, compiled=True)
    assert len(count_selections) == N_LAYERS
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b)
