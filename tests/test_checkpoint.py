"""Which checkpoints are whole, which are kept, and folders that stop a run."""

import os
import queue
from pathlib import Path

import pytest
import torch.distributed as dist
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.experiments.lighthouse.checkpoint import (
    TwoStageCheckpointManager,
    check_folder,
    checkpoint_steps,
    is_whole,
)


def make(folder: Path, *steps: int, torn: tuple[int, ...] = ()) -> None:
    """Checkpoints of some steps: a torn one has its data, but not the metadata written last."""
    for step in (*steps, *torn):
        path = folder / f"step-{step}"
        path.mkdir(parents=True)
        (path / "__0_0.distcp").write_bytes(b"data")
        if step not in torn:
            (path / ".metadata").write_bytes(b"metadata")


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


@pytest.mark.parametrize(
    ("name", "whole"),
    [
        (".metadata", True),
        ("model.safetensors.index.json", True),
        ("__0_0.distcp", False),
        ("model-00001-of-00001.safetensors", False),
        (".metadata.tmp", False),
    ],
)
def test_a_checkpoint_is_whole_with_its_metadata(tmp_path, name, whole):
    assert not is_whole(tmp_path)
    (tmp_path / name).write_text("")
    assert is_whole(tmp_path) is whole
    assert not is_whole(tmp_path / "missing")


def test_metadata_that_is_a_folder_is_none(tmp_path):
    (tmp_path / ".metadata").mkdir()
    assert not is_whole(tmp_path)


def test_a_folder_with_a_whole_checkpoint_or_none_at_all_is_fine(tmp_path):
    check_folder(tmp_path / "missing")
    make(tmp_path, 10, torn=(20,))
    check_folder(tmp_path)


@pytest.mark.parametrize(
    ("torn", "state"),
    [((), "no checkpoint"), ((30, 4), "only torn checkpoints (step-4, step-30)")],
    ids=["empty", "torn"],
)
def test_a_folder_without_a_whole_checkpoint_is_refused(tmp_path, torn, state):
    make(tmp_path, torn=torn)
    with pytest.raises(ValueError) as error:
        check_folder(str(tmp_path))
    message = str(error.value)
    assert "\n" not in message
    for part in ("checkpoint.folder must hold a whole checkpoint", str(tmp_path), state, "move"):
        assert part in message


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def manager_of(folder: Path, keep_latest_k: int = 0, switch_step: int | None = None, **attributes):
    """A manager of a folder, without the parts that save and load."""
    manager = CheckpointManager.__new__(CheckpointManager)
    manager.enable, manager.load_only, manager.interval = True, False, 10
    manager.enable_first_step_checkpoint = False
    manager.folder, manager.keep_latest_k = str(folder), keep_latest_k
    manager.purge_queue, manager.stager = queue.Queue(), None
    vars(manager).update(attributes)
    TwoStageCheckpointManager.adopt(manager, switch_step)
    assert isinstance(manager, TwoStageCheckpointManager)
    return manager


def purged(manager) -> set[str]:
    manager._purge_stale_checkpoints()
    return {os.path.basename(path) for path in manager.purge_queue.queue}


@pytest.mark.parametrize(
    ("steps", "torn", "keep_latest_k", "switch_step", "expected"),
    [
        ((1, 2, 3, 4), (), 2, None, {1, 2}),
        ((1, 2, 3, 4), (), 0, None, set()),
        ((1, 2), (), 2, None, set()),
        ((1, 2, 3), (), 9, None, set()),
        # The newest one may be in the middle of being written; it pushes no whole one out.
        ((1, 2, 3), (4,), 2, None, {1}),
        ((1, 2), (3, 4), 2, None, set()),
        # A torn one behind the newest whole one will never be whole.
        ((1, 3, 4), (2,), 2, None, {1, 2}),
        ((3, 4), (1, 2, 5), 2, None, {1, 2}),
        ((), (1, 2, 3), 2, None, set()),
        # The checkpoint of the switch stays, and counts for none of the others.
        ((1, 2, 3, 4), (), 2, 1, {2}),
        ((1, 2, 3, 4), (), 2, 4, {1, 2}),
        ((1, 2, 3, 4), (), 2, 9, {1, 2}),
        ((9, 10, 11, 100), (), 2, None, {9, 10}),
    ],
)
def test_purge(one_rank, tmp_path, steps, torn, keep_latest_k, switch_step, expected):
    make(tmp_path, *steps, torn=torn)
    manager = manager_of(tmp_path, keep_latest_k, switch_step)
    assert purged(manager) == {f"step-{step}" for step in expected}


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


def test_load_refuses_a_folder_with_torn_checkpoints_only(tmp_path):
    make(tmp_path, torn=(10,))
    manager = manager_of(tmp_path, enable_ft_dataloader_checkpoints=False)
    with pytest.raises(ValueError, match="only torn checkpoints"):
        manager.load()
    manager.enable = False
    assert manager.load() is False
