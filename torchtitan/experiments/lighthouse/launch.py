"""Train in two stages from a TOML file, in this process or in one process per GPU.

    lighthouse train debug.toml
    lighthouse train debug.toml --nproc-per-node 2 --training.steps 100

--section.field VALUE overrides any field of the configuration. --job.config_file FILE can replace
FILE. --nproc-per-node, or --world-size, defaults to the number of visible GPUs, or 1 without a GPU.
If torchrun or srun started this process and set WORLD_SIZE, it starts no further processes.

Exit codes:

    0    the run is complete
    75   the run stopped after a signal (SIGTERM, SIGUSR1, SIGINT, SIGHUP), with everything saved
    2    the configuration is invalid, which is checked before any process starts, or another run
         writes to the dump folder
    1    the run failed

A second SIGINT or SIGHUP ends the run at once.

This program starts the processes itself. torchrun always exits with 1 when a worker fails, and it
kills workers 30 s after a signal, before a long step has ended. The processes end when this process
ends for any reason (`runtime/launcher.py`).
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import IO

import torch
from torchtitan.experiments.lighthouse import train
from torchtitan.experiments.lighthouse.config.load import load_config
from torchtitan.experiments.lighthouse.config.rule_helpers import require
from torchtitan.experiments.lighthouse.preflight import check_config
from torchtitan.experiments.lighthouse.runtime.command_line import exit_on_value_error
from torchtitan.experiments.lighthouse.runtime.signals import (
    ENDS_AT_ONCE,
    EXIT_CODE,
    heeded_signals,
)

NPROC = ("--nproc-per-node", "--world-size")
"""Names of the option for the number of processes: that of torchrun, that of our commands."""

TRAINER = [sys.executable, "-m", "torchtitan.experiments.lighthouse.train"]

GRACE_SECONDS = 30.0
"""Seconds from the failure of a process until the others are killed, as in torchrun."""

REFUSAL, REFUSAL_SECONDS = 2, 5.0
"""The exit code of a process that refuses to start, and seconds until the others are killed."""


def main() -> None:
    """Entry point of `lighthouse train`."""
    args = sys.argv[1:]
    if {"-h", "--help"} & set(args):
        print(__doc__)
        # This prints the fields and exits.
        load_config(["--help"])
    with exit_on_value_error():
        args, nproc = split(args)
        is_launched = "WORLD_SIZE" in os.environ
        if is_launched and nproc is not None:
            raise ValueError(
                f"{NPROC[0]} must not be given under a launcher, which has set WORLD_SIZE, got "
                f"{nproc}; leave it out"
            )
        nproc = 1 if is_launched else nproc or default_nproc(args)
        if nproc > 1:
            num_gpus = torch.cuda.device_count() or nproc
            rule = f"at most the {num_gpus} GPUs of this machine"
            require(nproc <= num_gpus, NPROC[0], rule, nproc, "lower it")
            check_config(load_config(args), nproc)
    if nproc == 1:
        train.main(args)
        return
    raise SystemExit(launch(args, nproc))


def split(args: list[str]) -> tuple[list[str], int | None]:
    """Remove the number of processes from a command line, and pass FILE as --job.config_file.

    Returns:
        The remaining arguments, and the number of processes or None.

    Raises:
        ValueError: FILE does not come first, or the number is invalid.
    """
    rest, nproc = [], None
    remaining = iter(args)
    for argument in remaining:
        name, is_joined, value = argument.partition("=")
        if name not in NPROC:
            rest.append(argument)
            continue
        value = value if is_joined else next(remaining, "")
        if not value.isdecimal() or int(value) < 1:
            raise ValueError(f"{name} must be a number of at least 1, got {value!r}; correct it")
        nproc = int(value)
    if rest and not rest[0].startswith("-"):
        return ["--job.config_file", *rest], nproc
    if not any(argument.startswith("--job.config") for argument in rest):
        raise ValueError(
            f"FILE must come first, got {(rest or [''])[0]!r}; write lighthouse train FILE "
            "[overrides ...]"
        )
    return rest, nproc


def default_nproc(args: list[str]) -> int:
    """One process per visible GPU, or one process without a GPU."""
    num_gpus = torch.cuda.device_count()
    # torchtitan's fake backend simulates all ranks in one process.
    is_alone = num_gpus > 1 and load_config(args).comm.mode == "fake_backend"
    return 1 if is_alone else max(1, num_gpus)


def launch(args: list[str], nproc: int) -> int:
    """Train in `nproc` processes on this machine and return the exit code of the run."""
    with signals_to_stop() as asked:
        return run(args, nproc, asked)


@contextlib.contextmanager
def signals_to_stop() -> Iterator[list[bool]]:
    """A list that is no longer empty once a signal has arrived that asks to stop.

    A second SIGINT or SIGHUP raises KeyboardInterrupt.
    """
    asked = []

    def arrive(number, frame) -> None:
        asked.append(True)
        if number in ENDS_AT_ONCE:
            signal.signal(number, signal.default_int_handler)

    former = {number: signal.signal(number, arrive) for number in heeded_signals()}
    try:
        yield asked
    finally:
        for number, action in former.items():
            signal.signal(number, action)


def run(
    args: list[str], nproc: int, asked: list[bool], log: IO | None = None, **defaults: str
) -> int:
    """Train in `nproc` processes.

    Args:
        asked: of `signals_to_stop`.
        log: the file that stdout and stderr go to.
        defaults: environment variables, unless they are set.

    Returns:
        The exit code of the first process that failed, or 128 plus the number of the signal that
        ended it.
    """
    workers, port = [], free_port()
    if nproc > 1:
        # As in torchrun.
        defaults = {"OMP_NUM_THREADS": "1", **defaults}
    try:
        for rank in range(nproc):
            environment = {**defaults, **os.environ, **variables_of(rank, nproc, port)}
            workers.append(start(args, environment, log))
        return wait(workers, asked)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        signal_all(workers, signal.SIGKILL)
        for worker in workers:
            worker.wait()


def variables_of(rank: int, nproc: int, port: int) -> dict[str, str]:
    """The environment variables of one rank."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }


def start(args: list[str], environment: dict[str, str], log: IO | None) -> subprocess.Popen:
    """Start the process of one rank. It ignores signals until its trainer handles them."""
    ignoring = ["/bin/sh", "-c", 'trap "" TERM USR1; exec "$0" "$@"']
    error = subprocess.STDOUT if log else None
    return subprocess.Popen([*ignoring, *TRAINER, *args], env=environment, stdout=log, stderr=error)


def free_port() -> int:
    """A free port for the rendezvous of the processes."""
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def wait(workers: list[subprocess.Popen], asked: list[bool]) -> int:
    """Wait for all processes, and return the exit code of the run.

    If one fails, the wait ends after GRACE_SECONDS, or REFUSAL_SECONDS if it refused to start.

    Args:
        asked: not empty once a signal has arrived. SIGTERM is then sent to the trainers repeatedly
            until they end.
    """
    code, deadline = 0, float("inf")
    while any(worker.poll() is None for worker in workers) and time.monotonic() < deadline:
        if asked:
            signal_all(workers, signal.SIGTERM)
        code = code or first_failure(workers)
        if code not in (0, EXIT_CODE):
            seconds = REFUSAL_SECONDS if code == REFUSAL else GRACE_SECONDS
            deadline = min(deadline, time.monotonic() + seconds)
        time.sleep(0.2)
    return code or first_failure(workers)


def first_failure(workers: list[subprocess.Popen]) -> int:
    codes = [code for worker in workers if (code := worker.poll())]
    return 0 if not codes else codes[0] if codes[0] > 0 else 128 - codes[0]


def signal_all(workers: list[subprocess.Popen], number: int) -> None:
    for worker in workers:
        # This has no effect on a process that has ended.
        worker.send_signal(number)
