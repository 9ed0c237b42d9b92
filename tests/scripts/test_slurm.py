"""The launchers for SLURM, on a real SLURM whose daemons simulate four nodes on this machine.

Two-stage runs of two CPU ranks are stopped by a signal, the time limit, a preemption and their
user. Runs that should resume do so, with the losses of an undisturbed run. A script replaces the
trainer if no training is needed.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from runs import losses_of, write_corpus
from torchtitan.experiments.lighthouse import metrics
from torchtitan.experiments.lighthouse.checkpoint.files import checkpoint_steps

ROOT = Path(__file__).parents[2]
PROGRAMS = ("sbatch", "slurmctld", "slurmd", "munged")
SEARCHED = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"])
MISSING = [name for name in PROGRAMS if shutil.which(name, path=SEARCHED) is None]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(MISSING), reason=f"needs {', '.join(MISSING)}: apt-get install slurm-wlm munge"
    ),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: slurmd starts only as root"),
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="made for the CPU: SLURM would show its tasks a GPU"
    ),
]

STEPS, STAGE1_STEPS = 80, 40

CONFIG = """
[job]
description = "Small run under SLURM"
[model]
flavor = "debugmodel"
[optimizer]
lr = 3e-3
implementation = "foreach"
[lr_scheduler]
warmup_steps = 10
decay_ratio = 0.5
total_steps = {steps}
[training]
dataset = "text"
dataset_path = "{corpus}"
local_batch_size = 1
seq_len = 768
steps = {steps}
mixed_precision_param = "float32"
[lighthouse]
num_levels = 2
pooling_factor = 2
topk = 128
full_attn_layers = [0, -1]
stage1_steps = {stage1_steps}
[activation_checkpoint]
mode = "none"
[metrics]
log_freq = 1
disable_color_printing = true
[checkpoint]
enable = true
interval = 100000
[debug]
seed = 0
"""


@dataclass
class Cluster:
    """Submits the launchers of the repository, with the settings of a site."""

    folder: Path
    corpus: Path
    env: dict[str, str] = field(default_factory=dict)

    def command(self, *args: str | Path, cwd: Path = ROOT) -> str:
        result = subprocess.run(
            list(map(str, args)), env=self.env, cwd=cwd, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    def config(self, name: str = "config.toml", steps: int = STEPS) -> Path:
        path = self.folder / name
        path.write_text(
            CONFIG.format(corpus=self.corpus, steps=steps, stage1_steps=min(steps, STAGE1_STEPS))
        )
        return path

    def submit(
        self,
        *args: str | Path,
        launcher: str = "one_node",
        options: tuple[str, ...] = (),
        trainer: str | None = None,
        cwd: Path = ROOT,
    ) -> "Job":
        """A job of two tasks on a node. The script `trainer` replaces the trainer."""
        number = len(list(self.folder.glob("launcher-*")))
        programs = Path(sys.executable).parent
        if trainer is not None:
            programs = self.folder / f"programs-{number}"
            programs.mkdir()
            (programs / "python").write_text("#!/usr/bin/env bash\n" + trainer)
            (programs / "python").chmod(0o755)
        text = (ROOT / "scripts" / "slurm" / f"{launcher}.sbatch").read_text()
        for line, replacement in (
            ("run_root=outputs/slurm", f"run_root={self.folder}/runs"),
            ("    source .venv/bin/activate", f"    export PATH={programs}:$PATH"),
        ):
            assert text.count(line) == 1
            text = text.replace(line, replacement)
        path = self.folder / f"launcher-{number}.sbatch"
        path.write_text(text)
        size = ("--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1")
        log = self.folder / f"log-{number}.txt"
        line = self.command(
            *("sbatch", "--parsable", f"--output={log}", *size, *options, path, *args), cwd=cwd
        )
        return Job(self, int(line), log)


@dataclass
class Job:
    """A submitted job."""

    cluster: Cluster
    number: int
    log: Path

    @property
    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    @property
    def folder(self) -> Path:
        return self.cluster.folder / "runs" / f"lighthouse-{self.number}"

    def show(self, key: str) -> str:
        line = self.cluster.command("scontrol", "show", "job", "--oneliner", str(self.number))
        return re.search(rf"(?:^| ){key}=(\S*)", line)[1]

    @property
    def restarts(self) -> int:
        return int(self.show("Restarts"))

    @property
    def losses(self) -> dict[int, float]:
        return losses_of(self.folder) if (self.folder / metrics.FILE_NAME).exists() else {}

    @property
    def checkpoints(self) -> dict[int, bool]:
        return checkpoint_steps(self.folder / "checkpoint")

    def wait_for(self, what: Callable[[], bool], seconds: float = 300) -> None:
        end = time.monotonic() + seconds
        while not what():
            is_over = self.show("JobState") in ("FAILED", "CANCELLED", "TIMEOUT", "COMPLETED")
            if time.monotonic() > end or (is_over and not what()):
                pytest.fail(f"job is {self.show('JobState')}; its log:\n{self.text}")
            time.sleep(0.05)

    def wait_for_step(self, step: int) -> None:
        self.wait_for(lambda: max(self.losses, default=0) >= step)

    def wait_for_end(self, state: str, exit_code: int = 0) -> None:
        self.wait_for(lambda: self.show("JobState") == state)
        assert self.show("ExitCode") == f"{exit_code}:0", self.text

    def signal(self, name: str) -> None:
        self.cluster.command("scancel", f"--signal={name}", str(self.number))

    def stops(self) -> list[int]:
        """The steps after which the run was asked to stop."""
        return self.logged("the run ends after step")

    def starts(self) -> list[int]:
        """The steps at which the run started."""
        return self.logged("Training starts at step")

    def logged(self, words: str) -> list[int]:
        """The numbers that task 0 logged after `words`."""
        return [int(n) for n in re.findall(rf"^0: .*{words} (\d+)", self.text, re.M)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm")
    script = Path(__file__).with_name("cluster.sh")
    conf = str(folder / "cluster" / "slurm.conf")
    env = os.environ | {"SLURM_CONF": conf, "OMP_NUM_THREADS": "1"}
    corpus = write_corpus(folder / "corpus" / "text")
    try:
        subprocess.run([script, "start", folder / "cluster"], check=True)
        yield Cluster(folder, corpus, env)
    finally:
        subprocess.run(["scancel", "--partition=low,low_no_grace,high"], env=env)
        subprocess.run([script, "stop", folder / "cluster"], check=True)


@pytest.fixture(scope="module")
def undisturbed(cluster) -> Job:
    """A job that nobody disturbs."""
    job = cluster.submit(cluster.config())
    job.wait_for_end("COMPLETED")
    return job


def kept_command(job: Job) -> list[str]:
    """The words of command.txt, split as by a shell."""
    script = f'set -- {(job.folder / "command.txt").read_text().strip()}; printf "%s\\0" "$@"'
    return job.cluster.command("bash", "-c", script).split("\0")[:-1]


def test_a_job_runs_to_its_end(cluster, undisturbed):
    assert list(undisturbed.losses) == list(range(1, STEPS + 1))
    assert undisturbed.checkpoints == {STAGE1_STEPS: True, STEPS: True}
    assert undisturbed.restarts == 0
    folder = undisturbed.folder
    assert (folder / "config.toml").read_text() == cluster.config().read_text()
    assert (folder / "handover.json").exists()
    options = ["--job.config_file", f"{folder}/config.toml", "--job.dump_folder", str(folder)]
    module = "torchtitan.experiments.lighthouse.train"
    assert kept_command(undisturbed) == ["python", "-m", module, *options]
    (start,) = (folder / "starts.txt").read_text().splitlines()
    assert f"job {undisturbed.number}, restart 0, 2 tasks on 127.0.0.1," in start


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a checkout")
def test_the_run_folder_keeps_the_source(cluster, undisturbed):
    commit = cluster.command("git", "rev-parse", "HEAD")
    assert (undisturbed.folder / "commit.txt").read_text() == commit
    kept = undisturbed.folder / "uncommitted.diff"
    assert kept.exists() == bool(cluster.command("git", "diff", "HEAD"))
    assert not kept.exists() or kept.read_text().startswith("diff --git")


def test_a_signal_in_each_stage(cluster, undisturbed):
    config = cluster.config("removed.toml")
    job = cluster.submit(config)
    job.wait_for_step(1)
    # Changes in the checkout do not affect a run.
    config.unlink()
    job.signal("USR1")
    job.wait_for_step(STAGE1_STEPS + 1)
    job.signal("USR1")
    job.wait_for_end("COMPLETED")
    assert job.restarts == 2
    first, second = job.stops()
    assert first < STAGE1_STEPS < second < STEPS
    assert job.starts() == [1, first + 1, second + 1]
    assert f"Stage 2 (dense attention) from step {second + 1} on" in job.text
    assert job.checkpoints == dict.fromkeys([first, STAGE1_STEPS, second, STEPS], True)
    assert (job.folder / "requeues.txt").read_text().split() == [str(first), str(second)]
    assert len((job.folder / "starts.txt").read_text().splitlines()) == 3
    assert job.losses == undisturbed.losses


def preempt(cluster: Cluster) -> None:
    """Submit a job of higher priority that needs all nodes."""
    options = ("--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null")
    cluster.command("sbatch", *options, "--wrap", "sleep 2")


@pytest.mark.parametrize("partition", ["low", "low_no_grace"])
def test_a_preemption(cluster, undisturbed, partition):
    job = cluster.submit(cluster.config(), options=(f"--partition={partition}",))
    job.wait_for_step(1)
    preempt(cluster)
    job.wait_for_end("COMPLETED")
    assert job.restarts == 1
    (step,) = job.stops()
    assert step < STEPS
    assert job.starts() == [1, step + 1]
    assert job.losses == undisturbed.losses
    # With a grace time, SLURM neither kills nor requeues a job that ends by itself.
    assert (job.folder / "requeues.txt").exists() == (partition == "low")


def test_the_time_limit(cluster):
    # SLURM checks limits every minute, so the signal comes after one to two minutes.
    options = ("--time=3", "--signal=USR1@60")
    job = cluster.submit(cluster.config("long.toml", steps=100_000), options=options)
    job.wait_for(lambda: job.restarts == 1)
    (step,) = job.stops()
    job.wait_for_step(step + 1)
    assert job.starts() == [1, step + 1]
    assert job.checkpoints[step]
    assert "TIME LIMIT" not in job.text
    cluster.command("scancel", str(job.number))


def test_a_cancelled_job_is_saved_and_stays_cancelled(cluster, undisturbed):
    job = cluster.submit(cluster.config())
    job.wait_for_step(1)
    cluster.command("scancel", str(job.number))
    job.wait_for(lambda: "SLURM has ended the job (" in job.text)
    # Longer than it takes to start a requeued job.
    time.sleep(20)
    assert job.show("JobState") == "CANCELLED"
    assert job.restarts == 0
    (step,) = job.stops()
    assert job.checkpoints == {step: True}
    assert job.losses == {i: undisturbed.losses[i] for i in range(1, step + 1)}


def test_four_nodes(cluster):
    options = ("--ntasks-per-node=1", "--gpus-per-node=1")
    job = cluster.submit(
        *[cluster.config("short.toml", steps=3), "--lighthouse.stage1_steps", "2"],
        launcher="four_nodes",
        options=options,
    )
    job.wait_for_end("COMPLETED")
    assert list(job.losses) == [1, 2, 3]
    assert "4 tasks on 127.0.0.[1-4]" in job.text


# ---- without training


def test_the_ranks_of_the_tasks(cluster):
    variables = "RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT CUDA_VISIBLE_DEVICES"
    job = cluster.submit(
        cluster.config(),
        launcher="four_nodes",
        trainer=f'for name in {variables}; do echo -n "${{!name}} "; done; echo "$SLURMD_NODENAME"',
    )
    job.wait_for_end("COMPLETED")
    port = 20000 + job.number % 10000
    expected = [
        f"{rank}: {rank} {rank % 2} 8 127.0.0.1 {port} 0,1 127.0.0.{rank // 2 + 1}"
        for rank in range(8)
    ]
    assert sorted(re.findall(r"^\d: .*$", job.text, re.M)) == expected


INJECTION = "a b'c\"d $(touch {0}) `touch {0}` ; touch {0} & | > {0} * \\ é"


def test_arguments_arrive_as_they_are(cluster):
    touched = cluster.folder / "touched"
    argument = INJECTION.format(touched)
    # A file name has no slash.
    config = cluster.config(INJECTION.format("touched") + ".toml")
    job = cluster.submit(
        config,
        *[argument, "", "two\nlines"],
        trainer='if [[ $RANK == 0 ]]; then printf "<%s>\\n" "$@"; fi',
    )
    job.wait_for_end("COMPLETED")
    arguments = re.sub("^0: ", "", job.text, flags=re.M).partition("<")[2]
    assert arguments.endswith(f">\n<{argument}>\n<>\n<two\nlines>\n")
    assert kept_command(job)[-3:] == [argument, "", "two\nlines"]
    assert (job.folder / "config.toml").read_text() == config.read_text()
    assert not touched.exists() and not (ROOT / "touched").exists()


def test_an_argument_is_nothing_but_a_value_to_the_trainer(cluster):
    touched = cluster.folder / "touched"
    argument = INJECTION.format(touched)
    job = cluster.submit(cluster.config(), "--training.dataset_path", argument)
    job.wait_for_end("FAILED", exit_code=2)
    (line,) = re.findall("^0: error: .*", job.text, re.M)
    assert repr(argument) in line
    assert not touched.exists() and not (ROOT / "touched").exists()


def test_a_call_from_elsewhere_ends_with_one_line(cluster):
    job = cluster.submit(cluster.config(), cwd=cluster.folder)
    job.wait_for_end("FAILED", exit_code=2)
    (line,) = job.text.splitlines()
    assert line.startswith("error: sbatch must be called in the repository root")


def test_a_name_of_a_job_is_one_of_a_folder(cluster):
    job = cluster.submit(cluster.config(), options=("--job-name=../$(a) b;c",), trainer="exit 0")
    job.wait_for_end("COMPLETED")
    assert (cluster.folder / "runs" / f".._{'__a'}__b_c-{job.number}").exists()


def test_other_exit_codes_are_passed_on(cluster):
    # The other task hangs until it is killed, as in a collective.
    job = cluster.submit(
        cluster.config(), trainer="if [[ $RANK == 1 ]]; then exit 3; fi; sleep 1000"
    )
    job.wait_for(lambda: job.show("JobState") == "FAILED", seconds=60)
    assert job.restarts == 0
    assert "task 1: Exited with exit code 3" in job.text


def test_a_preempted_job_is_requeued_whatever_its_exit_code(cluster):
    script = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(1)); "
    script += "print('up', flush=True); time.sleep(1000)"
    trainer = "if [[ $SLURM_RESTART_COUNT ]]; then exit 0; fi\n"
    job = cluster.submit(cluster.config(), trainer=f'{trainer}exec {sys.executable} -c "{script}"')
    job.wait_for(lambda: job.text.count("up") == 2)
    preempt(cluster)
    job.wait_for_end("COMPLETED")
    assert job.restarts == 1
    assert "Exited with exit code 1" in job.text


def test_a_job_that_gets_nowhere_is_not_requeued_for_ever(cluster):
    job = cluster.submit(cluster.config(), trainer="exit 75")
    job.wait_for_end("FAILED", exit_code=75)
    assert job.restarts == 3
    assert (job.folder / "requeues.txt").read_text() == "none\n" * 3
    assert "stopped 3 times without a checkpoint after step none: not requeued" in job.text
