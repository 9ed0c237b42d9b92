"""Check which modules may import each other, and the length of modules and functions."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lighthouse.config import SCORER_NAMES, LighthouseConfig
from lighthouse.costs import scored_positions
from lighthouse.reference import reference_scores
from lighthouse.scorers import SCORERS

ROOT = Path(__file__).parents[1]
PACKAGE = "torchtitan.experiments.lighthouse"

# Layers of the training package from the bottom up. A module or folder imports only from layers
# below its own.
FLOORS = [
    ["runtime", "flavors"],
    ["data", "metrics"],
    ["config"],
    ["context_parallel", "apply_lighthouse", "loss"],
    ["checkpoint", "validate"],
    ["preflight", "inference", "selection_metrics"],
    ["planner"],
    ["__init__"],
    ["train"],
    ["launch"],
    ["analysis"],
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def modules(folder: Path) -> dict[str, Path]:
    """Dotted names inside `folder`."""
    files = sorted(folder.rglob("*.py"))
    return {".".join(f.relative_to(folder).with_suffix("").parts): f for f in files}


def imported(path: Path) -> set[str]:
    """Full names of all modules that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, path
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_imports_run_one_way():
    found = modules(ROOT / "torchtitan" / "experiments" / "lighthouse")
    assert {name.split(".")[0] for name in found} == FLOOR.keys()
    for name, path in found.items():
        room = name.split(".")[0]
        for target in imported(path):
            inside = target.removeprefix(f"{PACKAGE}.")
            other = inside.split(".")[0]
            if inside == target or other not in FLOOR or other == room:
                continue
            assert FLOOR[other] < FLOOR[room], f"{name} imports {inside}, which is not below it"


@pytest.mark.parametrize("folder", ["lighthouse", "torchtitan", "scripts"])
def test_modules_and_functions_are_short(folder):
    """A module has at most 450 lines, a function at most 80."""
    for path in (ROOT / folder).rglob("*.py"):
        source = path.read_text()
        assert source.count("\n") <= 450, path
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno - node.lineno < 80, f"{path}: {node.name}"


IMPORT_ALL = """
import copy, importlib, sys, warnings
import torchtitan.protocols.train_spec, torchtitan.train
import torchtitan.models.llama3.infra.parallelize

def snapshot():
    return {
        (name, key): copy.copy(value) if isinstance(value, (dict, list, set)) else value
        for name, module in sys.modules.items()
        if name.startswith("torchtitan.") and "experiments" not in name
        for key, value in vars(module).items()
        if not key.startswith("__")
    }

before, filters = snapshot(), list(warnings.filters)
for name in sys.argv[1:]:
    importlib.import_module(name)
after = snapshot()
changed = [key for key, value in before.items() if after[key] is not value and after[key] != value]
print(sorted(".".join(key) for key in changed), [f for f in warnings.filters if f not in filters])
"""


def test_an_import_registers_the_model_and_does_nothing_else():
    names = [PACKAGE, f"{PACKAGE}.train", f"{PACKAGE}.analysis.report"]
    command = [sys.executable, "-c", IMPORT_ALL, *names]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    registry = "torchtitan.protocols.train_spec._extra_train_specs"
    assert done.stdout.splitlines()[-1] == f"{[registry]} []"


@pytest.mark.parametrize(
    ("folder", "allowed"),
    [
        ("lighthouse", {"lighthouse", "torch", "triton", "fla"}),
        ("lighthouse_cli", {"lighthouse", "lighthouse_cli", "torch", "triton", "matplotlib"}),
    ],
)
def test_the_attention_and_the_command_import_no_trainer(folder, allowed):
    for name, path in modules(ROOT / folder).items():
        extra = {"transformers"} if (folder, name) == ("lighthouse", "huggingface") else set()
        for target in imported(path):
            known = allowed | extra | sys.stdlib_module_names
            assert target.split(".")[0] in known, f"{folder}.{name} imports {target}"


def test_modules_of_the_attention_form_no_circle():
    files = {name: path for name, path in modules(ROOT / "lighthouse").items() if "." not in name}
    # Raises an error that names the modules of a circle.
    graphlib.TopologicalSorter(
        {f"lighthouse.{name}": imported(path) for name, path in files.items()}
    ).prepare()


def test_every_name_of_a_scorer_has_one():
    assert tuple(SCORERS) == SCORER_NAMES
    for name in SCORER_NAMES:
        assert scored_positions(LighthouseConfig(scorer=name), 4096, 64) >= 0
        q = torch.randn(1, 1, 8, 4)
        assert reference_scores(q, q, q, name)[0].shape == (1, 1, 8)
