"""The examples run, as they are."""

from __future__ import annotations

import io
import json
import os
import runpy
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import save_tiny

from moebius.table import METHODS

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny("olmoe", tmp_path_factory.mktemp("examples") / "model"))


def example(name: str) -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "examples" / f"{name}.py"))


def test_every_example_has_a_test() -> None:
    tested = {"quantize_and_chat", "ablate_a_component", "add_a_method", "evaluate_with_lm_eval"}
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == tested
    readme = (ROOT / "README.md").read_text()
    assert all(f"examples/{name}.py" in readme for name in tested)


def test_quantize_and_chat(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main = example("quantize_and_chat")["main"]
    monkeypatch.setattr("sys.stdin", io.StringIO("def f\nclass\n"))
    main(model, str(tmp_path / "packed"))
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("1.00 bits per expert weight") and len(said) >= 3
    monkeypatch.setattr("sys.stdin", io.StringIO("def f\n"))
    main(model, str(tmp_path / "packed"))
    assert capsys.readouterr().out.splitlines()[0] == said[1], "the second time it is not quantized again"


def test_ablate_a_component(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example("ablate_a_component")["main"](model, str(tmp_path / "out"), windows=2)
    original, on, off = capsys.readouterr().out.splitlines()
    assert original.startswith("original: 16.00 bits") and on.startswith("mobie nges=true") and "KL" in off
    assert on.split(":")[1] != off.split(":")[1]


def test_add_a_method(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        example("add_a_method")["main"](model, str(tmp_path / "packed"))
    finally:
        METHODS.unregister("clipped")
    assert "bits, perplexity" in capsys.readouterr().out
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert config["quantization_config"]["recipe"]["clip"] == 0.8


def test_evaluate_with_lm_eval(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task of four questions that the model cannot know: one of two answers is a byte, the other is long."""
    rows = [{"question": f"{number} is ", "choices": ["a", "something else entirely"], "answer": 0} for number in range(4)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "short_answers.yaml").write_text(
        "task: short_answers\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f"    test: {tmp_path / 'questions.jsonl'}\n"
        "output_type: multiple_choice\ntest_split: test\ndoc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\n"
        "doc_to_target: '{{answer}}'\nmetric_list:\n  - metric: acc\n"
    )
    monkeypatch.setitem(os.environ, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    results = example("evaluate_with_lm_eval")["main"](model, str(tmp_path / "short_answers.yaml"))
    assert results["short_answers"]["acc,none"] == 1.0
