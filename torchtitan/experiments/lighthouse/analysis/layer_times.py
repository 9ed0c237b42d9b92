"""Time of one attention layer by sequence length, dense and Lighthouse."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torchtitan.experiments.lighthouse.runtime.plots import (
    DENSE_COLOR,
    LIGHTHOUSE_COLOR,
    save,
    subplots,
)

from lighthouse import LighthouseConfig, lighthouse_attention
from lighthouse.sdpa import causal_sdpa


@dataclass(frozen=True)
class LayerTimes:
    """Median milliseconds of a layer's forward and backward pass, for each length."""

    seq_lens: list[int]
    dense: list[float]
    lighthouse: list[float]

    def crossing(self) -> float | None:
        """Length in tokens at which both take equally long. None if one is faster at every length.

        Interpolated linearly on logarithmic axes.
        """
        ratios = [math.log(d / s) for d, s in zip(self.dense, self.lighthouse, strict=True)]
        for i in range(1, len(ratios)):
            if ratios[i - 1] < 0 <= ratios[i]:
                share = -ratios[i - 1] / (ratios[i] - ratios[i - 1])
                start, end = (math.log(n) for n in self.seq_lens[i - 1 : i + 1])
                return math.exp(start + share * (end - start))
        return None


def measure_layer_times(
    config: LighthouseConfig, n_heads: int, head_dim: int, seq_lens: list[int], repeats: int = 3
) -> LayerTimes:
    """Time attention without projections, in fp32 on the CPU.

    Args:
        seq_lens: lengths in tokens, each legal under `config`.
        repeats: number of measurements, after one warm-up. The result is their median.
    """
    dense, lighthouse = [], []
    for seq_len in seq_lens:
        generator = torch.Generator().manual_seed(0)
        shape = (3, 1, n_heads, seq_len, head_dim)
        qkv = torch.randn(shape, generator=generator, requires_grad=True)
        dense.append(_median_ms(causal_sdpa, qkv, repeats))
        lighthouse.append(
            _median_ms(lambda q, k, v: lighthouse_attention(q, k, v, config), qkv, repeats)
        )
    return LayerTimes(seq_lens, dense, lighthouse)


def _median_ms(attend: Callable, qkv: torch.Tensor, repeats: int) -> float:
    times = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        attend(*qkv).sum().backward()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def plot_layer_times(times: LayerTimes, path: Path) -> None:
    """Plot both curves on logarithmic axes and mark the crossing."""
    figure, axes = subplots(figsize=(9, 5.5))
    axes.plot(times.seq_lens, times.dense, color=DENSE_COLOR, marker="o", label="dense")
    axes.plot(
        times.seq_lens, times.lighthouse, color=LIGHTHOUSE_COLOR, marker="o", label="Lighthouse"
    )
    axes.set(xscale="log", yscale="log", xlabel="sequence length (tokens)")
    axes.set(ylabel="forward and backward (ms)")
    axes.set_title("One attention layer on this machine")
    crossing = times.crossing()
    if crossing is not None:
        axes.axvline(crossing, color="black", linestyle=":")
        axes.annotate(
            f"equal at {crossing:,.0f} tokens",
            (crossing, min(times.lighthouse)),
            xytext=(6, 0),
            textcoords="offset points",
        )
    axes.set_xticks(times.seq_lens, [f"{n:,}" for n in times.seq_lens])
    axes.minorticks_off()
    axes.legend()
    save(figure, path)
