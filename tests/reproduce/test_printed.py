"""Measured beside published, and whose order is whose."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from moebius.recipe import CalibrationSettings
from moebius.reproduce.printed import reproduction_table, verdict
from moebius.reproduce.published_tables import PublishedRow, PublishedTable
from moebius.reproduce.run import Reproduction
from moebius.reproduce.setting import Setting


def reproduction(published: dict[str, float], measured: dict[str, float], order: str = "Avg", **left_out: str) -> Reproduction:
    rows = [PublishedRow("original", original=True, published={"M": {"Avg": 70.0}})]
    rows += [
        PublishedRow(label, recipe={"method": "rtn"}, published={"M": {"Avg": v, "bits": 1.5}})
        for label, v in published.items()
    ]
    table = PublishedTable(
        name="t",
        paper="MoBiE",
        number="Table 0",
        title="A title",
        shows="quality",
        calibration={},
        protocol={"name": "gptq", "window_length": 4096},
        texts=("wikitext2",),
        columns=("bits", "Avg"),
        rows=tuple(rows),
        order=order,
        note="As printed.",
    )
    setting = Setting(None, "M", CalibrationSettings(), {"wikitext2": "builtin"}, "gptq", 4, 64, True)
    found: dict[str, Any] = {
        label: {
            "values": {"W2": value},
            "texts": {"wikitext2": {"kl": 0.25, "top1_agreement": 0.5, "routing_similarity": [0.5, 1.0]}},
            "bits_per_expert_weight": 1.29,
            "activated_bits_per_weight": 1.4,
        }
        for label, value in measured.items()
    }
    return Reproduction(table, setting, dict(left_out), found)


def test_pairs_of_rows_are_counted_and_those_the_other_way_round_named() -> None:
    made = reproduction({"a": 40.0, "b": 50.0, "c": 60.0}, {"a": 30.0, "b": 20.0, "c": 25.0})
    text = verdict(made)
    assert "2 of 3 pairs of rows agree" in text
    assert text.splitlines()[0].endswith("only there: c ahead of b")


def test_the_order_by_divergence_is_told_apart() -> None:
    made = reproduction({"a": 40.0, "b": 50.0}, {"a": 20.0, "b": 30.0})
    made.found["a"]["texts"]["wikitext2"]["kl"] = 0.3
    by_perplexity, by_divergence = verdict(made).splitlines()
    assert "0 of 1 pairs" in by_perplexity and "perplexity, builtin" in by_perplexity
    assert "1 of 1 pairs" in by_divergence and "by KL here" in by_divergence


def test_rows_that_were_not_measured_or_are_equal_there_do_not_count() -> None:
    assert "1 of 1 pairs" in verdict(reproduction({"a": 40.0, "b": 50.0, "c": 60.0}, {"a": 30.0, "b": 20.0}))
    assert "2 of 2 pairs" in verdict(reproduction({"a": 40.0, "b": 50.0, "c": 50.0}, {"a": 30.0, "b": 20.0, "c": 25.0}))
    assert verdict(reproduction({"a": 40.0}, {"a": 30.0})) == ""
    assert verdict(reproduction({"a": 40.0, "b": 50.0}, {"a": 30.0, "b": 20.0}, order="")) == ""


def test_nan_is_worse_than_anything() -> None:
    text = verdict(reproduction({"a": math.nan, "b": 50.0}, {"a": 30.0, "b": 20.0}))
    assert "1 of 1 pairs" in text


def test_measured_stands_beside_published_and_stored_bits_beside_claimed() -> None:
    made = reproduction({"a": 44.5, "b": 50.0}, {"a": 30.123}, b="not built: there is no method 'b'")
    table = reproduction_table(made, "reference model")
    assert table.columns == (
        "",
        "bits stored",
        "activated",
        "claimed",
        "tasks",
        "perplexity, builtin",
        "KL",
        "top-1",
        "routing",
    )
    by_label = {row[0]: row[1:] for row in table.rows}
    assert by_label["a"] == ("1.29", "1.40", "1.5", "(44.5)", "30.12", "0.2500", "50.0 %", "0.7500")
    assert by_label["b"] == ("–", "–", "1.5", "(50)", "–", "–", "–", "–")
    assert "b: not built: there is no method 'b'" in table.note
    assert "reference model is not the paper's model" in table.note
    assert "As printed." in table.note and "Published: MoBiE" in table.note


def test_tasks_that_nobody_was_asked_are_left_to_the_whole_table() -> None:
    made = reproduction({"a": 44.5}, {"a": 30.0})
    wide = dataclasses.replace(made, table=dataclasses.replace(made.table, columns=("bits", "AE", "PQ", "Avg")))
    assert "ARC-e" in reproduction_table(wide, "m").columns
    assert "ARC-e" not in reproduction_table(wide, "m", whole=False).columns
    wide.found["a"]["values"]["AE"] = 50.0
    assert "ARC-e" in reproduction_table(wide, "m", whole=False).columns
    only_tasks = dataclasses.replace(made, table=dataclasses.replace(made.table, columns=("AE",)))
    assert "ARC-e" in reproduction_table(only_tasks, "m", whole=False).columns
