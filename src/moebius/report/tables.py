"""One table, two faces: for the terminal and for a README."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import rich.console


@dataclass(frozen=True)
class TextTable:
    """Rows of text under column headings.

    Attributes:
        title: printed above the table in a terminal.
        columns: one heading per column.
        rows: as many texts per row as there are columns.
        text_columns: how many of the first columns hold words (set left); the others hold numbers (set right).
        note: printed below the table.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text_columns: int = 1
    note: str = ""

    def rich(self) -> rich.console.Group:
        """The table for :meth:`rich.console.Console.print`."""
        from rich.box import SIMPLE_HEAD
        from rich.console import Group
        from rich.markup import escape
        from rich.table import Table
        from rich.text import Text

        has_paragraphs = any("\n" in cell for row in self.rows for cell in row)
        table = Table(box=SIMPLE_HEAD, pad_edge=False, show_lines=has_paragraphs)
        for index, column in enumerate(self.columns):
            table.add_column(column, justify=self._justify(index), overflow="fold")
        for row in self.rows:
            table.add_row(*map(escape, row))
        title = [Text(self.title, style="bold")] if self.title else []
        return Group(*title, table, *([Text(self.note, style="dim")] if self.note else []))

    def markdown(self) -> str:
        """The table in GitHub's markdown, with a newline at the end."""
        rule = ["---:" if self._justify(i) == "right" else "---" for i in range(len(self.columns))]
        lines = [self.columns, rule, *([cell.replace("|", "\\|") for cell in row] for row in self.rows)]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)

    def _justify(self, column: int) -> Literal["left", "right"]:
        return "left" if column < self.text_columns else "right"


def number(value: float | None, digits: int) -> str:
    """A number with so many decimals, or a dash."""
    return "–" if value is None else f"{value:,.{digits}f}"


def percent(value: float | None, digits: int = 1) -> str:
    """A share as a percentage, or a dash."""
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def size(bytes_: int | None) -> str:
    """Bytes to three digits in the largest decimal unit that keeps the number above one, such as ``57.2 MB``."""
    if bytes_ is None:
        return "–"
    value = float(bytes_)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.{0 if unit == 'B' or value >= 100 else 1 if value >= 10 else 2}f} {unit}"
        value /= 1000
    return f"{value:,.2f} TB"
