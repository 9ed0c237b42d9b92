"""Commands in documents, TOML headers and docstrings exist and take their options; some run.

A command is a line of an indented or fenced block, a span in backquotes, or the text after a colon
in the header of a TOML. Words in capitals and the names of a reader's files are placeholders.
"""

import ast
import importlib
import os
import re
import shlex
import sys
from pathlib import Path

import pytest
from torchtitan.experiments.lighthouse.config.load import _check_flags

import lighthouse_cli
from lighthouse_cli import COMMANDS

ROOT = Path(__file__).parents[2]
STARTS = (
    r"(?:lighthouse [a-z-]+|(?:scripts|benchmarks)/[\w/]+\.(?:py|sh|sbatch)"
    r"|python3? |torchrun |sbatch )"
)
PLACEHOLDER = re.compile(r"^(my|FILE|.*/FILE)\.toml$")
MODULE = "torchtitan.experiments.lighthouse.train"


def texts() -> dict[str, str]:
    """Texts that readers may copy commands from, by file name."""
    files = [*ROOT.glob("*.md"), *ROOT.glob("benchmarks/*.md"), *ROOT.glob("train_configs/*.toml")]
    files += [*ROOT.glob("docs/*.md"), *ROOT.glob("scripts/*.sh"), *ROOT.glob("scripts/slurm/*")]
    found = {str(path.relative_to(ROOT)): path.read_text() for path in files}
    for folder in ("lighthouse_cli", "torchtitan", "scripts", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            found[str(path.relative_to(ROOT))] = (
                ast.get_docstring(ast.parse(path.read_text())) or ""
            )
    return found


def commands_in(name: str, text: str) -> list[str]:
    """The commands of a text, each on one line."""
    if not name.endswith((".md", ".py")):
        lines = [line for line in text.splitlines() if line.startswith("#")]
        text = "\n".join(line.removeprefix("#") for line in lines)
    text = re.sub(r"\\\n\s*", "", text)
    found = re.findall(rf"`({STARTS}[^`\n]*)`", text)
    start = rf"^\s*(?:\$ )?({STARTS}.*)"
    if name.endswith(".toml"):
        start += rf"|: ({STARTS}[^;\n]*)"
    for command in re.finditer(start, re.sub(r"`[^`\n]*`", "", text), re.MULTILINE):
        found.append(command[1] or command[2])
    return found


FOUND = sorted(
    {(name, command) for name, text in texts().items() for command in commands_in(name, text)}
)


@pytest.fixture(scope="module")
def options():
    """The options of each command in its help."""
    found = {}

    def options(name: str) -> set[str]:
        if name not in found:
            out = []
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", [f"lighthouse {name}", "--help"])
                patch.setattr(sys.stdout, "write", out.append)
                with pytest.raises(SystemExit):
                    importlib.import_module(COMMANDS[name][0]).main()
            found[name] = {*re.findall(r"--[a-z][\w-]*", "".join(out))}
        return found[name]

    return options


def test_commands_are_found_in_all_kinds_of_text():
    kinds = {(Path(name).suffix, command.split()[0].split("/")[0]) for name, command in FOUND}
    assert {(".md", "lighthouse"), (".toml", "lighthouse"), (".py", "lighthouse")} <= kinds
    assert {(".md", "scripts"), (".md", "torchrun"), (".md", "sbatch"), (".py", "scripts")} <= kinds
    assert len(FOUND) > 50


@pytest.mark.parametrize(("name", "command"), FOUND, ids=[f"{n}: {c}" for n, c in FOUND])
def test_a_command_is_one(name, command, options):
    program, *args = shlex.split(command, comments=True)
    args = [arg for arg in args if arg != "..." and not arg.startswith("[")]
    flags = [arg for arg in args if arg.startswith("--")]
    if command == "lighthouse --help":
        return
    if program == "lighthouse":
        program, *args = args
        for flag in flags:
            if "." not in flag:
                assert flag.split("=")[0] in options(program), flag
    elif "-m" in args and program != "scripts/test.sh":
        assert args[args.index("-m") + 1] in (MODULE, "pytest", "lighthouse_cli")
    elif program in ("python", "python3", "sbatch"):
        (target,) = (arg for arg in args if arg.endswith((".py", ".sbatch")))
        assert target == "scripts/slurm/NAME.sbatch" or (ROOT / target).is_file()
    else:
        script = ROOT / program
        assert os.access(script, os.X_OK) and script.read_text().startswith("#!/usr/bin/env ")
        if script.suffix == ".py":
            for flag in flags:
                assert "." in flag or f'"{flag}"' in script.read_text(), flag
    _check_flags([flag for flag in flags if "." in flag])
    for arg in args:
        if arg.endswith(".toml") and not PLACEHOLDER.match(arg):
            assert any((folder / arg).is_file() for folder in (ROOT, ROOT / "train_configs")), arg


CHEAP = [
    command
    for _, command in FOUND
    if re.match(r"lighthouse (init|plan) |lighthouse sweep .*--list", command)
    and not re.search(r"\b(NAME|my)\b", command)
]


@pytest.mark.parametrize("command", sorted({*CHEAP}))
def test_a_cheap_command_runs(command, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    for path in (ROOT / "train_configs").glob("*.toml"):
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "train_configs").symlink_to(ROOT / "train_configs")
    if command.startswith("lighthouse init"):
        (tmp_path / "new").mkdir()
        monkeypatch.chdir(tmp_path / "new")
    monkeypatch.setattr(sys, "argv", shlex.split(command, comments=True))
    try:
        lighthouse_cli.main()
    except SystemExit as end:
        assert not end.code, capsys.readouterr().err
    assert capsys.readouterr().out
