"""Steps with a loss or gradient that is not finite do not change the parameters."""

import math
from pathlib import Path
from unittest import mock

import pytest
import torch
from ranks import launch
from runs import RecordedTrainer, assert_same_state, command_line, losses_of, train
from torchtitan.experiments.lighthouse.checkpoint.files import checkpoint_steps
from torchtitan.experiments.lighthouse.flavors import FLAVORS
from torchtitan.experiments.lighthouse.metrics import read_metrics
from torchtitan.experiments.lighthouse.runtime.errors import TrainingAborted
from torchtitan.experiments.lighthouse.runtime.nonfinite import SKIPPED, gradient_norm
from torchtitan.models.llama3 import Transformer

BAD_STEP = 3


class BrokenTrainer(RecordedTrainer):
    """A trainer whose gradient is not finite in step 3 on the last rank."""

    spoil = "nan"

    def forward_backward_step(self, **batch):
        is_last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
        if self.step != BAD_STEP or not is_last:
            return super().forward_backward_step(**batch)
        if self.spoil == "loss":
            return self.with_loss_times(math.inf, batch)
        loss = super().forward_backward_step(**batch)
        gradient = self.model_parts[0].norm.weight.grad
        gradient = getattr(gradient, "to_local", lambda: gradient)()
        if self.spoil == "large":
            # The elements are finite, but their norm is not.
            gradient.fill_(1e30)
        else:
            gradient[0] = float(self.spoil)
        return loss

    def with_loss_times(self, factor, batch):
        loss_fn = self.loss_fn
        with mock.patch.object(self, "loss_fn", lambda *args: loss_fn(*args) * factor):
            return super().forward_backward_step(**batch)


def broken(spoil: str) -> type:
    return type("Broken", (BrokenTrainer,), {"spoil": spoil})


@pytest.mark.parametrize("spoil", ["nan", "inf", "-inf", "large", "loss"])
def test_the_run_stops_with_the_step_and_the_last_good_checkpoint(tmp_path, corpus, spoil):
    args = command_line(tmp_path / "run", corpus, checkpoint__interval=2, training__steps=4)
    with pytest.raises(TrainingAborted) as stop:
        train([*args, "--lighthouse.stage1_steps", "-1"], broken(spoil))
    message = str(stop.value)
    what = "loss" if spoil == "loss" else "gradient"
    assert message.startswith(f"step 3: the {what} must be finite") and "\n" not in message
    assert f"the last good checkpoint is {tmp_path}/run/checkpoint/step-2;" in message
    assert "training.max_skipped_steps, now 0" in message
    if spoil in ("nan", "loss"):
        assert f"got {'inf' if spoil == 'loss' else 'nan'} on rank 0" in message
    assert checkpoint_steps(tmp_path / "run" / "checkpoint") == {2: True}
    assert max(losses_of(tmp_path / "run")) == 2


def test_a_skipped_step_changes_nothing_but_time(tmp_path, corpus, caplog):
    # A constant learning rate, because the schedule advances in a skipped step.
    flat = {
        "lr_scheduler__warmup_steps": 0,
        "lr_scheduler__decay_ratio": 0.0,
        "lighthouse__stage1_steps": -1,
    }
    args = command_line(
        tmp_path / "run", corpus, training__steps=BAD_STEP, training__max_skipped_steps=1, **flat
    )
    skipped = train(args, broken("inf"))
    said = [line for line in caplog.messages if "is left out" in line]
    assert said == [
        "Step 3 is left out (1 of at most 1): the gradient must be finite, got nan on rank 0"
    ]
    lines = read_metrics(tmp_path / "run", SKIPPED)
    assert [(line["step"], line[SKIPPED]) for line in lines] == [(3, 1)]
    before = train(command_line(tmp_path / "before", corpus, training__steps=2, **flat))
    assert_same_state(skipped, before)


def test_one_more_than_may_be_skipped_stops_the_run(tmp_path, corpus):
    class AlwaysBroken(BrokenTrainer):
        def forward_backward_step(self, **batch):
            return self.with_loss_times(math.nan, batch)

    args = command_line(tmp_path / "run", corpus, training__max_skipped_steps=2)
    with pytest.raises(
        TrainingAborted, match=r"^step 3: .* there is no good checkpoint;.*steps, now 2$"
    ):
        train(args, AlwaysBroken)


def rank(folder: Path, corpus: Path, options: dict) -> str:
    """Message of a rank in a run whose last rank has a wrong gradient."""
    try:
        train(command_line(folder / "run", corpus, **options), broken("nan"))
    except TrainingAborted as stop:
        return str(stop)
    return "trained"


@pytest.mark.parametrize("skipped", [0, 1])
def test_ranks_agree_and_the_one_that_went_wrong_is_named(tmp_path, corpus, skipped):
    options = {"training__max_skipped_steps": skipped, "training__steps": 4}
    said = launch(rank, 2, tmp_path / "ranks", tmp_path, corpus, options)
    if skipped:
        assert said == ["trained", "trained"]
        return
    assert said[0] == said[1]
    # Clipping spreads NaN to all ranks, because the norm is that of all ranks.
    assert said[0].startswith("step 3: the gradient must be finite, got nan on rank 0, 1;")


def test_the_norm_is_not_finite_where_an_element_is_not():
    model = Transformer(FLAVORS["debugmodel"])
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert gradient_norm([model]).item() == pytest.approx(math.sqrt(count), rel=1e-4)
    model.norm.weight.grad[5] = math.nan
    assert not gradient_norm([model]).isfinite()
