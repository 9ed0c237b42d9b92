"""Only one process at a time locks a folder, and its end releases the lock."""

import os
import shutil
import signal
import socket
import time

import pytest
from torchtitan.experiments.lighthouse.runtime.run_lock import FILE_NAME, FolderLock


def hold_in_a_child(folder) -> int:
    """The process id of a child that holds the lock."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        with FolderLock("job.dump_folder", folder):
            os.write(write, b"1")
            time.sleep(1000)
    os.close(write)
    assert os.read(read, 1) == b"1"
    os.close(read)
    return pid


def test_a_second_run_is_refused_with_the_holder_until_that_is_dead(tmp_path):
    pid = hold_in_a_child(tmp_path / "run")
    try:
        with pytest.raises(ValueError) as error, FolderLock("job.dump_folder", tmp_path / "run", 0):
            pass
        message = str(error.value)
        assert message.startswith("job.dump_folder must be written by one run at a time, got ")
        assert f"process {pid} on {socket.gethostname()} since 20" in message
        assert "\n" not in message
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    with FolderLock("job.dump_folder", tmp_path / "run", 0) as lock:
        assert not lock.is_gone()
    with FolderLock("job.dump_folder", tmp_path / "run", 0):
        pass


def test_a_child_of_a_dead_holder_does_not_keep_the_folder(tmp_path):
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        with FolderLock("job.dump_folder", tmp_path):
            child = os.fork()
            if child:
                os.write(write, str(child).encode())
            time.sleep(1000)
    child = int(os.read(read, 20))
    try:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        # The child closes its copy after the fork. The parent does not wait for that.
        with FolderLock("job.dump_folder", tmp_path, 5):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


def test_the_holder_that_ends_is_waited_for(tmp_path):
    pid = hold_in_a_child(tmp_path)
    os.kill(pid, signal.SIGSTOP)
    if not (killer := os.fork()):
        time.sleep(0.3)
        os.kill(pid, signal.SIGKILL)
        os._exit(0)
    with FolderLock("job.dump_folder", tmp_path, 20):
        os.waitpid(pid, 0)
    os.waitpid(killer, 0)


def test_a_folder_that_is_removed_is_noticed(tmp_path):
    folder = tmp_path / "run"
    with FolderLock("job.dump_folder", folder) as lock:
        assert not lock.is_gone()
        shutil.rmtree(folder)
        assert lock.is_gone()
        folder.mkdir()
        (folder / FILE_NAME).write_text("of another")
        assert lock.is_gone()


def test_a_lock_file_of_any_content_is_no_traceback(tmp_path):
    with FolderLock("job.dump_folder", tmp_path):
        (tmp_path / FILE_NAME).write_bytes(b"[" * 900)
        with (
            pytest.raises(ValueError, match="another process writes"),
            FolderLock("job.dump_folder", tmp_path, 0),
        ):
            pass
