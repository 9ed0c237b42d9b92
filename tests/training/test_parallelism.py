"""All layouts of ranks give the same losses for a global batch, and can exchange checkpoints.

Every run starts from the same seed checkpoint, because initialization depends on the sharding of
parameters. Only the order of sums differs.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import launch
from runs import Run, SharedTrainer, command_line, handover_of, losses_of, train, trainer_of
from torchtitan.experiments.lighthouse import metrics
from torchtitan.experiments.lighthouse.config.load import load_config
from torchtitan.experiments.lighthouse.launch import free_port

CONFIGS = Path(__file__).parents[2] / "train_configs"
STEPS, STAGE1_STEPS = 20, 12
# One stratum for each of four chunks, with 136 candidates, more than are selected.
SEQ_LEN = 4 * 136 * 2
OPTIONS = {
    "model__flavor": "quickstart",
    "optimizer__lr": 3e-3,
    # Without it, Adam divides a difference of two roundings by its own size.
    "optimizer__eps": 1e-3,
    "lr_scheduler__total_steps": STEPS,
    "lighthouse__num_levels": 2,
    "lighthouse__pooling_factor": 2,
    "lighthouse__topk": 512,
    "lighthouse__stage1_steps": STAGE1_STEPS,
    "lighthouse__full_attn_layers": [0],
    "training__seq_len": SEQ_LEN,
    "training__steps": STEPS,
    "checkpoint__enable": True,
    "validation__seq_len": SEQ_LEN,
}
ULYSSES = {"parallelism__context_parallel_degree": 2}
RING = {**ULYSSES, "lighthouse__context_parallel": "ring"}
ACCUMULATED = {
    "training__global_batch_size": 4,
    "training__steps": 4,
    "lighthouse__stage1_steps": 2,
}
CHUNKS8 = {"lighthouse__topk": 1024, "training__seq_len": 2 * SEQ_LEN}
PIECES = {
    "lighthouse__stage2_seq_len": SEQ_LEN // 4,
    "lighthouse__stage2_full_steps": 2,
    "training__steps": 8,
    "lighthouse__stage1_steps": 2,
    # Validation is at full length, also during the steps on pieces.
    "validation__enable": True,
    "validation__freq": 2,
}
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    1: {"one": {}, "batch of 4": ACCUMULATED, "8 chunks": CHUNKS8, "pieces": PIECES},
    2: {
        "ulysses": ULYSSES,
        "ring": {**RING, "parallelism__context_parallel_rotate_method": "alltoall"},
        "ulysses, compiled, selective": {
            **ULYSSES,
            # Traced in full with AOTAutograd, but without compiling kernels.
            "compile__enable": True,
            "compile__backend": "aot_eager",
            "activation_checkpoint__mode": "selective",
            "activation_checkpoint__selective_ac_option": "op",
        },
        "ring, full checkpointing": {**RING, "activation_checkpoint__mode": "full"},
        "ulysses, loss in chunks": {**ULYSSES, "training__loss_chunk_size": 200},
        "ulysses, pieces": {**ULYSSES, **PIECES},
        "ring, pieces, full checkpointing": {
            **RING, **PIECES, "activation_checkpoint__mode": "full",
        },
        "tensor, pieces": {"parallelism__tensor_parallel_degree": 2, **PIECES},
        "tensor": {"parallelism__tensor_parallel_degree": 2},
        "fsdp 2": ACCUMULATED,
        "ulysses, batch of 4": {**ACCUMULATED, **ULYSSES},
    },
    4: {
        "fsdp 4": ACCUMULATED,
        "fsdp 2, ulysses": {**ACCUMULATED, **ULYSSES},
        "replicated 2, ring": {
            **ACCUMULATED, **RING, "parallelism__data_parallel_replicate_degree": 2,
        },
        "tensor 2, ring": {**RING, "parallelism__tensor_parallel_degree": 2},
        "ring 4": {**CHUNKS8, **RING, "parallelism__context_parallel_degree": 4},
    },
    8: {"fsdp 4, ulysses": {**ACCUMULATED, **ULYSSES}},
}  # fmt: skip
SAME = {
    "one": [
        "ulysses", "ulysses, compiled, selective", "ulysses, loss in chunks",
        "ring", "ring, full checkpointing", "tensor", "tensor 2, ring",
    ],
    "batch of 4": [
        "fsdp 2", "ulysses, batch of 4", "fsdp 4", "fsdp 2, ulysses", "replicated 2, ring",
        "fsdp 4, ulysses",
    ],
    "8 chunks": ["ring 4"],
    "pieces": ["ulysses, pieces", "ring, pieces, full checkpointing", "tensor, pieces"],
}  # fmt: skip


class RisingTrainer(SharedTrainer):
    """Reads sequences of rising bytes, which the model learns quickly."""

    def windows(self):
        seq_len = self.job_config.training.seq_len
        generator = torch.Generator().manual_seed(0)
        while True:
            starts = torch.randint(0, 256, (seq_len // 16 + 1, 1), generator=generator)
            yield ((starts + torch.arange(16)) % 256).flatten()[: seq_len + 1]


def from_seed(folder: Path) -> dict[str, Any]:
    return {
        "checkpoint__initial_load_path": folder / "seed" / "checkpoint" / "step-0",
        "checkpoint__initial_load_model_only": True,
    }


def run_layouts(num_ranks: int, folder: Path, corpus: Path) -> dict[str, Run]:
    results = {}
    for name, layout in LAYOUTS[num_ranks].items():
        options = {**OPTIONS, **from_seed(folder), **layout}
        args = command_line(folder / name.replace(" ", "-"), corpus, **options)
        results[name] = train(args, RisingTrainer)
    return results


def values_of(run: Run, metric: str) -> dict[int, float]:
    """The values of a metric by step."""
    return {line["step"]: line[metric] for line in metrics.read_metrics(run.folder, metric)}


class Layouts:
    """The runs of all layouts, by name.

    Runs with equally many ranks are made together, at first use.
    """

    def __init__(self, folder: Path, corpus: Path):
        self.folder, self.corpus = folder, corpus
        self.results = {}

    def __getitem__(self, name: str) -> Run:
        if name not in self.results:
            num_ranks = next(n for n, layouts in LAYOUTS.items() if name in layouts)
            args = num_ranks, self.folder, self.corpus
            if num_ranks == 1:
                self.results |= run_layouts(*args)
            else:
                ranks = launch(run_layouts, num_ranks, self.folder / str(num_ranks), *args)
                self.results |= ranks[0]
        return self.results[name]


@pytest.fixture(scope="module")
def layouts(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("layouts")
    options = {**OPTIONS, "checkpoint__create_seed_checkpoint": True}
    with trainer_of(load_config(command_line(folder / "seed", corpus, **options))) as seed:
        seed.checkpointer.save(0, last_step=True)
    return Layouts(folder, corpus)


def marked(name: str):
    """Mark layouts of more than two ranks as slow. They take minutes on two cores."""
    return pytest.mark.slow if name not in LAYOUTS[2] else ()


def assert_same_losses(losses: dict[int, float], expected: dict[int, float]) -> None:
    """Check that losses are equal up to rounding, and later up to changes of the selection.

    Rounding may change the selection at a near-tie. That changes a loss by about 1e-4 of its value.
    Text of another position would change it by over 1e-2.
    """
    first = min(expected)
    assert losses[first] == pytest.approx(expected[first], rel=1e-6)
    assert losses == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("one", "layout"),
    [
        pytest.param(one, layout, marks=marked(layout))
        for one, same in SAME.items()
        for layout in same
    ],
)
def test_every_layout_trains_as_one_process(layouts, one, layout):
    expected, actual = layouts[one], layouts[layout]
    losses = list(expected.losses.values())
    # The loss falls, and dense steps are also compared.
    assert losses[-1] < losses[0] - 0.1
    for step, classes in expected.attention.items():
        of_last_layer = actual.attention[step][-1]
        assert (of_last_layer == "LighthouseAttention") == (classes[-1] == "LighthouseAttention")
    assert_same_losses(actual.losses, expected.losses)
    for metric, rel in (
        ("grad_norm", 1e-2),
        (metrics.TOKENS_SEEN, 0),
        (metrics.VALIDATION_LOSS, 1e-3),
    ):
        assert values_of(actual, metric) == pytest.approx(values_of(expected, metric), rel=rel)


@pytest.mark.slow
def test_two_nodes_go_through_the_switch(tmp_path):
    """Two torchrun agents on this machine, with one process each, share every sequence."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{free_port()}", "--rdzv-id", "two",
        "-m", "torchtitan.experiments.lighthouse.train",
        "--job.config_file", str(CONFIGS / "cp_smoke_cpu.toml"), "--job.dump_folder", str(tmp_path),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    nodes = [
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    errors = [node.communicate(timeout=600)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], errors
    stages = [line["stage"] for line in metrics.read_metrics(tmp_path, metrics.LOSS)]
    assert stages == [1] * 12 + [2] * 8
    record = handover_of(tmp_path)
    assert record["before"] == record["after"]


# ---- a checkpoint of one layout under another

MOVES = {
    # The run stops in stage 1, and the next layout continues through the switch.
    "one to ulysses": [(1, {}, 5), (2, ULYSSES, STEPS)],
    "ring to one": [(2, RING, 5), (1, {}, STEPS)],
    "ulysses to ring, at the switch": [(2, ULYSSES, STAGE1_STEPS), (2, RING, STEPS)],
}


@pytest.fixture(scope="module")
def unmoved(layouts, tmp_path_factory, corpus):
    return move(tmp_path_factory.mktemp("unmoved") / "run", layouts, corpus, [(1, {}, STEPS)])


def move(folder, layouts, corpus, legs) -> dict[int, float]:
    """The losses of a run on the corpus that changes its layout at each resume."""
    seed = from_seed(layouts.folder)
    for i, (num_ranks, layout, steps) in enumerate(legs):
        options = {**OPTIONS, **seed, **layout, "training__steps": steps}
        options["lighthouse__stage1_steps"] = min(steps, STAGE1_STEPS)
        args = command_line(folder, corpus, **options)
        if num_ranks == 1:
            train(args)
        else:
            launch(train, num_ranks, folder / f"leg-{i}", args)
    return losses_of(folder)


@pytest.mark.parametrize(
    "name",
    [pytest.param(MOVE, marks=pytest.mark.slow) for MOVE in list(MOVES)[:1]] + list(MOVES)[1:],
)
def test_a_checkpoint_moves_to_another_layout(tmp_path, layouts, unmoved, corpus, name):
    losses = move(tmp_path / "run", layouts, corpus, MOVES[name])
    assert len(losses) == STEPS
    assert_same_losses(losses, unmoved)
