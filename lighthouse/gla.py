"""Gated linear attention with one constant gate for all tokens and without parameters.

    S_t   = g S_(t-1) + k_t v_t^T        the state, [D, D]
    out_t = q_t S_t / sqrt(D)

It is computed in chunks of C tokens. With i, j the positions of two tokens in one chunk,

    out_i = sum over j <= i of g^(i-j) (q_i . k_j) v_j  +  g^(i+1) q_i S,    S of the previous chunk
    S     <- g^C S + sum over j of g^(C-1-j) k_j v_j^T

Only powers of g from g^C = 1/16 to 1 occur.
"""

import importlib.util
import math

import torch
import torch.nn.functional as F

LOG_GATE = -math.log(2) / 16
"""log g: logsigmoid(0) / 16, the untrained gate of the published code."""

CHUNK = 64
"""Tokens per chunk, C."""


def gated_linear_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal gated linear attention.

    CUDA inputs use flash-linear-attention in the dtype of q, if it is installed. Other inputs, and
    fp64, use plain PyTorch. There is no gradient.

    Args:
        q, k, v: [B, H, N, D].

    Returns:
        [B, H, N, D]; plain PyTorch returns fp32 (fp64 for fp64 input).
    """
    is_by_fla = q.is_cuda and q.dtype != torch.float64 and importlib.util.find_spec("fla")
    # Autocast would lower the precision of the products below fp32.
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        return _by_fla(q, k, v) if is_by_fla else _in_chunks(q, k, v)


def _in_chunks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    seq_len, head_dim = q.shape[2:]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k, v = (_chunks_of(x.to(dtype)) for x in (q, k, v))  # [N/C, B, H, C, D]
    places = torch.arange(CHUNK, device=q.device, dtype=dtype)
    decay = torch.exp(LOG_GATE * (places[:, None] - places)).tril()
    out = (q @ k.mT).mul_(decay) @ v
    # Before the loop, the contribution of each chunk. After the loop, the state after each chunk.
    states = (k * decay[-1, :, None]).mT @ v  # [N/C, B, H, D, D]
    for chunk in range(1, len(states)):
        states[chunk].add_(states[chunk - 1], alpha=math.exp(LOG_GATE * CHUNK))
    decay_since_before = torch.exp(LOG_GATE * (places + 1))[:, None]
    out[1:] += (q[1:] * decay_since_before) @ states[:-1]
    out = out.movedim(0, 2).flatten(2, 3)[:, :, :seq_len]
    return out / math.sqrt(head_dim)


def _chunks_of(x: torch.Tensor) -> torch.Tensor:
    """[B, H, N, D] to [N/C, B, H, C, D], padded at the end with zeros, which affect no token."""
    padded = F.pad(x, (0, 0, 0, -x.shape[2] % CHUNK)) if x.shape[2] % CHUNK else x
    return padded.unflatten(2, (-1, CHUNK)).movedim(2, 0).contiguous()


def _by_fla(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    from fla.ops.simple_gla import chunk_simple_gla

    log_gates = torch.full((q.shape[1],), LOG_GATE, device=q.device)
    by_token = (x.transpose(1, 2) for x in (q, k, v))  # [B, N, H, D]
    out, _ = chunk_simple_gla(*by_token, g_gamma=log_gates, scale=q.shape[3] ** -0.5)
    return out.transpose(1, 2)
