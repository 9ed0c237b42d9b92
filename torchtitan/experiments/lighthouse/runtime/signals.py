"""Stopping on a signal: between two steps, with a checkpoint, and with an exit code of its own.

SIGTERM is what a scheduler or torchrun sends before it kills; SIGUSR1 is the one a job can ask its
scheduler for ahead of time; SIGINT is Ctrl-C, and SIGHUP the end of a terminal. Each asks the run
to end after the step it is in. It saves, and the process exits with `EXIT_CODE`: start the same
command again and it goes on from there.

A second SIGINT or SIGHUP ends the process at once, without a checkpoint. Under torchrun it does
not: there the terminal and torchrun each send the first one. SIGTERM and SIGUSR1 may come many
times. A signal that was ignored at the start, as SIGHUP under nohup, stays ignored.

A scheduler signals every process of a job, so the trainer's helpers too. SIGUSR1 is blocked, which
they inherit, and live on. SIGTERM ends them, as those who start them rely on.
"""

import os
import signal

import torch
import torch.distributed as dist
from torchtitan.experiments.lighthouse.runtime.launcher import LAUNCHED_BY_TORCHRUN

EXIT_CODE = 75
"""Of a run that was saved and can go on: EX_TEMPFAIL of sysexits.h, "try again"."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)

ENDS_AT_ONCE = (signal.SIGINT, signal.SIGHUP)
"""Signals whose second one ends the process."""


def heeded_signals() -> list[signal.Signals]:
    """Those of `SIGNALS` that the process does not ignore for ever."""
    return [
        number
        for number in SIGNALS
        if number not in ENDS_AT_ONCE or signal.getsignal(number) != signal.SIG_IGN
    ]


class Interruption:
    """Listens for the signals from its making on, in place of their default actions."""

    def __init__(self):
        self._is_here = False
        self._pid = os.getpid()
        self._former = {number: signal.signal(number, self._arrive) for number in heeded_signals()}
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])

    def ask(self) -> None:
        """Ask the run to end after the step it is in, as a signal does."""
        self._is_here = True

    def _arrive(self, number, frame) -> None:
        self._is_here = True
        # A child that was forked has this handler, too.
        is_main = os.getpid() == self._pid
        if number in ENDS_AT_ONCE and is_main and LAUNCHED_BY_TORCHRUN not in os.environ:
            # Not by this handler, which waits for a call into C to return.
            signal.signal(number, signal.SIG_DFL)

    def is_on_any_rank(self, device: torch.device) -> bool:
        """Whether a signal has come to any rank; every rank must ask, and all get one answer."""
        # A blocked signal waits, unless a thread that does not block it has taken it.
        is_here = self._is_here or signal.SIGUSR1 in signal.sigpending()
        if dist.get_world_size() == 1:
            return is_here
        arrived = torch.tensor(is_here, dtype=torch.int32, device=device)
        dist.all_reduce(arrived, dist.ReduceOp.MAX)
        return bool(arrived)

    def ignore_more(self) -> None:
        """Let no further signal take its exit code from a process that ends by one."""
        self._former = dict.fromkeys(self._former, signal.SIG_IGN)

    def close(self) -> None:
        """Give the signals their former actions back."""
        # One that waits arrives here, and not at the former action.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
        for number, action in self._former.items():
            signal.signal(number, action)
