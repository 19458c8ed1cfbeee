"""Tasks of EleutherAI's lm-eval: its engine and its definitions, on models that may be packed, with data that may be local.

A folder given as ``task_path`` holds task definitions (YAML, as lm-eval has them) and data: where a task wants the data set
``owner/name`` of the hub and the folder has one of that path, that one is read, in the layout in which the hub keeps it; files
that a definition names are looked for there as well. Nothing else is needed to measure without a network.
"""

from __future__ import annotations

import dataclasses
import io
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moebius.errors import TaskError, first_line
from moebius.table import nearest

#: Tasks that go together, by the table that reports them; the papers' names for them are in ``moebius reproduce``.
TASK_PRESETS: dict[str, tuple[str, ...]] = {
    # MoBiE's Tables 3 and 7 and KBVQ-MoE's 10 to 13 have the same seven.
    "zero-shot": ("arc_easy", "arc_challenge", "hellaswag", "lambada_openai", "lambada_standard", "piqa", "winogrande"),
    # MoBiE's Table 8; of them, Table 9 has three and KBVQ-MoE's Table 17 four.
    "generative": ("mmlu", "mathqa", "gsm8k", "mbpp", "humaneval"),
    "generative-chat": ("mmlu", "gsm8k", "humaneval"),
    "challenging": ("mmlu", "mathqa", "gsm8k", "humaneval"),
}
# What a table has of a task that reports several: length-normalized accuracy where there is one (only that reaches the 77 to 79
# percent that both papers have for HellaSwag in 16 bit).
_METRICS = ("acc_norm", "acc", "exact_match", "pass@1", "pass_at_1", "word_perplexity")
_MISSING = "tasks are measured by lm-eval, which is not installed; pip install -c constraints.txt 'moebius[eval]'"
_RUNS_CODE = "runs what the model writes as a program; give --run-generated-code where that may be (a container, say)"


@dataclass(frozen=True)
class TaskScore:
    """One figure of one task.

    Attributes:
        task: name of the task, or of a group of them.
        metric: such as ``acc_norm``.
        filter: what was cut out of the answers, ``none`` for those that are chosen.
        value: as lm-eval reports it; accuracies between 0 and 1.
        error: standard error; None where lm-eval has none.
        documents: how many were asked; None for a group.
        few_shot: examples in front of each; None for a group.
    """

    task: str
    metric: str
    filter: str
    value: float
    error: float | None
    documents: int | None
    few_shot: int | None

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks with their data, ready to be asked: made before a model is loaded, which may take long.

    Attributes:
        names: as asked for, presets taken apart.
        tasks: lm-eval's objects by name.
        groups: its groups by name, among them those in ``names``.
        runs_code: what the model writes is run as a program.
        manager: lm-eval's object that knows the definitions.
    """

    names: tuple[str, ...]
    tasks: Mapping[str, Any]
    groups: Mapping[str, Any]
    runs_code: bool
    manager: Any


def chosen_tasks(text: str) -> tuple[str, ...]:
    """The tasks of a comma-separated list in which presets may stand for theirs, each once.

    Raises:
        TaskError: nothing in it.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise TaskError(f"--tasks {text!r}: wanted names such as arc_easy,piqa, or one of {', '.join(TASK_PRESETS)}")
    return tuple(dict.fromkeys(task for word in words for task in TASK_PRESETS.get(word, (word,))))


def load_tasks(names: Sequence[str], task_path: Path | None = None, runs_code: bool = False) -> LoadedTasks:
    """Find the definitions of tasks, and load their data.

    Args:
        names: tasks, groups or tags of lm-eval, or of ``task_path``.
        task_path: folder of definitions and data.
        runs_code: tasks may run what the model writes.

    Raises:
        TaskError: no lm-eval, no such task, data that cannot be loaded, or a task that runs code where it may not.
    """
    if find_spec("lm_eval") is None:
        raise TaskError(_MISSING)
    if task_path is not None and not task_path.is_dir():
        raise TaskError(f"--task-path {task_path}: no such folder; give one with task definitions, data sets, or both")
    tasks: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    with _hushed(), _data_from(task_path), _code_allowed(runs_code):
        manager = _manager(names, task_path)
        for name in names:
            if name not in manager.all_tasks:
                raise TaskError(
                    f"task {name!r}: lm-eval has none of that name{nearest(name, manager.all_tasks)}; presets:"
                    f" {', '.join(TASK_PRESETS)}, own definitions: --task-path"
                )
            loaded = _loaded(manager, name, task_path, runs_code)
            tasks |= loaded["tasks"]
            groups |= loaded.get("groups", {})
    unsafe = [name for name, task in tasks.items() if getattr(task.config, "unsafe_code", False)]
    if unsafe and not runs_code:
        raise TaskError(f"task {unsafe[0]!r}: {_RUNS_CODE}")
    return LoadedTasks(tuple(names), tasks, groups, runs_code, manager)


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    loaded: LoadedTasks,
    *,
    few_shot: int | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    quiet: bool = False,
) -> list[TaskScore]:
    """Ask a model.

    Args:
        model: a causal language model of transformers, packed or not, on any device.
        tokenizer: of the model.
        loaded: what to ask.
        few_shot: examples in front of every question; None: as the task has it.
        limit: ask so many documents of each task; None: all.
        batch_size: requests per forward pass.
        quiet: no bars of lm-eval on stderr.

    Returns:
        Every figure of every task and group, in the order asked for.

    Raises:
        TaskError: an answer longer than the model's positions, or whatever else lm-eval refuses.
    """
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM

    hidden = redirect_stderr(io.StringIO()) if quiet else nullcontext()
    everything: list[Any] = [*loaded.tasks.values()]
    # Outside of a clone of lm-eval, asking git for its commit prints an error.
    unasked = mock.patch.object(evaluator, "get_git_commit_hash", lambda: None)
    with _hushed(), hidden, unasked, _code_allowed(loaded.runs_code):
        language_model = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
        try:
            found = evaluator.simple_evaluate(
                model=language_model,
                tasks=[*loaded.groups.values(), *_outside(everything, loaded.groups)],
                num_fewshot=few_shot,
                limit=limit,
                log_samples=False,
                task_manager=loaded.manager,
                confirm_run_unsafe_code=loaded.runs_code,
            )
        except Exception as error:  # of a definition, of a model that cannot generate: whatever lm-eval lets through
            raise TaskError(f"tasks {', '.join(loaded.names)}: lm-eval stopped: {first_line(error)}") from error
    assert found is not None
    return _scores(found)


def score_of(scores: Sequence[TaskScore], task: str) -> TaskScore | None:
    """The figure of a task that tables have: length-normalized accuracy, accuracy, exact match, in that order."""
    own = [score for score in scores if score.task == task]
    # Of several filters the strictest, which lm-eval puts last for nothing and first for exact match: "strict" or "none".
    own.sort(key=lambda score: "flexible" in score.filter)
    for metric in _METRICS:
        for score in own:
            if score.metric == metric:
                return score
    return None


def _manager(names: Sequence[str], task_path: Path | None) -> Any:
    """What knows the definitions. lm-eval's own are thousands of files, and are only read where the folder has not all."""
    from lm_eval.tasks import TaskManager

    if task_path is not None:
        own = TaskManager(include_path=str(task_path), include_defaults=False)
        if set(names) <= set(own.all_tasks):
            return own
    return TaskManager(include_path=None if task_path is None else str(task_path))


def _loaded(manager: Any, name: str, task_path: Path | None, runs_code: bool) -> Any:
    try:
        return manager.load([name])
    except Exception as error:  # of datasets, of the hub, of a definition's own functions
        text = " ".join(str(error).split())
        if not runs_code and ("HF_ALLOW_CODE_EVAL" in text or "code_eval" in text):
            raise TaskError(f"task {name!r}: {_RUNS_CODE}") from error
        where = "--task-path FOLDER, with FOLDER" if task_path is None else f"the copy belongs at {task_path}"
        raise TaskError(
            f"task {name!r}: its data cannot be loaded ({first_line(error)[:160]}); without a network, give a copy of the data"
            f" set in the hub's layout: {where}/owner/name"
        ) from error


def _outside(tasks: Sequence[Any], groups: Mapping[str, Any]) -> list[Any]:
    """Those that no group brings along."""
    within = {task.task_name for group in groups.values() for task in group.get_all_tasks()}
    return [task for task in tasks if task.task_name not in within]


def _scores(found: Mapping[str, Any]) -> list[TaskScore]:
    scores = []
    for task, figures in {**found["results"], **found.get("groups", {})}.items():
        documents = found.get("n-samples", {}).get(task, {}).get("effective")
        for name, value in figures.items():
            metric, comma, kept = name.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = figures.get(f"{metric}_stderr,{kept}")
            error = float(error) if isinstance(error, (int, float)) else None
            shots = found.get("n-shot", {}).get(task)
            scores.append(TaskScore(task, metric, kept, float(value), error, documents, shots))
    return scores


@contextmanager
def _data_from(folder: Path | None) -> Iterator[None]:
    """Within the context, data sets that lie in the folder under their names on the hub are loaded from there."""
    if folder is None:
        yield
        return
    import datasets

    load = datasets.load_dataset

    def load_dataset(path: str, *args: Any, **kwargs: Any) -> Any:
        if "data_files" in kwargs:
            kwargs["data_files"] = _found_in(folder, kwargs["data_files"])
        return load(_found_in(folder, path), *args, **kwargs)

    with mock.patch.object(datasets, "load_dataset", load_dataset):
        yield


def _found_in(folder: Path, name: Any) -> Any:
    """A path, or a list or dictionary of paths, those absolute that are there in the folder."""
    if isinstance(name, Mapping):
        return {key: _found_in(folder, value) for key, value in name.items()}
    if isinstance(name, (list, tuple)):
        return [_found_in(folder, value) for value in name]
    return str((folder / name).resolve()) if (folder / str(name)).exists() else name


@contextmanager
def _code_allowed(allowed: bool) -> Iterator[None]:
    with mock.patch.dict(os.environ, {"HF_ALLOW_CODE_EVAL": "1"} if allowed else {}):
        yield


@contextmanager
def _hushed() -> Iterator[None]:
    """Within the context, lm-eval and what it loads data with say nothing below an error."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "huggingface_hub")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
