"""Rotary embeddings of pooled entries: rotate to one position, then average (rope-fix, 2026-07-31).

Rotary embeddings (RoPE) rotate the q and k of a token by its position. In averages of such vectors
high frequencies cancel. With `RotaryPhases`, the tokens of a span are first rotated to the position
of its last token and then averaged:

    pooled(l, i) = mean over tokens t of the span of  R((i+1) * p**l - 1 - t) x[t]

x is the rotated q or k, and R(d) is the rotation by d positions. Rotations compose, so the result
equals the mean of the unrotated vectors, rotated by the position of the last token. Only offsets
0 .. p**(L-1) - 1 occur, so one small table serves all positions and lengths. v is not rotated. The
gradient of x[t] is the gradient of the entry under the inverse rotation.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class RotaryPhases:
    """Table of the rotations by 0, 1, 2, ... positions.

    Raises:
        ValueError: wrong shape or dtype of `cos` and `sin`, or different devices.
    """

    cos: torch.Tensor
    """Cosines of the angles d * frequency in row d, [at least p**(L-1), R/2], fp32 or fp64. Row 0
    is 1. The first R of the D elements of a head are rotated."""

    sin: torch.Tensor
    """Sines, like `cos`; row 0 is 0."""

    interleaved: bool
    """Which elements form a pair: 2i and 2i+1 if True (torchtitan, Meta's Llama), i and i + R/2 if
    False (Hugging Face)."""

    def __post_init__(self):
        cos, sin = self.cos, self.sin
        if cos.dim() != 2 or cos.shape != sin.shape or 0 in cos.shape:
            raise ValueError(
                "rotary cos and sin must both be [offsets, R/2], got "
                f"{list(cos.shape)} and {list(sin.shape)}; take a row for each offset"
            )
        if cos.dtype != sin.dtype or cos.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"rotary cos and sin must both be fp32 or fp64, got {cos.dtype} and {sin.dtype}; "
                "compute the table in fp32"
            )
        if cos.device != sin.device:
            raise ValueError(
                f"rotary cos and sin must be on one device, got {cos.device} and {sin.device}; "
                "move one of them"
            )
        object.__setattr__(self, "cos", cos.detach().contiguous())
        object.__setattr__(self, "sin", sin.detach().contiguous())

    def to(self, device: torch.device) -> "RotaryPhases":
        """The same table on another device."""
        if device == self.cos.device:
            return self
        return RotaryPhases(self.cos.to(device), self.sin.to(device), self.interleaved)

    def check(self, longest_span: int, q: torch.Tensor) -> None:
        """Raise ValueError unless the table fits q and a span of `longest_span` tokens.

        Args:
            q: [B, H, N, D].
        """
        num_rows, num_pairs = self.cos.shape
        if num_rows < longest_span:
            raise ValueError(
                "rotary cos and sin must have pooling_factor**(num_levels-1) = "
                f"{longest_span} rows or more, got {num_rows}; make the table longer"
            )
        head_dim = q.shape[3]
        if head_dim % 2 or 2 * num_pairs > head_dim:
            raise ValueError(
                "rotary cos and sin must have at most head_dim / 2 columns and head_dim must be "
                f"even, got {num_pairs} columns and head_dim {head_dim}; take a column for each "
                "pair of elements"
            )
        if self.cos.device != q.device:
            raise ValueError(
                f"rotary cos and sin must be on the device of q, {q.device}, got "
                f"{self.cos.device}; move them with RotaryPhases.to"
            )


def table_arguments(
    rotary: RotaryPhases | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, bool]:
    """The arguments cos, sin and interleaved of operations; None, None, False without a table."""
    return (None, None, False) if rotary is None else (rotary.cos, rotary.sin, rotary.interleaved)


def rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    """Rotate the first R elements of every row of `x`.

    Args:
        x: [..., D], fp32 or fp64.
        cos, sin: [..., R/2], broadcastable with x.

    Returns:
        Shape and dtype of `x`.
    """
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    rotary_dim = 2 * cos.shape[-1]
    rotary, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    if interleaved:
        pairs = rotary.unflatten(-1, (-1, 2))
        is_viewable = pairs.storage_offset() % 2 == 0 and pairs.stride(-1) == 1
        if not is_viewable or any(stride % 2 for stride in pairs.stride()[:-1]):
            pairs = pairs.contiguous()
        product = torch.view_as_complex(pairs) * torch.complex(cos, sin)
        rotated = torch.view_as_real(product).flatten(-2)
    else:
        first, second = rotary.chunk(2, -1)
        rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    return rotated if rest.shape[-1] == 0 else torch.cat([rotated, rest], -1)


def rotate_to_last(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    """Rotate tokens to the position of the last token of their span.

    Args:
        x: [..., span, D], fp32 or fp64.
    """
    span = x.shape[-2]
    return rotate(x, cos[:span].flip(0), sin[:span].flip(0), interleaved)
