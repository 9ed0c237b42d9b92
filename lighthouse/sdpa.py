"""Standard causal attention with fused kernels only, which never store S * S logits."""

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

LONGEST_EFFICIENT = 65535
"""The longest sequence, in tokens, for which the memory-efficient kernel is correct."""


def fused_backends(dtype: torch.dtype, seq_len: int, prefer: str = "cudnn") -> list[SDPBackend]:
    """The allowed SDPA backends, in order of preference. They are fused and store no S * S logits.

    On a GPU, cuDNN and FlashAttention support fp16 and bf16. Only the memory-efficient kernel
    supports fp32. Beyond 65,535 tokens its results are wrong (pytorch #162588). On the CPU all
    dtypes use FlashAttention.

    Args:
        seq_len: the longest sequence to attend over, in tokens or entries.
        prefer: `cudnn` or `flash`; the other is used where the preferred one does not apply.
    """
    if dtype in (torch.float32, torch.float64):
        if seq_len <= LONGEST_EFFICIENT:
            return [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
        return [SDPBackend.FLASH_ATTENTION]
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
    return order if prefer == "cudnn" else order[::-1]


def causal_sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, enable_gqa: bool = False
) -> torch.Tensor:
    """Standard causal scaled dot-product attention with a fused kernel.

    Args:
        q: [B, H, S, D]; k, v: [B, Hkv, S, D].

    Returns:
        [B, H, S, D]

    Raises:
        RuntimeError: no fused kernel supports these inputs.
    """
    if enable_gqa and q.is_cuda and q.dtype == torch.float32:
        # The only kernel for fp32 on a GPU, the memory-efficient one, has no GQA.
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        enable_gqa = False
    with sdpa_kernel(fused_backends(q.dtype, q.shape[2]), set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=enable_gqa)
