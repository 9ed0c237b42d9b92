"""Start runs of the trainer and kill them with SIGKILL at a named moment, for `test_kill.py`.

`run` starts a run: it takes the command line, the number of ranks, and an optional kill. Each rank
is a fork of the process that calls it, which has imported everything but has no process group or
threads. A rank calls the real entry point with the real command line. Hooks in functions of torch,
torchtitan and the trainer record the training. At the requested moment they send SIGKILL to their
own process, so nothing is flushed, closed or undone.

A start writes these files beside the dump folder of its run:

    batches-RANK.jsonl     one line for each batch of all starts so far
    killed-RANK.json       the moment at which this start killed itself
    final-RANK.json        digests of the final state
    log-START-RANK.txt     the log
"""

import hashlib
import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
import torchtitan.train
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.staging import DefaultStager
from torch.distributed.tensor import DTensor
from torchtitan.experiments.lighthouse import metrics, train
from torchtitan.experiments.lighthouse.checkpoint import manager, stage_switch
from torchtitan.experiments.lighthouse.checkpoint.checksums import ChecksumWriter
from torchtitan.experiments.lighthouse.data import packing
from torchtitan.experiments.lighthouse.runtime import cpu_device

OUTSIDE = "at any moment, from outside"
LATE = "after a save that takes longer than the next step"

MOMENTS = (
    # The start.
    "at the start",
    "while the corpus is read",
    "in the load",
    "after the load",
    # A step.
    OUTSIDE,
    "in a step",
    "between optimizer and scheduler",
    "in a line of metrics",
    "in the validation",
    # A save.
    "the folder is made",
    "in a shard",
    "one shard of two is written",
    "all shards are written",
    "in the metadata",
    "before the rename of the metadata",
    "after the rename of the metadata",
    LATE,
    "while the torn folder is cleared",
    # The purge.
    "in the purge, a shard is gone",
    "in the purge, the metadata are gone",
    # The switch.
    "before the switch",
    "within the switch",
    "before the rename of the handover",
    "after the handover",
    "after the switch",
    # The end.
    "after the last save",
)


@dataclass
class Kill:
    """The moment of a kill."""

    moment: str
    """One of `MOMENTS`."""

    step: int | None = None
    """The step, or the checkpoint that is saved or purged. None if the moment comes only once."""

    ranks: list[int] = field(default_factory=lambda: [0])
    """The rank to kill. Several ranks are killed from outside."""

    items: int = 3
    """For a kill inside a shard: the number of tensors and values written before."""

    delay: float = 0.0
    """For a kill from outside: seconds after the start."""

    grace: float = 0.0
    """Seconds until the other ranks are also killed."""


@dataclass
class Request:
    """One start of a run."""

    args: list[str]
    folder: str
    start: int
    """Number of this start, from 0."""

    world_size: int = 1
    port: int = 0
    last_step: int = 0
    kill: Kill | None = None
    fault: str | None = None
    """A defect that the test must notice: a part of the state that is not loaded, or "staging"."""

    timeout: float = 900.0


@dataclass
class Answer:
    """How the ranks of a start ended."""

    exit_codes: list[int]
    """Exit codes by rank. A negative code is the number of a signal."""

    felled: list[int]
    """Ranks that were killed because another rank had ended."""

    seconds: float
    timed_out: bool = False


# ---- this process


def run(request: Request) -> Answer:
    """Start all ranks, kill the requested ranks and the remaining ones, and wait for their end."""
    # A fork copies only the thread that calls it.
    assert threading.active_count() == 1, threading.enumerate()
    begin = time.monotonic()
    fork = multiprocessing.get_context("fork").Process
    ranks = [fork(target=be_rank, args=(request, rank)) for rank in range(request.world_size)]
    for process in ranks:
        process.start()
    shot, felled, timed_out = [], [], False
    kill, first_death = request.kill, None
    grace = kill.grace if kill else 5.0
    while any(process.exitcode is None for process in ranks):
        time.sleep(0.005)
        now = time.monotonic() - begin
        if kill and kill.moment == OUTSIDE and now >= kill.delay:
            shot = kill.ranks
            for rank in shot:
                ranks[rank].kill()
            kill = None
        if first_death is None and any(process.exitcode for process in ranks):
            first_death = now
        timed_out = now > request.timeout
        if timed_out or (first_death is not None and now >= first_death + grace):
            for rank, process in enumerate(ranks):
                if process.exitcode is None and rank not in (*shot, *felled):
                    process.kill()
                    felled.append(rank)
    exit_codes = [process.exitcode for process in ranks]
    return Answer(exit_codes, felled, time.monotonic() - begin, timed_out)


# ---- a rank


def be_rank(request: Request, rank: int) -> None:
    """Run the entry point. The exit code is that of this process."""
    log = Path(request.folder) / f"log-{request.start}-{rank}.txt"
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(request.world_size)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(request.port)}
    # A fixed peak rate. Measuring it takes longer than a step.
    cpu_device.measure_peak_flops = lambda: 1e12
    torchtitan.train.time = SimpleNamespace(
        perf_counter=time.perf_counter, sleep=lambda seconds: None
    )
    Watch(request, rank).hook()
    train.main(request.args)


class Watch:
    """Records what a rank does, and kills it at the requested moment."""

    def __init__(self, request: Request, rank: int):
        self.request, self.rank = request, rank
        self.folder = Path(request.folder)
        self.kill = request.kill
        if self.kill and rank not in self.kill.ranks:
            self.kill = None
        self.holds = request.kill is not None and request.kill.moment == OUTSIDE
        self.trained_step = 0
        self.items = 0

    def is_due(self, moment: str, step: int | None = None) -> bool:
        assert moment in MOMENTS, moment
        kill = self.kill
        return kill is not None and kill.moment == moment and step in (kill.step, None)

    def die(self) -> None:
        path = self.folder / f"killed-{self.rank}.json"
        path.write_text(json.dumps({"moment": self.kill.moment, "step": self.kill.step}))
        os.kill(os.getpid(), signal.SIGKILL)

    def reach(self, moment: str, step: int | None = None) -> None:
        if self.is_due(moment, step):
            self.die()

    def write_batch(self, step: int, tokens: torch.Tensor) -> None:
        line = {"start": self.request.start, "step": step}
        line["batch"] = hashlib.sha256(tokens.contiguous().numpy()).hexdigest()
        with (self.folder / f"batches-{self.rank}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def write_final(self, trainer) -> None:
        (model,) = trainer.model_parts
        names = {parameter: name for name, parameter in model.named_parameters()}
        final = {
            "step": trainer.step,
            "tokens": trainer.ntokens_seen,
            "learning_rate": trainer.lr_schedulers.schedulers[0].get_last_lr()[0],
            "parameters": {name: digest(parameter) for parameter, name in names.items()},
            "moments": {
                f"{names[parameter]}.{key}": digest(value)
                for optimizer in trainer.optimizers.optimizers
                for parameter, state in optimizer.state.items()
                for key, value in state.items()
            },
            "data": stage_switch.data_positions(trainer),
        }
        (self.folder / f"final-{self.rank}.json").write_text(json.dumps(final))

    def hook(self) -> None:
        """Hook the moments into the functions in which they happen."""
        train.TwoStageTrainer = watched_trainer(self)
        self._hook_saves()
        self._hook_the_purge()
        self._hook_the_switch()
        self._hook_the_rest()
        if self.request.fault == "staging":
            # The saved state is not copied before the save.
            DefaultStager.stage = ChecksumWriter.stage = lambda stager, state_dict: state_dict
        elif self.request.fault:
            self._load_too_little(self.request.fault)

    def _reach_after(self, owner, name: str, moment: str) -> None:
        """Reach `moment` when the function `name` of `owner` has done its work."""
        function = getattr(owner, name)

        def watched(*args, **options):
            result = function(*args, **options)
            # A load returns False if there is no checkpoint.
            if result is not False:
                self.reach(moment)
            return result

        setattr(owner, name, watched)

    def _load_too_little(self, part: str) -> None:
        states_to_load = manager.TwoStageCheckpointManager._states_to_load

        def fewer(*args):
            states = states_to_load(*args)
            del states[part]
            return states

        manager.TwoStageCheckpointManager._states_to_load = fewer

    def _hook_saves(self) -> None:
        mkdir, rename = filesystem.FileSystem.mkdir, filesystem.FileSystem.rename
        write_item, write_data = filesystem._write_item, filesystem._FileSystemWriter._write_data

        def watched_mkdir(system, path):
            mkdir(system, path)
            self.reach("the folder is made", step_of(path))

        def watched_rename(system, path, new_path):
            step = step_of(path)
            self.reach("before the rename of the metadata", step)
            rename(system, path, new_path)
            self.reach("after the rename of the metadata", step)
            self.reach(LATE, step)

        def watched_write_item(transforms, stream, *args):
            result = write_item(transforms, stream, *args)
            if self.is_due("in a shard", step_of(stream.name)):
                self.items += 1
                if self.items == self.kill.items:
                    stream.flush()
                    self.die()
            return result

        def watched_write_data(writer, *args):
            step = step_of(writer.path)
            if self.is_due("one shard of two is written", step):
                other = Path(writer.path) / f"__{1 - self.rank}_0.distcp"
                wait_until(lambda: other.exists() and other.stat().st_size > 0)
                self.die()
            kill = self.request.kill
            if kill is not None and (kill.moment, kill.step) == (LATE, step):
                # The checkpoint must not contain anything of the next step, on any rank.
                wait_until(lambda: self.trained_step > step)
            result = write_data(writer, *args)
            self.reach("all shards are written", step)
            return result

        def watched_dump(value, file):
            if self.is_due("in the metadata", step_of(file.name)):
                data = pickle.dumps(value)
                file.write(data[: len(data) // 2])
                file.flush()
                self.die()
            pickle.dump(value, file)

        filesystem.FileSystem.mkdir, filesystem.FileSystem.rename = watched_mkdir, watched_rename
        filesystem._write_item = watched_write_item
        filesystem._FileSystemWriter._write_data = watched_write_data
        filesystem.pickle = SimpleNamespace(dump=watched_dump, load=pickle.load)

    def _hook_the_purge(self) -> None:
        rmtree = shutil.rmtree

        def watched_rmtree(path, *args, **options):
            if self.is_due("while the torn folder is cleared", step_of(path)):
                next(Path(path).iterdir()).unlink()
                self.die()
            # The order of a folder's files depends on the file system.
            for what, is_first in (("a shard is", False), ("the metadata are", True)):
                if self.is_due(f"in the purge, {what} gone", step_of(path)):
                    files = list(Path(path).iterdir())
                    min(files, key=lambda file: (file.name == ".metadata") != is_first).unlink()
                    self.die()
            rmtree(path, *args, **options)

        shutil.rmtree = watched_rmtree

    def _hook_the_switch(self) -> None:
        replace = os.replace

        def watched_replace(source, target, *args, **options):
            if Path(os.fspath(target)).name == stage_switch.FILE_NAME:
                self.reach("before the rename of the handover")
            replace(source, target, *args, **options)

        os.replace = watched_replace
        self._reach_after(stage_switch, "write_handover", "after the handover")
        self._reach_after(train.apply_lighthouse, "use_dense", "within the switch")

    def _hook_the_rest(self) -> None:
        self._reach_after(packing, "open_documents", "while the corpus is read")
        self._reach_after(filesystem.FileSystemReader, "read_data", "in the load")
        self._reach_after(manager.TwoStageCheckpointManager, "load", "after the load")
        log = metrics.StagedLogger.log

        def watched_log(logger, values, step):
            if metrics.LOSS in values and self.is_due("in a line of metrics", step):
                line = json.dumps({"step": step, "stage": logger.stage, **values})
                logger._file.write(line.encode()[:60])
                self.die()
            log(logger, values, step)

        metrics.StagedLogger.log = watched_log


def watched_trainer(watch: Watch) -> type:
    """The trainer with hooks for its own moments."""

    class WatchedTrainer(train.TwoStageTrainer):
        def __init__(self, job_config):
            watch.reach("at the start")
            super().__init__(job_config)
            schedule = self.lr_schedulers.step

            def watched_schedule():
                watch.reach("between optimizer and scheduler", self.step)
                schedule()

            self.lr_schedulers.step = watched_schedule
            if job_config.validation.enable:
                validate = self.validator.validate

                def watched_validate(model_parts, step):
                    watch.reach("in the validation", step)
                    validate(model_parts, step)

                self.validator.validate = watched_validate

        def post_dataloading_process(self, input_dict, labels):
            tokens = torch.cat([input_dict["input"].flatten(), labels.flatten()])
            watch.write_batch(self.step, tokens)
            watch.reach("in a step", self.step)
            return super().post_dataloading_process(input_dict, labels)

        def train_step(self, data_iterator):
            super().train_step(data_iterator)
            watch.trained_step = self.step

        def should_continue_training(self):
            # Wait to be killed from outside, so that a late kill still happens.
            while watch.holds and self.step == watch.request.last_step - 1:
                time.sleep(1)
            return super().should_continue_training()

        def _enter_phase(self, phase):
            # The switch to stage 2, and the change from pieces to whole sequences.
            if phase != "lighthouse":
                watch.reach("before the switch", self.step)
            super()._enter_phase(phase)
            if phase != "lighthouse":
                watch.reach("after the switch", self.step)

        def train(self):
            super().train()
            watch.reach("after the last save")
            watch.write_final(self)

    return WatchedTrainer


def digest(value: torch.Tensor | float) -> str:
    tensor = torch.as_tensor(value.to_local() if isinstance(value, DTensor) else value).detach()
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy()).hexdigest()


def step_of(path: str | os.PathLike) -> int:
    """The step of the checkpoint that a path names or lies in. -1 if there is none."""
    match = re.search(r"step-(\d+)(/[^/]*)?$", os.fspath(path))
    return int(match.group(1)) if match else -1


def wait_until(is_so) -> None:
    deadline = time.monotonic() + 600
    while not is_so():
        if time.monotonic() > deadline:
            raise TimeoutError("the moment has not come")
        time.sleep(0.001)
