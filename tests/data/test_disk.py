"""A full disk: found before the run starts, or reported by the save that fails."""

import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from refusals import refused
from runs import command_line
from torchtitan.experiments.lighthouse.checkpoint.files import checkpoint_steps
from torchtitan.experiments.lighthouse.config.load import load_config
from torchtitan.experiments.lighthouse.preflight import check_config

# Three values of four bytes per parameter of the debug model.
CHECKPOINT = 3 * 4 * 1_131_648


@pytest.mark.parametrize(
    ("options", "num_checkpoints"),
    [
        # Steps 2, 4, 6, 7 and the switch after step 3. All are kept.
        ({"checkpoint__keep_latest_k": 0}, 5),
        ({"checkpoint__keep_latest_k": 10}, 5),
        # Two checkpoints, the one that is being written, and that of the switch.
        ({"checkpoint__keep_latest_k": 2}, 4),
        ({"checkpoint__keep_latest_k": 2, "lighthouse__stage1_steps": 0}, 3),
    ],
    ids=str,
)
def test_room_for_the_checkpoints_that_will_be_there(
    tmp_path, corpus, monkeypatch, options, num_checkpoints
):
    options = {"checkpoint__interval": 2, **options}
    config = load_config(command_line(tmp_path / "new" / "run", corpus, **options))
    asked = []

    def disk_usage(path):
        asked.append(path)
        return SimpleNamespace(free=free)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    free = num_checkpoints * CHECKPOINT
    check_config(config, world_size=1)
    free -= 1
    room = f"must have room for {num_checkpoints} more checkpoints of 0.01 GB"
    with refused(f"job.dump_folder {room}, got 0."):
        check_config(config, world_size=1)
    assert asked == [tmp_path, tmp_path]


def test_a_save_that_fails_ends_the_run_with_one_line(tmp_path, corpus):
    args = command_line(tmp_path / "run", corpus, checkpoint__interval=2)
    program = [sys.executable, "-m", "torchtitan.experiments.lighthouse.train", *args]
    # Files are limited to 2 MB.
    limited = ["bash", "-c", 'ulimit -f 2000; exec "$@"', "limited", *program]
    done = subprocess.run(limited, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: the checkpoint of step 2 could not be saved (rank 0: ")
    assert "there is no good checkpoint; check the free space" in error
    assert "Traceback" not in done.stderr
    assert checkpoint_steps(tmp_path / "run" / "checkpoint") == {2: False}
