"""The kernels compile for Hopper and Blackwell to the intended machine code.

No GPU is needed. `kernel_compile_probe.py` compiles each launch of real runs, in a process without
the interpreter, and reports on the machine code.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

NARROW_QUARTERS = not triton.__version__.startswith(("3.6.", "3.7."))
"""Whether partly rotated rows (a quarter) use narrow loads. They do since Triton 3.8. The results
are correct, and the cost in time is not measured."""

PARKED = {
    ("3.6", "bf16-D64-L3-p8-gqa4-halves"): 8,
    ("3.8", "fp16-D80-L4-p8-odd"): 24,
}
"""Bytes of stack by Triton version and run. ptxas uses them to fit one more program on an SM."""

CAPABILITIES = ["90", "100"]
KERNELS = {
    "norm_score_pool_kernel",
    "select_kernel",
    "gather_kernel",
    "gather_backward_kernel",
    "scatter_back_kernel",
    "scatter_back_backward_kernel",
}
KERNELS_WITH_PHASES = {"norm_score_pool_kernel", "gather_kernel", "gather_backward_kernel"}

HALVES = ("-halves", "-quarter")


def is_rotary(run: str) -> bool:
    return run.endswith(("-interleaved", "-halves", "-quarter"))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """One dict per kernel, run and compute capability."""
    probe = Path(__file__).with_name("kernel_compile_probe.py")
    root = str(probe.parent.parent)
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([root, environment.get("PYTHONPATH", "")])
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run(
        [sys.executable, str(probe), *CAPABILITIES], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    for result in results:
        print(*(f"{name}={value}" for name, value in result.items()))
    return results


def test_every_kernel_compiles_for_every_target(compiled):
    runs = {result["run"] for result in compiled}
    expected = {
        (run, name, int(c))
        for run in runs
        for name in (KERNELS_WITH_PHASES if is_rotary(run) else KERNELS)
        for c in CAPABILITIES
    }
    assert {(x["run"], x["kernel"], x["capability"]) for x in compiled} == expected


def test_registers_suffice(compiled):
    for result in compiled:
        assert result["REG"] < 255, result
        parked = PARKED.get((triton.__version__[:3], result["run"]), 0)
        assert result["STACK"] <= parked and result["LOCAL"] == 0, result


def test_rows_are_summed_within_their_threads(compiled):
    """Only norms and the longest span of a block need communication between threads."""
    for result in compiled:
        if result["kernel"] == "select_kernel":
            continue
        # Norms of q and k for at most 16 tokens over at most 64 threads (1 KiB), of two warps.
        has_norms = result["kernel"] == "norm_score_pool_kernel"
        assert result["shuffles"] <= (2 * 16 * 6 if has_norms else 4), result
        # A thread holds four cosines of fp32 pairs, or two of neighbouring pairs.
        is_fp32 = result["run"] == "fp32-D256-L5-p2-interleaved"
        assert result["shared_loads"] <= (80 if has_norms else 48 if is_fp32 else 2), result


def test_no_atomics(compiled):
    for result in compiled:
        assert result["atomics"] == 0, result


def test_rows_move_in_16_bytes_per_thread(compiled):
    for result in compiled:
        if result["kernel"] == "select_kernel":
            continue
        if result["run"].endswith("-quarter") and NARROW_QUARTERS:
            continue
        if result["kernel"] == "norm_score_pool_kernel" and not result["run"].endswith(HALVES):
            # The kernel reads rows and the table. Only groups of heads also read scores.
            is_alone = "gqa" not in result["run"] and "odd" not in result["run"]
            is_wide = not result["run"].startswith("fp32") or not is_rotary(result["run"])
            assert result["narrow_loads"] <= (0 if is_alone and is_wide else 64), result
        if result["kernel"] == "norm_score_pool_kernel" and result["run"].endswith(HALVES):
            # Halves of rows move in 8 bytes per thread.
            assert result["wide_loads"] >= 12 and result["narrow_loads"] <= 64, result
            continue
        # 16 elements of bf16 per thread: two loads for each of three levels, and two stores.
        assert result["wide_loads"] >= 6, result
        assert result["wide_stores"] >= 2, result
