"""A reproduction as a table: what was measured beside what is published, and whose order is whose."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

from moebius.report.tables import TextTable, number, percent
from moebius.reproduce.published_tables import COLUMNS, PublishedTable
from moebius.reproduce.run import Reproduction
from moebius.reproduce.setting import Setting

_QUALITY = ("KL", "top-1", "routing")


def reproduction_table(made: Reproduction, model: str, whole: bool = True) -> TextTable:
    """Rows as published; a cell holds what was measured and, in brackets, what is published.

    Args:
        made: what was measured.
        model: what the model is called.
        whole: with tasks of which nothing was measured; a terminal has no room for them.
    """
    table, beside = made.table, made.setting.beside
    columns = [column for column in _columns(made) if column != "bits" and (whole or _shown(made, column))]
    quality = any(figures.get("texts") for figures in made.found.values())
    bits = any("bits_per_expert_weight" in figures for figures in made.found.values())
    claimed = "bits" in table.columns  # by papers, of activated weights: ours beside theirs
    headings = ["", *(["bits stored"] if bits else []), *(["activated", "claimed"] if claimed else [])]
    headings += [made.heading(column) for column in columns] + [name for name in _QUALITY if quality]
    rows = []
    for row in table.rows:
        figures, published = made.found.get(row.label, {}), row.published.get(beside or "", {})
        cells = [row.label]
        if bits:
            cells.append(number(figures.get("bits_per_expert_weight"), 2))
        if claimed:
            cells += [number(figures.get("activated_bits_per_weight"), 2), _bare(published.get("bits"))]
        cells += [_cell(column, figures.get("values", {}).get(column), published.get(column)) for column in columns]
        cells += _quality(figures) if quality else []
        rows.append(tuple(cells))
    title = f"{table.paper}, {table.number}: {table.title}. {model}"
    title += f" (and, in brackets, {beside} as published)" if beside else ""
    return TextTable(title, tuple(headings), tuple(rows), 1, "\n".join(_notes(made, model)))


def verdict(made: Reproduction) -> str:
    """How much of the published order of rows is the measured one: pairs of rows, and those that are the other way round.

    By the column of the table, or the first perplexity where that was not measured; and by KL, which tells apart what
    perplexity on a short text does not.
    """
    table, beside = made.table, made.setting.beside
    column = _order_column(made)
    if not table.order or beside is None or column is None:
        return ""
    sign = 1 if COLUMNS[column].higher_is_better else -1
    orders = {made.heading(column): {label: sign * v for label, v in _measured(made, column).items()}}
    orders["KL"] = {label: -value for label, value in _divergences(made).items()}
    sentences = [_order_sentence(made, beside, by, scores) for by, scores in orders.items()]
    return "\n".join(sentence for sentence in sentences if sentence)


def _order_sentence(made: Reproduction, beside: str, by: str, scores: dict[str, float]) -> str:
    """Of scores that are better where they are larger."""
    order = made.table.order
    rows = [row for row in made.table.rows if not row.original and row.label in scores]
    rows = [row for row in rows if order in row.published.get(beside, {})]
    same, turned = 0, []
    for one, other in combinations(rows, 2):
        theirs = _better(order, one.published[beside][order], other.published[beside][order])
        ours = (scores[one.label] > scores[other.label]) - (scores[one.label] < scores[other.label])
        if theirs == 0:
            continue
        same += ours == theirs
        if ours != theirs:
            first, second = (one, other) if theirs > 0 else (other, one)
            turned.append(f"{first.label} ahead of {second.label}")
    if not same and not turned:
        return ""
    text = f"Order by {by} here, by {COLUMNS[order].heading} in the paper: {same} of {same + len(turned)} pairs of rows agree"
    return f"{text}; only there: {', '.join(turned)}" if turned else text


def _columns(made: Reproduction) -> list[str]:
    """Those of the table, and the perplexity of a table that has none and of which one was measured."""
    columns = list(made.table.columns)
    for figures in made.found.values():
        columns += [name for name in figures["values"] if COLUMNS[name].text and name not in columns]
    return columns


def _shown(made: Reproduction, column: str) -> bool:
    """It was measured, or it is no single task, or the table has no other."""
    own = [name for name in made.table.columns if name != "bits"]
    measured = any(column in figures["values"] for figures in made.found.values())
    return measured or COLUMNS[column].task is None or all(COLUMNS[name].task is not None for name in own)


def _order_column(made: Reproduction) -> str | None:
    """The column of the table's order if it was measured, else the first perplexity."""
    candidates = [made.table.order, *(name for name in _columns(made) if COLUMNS[name].text)]
    measured = [figures["values"] for figures in made.found.values()]
    return next((name for name in candidates if measured and any(name in values for values in measured)), None)


def _measured(made: Reproduction, column: str) -> dict[str, float]:
    """Label of a row to its figure in a column, NaN as the worst there is."""
    worst = -math.inf if COLUMNS[column].higher_is_better else math.inf
    values = {label: figures["values"].get(column) for label, figures in made.found.items()}
    return {label: worst if math.isnan(value) else value for label, value in values.items() if value is not None}


def _divergences(made: Reproduction) -> dict[str, float]:
    """Label of a row to its KL on the first text."""
    texts: dict[str, dict[str, Any]] = {
        label: next(iter(figures.get("texts", {}).values()), {}) for label, figures in made.found.items()
    }
    return {label: text["kl"] for label, text in texts.items() if text.get("kl") is not None}


def _better(column: str, one: Any, other: Any) -> int:
    """1 if the first is better, -1 if the second is; NaN is worst."""
    sign = 1 if COLUMNS[column].higher_is_better else -1
    first, second = (-math.inf if math.isnan(value) else sign * value for value in (one, other))
    return (first > second) - (first < second)


def _cell(column: str, measured: float | None, published: float | None) -> str:
    digits = COLUMNS[column].digits
    if measured is None and published is not None:
        return f"({_bare(published)})"
    if published is None:
        return number(measured, digits)
    return f"{number(measured, digits)} ({_bare(published)})"


def _bare(value: float | None) -> str:
    """As the source prints it, as nearly as a number can say."""
    if value is None:
        return "–"
    return "NaN" if math.isnan(value) else f"{value:,.10g}"


def _quality(figures: dict[str, Any]) -> list[str]:
    text: dict[str, Any] = next(iter(figures.get("texts", {}).values()), {})
    routing = text.get("routing_similarity") or []
    mean = sum(routing) / len(routing) if routing else None
    return [number(text.get("kl"), 4), percent(text.get("top1_agreement")), number(mean, 4)]


def _notes(made: Reproduction, model: str) -> list[str]:
    table, setting = made.table, made.setting
    lines = [not_the_papers_model(table, setting, model), _conditions(made), verdict(made), table.note]
    reasons: dict[str, list[str]] = {}
    for label, reason in made.left_out.items():
        reasons.setdefault(reason, []).append(label)
    lines += [f"{', '.join(labels)}: {reason}" for reason, labels in reasons.items()]
    sources = {row.source: None for row in table.rows if row.source}
    lines.append(f"Published: {table.source}{'' if not sources else '; ' + '; '.join(sources)}")
    return [line for line in lines if line]


def not_the_papers_model(table: PublishedTable, setting: Setting, model: str) -> str:
    """What has to be said where figures of two models stand beside each other; empty where there is one."""
    if setting.model is not None and setting.model == setting.beside:
        return ""
    theirs = f"; the table has figures of {', '.join(table.models)}" if table.models else ""
    return f"{model} is not the paper's model{theirs}: orders may be compared, figures may not"


def _conditions(made: Reproduction) -> str:
    setting = made.setting
    calibration = setting.calibration
    looked = f"calibration on {calibration.windows} windows of {calibration.window_length} of {calibration.text!r}"
    if not setting.texts:
        return looked[0].upper() + looked[1:]
    texts = ", ".join(repr(text) for text in setting.texts.values())
    count = "all" if setting.text_windows is None else str(setting.text_windows)
    measured = f"{setting.protocol} on {texts}, {count} windows of {setting.text_length}"
    kl = "; KL in nats to the original" if any(figures.get("texts") for figures in made.found.values()) else ""
    return f"Protocol {measured}{kl}; {looked}, unless the row says otherwise"
