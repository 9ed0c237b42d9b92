"""Train one configuration with a grid of Lighthouse settings, and compare the runs.

    lighthouse sweep c4_530m_98k.toml --output outputs/grid --list
    lighthouse sweep c4_530m_98k.toml --output outputs/grid --run --collect --world-size 8

A grid lists values of fields of [lighthouse], such as `stage2_seq_len` and `stage2_full_steps` for
stage 2 in pieces. `stage1_share` is stage 1 as a share of `training.steps` (0: dense throughout).
`seed` is debug.seed. The default is the grid of the paper. --grid takes a TOML file or an inline
table:

    --grid '{scorer = ["norm", "gla"], stage1_share = [0.5, 0.75], seed = [0, 1]}'

Each combination is a cell: the configuration with overrides, in its own folder.

--list     prints the cells with their overrides and states. An illegal cell is printed with the
           reason and otherwise left out.
--run      trains the cells one after another. A finished cell is skipped. A stopped cell resumes
           from its newest checkpoint. If a cell fails, the others are still trained. The folder of
           a failed cell holds error.txt, and the exit code is 1. A signal saves a checkpoint
           and stops, as in `lighthouse train`. The exit code is then 75.
--collect  writes table.md, table.csv, table.json and fields.png of all cells in the folder. A
           second table has the mean and range over cells that differ only in their seeds.

Further arguments override the configuration in every cell: `--training.steps 4000`.
"""

import copy
import itertools
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli
import torch
from torchtitan.experiments.lighthouse import launch
from torchtitan.experiments.lighthouse.analysis.run_metrics import read_run, summarize_run
from torchtitan.experiments.lighthouse.analysis.sweep_tables import COLUMNS, FIELDS, write_tables
from torchtitan.experiments.lighthouse.config.job_config import POOL_ROTARY
from torchtitan.experiments.lighthouse.config.load import load_config
from torchtitan.experiments.lighthouse.config.rule_helpers import check_choice, require
from torchtitan.experiments.lighthouse.preflight import check_config
from torchtitan.experiments.lighthouse.runtime.atomic_json import write_json
from torchtitan.experiments.lighthouse.runtime.command_line import (
    Parser,
    check_output_folder,
    exit_on_value_error,
)
from torchtitan.experiments.lighthouse.runtime.read_files import (
    PARSE_ERRORS,
    read_json,
    read_toml,
    reason_of,
)
from torchtitan.experiments.lighthouse.runtime.signals import EXIT_CODE

PAPER_GRID = {
    "scorer": ["norm", "dilated", "gla"],
    "pooling_factor": [2, 4, 8],
    "num_levels": [3, 4, 5],
    "topk": [1536, 2048, 3072, 4096, 6144],
    # 10,000 + 6,000 steps, 11,000 + 5,000 and 12,000 + 4,000.
    "stage1_share": [10 / 16, 11 / 16, 12 / 16],
}
"""Scorers, sizes and stages of the paper (arXiv 2605.06554)."""


@dataclass(frozen=True)
class Cell:
    """One combination of the grid."""

    folder: Path
    fields: dict[str, Any]
    overrides: list[str]
    """Command-line overrides of the configuration."""

    reason: str | None
    """Why the cell is illegal. None for a legal cell."""

    def state(self) -> str:
        """`new`, `stopped`, `failed` or `finished`."""
        for state, name in (("finished", "finished"), ("failed", "error.txt")):
            if (self.folder / name).exists():
                return state
        return "stopped" if (self.folder / "log.txt").exists() else "new"


def main() -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("config", type=Path, metavar="CONFIG", help="TOML file of a run in two stages")
    add("--grid", metavar="FILE|TABLE", help="TOML file or inline table; default: the paper's")
    add("--output", type=Path, required=True, metavar="FOLDER", help="for all cells")
    add("--list", action="store_true", help="print the cells (default)")
    add("--run", action="store_true", help="train the cells")
    add("--collect", action="store_true", help="write tables and plots")
    num_devices = max(1, torch.cuda.device_count())
    add("--world-size", type=int, default=num_devices, help="processes per run")
    options, overrides = parser.parse_known_args()
    exit_code = 0
    with exit_on_value_error():
        size = options.world_size
        require(size >= 1, "--world-size", "at least 1", size, "use 1 or more")
        check_output_folder("--output", options.output)
        grid = PAPER_GRID if options.grid is None else read_grid(options.grid)
        cells = cells_of(options.config, overrides, grid, options.output, options.world_size)
        if options.list or not (options.run or options.collect):
            list_cells(cells)
        if options.run:
            exit_code = run_cells(cells, options.config, overrides, options.world_size)
        if options.collect:
            collect(options.output)
    raise SystemExit(exit_code)


# ---- the grid


def read_grid(text: str) -> dict[str, list]:
    """Read a grid from a TOML file or an inline table.

    Raises:
        ValueError: the grid is not TOML, or does not consist of lists of values of known fields.
    """
    is_inline = text.lstrip().startswith("{")
    try:
        grid = tomli.loads(f"grid = {text}")["grid"] if is_inline else read_toml(text)
    except PARSE_ERRORS as error:
        what = "an inline table" if is_inline else "a TOML file"
        raise ValueError(
            f"--grid must be {what}, got {text[:80]!r} ({reason_of(error)}); correct it"
        ) from None
    if not grid:
        raise ValueError(f"--grid must name a field, got {text!r}; write one, or leave it out")
    known = [*(name for name in FIELDS if name != "stage1_steps"), "stage1_share"]
    for name, values in grid.items():
        if name not in known:
            raise ValueError(f"--grid: {name} is not a field; use {', '.join(known)}")
        if not isinstance(values, list) or not values:
            raise ValueError(f"--grid: {name} must be a list of values, got {values!r}; write one")
        is_text = name in ("scorer", "pool_rotary")
        kind = str if is_text else (int, float) if name == "stage1_share" else int
        for value in values:
            if not isinstance(value, kind) or isinstance(value, bool):
                expected = "text" if kind is str else "numbers"
                raise ValueError(
                    f"--grid: {name} must be a list of {expected}, got {value!r}; change its type"
                )
            if name == "pool_rotary":
                check_choice(f"--grid: {name}", value, list(POOL_ROTARY))
    for share in grid.get("stage1_share", []):
        remedy = "give stage 1 as a part of training.steps"
        require(0 <= share <= 1, "--grid: stage1_share", "from 0 to 1", share, remedy)
    return grid


def cells_of(
    config_file: Path, overrides: list[str], grid: dict[str, list], out: Path, nproc: int
) -> list[Cell]:
    """The cells of a grid, in its order.

    Raises:
        ValueError: the configuration cannot be read, or an override names a field of the grid.
    """
    of_cells = {"job.config_file", "job.dump_folder"}
    of_cells |= {flag_of(name.replace("_share", "_steps")) for name in grid}
    for argument in overrides:
        flag = argument.split("=")[0].replace("-", "_").removeprefix("__")
        if argument.startswith("--") and flag in of_cells:
            raise ValueError(f"{argument} must not be given, since a cell sets it; leave it out")
    base = load_config(["--job.config_file", str(config_file), *overrides])
    cells = []
    for values in itertools.product(*grid.values()):
        settings = dict(zip(grid, values, strict=True))
        if "stage1_share" in settings:
            settings["stage1_steps"] = round(settings.pop("stage1_share") * base.training.steps)
        config = copy.deepcopy(base)
        for name, value in settings.items():
            setattr(section_of(config, name), name, value)
        reason = None
        try:
            check_config(config, nproc, is_start=False)
        except ValueError as error:
            reason = str(error)
        fields = {name: getattr(section_of(config, name), name) for name in FIELDS}
        flags = [
            argument
            for name, value in settings.items()
            for argument in (f"--{flag_of(name)}", str(value))
        ]
        folder = out / name_of(fields, config.training.steps, grid)
        cells.append(Cell(folder, fields, flags, reason))
    return cells


def flag_of(name: str) -> str:
    """The field of the configuration that a field of the grid sets."""
    return f"debug.{name}" if name == "seed" else f"lighthouse.{name}"


def section_of(config: Any, name: str) -> Any:
    """The section of the configuration that holds a field of the grid."""
    return getattr(config, flag_of(name).split(".")[0])


def name_of(fields: dict[str, Any], steps: int, grid: dict[str, list]) -> str:
    """Name of a cell: scorer, pooling_factor, num_levels, topk, steps of both stages, and more.

    An example is norm-p4-L3-k1536-10000+6000.
    """
    stage1_steps = steps if fields["stage1_steps"] == -1 else fields["stage1_steps"]
    name = "{scorer}-p{pooling_factor}-L{num_levels}-k{topk}".format(**fields)
    dilation = f"-d{fields['dilation']}" if "dilation" in grid else ""
    seed = f"-s{fields['seed']}" if "seed" in grid else ""
    rotary = f"-{fields['pool_rotary']}" if "pool_rotary" in grid else ""
    pieces = f"-n{fields['stage2_seq_len']}" if "stage2_seq_len" in grid else ""
    full = f"-full{fields['stage2_full_steps']}" if "stage2_full_steps" in grid else ""
    return f"{name}{dilation}{rotary}-{stage1_steps}+{steps - stage1_steps}{pieces}{full}{seed}"


def list_cells(cells: list[Cell]) -> None:
    for cell in cells:
        state = f"illegal: {cell.reason}" if cell.reason else cell.state()
        print(f"{cell.folder.name}  {' '.join(cell.overrides)}  {state}")
    num_legal = sum(cell.reason is None for cell in cells)
    print(f"{len(cells)} cells, {num_legal} legal, {len(cells) - num_legal} illegal")


# ---- runs


def run_cells(cells: list[Cell], config_file: Path, overrides: list[str], nproc: int) -> int:
    """Train the legal cells that are not finished. Returns the exit code.

    Raises:
        ValueError: there is no legal cell, or a cell's folder has other settings.
    """
    legal = [cell for cell in cells if cell.reason is None]
    if not legal:
        raise ValueError("--grid must have a legal cell, got none; see --list")
    for cell in legal:
        take_folder(cell, config_file, overrides)
    failed = []
    with launch.signals_to_stop() as asked:
        for i, cell in enumerate(legal):
            if asked:
                break
            title = f"[{i + 1}/{len(legal)}] {cell.folder.name}"
            if cell.state() == "finished":
                print(f"{title}: finished before")
                continue
            print(f"{title}: training ...", flush=True)
            start = time.monotonic()
            end = train(cell, config_file, overrides, nproc, asked)
            if cell.state() == "failed":
                failed.append(cell.folder)
            print(f"{title}: {end}, {time.monotonic() - start:.0f} s", flush=True)
    if failed:
        print(f"{len(failed)} of {len(legal)} cells failed: {' '.join(map(str, failed))}")
    if asked:
        print("Asked to stop; run the same command to resume.")
        return EXIT_CODE
    return 1 if failed else 0


def take_folder(cell: Cell, config_file: Path, overrides: list[str]) -> None:
    """Create the folder of a cell, or check that an existing one has the same settings."""
    settings = {
        "fields": cell.fields,
        "overrides": [*overrides, *cell.overrides],
        "config": read_toml(config_file),
    }
    path = cell.folder / "cell.json"
    if not path.exists():
        cell.folder.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)
    elif read_settings(path) != settings:
        raise ValueError(
            f"--output must be a folder of the same configuration, got {str(cell.folder)!r} with "
            "another one; name another --output, or remove that cell"
        )


def read_settings(path: Path) -> dict[str, Any]:
    """Read the settings that `take_folder` wrote. Raises ValueError if they are damaged."""
    try:
        settings = read_json(path)
        # Earlier versions had no pieces. Stage 2 was at full length.
        before = {"stage2_seq_len": 0, "stage2_full_steps": 0}
        settings["fields"] = before | settings["fields"]
        return {name: settings[name] for name in ("fields", "overrides", "config")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--output must hold undamaged cell.json files, got {str(path)!r}: {error!r}; "
            "remove the folder of that cell, which is then trained again"
        ) from None


def train(
    cell: Cell, config_file: Path, overrides: list[str], nproc: int, asked: list[bool]
) -> str:
    """Train or resume a cell. Returns how it ended, which its folder records as well."""
    args = [
        "--job.config_file", str(config_file), "--job.dump_folder", str(cell.folder),
        *overrides, *cell.overrides,
    ]  # fmt: skip
    names = {"WANDB_RUN_GROUP": cell.folder.parent.name, "WANDB_RUN_NAME": cell.folder.name}
    log, error = cell.folder / "log.txt", cell.folder / "error.txt"
    error.unlink(missing_ok=True)
    with log.open("a") as file:
        exit_code = launch.run(args, nproc, asked, file, **names)
    if exit_code == 0:
        (cell.folder / "finished").touch()
        return "finished"
    if exit_code == EXIT_CODE:
        # The signal may have reached the processes alone.
        asked.append(True)
        return "stopped, saved"
    if asked:
        return f"stopped with exit code {exit_code}, see {log}"
    command = shlex.join(["lighthouse", "train", *args, "--nproc-per-node", str(nproc)])
    tail = log.read_text(errors="replace").splitlines()[-60:]
    lines = [command, f"exit code {exit_code}; the end of {log}:", "", *tail]
    error.write_text("\n".join(lines) + "\n")
    return f"failed, see {error}"


def collect(out: Path) -> None:
    """Write tables and plots of all cells in `out`.

    Raises:
        ValueError: there is no cell.
    """
    rows = []
    for path in sorted(out.glob("*/cell.json")):
        cell = Cell(path.parent, read_settings(path)["fields"], [], None)
        row = {"cell": cell.folder.name, **cell.fields, "state": cell.state()}
        try:
            row |= summarize_run(read_run(cell.folder))
        except ValueError:
            # It has not trained a step.
            row |= dict.fromkeys(COLUMNS)
        rows.append(row)
    if not rows:
        raise ValueError(
            f"--output must hold cells to collect, got none in {str(out)!r}; use --run"
        )
    for path in write_tables(rows, out):
        print(path)
