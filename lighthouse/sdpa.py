"""Stock causal attention, kept to fused kernels: never the fallback that stores S * S logits."""

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

LONGEST_EFFICIENT = 65535
"""Tokens up to which the memory-efficient kernel is right."""


def fused_backends(dtype: torch.dtype, seq_len: int, prefer: str = "cudnn") -> list[SDPBackend]:
    """Backends of SDPA that may be used, in order: fused ones only, so that attention never
    falls back to the one that stores S * S logits.

    On a GPU cuDNN and FlashAttention take fp16 and bf16. For fp32 there is the memory-efficient
    kernel alone, and it up to 65,535 tokens only, beyond which it is wrong (pytorch #162588). On
    the CPU everything is FlashAttention.

    Args:
        seq_len: the longest sequence to attend over, in tokens or entries.
        prefer: `cudnn` or `flash`; the other one stands in where it does not apply.
    """
    if dtype in (torch.float32, torch.float64):
        is_right = seq_len <= LONGEST_EFFICIENT
        return [SDPBackend.FLASH_ATTENTION, *[SDPBackend.EFFICIENT_ATTENTION] * is_right]
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
    return order if prefer == "cudnn" else order[::-1]


def causal_sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, enable_gqa: bool = False
) -> torch.Tensor:
    """Stock causal scaled dot-product attention by a fused kernel.

    Args:
        q: [B, H, S, D]; k, v: [B, Hkv, S, D].

    Returns:
        [B, H, S, D]

    Raises:
        RuntimeError: no fused kernel takes these inputs.
    """
    with sdpa_kernel(fused_backends(q.dtype, q.shape[2]), set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=enable_gqa)
