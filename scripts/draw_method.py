#!/usr/bin/env python3
"""Draw the method on a small example, selected by the real code: docs/method.png.

    scripts/draw_method.py

The example has 2,048 tokens, three levels, pooling factor 2, topk 128 and one stratum. Scores are
random with a few peaks. Below the whole sequence, the figure shows 16 of its tokens, which include
all kinds of entries.
"""

import itertools
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import Rectangle
from torchtitan.experiments.lighthouse.runtime.plots import LIGHTHOUSE_COLOR, save, subplots

from lighthouse import LighthouseConfig, Selection, select

FIGURE = Path(__file__).parents[1] / "docs" / "method.png"
CONFIG = LighthouseConfig(num_levels=3, pooling_factor=2, topk=128)
SEQ_LEN = 2048
WINDOW = 16
"""Tokens shown enlarged."""

ABSENT, KEPT, REFINED = 0, 1, 2
"""An entry is absent from the sub-sequence, kept in it, or kept together with its children."""

COLORS = {ABSENT: "#ffffff", KEPT: "#fdd0a2", REFINED: LIGHTHOUSE_COLOR}


def example() -> Selection:
    """Make a selection from scores with a few peaks."""
    generator = torch.Generator().manual_seed(0)
    positions = torch.arange(SEQ_LEN)
    scores = torch.rand((2, SEQ_LEN), generator=generator)
    for center in torch.randint(SEQ_LEN, (30,), generator=generator):
        scores += torch.exp(-(((positions - center) / 8) ** 2))
    return select(*scores[:, None, None], CONFIG)


def entries(selection: Selection) -> dict[tuple[int, int], int]:
    """Slot of each entry in the sub-sequence, by level and index."""
    pairs = zip(selection.level[0, 0].tolist(), selection.index[0, 0].tolist(), strict=True)
    return {entry: slot for slot, entry in enumerate(pairs)}


def kinds(selection: Selection) -> list[torch.Tensor]:
    """What each entry is, by level."""
    found = [torch.zeros(CONFIG.level_len(level, SEQ_LEN), dtype=torch.int) for level in range(3)]
    for level, index in entries(selection):
        found[level][index] = KEPT
    for finer, coarser in itertools.pairwise(found):
        has_children = (finer > 0).view(-1, CONFIG.pooling_factor).any(1)
        coarser += coarser * has_children
    return found


def window_start(found: list[torch.Tensor]) -> int:
    """The first token of a window with entries of all kinds on both upper levels."""
    for start in range(WINDOW, SEQ_LEN, WINDOW):
        upper, middle = (
            found[n][start // CONFIG.span(n) : (start + WINDOW) // CONFIG.span(n)] for n in (2, 1)
        )
        if (upper == REFINED).sum() == 2 and (middle == REFINED).sum() == 2:
            return start
    raise AssertionError("the example has no such window")


def draw_sequence(axes: Axes, found: list[torch.Tensor], start: int) -> None:
    """The whole sequence, one strip for each level."""
    strips = torch.stack([level.repeat_interleave(SEQ_LEN // len(level)) for level in found])
    axes.imshow(
        strips, aspect="auto", interpolation="none", extent=(0, SEQ_LEN, -0.5, 2.5), origin="lower",
        cmap=ListedColormap([COLORS[kind] for kind in (ABSENT, KEPT, REFINED)]),
    )  # fmt: skip
    for edge in (0.5, 1.5):
        axes.axhline(edge, color="black", linewidth=1)
    axes.axvspan(start - 4, start + WINDOW + 4, fill=False, edgecolor="black", linewidth=2)
    axes.grid(False)
    axes.set_yticks(range(3), ["level 0", "level 1", "level 2"])
    axes.set_title(
        "1, 2  Score and select, coarsest level first: 2,048 tokens (the box is shown below)",
        loc="left",
        fontsize=16,
    )


def box(axes: Axes, x: float, y: float, width: float, color: str, text: str = "") -> None:
    axes.add_patch(Rectangle((x + 0.04, y), width - 0.08, 0.72, facecolor=color, edgecolor="black"))
    dark = color == LIGHTHOUSE_COLOR
    axes.text(
        x + width / 2, y + 0.34, text, ha="center", va="center", fontsize=12,
        color="white" if dark else "black",
    )  # fmt: skip


def plain(axes: Axes, width: float, height: float) -> None:
    axes.set_xlim(0, width)
    axes.set_ylim(-0.2, height)
    axes.grid(False)
    axes.set_xticks([])
    for side in axes.spines.values():
        side.set_visible(False)


def draw_window(
    pyramid: Axes, line: Axes, scatter: Axes, selection: Selection, found: list, start: int
) -> None:
    """The pyramid over a few tokens, its entries in order, and where their outputs go."""
    longest = CONFIG.span(2) - 1
    slots = entries(selection)
    first = min(slot for (level, i), slot in slots.items() if i * CONFIG.span(level) >= start)
    num_entries = 0
    for level in range(3):
        span = CONFIG.span(level)
        for i in range(start // span, (start + WINDOW) // span):
            kind, x = int(found[level][i]), i * span - start
            if kind == ABSENT:
                box(pyramid, x, level, span, COLORS[kind])
                continue
            number = slots[level, i] - first + 1
            text = str(number)
            box(pyramid, x, level, span, COLORS[kind], text)
            num_entries += 1
            box(scatter, x + span - 1, level, span, COLORS[kind], text)
            tokens = f"{x}" if span == 1 else f"{x}-{x + span - 1}"
            box(line, number - 1, 0, 1, COLORS[kind], text)
            line.text(number - 0.5, -0.4, tokens, ha="center", va="center", fontsize=12)
    for axes, num_ticks in ((pyramid, WINDOW), (scatter, WINDOW + longest)):
        plain(axes, WINDOW + longest, 2.9)
        axes.set_yticks([0.35, 1.35, 2.35], ["level 0", "level 1", "level 2"])
        axes.set_xticks([x + 0.5 for x in range(num_ticks)], range(num_ticks))
        axes.tick_params(length=0)
    plain(line, num_entries, 1)
    line.set_ylim(-0.7, 0.9)
    line.set_yticks([0.35, -0.4], ["entry", "tokens"])
    line.tick_params(length=0)
    pyramid.set_title(
        "Pyramid over 16 tokens. Dark: selected. Light: kept. White: left out",
        loc="left",
        fontsize=16,
    )
    line.set_title(
        "3, 4  Gather the means of their tokens in causal order, and attend",
        loc="left",
        fontsize=16,
    )
    scatter.set_title("5  Scatter back to the positions shown", loc="left", fontsize=16)


def main() -> None:
    selection = example()
    found = kinds(selection)
    start = window_start(found)
    ratios = {"height_ratios": [1.2, 3, 1.6, 3]}
    figure, axes = subplots(4, 1, (12, 11), gridspec_kw=ratios)
    draw_sequence(axes[0], found, start)
    draw_window(*axes[1:], selection, found, start)
    save(figure, FIGURE)


if __name__ == "__main__":
    main()
