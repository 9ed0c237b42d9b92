"""The two-stage trainer: the switch, and resumed runs that are equal in every bit.

Losses, parameters, optimizer moments and token ids are compared exactly, on one rank and on two
FSDP ranks over gloo.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from ranks import launch
from runs import (
    N_LAYERS,
    SEQ_LEN,
    STAGE1_STEPS,
    STEPS,
    RecordedPlainTrainer,
    RecordedTrainer,
    Run,
    assert_continues,
    assert_same_state,
    command_line,
    handover_of,
    losses_of,
    saved_keys,
    train,
)
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.experiments.lighthouse import metrics
from torchtitan.experiments.lighthouse.checkpoint.files import checkpoint_steps
from torchtitan.experiments.lighthouse.data.byte_tokenizer import BYTE_TOKENIZER_PATH
from torchtitan.experiments.lighthouse.data.packing import PackedTextDataset
from torchtitan.experiments.lighthouse.launch import TRAINER

LIGHTHOUSE, DENSE = "LighthouseAttention", "ScaledDotProductAttentionWrapper"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, corpus) -> Run:
    return train(command_line(tmp_path_factory.mktemp("undisturbed"), corpus))


def train_with_stops(folder: Path, corpus: Path, stops: Sequence[int], **overrides) -> list[Run]:
    """The runs up to each stop and to the end, in one dump folder."""
    return [
        train(
            command_line(
                folder,
                corpus,
                training__steps=steps,
                # A run that ends in stage 1 has no switch yet.
                lighthouse__stage1_steps=STAGE1_STEPS if steps >= STAGE1_STEPS else -1,
                **overrides,
            )
        )
        for steps in (*stops, STEPS)
    ]


# ---- the switch


def test_the_switch_happens_between_two_steps(undisturbed):
    lighthouse = [DENSE, *[LIGHTHOUSE] * (N_LAYERS - 2), DENSE]
    expected = [lighthouse] * STAGE1_STEPS + [[DENSE] * N_LAYERS] * (STEPS - STAGE1_STEPS)
    assert list(undisturbed.attention.values()) == expected
    lines = metrics.read_metrics(undisturbed.folder, metrics.LOSS)
    assert [(line["step"], line["stage"]) for line in lines] == [
        (step, 1 if step <= STAGE1_STEPS else 2) for step in range(1, STEPS + 1)
    ]
    switches = metrics.read_metrics(undisturbed.folder, "lighthouse/switch")
    assert [line["step"] for line in switches] == [STAGE1_STEPS]
    # The text was repeated during the run, and the loss falls.
    assert undisturbed.epoch >= 1
    assert undisturbed.losses[STEPS] < undisturbed.losses[1] - 2


def test_the_handover_record(undisturbed, corpus):
    record = handover_of(undisturbed.folder)
    tokenizer = HuggingFaceTokenizer(BYTE_TOKENIZER_PATH)
    dataset = PackedTextDataset("text", str(corpus), tokenizer, SEQ_LEN)
    windows = iter(dataset)
    for _ in range(STAGE1_STEPS):
        next(windows)
    lines = metrics.read_metrics(undisturbed.folder, metrics.LOSS)
    assert record.pop("before") == record["after"]
    assert record.pop("after").keys() == {"parameters", "optimizer"}
    assert record == {
        **{"from": "lighthouse", "to": "full", "seq_len": SEQ_LEN},
        "step": STAGE1_STEPS,
        # The learning rate of the next step.
        "learning_rate": lines[STAGE1_STEPS]["lr"],
        "tokens_seen_per_rank": STAGE1_STEPS * SEQ_LEN,
        "data": [dataset.position()],
    }
    assert lines[STAGE1_STEPS]["lr"] != lines[STAGE1_STEPS - 1]["lr"]


def test_a_checkpoint_is_saved_at_the_switch_and_at_the_end(undisturbed):
    saved = checkpoint_steps(undisturbed.folder / "checkpoint")
    assert saved == {STAGE1_STEPS: True, STEPS: True}


def test_the_checkpoint_of_the_switch_is_never_purged(corpus, tmp_path):
    train(command_line(tmp_path, corpus, checkpoint__interval=2, checkpoint__keep_latest_k=2))
    # Step 2 is purged. The last save purges nothing.
    assert checkpoint_steps(tmp_path / "checkpoint") == {3: True, 4: True, 6: True, 7: True}


def test_without_a_switch(corpus, tmp_path):
    run = train(command_line(tmp_path, corpus, training__steps=2, lighthouse__stage1_steps=-1))
    assert {LIGHTHOUSE in attention for attention in run.attention.values()} == {True}
    assert [line["stage"] for line in metrics.read_metrics(tmp_path, metrics.LOSS)] == [1, 1]
    assert checkpoint_steps(tmp_path / "checkpoint") == {2: True}
    assert not (tmp_path / "handover.json").exists()


def test_flops_per_token_of_each_stage(undisturbed):
    # dim 128, 4 layers, 2 heads of 64, feed-forward width 512, vocabulary 320.
    layer = 4 * 128 * 128 + 3 * 128 * 512 + 2 * 128
    parameters = 4 * layer + 128 + 128 * 320
    # q·k and p·v: 6 FLOPs each per channel and attended position.
    attention = 6 * 2 * 128
    dense = 6 * parameters + 4 * attention * 768
    # Two of the four layers attend over S = 768/2 + 2*128 = 640 entries for 768 tokens.
    lighthouse = 6 * parameters + 2 * attention * 768 + 2 * attention * (640 * 640 / 768)
    assert dense == 11_262_720 and lighthouse == 10_541_824
    assert undisturbed.flops_per_token == {
        step: lighthouse if step <= STAGE1_STEPS else dense for step in range(1, STEPS + 1)
    }


# ---- stopped and resumed


@pytest.mark.parametrize(
    "stops", [*[(step,) for step in range(1, STEPS)], (2, 5), tuple(range(1, STEPS))], ids=str
)
def test_a_stopped_run_goes_on_as_if_it_had_not_been(undisturbed, corpus, tmp_path, stops):
    runs = train_with_stops(tmp_path, corpus, stops)
    assert_continues(runs, undisturbed)
    assert runs[-1].losses == undisturbed.losses
    assert handover_of(tmp_path) == handover_of(undisturbed.folder)


class Preempted(Exception):
    """Simulates the failure of a machine."""


class PreemptedTrainer(RecordedTrainer):
    """Ends without cleanup, directly after the switch."""

    last_step: int

    def should_continue_training(self):
        goes_on = super().should_continue_training()
        if self.step == self.last_step:
            raise Preempted
        return goes_on


@pytest.mark.parametrize(("last_step", "saved_step"), [(1, 0), (3, 3), (5, 4)])
def test_a_preempted_run_repeats_what_was_not_saved(
    undisturbed, corpus, tmp_path, monkeypatch, last_step, saved_step
):
    monkeypatch.setattr(PreemptedTrainer, "last_step", last_step, raising=False)
    args = command_line(tmp_path, corpus, checkpoint__interval=2)
    with pytest.raises(Preempted):
        train(args, PreemptedTrainer)
    assert max(checkpoint_steps(tmp_path / "checkpoint"), default=0) == saved_step
    run = train(args)
    steps = range(saved_step + 1, STEPS + 1)
    assert run.batches == {step: undisturbed.batches[step] for step in steps}
    assert run.losses == undisturbed.losses
    assert_same_state(run, undisturbed)
    assert handover_of(tmp_path) == handover_of(undisturbed.folder)


def test_a_new_process_takes_the_switch_as_the_first_would_have(undisturbed, corpus, tmp_path):
    train(command_line(tmp_path, corpus, training__steps=STAGE1_STEPS))
    assert not (tmp_path / "handover.json").exists()
    result = subprocess.run(
        [*TRAINER, *command_line(tmp_path, corpus)],
        # One thread, as in the runs in this process.
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "Stage switch after step 3: Lighthouse to dense" in result.stdout + result.stderr
    assert handover_of(tmp_path) == handover_of(undisturbed.folder)
    assert losses_of(tmp_path) == undisturbed.losses


def test_a_dense_configuration_goes_on_from_the_checkpoint_of_the_switch(
    undisturbed, corpus, tmp_path
):
    checkpoint = undisturbed.folder / "checkpoint" / f"step-{STAGE1_STEPS}"
    options = {"lighthouse__stage1_steps": 0, "checkpoint__initial_load_path": checkpoint}
    run = train(command_line(tmp_path, corpus, **options))
    steps = range(STAGE1_STEPS + 1, STEPS + 1)
    assert run.losses == {step: undisturbed.losses[step] for step in steps}
    assert run.batches == {step: undisturbed.batches[step] for step in steps}
    assert_same_state(run, undisturbed)


def test_a_fault_of_the_data_ends_the_run_with_one_line(corpus, tmp_path):
    broken = tmp_path / "corpus"
    shutil.copytree(corpus, broken)
    options = {"training__dataset_path": broken, "checkpoint__interval": 2}
    args = command_line(tmp_path / "run", corpus, **options)
    trainer = subprocess.Popen([*TRAINER, *args], stderr=subprocess.PIPE, text=True)
    # All documents change, except those read first.
    while not (tmp_path / "run" / "checkpoint" / "step-2" / ".metadata").exists():
        time.sleep(0.01)
        assert trainer.poll() is None
    for path in broken.iterdir():
        path.write_text(path.read_text() + "more")
    _, errors = trainer.communicate(timeout=300)
    assert trainer.returncode == 1
    (error,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: rank 0: training.dataset_path")
    assert f"the last good checkpoint is {tmp_path}/run/checkpoint/step-" in error
    assert "Traceback" not in errors


# ---- plain torchtitan


def test_a_dense_run_is_torchtitans(undisturbed, corpus, tmp_path):
    ours, plain = (
        train(command_line(tmp_path / name, corpus, lighthouse__stage1_steps=0), trainer_class)
        for name, trainer_class in (("ours", RecordedTrainer), ("plain", RecordedPlainTrainer))
    )
    assert ours.losses == plain.losses and len(plain.losses) == STEPS
    assert_continues([ours], plain)
    assert {*map(tuple, plain.attention.values())} == {(DENSE,) * N_LAYERS}
    assert plain.losses != undisturbed.losses
    assert not (ours.folder / "handover.json").exists()
    # Plain torchtitan can load a checkpoint of either stage.
    keys = saved_keys(plain, STEPS)
    for step in (STAGE1_STEPS, STEPS):
        assert saved_keys(undisturbed, step) == keys
    assert {*map(tuple, undisturbed.keys.values())} == {tuple(plain.keys[1])}


@pytest.fixture(scope="module")
def without_recomputation(corpus, tmp_path_factory) -> Run:
    return train_four_steps(tmp_path_factory.mktemp("none"), corpus)


def train_four_steps(folder: Path, corpus: Path, look=None, **overrides) -> Run:
    options = {"training__steps": 4, "lighthouse__stage1_steps": 2, "checkpoint__enable": False}
    return train(command_line(folder, corpus, **options, **overrides), look=look)


@pytest.mark.parametrize("scorer", ["dilated", "gla"])
def test_two_stages_with_another_scorer(without_recomputation, corpus, tmp_path, scorer):
    by_norm = without_recomputation
    run = train_four_steps(tmp_path, corpus, lighthouse__scorer=scorer)
    assert run.batches == by_norm.batches and run.attention == by_norm.attention
    assert run.keys == by_norm.keys
    # The selection differs from the first step on, and the loss falls.
    assert run.losses[1] != by_norm.losses[1]
    assert run.losses[4] < run.losses[1] - 1
    # In stage 1, for the scores of two layers with two heads of 64. None in stage 2.
    positions = {"dilated": 2 * SEQ_LEN / 4, "gla": 2 * 64}[scorer]
    scoring = 2 * positions * 2 * 64 * 4
    for step, flops in by_norm.flops_per_token.items():
        assert run.flops_per_token[step] == pytest.approx(flops + (scoring if step <= 2 else 0))


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_activation_checkpointing_changes_nothing(without_recomputation, corpus, tmp_path, mode):
    wrapped = []

    def look(trainer):
        blocks = trainer.model_parts[0].layers.values()
        wrapped.extend(isinstance(block, CheckpointWrapper) for block in blocks)

    run = train_four_steps(
        tmp_path,
        corpus,
        look,
        activation_checkpoint__mode=mode,
        activation_checkpoint__selective_ac_option="op",
    )
    assert wrapped == [True] * N_LAYERS
    assert run.losses == without_recomputation.losses
    assert_continues([run], without_recomputation)


# ---- two ranks

STOPS = [(STAGE1_STEPS,), (2, 5)]


def run_on_two_ranks(folder: Path, corpus: Path) -> dict[Any, list[Run]]:
    """All runs of the tests below, in one group of processes."""
    # Two batches per step and rank.
    options = {"training__global_batch_size": 4}
    validation = {"validation__enable": True, "validation__freq": 2}
    return {
        (): train_with_stops(folder / "undisturbed", corpus, (), **options),
        "validated": train_with_stops(folder / "validated", corpus, (), **options, **validation),
        **{
            stops: train_with_stops(folder / "-".join(map(str, stops)), corpus, stops, **options)
            for stops in STOPS
        },
    }


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, corpus) -> list[dict[Any, list[Run]]]:
    """The runs of each rank."""
    folder = tmp_path_factory.mktemp("two")
    return launch(run_on_two_ranks, 2, folder / "results", folder, corpus)


@pytest.mark.parametrize("stops", STOPS, ids=str)
def test_a_stopped_run_goes_on_on_two_ranks(two_ranks, stops):
    for runs in two_ranks:
        (expected,) = runs[()]
        assert expected.epoch >= 1
        assert_continues(runs[stops], expected)
    stopped, (expected,) = two_ranks[0][stops][-1], two_ranks[0][()]
    assert stopped.losses == expected.losses and len(expected.losses) == STEPS
    assert handover_of(stopped.folder) == handover_of(expected.folder)


def test_two_ranks_share_model_and_data(two_ranks, undisturbed):
    (first,), (second,) = (runs[()] for runs in two_ranks)
    digests = [
        digest for run in (first, second) for step in run.batches.values() for digest in step
    ]
    assert len(digests) == 2 * 2 * STEPS
    assert first.batches[1] != second.batches[1]
    for name, parameter in undisturbed.parameters.items():
        shards = first.parameters[name], second.parameters[name]
        assert sum(shard.numel() for shard in shards) == parameter.numel()
    record = handover_of(first.folder)
    assert record["before"] == record["after"]
    assert record["tokens_seen_per_rank"] == STAGE1_STEPS * 2 * SEQ_LEN
    assert len(record["data"]) == 2
    # The keys are those of a plain model, with and without Lighthouse.
    assert {*map(tuple, first.keys.values())} == {tuple(undisturbed.keys[1])}


def test_validation_changes_nothing_on_two_ranks(two_ranks):
    for runs in two_ranks:
        assert_continues(runs["validated"], *runs[()])
    (validated,), (expected,) = two_ranks[0]["validated"], two_ranks[0][()]
    assert validated.losses == expected.losses
    lines = metrics.read_metrics(validated.folder, metrics.VALIDATION_LOSS)
    assert [(line["step"], line["stage"]) for line in lines] == [
        *[(2, 1), (3, 1), (3, 2), (4, 2), (6, 2), (7, 2)]
    ]
