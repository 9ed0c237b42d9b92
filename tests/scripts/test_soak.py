"""The soak test: what it refuses before it starts a run, and how it ends one."""

import os
import signal
import sys
import time

import pytest
import soak
from torchtitan.experiments.lighthouse import launch
from torchtitan.experiments.lighthouse.runtime.signals import EXIT_CODE

TRAINER = """
import os, pathlib, signal, sys, time
# SIGTERM is repeated, and must not reach an interpreter that is ending.
signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
folder = pathlib.Path(sys.argv[sys.argv.index("--job.dump_folder") + 1])
(folder / "starting").write_text(str(os.getpid()))
(folder / "starting").rename(folder / "pid")
time.sleep(300)
"""
"""Stands for the trainer. It waits for SIGTERM, and then ends as a run that was saved."""


@pytest.mark.parametrize("option", ["--minutes", "--every"])
@pytest.mark.parametrize("value", ["nan", "0", "-1"])
def test_a_time_that_is_not_above_0_is_refused(option, value, tmp_path, monkeypatch, capsys):
    args = ["soak.py", "run.toml", "--output", str(tmp_path / "run"), f"{option}={value}"]
    monkeypatch.setattr("sys.argv", args)
    with pytest.raises(SystemExit) as end:
        soak.main()
    assert end.value.code == 2 and not (tmp_path / "run").exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {option} must be above 0, got {float(value)}; ")


def test_a_stopped_soak_stops_its_run(tmp_path, monkeypatch):
    (tmp_path / "trainer.py").write_text(TRAINER)
    monkeypatch.setattr(launch, "TRAINER", [sys.executable, str(tmp_path / "trainer.py")])
    args = ["soak.py", "run.toml", "--output", str(tmp_path / "run"), "--every", "0.1"]
    monkeypatch.setattr("sys.argv", args)
    child = os.fork()
    if not child:
        monkeypatch.setattr(soak, "compare", lambda samples, folder: os._exit(EXIT_CODE))
        try:
            soak.main()
        finally:
            os._exit(1)
    pid, samples = tmp_path / "run" / "pid", tmp_path / "run" / "samples.jsonl"
    deadline = time.monotonic() + 60
    # A comparison needs four samples.
    while not pid.exists() or samples.read_text().count("\n") < 4:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(child, signal.SIGTERM)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == EXIT_CODE
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
