"""`lighthouse sweep`: the cells of a grid, the processes it starts, and its tables.

A script replaces the trainer. It records its arguments and ends as the test asks.
"""

import csv
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from torchtitan.experiments.lighthouse import launch
from torchtitan.experiments.lighthouse.analysis import sweep

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "train_configs" / "debug.toml"
GRID = '{scorer = ["norm", "none"], topk = [128, 200], stage1_share = [0.25, 0.5]}'

TRAINER = """
import json, os, pathlib, signal, sys, time
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
folder = pathlib.Path(arguments["--job.dump_folder"])
with (folder / "starts.jsonl").open("a") as file:
    file.write(json.dumps([arguments, os.environ["WANDB_RUN_NAME"]]) + "\\n")
with (folder / "ranks.txt").open("a") as file:
    names = ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS")
    file.write(" ".join(os.environ.get(name, "") for name in names) + "\\n")
print("the trainer speaks")
stage1_steps = int(arguments["--lighthouse.stage1_steps"])
if (folder / "fail").exists():
    raise SystemExit("the trainer fails")
if (folder / "wait").exists():
    code = int((folder / "wait").read_text())
    signal.signal(signal.SIGTERM, lambda *_: os._exit(code))
    (folder / "waiting").touch()
    time.sleep(60)
with (folder / "metrics.jsonl").open("w") as file:
    for step in range(1, 61):
        stage = 1 if step <= stage1_steps else 2
        line = {"step": step, "stage": stage, "loss_metrics/global_avg_loss": 3.0,
                "throughput(tps)": 300.0 / stage, "n_tokens_seen": step * 10}
        file.write(json.dumps(line) + "\\n")
    line = {"step": 60, "stage": 2, "validation_metrics/loss": 2 + stage1_steps / 60}
    file.write(json.dumps(line) + "\\n")
"""


@pytest.fixture
def ablate(monkeypatch, tmp_path):
    """Call the script in this process and return its exit code."""
    (tmp_path / "trainer.py").write_text(TRAINER)
    monkeypatch.setattr(launch, "TRAINER", [sys.executable, str(tmp_path / "trainer.py")])

    def call(*args, grid=GRID):
        options = ["--output", tmp_path / "grid", "--world-size", 1, "--grid", grid, *args]
        monkeypatch.setattr(sys, "argv", ["lighthouse sweep", str(CONFIG), *map(str, options)])
        with pytest.raises(SystemExit) as exit:
            sweep.main()
        return exit.value.code

    return call


def starts(cell: Path) -> list:
    return [json.loads(line) for line in (cell / "starts.jsonl").read_text().splitlines()]


def test_the_list_has_every_cell_and_says_why_one_is_illegal(ablate, tmp_path, capsys):
    assert ablate() == 0
    *lines, total = capsys.readouterr().out.splitlines()
    assert total == "8 cells, 2 legal, 6 illegal"
    assert lines[0] == (
        "norm-p4-L3-k128-15+45  --lighthouse.scorer norm --lighthouse.topk 128 "
        "--lighthouse.stage1_steps 15  new"
    )
    names = [line.split()[0] for line in lines]
    assert names == [
        f"{scorer}-p4-L3-k{topk}-{stages}"
        for scorer in ("norm", "none")
        for topk in (128, 200)
        for stages in ("15+45", "30+30")
    ]
    assert lines[1].endswith("  new")
    assert all("illegal: lighthouse.topk must be" in line for line in lines[2:4])
    assert lines[2].endswith("got 200; nearest: 128")
    assert all("illegal: lighthouse.scorer must be one of norm" in line for line in lines[4:6])
    assert not (tmp_path / "grid").exists()


def test_the_grid_of_the_paper_on_its_configuration(tmp_path):
    config = ROOT / "train_configs" / "c4_530m_98k.toml"
    cells = sweep.cells_of(config, [], sweep.PAPER_GRID, tmp_path, 8)
    assert len(cells) == len({cell.folder for cell in cells}) == 3 * 3 * 3 * 5 * 3
    assert sum(cell.reason is None for cell in cells) == 198
    assert {cell.fields["stage1_steps"] for cell in cells} == {10_000, 11_000, 12_000}
    # The coarsest level of p2 L3 has 24,576 entries. All of topk fits, as in the paper's best run.
    fitting = [c for c in cells if (c.fields["pooling_factor"], c.fields["num_levels"]) == (2, 3)]
    assert len(fitting) == 45 and not any(cell.reason for cell in fitting)
    # The coarsest level of p4 L4 has 1,536 entries, enough for twelve strata.
    cells = [c for c in cells if (c.fields["pooling_factor"], c.fields["num_levels"]) == (4, 4)]
    assert {cell.fields["topk"] for cell in cells if not cell.reason} == {1536}
    assert all("nearest: topk 1536" in cell.reason for cell in cells if cell.reason)


def test_run_and_collect(ablate, tmp_path, capsys):
    overrides = ["--optimizer.lr", "1e-3"]
    assert ablate("--run", "--collect", *overrides) == 0
    first, second = (tmp_path / "grid" / f"norm-p4-L3-k128-{x}" for x in ("15+45", "30+30"))
    assert starts(first) == [
        [
            {
                "--job.config_file": str(CONFIG),
                "--job.dump_folder": str(first),
                "--optimizer.lr": "1e-3",
                "--lighthouse.scorer": "norm",
                "--lighthouse.topk": "128",
                "--lighthouse.stage1_steps": "15",
            },
            first.name,
        ]
    ]
    assert {path.name for path in (tmp_path / "grid").iterdir()} == {
        *[first.name, second.name, "table.md", "table.csv", "table.json", "fields.png"]
    }
    rows = json.loads((tmp_path / "grid" / "table.json").read_text())
    # Sorted by the held-out loss.
    assert [row["cell"] for row in rows] == [first.name, second.name]
    assert rows[0]["final_held_out_loss"] == 2.25 and rows[0]["stage1_steps"] == 15
    assert rows[0]["stage_1_tokens_per_second"] == 300 and rows[0]["stage_1_speed_up"] == 2
    with (tmp_path / "grid" / "table.csv").open() as file:
        assert [row["final_held_out_loss"] for row in csv.DictReader(file)] == ["2.25", "2.5"]
    table = (tmp_path / "grid" / "table.md").read_text().splitlines()
    assert table[2].startswith(
        "| norm | 4 | 3 | 128 | 4 | averaged | 15 | 0 | 0 | 0 | finished | 2.2500 | 3.0000 |"
    )
    assert (tmp_path / "grid" / "fields.png").read_bytes().startswith(b"\x89PNG")

    # A finished cell is not started again. A cell of another configuration is not changed.
    capsys.readouterr()
    assert ablate("--run", "--list", *overrides) == 0
    assert capsys.readouterr().out.count("finished") == 4
    assert ablate("--run", "--optimizer.lr", "2e-3") == 2
    assert "name another --out" in capsys.readouterr().err
    assert len(starts(first)) == len(starts(second)) == 1


def test_a_cell_that_fails_does_not_end_the_others(ablate, tmp_path, capsys):
    first, second = (tmp_path / "grid" / f"norm-p4-L3-k128-{x}" for x in ("15+45", "30+30"))
    first.mkdir(parents=True)
    (first / "fail").touch()
    assert ablate("--run", "--collect") == 1
    assert f"1 of 2 cells failed: {first}" in capsys.readouterr().out
    error = (first / "error.txt").read_text()
    assert "the trainer fails" in error and "exit code 1" in error
    assert (second / "finished").exists()
    rows = json.loads((tmp_path / "grid" / "table.json").read_text())
    assert [(row["state"], row["final_held_out_loss"]) for row in rows] == [
        ("finished", 2.5),
        ("failed", None),
    ]
    # The failed cell is trained again, and its error file is removed.
    (first / "fail").unlink()
    assert ablate("--run") == 0
    assert not (first / "error.txt").exists() and len(starts(first)) == 2
    assert len(starts(second)) == 1


@pytest.mark.parametrize(
    ("number", "code", "end"),
    [
        (signal.SIGTERM, 75, "stopped, saved, "),
        (signal.SIGUSR1, 75, "stopped, saved, "),
        (signal.SIGINT, 75, "stopped, saved, "),
        # The trainer saves nothing.
        (signal.SIGTERM, 1, "stopped with exit code 1, see {log}, "),
    ],
)
def test_a_signal_stops_the_run_and_the_grid(ablate, tmp_path, capsys, number, code, end):
    first, second = (tmp_path / "grid" / f"norm-p4-L3-k128-{x}" for x in ("15+45", "30+30"))
    first.mkdir(parents=True)
    (first / "wait").write_text(str(code))

    def send() -> None:
        while not (first / "waiting").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    former = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    sender = threading.Thread(target=send)
    sender.start()
    assert ablate("--run") == 75
    sender.join()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == former
    line = f"[1/2] {first.name}: {end.format(log=first / 'log.txt')}"
    assert line in capsys.readouterr().out
    assert not (first / "error.txt").exists() and not (second / "starts.jsonl").exists()
    (first / "wait").unlink()
    assert ablate("--run") == 0
    assert len(starts(first)) == 2 and len(starts(second)) == 1


@pytest.mark.parametrize("nproc", [1, 2])
def test_a_cell_is_started_as_a_run_of_its_own(ablate, tmp_path, nproc, monkeypatch):
    """A process per rank, without torchrun, which would change the exit code."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert ablate("--run", "--world-size", nproc) == 0
    for cell in (tmp_path / "grid").iterdir():
        threads = "" if nproc == 1 else "1"
        ranks = sorted((cell / "ranks.txt").read_text().splitlines())
        assert ranks == [f"{rank} {nproc} {threads}" for rank in range(nproc)]


def test_seeds_and_dense_runs_are_cells_and_seeds_are_averaged(ablate, tmp_path):
    grid = "{stage1_share = [0, 0.5], seed = [3, 4, 5]}"
    assert ablate("--run", grid=grid) == 0
    names = [
        f"norm-p4-L3-k128-{stages}-s{seed}" for stages in ("0+60", "30+30") for seed in (3, 4, 5)
    ]
    assert sorted(path.name for path in (tmp_path / "grid").iterdir()) == names
    for name in names:
        (((arguments, _)),) = starts(tmp_path / "grid" / name)
        assert arguments["--debug.seed"] == name[-1]
        assert arguments["--lighthouse.stage1_steps"] == name.split("-")[4].split("+")[0]
    # Each seed of the dense run has its own held-out loss. One seed of the other run has none.
    for seed, loss in ((3, 2.0), (4, 2.5), (5, 3.3)):
        path = tmp_path / "grid" / f"norm-p4-L3-k128-0+60-s{seed}" / "metrics.jsonl"
        path.write_text(
            path.read_text().replace(
                '"validation_metrics/loss": 2.0', f'"validation_metrics/loss": {loss}'
            )
        )
    (tmp_path / "grid" / names[3] / "finished").unlink()
    assert ablate("--collect", grid=grid) == 0
    table = (tmp_path / "grid" / "table.md").read_text()
    dense, two_stages = table.split("\n\n")[1].splitlines()[2:]
    shared = "| norm | 4 | 3 | 128 | 4 | averaged |"
    assert dense.startswith(f"{shared} 0 | 0 | 0 | 3 | 2.6000 (2.0000 to 3.3000) |")
    assert two_stages.startswith(f"{shared} 30 | 0 | 0 | 2 | 2.5000 (2.5000 to 2.5000) |")


def test_cells_with_a_seed_and_without_are_collected(ablate, tmp_path):
    assert ablate("--run") == 0
    path, _ = (tmp_path / "grid").glob("*/cell.json")
    settings = json.loads(path.read_text())
    settings["fields"]["seed"] = None
    path.write_text(json.dumps(settings))
    assert ablate("--collect") == 0
    rows = json.loads((tmp_path / "grid" / "table.json").read_text())
    assert {row["seed"] for row in rows} == {None, 0}
    assert (tmp_path / "grid" / "fields.png").is_file()


def test_pieces_are_cells(ablate, tmp_path, capsys):
    grid = "{stage1_share = [0.5], stage2_seq_len = [0, 512, 600], stage2_full_steps = [0, 5]}"
    assert ablate("--run", "--list", grid=grid) == 0
    lines = capsys.readouterr().out.splitlines()
    stages = "norm-p4-L3-k128-30+30"
    assert [line.split()[0] for line in lines[:6]] == [
        f"{stages}-n{seq_len}-full{steps}" for seq_len in (0, 512, 600) for steps in (0, 5)
    ]
    assert ["illegal" in line for line in lines[:6]] == [False, True, False, False, True, True]
    cell = tmp_path / "grid" / f"{stages}-n512-full5"
    (((arguments, _)),) = starts(cell)
    assert arguments["--lighthouse.stage2_seq_len"] == "512"
    assert arguments["--lighthouse.stage2_full_steps"] == "5"
    # A cell saved before these fields existed has stage 2 at full length.
    path = tmp_path / "grid" / f"{stages}-n0-full0" / "cell.json"
    settings = json.loads(path.read_text())
    old = {name: value for name, value in settings["fields"].items() if "stage2" not in name}
    path.write_text(json.dumps(settings | {"fields": old}))
    assert ablate("--run", "--collect", grid=grid) == 0
    rows = json.loads((tmp_path / "grid" / "table.json").read_text())
    assert sorted((row["stage2_seq_len"], row["stage2_full_steps"]) for row in rows) == [
        *[(0, 0), (512, 0), (512, 5)]
    ]


def test_a_grid_from_a_file(ablate, tmp_path, capsys):
    (tmp_path / "grid.toml").write_text("pooling_factor = [2, 3]\ndilation = [2]\ntopk = [128]\n")
    assert ablate(grid=tmp_path / "grid.toml") == 0
    out = capsys.readouterr().out
    assert out.startswith("norm-p2-L3-k128-d2-40+20 ") and "nearest: 2" in out
