"""Stage 2 on pieces of a sequence equals training on short sequences, and resumes exactly.

Losses, gradients, parameters and moments are compared in every bit, on one rank and on two.
`test_parallelism.py` tests that ranks with a shared batch train like one process.
`tests/planner/test_plan.py` tests that their attention needs no communication.
"""

import itertools
from pathlib import Path
from unittest import mock

import pytest
import torch
from ranks import launch
from runs import (
    N_LAYERS,
    SEQ_LEN,
    STAGE1_STEPS,
    STEPS,
    Run,
    SharedTrainer,
    assert_continues,
    assert_same_state,
    command_line,
    handover_of,
    train,
    trainer_of,
)
from torchtitan.experiments.lighthouse import metrics
from torchtitan.experiments.lighthouse.config.job_config import JobConfig, Lighthouse, Training
from torchtitan.experiments.lighthouse.config.load import load_config

PIECE_LEN, FULL_STEPS = 256, 2
LAST_PIECE_STEP = STEPS - FULL_STEPS
OPTIONS = {"lighthouse__stage2_seq_len": PIECE_LEN, "lighthouse__stage2_full_steps": FULL_STEPS}
PHASES = [
    *["lighthouse"] * STAGE1_STEPS,
    *["pieces"] * (LAST_PIECE_STEP - STAGE1_STEPS),
    *["full"] * FULL_STEPS,
]


def test_the_last_steps_of_the_phases():
    for stage1_steps, seq_len, full_steps in itertools.product((-1, 0, 3, 7), (0, 4), (0, 2, 4)):
        config = JobConfig(
            training=Training(steps=7, seq_len=8),
            lighthouse=Lighthouse(
                stage1_steps=stage1_steps, stage2_seq_len=seq_len, stage2_full_steps=full_steps
            ),
        )
        expected = {config.phase_of(step): step for step in range(1, 8)}
        assert list(config.last_steps().items()) == list(expected.items())
    # It takes no time for a run without a planned end.
    assert JobConfig(training=Training(steps=2**62)).last_steps() == {"lighthouse": 2**62}


# ---- as short sequences


class WindowsTrainer(SharedTrainer):
    """Reads the same random windows for any sequence length, and records the gradients."""

    def windows(self):
        dice = torch.Generator().manual_seed(0)
        while True:
            yield torch.randint(0, 256, (SEQ_LEN + 1,), generator=dice)

    def forward_backward_step(self, **batch):
        loss = super().forward_backward_step(**batch)
        for name, parameter in self.model_parts[0].named_parameters():
            gradient = parameter.grad
            local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
            self.gradients.setdefault(f"{self.step} {name}", []).append(local.clone())
        return loss


def train_on_pieces_and_short(folder: Path, corpus: Path) -> dict[str, tuple[Run, dict]]:
    """Two micro-batches per step and rank, of pieces and of equally short sequences."""
    num_pieces = SEQ_LEN // PIECE_LEN
    num_ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    dense = {"lighthouse__stage1_steps": 0, "training__steps": 3, "checkpoint__enable": False}
    layouts = {
        "pieces": {
            "lighthouse__stage2_seq_len": PIECE_LEN,
            "training__global_batch_size": 2 * num_ranks,
        },
        "short": {
            "training__seq_len": PIECE_LEN,
            "validation__seq_len": PIECE_LEN,
            "training__local_batch_size": num_pieces,
            "training__global_batch_size": 2 * num_ranks * num_pieces,
        },
    }
    results = {}
    for name, layout in layouts.items():
        gradients = {}
        with mock.patch.object(WindowsTrainer, "gradients", gradients, create=True):
            args = command_line(folder / name, corpus, **dense, **layout)
            results[name] = train(args, WindowsTrainer), gradients
    return results


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_pieces_are_trained_as_short_sequences(corpus, tmp_path, num_ranks):
    args = tmp_path / "runs", corpus
    if num_ranks == 1:
        ranks = [train_on_pieces_and_short(*args)]
    else:
        ranks = launch(train_on_pieces_and_short, num_ranks, tmp_path / "ranks", *args)
    for results in ranks:
        (pieces, gradients), (short, expected) = results["pieces"], results["short"]
        assert pieces.losses == short.losses and len(pieces.losses) == 3
        assert gradients.keys() == expected.keys() and len(gradients) > 3 * N_LAYERS
        for name, found in gradients.items():
            assert len(found) == 2 and found[1].any()
            assert all(map(torch.equal, found, expected[name])), name
        assert_same_state(pieces, short)
        assert pieces.flops_per_token == short.flops_per_token


# ---- changes of the phase


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, corpus) -> Run:
    return train(command_line(tmp_path_factory.mktemp("undisturbed"), corpus, **OPTIONS))


def phases_of(folder: Path) -> list[str]:
    return [line["phase"] for line in metrics.read_metrics(folder, metrics.LOSS)]


def test_each_change_is_recorded(undisturbed, corpus, tmp_path):
    folder = undisturbed.folder
    assert phases_of(folder) == PHASES
    for metric, step in (
        (metrics.SWITCH, STAGE1_STEPS),
        (metrics.FULL_LENGTH, LAST_PIECE_STEP),
    ):
        assert [line["step"] for line in metrics.read_metrics(folder, metric)] == [step]
    record = handover_of(folder)
    finish = record.pop("full_length")
    for change, phases, seq_len, step in (
        (record, ("lighthouse", "pieces"), PIECE_LEN, STAGE1_STEPS),
        (finish, ("pieces", "full"), SEQ_LEN, LAST_PIECE_STEP),
    ):
        assert (change["from"], change["to"]) == phases
        assert (change["seq_len"], change["step"]) == (seq_len, step)
        assert change["tokens_seen_per_rank"] == step * SEQ_LEN
        assert change["before"] == change["after"]
    assert finish["after"] != record["after"]
    # Pieces and whole sequences give different losses after the same stage 1, on the same batches.
    whole = train(command_line(tmp_path, corpus))
    assert whole.batches == undisturbed.batches
    for step, loss in whole.losses.items():
        assert (loss == undisturbed.losses[step]) == (step <= STAGE1_STEPS)
    # Attention over a third of the length costs a third.
    attention = 6 * 2 * 128 * N_LAYERS
    for step, flops in whole.flops_per_token.items():
        saved = attention * (SEQ_LEN - PIECE_LEN) if PHASES[step - 1] == "pieces" else 0
        assert undisturbed.flops_per_token[step] == flops - saved


@pytest.mark.parametrize("stops", [(STAGE1_STEPS,), (LAST_PIECE_STEP,), (4, 6)], ids=str)
def test_a_stopped_run_goes_on_in_its_phase(undisturbed, corpus, tmp_path, stops):
    runs = []
    for steps in (*stops, STEPS):
        options = {
            "training__steps": steps,
            "lighthouse__stage2_seq_len": PIECE_LEN,
            "lighthouse__stage2_full_steps": max(0, steps - LAST_PIECE_STEP),
        }
        runs.append(train(command_line(tmp_path, corpus, **options)))
    assert_continues(runs, undisturbed)
    assert runs[-1].losses == undisturbed.losses
    assert phases_of(tmp_path) == PHASES
    assert handover_of(tmp_path) == handover_of(undisturbed.folder)


def test_the_finish_is_recorded_without_a_record_of_the_switch(corpus, tmp_path):
    (tmp_path / "handover.json").write_text("[1, 2")
    options = {"lighthouse__stage1_steps": 0, "training__steps": 2, "checkpoint__enable": False}
    args = command_line(tmp_path, corpus, **options, lighthouse__stage2_seq_len=PIECE_LEN)
    train([*args, "--lighthouse.stage2_full_steps", "1"])
    record = handover_of(tmp_path)
    assert record.keys() == {"full_length"} and record["full_length"]["step"] == 1


def test_each_phase_compiles_once_and_validation_keeps_its_length(corpus, tmp_path):
    options = {
        **OPTIONS,
        "lighthouse__full_attn_layers": [],
        "compile__enable": True,
        "compile__backend": "aot_eager",
        "checkpoint__enable": False,
        "validation__enable": True,
        "validation__freq": 1,
        # Two sequences per batch, because a dimension of 1 is never dynamic.
        "training__local_batch_size": 2,
    }
    graphs, shapes = [], set()
    counters = torch._dynamo.utils.counters["stats"]
    with (
        torch._dynamo.config.patch(automatic_dynamic_shapes=True),
        trainer_of(load_config(command_line(tmp_path, corpus, **options))) as trainer,
    ):
        torch._dynamo.reset()
        counters.clear()
        (model,) = trainer.model_parts
        model.register_forward_pre_hook(
            lambda model, args: shapes.add((model.training, *args[0].shape))
        )
        batches = trainer.batch_generator(trainer.dataloader)
        while trainer.should_continue_training():
            trainer.step += 1
            trainer.train_step(batches)
            trainer.validator.validate(trainer.model_parts, trainer.step)
            graphs.append(counters["unique_graphs"])
        torch._dynamo.reset()
    assert shapes == {
        (True, 2, SEQ_LEN),
        (True, 2 * SEQ_LEN // PIECE_LEN, PIECE_LEN),
        (False, 2, SEQ_LEN),
    }
    new = [after - before for before, after in itertools.pairwise([0, *graphs])]
    # A layer and the loss are compiled for training, and for validation with both attentions.
    firsts = {1: 4, STAGE1_STEPS + 1: 3, LAST_PIECE_STEP + 1: 1}
    assert new == [firsts.get(step, 0) for step in range(1, STEPS + 1)], new
