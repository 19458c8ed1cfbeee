"""The figure of a comparison: quality against bits, routing similarity along the depth. Only this file needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, NullFormatter, ScalarFormatter

from moebius.report.comparison import ComparisonRow

# Okabe and Ito's palette, told apart by colour-blind readers; without its yellow, which vanishes on white.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h")
_GREY = "#6b6b6b"


def comparison_figure(rows: Sequence[ComparisonRow], path: Path) -> None:
    """Write a PNG with two panels: perplexity over bits per expert weight, and routing similarity per layer.

    Args:
        rows: the compared models; the one without a recipe is the original, drawn as a line.
        path: the file to write.
    """
    original = next((row for row in rows if row.recipe is None), None)
    packed = [row for row in rows if row.recipe is not None]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 4.2), layout=ConstrainedLayoutEngine(wspace=0.06))
        quality, routing = figure.subplots(1, 2)
        _draw_quality(quality, packed, original)
        _draw_routing(routing, packed)
        handles, labels = quality.get_legend_handles_labels()
        columns = min(len(labels), 4 if max(map(len, labels), default=0) < 24 else 2)
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, handletextpad=0.4)
        figure.savefig(path, dpi=200)


def _draw_quality(axes: Axes, packed: Sequence[ComparisonRow], original: ComparisonRow | None) -> None:
    for index, row in enumerate(packed):
        axes.plot(row.bits_per_expert_weight, row.perplexity, label=row.label, **{**look(index), "linestyle": "none"})
    if original is not None:
        axes.axhline(original.perplexity, color=_GREY, linestyle="--", linewidth=1.2, zorder=1)
        axes.annotate(
            f"original, {original.bits_per_expert_weight:.0f} bit: {original.perplexity:.2f}",
            (0.01, original.perplexity),
            xycoords=("axes fraction", "data"),
            xytext=(0, -4),  # below the line: what is quantized lies above it
            textcoords="offset points",
            ha="left",
            va="top",
            color=_GREY,
            fontsize=9,
        )
    _scale_perplexity(axes, [row.perplexity for row in (*packed, *([original] if original else []))])
    bits = [row.bits_per_expert_weight for row in packed]
    axes.set_xlim(0, 1.12 * max(bits, default=1.0))
    axes.set_xlabel("stored bits per expert weight")
    axes.set_ylabel("held-out perplexity")
    axes.set_title("Quality against size")


def _scale_perplexity(axes: Axes, values: Sequence[float]) -> None:
    """Logarithmic where the worst model is several times the best, which would press the others onto the axis."""
    low, high = min(values), max(values)
    if high > 4 * low:
        axes.set_yscale("log")
        axes.set_ylim(low / (high / low) ** 0.12, high * (high / low) ** 0.12)
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(ScalarFormatter() if high < 12 * low else NullFormatter())
    else:
        room = 0.14 * max(high - low, 0.02 * high)
        axes.set_ylim(low - room, high + room)


def _draw_routing(axes: Axes, packed: Sequence[ComparisonRow]) -> None:
    for index, row in enumerate(packed):
        layers = range(1, len(row.routing_similarity) + 1)
        every = 1 + len(layers) // 12  # a marker on each of 48 layers would hide the lines
        axes.plot(layers, row.routing_similarity, markevery=every, **look(index))
    axes.axhline(1.0, color=_GREY, linestyle="--", linewidth=1.2, zorder=1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.06)
    axes.set_xlabel("MoE layer")
    axes.set_ylabel("cosine to the original's routing")
    axes.set_title("Routing similarity")


def look(index: int) -> dict[str, Any]:
    """Colour, marker and line of the series of this number."""
    return {
        "color": _COLORS[index % len(_COLORS)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "markersize": 7,
        "markeredgecolor": "white",
        "markeredgewidth": 0.8,
        "linewidth": 1.6,
        "zorder": 3,
    }


STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.fontsize": 9,
}
