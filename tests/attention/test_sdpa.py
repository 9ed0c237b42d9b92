"""Choice of the kernel for dense attention."""

import pytest
import torch
from torch.nn.attention import SDPBackend

from lighthouse.sdpa import fused_backends


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("prefer", ["cudnn", "flash"])
@pytest.mark.parametrize("seq_len", [512, 65535, 65536, 2**20])
def test_attention_is_fused_and_right_at_its_length(dtype, prefer, seq_len):
    backends = fused_backends(dtype, seq_len, prefer)
    assert SDPBackend.FLASH_ATTENTION in backends and SDPBackend.MATH not in backends
    efficient = dtype in (torch.float32, torch.float64) and seq_len <= 65535
    assert (SDPBackend.EFFICIENT_ATTENTION in backends) == efficient
    if dtype in (torch.float16, torch.bfloat16):
        assert (backends[0] == SDPBackend.CUDNN_ATTENTION) == (prefer == "cudnn")
