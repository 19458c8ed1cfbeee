"""Where a comparison is kept until it is complete, so that one that was stopped goes on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moebius import unfinished
from moebius.errors import OutputError
from moebius.report.comparison import ComparisonRow


class WorkFolder:
    """A hidden folder beside the output that becomes the output when all is done, and remembers finished rows until then.

    Args:
        out: the folder that appears, or grows, when all is done.
        settings: what the rows depend on.
        finished: rows that are in ``out`` already.

    Raises:
        OutputError: it holds an unfinished comparison with other settings.
    """

    def __init__(self, out: Path, settings: dict[str, Any], finished: Sequence[ComparisonRow] = ()) -> None:
        self.out = out = out.absolute()
        self.folder = unfinished.beside(out)
        self._file = self.folder / "unfinished.json"
        self._state: dict[str, Any] = {"settings": settings, "costs": {}, "rows": {}}
        if self._file.exists():
            state = json.loads(self._file.read_text())
            if state["settings"] != settings:
                raise OutputError(
                    f"{self.folder}: holds an unfinished comparison with other settings; remove it, or choose another --out"
                )
            self._state = state
        self._state["rows"].update({row.label: row.to_dict() for row in finished})

    def __contains__(self, label: str) -> bool:
        return label in self._state["rows"]

    def row(self, label: str, make: Callable[[], ComparisonRow]) -> ComparisonRow:
        """The row that an earlier run finished, or what ``make`` returns."""
        return ComparisonRow.from_dict(self.figures(label, lambda: make().to_dict()))

    def figures(self, label: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What an earlier run finished under this label, or what ``make`` returns, ready for JSON."""
        if label not in self._state["rows"]:
            self._remember("rows", label, make())
        return self._state["rows"][label]

    def cost(self, label: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """``seconds`` that ``work`` took and the ``peak_memory_bytes`` it reports, now or in the earlier run that did it."""
        if label not in self._state["costs"]:
            began = time.perf_counter()
            report = work()
            seconds = round(time.perf_counter() - began, 2)
            self._remember("costs", label, {"seconds": seconds, "peak_memory_bytes": report["peak_memory_bytes"]})
        return self._state["costs"][label]

    def finish(self) -> None:
        """Give the folder its name; a folder that was there, empty, stays: it may be the one that somebody stands in."""
        self._file.unlink(missing_ok=True)
        if not self.out.exists():
            self.folder.rename(self.out)
            return
        for path in sorted(self.folder.iterdir(), key=Path.is_file):  # checkpoints before the table that names them
            path.rename(self.out / path.name)
        self.folder.rmdir()

    def _remember(self, kind: str, label: str, value: Any) -> None:
        self._state[kind][label] = value
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = self._file.with_suffix(".tmp")
        draft.write_text(json.dumps(self._state))
        draft.replace(self._file)
