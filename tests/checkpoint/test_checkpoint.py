"""Checkpoints: which are whole, which are kept, and folders that stop a run."""

import logging
import os
import pickle
import queue
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from refusals import refused
from torchtitan.components.checkpoint import AsyncMode, CheckpointManager
from torchtitan.experiments.lighthouse.checkpoint import files
from torchtitan.experiments.lighthouse.checkpoint.files import (
    check_folder,
    check_safe,
    checkpoint_steps,
    damage_reason,
)
from torchtitan.experiments.lighthouse.checkpoint.manager import TwoStageCheckpointManager
from torchtitan.experiments.lighthouse.runtime.errors import TrainingAborted


def make(folder: Path, *steps: int, torn: tuple[int, ...] = ()) -> None:
    """Write checkpoints of some steps. A torn one has its data, but not the metadata file."""
    for step in (*steps, *torn):
        path = folder / f"step-{step}"
        dcp.save({"weight": torch.arange(9.0), "step": step}, checkpoint_id=path, no_dist=True)
        if step in torn:
            (path / ".metadata").unlink()


def test_steps_ascend_by_number(tmp_path):
    make(tmp_path, 20, 100, 3, torn=(9, 200))
    assert list(checkpoint_steps(tmp_path).items()) == [
        *[(3, True), (9, False), (20, True), (100, True), (200, False)]
    ]


def test_what_is_no_checkpoint_is_passed_over(tmp_path):
    make(tmp_path, 5)
    (tmp_path / "step-6").write_text("a file")
    for name in ("step-7-old", "my-step-8", "step-", "ft-replicat-0"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ".metadata").write_text("")
    assert checkpoint_steps(tmp_path) == {5: True}
    assert checkpoint_steps(str(tmp_path)) == {5: True}
    assert checkpoint_steps(tmp_path / "missing") == {}


def test_a_checkpoint_is_whole_if_every_byte_that_its_metadata_name_is_there(tmp_path):
    make(tmp_path, 1)
    path, file = tmp_path / "step-1", tmp_path / "step-1" / "__0_0.distcp"
    assert damage_reason(path) is None
    data, size = file.read_bytes(), file.stat().st_size
    file.write_bytes(data[:-1])
    assert damage_reason(path) == f"__0_0.distcp ends after {size - 1:,} of {size:,} bytes"
    file.write_bytes(data + b"more")
    assert damage_reason(path) is None
    file.unlink()
    assert damage_reason(path) == "__0_0.distcp is missing"


def test_a_checkpoint_that_is_purged_meanwhile_is_torn(tmp_path, monkeypatch):
    make(tmp_path, 5)
    check_regular = files.check_regular

    def racing(path):
        shutil.rmtree(path.parent)
        return check_regular(path)

    monkeypatch.setattr(files, "check_regular", racing)
    assert checkpoint_steps(tmp_path) == {5: False}


@pytest.mark.parametrize("size", [0, 1, 100, -1])
def test_metadata_that_end_early_are_torn(tmp_path, size):
    make(tmp_path, 1)
    metadata = tmp_path / "step-1" / ".metadata"
    metadata.write_bytes(metadata.read_bytes()[:size])
    assert damage_reason(tmp_path / "step-1").startswith("its metadata cannot be read (.metadata: ")


def test_metadata_without_an_attribute_are_torn(tmp_path):
    make(tmp_path, 1)
    metadata = dcp.FileSystemReader(tmp_path / "step-1").read_metadata()
    del metadata.state_dict_metadata
    (tmp_path / "step-1" / ".metadata").write_bytes(pickle.dumps(metadata))
    assert "(.metadata: AttributeError: " in damage_reason(tmp_path / "step-1")


def test_no_metadata_are_torn(tmp_path):
    make(tmp_path, torn=(1,))
    (tmp_path / "step-1" / ".metadata.tmp").write_text("")
    (tmp_path / "folder" / ".metadata").mkdir(parents=True)
    for name in ("step-1", "folder", "missing"):
        assert damage_reason(tmp_path / name) == ".metadata, which is written last, is missing"


def test_a_model_in_the_format_of_hugging_face_is_whole_with_its_files(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"weight": "model-1.safetensors"}}')
    assert damage_reason(tmp_path) == "model-1.safetensors is missing"
    (tmp_path / "model-1.safetensors").write_text("tensors")
    assert damage_reason(tmp_path) is None
    index.write_text('{"weight_map": ')
    assert "cannot be read" in damage_reason(tmp_path)


class Caller:
    """Loading a pickle of this object calls a function."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_what_would_run_when_it_is_loaded_is_refused_and_does_not_run(tmp_path):
    make(tmp_path, 1)
    assert check_safe(tmp_path / "step-1") == {"step": 1}
    caller, path = Caller(tmp_path / "called"), tmp_path / "step-2"
    dcp.save({"weight": torch.zeros(1), "value": caller}, checkpoint_id=path, no_dist=True)
    assert damage_reason(path) is None
    with pytest.raises(ValueError, match=r"must hold only tensors and plain values.*value: "):
        check_safe(path)
    metadata = dcp.FileSystemReader(tmp_path / "step-1").read_metadata()
    metadata.planner_data = caller
    with (tmp_path / "step-1" / ".metadata").open("wb") as file:
        pickle.dump(metadata, file)
    assert "names posix.mkdir, which has no place there" in damage_reason(tmp_path / "step-1")
    assert not (tmp_path / "called").exists()
    # torch's own loading calls it.
    dcp.FileSystemReader(tmp_path / "step-1").read_metadata()
    assert (tmp_path / "called").exists()


def test_a_position_of_the_data_that_names_a_function_is_refused(tmp_path):
    position = pickle.dumps({"documents": 3, "cursor": Caller(tmp_path / "called")})
    state = {"dataloader": {"dp_rank_0": position}}
    dcp.save(state, checkpoint_id=tmp_path / "step-1", no_dist=True)
    with pytest.raises(ValueError, match=r"dataloader\.dp_rank_0: it names posix\.mkdir"):
        check_safe(tmp_path / "step-1")
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize(
    ("torn", "state"),
    [
        ((), "no checkpoint"),
        ((30, 4), "only torn checkpoints (step-4: .metadata, which is written last, is missing, "),
    ],
    ids=["empty", "torn"],
)
def test_a_folder_without_a_whole_checkpoint_is_refused(tmp_path, torn, state):
    make(tmp_path, torn=torn)
    manager = manager_of(tmp_path)
    with refused("checkpoint.folder must hold a whole checkpoint", str(tmp_path), state, "move"):
        manager.load()
    manager.enable = False
    assert manager.load() is False
    check_folder(tmp_path / "missing")
    make(tmp_path, 10)
    check_folder(tmp_path)


def manager_of(folder: Path, keep_latest_k: int = 0, switch_step: int | None = None, **attributes):
    """A manager of a folder without the parts for saving and loading."""
    manager = TwoStageCheckpointManager.__new__(TwoStageCheckpointManager)
    manager.enable, manager.load_only, manager.interval = True, False, 10
    manager.enable_first_step_checkpoint = manager.enable_ft_dataloader_checkpoints = False
    manager.folder, manager.keep_latest_k = str(folder), keep_latest_k
    manager.purge_queue, manager.stager = queue.Queue(), None
    manager.async_mode, manager.save_future = AsyncMode.DISABLED, None
    manager.switch_step, manager.record = switch_step, {"optimizer.name": "AdamW"}
    manager.states = {"model": SimpleNamespace(model=[torch.nn.Linear(1, 1)])}
    manager._unloadable, manager._left_out_step = set(), None
    manager._with_checksums, manager._check_step = True, lambda step: None
    vars(manager).update(attributes)
    return manager


@pytest.mark.parametrize(
    ("steps", "torn", "keep_latest_k", "switch_step", "expected"),
    [
        ((1, 2, 3, 4), (), 2, None, {1, 2}),
        ((1, 2, 3, 4), (), 0, None, set()),
        ((1, 2), (), 2, None, set()),
        ((1, 2, 3), (), 9, None, set()),
        # The newest one may still be written. It does not replace a whole one.
        ((1, 2, 3), (4,), 2, None, {1}),
        ((1, 2), (3, 4), 2, None, set()),
        # A torn one older than the newest whole one stays torn.
        ((1, 3, 4), (2,), 2, None, {1, 2}),
        ((3, 4), (1, 2, 5), 2, None, {1, 2}),
        ((), (1, 2, 3), 2, None, set()),
        # The checkpoint of the switch is kept, and does not count for keep_latest_k.
        ((1, 2, 3, 4), (), 2, 1, {2}),
        ((1, 2, 3, 4), (), 2, 4, {1, 2}),
        ((1, 2, 3, 4), (), 2, 9, {1, 2}),
        ((9, 10, 11, 100), (), 2, None, {9, 10}),
    ],
)
def test_purge(one_rank, tmp_path, steps, torn, keep_latest_k, switch_step, expected):
    make(tmp_path, *steps, torn=torn)
    manager = manager_of(tmp_path, keep_latest_k, switch_step)
    manager._purge_stale_checkpoints()
    assert {*manager.purge_queue.queue} == {f"{tmp_path}/step-{step}" for step in expected}


def test_the_switch_is_saved_whatever_the_interval(tmp_path):
    manager = manager_of(tmp_path, switch_step=13)
    assert [step for step in range(1, 31) if manager._should_save(step)] == [10, 13, 20, 30]
    assert manager._should_save(7, last_step=True)
    manager = manager_of(tmp_path, switch_step=None)
    assert [step for step in range(1, 31) if manager._should_save(step)] == [10, 20, 30]


@pytest.mark.parametrize("attributes", [{"enable": False}, {"load_only": True}], ids=str)
def test_the_switch_is_not_saved_where_nothing_is(tmp_path, attributes):
    manager = manager_of(tmp_path, switch_step=13, **attributes)
    assert not any(manager._should_save(step) for step in range(1, 31))


def test_the_newest_whole_checkpoint_is_loaded_and_torn_ones_are_named(
    tmp_path, monkeypatch, caplog
):
    make(tmp_path, 5, 10, 30, torn=(20, 3))
    (tmp_path / "step-30" / "__0_0.distcp").write_bytes(b"half")
    monkeypatch.setattr(logging.getLogger("root"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        assert manager_of(tmp_path)._find_load_step() == 10
    said = [line for line in caplog.messages if "torn" in line]
    assert len(said) == 2
    for step, line in zip((20, 30), said, strict=True):
        assert line.startswith(f"{tmp_path}/step-{step} is torn: ")
        assert f"resuming from {tmp_path}/step-10, the newest whole checkpoint" in line


def test_a_save_that_fails_stops_the_run_and_names_the_last_good_checkpoint(
    one_rank, tmp_path, monkeypatch
):
    make(tmp_path, 10)

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(CheckpointManager, "save", fail)
    manager = manager_of(tmp_path)
    with pytest.raises(TrainingAborted) as stop:
        manager.save(20)
    message = str(stop.value)
    assert message.startswith("the checkpoint of step 20 could not be saved (OSError: [Errno 28]")
    assert f"the last good checkpoint is {tmp_path}/step-10;" in message and "\n" not in message
    assert manager.saved_step is None


def test_a_folder_that_was_torn_is_made_anew(one_rank, tmp_path, monkeypatch):
    make(tmp_path, 10)
    monkeypatch.setattr(CheckpointManager, "save", lambda *args: None)
    manager = manager_of(tmp_path)
    manager.save(10)
    assert [path.name for path in (tmp_path / "step-10").iterdir()] == ["trained_with.json"]
    # A step that is not due is not saved.
    manager.save(11)
    assert not (tmp_path / "step-11").exists()
