"""Shared style of all figures: font sizes and one color per kind of run.

Text is legible at half the figure's size. The axes show every point.
"""

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter

DENSE_COLOR = "#4d4d4d"
LIGHTHOUSE_COLOR = "#d95f02"
"""Color of Lighthouse Attention and of two-stage runs."""

OTHER_COLORS = ("#1b9e77", "#7570b3", "#e7298a", "#66a61e", "#1f78b4", "#a6761d")
SWITCH_LINE = {"linestyle": "--", "linewidth": 1.5}

STYLE = {
    "font.size": 14,
    "axes.titlesize": 15,
    "legend.fontsize": 13,
    "lines.linewidth": 2,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def subplots(
    rows: int = 1, columns: int = 1, figsize: tuple[float, float] = (9, 6), **kwargs
) -> tuple[Figure, Axes]:
    """A figure and its axes in the style of the project. `kwargs` go to matplotlib's `subplots`."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=figsize, layout="constrained")
        return figure, figure.subplots(rows, columns, **kwargs)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG."""
    with matplotlib.rc_context(STYLE):
        figure.savefig(path, dpi=120)


def log_loss_axis(axes: Axes) -> None:
    """Set a logarithmic y axis with plain numbers, so the start and end of a run are readable."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(MaxNLocator(7))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_locator(NullLocator())
