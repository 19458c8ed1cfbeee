"""Make a table again: what can be made is measured, everything that is published is kept beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moebius.reproduce.allocation import measure_coefficients, measure_distortion_spread, measure_time_breakdown
from moebius.reproduce.experts import measure_expert_cka, measure_output_similarity, measure_spectrum
from moebius.reproduce.hidden import measure_channel_shift, measure_token_map
from moebius.reproduce.published_tables import COLUMNS, PublishedTable
from moebius.reproduce.quality import measure_quality
from moebius.reproduce.setting import Setting, why_not
from moebius.reproduce.shift import measure_expert_shift
from moebius.reproduce.shop import Shop
from moebius.reproduce.speed import measure_tokens_per_second

#: What a table shows to what measures it. From label of a row to ``values`` by column, and what figures are drawn from.
MEASUREMENTS: dict[str, Callable[[Shop], dict[str, dict[str, Any]]]] = {
    "quality": measure_quality,
    "expert_shift": measure_expert_shift,
    "expert_cka": measure_expert_cka,
    "output_similarity": measure_output_similarity,
    "spectrum": measure_spectrum,
    "token_map": measure_token_map,
    "channel_shift": measure_channel_shift,
    "coefficients": measure_coefficients,
    "distortion_spread": measure_distortion_spread,
    "time_breakdown": measure_time_breakdown,
    "speed": measure_tokens_per_second,
}


@dataclass(frozen=True)
class Reproduction:
    """A table, measured.

    Attributes:
        table: what is published.
        setting: what it was made with.
        left_out: label of a row to why it was not measured.
        found: label of a row to its figures.
    """

    table: PublishedTable
    setting: Setting
    left_out: dict[str, str]
    found: dict[str, dict[str, Any]]

    def heading(self, column: str) -> str:
        """What a column is called; a text that something stands in for does not lend it its name."""
        known = COLUMNS[column]
        read = self.setting.texts.get(known.text or "", known.text)
        return known.heading if read == known.text else f"perplexity, {Path(str(read)).name}"

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "table": self.table.name,
            "source": f"{self.table.source}, {self.table.number}",
            "setting": self.setting.to_dict(),
            "rows": [
                {
                    "label": row.label,
                    "recipe": None if row.recipe is None else dict(row.recipe),
                    "published": {model: dict(figures) for model, figures in row.published.items()},
                    "measured": self.found.get(row.label),
                    "left_out": self.left_out.get(row.label),
                }
                for row in self.table.rows
            ],
        }


def rows_left_out(table: PublishedTable, setting: Setting, source: str) -> dict[str, str]:
    """Label of each row whose recipe cannot be made on this model to why, known before the work."""
    reasons = {row.label: why_not(setting, source, row) for row in table.rows}
    return {label: reason for label, reason in reasons.items() if reason is not None}


def reproduce(shop: Shop) -> Reproduction:
    """Measure what the table shows.

    Raises:
        MoebiusError: of the model, its texts and tasks, or the disk.
    """
    found = MEASUREMENTS[shop.table.shows](shop)
    return Reproduction(shop.table, shop.setting, dict(shop.left_out), found)
