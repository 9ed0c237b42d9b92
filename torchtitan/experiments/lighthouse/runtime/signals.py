"""Stop a run on a signal after the current step, with a checkpoint.

    SIGTERM    sent by a scheduler or torchrun before it kills the process
    SIGUSR1    sent early by a scheduler if the job asks for it
    SIGINT     Ctrl-C
    SIGHUP     the terminal was closed

Each signal asks the run to stop after the current step. The run saves a checkpoint and exits with
`EXIT_CODE`. The same command resumes from that checkpoint.

A second SIGINT or SIGHUP ends the process at once, without a checkpoint. Under torchrun it does
not, because the terminal and torchrun each send the first one. SIGTERM and SIGUSR1 may be repeated.
SIGINT or SIGHUP stays ignored if it was ignored at the start, such as SIGHUP under nohup.

A scheduler signals every process of a job, including helper processes of the trainer. SIGUSR1 is
blocked. Helpers inherit this and keep running. SIGTERM ends them, as the code that starts them
expects.
"""

import os
import signal

import torch
import torch.distributed as dist
from torchtitan.experiments.lighthouse.runtime.launcher import LAUNCHED_BY_TORCHRUN

EXIT_CODE = 75
"""Exit code of a run that was saved and can be resumed: EX_TEMPFAIL of sysexits.h, "try again"."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)

ENDS_AT_ONCE = (signal.SIGINT, signal.SIGHUP)
"""Signals that end the process when they arrive a second time."""


def heeded_signals() -> list[signal.Signals]:
    """The signals in `SIGNALS`, without SIGINT and SIGHUP if the process ignores them."""
    return [
        number
        for number in SIGNALS
        if number not in ENDS_AT_ONCE or signal.getsignal(number) != signal.SIG_IGN
    ]


class Interruption:
    """Handles the signals in place of their default actions, from its construction on."""

    def __init__(self):
        self._is_here = False
        self._pid = os.getpid()
        self._former = {number: signal.signal(number, self._arrive) for number in heeded_signals()}
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])

    def ask(self) -> None:
        """Ask the run to stop after the current step, as a signal does."""
        self._is_here = True

    def _arrive(self, number, frame) -> None:
        self._is_here = True
        # Forked child processes inherit this handler.
        is_main = os.getpid() == self._pid
        if number in ENDS_AT_ONCE and is_main and LAUNCHED_BY_TORCHRUN not in os.environ:
            # The default action works at once. A Python handler runs only after a C call returns.
            signal.signal(number, signal.SIG_DFL)

    def is_on_any_rank(self, device: torch.device) -> bool:
        """Whether any rank has received a signal. A collective: every rank must call it."""
        # A blocked signal stays pending, unless a thread that does not block it has received it.
        is_here = self._is_here or signal.SIGUSR1 in signal.sigpending()
        if dist.get_world_size() == 1:
            return is_here
        arrived = torch.tensor(is_here, dtype=torch.int32, device=device)
        dist.all_reduce(arrived, dist.ReduceOp.MAX)
        return bool(arrived)

    def ignore_more(self) -> None:
        """Ignore further signals, so that they cannot change the exit code of an ending process."""
        self._former = dict.fromkeys(self._former, signal.SIG_IGN)

    def close(self) -> None:
        """Restore the former actions of the signals."""
        # A pending signal is delivered to this handler, not to the former action.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
        for number, action in self._former.items():
            signal.signal(number, action)
