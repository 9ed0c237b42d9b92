"""The wheel in an empty environment: the attention without extras, and the command."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow

ATTENTION = """
import importlib.util
import torch
from lighthouse import LighthouseConfig, lighthouse_attention

q = k = v = torch.randn(1, 8, 16384, 64)
out = lighthouse_attention(q, k, v, LighthouseConfig(num_levels=3, pooling_factor=4, topk=256))
names = ["torchtitan.train", "wandb", "datasets", "matplotlib", "transformers"]
print(tuple(out.shape), [name for name in names if importlib.util.find_spec(name)])
"""


def run(*command: str | Path, cwd: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder outside the checkout with the wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    # Build in a copy. setuptools leaves files in its build folder, and packs what it finds there.
    ignored = shutil.ignore_patterns(".*", "build", "*.egg-info", "outputs", "tests")
    shutil.copytree(ROOT, folder / "checkout", ignore=ignored)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    run(*pip, "--wheel-dir", folder, folder / "checkout", cwd=folder)
    return folder


def test_the_wheel_holds_configurations_and_tokenizer(folder):
    (wheel,) = folder.glob("*.whl")
    names = {*zipfile.ZipFile(wheel).namelist()}
    for path in (ROOT / "train_configs").glob("*.toml"):
        assert f"lighthouse_cli/train_configs/{path.name}" in names
    assert "lighthouse/py.typed" in names
    package = "torchtitan/experiments/lighthouse"
    assert f"{package}/assets/byte_tokenizer/tokenizer.json" in names
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / package).rglob("*.py")}
    sources |= {str(path.relative_to(ROOT)) for path in (ROOT / "lighthouse").rglob("*.py")}
    assert sources <= names
    assert not {"torchtitan/__init__.py", "torchtitan/experiments/__init__.py"} & names


def test_without_extras_it_is_the_attention(folder):
    (wheel,) = folder.glob("*.whl")
    run(sys.executable, "-m", "venv", folder / "bare", cwd=folder)
    bare = folder / "bare" / "bin"
    constraint = ("--constraint", ROOT / "constraints.txt")
    run(bare / "python", "-m", "pip", "install", "--quiet", *constraint, wheel, cwd=folder)
    assert run(bare / "python", "-c", ATTENTION, cwd=folder) == "(1, 8, 16384, 64) []\n"
    assert "debug " in run(bare / "lighthouse", "init", "--list", cwd=folder)
    run(bare / "lighthouse", "init", "debug", cwd=folder)
    done = subprocess.run(
        [bare / "lighthouse", "train", "debug.toml"], capture_output=True, text=True, cwd=folder
    )
    assert done.returncode == 2
    assert done.stderr == (
        "error: lighthouse train needs the package torchtitan, which is not installed; "
        "pip install 'lighthouse-attention[train]'\n"
    )
