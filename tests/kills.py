"""Runs that are killed at file-system operations, finished by a second run, and compared with one that was never stopped.

``python -m tests.kills --count 200`` (``make kills``) kills so many runs of each recipe, at operations spread over the run; a
small dose is part of the suite. A run is a process that is forked where everything is imported already, and ends by ``os._exit`` in
the middle of the operation's call: nothing is cleaned up, flushed or released by Python.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from moebius.pipeline import quantize_model
from moebius.recipe import CalibrationSettings, Recipe

#: What Python tells before it touches files (PEP 578).
_OPERATIONS = {
    "open",
    "os.rename",
    "os.mkdir",
    "os.remove",
    "os.rmdir",
    "os.truncate",
    "os.scandir",
    "shutil.copyfile",
    "shutil.rmtree",
}
_KILLED = 9
CALIBRATION = CalibrationSettings(windows=6, window_length=32)
RECIPES: dict[str, dict[str, Any]] = {
    "default": {"method": "moebius"},
    "mobie": {"method": "mobie"},
    "refine": {"method": "moebius", "bits": 0.5, "refine": True, "refine_steps": 6},
}


def forked(work: Callable[[], None], folder: Path, kill_at: int = 0) -> tuple[int, int]:
    """Do something in a process of its own, which ends at the ``kill_at``-th operation on files below ``folder``.

    Returns:
        Exit code (9: it was killed, 0: it came to its end), and how many operations there were.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        count, code = 0, 1

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal count
            if event in _OPERATIONS and any(
                isinstance(a, str | os.PathLike) and str(folder) in os.fspath(a) for a in arguments
            ):
                count += 1
                if count == kill_at:
                    os._exit(_KILLED)

        try:
            sys.addaudithook(watch)
            work()
            code = 0
        finally:
            os.write(writing, str(count).encode())
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as told:
        count = int(told.read() or 0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), count


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path there."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def differing(source: Path, work: Path, options: dict[str, Any], count: int) -> Iterator[tuple[int, list[str]]]:
    """Kill ``count`` runs, each somewhere else, and finish them.

    Yields:
        The operation that a run was killed at, and the files that then differed or should not be there.
    """
    recipe = Recipe.make(**options)

    def run(out: Path) -> Callable[[], None]:
        return lambda: quantize_model(source, out, recipe, CALIBRATION) and None

    whole = work / "whole" / "out"
    whole.parent.mkdir()
    code, operations = forked(run(whole), whole.parent)
    assert code == 0 and operations > count, (code, operations)
    wanted = contents(whole.parent)
    for number in range(count):
        point = 1 + number * (operations - 1) // max(1, count - 1)
        folder = work / "killed"
        folder.mkdir()
        code, _ = forked(run(folder / "out"), folder, point)
        assert code == _KILLED, (point, code)
        if not (folder / "out" / "config.json").exists():
            code, _ = forked(run(folder / "out"), folder)
            assert code == 0, (point, code)
        got = contents(folder)
        yield point, sorted(name for name in got.keys() | wanted.keys() if got.get(name) != wanted.get(name))
        shutil.rmtree(folder)


def main() -> int:
    from tests.tiny import save_tiny

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=70)
    parser.add_argument("--recipe", choices=RECIPES, action="append")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        source = save_tiny("olmoe", Path(folder) / "source")
        for name in arguments.recipe or RECIPES:
            work = Path(folder) / name
            work.mkdir()
            found = [(point, files) for point, files in differing(source, work, RECIPES[name], arguments.count) if files]
            bad += len(found)
            print(f"{name}: {arguments.count} runs killed, {len(found)} ended otherwise {found[:4]}", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
