"""Checkpoints that changed on disk, were saved between skipped steps, or hold a user's files."""

import json
import logging
import math
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from runs import RecordedTrainer, Run, assert_same_state, command_line, train
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorProperties
from torchtitan.experiments.lighthouse.checkpoint import checksums, files
from torchtitan.experiments.lighthouse.checkpoint.checksums import checksum_fault
from torchtitan.experiments.lighthouse.checkpoint.files import checkpoint_faults, whole_steps
from torchtitan.experiments.lighthouse.checkpoint.resume import documents_state
from torchtitan.experiments.lighthouse.config.load import load_config
from torchtitan.experiments.lighthouse.inference.load_model import open_trained
from torchtitan.experiments.lighthouse.preflight import check_config
from torchtitan.experiments.lighthouse.runtime.errors import TrainingAborted

OPTIONS = {"checkpoint__interval": 2, "training__steps": 4, "lighthouse__stage1_steps": -1}


@pytest.fixture(scope="module")
def saved(tmp_path_factory, corpus) -> tuple[Path, Run]:
    """A run of four steps with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    return folder, train(command_line(folder, corpus, **OPTIONS))


@pytest.fixture
def copied(saved, tmp_path) -> Path:
    shutil.copytree(saved[0], tmp_path / "run")
    return tmp_path / "run" / "checkpoint"


def resume(folder: Path, corpus: Path, **options) -> Run:
    return train(command_line(folder.parent, corpus, **OPTIONS, **options))


def check(folder: Path, corpus: Path, **options) -> None:
    config = load_config(command_line(folder.parent, corpus, **OPTIONS, **options))
    check_config(config, world_size=1)


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.fixture
def warned(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "propagate", True)
    with caplog.at_level(logging.WARNING):
        yield caplog


def test_every_bit_of_a_checkpoint_has_a_checksum(copied):
    path = copied / "step-4"
    assert checksum_fault(path) is None
    assert {"__0_0.distcp", ".metadata"} == {
        name for file in path.glob("*checksums.json") for name in json.loads(file.read_text())
    }
    for name, place in (("__0_0.distcp", 100), ("__0_0.distcp", -1), (".metadata", 9)):
        flip(path / name, place)
        assert checksum_fault(path) == f"{name} is not as it was written: its checksum differs"
        flip(path / name, place)
    assert checksum_fault(path) is None
    # Each file is checked by one of the ranks.
    flip(path / ".metadata", 9)
    assert [checksum_fault(path, part, 2) is None for part in range(2)] == [False, True]


@pytest.mark.parametrize("name", ["9" * 4000, "a\nb", "../__0_0.distcp"])
def test_a_name_that_no_file_has_is_shown_in_short(copied, name):
    (copied / "step-4" / "__9_checksums.json").write_text(json.dumps({name: [0, 0]}))
    assert checksum_fault(copied / "step-4") == f"{name[:80]!r} is no file of it"


@pytest.mark.parametrize("place", ["tensor", "value"])
def test_one_changed_bit_is_noticed_and_the_older_checkpoint_is_used(
    saved, copied, corpus, warned, place
):
    data = copied / "step-4" / "__0_0.distcp"
    # A change in a tensor, and one in a value that is read before the run starts.
    flip(data, data.stat().st_size // 2 if place == "tensor" else 5000)
    resumed = resume(copied, corpus)
    (line,) = [line for line in warned.messages if "cannot be loaded" in line]
    assert f"{copied}/step-4 cannot be loaded: __0_0.distcp is not as it was written" in line
    assert list(resumed.batches) == [3, 4]
    assert_same_state(resumed, saved[1])
    # The checkpoint was written again.
    assert checkpoint_faults(copied) == {2: None, 4: None}


def test_a_changed_bit_without_an_older_checkpoint_ends_the_run(copied, corpus):
    shutil.rmtree(copied / "step-2")
    data = copied / "step-4" / "__0_0.distcp"
    flip(data, data.stat().st_size // 2)
    with pytest.raises(TrainingAborted, match=r"step-4 cannot be loaded: .* checksum differs"):
        resume(copied, corpus)
    # The fault is now found before a run starts, and before a model is opened.
    with pytest.raises(ValueError, match="checksum differs"):
        check(copied, corpus)
    with pytest.raises(ValueError, match="checksum differs"):
        open_trained(copied / "step-4", flavor="debugmodel")


@pytest.mark.parametrize("load_step", [-1, 2])
def test_a_checkpoint_of_a_newer_torch_stops_the_run_and_is_not_purged(
    copied, corpus, monkeypatch, load_step
):
    """torch 2.15 writes a sixth field of `TensorProperties`. Older versions unpack five."""
    metadata = FileSystemReader(copied / "step-4").read_metadata()
    state = (*TensorProperties().__getstate__(), None)
    with monkeypatch.context() as patch:
        patch.setattr(TensorProperties, "__getstate__", lambda self: state)
        (copied / "step-4" / ".metadata").write_bytes(pickle.dumps(metadata))
    for file in copied.glob("step-4/*checksums.json"):
        file.unlink()
    before = {path: path.stat().st_mtime_ns for path in copied.rglob("*")}
    message = (
        rf"^the checkpoint '{copied}/step-4' was written by torch 2\.15 or newer, which torch .* "
        "cannot read; use the torch that wrote it, or move it away to go on without it$"
    )
    with pytest.raises(ValueError, match=message):
        check(copied, corpus, checkpoint__load_step=load_step, checkpoint__keep_latest_k=2)
    with pytest.raises(ValueError, match=message):
        open_trained(copied / "step-4", flavor="debugmodel")
    with pytest.raises(ValueError, match=message):
        whole_steps(copied)
    assert {path: path.stat().st_mtime_ns for path in copied.rglob("*")} == before


def test_the_checksums_can_be_turned_off(copied, corpus, monkeypatch):
    monkeypatch.setattr(checksums, "checksum_fault", None)
    resume(copied, corpus, checkpoint__checksums=False, training__max_norm=1.0)
    monkeypatch.undo()
    shutil.rmtree(copied / "step-4")
    resume(copied, corpus, checkpoint__checksums=False)
    assert not list((copied / "step-4").glob("*checksums.json"))


def test_what_cannot_be_loaded_is_passed_over(saved, copied, corpus, warned, monkeypatch):
    # As written by a version without checksums.
    for file in copied.glob("step-4/*checksums.json"):
        file.unlink()
    infos = files.read_metadata(copied / "step-4").storage_data.items()
    (info,) = (info for index, info in infos if index.fqn == "output.weight")
    with (copied / "step-4" / info.relative_path).open("r+b") as file:
        file.seek(info.offset)
        file.write(bytes(200))
    assert whole_steps(copied) == [2, 4]
    resumed = resume(copied, corpus)
    assert any("step-4 cannot be loaded" in line for line in warned.messages)
    assert_same_state(resumed, saved[1])


class SkippingTrainer(RecordedTrainer):
    """Makes the loss of some steps NaN."""

    bad_steps = ()

    def forward_backward_step(self, **batch):
        loss = super().forward_backward_step(**batch)
        if self.step in self.bad_steps:
            self.model_parts[0].norm.weight.grad.fill_(math.nan)
        return loss


@pytest.mark.parametrize(
    "bad_steps, good",
    [
        # Step 4 was skipped before the save.
        ((4,), [2, 6]),
        # Saved between two skipped steps.
        ((3, 5), [2, 6]),
        # Saved before or after one skipped step.
        ((3,), [2, 4, 6]),
        ((5,), [2, 4, 6]),
    ],
)
def test_a_checkpoint_among_steps_that_were_left_out_is_not_good(tmp_path, corpus, bad_steps, good):
    trainer = type("Skipping", (SkippingTrainer,), {"bad_steps": bad_steps})
    options = {**OPTIONS, "training__steps": 6, "training__max_skipped_steps": 3}
    train(command_line(tmp_path, corpus, **options), trainer)
    assert whole_steps(tmp_path / "checkpoint") == good


def test_parameters_that_are_not_sane_are_never_the_last_good_checkpoint(tmp_path, corpus):
    class Exploding(SkippingTrainer):
        bad_steps = (7,)

        def train_step(self, data_iterator):
            super().train_step(data_iterator)
            if self.step == 5:
                with torch.no_grad():
                    self.model_parts[0].output.weight[0, 0] = 3e29

    options = {**OPTIONS, "training__steps": 8, "checkpoint__keep_latest_k": 2}
    options |= {"checkpoint__interval": 1, "lr_scheduler__total_steps": 8}
    with pytest.raises(TrainingAborted, match=r"last good checkpoint is .*/step-4;"):
        train(command_line(tmp_path, corpus, **options), Exploding)
    faults = checkpoint_faults(tmp_path / "checkpoint")
    assert faults[5] == "its largest parameter is 3e+29"
    assert {step for step, fault in faults.items() if fault is None} == {3, 4}


def test_a_copy_under_another_number_is_refused(copied, corpus):
    shutil.copytree(copied / "step-2", copied / "step-9")
    with pytest.raises(ValueError, match=r"step-9' must be of the step in its name, got .* step 2"):
        check(copied, corpus)


def test_a_file_of_the_user_is_never_deleted(tmp_path, corpus):
    class Noting(RecordedTrainer):
        def train_step(self, data_iterator):
            super().train_step(data_iterator)
            for folder in (tmp_path / "checkpoint").glob("step-*"):
                (folder / "notes.txt").write_text("mine")

    # One checkpoint is written again, and some are purged.
    options = {**OPTIONS, "checkpoint__interval": 1, "training__steps": 5}
    options |= {"checkpoint__keep_latest_k": 2}
    train(command_line(tmp_path, corpus, **options), Noting)
    (tmp_path / "checkpoint" / "step-5" / ".metadata").unlink()
    (tmp_path / "checkpoint" / "step-5" / "notes.txt").write_text("mine")
    train(command_line(tmp_path, corpus, **options))
    folders = {
        folder.name: sorted(p.name for p in folder.iterdir())
        for folder in (tmp_path / "checkpoint").iterdir()
    }
    assert folders["step-1"] == folders["step-2"] == ["notes.txt"]
    assert "notes.txt" in folders["step-5"] and ".metadata" in folders["step-5"]


def test_the_parent_of_checkpoints_is_told_its_steps(copied, tmp_path, corpus):
    for path in (copied, copied.parent):
        with pytest.raises(ValueError, match=r"initial_load_path .* name step-2 or step-4 in it"):
            check(tmp_path / "new" / "checkpoint", corpus, checkpoint__initial_load_path=path)


def test_a_data_position_that_holds_itself_is_read_to_its_end():
    inner = {"number": 1}
    inner["again"] = inner
    assert documents_state({"loader": inner}) is None
    position = {"corpus": 1, "documents": 2}
    assert documents_state({"loader": inner, "position": position}) is position
