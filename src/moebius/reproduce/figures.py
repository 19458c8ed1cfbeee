"""Which figure belongs to a table, from what was measured and what is published."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moebius.report.reproduction import (
    bars_figure,
    heatmaps_figure,
    lines_figure,
    points_figure,
    stacked_figure,
)
from moebius.reproduce.published_tables import COLUMNS
from moebius.reproduce.run import Reproduction


def draw(made: Reproduction, path: Path) -> bool:
    """Write the table's figure as PNG.

    Returns:
        Whether there was anything to draw.
    """
    if not any(figures.get("values") or figures.get("series") for figures in made.found.values()):
        return False
    return CHARTS[made.table.chart](made, path)


def _title(made: Reproduction) -> str:
    return f"{made.table.paper}, {made.table.number}: {made.table.title}"


def _bars(made: Reproduction, path: Path) -> bool:
    """Every column that was measured, and beside it what is published of it."""
    rows = [row for row in made.table.rows if row.label in made.found or made.setting.beside in row.published]
    measured = {name for figures in made.found.values() for name in figures["values"] if name in COLUMNS}
    order = [*made.table.columns, *(name for name in sorted(measured) if COLUMNS[name].text)]
    shown = [column for column in dict.fromkeys(order) if column in measured][:3]
    published = [c for c in (made.table.order, *made.table.columns) if c and c != "bits" and made.setting.beside][:1]
    groups: dict[str, list[float | None]] = {
        f"{made.heading(column)}, measured": [made.found.get(r.label, {}).get("values", {}).get(column) for r in rows]
        for column in shown
    }
    for column in published:
        beside = made.setting.beside or ""
        groups[f"{COLUMNS[column].heading}, {beside}"] = [r.published.get(beside, {}).get(column) for r in rows]
    bars_figure(path, _title(made), [row.label for row in rows], groups)
    return True


def _routing(made: Reproduction, path: Path) -> bool:
    lines = {}
    for label, figures in made.found.items():
        first: dict[str, Any] = next(iter(figures.get("texts", {}).values()), {})
        similarity = first.get("routing_similarity")
        if similarity:
            lines[label] = (range(1, len(similarity) + 1), similarity)
    lines_figure(path, _title(made), {"": lines}, ("MoE layer", "cosine to the original's routing"), whole_x=True, ceiling=1.0)
    return bool(lines)


def _heatmaps(made: Reproduction, path: Path) -> bool:
    maps = {label: figures["series"]["map"] for label, figures in made.found.items()}
    heatmaps_figure(path, _title(made), maps, "expert")
    return True


def _token_map(made: Reproduction, path: Path) -> bool:
    series = next(iter(made.found.values()))["series"]
    points_figure(path, f"{_title(made)} ({series['layer']})", series["maps"], ("token", "expert"))
    return True


def _channels(made: Reproduction, path: Path) -> bool:
    """Means and variances of every channel, of the original and of every recipe."""
    first = next(iter(made.found.values()))["series"]
    channels = range(len(first["mean"]))
    panels: dict[str, dict[str, tuple[Sequence[float], Sequence[float]]]] = {}
    for moment in ("mean", "variance"):
        lines: dict[str, tuple[Sequence[float], Sequence[float]]] = {"original": (channels, first[moment])}
        lines |= {label: (channels, figures["series"][f"{moment} of it"]) for label, figures in made.found.items()}
        panels[f"{moment} of each channel, {first['layer']}"] = lines
    lines_figure(path, _title(made), panels, ("channel", "value"))
    return True


def _spectrum(made: Reproduction, path: Path) -> bool:
    captured = next(iter(made.found.values()))["series"]["captured"]
    shares = [(k + 1) / len(captured) for k in range(len(captured))]
    lines = {"first MoE layer": (shares, captured)}
    lines_figure(path, _title(made), {"": lines}, ("directions, as a share of the inputs", "energy captured"), log_x=True)
    return True


def _breakdown(made: Reproduction, path: Path) -> bool:
    seconds = {label: figures["series"]["seconds"] for label, figures in made.found.items()}
    stages = dict.fromkeys(stage for parts in seconds.values() for stage in parts)
    parts = {stage: [own.get(stage, 0.0) for own in seconds.values()] for stage in stages}
    stacked_figure(path, _title(made), list(seconds), parts, "seconds")
    return True


def _coefficients(made: Reproduction, path: Path) -> bool:
    series = next(iter(made.found.values()))["series"]
    lines = {name: (series["widths"], values) for name, values in series["lines"].items()}
    lines_figure(
        path, _title(made), {"down": lines}, ("bits", "loss coefficient, mean of directions"), log_y=True, whole_x=True
    )
    return True


def _spread(made: Reproduction, path: Path) -> bool:
    series = next(iter(made.found.values()))["series"]
    layers = [int(layer) for layer in series["layers"]]
    lines = {
        f"{bits} bit": (layers, [values[place] for values in series["layers"].values()])
        for place, bits in enumerate(series["widths"])
    }
    lines_figure(path, _title(made), {"": lines}, ("MoE layer", "spread, as a share of the mean"), whole_x=True)
    return True


CHARTS: dict[str, Callable[[Reproduction, Path], bool]] = {
    "bars": _bars,
    "speed": _bars,
    "routing": _routing,
    "heatmaps": _heatmaps,
    "token_map": _token_map,
    "channels": _channels,
    "spectrum": _spectrum,
    "breakdown": _breakdown,
    "coefficients": _coefficients,
    "spread": _spread,
}
