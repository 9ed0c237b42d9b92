"""Trainer with two stages: a run stopped at any step and resumed equals an undisturbed run."""

import pytest
import torch
from hf_models import CONFIG, make_model, make_tokens
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from lighthouse.huggingface import (
    LighthouseSwitch,
    gradient_checkpointing_kwargs,
    register_lighthouse,
)

NUM_STEPS = 6
STAGE1_STEPS = 3
DATA = [{"input_ids": x, "labels": x} for x in make_tokens(batch=16, seq_len=256)]


class Record(TrainerCallback):
    """Records the loss and the attention of every step."""

    def __init__(self):
        self.losses, self.attention = {}, {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.attention[state.global_step] = model.config._attn_implementation

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.losses[state.global_step] = logs["loss"]


def run(
    folder,
    stage1_steps=STAGE1_STEPS,
    checkpoint=None,
    max_steps=NUM_STEPS,
    seed=0,
    checkpointing=None,
    **options,
):
    """Train, from a checkpoint if one is given. Returns the trainer and its record."""
    model = make_model(seed=seed)
    if checkpointing is not None:
        model.gradient_checkpointing_enable(checkpointing)
    record = Record()
    arguments = TrainingArguments(
        folder,
        max_steps=max_steps,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    trainer = Trainer(
        model,
        arguments,
        data_collator=default_data_collator,
        train_dataset=DATA,
        callbacks=[LighthouseSwitch(stage1_steps), record],
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer, record


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    register_lighthouse(CONFIG, full_attn_layers=[-1], pool_rotary="aligned")
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, *run(folder)


def test_the_switch_is_between_two_steps(undisturbed):
    _, _, record = undisturbed
    steps = range(1, NUM_STEPS + 1)
    assert [record.attention[step] for step in steps] == ["lighthouse"] * 3 + ["sdpa"] * 3


@pytest.mark.parametrize("step", range(1, NUM_STEPS))
def test_resumed_at_any_step(undisturbed, tmp_path, step):
    folder, trainer, record = undisturbed
    # The new model has other weights, so those of the checkpoint must be loaded.
    resumed, found = run(tmp_path, checkpoint=str(folder / f"checkpoint-{step}"), seed=1)
    rest = range(step + 1, NUM_STEPS + 1)
    assert found.losses == {i: record.losses[i] for i in rest}
    assert found.attention == {i: record.attention[i] for i in rest}
    expected = trainer.model.state_dict()
    assert all(torch.equal(x, expected[name]) for name, x in resumed.model.state_dict().items())


@pytest.mark.parametrize(("stage1_steps", "expected"), [(0, "sdpa"), (-1, "lighthouse")])
def test_one_stage(stage1_steps, expected, tmp_path):
    register_lighthouse(CONFIG, pool_rotary="aligned")
    _, record = run(tmp_path, stage1_steps, max_steps=1)
    assert record.attention == {1: expected}


@pytest.mark.parametrize("place", ["model", "arguments"])
def test_with_gradient_checkpointing(place, undisturbed, tmp_path):
    register_lighthouse(CONFIG, full_attn_layers=[-1], pool_rotary="aligned")
    _, trainer, record = undisturbed
    kwargs = gradient_checkpointing_kwargs()
    if place == "model":
        found, losses = run(tmp_path, checkpointing=kwargs)
        # TensorBoard's callback writes them.
        found.args.to_json_string()
    else:
        options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": kwargs}
        found, losses = run(tmp_path, **options)
    assert found.model.is_gradient_checkpointing
    assert losses.losses == record.losses
    expected = trainer.model.state_dict()
    assert all(torch.equal(x, expected[name]) for name, x in found.model.state_dict().items())
