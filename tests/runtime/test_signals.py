"""Runs that get a signal stop after the step with a checkpoint, and resume bit for bit."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import launch
from runs import (
    STAGE1_STEPS,
    STEPS,
    RecordedTrainer,
    Run,
    assert_continues,
    assert_same_state,
    command_line,
    losses_of,
    train,
)
from torchtitan.experiments.lighthouse.checkpoint.files import checkpoint_steps
from torchtitan.experiments.lighthouse.launch import TRAINER
from torchtitan.experiments.lighthouse.runtime.signals import EXIT_CODE, SIGNALS, Interruption

IN_STAGE_1, IN_STAGE_2 = STAGE1_STEPS - 1, STAGE1_STEPS + 2


class SignalledTrainer(RecordedTrainer):
    """Gets a signal during a step, or before training if the step is 0."""

    at_step: int
    ranks: tuple[int, ...] = (0,)
    number = signal.SIGUSR1

    def __init__(self, job_config):
        super().__init__(job_config)
        if self.at_step == 0:
            self.send_signal()

    def post_dataloading_process(self, input_dict, labels):
        if self.step == self.at_step:
            self.send_signal()
        return super().post_dataloading_process(input_dict, labels)

    def send_signal(self):
        if dist.get_rank() in self.ranks:
            os.kill(os.getpid(), self.number)


@pytest.fixture(autouse=True)
def hangup():
    """SIGHUP as in a terminal. nohup ignores it, which the processes of the tests would inherit."""
    former = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, former)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, corpus) -> Run:
    return train(command_line(tmp_path_factory.mktemp("undisturbed"), corpus))


def train_until_signal(
    folder: Path, corpus: Path, at_step: int, number=signal.SIGUSR1, ranks=(0,), **overrides
) -> Run:
    """A run that gets a signal in `at_step`."""
    attributes = {"at_step": at_step, "number": number, "ranks": ranks}
    trainer_class = type("Signalled", (SignalledTrainer,), attributes)
    return train(command_line(folder, corpus, **overrides), trainer_class)


def saved_at(folder: Path) -> dict[int, int]:
    """When the metadata of each whole checkpoint was written, in ns."""
    steps = checkpoint_steps(folder / "checkpoint")
    assert all(steps.values()), steps
    return {
        step: (folder / "checkpoint" / f"step-{step}" / ".metadata").stat().st_mtime_ns
        for step in steps
    }


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("step", [1, IN_STAGE_1, STAGE1_STEPS, IN_STAGE_2])
def test_a_signal_ends_the_run_after_the_step(undisturbed, corpus, tmp_path, step, number):
    stopped = train_until_signal(tmp_path, corpus, step, number)
    assert stopped.exit_code == EXIT_CODE == 75 and list(stopped.batches)[-1] == step
    # The interval is longer than the run. The switch is always saved.
    expected = {step, STAGE1_STEPS} if step > STAGE1_STEPS else {step}
    assert checkpoint_steps(tmp_path / "checkpoint") == dict.fromkeys(sorted(expected), True)
    # The switch belongs to the step before it.
    assert (tmp_path / "handover.json").exists() == (step > STAGE1_STEPS)

    resumed = train(command_line(tmp_path, corpus))
    assert resumed.exit_code == 0
    assert_continues([stopped, resumed], undisturbed)
    assert resumed.losses == undisturbed.losses and len(resumed.losses) == STEPS
    assert (tmp_path / "handover.json").exists()


def test_many_signals_are_as_good_as_one(undisturbed, corpus, tmp_path):
    for step in range(1, STEPS):
        assert train_until_signal(tmp_path, corpus, step).exit_code == EXIT_CODE
    resumed = train(command_line(tmp_path, corpus))
    assert resumed.losses == undisturbed.losses
    assert_same_state(resumed, undisturbed)


def test_a_signal_in_the_last_step_changes_nothing(undisturbed, corpus, tmp_path):
    run = train_until_signal(tmp_path, corpus, STEPS)
    assert run.exit_code == 0
    assert checkpoint_steps(tmp_path / "checkpoint") == {STAGE1_STEPS: True, STEPS: True}
    assert_same_state(run, undisturbed)


@pytest.mark.parametrize("async_mode", ["disabled", "async"])
def test_a_step_is_saved_once(corpus, tmp_path, async_mode):
    saves = []

    class Counted(SignalledTrainer):
        def __init__(self, job_config):
            super().__init__(job_config)
            save = self.checkpointer.dcp_save
            self.checkpointer.dcp_save = lambda states, checkpoint_id, **options: (
                saves.append(Path(checkpoint_id).name),
                save(states, checkpoint_id, **options),
            )[1]

    Counted.at_step = 2
    options = {"checkpoint__interval": 2, "checkpoint__async_mode": async_mode}
    train(command_line(tmp_path, corpus, **options), Counted)
    assert saves == ["step-2"]
    assert checkpoint_steps(tmp_path / "checkpoint") == {2: True}


def test_an_asynchronous_checkpoint_is_whole_when_the_run_ends(undisturbed, corpus, tmp_path):
    options = {"checkpoint__async_mode": "async"}
    stopped = train_until_signal(tmp_path, corpus, IN_STAGE_1, **options)
    assert stopped.exit_code == EXIT_CODE
    assert checkpoint_steps(tmp_path / "checkpoint") == {IN_STAGE_1: True}
    resumed = train(command_line(tmp_path, corpus, **options))
    assert_continues([stopped, resumed], undisturbed)


@pytest.mark.parametrize(
    "options", [{"checkpoint__enable": False}, {"checkpoint__load_only": True}], ids=str
)
def test_without_checkpoints_the_steps_are_lost(corpus, tmp_path, options):
    run = train_until_signal(tmp_path, corpus, 2, **options)
    assert run.exit_code == 1
    assert list(run.batches) == [1, 2]
    assert checkpoint_steps(tmp_path / "checkpoint") == {}


@pytest.mark.parametrize("step", [IN_STAGE_1, STAGE1_STEPS])
def test_a_signal_before_the_first_step_of_a_resumed_run(undisturbed, corpus, tmp_path, step):
    train_until_signal(tmp_path, corpus, step)
    before = saved_at(tmp_path)
    run = train_until_signal(tmp_path, corpus, 0)
    assert run.exit_code == EXIT_CODE
    assert not run.batches
    assert saved_at(tmp_path) == before and list(before) == [step]
    resumed = train(command_line(tmp_path, corpus))
    assert resumed.losses == undisturbed.losses
    assert_same_state(resumed, undisturbed)


def test_a_signal_before_the_first_step_of_all(corpus, tmp_path):
    run = train_until_signal(tmp_path, corpus, 0)
    assert run.exit_code == EXIT_CODE
    assert not run.batches
    # There is no folder, because a run cannot resume from a folder without a checkpoint.
    assert not (tmp_path / "checkpoint").exists()


def test_the_former_actions_are_restored(corpus, tmp_path):
    def former(number, frame): ...

    kept = {number: signal.signal(number, former) for number in SIGNALS}
    try:
        interruption = Interruption()
        assert all(signal.getsignal(number) is not former for number in SIGNALS)
        interruption.close()
        assert [signal.getsignal(number) for number in SIGNALS] == [former] * len(SIGNALS)

        # A trainer also does this.
        seen = []
        train(
            command_line(tmp_path, corpus, training__steps=1, lighthouse__stage1_steps=1),
            look=lambda trainer: seen.extend(map(signal.getsignal, SIGNALS)),
        )
        assert len(seen) == len(SIGNALS) and former not in seen
        assert [signal.getsignal(number) for number in SIGNALS] == [former] * len(SIGNALS)
    finally:
        for number, action in kept.items():
            signal.signal(number, action)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
@pytest.mark.parametrize("launcher", [None, "torchrun"])
def test_a_second_one_ends_the_process_at_once(monkeypatch, number, launcher):
    if launcher:
        # The terminal and torchrun each send one.
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    pid = os.fork()
    if not pid:
        Interruption()
        for _ in range(2):
            os.kill(os.getpid(), number)
        os._exit(EXIT_CODE)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == (EXIT_CODE if launcher else -number)


def test_what_nohup_ignores_stays_ignored():
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    interruption = Interruption()
    try:
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        interruption.close()
        signal.signal(signal.SIGHUP, former)


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_to_all_processes(one_rank, number):
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    # The child prints a line when it runs.
    script = "import time; print('up', flush=True); time.sleep(1000)"
    interruption = Interruption()
    helper = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    try:
        helper.stdout.readline()
        assert not interruption.is_on_any_rank(torch.device("cpu"))
        for pid in (helper.pid, os.getpid()):
            os.kill(pid, number)
        if number != signal.SIGUSR1:
            assert helper.wait(timeout=10) != 0
        else:
            with pytest.raises(subprocess.TimeoutExpired):
                helper.wait(timeout=0.5)
        assert interruption.is_on_any_rank(torch.device("cpu"))
    finally:
        # A pending signal must not reach the former action, which would end this process.
        interruption.close()
        helper.kill()
        helper.communicate()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask


# ---- two ranks


def run_on_two_ranks(folder: Path, corpus: Path) -> dict[Any, Any]:
    """All runs of the test below, in one group of processes."""
    results = {"undisturbed": train(command_line(folder / "undisturbed", corpus))}
    for step in (IN_STAGE_1, STAGE1_STEPS):
        stopped = train_until_signal(folder / str(step), corpus, step, ranks=(1,))
        results[step] = stopped, train(command_line(folder / str(step), corpus))
    return results


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, corpus) -> list[dict[Any, Any]]:
    folder = tmp_path_factory.mktemp("two")
    return launch(run_on_two_ranks, 2, folder / "results", folder, corpus)


@pytest.mark.parametrize("step", [IN_STAGE_1, STAGE1_STEPS])
def test_both_ranks_stop_if_one_gets_the_signal(two_ranks, step):
    for results in two_ranks:
        stopped, resumed = results[step]
        assert stopped.exit_code == EXIT_CODE and list(stopped.batches)[-1] == step
        assert_continues([stopped, resumed], results["undisturbed"])
    resumed, undisturbed = two_ranks[0][step][-1], two_ranks[0]["undisturbed"]
    assert resumed.losses == undisturbed.losses and len(undisturbed.losses) == STEPS
    steps = checkpoint_steps(resumed.folder / "checkpoint")
    assert steps == dict.fromkeys(sorted({step, STAGE1_STEPS, STEPS}), True)


# ---- a process


def descendants(pid: int) -> list[int]:
    lines = subprocess.check_output(["ps", "-eo", "pid=,ppid="], text=True).splitlines()
    children = [int(child) for child, parent in map(str.split, lines) if int(parent) == pid]
    return [*children, *(below for child in children for below in descendants(child))]


# More steps than a run can train before the signal arrives.
ENDLESS = {"lr_scheduler__total_steps": 10_000}


@pytest.fixture(scope="module")
def begun(tmp_path_factory, corpus) -> Run:
    """The first steps of a run with that long schedule."""
    return train(command_line(tmp_path_factory.mktemp("begun"), corpus, **ENDLESS))


def ask_on(process: subprocess.Popen) -> None:
    while process.poll() is None:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05)


@pytest.mark.parametrize("to_all", [False, True], ids=["SIGUSR1", "SIGTERM-to-helpers-too"])
def test_the_exit_code_of_the_process(begun, corpus, tmp_path, to_all):
    train_until_signal(tmp_path, corpus, 1, **ENDLESS)
    options = {**ENDLESS, "training__steps": 10_000, "metrics__enable_wandb": to_all}
    # One thread, as in the runs in this process.
    env = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    process = subprocess.Popen(
        [*TRAINER, *command_line(tmp_path, corpus, **options)],
        env=os.environ | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        while process.poll() is None and len(losses_of(tmp_path)) == 1:
            time.sleep(0.01)
        if to_all:
            # W&B's service is such a process.
            helpers = descendants(process.pid)
            assert helpers
            for pid in (*helpers, process.pid):
                os.kill(pid, signal.SIGTERM)
        else:
            process.send_signal(signal.SIGUSR1)
            # Some launchers repeat the signal until the process has ended.
            threading.Thread(target=ask_on, args=(process,)).start()
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == EXIT_CODE, output
    losses = losses_of(tmp_path)
    last_step = max(losses)
    assert f"Asked to stop: the run ends after step {last_step}; nothing is lost" in output
    assert re.search(rf"Stopped after step {last_step} of \d+ and saved", output)
    assert checkpoint_steps(tmp_path / "checkpoint")[last_step]
    steps = range(1, min(last_step, STEPS) + 1)
    assert {step: losses[step] for step in steps} == {step: begun.losses[step] for step in steps}
