"""``moebius reproduce`` from end to end on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from moebius.cli.app import app
from moebius.evaluate.evaluation import evaluate_model
from moebius.evaluate.protocol import evaluation_text
from moebius.hf.loading import load_model, load_tokenizer
from moebius.reproduce import shop


@pytest.fixture(scope="module")
def own_texts(text: Path) -> list[str]:
    """Few and short windows of the tests' text, in the place of the papers'."""
    calibration = ["--calibration", str(text), "--windows", "4", "--window-length", "32"]
    return [*calibration, "--text", str(text), "--text-windows", "4", "--text-length", "32", "--no-tasks", "--quiet"]


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["reproduce", *map(str, arguments)])


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def measured(folder: Path) -> dict[str, dict[str, float]]:
    return {row["label"]: row["measured"]["values"] for row in results(folder)["rows"] if row["measured"]}


def test_the_list_names_every_table() -> None:
    listed = run("--list")
    assert listed.exit_code == 0
    assert "mobie-table-4" in listed.stdout and "kbvq-figure-5" in listed.stdout and "anchors-olmoe" in listed.stdout
    assert len(json.loads(run("--list", "--json").stdout)) > 40


def test_a_table_is_measured_beside_what_is_published(model: Path, tmp_path: Path, text: Path, own_texts: list[str]) -> None:
    out = tmp_path / "out"
    result = run("mobie-table-4", model, "--out", out, *own_texts)
    assert result.exit_code == 0, result.output
    assert "is not the paper's model" in result.stderr and "GPT-OSS-20B" in result.stdout
    assert "of 15 pairs of rows agree" in " ".join(result.stdout.split())
    assert (out / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert "(41.43)" in (out / "table.md").read_text()
    held_out = evaluation_text("gptq", str(text), load_tokenizer(model), windows=4, window_length=32)
    for label, folder in (("original", model), ("none", out / "none"), ("CEJD + GLAS", out / "cejd-glas")):
        expected = evaluate_model(load_model(folder), held_out).perplexity
        assert measured(out)[label]["W2"] == pytest.approx(expected, rel=1e-5)


def test_expert_shift_is_apart_from_weight_error(model: Path, tmp_path: Path, text: Path, own_texts: list[str]) -> None:
    out = tmp_path / "out"
    result = run("mobie-table-1", model, "--out", out, *own_texts)
    assert result.exit_code == 0, result.output
    held_out = evaluation_text("gptq", str(text), load_tokenizer(model), windows=4, window_length=32)
    original, packed = load_model(model), load_model(out / "quantized")
    found = {label: values["W2"] for label, values in measured(out).items()}
    assert found["neither"] == pytest.approx(evaluate_model(original, held_out).perplexity, rel=1e-5)
    assert found["both"] == pytest.approx(evaluate_model(packed, held_out).perplexity, rel=1e-5)
    shifted = evaluate_model(original, held_out, routing_from=packed).perplexity
    assert found["expert shift alone"] == pytest.approx(shifted, rel=1e-5)
    assert found["expert shift alone"] != pytest.approx(found["neither"], rel=1e-6)


def test_a_run_that_was_stopped_goes_on(
    model: Path, tmp_path: Path, own_texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, packed = tmp_path / "out", []
    quantize = shop.quantize_model

    def stopped_after_two(source: Any, folder: Path, *arguments: Any, **options: Any) -> Any:
        if len(packed) == 2:
            raise KeyboardInterrupt
        packed.append(folder.name)
        return quantize(source, folder, *arguments, **options)

    monkeypatch.setattr(shop, "quantize_model", stopped_after_two)
    stopped = run("mobie-table-5", model, "--out", out, *own_texts)
    assert stopped.exit_code == 130 and "resumes" in stopped.stderr
    assert not out.exists()
    monkeypatch.setattr(shop, "quantize_model", lambda *a, **k: packed.append(a[1].name) or quantize(*a, **k))
    assert run("mobie-table-5", model, "--out", out, *own_texts).exit_code == 0
    assert packed == ["16-bit", "8-bit", "4-bit"]


def test_methods_that_are_not_built_are_named_before_the_work_and_their_rows_printed(
    model: Path, tmp_path: Path, own_texts: list[str]
) -> None:
    result = run("mobie-table-7", model, "--out", tmp_path / "out", *own_texts)
    assert result.exit_code == 0, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("QuantMoE-Bench")]
    assert line == "QuantMoE-Bench: not built: there is no method 'quantmoe-bench'"
    rows = {row["label"]: row for row in results(tmp_path / "out")["rows"]}
    assert rows["QuantMoE-Bench"]["measured"] is None
    assert rows["QuantMoE-Bench"]["published"]["Qwen1.5-MoE-A2.7B"]["Avg"] == 37.74
    assert "(37.74)" in result.stdout


@pytest.mark.parametrize(
    ("table", "rows"),
    [
        ("mobie-figure-2", {"before": "cka", "after": "cka"}),
        ("mobie-figure-3", {"ARB-LLM": "kept"}),
        ("mobie-figure-6", {"original": "tokens_s", "BiLLM": "memory"}),
        ("mobie-figure-7", {"BiLLM": "routing", "MoBiE": "routing"}),
        ("kbvq-figure-2", {"before": "similarity", "after": "similarity"}),
        ("kbvq-figure-3", {"VQ, 2 bit": "mean_shift", "KBVQ-MoE, 2 bit": "variance_shift"}),
        ("kbvq-figure-5", {"top in/8": "captured", "top in/2": "captured"}),
        ("bitsmoe-figure-3", {"BitsMoE, 3 bit": "times_gptq"}),
        ("bitsmoe-figure-4", {"2 bit": "coefficient"}),
        ("bitsmoe-figure-5", {"all widths": "variation"}),
        ("bitsmoe-figure-6", {"all widths": "variation"}),
    ],
)
def test_figures_are_measured_and_drawn(
    model: Path, tmp_path: Path, own_texts: list[str], table: str, rows: dict[str, str]
) -> None:
    out = tmp_path / "out"
    result = run(table, model, "--out", out, *own_texts)
    assert result.exit_code == 0, result.output
    found = measured(out)
    for label, column in rows.items():
        assert found[label][column] > 0
    assert (out / "figure.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["mobi-table-4"], "did you mean 'mobie-table-4'"),
        (["mobie-table-4", "--beside", "Nobody"], "has no figures of it"),
        (["mobie-table-4", "--text", "nowhere.txt"], "no such file"),
        (["mobie-table-4", "--device", "nowhere"], "torch cannot use it"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(model: Path, tmp_path: Path, arguments: list[str], words: str) -> None:
    table, *options = arguments
    result = run(table, model, "--out", tmp_path / "out", *options)
    assert result.exit_code == 2
    assert words in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
