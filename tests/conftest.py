"""Settings and fixtures for all tests."""

import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

if not torch.cuda.is_available():
    # Triton kernels run in the interpreter. This must be set before triton is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # A shell starts background jobs like this, and the runs of the tests would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A folder of small documents."""
    # Only tests that train import torchtitan.
    from runs import write_corpus

    return write_corpus(tmp_path_factory.mktemp("corpus") / "text")


@pytest.fixture
def one_rank():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
