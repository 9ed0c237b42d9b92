"""Whole runs with failures of their environment, and warnings about the configuration."""

import errno
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from runs import RecordedTrainer, command_line, losses_of, train
from torchtitan.experiments.lighthouse.checkpoint import stage_switch
from torchtitan.experiments.lighthouse.checkpoint.files import whole_steps
from torchtitan.experiments.lighthouse.config.load import load_config
from torchtitan.experiments.lighthouse.launch import TRAINER
from torchtitan.experiments.lighthouse.metrics import BaseLogger, StagedLogger, read_metrics
from torchtitan.experiments.lighthouse.preflight import warnings_of
from torchtitan.experiments.lighthouse.runtime.errors import TrainingAborted
from torchtitan.experiments.lighthouse.runtime.run_lock import FolderLock


class FullDisk:
    """A file on a disk with space for some bytes, and later for more."""

    def __init__(self, path: Path, room: int):
        self.file, self.room = path.open("ab", buffering=0), room

    def write(self, data: bytes) -> int:
        if self.room <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = self.file.write(data[: self.room])
        self.room -= count
        return count

    def close(self) -> None:
        self.file.close()


def test_lines_that_meet_a_full_disk_are_written_when_there_is_room(tmp_path, caplog):
    logger = StagedLogger(BaseLogger(), tmp_path / "metrics.jsonl")
    disk = logger._file = FullDisk(tmp_path / "metrics.jsonl", room=110)
    for step in range(1, 8):
        logger.log({"loss": float(step)}, step)
    assert caplog.text.count("metrics.jsonl cannot be written") == 1
    assert [line["step"] for line in read_metrics(tmp_path, "loss")] == [1, 2]
    disk.room = 10_000
    logger.log({"loss": 8.0}, 8)
    # It may also be full at the end.
    disk.room = 0
    logger.log({"loss": 9.0}, 9)
    logger.close()
    assert [line["step"] for line in read_metrics(tmp_path, "loss")] == list(range(1, 9))
    assert caplog.text.count("its lines wait in memory") == 2


def test_a_handover_that_cannot_be_written_is_a_warning(tmp_path, corpus, monkeypatch, caplog):
    def fail(path, value):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(stage_switch, "write_json", fail)
    options = {"training__steps": 2, "lighthouse__stage1_steps": 1}
    train(command_line(tmp_path, corpus, **options))
    assert "handover.json could not be written" in caplog.text
    assert losses_of(tmp_path).keys() == {1, 2}
    assert whole_steps(tmp_path / "checkpoint") == [1, 2]


def test_a_dump_folder_that_disappears_ends_the_run_with_a_checkpoint(tmp_path, corpus):
    folder = tmp_path / "run"

    class Losing(RecordedTrainer):
        def train_step(self, data_iterator):
            super().train_step(data_iterator)
            if self.step == 2:
                shutil.rmtree(folder)

    with FolderLock("job.dump_folder", folder) as lock:
        Losing.folder_lock = property(lambda self: lock, lambda self, value: None)
        with pytest.raises(TrainingAborted, match=r"got .* removed or replaced; after step 2: no"):
            train(
                command_line(folder, corpus, training__steps=4, lighthouse__stage1_steps=-1), Losing
            )
    assert whole_steps(folder / "checkpoint") == [2]


def test_a_second_run_in_the_folder_is_refused_by_the_program(tmp_path, corpus):
    program = [*TRAINER, *command_line(tmp_path / "run", corpus)]
    with FolderLock("job.dump_folder", tmp_path / "run"):
        done = subprocess.run(program, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert f"process {os.getpid()} on " in line and "Traceback" not in done.stderr
    assert not list((tmp_path / "run").iterdir())


# ---- legal values that are surely mistakes


@pytest.mark.parametrize(
    "options, part",
    [
        ({"lighthouse__stage1_steps": -1}, "stage1_steps is -1, so all 7 steps"),
        ({"lighthouse__stage1_steps": 7}, "stage1_steps is 7, so all 7 steps"),
        ({"lighthouse__stage1_steps": 3}, None),
        ({"lighthouse__stage1_steps": 0}, None),
        (
            {"validation__enable": True, "validation__dataset": "python_stdlib"},
            "validation.dataset is 'python_stdlib', but training.dataset is 'text'",
        ),
        ({"checkpoint__exclude_from_loading": ["dataloader"]}, "restarts the data at every"),
    ],
)
def test_what_is_surely_not_meant_is_told(tmp_path, corpus, options, part):
    config = load_config(command_line(tmp_path, corpus, **options))
    found = warnings_of(config)
    assert len(found) == (part is not None)
    assert part is None or part in found[0]


def test_validation_follows_the_data_that_is_trained_on(tmp_path, corpus):
    options = {"training__steps": 1, "lighthouse__stage1_steps": 1}
    args = command_line(tmp_path, corpus, validation__enable=True, **options)
    for name in ("--validation.dataset", "--validation.dataset_path"):
        i = args.index(name)
        del args[i : i + 2]
    config = load_config(args)
    assert config.validation.dataset == "text"
    assert config.validation.dataset_path == str(corpus)
    config = load_config([*args, "--validation.dataset", "python_stdlib"])
    assert (config.validation.dataset, config.validation.dataset_path) == ("python_stdlib", None)
    # The configuration that is kept says so, too.
    train(args)
    assert json.loads((tmp_path / "config.json").read_text())["validation"]["dataset"] == "text"
