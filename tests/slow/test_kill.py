"""Runs that are killed with SIGKILL and restarted equal undisturbed runs, bit for bit.

A run is killed at one moment after another (`kill_run.py`) and restarted each time with the same
command. The last start is not killed. All batches and losses of all starts, and the final
parameters and moments, equal those of an undisturbed run. If a kill leaves no whole checkpoint, the
run must say so in one line, and start at step 0 after the folder was moved away.

The quick suite runs a small sample. `pytest -m slow tests/slow/test_kill.py` runs all kills and
prints their number at each moment. Set `KILL_SEED` to repeat or vary the random kills.
"""

import json
import multiprocessing
import os
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from kill_run import LATE, MOMENTS, OUTSIDE, Answer, Kill, Request
from kill_run import run as start_run
from runs import command_line, handover_of, write_corpus
from torch.distributed.checkpoint import FileSystemReader
from torchtitan.experiments.lighthouse import metrics
from torchtitan.experiments.lighthouse.checkpoint.manager import checkpoint_steps
from torchtitan.experiments.lighthouse.data.byte_tokenizer import BYTE_TOKENIZER_PATH
from torchtitan.experiments.lighthouse.data.tokenize import prepare
from torchtitan.experiments.lighthouse.launch import free_port

STEPS, SWITCH, INTERVAL = 12, 5, 2
FIRST_SAVE, LAST_SAVE = INTERVAL, STEPS
SIGKILL = -9

OPTIONS = {
    "training__steps": STEPS,
    "lighthouse__stage1_steps": SWITCH,
    "lr_scheduler__total_steps": STEPS,
    "checkpoint__interval": INTERVAL,
    "checkpoint__keep_latest_k": 2,
}
ASYNC = {"checkpoint__async_mode": "async"}

SEED = int(os.environ.get("KILL_SEED", "20261121"))

# Moments that leave a torn checkpoint.
TORN = (
    "the folder is made",
    "in a shard",
    "one shard of two is written",
    "all shards are written",
    "in the metadata",
    "before the rename of the metadata",
)
WHOLE = ("after the rename of the metadata", LATE)
PURGED = ("in the purge, a shard is gone", "in the purge, the metadata are gone")

# Moments of the first rank only. All other moments happen on every rank.
OF_RANK_0 = {
    "in the metadata",
    "before the rename of the metadata",
    "after the rename of the metadata",
    "in a line of metrics",
    "before the rename of the handover",
    "while the torn folder is cleared",
    LATE,
    *PURGED,
}


@dataclass
class Chain:
    """A run with a sequence of kills."""

    name: str
    world_size: int
    kills: list[Kill]
    data: str = "text"
    """A key of `World.data`."""

    options: dict[str, Any] = field(default_factory=dict)
    fault: str | None = None
    """Value of `Request` for every start."""

    @property
    def folder(self) -> str:
        return self.name.replace(", ", "-").replace(" ", "-")


def all_chains(seed: int) -> list[Chain]:
    """All kills, on one rank and on two."""
    chains = []
    for world_size in (1, 2):
        dice = random.Random(f"{seed}, {world_size}")

        def kill(moment: str, step: int | None = None, world_size=world_size, dice=dice) -> Kill:
            rank = 0 if moment in OF_RANK_0 else dice.randrange(world_size)
            # Either both ranks are killed at once, or one continues alone for a while.
            grace = dice.choice([0, dice.uniform(0.1, 2)]) if world_size > 1 else 0
            return Kill(moment, step, [rank], items=dice.randint(1, 40), grace=grace)

        def outside(world_size=world_size, dice=dice) -> Kill:
            ranks = dice.choice([[0], [1], [0, 1]][: 2 * world_size - 1])
            # A share of the time of an undisturbed run. Steps that were saved are not repeated.
            delay = dice.uniform(0, 0.6)
            return Kill(OUTSIDE, ranks=ranks, delay=delay, grace=dice.random())

        def chain(name: str, kills: Sequence[Kill], *, world_size=world_size, **more) -> None:
            chains.append(Chain(f"{name}, {world_size}", world_size, list(kills), **more))

        torn = [name for name in TORN if world_size > 1 or name != "one shard of two is written"]
        chain("first save", [kill(name, FIRST_SAVE) for name in torn])
        chain(
            "first save, async",
            [kill(name, FIRST_SAVE) for name in (torn[1], torn[-1], LATE)],
            options=ASYNC,
        )
        # The switch is saved at step 5, and the next checkpoint is that of step 6.
        later = [(torn[0], 4), (torn[-2], 4), (torn[-3], 4), (torn[-1], 5), (WHOLE[0], 5)]
        later += [(name, 6) for name in torn] + [("while the torn folder is cleared", 6)]
        later += [(WHOLE[0], 6), (torn[-3], 10), ("while the torn folder is cleared", 10)]
        chain("saves", [kill(*when) for when in later])
        later = [(torn[1], 4), (LATE, 4), (torn[-1], 5), (LATE, 5), (torn[-2], 6), (LATE, 6)]
        later += [(WHOLE[0], 8), (torn[-3], 10), (LATE, 10)]
        chain("saves, async", [kill(*when) for when in later], options=ASYNC)
        chain("purge", [kill(PURGED[0], 2), kill(PURGED[1], 4), kill(PURGED[0], 6)])
        chain("purge, async", [kill(PURGED[0], 2), kill(PURGED[1], 4)], options=ASYNC)
        switch = [(name, SWITCH) for name in MOMENTS if "switch" in name or "handover" in name]
        chain("switch", [kill(*when) for when in switch])
        chain("switch, async", [kill(*when) for when in switch[::2]], options=ASYNC)
        # Stage 2 in pieces up to step 8, with and without a checkpoint there.
        some = [("before the switch", SWITCH), ("after the switch", SWITCH), ("in a step", 7)]
        some += [("before the switch", 8), ("after the switch", 8), ("in a step", 9)]
        chain("pieces", [kill(*when) for when in some], data="pieces")
        chain("pieces, async", [kill(*when) for when in some[::2]], data="pieces", options=ASYNC)
        steps = [("at the start", None), ("while the corpus is read", None)]
        steps += [("in a step", 1), ("in a line of metrics", 3), ("after the load", None)]
        steps += [("between optimizer and scheduler", 3), ("in the load", None), ("in a step", 5)]
        steps += [("in the validation", 6), ("in a step", 7), ("in a step", 11)]
        steps += [("between optimizer and scheduler", 12)]
        validated = {"validation__enable": True, "validation__freq": 2}
        chain("steps", [kill(*when) for when in steps], options=validated)
        end = [(name, LAST_SAVE) for name in torn[-3:]]
        end += [(WHOLE[0], LAST_SAVE), ("after the last save", None)]
        chain("end", [kill(*when) for when in end])
        chain("outside", [outside() for _ in range(6)])
        chain("outside, async", [outside() for _ in range(6)], options=ASYNC)
        some = [("in a step", 2), ("in a step", 4), (torn[-1], 6)]
        for data in ("prepared", "worker", "accumulated"):
            chain(data, [*(kill(*when) for when in some), outside()], data=data)
    return chains


def server(hash_seed: int) -> ProcessPoolExecutor:
    """A process that has imported `kill_run.py` and starts runs."""
    # Run on the CPU with one thread, because sums depend on the number of threads.
    env = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    # The order of a set differs between processes, and nothing may depend on it.
    env |= {"PYTHONHASHSEED": str(hash_seed)}
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    with mock.patch.dict(os.environ, env):
        pool.submit(abs, 1).result()
    return pool


class World:
    """Servers, corpora, and the undisturbed runs for comparison."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.corpus = write_corpus(folder / "text")
        self.data = {
            "text": {},
            "worker": {"training__dataloader__num_workers": 1},
            "accumulated": {"training__global_batch_size": 4},
            "pieces": {
                "lighthouse__stage2_seq_len": 256,
                "lighthouse__stage2_full_steps": 4,
            },
            "prepared": {
                "training__dataset": "prepared",
                "training__dataset_path": folder / "prepared",
            },
        }
        self.tally = Counter()
        self.num_refusals = 0
        self._servers: dict[int, ProcessPoolExecutor] = {}
        self._undisturbed: dict[tuple[int, str], KilledRun] = {}

    def server(self, number: int) -> ProcessPoolExecutor:
        if number not in self._servers:
            self._servers[number] = server(number)
        return self._servers[number]

    def close(self) -> None:
        for pool in self._servers.values():
            pool.shutdown()

    def undisturbed(self, world_size: int, data: str) -> "KilledRun":
        """The run without a kill, which is made at first use."""
        key = world_size, data
        if key not in self._undisturbed:
            if data == "prepared" and not (self.folder / "prepared").exists():
                prepare("text", str(self.corpus), self.folder / "prepared", BYTE_TOKENIZER_PATH)
            chain = Chain(f"undisturbed, {data}, {world_size}", world_size, [], data)
            run = KilledRun(self, chain, self.server(1))
            run.finish()
            for rank in range(world_size):
                assert list(run.batches(rank)[0]) == list(range(1, STEPS + 1))
            lines = run.lines()
            assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
            assert lines[-1][metrics.LOSS] < lines[0][metrics.LOSS] - 1
            self._undisturbed[key] = run
        return self._undisturbed[key]

    def endure(self, chain: Chain, server_number: int) -> "KilledRun":
        """Run all kills of a chain and compare the results."""
        expected = self.undisturbed(chain.world_size, chain.data)
        run = KilledRun(self, chain, self.server(server_number))
        for kill in chain.kills:
            if kill.moment == OUTSIDE:
                kill = replace(kill, delay=kill.delay * expected.seconds)
            run.kill(kill)
            self.tally[chain.world_size, kill.moment] += 1
        run.finish()
        self.num_refusals += run.num_refusals
        run.compare(expected)
        return run


class KilledRun:
    """One run in its own folder, started as often as needed."""

    def __init__(self, world: World, chain: Chain, server: ProcessPoolExecutor):
        self.chain, self.server = chain, server
        self.folder = world.folder / chain.folder
        self.folder.mkdir()
        self.dump_folder = self.folder / "dump"
        self.checkpoints = self.dump_folder / "checkpoint"
        self.options = {**OPTIONS, **world.data[chain.data], **chain.options}
        self.corpus = world.corpus
        self.first_steps = []
        """The first step of each start."""
        self.num_refusals = 0
        self.seconds = 0.0

    def kill(self, kill: Kill) -> None:
        """Start the run, check that it is killed at the right moment, and check its files."""
        answer = self._start(kill)
        steps = checkpoint_steps(self.checkpoints)
        print(f"{self.chain.name}: {kill}: {answer.exit_codes}, {answer.seconds:.1f} s, {steps}")
        for rank, exit_code in enumerate(answer.exit_codes):
            is_victim = rank in kill.ranks
            assert (exit_code == SIGKILL) if is_victim else exit_code, (kill, answer, self._log())
            assert not is_victim or rank not in answer.felled, (kill, answer, self._log())
            mark = self.folder / f"killed-{rank}.json"
            assert mark.exists() == (is_victim and kill.moment != OUTSIDE), (kill, answer)
            if mark.exists():
                when = {"moment": kill.moment, "step": kill.step}
                assert json.loads(mark.read_text()) == when
            assert not (self.folder / f"final-{rank}.json").exists()
        path = self.checkpoints / f"step-{kill.step}"
        if kill.moment in TORN:
            assert steps[kill.step] is False
            names = {file.name for file in path.iterdir()}
            assert names or kill.moment == "the folder is made"
            is_late = kill.moment in ("in the metadata", "before the rename of the metadata")
            assert (".metadata.tmp" in names) == is_late
        if kill.moment in WHOLE:
            assert steps[kill.step] is True
        if kill.moment in PURGED:
            shards = [*path.glob("*.distcp")]
            is_shard = kill.moment == PURGED[0]
            assert len(shards) == self.chain.world_size - is_shard
            assert is_shard or not (path / ".metadata").exists()
        if kill.moment == "before the rename of the handover":
            assert not (self.dump_folder / "handover.json").exists()
        self._move_torn_checkpoints(is_first=kill.moment in TORN and kill.step == FIRST_SAVE)

    def finish(self) -> None:
        """Start the run without a kill."""
        answer = self._start(None)
        self.seconds = answer.seconds
        assert answer.exit_codes == [0] * self.chain.world_size, (answer, self._log())

    def compare(self, expected: "KilledRun") -> None:
        """Check that all steps of all starts equal those of the undisturbed run."""
        for rank in range(self.chain.world_size):
            trained = set()
            (expected_batches,) = expected.batches(rank)
            for start, batches in enumerate(self.batches(rank)):
                steps = list(batches)
                first = self.first_steps[start]
                assert steps == list(range(first, first + len(steps))), (start, steps)
                for step, found in batches.items():
                    # The last line may be incomplete.
                    wanted = expected_batches[step]
                    is_last = step == steps[-1] and start + 1 < len(self.first_steps)
                    wanted = wanted[: len(found)] if is_last else wanted
                    assert found == wanted, f"the batches of step {step} differ in start {start}"
                trained.update(steps)
            assert trained == {*range(1, STEPS + 1)}
            final, expected_final = self.final(rank), expected.final(rank)
            assert final.keys() == expected_final.keys()
            for name, value in final.items():
                assert value == expected_final[name], f"the final {name} differ"
        lines, expected_lines = self.lines(), {line["step"]: line for line in expected.lines()}
        for line in lines:
            assert line == expected_lines[line["step"]], f"the metrics of {line['step']} differ"
        assert {line["step"] for line in lines} == {*expected_lines}
        assert handover_of(self.dump_folder) == handover_of(expected.dump_folder)
        steps = checkpoint_steps(self.checkpoints)
        assert steps[STEPS] and steps[SWITCH]
        for step in (STEPS, SWITCH):
            assert missing_shards(self.checkpoints / f"step-{step}") == set()

    def batches(self, rank: int) -> list[dict[int, list[str]]]:
        """Digests of the token ids that a rank has trained on, by start and step."""
        starts = [defaultdict(list) for _ in self.first_steps]
        path = self.folder / f"batches-{rank}.jsonl"
        for line in path.read_text().splitlines() if path.exists() else ():
            values = json.loads(line)
            starts[values["start"]][values["step"]].append(values["batch"])
        return starts

    def lines(self) -> list[dict[str, float]]:
        """All whole lines of steps in `metrics.jsonl`, also of repeated steps."""
        lines = []
        num_torn = 0
        for text in (self.dump_folder / metrics.FILE_NAME).read_text().splitlines():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                num_torn += 1
                continue
            if metrics.LOSS in line:
                names = ("step", "stage", metrics.LOSS, "grad_norm", "lr", metrics.TOKENS_SEEN)
                lines.append({name: line[name] for name in names})
        moments = [kill.moment for kill in self.chain.kills]
        assert num_torn <= moments.count("in a line of metrics") + moments.count(OUTSIDE)
        return lines

    def final(self, rank: int) -> dict[str, Any]:
        return json.loads((self.folder / f"final-{rank}.json").read_text())

    def _start(self, kill: Kill | None) -> Answer:
        for path in (*self.folder.glob("killed-*"), *self.folder.glob("final-*")):
            path.unlink()
        whole = [step for step, is_whole in checkpoint_steps(self.checkpoints).items() if is_whole]
        self.first_steps.append(max(whole, default=0) + 1)
        request = Request(
            args=command_line(self.dump_folder, self.corpus, **self.options),
            folder=str(self.folder),
            start=len(self.first_steps) - 1,
            world_size=self.chain.world_size,
            port=free_port(),
            last_step=STEPS,
            kill=kill,
            fault=self.chain.fault,
        )
        answer = self.server.submit(start_run, request).result()
        assert not answer.timed_out, (kill, answer, self._log())
        return answer

    def _move_torn_checkpoints(self, is_first: bool) -> None:
        """Without a whole checkpoint, the run does not start until its remedy is followed."""
        steps = checkpoint_steps(self.checkpoints)
        is_refused = self.checkpoints.exists() and not any(steps.values())
        assert is_refused or not is_first, steps
        if not is_refused:
            return
        answer = self._start(None)
        assert answer.exit_codes == [2] * self.chain.world_size, (answer, self._log())
        state = ["only torn checkpoints", *map("step-{}".format, steps)]
        last = self._log().strip().splitlines()[-1]
        assert last.startswith("error: checkpoint.folder must hold a whole checkpoint"), last
        assert repr(str(self.checkpoints)) in last, last
        assert all(part in last for part in (state if steps else ["no checkpoint"])), last
        assert "move the folder and metrics.jsonl away to start from step 0" in last, last
        assert "Traceback" not in self._log()
        self.num_refusals += 1
        for path in (self.checkpoints, self.dump_folder / metrics.FILE_NAME):
            if path.exists():
                path.rename(self.folder / f"moved-{self.num_refusals}-{path.name}")

    def _log(self, rank: int = 0) -> str:
        """The output of the newest start."""
        return (self.folder / f"log-{len(self.first_steps) - 1}-{rank}.txt").read_text()


def missing_shards(path: Path) -> set[str]:
    """Files that the metadata of a checkpoint names but that are missing."""
    metadata = FileSystemReader(path).read_metadata()
    return {
        info.relative_path
        for info in metadata.storage_data.values()
        if not (path / info.relative_path).exists()
    }


@pytest.fixture(scope="module")
def world(request, tmp_path_factory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("kill"))
    yield world
    world.close()
    total = sum(world.tally.values())
    lines = [f"{total} kills, seed {SEED}; refused for want of a checkpoint: {world.num_refusals}"]
    for moment in MOMENTS:
        counts = [world.tally[world_size, moment] for world_size in (1, 2)]
        if any(counts):
            lines.append(f"  {counts[0]:3} on 1 rank, {counts[1]:3} on 2   {moment}")
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print("", *lines, sep="\n")


# ---- every day


def test_killed_on_one_rank(world):
    kills = [
        Kill("in a shard", FIRST_SAVE),
        Kill("in the purge, a shard is gone", 2),
        Kill("within the switch", SWITCH),
        Kill("before the rename of the metadata", SWITCH + 1),
    ]
    run = world.endure(Chain("sample, 1", 1, kills), server_number=1)
    assert run.num_refusals == 1


def test_killed_on_two_ranks(world):
    kills = [
        Kill(LATE, 4, grace=0.5),
        Kill(OUTSIDE, ranks=[0, 1], delay=random.Random(SEED).random()),
    ]
    world.endure(Chain("sample, 2", 2, kills, options=ASYNC), server_number=1)


@pytest.mark.parametrize(
    ("fault", "what"),
    [
        ("dataloader", "the batches of step 7 differ in start 1"),
        pytest.param("optimizer", "the final parameters differ", marks=pytest.mark.slow),
        pytest.param("lr_scheduler", "the final learning_rate differ", marks=pytest.mark.slow),
        pytest.param("train_state", r"\(1, \[1, 2, 3", marks=pytest.mark.slow),
        pytest.param("staging", "the final parameters differ", marks=pytest.mark.slow),
    ],
)
def test_a_broken_resume_does_not_pass(world, fault, what):
    kill, options = Kill("in a step", 8), {}
    if fault == "staging":
        kill, options = Kill(LATE, 4), ASYNC
    chain = Chain(f"broken, {fault}", 1, [kill], options=options, fault=fault)
    with pytest.raises(AssertionError, match=what):
        world.endure(chain, server_number=1)


@pytest.mark.slow
def test_a_kill_that_does_not_come_does_not_pass(world):
    chain = Chain("no kill", 1, [Kill("in a step", STEPS + 1)])
    with pytest.raises(AssertionError, match="exit_codes=\\[0\\]"):
        world.endure(chain, 1)


def test_all_moments_are_in_the_plan():
    chains = all_chains(SEED)
    assert len({chain.name for chain in chains}) == len(chains)
    assert sum(len(chain.kills) for chain in chains) >= 60
    for world_size in (1, 2):
        kills = [kill for c in chains if c.world_size == world_size for kill in c.kills]
        moments = {*MOMENTS} - ({"one shard of two is written"} if world_size == 1 else set())
        assert {kill.moment for kill in kills} == moments
        assert {kill.ranks[0] for kill in kills} == {*range(world_size)}


# ---- all


@pytest.mark.slow
@pytest.mark.parametrize("chain", all_chains(SEED), ids=lambda chain: chain.folder)
def test_all_kills(world, chain):
    world.endure(chain, server_number=2)
