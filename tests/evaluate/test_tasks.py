"""Tasks on the reference model from local files: a multiple choice, a rolling and a generative one, beside own computations."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from tests.evaluate.task_folder import CHOICES, LINES, PAGES, write_arc, write_tasks
from transformers import PreTrainedModel

from moebius.errors import TaskError
from moebius.evaluate import tasks as tasks_module
from moebius.evaluate.tasks import TASK_PRESETS, TaskScore, chosen_tasks, evaluate_tasks, load_tasks, score_of
from moebius.generation.complete import complete
from moebius.hf.dequantize import dequantize
from moebius.pipeline import quantize_model
from moebius.recipe import CalibrationSettings, Recipe
from moebius.reference_model import reference_path

NAMES = ("next_piece", "pages", "finish_line")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    from moebius.hf.loading import load_model

    return load_model(reference_path())


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from moebius.hf.loading import load_tokenizer

    return load_tokenizer(reference_path())


@pytest.fixture(scope="module")
def scores(folder: Path, model: PreTrainedModel, tokenizer: Any) -> dict[tuple[str, str], TaskScore]:
    found = evaluate_tasks(model, tokenizer, load_tasks(NAMES, folder), quiet=True)
    return {(score.task, score.metric): score for score in found}


@torch.inference_mode()
def log_likelihood(model: PreTrainedModel, ids: list[int], scored: int) -> float:
    """Of the last ``scored`` tokens."""
    log_probabilities = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return sum(log_probabilities[i - 1, ids[i]].item() for i in range(len(ids) - scored, len(ids)))


def test_a_multiple_choice(scores: dict[tuple[str, str], TaskScore], model: PreTrainedModel, tokenizer: Any) -> None:
    right = {"acc": 0, "acc_norm": 0}
    for question, choices, answer in CHOICES:
        head = tokenizer(question.rstrip())["input_ids"]  # spaces between belong to the answer
        likely = []
        for choice in choices:
            whole = tokenizer(question + choice)["input_ids"]
            likely.append(log_likelihood(model, whole, len(whole) - len(head)))
        right["acc"] += likely.index(max(likely)) == answer
        per_byte = [value / len(choice) for value, choice in zip(likely, choices, strict=True)]
        right["acc_norm"] += per_byte.index(max(per_byte)) == answer
    assert 0 < right["acc"] < len(CHOICES), "a task that is all right or all wrong shows little"
    for metric, count in right.items():
        score = scores["next_piece", metric]
        assert score.value == pytest.approx(count / len(CHOICES))
        assert (score.documents, score.few_shot) == (len(CHOICES), 0)


def test_a_rolling_likelihood(scores: dict[tuple[str, str], TaskScore], model: PreTrainedModel, tokenizer: Any) -> None:
    total = words = 0.0
    for page in PAGES:
        ids = tokenizer(page)["input_ids"]
        total += log_likelihood(model, [tokenizer.eos_token_id, *ids], len(ids))
        words += len(re.split(r"\s+", page))
    assert scores["pages", "word_perplexity"].value == pytest.approx(math.exp(-total / words), rel=1e-4)


def test_a_generative_one(scores: dict[tuple[str, str], TaskScore], model: PreTrainedModel, tokenizer: Any) -> None:
    written = [complete(model, tokenizer, prompt, 8).text.split("\n")[0] for prompt, _ in LINES]
    right = sum(text == target for text, (_, target) in zip(written, LINES, strict=True))
    assert 0 < right < len(LINES)
    assert scores["finish_line", "exact_match"].value == pytest.approx(right / len(LINES))


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A packed checkpoint, and the plain one it dequantizes to."""
    from moebius.hf.loading import load_model

    folder = tmp_path_factory.mktemp("twins")
    calibration = CalibrationSettings(windows=2, window_length=64)
    quantize_model(str(reference_path()), folder / "packed", Recipe.make("rtn", 2), calibration)
    dequantize(load_model(folder / "packed")).save_pretrained(folder / "plain")
    return folder / "packed", folder / "plain"


def assert_alike(mine: list[TaskScore], others: list[TaskScore]) -> None:
    assert len(mine) == len(others) > 3
    for one, other in zip(mine, others, strict=True):
        assert (one.task, one.metric) == (other.task, other.metric)
        assert one.value == pytest.approx(other.value, rel=2e-3), one.metric


def test_a_packed_model_and_its_dequantized_twin_score_alike(folder: Path, tokenizer: Any, twins: tuple[Path, Path]) -> None:
    from moebius.hf.loading import load_model

    loaded = load_tasks(NAMES, folder)
    packed, plain = (evaluate_tasks(load_model(twin), tokenizer, loaded, quiet=True) for twin in twins)
    assert_alike(packed, plain)


def test_the_plain_command_of_lm_eval_scores_a_packed_checkpoint_as_its_dequantized_twin(
    folder: Path, tokenizer: Any, twins: tuple[Path, Path], tmp_path: Path
) -> None:
    """Nothing of this package is named or imported: the start-up hook opens the checkpoint."""
    from moebius.hf.loading import load_model

    packed, plain = twins
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu", "--batch_size", "1"]
    command += ["--model_args", f"pretrained={packed},dtype=float32", "--tasks", ",".join(NAMES)]
    command += ["--include_path", ".", "--output_path", str(tmp_path)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (results,) = tmp_path.rglob("results_*.json")
    of_command = json.loads(results.read_text())["results"]
    expected = evaluate_tasks(load_model(plain), tokenizer, load_tasks(NAMES, folder), quiet=True)
    assert len(expected) > 3
    for score in expected:
        assert of_command[score.task][f"{score.metric},{score.filter}"] == pytest.approx(score.value, rel=2e-3), score


def test_a_task_of_lm_eval_reads_the_copy_of_its_data_set(model: PreTrainedModel, tokenizer: Any, tmp_path: Path) -> None:
    right = write_arc(tmp_path)
    loaded = load_tasks(["arc_easy"], tmp_path)
    assert len(loaded.tasks["arc_easy"].dataset["test"]) == right
    found = evaluate_tasks(model, tokenizer, loaded, limit=2, quiet=True)
    score = score_of(found, "arc_easy")
    assert score is not None and (score.metric, score.documents) == ("acc_norm", 2)


def test_presets_stand_for_their_tasks() -> None:
    assert chosen_tasks("piqa, zero-shot") == ("piqa", *(t for t in TASK_PRESETS["zero-shot"] if t != "piqa"))
    assert set(TASK_PRESETS["challenging"]) < set(TASK_PRESETS["generative"])


def test_presets_name_tasks_that_lm_eval_defines() -> None:
    from importlib.util import find_spec

    spec = find_spec("lm_eval")
    assert spec is not None and spec.origin is not None
    defined = "\n".join(path.read_text() for path in Path(spec.origin).parent.joinpath("tasks").glob("*/*.yaml"))
    lines = set(defined.splitlines())
    for name in {task for tasks in TASK_PRESETS.values() for task in tasks} - {"mmlu"}:
        assert f"task: {name}" in lines, name
    assert "group: mmlu" in defined + Path(spec.origin).parent.joinpath("tasks/mmlu/default/_mmlu.yaml").read_text()


@pytest.mark.parametrize(
    ("name", "words"),
    [("next_peace", "did you mean 'next_piece'"), ("far_away", "owner/name"), ("runs_code", "--run-generated-code")],
)
def test_what_cannot_be_asked_is_refused_before_the_work(
    folder: Path, tmp_path: Path, name: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    def unreachable(path: str, *_: Any, **__: Any) -> Any:
        raise ConnectionError(f"Couldn't reach {path}")

    if name == "far_away":
        monkeypatch.setattr(datasets, "load_dataset", unreachable)
    # Only the folder's own definitions: lm-eval's take seconds to be read, and are read where a name is not among these.
    monkeypatch.setattr(tasks_module, "_manager", lambda names, path: _own(path))
    with pytest.raises(TaskError, match=words) as caught:
        load_tasks([name], folder)
    assert "\n" not in str(caught.value)
    if name == "runs_code":
        assert load_tasks([name], folder, runs_code=True).runs_code


def _own(folder: Path) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(folder), include_defaults=False)


def test_without_lm_eval_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks_module, "find_spec", lambda name: None)
    with pytest.raises(TaskError, match=r"moebius\[eval\]"):
        load_tasks(["arc_easy"])


def test_a_definition_that_fails_while_it_runs_is_one_error(folder: Path, model: PreTrainedModel, tokenizer: Any) -> None:
    with pytest.raises(TaskError, match="broken_metric"):
        evaluate_tasks(model, tokenizer, load_tasks(["broken_metric"], folder), quiet=True)


def test_of_several_figures_a_table_has_one() -> None:
    def score(metric: str, kept: str, value: float) -> TaskScore:
        return TaskScore("t", metric, kept, value, None, None, None)

    found = [score("exact_match", "flexible-extract", 0.4), score("exact_match", "strict-match", 0.3), score("bleu", "none", 1)]
    assert score_of(found, "t") == found[1]
    assert score_of(found, "other") is None


def test_the_files_of_the_tests_are_what_the_hub_has(folder: Path) -> None:
    table = pd.read_parquet(folder / "someone" / "next-piece" / "data" / "test-00000-of-00001.parquet")
    assert len(table) == len(CHOICES)
    assert len((folder / "pages.jsonl").read_text().splitlines()) == len(PAGES)
    assert json.loads((folder / "lines.jsonl").read_text().splitlines()[0])["prompt"] == LINES[0][0]
