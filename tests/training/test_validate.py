"""Held-out loss: reproducible, a correct mean, and without an effect on training."""

import pytest
import torch
import torch.nn.functional as F
from runs import SEQ_LEN, STEPS, assert_same_state, command_line, train, trainer_of
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.experiments.lighthouse import metrics
from torchtitan.experiments.lighthouse.config.load import load_config
from torchtitan.experiments.lighthouse.data.byte_tokenizer import BYTE_TOKENIZER_PATH
from torchtitan.experiments.lighthouse.data.datasets import is_held_out
from torchtitan.experiments.lighthouse.data.packing import PackedTextDataset

VALIDATION = {"validation__enable": True, "validation__freq": 2}


@pytest.fixture
def trainer(tmp_path, corpus):
    """A trainer in stage 1 before its first step."""
    args = command_line(tmp_path, corpus, checkpoint__enable=False, **VALIDATION)
    with trainer_of(load_config(args)) as trainer:
        assert trainer.should_continue_training() and trainer.stage == 1
        yield trainer


def validation_losses(trainer, count: int) -> list[float]:
    """Losses of several validations. Each has its own step in the metrics."""
    for step in range(101, 101 + count):
        trainer.validator.validate(trainer.model_parts, step)
    folder = trainer.job_config.job.dump_folder
    lines = metrics.read_metrics(folder, metrics.VALIDATION_LOSS)
    return [line[metrics.VALIDATION_LOSS] for line in lines if line["step"] > 100]


def test_the_loss_is_the_same_when_asked_twice(trainer):
    first, second, third = validation_losses(trainer, 3)
    assert first == second == third
    assert first > 0


def test_the_loss_is_the_mean_over_the_first_held_out_windows(trainer, corpus):
    (loss,) = validation_losses(trainer, 1)
    # Two batches of two windows.
    tokenizer = HuggingFaceTokenizer(BYTE_TOKENIZER_PATH)
    windows = iter(PackedTextDataset("text", str(corpus), tokenizer, SEQ_LEN, split="validation"))
    (model,) = trainer.model_parts
    losses = []
    with torch.no_grad():
        for _ in range(4):
            inputs, labels = next(windows)
            logits = model(inputs["input"].unsqueeze(0))[0]
            losses.append(F.cross_entropy(logits.double(), labels).item())
    assert loss == pytest.approx(sum(losses) / 4, rel=1e-6)
    # The windows differ, so a mean over fewer or other windows would differ.
    assert len({round(loss, 4) for loss in losses}) > 1


def test_the_text_was_not_trained_on(trainer, corpus):
    held_out = {path.read_text() for path in corpus.iterdir() if is_held_out(path.read_text())}
    batch, _ = next(iter(trainer.validator.dataloader))
    tokens = batch["input"].flatten().tolist()
    text = bytes(token if token < 256 else 0 for token in tokens).decode()
    whole_documents = text.split("\0")[:-1]
    assert len(whole_documents) >= 2 and whole_documents[0] in held_out


def test_the_model_is_left_training_and_its_state_untouched(trainer):
    (model,) = trainer.model_parts
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    validation_losses(trainer, 1)
    assert all(module.training for module in model.modules())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.grad is None


def test_training_is_the_same_with_and_without(corpus, tmp_path):
    options = {"checkpoint__enable": False}
    without = train(command_line(tmp_path / "without", corpus, **options))
    validated = train(command_line(tmp_path / "with", corpus, **options, **VALIDATION))
    assert validated.losses == without.losses and len(without.losses) == STEPS
    assert validated.batches == without.batches
    assert_same_state(validated, without)

    # Every second step, after the last step, and at the switch with both kinds of attention.
    lines = metrics.read_metrics(tmp_path / "with", metrics.VALIDATION_LOSS)
    assert [(line["step"], line["stage"]) for line in lines] == [
        *[(2, 1), (3, 1), (3, 2), (4, 2), (6, 2), (7, 2)]
    ]
    losses = [line[metrics.VALIDATION_LOSS] for line in lines]
    assert len({*losses}) == len(losses) and losses[-1] < losses[0] - 0.5
