"""Settings and fixtures for all tests."""

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Triton kernels run in the interpreter. This must be set before triton is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A folder of small documents."""
    # Only tests that train import torchtitan.
    from runs import write_corpus

    return write_corpus(tmp_path_factory.mktemp("corpus") / "text")
