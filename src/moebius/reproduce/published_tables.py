"""Published tables and figures as data: one file each under ``published/``, every number as its source prints it."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from moebius.errors import UnknownNameError
from moebius.table import nearest

_FOLDER = Path(__file__).parent / "published"
_NOT_TABLES = ("models", "papers")


@dataclass(frozen=True)
class Column:
    """A figure that tables have.

    Attributes:
        heading: as it is printed.
        text: the text whose perplexity it is.
        task: the task of lm-eval whose score it is, in percent.
        higher_is_better: which way an order goes.
        digits: decimals.
    """

    heading: str
    text: str | None = None
    task: str | None = None
    higher_is_better: bool = False
    digits: int = 2


def _task(heading: str, task: str) -> Column:
    return Column(heading, task=task, higher_is_better=True)


COLUMNS: dict[str, Column] = {
    "bits": Column("bits claimed"),
    "GiB": Column("GiB", digits=1),
    "W2": Column("WikiText-2", text="wikitext2"),
    "C4": Column("C4", text="c4"),
    "PTB": Column("PTB", text="ptb"),
    "AvgPPL": Column("mean perplexity"),
    "AE": _task("ARC-e", "arc_easy"),
    "AC": _task("ARC-c", "arc_challenge"),
    "HS": _task("HellaSwag", "hellaswag"),
    "LO": _task("LAMBADA-o", "lambada_openai"),
    "LS": _task("LAMBADA-s", "lambada_standard"),
    "PQ": _task("PIQA", "piqa"),
    "WG": _task("WinoGrande", "winogrande"),
    "MMLU": _task("MMLU", "mmlu"),
    "MathQA": _task("MathQA", "mathqa"),
    "GSM8K": _task("GSM8K", "gsm8k"),
    "MBPP": _task("MBPP", "mbpp"),
    "HumanEval": _task("HumanEval", "humaneval"),
    "Avg": Column("tasks", higher_is_better=True),
    "routing": Column("routing similarity", higher_is_better=True, digits=4),
    "saving": Column("saved, %", higher_is_better=True, digits=1),
    "tokens_s": Column("tokens/s", higher_is_better=True),
    "memory": Column("GB", digits=3),
    "cka": Column("mean CKA of two experts", digits=4),
    "similarity": Column("mean cosine of two experts", digits=4),
    "kept": Column("expert choices kept, %", higher_is_better=True, digits=1),
    "mean_shift": Column("shift of means, of a deviation", digits=4),
    "variance_shift": Column("shift of variances, of themselves", digits=4),
    "captured": Column("energy captured, %", higher_is_better=True, digits=1),
    "times_gptq": Column("× as fast as GPTQ", higher_is_better=True),
    "coefficient": Column("mean loss coefficient", digits=5),
    "variation": Column("mean over layers", digits=4),
}


@dataclass(frozen=True)
class PublishedRow:
    """One row of a table.

    Attributes:
        label: what it is called.
        recipe: method, bits and options; None for a row without: the original, something that is only published, or a row
            of a table that has one recipe as a whole.
        original: it is the model itself.
        published: model to column to figure, as printed; without columns that are empty there.
        calibration: where it differs from the table's.
        x: where it stands on the axis of a figure that has one.
        source: where it is from, if not from the table's paper.
        options: what else its table says of it.
    """

    label: str
    recipe: Mapping[str, Any] | None = None
    original: bool = False
    published: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    calibration: Mapping[str, Any] = field(default_factory=dict)
    x: float | None = None
    source: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PublishedTable:
    """A table or figure of a paper, and how it is made.

    Attributes:
        name: such as ``mobie-table-4``.
        paper: key of the papers.
        number: such as ``Table 4``.
        title: what it shows.
        shows: which measurement makes its rows.
        calibration: what recipes look at, as fields of ``CalibrationSettings``.
        protocol: name and window length of the evaluation.
        texts: what perplexity is measured on.
        columns: keys of :data:`COLUMNS`.
        order: the column whose order is the table's finding; empty: none is.
        chart: which figure is drawn.
        note: what has to be known beside it.
        options: what else its measurement is told.
    """

    name: str
    paper: str
    number: str
    title: str
    shows: str
    calibration: Mapping[str, Any]
    protocol: Mapping[str, Any]
    texts: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[PublishedRow, ...]
    order: str = ""
    chart: str = "bars"
    note: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def models(self) -> tuple[str, ...]:
        """The models it has figures of."""
        return tuple(dict.fromkeys(model for row in self.rows for model in row.published))

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks it has columns of."""
        return tuple(task for column in self.columns if (task := COLUMNS[column].task) is not None)

    @property
    def source(self) -> str:
        """Its paper in full."""
        return _read("papers")[self.paper]["source"]


def table_names() -> tuple[str, ...]:
    """All there are, by paper and number."""
    names = [path.stem for path in _FOLDER.glob("*.toml") if path.stem not in _NOT_TABLES]

    def place(name: str) -> tuple[str, str, int]:
        paper, _, rest = name.partition("-")
        kind, _, number = rest.partition("-")
        return (paper, kind if number.isdigit() else rest, int(number) if number.isdigit() else 0)

    return tuple(sorted(names, key=place))


def load_table(name: str) -> PublishedTable:
    """A table by its name.

    Raises:
        UnknownNameError: there is none.
    """
    names = table_names()
    if name not in names:
        raise UnknownNameError(f"no table named {name!r}{nearest(name, names)}; moebius reproduce --list names all of them")
    values = dict(_read(name))
    columns = tuple(values.pop("columns"))
    rows = tuple(_row(row, columns) for row in values.pop("rows"))
    own = {key: values.pop(key) for key in ("paper", "number", "title", "shows", "calibration", "protocol")}
    texts = tuple(values.pop("texts"))
    given = {key: values.pop(key) for key in ("order", "chart", "note") if key in values}
    return PublishedTable(name=name, columns=columns, rows=rows, texts=texts, options=values, **own, **given)


def paper_models() -> dict[str, dict[str, Any]]:
    """Model of the papers to what its config says."""
    return {name: dict(values) for name, values in _read("models").items()}


def _row(values: Mapping[str, Any], columns: tuple[str, ...]) -> PublishedRow:
    values = dict(values)
    published = {
        model: {column: float(figure) for column, figure in zip(columns, figures, strict=True) if figure != ""}
        for model, figures in values.pop("published", {}).items()
    }
    known = ("label", "recipe", "original", "calibration", "x", "source")
    own = {key: values.pop(key) for key in known if key in values}
    return PublishedRow(published=published, options=values, **own)


@cache
def _read(name: str) -> dict[str, Any]:
    return tomllib.loads((_FOLDER / f"{name}.toml").read_text(encoding="utf-8"))
