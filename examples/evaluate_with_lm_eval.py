"""Accuracy of a packed model on a task of lm-eval: it is a model of transformers, and any harness takes it.

usage: python examples/evaluate_with_lm_eval.py MODEL [TASK ...]      TASK: a name such as arc_easy, or a .yaml file

Wants pip install 'moebius[eval]'.
"""

from __future__ import annotations

import sys
from pathlib import Path

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import moebius


def main(model: str, *tasks: str) -> dict[str, dict[str, float]]:
    packed = HFLM(pretrained=moebius.load(model), tokenizer=moebius.load_tokenizer(model), batch_size=8)
    files = [Path(task) for task in tasks if task.endswith(".yaml")]
    manager = TaskManager(include_path=[str(file.parent) for file in files] or None)
    names = [Path(task).stem if task.endswith(".yaml") else task for task in tasks or ("arc_easy",)]
    results = lm_eval.simple_evaluate(packed, tasks=names, task_manager=manager)["results"]
    for name, figures in results.items():
        print(name, {key: round(value, 4) for key, value in figures.items() if isinstance(value, float)})
    return results


if __name__ == "__main__":
    main(*sys.argv[1:])
