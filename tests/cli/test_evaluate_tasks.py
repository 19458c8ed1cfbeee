"""``moebius evaluate --tasks`` from end to end, on tasks in a folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.evaluate.task_folder import CHOICES, write_tasks
from typer.testing import CliRunner, Result

from moebius.cli.app import app


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def test_scores_are_a_table_with_their_number_of_documents(model: Path, folder: Path) -> None:
    result = run(model, "--tasks", "next_piece,pages", "--task-path", folder, "--limit", 2, "--quiet")
    assert result.exit_code == 0, result.output
    assert "acc_norm" in result.stdout and "word_perplexity" in result.stdout
    assert "the first 2 documents" in result.stdout


def test_scores_are_json(model: Path, folder: Path) -> None:
    result = run(model, "--tasks", "next_piece", "--task-path", folder, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["tasks"] == "next_piece"
    assert {score["metric"]: score["documents"] for score in found["scores"]} == {"acc": len(CHOICES), "acc_norm": len(CHOICES)}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tasks", "piqa", "--reference", "original"], "in two runs"),
        (["--tasks", "piqa", "--text", "builtin"], "in two runs"),
        (["--tasks", "piqa", "--windows", "4"], "in two runs"),
        (["--limit", "3"], "belong to --tasks"),
        (["--run-generated-code"], "belong to --tasks"),
        (["--tasks", ","], "wanted names"),
        (["--tasks", "piqa", "--task-path", "not-there"], "no such folder"),
    ],
)
def test_what_contradicts_itself_is_refused_in_one_line(model: Path, arguments: list[str], words: str) -> None:
    result = run(model, *arguments)
    assert result.exit_code == 2
    assert words in result.stderr and len(result.stderr.strip().splitlines()) == 1
