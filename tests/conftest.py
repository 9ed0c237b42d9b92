"""Settings for all tests."""

import os

import torch

if not torch.cuda.is_available():
    # Triton kernels run in its interpreter; this must be set before triton is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")
