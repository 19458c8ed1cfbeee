"""What is compared, and what came of it: rows, a table, a figure, files."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moebius.recipe import CalibrationSettings, Recipe
from moebius.report.comparison import ComparisonRow, comparison_table, samples_markdown, verdict
from moebius.report.tables import TextTable

RESULTS_NAME = "results.json"


@dataclass(frozen=True)
class Comparison:
    """What to compare.

    Attributes:
        name: what reports call the original.
        source: the original, a folder or a hub name.
        candidates: label to recipe and what it looks at, in the order of the table.
        calibration: what recipes look at that do not say otherwise.
        held_out: what every model is measured on.
        prompts: what every model continues.
        device: where to compute.
        matched: what ``moebius`` looks at to be set beside every recipe at as many stored bits; None leaves it out.
        finished: rows that an earlier comparison has measured; their recipes are among the candidates.
    """

    name: str
    source: str
    candidates: Mapping[str, tuple[Recipe, CalibrationSettings]]
    calibration: CalibrationSettings
    held_out: CalibrationSettings
    prompts: tuple[str, ...]
    device: str
    matched: CalibrationSettings | None = None
    finished: tuple[ComparisonRow, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """What the rows depend on, ready for JSON; not the source, which may be a path of this machine."""
        return {
            "recipes": {
                label: {"recipe": recipe.to_dict(), "calibration": calibration.to_dict()}
                for label, (recipe, calibration) in self.candidates.items()
            },
            "text": self.held_out.to_dict(),
            "prompts": list(self.prompts),
            "matched": None if self.matched is None else self.matched.to_dict(),
        }


@dataclass(frozen=True)
class ComparisonResult:
    """What came of a comparison.

    Attributes:
        folder: the packed checkpoints, results.json, comparison.md and, where matplotlib is installed, comparison.png.
        comparison: what was compared, with the recipes that were set beside others.
        rows: the original's first.
        fingerprint: of the original's files.
    """

    folder: Path
    comparison: Comparison
    rows: tuple[ComparisonRow, ...]
    fingerprint: str

    def table(self) -> TextTable:
        """All rows, and a note on what they were measured on."""
        calibration, held_out = self.comparison.calibration, self.comparison.held_out
        otherwise = any(own != calibration for _, own in self.comparison.candidates.values())
        note = (
            f"{held_out.windows * (held_out.window_length - 1):,} held-out tokens of {held_out.text!r};"
            f" calibration on {calibration.windows} windows of {calibration.window_length} of {calibration.text!r}"
            f"{', unless the recipe says otherwise' if otherwise else ''}"
        )
        if self.comparison.matched is not None:
            note += f"\n{verdict(self.rows)}"
        return comparison_table(self.rows, title=self.comparison.name, note=note)

    def sample_tables(self) -> list[TextTable]:
        """For every prompt, what each model wrote after it."""
        return [
            TextTable(
                f"After {prompt!r}",
                ("model", "completion"),
                tuple((row.label, row.completions[i].strip()) for row in self.rows),
                2,
            )
            for i, prompt in enumerate(self.comparison.prompts)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        rows = [{**row.to_dict(), "folder": None if row.recipe is None else folder_name(row.label)} for row in self.rows]
        return {"model": self.comparison.name, "model_sha256": self.fingerprint, **self.comparison.to_dict(), "rows": rows}

    def write(self, folder: Path) -> None:
        """results.json, comparison.md and, where matplotlib is installed, comparison.png."""
        self.write_table(folder)
        if has_figures():
            from moebius.report.figures import comparison_figure

            comparison_figure(self.rows, folder / "comparison.png")

    def write_table(self, folder: Path) -> None:
        """results.json and comparison.md; readers find them as they were before a row or after it, never half written."""
        prompts, table = self.comparison.prompts, self.table()
        samples = f"\n{samples_markdown(self.rows, prompts)}" if prompts else ""
        contents = {
            RESULTS_NAME: json.dumps(self.to_dict(), indent=1) + "\n",
            "comparison.md": f"{table.markdown()}\n{table.note}\n{samples}",
        }
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            draft = folder / f"{name}.tmp"
            draft.write_text(content)
            draft.replace(folder / name)


def has_figures() -> bool:
    """Whether matplotlib is there, which draws them."""
    return find_spec("matplotlib") is not None


def folder_name(label: str) -> str:
    """The folder of a recipe's checkpoint: its label in letters, digits, dots and dashes."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", label).strip("-.").lower() or "recipe"
