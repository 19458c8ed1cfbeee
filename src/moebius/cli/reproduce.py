"""``moebius reproduce``: the papers' tables and figures on a model, beside what is published."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moebius.checks import require_device, require_free
from moebius.cli.options import AsJson, Device, Quiet
from moebius.cli.output import note, print_json, print_tables, progress_bars
from moebius.recipe_text import require_text
from moebius.report.tables import TextTable
from moebius.source import display_name, path_or_hub_name

if TYPE_CHECKING:
    from moebius.evaluate.tasks import LoadedTasks
    from moebius.reproduce.published_tables import PublishedTable
    from moebius.reproduce.run import Reproduction
    from moebius.reproduce.setting import Setting

EXAMPLES = """[bold]Examples[/bold]

moebius reproduce --list

moebius reproduce mobie-table-4

moebius reproduce mobie-table-3 allenai/OLMoE-1B-7B-0924 --device cuda

moebius reproduce kbvq-table-5 ./model --calibration ./text.jsonl --text ./held-out.txt --no-tasks"""


def reproduce(
    table: Annotated[str | None, typer.Argument(metavar="TABLE", help="See --list.", show_default=False)] = None,
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="Folder or hub name. Default: the reference model.", show_default=False),
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="Name the tables and figures there are.")] = False,
    beside: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Whose published figures to print. Default: MODEL's own.", show_default=False),
    ] = None,
    calibration: Annotated[
        str | None, typer.Option("--calibration", "-c", metavar="TEXT", help="Default: the paper's.", show_default=False)
    ] = None,
    windows: Annotated[int | None, typer.Option(min=1, help="Default: the paper's.", show_default=False)] = None,
    window_length: Annotated[int | None, typer.Option(min=2, help="Default: the paper's.", show_default=False)] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Default: the paper's.", show_default=False)] = None,
    text: Annotated[
        str | None, typer.Option("--text", "-t", help="To measure on. Default: the paper's.", show_default=False)
    ] = None,
    text_windows: Annotated[int | None, typer.Option(min=1, help="Default: all.", show_default=False)] = None,
    text_length: Annotated[int | None, typer.Option(min=4, help="Default: the paper's.", show_default=False)] = None,
    tasks: Annotated[
        bool | None,
        typer.Option(
            "--tasks/--no-tasks",
            help="Ask the tasks the table has (lm-eval). Default: yes, but for the reference model.",
            show_default=False,
        ),
    ] = None,
    task_path: Annotated[Path | None, typer.Option(metavar="FOLDER", help="See moebius evaluate.", show_default=False)] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents of each task. Default: all.", show_default=False)] = None,
    run_generated_code: Annotated[bool, typer.Option(help="Let tasks run what the model writes (MBPP, HumanEval).")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder to write. Default: moebius-TABLE.", show_default=False)
    ] = None,
    device: Device = "cpu",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Make a table or figure of a paper on a model, and print what is measured beside what is published.

    Recipes, calibration and protocol are the paper's; on the reference model, which has read Python alone, its own text stands
    in. A run that was stopped goes on. The folder gets table.md, results.json, figure.png and the packed checkpoints.
    """
    if list_ or table is None:
        _list(as_json)
        return
    require_text(text)
    require_text(calibration)

    from moebius.hf.loading import quiet_transformers
    from moebius.memory import WHILE_QUANTIZING, keep_freed_memory
    from moebius.reproduce.printed import not_the_papers_model, reproduction_table
    from moebius.reproduce.published_tables import load_table
    from moebius.reproduce.run import rows_left_out
    from moebius.reproduce.setting import Wishes, setting_for

    published = load_table(table)
    source, name = str(path_or_hub_name(model)), display_name(model)
    out = require_free(out or Path(f"moebius-{table}"))
    require_device(device)
    quiet_transformers()
    wishes = Wishes(calibration, windows, window_length, seed, text, text_windows, text_length, beside)
    setting = setting_for(published, source, is_reference=model is None, wishes=wishes)
    left_out = rows_left_out(published, setting, source)
    for line in (not_the_papers_model(published, setting, name), *(f"{label}: {why}" for label, why in left_out.items())):
        if line:
            note(line)
    asked = _tasks(published, tasks, model is None, task_path, run_generated_code)
    keep_freed_memory(WHILE_QUANTIZING)
    made, folder, finish = _make(published, source, setting, left_out, out, device, asked, limit, quiet)
    _write(folder, made, reproduction_table(made, name), name)
    finish()
    if as_json:
        print_json({"model": name, **made.to_dict()})
        return
    print_tables(reproduction_table(made, name, whole=False))
    note(f"written to {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")


def _make(
    table: PublishedTable,
    source: str,
    setting: Setting,
    left_out: dict[str, str],
    out: Path,
    device: str,
    tasks: LoadedTasks | None,
    limit: int | None,
    quiet: bool,
) -> tuple[Reproduction, Path, Any]:
    """The reproduction, the folder that becomes ``out``, and what makes it so."""
    from moebius.compare.work_folder import WorkFolder
    from moebius.reproduce.run import reproduce as measure
    from moebius.reproduce.shop import Shop

    asked = None if tasks is None else list(tasks.names)
    work = WorkFolder(out, {"source": source, "table": table.name, **setting.to_dict(), "tasks": asked, "limit": limit})
    work.folder.mkdir(parents=True, exist_ok=True)
    with progress_bars(hidden=quiet) as progress:
        shop = Shop(
            table=table,
            source=source,
            setting=setting,
            left_out=left_out,
            work=work,
            device=device,
            tasks=tasks,
            limit=limit,
            progress=progress,
        )
        made = measure(shop)
    return made, work.folder, work.finish


def _tasks(
    table: PublishedTable, wanted: bool | None, is_reference: bool, task_path: Path | None, runs_code: bool
) -> LoadedTasks | None:
    """The tasks of the table with their data, before anything else is done."""
    if not table.tasks or wanted is False:
        return None
    if wanted is None and is_reference and task_path is None:
        note(f"tasks ({', '.join(table.tasks)}) are not asked: the reference model has read Python alone; --tasks asks them")
        return None

    from moebius.evaluate.tasks import load_tasks

    return load_tasks(table.tasks, None if task_path is None else task_path.expanduser(), runs_code)


def _write(folder: Path, made: Reproduction, table: TextTable, name: str) -> None:
    """results.json, table.md and, where matplotlib is installed, figure.png."""
    (folder / "results.json").write_text(json.dumps({"model": name, **made.to_dict()}, indent=1) + "\n", encoding="utf-8")
    (folder / "table.md").write_text(f"{table.title}\n\n{table.markdown()}\n{table.note}\n", encoding="utf-8")
    if find_spec("matplotlib") is None:
        note("no figure: matplotlib is not installed; pip install 'moebius[plots]'")
        return

    from moebius.reproduce.figures import draw

    if not draw(made, folder / "figure.png"):
        note("no figure: nothing was measured")


def _list(as_json: bool) -> None:
    from moebius.reproduce.published_tables import load_table, table_names

    tables = [load_table(name) for name in table_names()]
    if as_json:
        print_json([{"name": t.name, "paper": t.paper, "title": t.title, "models": list(t.models)} for t in tables])
        return
    rows = tuple((t.name, t.title, ", ".join(t.models) or "–") for t in tables)
    print_tables(TextTable("Tables and figures", ("name", "what it shows", "published for"), rows, 3))
