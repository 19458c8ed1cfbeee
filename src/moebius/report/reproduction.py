"""Figures of reproduced tables: bars, lines, heat maps and points, from plain numbers, in the style of ``figures.py``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator

from moebius.report.figures import STYLE, look

#: Name of a line to its points.
Lines = Mapping[str, tuple[Sequence[float], Sequence[float]]]


def bars_figure(path: Path, title: str, labels: Sequence[str], groups: Mapping[str, Sequence[float | None]]) -> None:
    """A panel for each group: one horizontal bar for every label, its value beside it.

    Args:
        groups: what is measured, such as ``"perplexity, measured"``, to a value for every label; None leaves the bar out.
    """

    def draw(axes: Sequence[Axes]) -> None:
        for axis, (name, values), index in zip(axes, groups.items(), range(len(groups)), strict=True):
            places = np.arange(len(labels))[::-1]
            known = [(place, value) for place, value in zip(places, values, strict=True) if value is not None]
            axis.barh([p for p, _ in known], [v for _, v in known], color=look(index)["color"], height=0.62, zorder=3)
            low, high = min(v for _, v in known), max(v for _, v in known)
            if low > 0 and high > 30 * low:
                axis.set_xscale("log")
            for place, value in known:
                axis.annotate(f"{value:,.4g}", (value, place), (4, 0), textcoords="offset points", va="center", fontsize=8)
            axis.set_yticks(places, labels)
            axis.margins(x=0.16)
            axis.grid(axis="y", visible=False)
            axis.set_title(name)

    shown = {name: values for name, values in groups.items() if any(v is not None for v in values)}
    groups = shown
    _save(path, title, max(1, len(groups)), draw, height=1.4 + 0.3 * len(labels), share_rows=True)


def lines_figure(
    path: Path,
    title: str,
    panels: Mapping[str, Lines],
    axes_names: tuple[str, str],
    *,
    log_x: bool = False,
    log_y: bool = False,
    whole_x: bool = False,
    ceiling: float | None = None,
) -> None:
    """A panel for each name, with its lines.

    Args:
        axes_names: of the horizontal and the vertical axis.
        whole_x: ticks at whole numbers, for layers.
        ceiling: where nothing lies above, drawn as a broken line.
    """

    def draw(axes: Sequence[Axes]) -> None:
        for axis, (name, lines) in zip(axes, panels.items(), strict=True):
            for index, (label, (xs, ys)) in enumerate(lines.items()):
                axis.plot(xs, ys, label=label, markevery=1 + len(xs) // 12, **look(index))
            if ceiling is not None:
                axis.axhline(ceiling, color="#6b6b6b", linestyle="--", linewidth=1.2, zorder=1)
            if log_x:
                axis.set_xscale("log", base=2)
                axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"1/{round(1 / x)}" if 0 < x < 1 else f"{x:g}"))
            if log_y:
                axis.set_yscale("log")
            if whole_x:
                axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.set_xlabel(axes_names[0])
            axis.set_ylabel(axes_names[1])
            axis.set_title(name)

    _save(path, title, len(panels), draw)


def heatmaps_figure(path: Path, title: str, panels: Mapping[str, Sequence[Sequence[float]]], axis_name: str) -> None:
    """A heat map for each name, all on one scale from 0 to 1."""

    def draw(axes: Sequence[Axes]) -> None:
        image = None
        for axis, (name, matrix) in zip(axes, panels.items(), strict=True):
            image = axis.imshow(np.asarray(matrix), vmin=0, vmax=1, cmap="cividis", interpolation="nearest")
            axis.grid(visible=False)
            axis.set_xlabel(axis_name)
            axis.set_ylabel(axis_name)
            axis.set_title(name)
        assert image is not None
        axes[-1].figure.colorbar(image, ax=list(axes), shrink=0.8)

    _save(path, title, len(panels), draw)


def points_figure(
    path: Path, title: str, panels: Mapping[str, Sequence[tuple[float, float]]], axes_names: tuple[str, str]
) -> None:
    """A panel of points for each name, such as the expert (up) that each token (across) goes to."""

    def draw(axes: Sequence[Axes]) -> None:
        for axis, (name, points), index in zip(axes, panels.items(), range(len(panels)), strict=True):
            xs, ys = zip(*points, strict=True)
            axis.scatter(xs, ys, s=9, color=look(index)["color"], linewidths=0, zorder=3)
            axis.set_xlabel(axes_names[0])
            axis.set_ylabel(axes_names[1])
            axis.set_title(name)

    _save(path, title, len(panels), draw)


def stacked_figure(path: Path, title: str, labels: Sequence[str], parts: Mapping[str, Sequence[float]], unit: str) -> None:
    """One horizontal bar for every label, made of its parts."""

    def draw(axes: Sequence[Axes]) -> None:
        places, left = np.arange(len(labels))[::-1], np.zeros(len(labels))
        for index, (name, values) in enumerate(parts.items()):
            axes[0].barh(places, values, left=left, label=name, color=look(index)["color"], height=0.62, zorder=3)
            left = left + np.asarray(values)
        axes[0].set_yticks(places, labels)
        axes[0].grid(axis="y", visible=False)
        axes[0].set_xlabel(unit)

    _save(path, title, 1, draw, height=1.8 + 0.4 * len(labels))


def _save(
    path: Path, title: str, panels: int, draw: Callable[[Sequence[Axes]], None], height: float = 4.2, share_rows: bool = False
) -> None:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(max(5.2, 4.2 * panels), max(height, 2.4)), layout=ConstrainedLayoutEngine(wspace=0.06))
        axes: Any = figure.subplots(1, panels, squeeze=False, sharey=share_rows)[0]
        draw(axes)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        handles, labels = axes[0].get_legend_handles_labels()
        if len(labels) > 1:
            figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4), frameon=False)
        figure.savefig(path, dpi=160)
