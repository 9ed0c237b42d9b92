"""`lighthouse train`: the number of processes, their arguments, and the exit code."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from runs import command_line, losses_of
from torchtitan.experiments.lighthouse import launch
from torchtitan.experiments.lighthouse.runtime import launcher as launcher_module
from torchtitan.experiments.lighthouse.runtime.signals import EXIT_CODE

WORKER = """
import importlib.util, os, signal, sys, time
from pathlib import Path

rank, folder, behaviour = os.environ["RANK"], Path(sys.argv[1]), sys.argv[2:]
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
(folder / rank).write_text(" ".join(os.environ[name] for name in names))
if "end" in behaviour:
    spec = importlib.util.spec_from_file_location("launcher", behaviour[-1])
    launcher = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(launcher)
    launcher.end_with_launcher()
    (folder / "pid").write_text(str(os.getpid()))
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
    assert found == [[str(rank), str(rank), "3", "localhost", port] for rank in range(3)]


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


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_processes_end_with_a_launcher_that_is_killed(start, tmp_path):
    launcher = os.fork()
    if not launcher:
        start(1, "wait", "end", launcher_module.__file__)
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.02)
    os.kill(launcher, signal.SIGKILL)
    os.waitpid(launcher, 0)
    process = Path("/proc", (tmp_path / "pid").read_text())
    deadline = time.monotonic() + 20
    while process.exists() and " Z " not in (process / "stat").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_second_signal_of_a_terminal_ends_all_at_once(start, tmp_path, number):
    former = signal.signal(number, signal.SIG_DFL)

    def ask_twice():
        for rank in range(2):
            while not (tmp_path / str(rank)).exists():
                time.sleep(0.02)
        for _ in range(2):
            os.kill(os.getpid(), number)
            time.sleep(1)

    thread = threading.Thread(target=ask_twice)
    thread.start()
    begin = time.monotonic()
    assert start(2, "deaf", "wait") == 128 + signal.SIGINT
    thread.join()
    assert time.monotonic() - begin < 30
    assert signal.signal(number, former) == signal.SIG_DFL


SAVING = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP]


@pytest.mark.parametrize("number", SAVING)
def test_a_signal_stops_all_with_the_code_of_a_saved_run(start, tmp_path, number):
    former = signal.signal(number, signal.SIG_DFL)

    def ask():
        # The signal comes before the processes listen. It must not kill them, and must not be lost.
        while not (tmp_path / "1").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=ask)
    thread.start()
    assert start(2, "stop") == EXIT_CODE
    thread.join()
    assert signal.signal(number, former) == signal.SIG_DFL


@pytest.fixture
def started(monkeypatch):
    """The number of processes that `lighthouse train` starts, and their arguments."""
    found = []
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(launch, "launch", lambda args, nproc: found.append((nproc, args)) or 0)
    monkeypatch.setattr(launch.train, "main", lambda args: found.append((1, args)))
    monkeypatch.setattr(launch, "check_config", lambda config, world_size: None)
    monkeypatch.setattr(launch, "load_config", lambda args: None)

    def call(*args: str) -> tuple[int, list[str]]:
        monkeypatch.setattr(sys, "argv", ["lighthouse train", *args])
        try:
            launch.main()
        except SystemExit as end:
            assert end.code == 0
        return found.pop()

    return call


@pytest.mark.parametrize("flag", ["--nproc 2", "--nproc-per-node=2", "--nproc_per_node 2"])
def test_the_number_of_processes_is_taken_out(started, flag):
    args = ["a b.toml", "--training.steps", "3", *flag.split(), "--compile.enable"]
    expected = ["--job.config_file", "a b.toml", "--training.steps", "3", "--compile.enable"]
    assert started(*args) == (2, expected)


def test_a_process_for_each_gpu(started, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    file = ["--job.config_file", "run.toml"]
    assert started("run.toml") == (1, file)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setattr(launch, "default_nproc", lambda args: 4)
    assert started(*file) == (4, file)
    assert started("run.toml", "--nproc", "1") == (1, file)


def test_under_a_launcher_it_is_one_of_its_processes(started, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert started("run.toml") == (1, ["--job.config_file", "run.toml"])


def refused(*args: str) -> str:
    """The error line of a call that fails before any process is started."""
    # Tests of the trainer in this process may have set this variable.
    environment = {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"}
    done = subprocess.run(
        [sys.executable, "-m", "lighthouse_cli", "train", *args],
        capture_output=True,
        text=True,
        env={**environment, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 2 and not done.stdout, done.stderr
    (line,) = done.stderr.splitlines()
    return line


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "FILE must come first, got ''; write lighthouse train FILE"),
        (["--training.steps", "3"], "FILE must come first, got '--training.steps'; write"),
        (["a.toml", "--nproc", "two"], "--nproc must be a number of at least 1, got 'two'; corr"),
        (["a.toml", "--nproc-per-node=0"], "--nproc-per-node must be a number of at least 1, got"),
        (["a.toml", "--nproc"], "--nproc must be a number of at least 1, got ''; correct it"),
    ],
    ids=str,
)
def test_a_wrong_call_is_refused(args, message, monkeypatch, capsys):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(sys, "argv", ["lighthouse train", *args])
    with pytest.raises(SystemExit) as end:
        launch.main()
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")


def test_a_number_of_processes_is_refused_under_a_launcher(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["lighthouse train", "a.toml", "--nproc", "2"])
    with pytest.raises(SystemExit) as end:
        launch.main()
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --nproc-per-node must not be given under a launcher")


def test_a_refusal_with_several_processes_is_one_line(corpus, tmp_path):
    config = tmp_path / "run.toml"
    config.write_text('[model]\nflavor = "debugmodel"\n')
    line = refused(
        *(str(config), "--nproc", "2", *command_line(tmp_path / "run", corpus)),
        *("--training.seq_len", "1001"),
    )
    assert line.startswith("error: ") and "1001" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes_train_stop_and_go_on(corpus, tmp_path):
    config = tmp_path / "run.toml"
    config.write_text('[model]\nflavor = "debugmodel"\n')
    options = command_line(tmp_path / "run", corpus, checkpoint__interval=1000)
    command = [sys.executable, "-m", "lighthouse_cli", "train", str(config), "--nproc", "2"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment.pop("WORLD_SIZE", None)
    long = ["--training.steps", "100000", "--lr_scheduler.total_steps", "100000"]
    log = tmp_path / "log.txt"
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, *options, *long], stdout=file, stderr=subprocess.STDOUT, env=environment
        )
        while "step 4/" not in log.read_text():
            assert process.poll() is None, log.read_text()
            time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=300) == EXIT_CODE
    # The switch, and the step after which the run stopped. The same command resumes from there.
    folder = tmp_path / "run" / "checkpoint"
    last = max(int(path.name.removeprefix("step-")) for path in folder.iterdir())
    done = subprocess.run(
        [*command, *options, *long, "--training.steps", str(last + 2)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert (folder / f"step-{last + 2}").is_dir()
    assert list(losses_of(tmp_path / "run")) == list(range(1, last + 3))
