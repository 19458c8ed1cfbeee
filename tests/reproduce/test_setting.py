"""What a table is made with: the paper's own on its models, a stand-in on the reference model, and what was asked for."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import save_tiny

from moebius.errors import UnknownNameError
from moebius.reference_model import reference_path
from moebius.reproduce.published_tables import PublishedRow, load_table
from moebius.reproduce.setting import Wishes, paper_model, row_calibration, setting_for, why_not


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny("olmoe", tmp_path_factory.mktemp("models") / "tiny"))


def with_config(folder: Path, **values: Any) -> str:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(values))
    return str(folder)


OLMOE = {"model_type": "olmoe", "num_hidden_layers": 16, "hidden_size": 2048}
QWEN = {"model_type": "qwen2_moe", "num_hidden_layers": 24, "hidden_size": 2048}


def test_a_model_of_the_papers_is_told_by_its_config(tmp_path: Path, tiny: str) -> None:
    assert paper_model(with_config(tmp_path / "mine", **OLMOE)) == "OLMoE-1B-7B"
    assert paper_model(with_config(tmp_path / "short", **{**OLMOE, "num_hidden_layers": 4})) is None
    assert paper_model(with_config(tmp_path / "Qwen1.5-MoE-A2.7B", **QWEN)) == "Qwen1.5-MoE-A2.7B"
    assert paper_model(with_config(tmp_path / "Qwen1.5-MoE-A2.7B-Chat", **QWEN)) == "Qwen1.5-MoE-A2.7B-Chat"
    assert paper_model(tiny) is None


def test_on_its_model_everything_is_the_papers(tmp_path: Path) -> None:
    setting = setting_for(load_table("mobie-table-3"), with_config(tmp_path / "m", **OLMOE), False, Wishes())
    assert (setting.model, setting.beside) == ("OLMoE-1B-7B", "OLMoE-1B-7B")
    assert (setting.calibration.text, setting.calibration.windows, setting.calibration.window_length) == (
        "wikitext2",
        128,
        4096,
    )
    assert (setting.protocol, setting.text_windows, setting.text_length) == ("gptq", None, 4096)
    assert dict(setting.texts) == {"wikitext2": "wikitext2"}


def test_on_the_reference_model_its_own_text_stands_in() -> None:
    setting = setting_for(load_table("kbvq-table-1"), str(reference_path()), True, Wishes())
    assert (setting.model, setting.beside) == (None, "Qwen1.5-MoE-A2.7B")
    assert (setting.calibration.text, setting.calibration.seed) == ("builtin", 42)
    assert dict(setting.texts) == {"wikitext2": "builtin"}
    assert setting.protocol == "gptq" and (setting.text_windows, setting.text_length) == (64, 256)
    chunks = setting_for(load_table("anchors-olmoe"), str(reference_path()), True, Wishes())
    assert dict(chunks.texts) == {"wikitext2": "builtin"}  # nothing stands in for C4


def test_wishes_come_before_the_papers_choice(tiny: str) -> None:
    wishes = Wishes(calibration="builtin", windows=3, window_length=32, seed=9, text="builtin", text_windows=2, text_length=64)
    setting = setting_for(load_table("mobie-table-3"), tiny, False, wishes)
    calibration = setting.calibration
    assert (calibration.text, calibration.windows, calibration.window_length, calibration.seed) == ("builtin", 3, 32, 9)
    assert (setting.texts["wikitext2"], setting.text_windows, setting.text_length) == ("builtin", 2, 64)
    other = setting_for(load_table("mobie-table-3"), tiny, False, Wishes(beside="Qwen3-30B-A3B"))
    assert other.beside == "Qwen3-30B-A3B"
    with pytest.raises(UnknownNameError, match="did you mean 'Qwen3-30B-A3B'"):
        setting_for(load_table("mobie-table-3"), tiny, False, Wishes(beside="Qwen3-30B"))


def test_rows_may_look_at_something_else(tiny: str) -> None:
    table = load_table("mobie-figure-8")
    setting = setting_for(table, tiny, False, Wishes())
    assert [row_calibration(setting, row).windows for row in table.rows[:3]] == [8, 16, 32]
    assert [row_calibration(setting, row).seed for row in table.rows[-3:]] == [1, 2, 3]


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"method": "quantmoe-bench", "bits": 2.3}, "not built: there is no method 'quantmoe-bench'"),
        ({"method": "rtn", "bits": 2, "no_such": 1}, "not built: "),
        ({"method": "kbvq", "bits": 4}, "not built: .*multiple of 0.25"),
        ({"method": "bitsmoe", "bits": 0.5}, "impossible here: .*shared factor"),
    ],
)
def test_what_cannot_be_made_is_known_before_the_work(tiny: str, recipe: dict[str, Any], words: str) -> None:
    setting = setting_for(load_table("mobie-table-3"), tiny, False, Wishes())
    reason = why_not(setting, tiny, PublishedRow("row", recipe=recipe))
    assert reason is not None and "\n" not in reason
    assert re.match(words, reason)


def test_what_can_be_made_is_not_refused(tiny: str) -> None:
    setting = setting_for(load_table("mobie-table-3"), tiny, False, Wishes())
    assert why_not(setting, tiny, PublishedRow("row", recipe={"method": "mobie"})) is None
    assert why_not(setting, tiny, PublishedRow("only published")) is None


def test_a_text_that_nothing_stands_in_for_is_not_measured() -> None:
    table, source = load_table("mobie-table-10"), str(reference_path())
    setting = setting_for(table, source, True, Wishes())
    assert why_not(setting, source, table.rows[0]) is None
    assert "nothing stands in for c4" in str(why_not(setting, source, table.rows[9]))
