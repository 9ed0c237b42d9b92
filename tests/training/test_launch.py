"""`lighthouse train`: the number of processes, their arguments, and the exit code."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from runs import command_line, losses_of, start_two_processes
from torchtitan.experiments.lighthouse import launch
from torchtitan.experiments.lighthouse.checkpoint.files import checkpoint_steps
from torchtitan.experiments.lighthouse.runtime.signals import EXIT_CODE

WORKER = """
import os, signal, sys, time
from pathlib import Path

rank, folder, behaviour = os.environ["RANK"], Path(sys.argv[1]), sys.argv[2:]
names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT"
(folder / rank).write_text(" ".join(os.environ[name] for name in names.split()))
if "stop" in behaviour:
    time.sleep(0.5)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    time.sleep(60)
if f"refuse{rank}" in behaviour:
    sys.exit(2)
if f"fail{rank}" in behaviour:
    sys.exit(3)
if f"die{rank}" in behaviour:
    os.kill(os.getpid(), signal.SIGKILL)
if "deaf" in behaviour:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if "wait" in behaviour:
    time.sleep(60)
"""
"""Replaces the trainer, and does what its arguments say."""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Launch replacement trainers and return the exit code of the run."""
    monkeypatch.setattr(launch, "TRAINER", [sys.executable, "-S", "-c", WORKER])
    monkeypatch.setattr(launch, "GRACE_SECONDS", 0.5)
    return lambda nproc, *behaviour: launch.launch([str(tmp_path), *behaviour], nproc)


def test_every_rank_is_started_and_meets_the_others(start, tmp_path):
    assert start(3) == 0
    found = [(tmp_path / str(rank)).read_text().split() for rank in range(3)]
    port = found[0][-1]
    assert found == [[str(rank), str(rank), "3", "3", "localhost", port] for rank in range(3)]


@pytest.mark.parametrize(
    ("behaviour", "code"),
    [("fail1", 3), ("die0", 128 + signal.SIGKILL)],
)
def test_a_failure_ends_the_others(start, behaviour, code):
    begin = time.monotonic()
    assert start(2, behaviour, "wait") == code
    assert time.monotonic() - begin < 30


def test_a_refusal_ends_the_others_soon(start, monkeypatch):
    monkeypatch.setattr(launch, "GRACE_SECONDS", 1000)
    monkeypatch.setattr(launch, "REFUSAL_SECONDS", 0.5)
    assert start(2, "refuse0", "wait") == 2


@contextlib.contextmanager
def sent(number: int, times: int, folder: Path) -> Iterator[None]:
    """Send a signal to this process once two ranks have begun. Its action must be restored."""
    former = signal.signal(number, signal.SIG_DFL)

    def send():
        while not all((folder / str(rank)).exists() for rank in range(2)):
            time.sleep(0.02)
        for _ in range(times):
            os.kill(os.getpid(), number)
            time.sleep(1)

    thread = threading.Thread(target=send)
    thread.start()
    yield
    thread.join()
    assert signal.signal(number, former) == signal.SIG_DFL


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_second_signal_of_a_terminal_ends_all_at_once(start, tmp_path, number):
    begin = time.monotonic()
    with sent(number, 2, tmp_path):
        assert start(2, "deaf", "wait") == 128 + signal.SIGINT
    assert time.monotonic() - begin < 30


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_a_signal_stops_all_with_the_code_of_a_saved_run(start, tmp_path, number):
    """It comes before the processes listen. It must not kill them, and must not be lost."""
    with sent(number, 1, tmp_path):
        assert start(2, "stop") == EXIT_CODE


@pytest.fixture
def started(monkeypatch):
    """The number of processes that `lighthouse train` starts, and their arguments."""
    found = []
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr(launch, "launch", lambda args, nproc: found.append((nproc, args)) or 0)
    monkeypatch.setattr(launch.train, "main", lambda args: found.append((1, args)))
    monkeypatch.setattr(launch, "check_config", lambda config, world_size: None)
    config = SimpleNamespace(comm=SimpleNamespace(mode="default"))
    monkeypatch.setattr(launch, "load_config", lambda args: config)

    def call(*args: str) -> tuple[int, list[str]]:
        monkeypatch.setattr(sys, "argv", ["lighthouse train", *args])
        try:
            launch.main()
        except SystemExit as end:
            assert end.code == 0
        return found.pop()

    return call


@pytest.mark.parametrize("flag", ["--nproc-per-node 2", "--nproc-per-node=2", "--world-size 2"])
def test_the_number_of_processes_is_taken_out(started, flag):
    args = ["a b.toml", "--training.steps", "3", *flag.split(), "--compile.enable"]
    expected = ["--job.config_file", "a b.toml", "--training.steps", "3", "--compile.enable"]
    assert started(*args) == (2, expected)


def test_a_process_for_each_gpu(started, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    file = ["--job.config_file", "run.toml"]
    assert started("run.toml") == (1, file)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert started(*file) == (4, file)
    assert started("run.toml", "--world-size", "1") == (1, file)


def test_under_a_launcher_it_is_one_of_its_processes(started, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert started("run.toml") == (1, ["--job.config_file", "run.toml"])


@pytest.fixture
def refused(monkeypatch, capsys):
    """The error line of a call that fails before any process is started."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)

    def call(*args: str) -> str:
        monkeypatch.setattr(sys, "argv", ["lighthouse train", *args])
        with pytest.raises(SystemExit) as end:
            launch.main()
        out, err = capsys.readouterr()
        assert end.value.code == 2 and not out
        (line,) = err.splitlines()
        return line

    return call


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "FILE must come first, got ''; write lighthouse train FILE"),
        (["--training.steps", "3"], "FILE must come first, got '--training.steps'; write"),
        (["a.toml", "--world-size", "two"], "--world-size must be a number of at least 1, got 'tw"),
        (["a.toml", "--nproc-per-node=0"], "--nproc-per-node must be a number of at least 1, got"),
        (["a.toml", "--world-size"], "--world-size must be a number of at least 1, got ''; corr"),
    ],
    ids=str,
)
def test_a_wrong_call_is_refused(args, message, refused):
    assert refused(*args).startswith(f"error: {message}")


def test_a_number_of_processes_is_refused_under_a_launcher(monkeypatch, refused):
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = refused("a.toml", "--world-size", "2")
    assert line.startswith("error: --nproc-per-node must not be given under a launcher")


def test_more_processes_than_gpus_are_refused(monkeypatch, refused):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    line = refused("a.toml", "--nproc-per-node", "5")
    assert line == (
        "error: --nproc-per-node must be at most the 4 GPUs of this machine, got 5; lower it"
    )


def test_a_refusal_with_several_processes_is_one_line(corpus, tmp_path, refused):
    config = tmp_path / "run.toml"
    config.write_text('[model]\nflavor = "debugmodel"\n')
    options = command_line(tmp_path / "run", corpus, training__seq_len=1001)
    line = refused(str(config), "--world-size", "2", *options)
    assert line.startswith("error: ") and "1001" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes_train_stop_and_go_on(corpus, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log.txt"
    options = {"checkpoint__interval": 1000, "lr_scheduler__total_steps": 100_000}
    args = command_line(folder, corpus, **options, training__steps=100_000)
    with start_two_processes(args, log, until="step 4/") as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=300) == EXIT_CODE
    # The switch, and the step after which the run stopped. The same command resumes from there.
    last = max(checkpoint_steps(folder / "checkpoint")) + 2
    args = command_line(folder, corpus, **options, training__steps=last)
    with start_two_processes(args, log, until="step") as process:
        assert process.wait(timeout=300) == 0, log.read_text()
    assert checkpoint_steps(folder / "checkpoint")[last]
    assert list(losses_of(folder)) == list(range(1, last + 1))
