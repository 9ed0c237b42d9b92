"""A run resumes only with the configuration of its checkpoint, or names the changed field."""

import json
import shutil
from pathlib import Path

import pytest
import torch.distributed.checkpoint as dcp
from refusals import refused
from runs import command_line, train, trainer_of, write_corpus
from torchtitan.experiments.lighthouse.checkpoint.compatibility import (
    FIELDS,
    FILE_NAME,
    record_of,
    write_record,
)
from torchtitan.experiments.lighthouse.config.load import load_config
from torchtitan.experiments.lighthouse.data.byte_tokenizer import BYTE_TOKENIZER_PATH
from torchtitan.experiments.lighthouse.flavors import FLAVORS
from torchtitan.experiments.lighthouse.preflight import check_config, warnings_of
from torchtitan.experiments.lighthouse.train import TwoStageTrainer
from torchtitan.models.llama3 import Transformer


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, Path]:
    """The folder and corpus of a run of 7 steps that stopped after 2 steps with Lighthouse."""
    folder = tmp_path_factory.mktemp("run")
    corpus = write_corpus(folder / "corpus")
    train(command_line(folder / "run", corpus, training__steps=2, lighthouse__stage1_steps=-1))
    return folder / "run", corpus


def check(run, tmp_path, *args: str, **overrides) -> None:
    folder, corpus = run
    shutil.copytree(folder, tmp_path / "run")
    options = command_line(tmp_path / "run", corpus, **overrides)
    check_config(load_config([*options, *args]), world_size=1)


def trained_with(run, folder: Path, left_out: tuple[str, ...] = (), **values) -> tuple[Path, Path]:
    """A copy of the run whose record has other values, and lacks the fields `left_out`."""
    shutil.copytree(run[0], folder)
    path = folder / "checkpoint" / "step-2"
    record = json.loads((path / FILE_NAME).read_text())
    record |= {name.replace("__", "."): value for name, value in values.items()}
    write_record(path, {name: record[name] for name in record if name not in left_out})
    return folder, run[1]


def test_every_checkpoint_says_what_it_was_trained_with(run):
    record = json.loads((run[0] / "checkpoint" / "step-2" / FILE_NAME).read_text())
    config = load_config(command_line(*run, training__steps=2, lighthouse__stage1_steps=-1))
    assert record == record_of(config, data_parallel_degree=1)
    assert record_of(config, data_parallel_degree=4)["training.global_batch_size"] == 4
    assert record.keys() == {*FIELDS, "training.steps"}
    assert record["model.flavor"]["dim"] == 128 and record["model.flavor"]["vocab_size"] == 320
    assert len(record["model.hf_assets_path"]) == 64
    assert record["optimizer.name"] == "AdamW"
    # 1 sequence on 1 rank. The schedule has its own length.
    assert record["training.global_batch_size"] == 1
    assert record["lr_scheduler.total_steps"] == 7


CHANGES = {
    "lighthouse.topk": ({"lighthouse__topk": 384}, "128, got 384; set it to 128"),
    "lighthouse.num_levels": ({"lighthouse__num_levels": 3}, "2, got 3"),
    "lighthouse.pooling_factor": ({"lighthouse__pooling_factor": 4}, "2, got 4"),
    "lighthouse.scorer": ({"lighthouse__scorer": "gla"}, "'norm', got 'gla'"),
    "lighthouse.pool_rotary": (
        {"lighthouse__pool_rotary": "aligned"},
        "'averaged', got 'aligned'; set it to 'averaged'",
    ),
    "lighthouse.full_attn_layers": ({"lighthouse__full_attn_layers": [0]}, "[0, -1], got [0]"),
    "lighthouse.stage1_steps": ({"lighthouse__stage1_steps": 1}, "-1, got 1"),
    "training.seq_len": ({"training__seq_len": 1024}, "768, got 1024"),
    "training.global_batch_size": ({"training__local_batch_size": 2}, "1, got 2"),
    "training.max_norm": ({"training__max_norm": 0.5}, "1.0, got 0.5; set it to 1.0"),
    "lr_scheduler.total_steps": ({"lr_scheduler__total_steps": 9}, "7, got 9"),
    "optimizer.name": ({"optimizer__name": "Adam"}, "'AdamW', got 'Adam'"),
    "optimizer.lr": ({"optimizer__lr": 5e-3}, "0.01, got 0.005; set it to 0.01"),
    "optimizer.beta1": ({"optimizer__beta1": 0.8}, "0.9, got 0.8"),
    "optimizer.beta2": ({"optimizer__beta2": 0.9}, "0.95, got 0.9"),
    "optimizer.eps": ({"optimizer__eps": 1e-7}, "1e-08, got 1e-07"),
    "optimizer.weight_decay": ({"optimizer__weight_decay": 0.2}, "0.1, got 0.2"),
    "lr_scheduler.warmup_steps": ({"lr_scheduler__warmup_steps": 1}, "2, got 1"),
    "lr_scheduler.decay_ratio": ({"lr_scheduler__decay_ratio": 0.5}, "0.7, got 0.5"),
    "lr_scheduler.decay_type": ({"lr_scheduler__decay_type": "sqrt"}, "'linear', got 'sqrt'"),
    "lr_scheduler.min_lr_factor": ({"lr_scheduler__min_lr_factor": 0.1}, "0.0, got 0.1"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_stops_the_run_unless_it_is_accepted(run, tmp_path, name):
    overrides, part = CHANGES[name]
    path = tmp_path / "run" / "checkpoint" / "step-2"
    accept = f'accept the change with checkpoint.accept_changes = ["{name}"]'
    with refused(f"{name} must be that of {path}, {part}", accept):
        check(run, tmp_path, **overrides)
    check(run, tmp_path / "accepted", "--checkpoint.accept_changes", name, **overrides)


def test_checkpoints_from_before_the_field_were_trained_with_averaged_phases(run, tmp_path):
    old = trained_with(run, tmp_path / "old", left_out=("lighthouse.pool_rotary",))
    check(old, tmp_path / "averaged", lighthouse__pool_rotary="averaged")
    with pytest.raises(ValueError, match=r"lighthouse\.pool_rotary must be .* got 'aligned'"):
        check(old, tmp_path / "aligned", lighthouse__pool_rotary="aligned")


class _RatesTrainer(TwoStageTrainer):
    """Records the hyperparameters of each step."""

    def __init__(self, job_config):
        self.hyperparameters = {}
        super().__init__(job_config)

    def train_step(self, data_iterator):
        (group,) = self.optimizers.optimizers[0].param_groups
        names = ("lr", "betas", "eps", "weight_decay")
        self.hyperparameters[self.step] = {name: group[name] for name in names}
        super().train_step(data_iterator)


def hyperparameters_of(args: list[str]) -> dict[int, dict]:
    with trainer_of(load_config(args), _RatesTrainer) as trainer:
        trainer.train()
        return trainer.hyperparameters


def test_an_accepted_change_of_the_optimizer_is_felt_from_the_next_step_on(run, tmp_path):
    changed = {
        "optimizer__lr": 5e-3,
        "optimizer__beta1": 0.8,
        "optimizer__eps": 1e-7,
        "optimizer__weight_decay": 0.2,
        "lr_scheduler__decay_ratio": 0.5,
    }
    expected = hyperparameters_of(command_line(tmp_path / "throughout", run[1], **changed))
    assert len({values["lr"] for values in expected.values()}) > 3
    shutil.copytree(run[0], tmp_path / "run")
    names = ",".join(name.replace("__", ".") for name in changed)
    args = command_line(tmp_path / "run", run[1], **changed)
    resumed = hyperparameters_of([*args, "--checkpoint.accept_changes", names])
    assert list(resumed) == [3, 4, 5, 6, 7]
    assert resumed == {step: expected[step] for step in resumed}
    # Another run that starts from the checkpoint has its own hyperparameters.
    options = {"checkpoint__initial_load_path": run[0] / "checkpoint" / "step-2"}
    other = hyperparameters_of(command_line(tmp_path / "other", run[1], **options, **changed))
    assert other == resumed


def test_a_longer_run_needs_the_length_of_its_schedule(run, tmp_path):
    args = command_line(tmp_path / "run", run[1])
    i = args.index("--lr_scheduler.total_steps")
    del args[i : i + 2]
    shutil.copytree(run[0], tmp_path / "run")
    check_config(load_config(args), world_size=1)
    config = load_config([*args, "--training.steps", "9"])
    with pytest.raises(ValueError, match=r"^training\.steps, which .* must be .* 7, got 9"):
        check_config(config, world_size=1)


PIECES = {"lighthouse__stage1_steps": 1, "lighthouse__stage2_seq_len": 256}
FULL = {**PIECES, "lighthouse__stage2_full_steps": 5, "training__steps": 7}


@pytest.mark.parametrize(
    ("trained", "now"),
    [
        # The switch may move as long as nothing was trained beyond it.
        *(({}, {"lighthouse__stage1_steps": steps}) for steps in (2, 3, 7, -1)),
        # Stage 1 ended with step 2, so no step of it remains.
        ({}, {"lighthouse__stage1_steps": 2, "lighthouse__topk": 384}),
        ({}, {"lighthouse__dilation": 8}),
        # Stage 2 has not begun.
        ({}, {"lighthouse__stage1_steps": 2, "lighthouse__stage2_seq_len": 0}),
        ({}, {"lighthouse__stage1_steps": 2, "lighthouse__stage2_seq_len": 256}),
        # All steps on pieces are done.
        (FULL, {**FULL, "lighthouse__stage2_seq_len": 384}),
        # Neither the old nor the new end of the pieces has passed.
        ({**PIECES, "training__steps": 7}, {**PIECES, "lighthouse__stage2_full_steps": 3}),
    ],
)
def test_what_no_later_step_feels_may_change(run, tmp_path, trained, now):
    check(trained_with(run, tmp_path / "trained", **trained), tmp_path, **now)


@pytest.mark.parametrize(
    ("trained", "part"),
    [
        # One step was already trained with dense attention.
        ({"lighthouse__stage1_steps": 1}, r"lighthouse\.stage1_steps must .* 1, got 3; set it"),
        ({"lr_scheduler__decay_ratio": None}, r"decay_ratio must .* None, got 0\.7; leave it out"),
    ],
)
def test_a_field_of_the_record_stops_the_run(run, tmp_path, trained, part):
    with pytest.raises(ValueError, match=part):
        check(trained_with(run, tmp_path / "trained", **trained), tmp_path)


@pytest.mark.parametrize(
    ("trained", "now", "part"),
    [
        # Step 2 was trained on pieces, and more such steps remain.
        (PIECES, {"lighthouse__stage2_seq_len": 384}, r"stage2_seq_len must .* 256, got 384; set"),
        (
            {**PIECES, "training__steps": 7},
            {"lighthouse__stage2_seq_len": 0},
            r"stage2_seq_len must .* 256, got 0; set it to 256",
        ),
        ({**PIECES, "lighthouse__stage2_seq_len": 0}, {}, r"stage2_seq_len .* 0, got 256; set it"),
        # The step was trained at full length and would now be on pieces, and vice versa.
        (
            {**PIECES, "lighthouse__stage2_full_steps": 6, "training__steps": 7},
            {},
            r"stage2_full_steps must .* last step on pieces is 1, got 7; set it to 6",
        ),
        (
            {**PIECES, "training__steps": 2},
            {"lighthouse__stage2_full_steps": 6},
            r"stage2_full_steps must .* last step on pieces is 2, got 1; set it to 5",
        ),
        # With a longer run, the same number of last steps at full length are other steps.
        (
            {**PIECES, "training__steps": 2, "lighthouse__stage2_full_steps": 1},
            {"lighthouse__stage2_full_steps": 1},
            r"stage2_full_steps must .* last step on pieces is 1, got 6; set it to 6",
        ),
    ],
)
def test_pieces_that_would_be_others_stop_the_run(run, tmp_path, trained, now, part):
    old = trained_with(run, tmp_path / "trained", **trained)
    with pytest.raises(ValueError, match=r"lighthouse\." + part):
        check(old, tmp_path / "refused", **{**PIECES, **now})
    names = ",".join(f"lighthouse.{name}" for name in ("stage2_seq_len", "stage2_full_steps"))
    args = ("--checkpoint.accept_changes", names)
    check(old, tmp_path / "accepted", *args, **{**PIECES, **now})


def test_checkpoints_from_before_the_fields_were_trained_at_full_length(run, tmp_path):
    added = "lighthouse.stage2_seq_len", "lighthouse.stage2_full_steps", "training.steps"
    old = trained_with(run, tmp_path / "old", added, lighthouse__stage1_steps=1)
    check(old, tmp_path / "full", lighthouse__stage1_steps=1)
    # 768 is the whole sequence.
    check(old, tmp_path / "whole", lighthouse__stage1_steps=1, lighthouse__stage2_seq_len=768)
    with pytest.raises(ValueError, match=r"lighthouse\.stage2_seq_len must .* 0, got 256"):
        check(old, tmp_path / "pieces", **PIECES)


def test_another_run_may_go_on_otherwise_with_the_same_model_and_optimizer(run, tmp_path):
    path = run[0] / "checkpoint" / "step-2"
    options = {"checkpoint__initial_load_path": path, "lighthouse__stage1_steps": 0}
    args = command_line(tmp_path / "other", run[1], **options)
    check_config(load_config(args), world_size=1)
    adam = [*args, "--optimizer.name", "Adam"]
    with pytest.raises(ValueError, match=r"optimizer\.name must be that of .* 'AdamW', got 'Adam'"):
        check_config(load_config(adam), world_size=1)
    # Loading the model alone does not involve the optimizer.
    only = [*adam, "--checkpoint.initial_load_model_only"]
    check_config(load_config(only), world_size=1)
    with pytest.raises(ValueError, match=r"model\.flavor must be the model of .*quickstart"):
        check_config(load_config([*only, "--model.flavor", "quickstart"]), 1)


def test_another_tokenizer_of_the_same_size_is_refused(run, tmp_path):
    tokenizer = json.loads((Path(BYTE_TOKENIZER_PATH) / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    first, second = list(vocab)[:2]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    other = tmp_path / "tokenizer"
    shutil.copytree(BYTE_TOKENIZER_PATH, other)
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=r"model\.hf_assets_path must be that of .* tokenizer"):
        check(run, tmp_path, model__hf_assets_path=other)
    args = ("--checkpoint.accept_changes", "model.hf_assets_path")
    check(run, tmp_path / "accepted", *args, model__hf_assets_path=other)


def test_a_model_that_differs_in_what_no_shape_shows_is_refused(run, tmp_path, monkeypatch):
    args = FLAVORS["debugmodel"]
    monkeypatch.setitem(FLAVORS, "debugmodel", type(args)(**{**vars(args), "rope_theta": 10000}))
    with pytest.raises(ValueError, match=r"model\.flavor .* whose rope_theta is 500000, got 10000"):
        check(run, tmp_path)


def test_a_checkpoint_without_a_record_is_compared_by_its_shapes(run, tmp_path):
    path = tmp_path / "step-8"
    state = Transformer(FLAVORS["debugmodel"]).state_dict()
    dcp.save(state, checkpoint_id=path, no_dist=True)
    options = {
        "checkpoint__initial_load_path": path,
        "checkpoint__initial_load_model_only": True,
    }
    args = command_line(tmp_path / "run", run[1], **options)
    check_config(load_config(args), world_size=1)
    with pytest.raises(ValueError, match=r"whose layers\.0\.feed_forward"):
        other = [*args, "--model.flavor", "quickstart", "--lighthouse.full_attn_layers", "0"]
        check_config(load_config(other), 1)
    whole_state = [*args, "--checkpoint.no_initial_load_model_only"]
    with pytest.raises(ValueError, match=r"must hold the training state .* only the model"):
        check_config(load_config(whole_state), world_size=1)


def test_another_corpus_is_refused_unless_the_data_begin_anew(run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run[1], other)
    document = next(iter(sorted(other.glob("*.txt"))))
    document.write_text(document.read_text() + " ")
    for args in ({}, {"training__dataloader__num_workers": 1}):
        with pytest.raises(ValueError, match=rf"training\.dataset_path .*{document.name}' with"):
            check((run[0], other), tmp_path / f"refused-{len(args)}", **args)
    anew = {"checkpoint__exclude_from_loading": ["dataloader"]}
    check((run[0], other), tmp_path / "anew", **anew)
    path = {"checkpoint__initial_load_path": run[0] / "checkpoint" / "step-2"}
    for stage1_steps in (0, 3):
        options = {**anew, **path, "lighthouse__stage1_steps": stage1_steps}
        config = load_config(command_line(tmp_path / "new", other, **options))
        check_config(config, world_size=1)
        assert any("restarts the data at every" in line for line in warnings_of(config))


def test_a_record_that_cannot_be_read_is_named(run, tmp_path):
    broken, corpus = trained_with(run, tmp_path / "broken")
    (broken / "checkpoint" / "step-2" / FILE_NAME).write_text("{")
    with pytest.raises(ValueError, match=r"step-2/trained_with\.json must record .* not valid"):
        check((broken, corpus), tmp_path)
