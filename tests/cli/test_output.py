"""Progress on stderr, results on stdout, and nothing where nothing is wanted."""

from __future__ import annotations

import json

import pytest

from moebius.cli.output import print_json, print_tables, progress_bars
from moebius.compare.results import folder_name
from moebius.progress import Titled
from moebius.report.tables import TextTable


def test_bars_show_stage_step_and_memory_and_start_again(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bars(hidden=False) as progress:
        titled = Titled(progress, "mobie [gain]")
        titled.stage("calibration", 2)
        titled.advance("model.layers.0")
        titled.advance("model.layers.1")
        titled.finish()
        progress.stage("evaluating", 3)
        progress.advance()
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "mobie [gain]: calibration" in shown.err and "2/2" in shown.err
    assert "evaluating" in shown.err and "1/3" in shown.err
    assert "MB" in shown.err or "GB" in shown.err


def test_hidden_bars_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bars(hidden=True) as progress:
        progress.stage("calibration", 2)
        progress.advance("model.layers.0")
        progress.finish()
    assert capsys.readouterr() == ("", "")


def test_bars_end_with_the_work_that_failed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError), progress_bars(hidden=False) as progress:
        progress.stage("calibration", 2)
        raise ZeroDivisionError
    assert "0/2" in capsys.readouterr().err


def test_json_is_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": [1, None, "ü"]})
    assert json.loads(capsys.readouterr().out) == {"a": [1, None, "ü"]}


def test_tables_do_not_break_where_nobody_sets_a_width(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    print_tables(TextTable("", ("a", "b"), (("x" * 50, "y" * 50),)))
    assert "x" * 50 + "   " + "y" * 50 in capsys.readouterr().out


@pytest.mark.parametrize(
    ("label", "folder"), [("rtn@1 gain=true", "rtn-1-gain-true"), ("CEJD + GLAS", "cejd-glas"), ("../..", "recipe")]
)
def test_folder_names(label: str, folder: str) -> None:
    assert folder_name(label) == folder
