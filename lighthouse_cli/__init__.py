"""The console command `lighthouse`. It imports only the module of the chosen program.

    lighthouse COMMAND [arguments ...]

This package is outside `torchtitan`, because importing any part of `torchtitan` imports torch
first. `lighthouse --help` and `lighthouse init` need neither.
"""

import importlib
import os
import sys

from lighthouse_cli.parser import did_you_mean

_TRAINER = "torchtitan.experiments.lighthouse"

COMMANDS = {
    "init": ("lighthouse_cli.init", "copy a shipped configuration into the current folder"),
    "train": (f"{_TRAINER}.launch", "train in two stages from a TOML file"),
    "plan": (f"{_TRAINER}.planner.render", "memory, FLOPs and time of a run before it starts"),
    "tokenizer": (f"{_TRAINER}.data.bpe_tokenizer", "train a byte-pair tokenizer from a corpus"),
    "prepare": (f"{_TRAINER}.data.prepare", "tokenize a corpus once"),
    "export": (f"{_TRAINER}.inference.export", "write a checkpoint as a Hugging Face Llama"),
    "generate": (f"{_TRAINER}.inference.generate", "continue a prompt"),
    "eval-loss": (f"{_TRAINER}.inference.loss_by_position", "held-out loss by position"),
    "eval-passkey": (f"{_TRAINER}.inference.passkey", "pass key retrieval by length and depth"),
    "eval-recall": (f"{_TRAINER}.inference.recall", "recall by distance to what was read"),
    "report": (f"{_TRAINER}.analysis.report", "compare the metrics of runs"),
    "sweep": (f"{_TRAINER}.analysis.sweep", "train a grid of Lighthouse's settings"),
    "bench": ("lighthouse_cli.bench", "time a layer of Lighthouse Attention"),
}
"""For each command, the module whose `main()` it calls and a description."""


BROKEN_PIPE = 141
"""Exit code if the reader of stdout has closed it: 128 plus SIGPIPE, as in a shell."""


INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 plus SIGINT, as in a shell."""


def main() -> None:
    """Entry point. A usage error prints one line on stderr and exits with code 2.

    So does a file that cannot be read or written, or a full disk, with code 1.
    """
    try:
        try:
            call()
        finally:
            # What stdout still buffers would otherwise raise the error after the end of main.
            sys.stdout.flush()
    except BrokenPipeError as error:
        # Python flushes stdout again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        ended = error.__context__
        code = ended.code if isinstance(ended, SystemExit) else None
        raise SystemExit(code or BROKEN_PIPE) from None
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    except OSError as error:
        # Libraries derive errors of their own, without a number.
        if error.errno is None:
            raise
        place = "" if error.filename is None else f" ({error.filename})"
        refuse(f"{error.strerror}{place}; correct this and start the same command again", 1)


def call() -> None:
    """Call the program that the command line names."""
    name, args = (sys.argv[1:2] or ["--help"])[0], sys.argv[2:]
    if name in ("-h", "--help"):
        print(usage())
        return
    if name not in COMMANDS:
        remedy = did_you_mean(name, COMMANDS, "see lighthouse --help")
        refuse(f"the command must be one of {', '.join(COMMANDS)}, got {name!r}; {remedy}")
    # The program reads its arguments and the name in its help text from here.
    sys.argv = [f"lighthouse {name}", *args]
    module, _ = COMMANDS[name]
    try:
        if module.startswith(_TRAINER):
            # This fails without the trainer's dependencies. Our own package would import torch
            # before that, and torch warns if NumPy is missing.
            importlib.import_module("torchtitan.components")
        program = importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if missing.startswith((_TRAINER, "lighthouse")):
            raise
        refuse(
            f"lighthouse {name} needs the package {missing.split('.')[0]}, which is not installed; "
            "pip install 'lighthouse-attention[train]'"
        )
    program.main()


def refuse(message: str, code: int = 2) -> None:
    """Print one line on stderr and exit with `code`."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


def usage() -> str:
    lines = "\n".join(f"  {name:<14}{summary}" for name, (_, summary) in COMMANDS.items())
    return f"""usage: lighthouse COMMAND [arguments ...]

Long-context pre-training with Lighthouse Attention: sparse first, dense at the end.

{lines}

lighthouse COMMAND --help describes one command."""
