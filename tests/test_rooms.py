"""Which module imports which: one way only, and the attention on its own."""

import ast
import sys
from pathlib import Path

import pytest

from lighthouse.config import SCORER_NAMES
from lighthouse.scorers import SCORERS

ROOT = Path(__file__).parents[1]
PACKAGE = "torchtitan.experiments.lighthouse"

# From the ground up. Modules beside the rooms have a floor of their own; what stands on one floor
# does not import each other.
FLOORS = [
    ["runtime", "flavors"],
    ["data", "metrics"],
    ["config"],
    ["context_parallel", "apply_lighthouse", "loss"],
    ["checkpoint", "validate"],
    ["preflight", "inference", "selection_metrics"],
    ["planner", "analysis"],
    ["__init__"],
    ["train"],
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def modules(folder: Path) -> dict[str, Path]:
    """Dotted names inside `folder`."""
    files = sorted(folder.rglob("*.py"))
    return {".".join(f.relative_to(folder).with_suffix("").parts): f for f in files}


def imported(path: Path) -> set[str]:
    """Full names of the modules that a file imports anywhere in it."""
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


def test_the_attention_imports_no_trainer():
    allowed = {"lighthouse", "torch", "triton", "fla", *sys.stdlib_module_names}
    for name, path in modules(ROOT / "lighthouse").items():
        for target in imported(path):
            assert target.split(".")[0] in allowed, f"lighthouse.{name} imports {target}"


@pytest.mark.parametrize("name", [name for name in modules(ROOT / "lighthouse") if "." not in name])
def test_modules_of_the_attention_form_no_circle(name):
    def reached(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path, module])
        for target in imported(ROOT / "lighthouse" / f"{module}.py"):
            inside = target.removeprefix("lighthouse.")
            if inside != target and (ROOT / "lighthouse" / f"{inside}.py").exists():
                reached(inside, (*path, module))

    reached(name, ())


def test_every_name_of_a_scorer_has_one():
    assert tuple(SCORERS) == SCORER_NAMES
