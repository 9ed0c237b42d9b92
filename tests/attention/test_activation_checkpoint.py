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
def calls(monkeypatch):
    """Names of the functions called so far, of those that select a level or score by attention."""
    names = []
    for module, name in (
        (selection, "_best_by_q_then_k"),
        (scorers, "causal_sdpa"),
        (scorers, "gated_linear_attention"),
    ):
        function = getattr(module, name)
        monkeypatch.setattr(
            module,
            name,
            lambda *args, name=name, function=function: names.append(name) or function(*args),
        )
    return names


@pytest.mark.parametrize(
    ("mode", "compiled"),
    [*((mode, False) for mode in MODES), ("none", True), ("full", True), ("selective-op", True)],
)
@pytest.mark.parametrize(
    ("scorer", "scorings"),
    # Attention scores both ways.
    [("norm", []), ("dilated", ["causal_sdpa"] * 2), ("gla", ["gated_linear_attention"] * 2)],
)
def test_scores_and_selects_once_a_layer(scorer, scorings, mode, compiled, calls):
    found = gradients(mode, compiled, scorer)
    # With two levels, a selection computes one level of the cascade.
    assert sorted(calls) == sorted(["_best_by_q_then_k", *scorings] * N_LAYERS)
    for expected, gradient in zip(gradients("none", scorer=scorer), found, strict=True):
        if compiled:
            torch.testing.assert_close(gradient, expected)
        else:
            assert torch.equal(gradient, expected)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_recomputed_selection_is_an_error(compiled, monkeypatch):
    monkeypatch.setattr(apply_lighthouse, "save_selections", lambda model: None)
    with pytest.raises(RuntimeError, match="must keep the selections"):
        gradients("full", compiled)


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
