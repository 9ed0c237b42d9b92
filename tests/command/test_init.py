"""`lighthouse init`: copies shipped configurations that work in any folder."""

import sys
from pathlib import Path

import pytest
from runs import RANKS
from torchtitan.experiments.lighthouse.config.load import load_config
from torchtitan.experiments.lighthouse.preflight import check_config

from lighthouse_cli import init

CONFIGS = Path(__file__).parents[2] / "train_configs"


@pytest.fixture
def call(monkeypatch, tmp_path):
    """`lighthouse init` with arguments, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*args: str) -> None:
        monkeypatch.setattr(sys, "argv", ["lighthouse init", *args])
        init.main()

    return call


def test_every_configuration_is_listed_with_its_first_line(call, capsys):
    call("--list")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(path.stem for path in CONFIGS.glob("*"))
    debug = next(line for line in lines if line.startswith("debug "))
    assert debug.endswith("  A small model in two stages: 40 steps with Lighthouse, 20 dense.")


@pytest.mark.parametrize("name", [path.stem for path in sorted(CONFIGS.glob("*.toml"))])
def test_a_copy_is_legal_in_another_folder(name, call, tmp_path, capsys):
    call(name)
    copied = tmp_path / f"{name}.toml"
    assert capsys.readouterr().out == f"{copied}\n"
    assert copied.read_bytes() == (CONFIGS / f"{name}.toml").read_bytes()
    config = load_config(["--job.config_file", str(copied)])
    check_config(config, RANKS.get(name, 1), is_start=False)


def test_a_copy_can_start_where_nothing_else_is(call, tmp_path):
    call("debug.toml")
    check_config(load_config(["--job.config_file", "debug.toml"]), 1)


def test_nothing_is_overwritten(call, tmp_path, capsys):
    (tmp_path / "debug.toml").write_text("mine")
    with pytest.raises(SystemExit) as end:
        call("debug")
    assert end.value.code == 2 and (tmp_path / "debug.toml").read_text() == "mine"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: NAME must be a configuration that is not here yet, got 'debug'")
    assert line.endswith("debug.toml exists; move that file away")


def test_a_link_to_nowhere_is_not_followed(call, tmp_path, capsys):
    (tmp_path / "debug.toml").symlink_to(tmp_path / "elsewhere.toml")
    with pytest.raises(SystemExit) as end:
        call("debug")
    assert end.value.code == 2 and not (tmp_path / "elsewhere.toml").exists()
    assert "debug.toml exists; move" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["debgu"], "error: NAME must be one of 1m_context, "),
        (["../debug"], "error: NAME must be one of 1m_context, "),
        ([], "error: give NAME or --list, one of them; see --help"),
        (["debug", "--list"], "error: give NAME or --list, one of them; see --help"),
    ],
    ids=str,
)
def test_a_wrong_call_is_one_line(args, message, call, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        call(*args)
    assert end.value.code == 2 and not list(tmp_path.iterdir())
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(message)
    assert line.endswith("did you mean debug?") == (len(args) == 1)
