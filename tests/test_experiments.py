"""The scripts of the experiments run, and what they say is what the documents say of it, as far as a small sample can tell."""

from __future__ import annotations

import inspect
import math
import runpy
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import save_tiny

import moebius
from moebius.formats.graded import ROUNDING_NOISE
from moebius.formats.planes import DISTORTION

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny("olmoe", tmp_path_factory.mktemp("experiments") / "model"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("texts") / "source.txt"
    path.write_text(inspect.getsource(textwrap))
    return str(path)


def experiment(name: str) -> Any:
    return runpy.run_path(str(ROOT / "experiments" / f"{name}.py"))["main"]


def test_every_script_is_run_here() -> None:
    scripts = {path.stem for path in (ROOT / "experiments").glob("*.py")}
    assert scripts == {"budgets", "grades", "perplexity", "gaussian_codes"}


def test_budgets(model: str, text: str, tmp_path: Path) -> None:
    small = ["--windows", "2", "--text-windows", "1", "--calibration", text, "--text", text, "--out", str(tmp_path / "out")]
    rows = experiment("budgets")([model, *small]).splitlines()
    assert [line.split("|")[1].strip() for line in rows if "moebius@" in line] == [
        f"moebius@{bits}" for bits in ("0.5", "0.75", "1", "1.5", "2")
    ]


def test_grades(model: str, text: str, tmp_path: Path) -> None:
    before = dict(ROUNDING_NOISE)
    small = ["--windows", "2", "--text-windows", "1", "--calibration", text, "--text", text, "--out", str(tmp_path / "out")]
    lines = experiment("grades")([model, *small, "--bits", "1", "--variants", "2"])
    assert lines[2].startswith("| 1 | 8/6/5/4/3, 1 |") and lines[3].startswith("| 1 | 8, 1 |")
    assert lines[2].split("|")[-2] != lines[3].split("|")[-2], "other grades, another divergence"
    assert before == ROUNDING_NOISE


def test_perplexity(model: str, text: str) -> None:
    found = experiment("perplexity")([model, text, "--window-length", "256"])
    loaded, ids = moebius.load(model, dtype="float32"), moebius.load_tokenizer(model)(Path(text).read_text())["input_ids"]
    windows = torch.tensor(ids[: len(ids) // 256 * 256]).view(-1, 256)
    with torch.inference_mode():
        losses = [float(loaded(input_ids=window[None], labels=window[None]).loss) for window in windows]
    assert found == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-3)


def test_codes_of_a_gaussian() -> None:
    found = experiment("gaussian_codes")(["--samples", "16384", "--rounds", "8", "--states", "8", "32", "--lengths", "2", "4"])
    for count, wanted in enumerate(DISTORTION[1:5], 1):
        assert found[f"{count} plane{'s' * (count > 1)}"] == pytest.approx(wanted, rel=0.1)
    assert found["trellis of 32 states, one bit"] < found["vectors of 4, one bit"] < found["vectors of 2, one bit"]
    assert found["trellis of 8 states, one bit"] == pytest.approx(0.365, abs=0.02)
    assert found["trellis of 32 states, one bit"] == pytest.approx(0.318, abs=0.02)
