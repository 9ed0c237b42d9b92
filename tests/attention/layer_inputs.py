"""Inputs of a layer: q, k, v and rotary tables. Also the entries of a selection, for loops."""

import torch

from lighthouse import RotaryPhases, Selection


def random_qkv(
    batch: int,
    n_heads: int,
    n_kv_heads: int,
    seq_len: int,
    head_dim: int,
    dtype: torch.dtype = torch.float64,
    requires_grad: bool = False,
) -> list[torch.Tensor]:
    """q, k, v with the strides of a model: views of [B, N, H, D]. The same each time."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(batch, seq_len, heads, head_dim, generator=generator, dtype=torch.float64)
        .to(dtype)
        .transpose(1, 2)
        .requires_grad_(requires_grad)
        for heads in (n_heads, n_kv_heads, n_kv_heads)
    ]


def frequencies(rotary_dim: int) -> torch.Tensor:
    return 100.0 ** -(torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)


def rotary_table(
    rotary_dim: int, num_rows: int, interleaved: bool, dtype: torch.dtype = torch.float64
) -> RotaryPhases:
    angles = torch.arange(num_rows, dtype=torch.float64)[:, None] * frequencies(rotary_dim)
    return RotaryPhases(angles.cos().to(dtype), angles.sin().to(dtype), interleaved)


def entries_of(selection: Selection, batch: int, kv_head: int) -> list[tuple[int, int]]:
    """Level and index of the entry in each slot of one head."""
    columns = (x[batch, kv_head].tolist() for x in (selection.level, selection.index))
    return list(zip(*columns, strict=True))
