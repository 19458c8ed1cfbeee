"""The work behind ``moebius evaluate --tasks``: definitions and data first, then the model."""

from __future__ import annotations

from moebius.cli.evaluate import TaskQuestion
from moebius.cli.loading import load_model, load_tokenizer
from moebius.evaluate.tasks import TaskScore, chosen_tasks, evaluate_tasks, load_tasks


def run_tasks(question: TaskQuestion, quiet: bool) -> list[TaskScore]:
    """Load what is asked for, and ask.

    Raises:
        MoebiusError: no such task, data that cannot be loaded, no such model, a damaged checkpoint.
    """
    path = None if question.task_path is None else question.task_path.expanduser()
    loaded = load_tasks(chosen_tasks(question.tasks), path, question.run_generated_code)
    model = load_model(question.source, question.dtype, question.device)
    return evaluate_tasks(
        model,
        load_tokenizer(question.source),
        loaded,
        few_shot=question.few_shot,
        limit=question.limit,
        batch_size=question.batch_size,
        quiet=quiet,
    )
