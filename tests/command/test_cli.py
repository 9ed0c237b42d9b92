"""The command `lighthouse`: its list of programs, its imports, and errors without its extras."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lighthouse_cli
from lighthouse_cli import COMMANDS, init

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "lighthouse_cli"]

REFUSING = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {refused}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Refuse())
"""
"""Make a process behave as if packages were not installed."""

EXTRAS = ["torchtitan", "wandb", "datasets", "matplotlib", "transformers", "tokenizers", "tyro"]


def python(code: str, refused: list[str], *args: str, cwd: Path) -> subprocess.CompletedProcess:
    """Run `code` in a process without the packages `refused`."""
    code = REFUSING.format(refused=refused) + code
    return subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, cwd=cwd
    )


@pytest.mark.parametrize("args", [[], ["--help"], ["init", "--list"]], ids=str)
def test_help_and_lists_import_no_torch(args, tmp_path):
    code = "from lighthouse_cli import main; main()"
    done = python(code, [*EXTRAS, "torch", "numpy"], *args, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    listed = [line.split()[0] for line in done.stdout.splitlines() if line]
    assert {*(init.shipped() if args == ["init", "--list"] else COMMANDS)} <= {*listed}


def test_an_unknown_command_is_one_line(tmp_path):
    done = subprocess.run([*COMMAND, "trian"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and not done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: the command must be one of init, train, plan, ")
    assert line.endswith("got 'trian'; did you mean train?")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lighthouse", name, "--help"])
    with pytest.raises(SystemExit) as end:
        lighthouse_cli.main()
    assert not end.value.code
    out = capsys.readouterr().out
    doc = importlib.import_module(COMMANDS[name][0]).__doc__
    # The help's example uses this command.
    assert f"\n    lighthouse {name}" in doc and doc.partition("\n")[0] in out
    assert f"usage: lighthouse {name}" in out


def test_the_attention_needs_torch_alone(tmp_path):
    code = """
import torch
from lighthouse import LighthouseConfig, lighthouse_attention

q = k = v = torch.randn(1, 2, 2048, 16)
config = LighthouseConfig(num_levels=3, pooling_factor=4, topk=128)
print(tuple(lighthouse_attention(q, k, v, config).shape))
"""
    done = python(code, EXTRAS, cwd=tmp_path)
    assert done.stdout == "(1, 2, 2048, 16)\n", done.stderr


@pytest.mark.parametrize("name", ["train", "report"])
def test_a_missing_extra_is_named_in_one_line(name, tmp_path):
    code = "from lighthouse_cli import main; main()"
    done = python(code, EXTRAS, name, "x", cwd=tmp_path)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == (
        f"error: lighthouse {name} needs the package torchtitan, which is not installed; "
        "pip install 'lighthouse-attention[train]'\n"
    )


def test_wandb_and_transformers_are_not_imported_unasked(tmp_path):
    code = """
import torchtitan.experiments.lighthouse.launch
import torchtitan.experiments.lighthouse.inference.export
import torchtitan.experiments.lighthouse.inference.loss_by_position
import torchtitan.experiments.lighthouse.analysis.sweep
print({"wandb", "transformers"} & {*sys.modules})
"""
    done = python(code, [], cwd=tmp_path)
    assert done.stdout == "set()\n", done.stderr


@pytest.mark.parametrize(
    "args",
    [
        *("--help", "init --list", "init --help"),
        f"plan {ROOT}/train_configs/debug.toml --world-size 1",
    ],
)
def test_a_closed_pipe_ends_without_a_traceback(args, tmp_path):
    assert closed_pipe([*COMMAND, *args.split()], tmp_path) == (141, "")


@pytest.mark.parametrize(
    ("program", "code"),
    [
        ("print('x' * 100_000)", 141),
        ("print('x'); sys.exit()", 141),
        ("print(1); sys.exit(75)", 75),
    ],
)
def test_a_closed_pipe_keeps_the_exit_code_of_a_failure(program, code, tmp_path):
    """Output longer than the buffer fails in the program, the rest in the flush."""
    (tmp_path / "program.py").write_text(f"import sys\ndef main():\n    {program}\n")
    call = "import lighthouse_cli as c; c.COMMANDS['x'] = ('program', ''); c.main()"
    assert closed_pipe([sys.executable, "-c", call, "x"], tmp_path) == (code, "")


@pytest.mark.parametrize(
    ("program", "code", "error"),
    [
        ("open('no/file', 'w')", 1, "error: No such file or directory (no/file); correct "),
        ("raise OSError(28, 'No space left on device')", 1, "error: No space left on device; "),
        ("raise KeyboardInterrupt", 130, ""),
    ],
)
def test_an_error_of_the_system_is_one_line(program, code, error, tmp_path):
    (tmp_path / "program.py").write_text(f"def main():\n    {program}\n")
    call = "import lighthouse_cli as c; c.COMMANDS['x'] = ('program', ''); c.main()"
    command = [sys.executable, "-c", call, "x"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == code and done.stderr.startswith(error)
    assert done.stderr.count("\n") == bool(error)


def closed_pipe(command: list[str], folder: Path) -> tuple[int, str]:
    """Exit code and stderr of a process whose stdout has no reader."""
    reader, writer = os.pipe()
    os.close(reader)
    # Only a buffer that is flushed at the end meets every case.
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=folder, env=buffered
    )
    os.close(writer)
    return done.returncode, done.stderr
