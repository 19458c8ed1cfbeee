"""Tasks from the name of a model: definitions and data first, then the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moebius.evaluate.tasks import TaskScore, chosen_tasks, evaluate_tasks, load_tasks
from moebius.hf.loading import load_model, load_tokenizer


@dataclass(frozen=True)
class TaskRequest:
    """What to ask: a model, tasks as given, and how."""

    source: str
    tasks: str
    task_path: Path | None = None
    few_shot: int | None = None
    limit: int | None = None
    run_generated_code: bool = False
    dtype: str = "float32"
    device: str = "cpu"
    batch_size: int = 1

    def settings(self) -> dict[str, Any]:
        """What the figures depend on, ready for JSON."""
        return {"tasks": self.tasks, "few_shot": self.few_shot, "limit": self.limit, "dtype": self.dtype}


def run_tasks(request: TaskRequest, quiet: bool) -> list[TaskScore]:
    """Load what is asked for, and ask.

    Raises:
        MoebiusError: no such task, data that cannot be loaded, no such model, a damaged checkpoint.
    """
    path = None if request.task_path is None else request.task_path.expanduser()
    loaded = load_tasks(chosen_tasks(request.tasks), path, request.run_generated_code)
    model = load_model(request.source, request.dtype, request.device)
    return evaluate_tasks(
        model,
        load_tokenizer(request.source),
        loaded,
        few_shot=request.few_shot,
        limit=request.limit,
        batch_size=request.batch_size,
        quiet=quiet,
    )
