"""Nothing in the package is longer than can be read at a sitting."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import moebius

ROOT = Path(moebius.__file__).parent
MOST_LINES_OF_A_FILE = 400
MOST_LINES_OF_A_FUNCTION = 60


def too_long(root: Path) -> Iterator[str]:
    """Files and functions that exceed the limits. A file that only holds data (one assignment of literals) is a table."""
    for path in sorted(root.rglob("*.py")):
        text = path.read_text()
        tree, name = ast.parse(text), path.relative_to(root)
        if text.count("\n") > MOST_LINES_OF_A_FILE and not _is_table(tree):
            yield f"{name}: {text.count(chr(10))} lines"
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = (node.end_lineno or 0) - node.lineno + 1 - _lines_of_declarations(node)
                if length > MOST_LINES_OF_A_FUNCTION:
                    yield f"{name}: {node.name} has {length} lines"
    for path in sorted(p for ending in ("cpp", "h") for p in root.rglob(f"*.{ending}")):
        if (lines := path.read_text().count("\n")) > MOST_LINES_OF_A_FILE:
            yield f"{path.relative_to(root)}: {lines} lines"


def _is_table(tree: ast.Module) -> bool:
    return all(isinstance(node, (ast.Assign, ast.AnnAssign, ast.Expr, ast.Import, ast.ImportFrom)) for node in tree.body)


def _lines_of_declarations(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Of the docstring, and of parameters: a command's are the table of its options."""
    first = node.body[0]
    documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    docstring = (first.end_lineno or 0) - first.lineno + 1 if documented else 0
    return first.lineno - node.lineno - 1 + docstring


def test_no_file_and_no_function_is_too_long() -> None:
    assert list(too_long(ROOT)) == []


def test_what_is_too_long_is_found(tmp_path: Path) -> None:
    (tmp_path / "long.py").write_text("def f():\n" + "    pass\n" * 401)
    (tmp_path / "short.py").write_text('def f():\n    """' + "\n" * 80 + '"""\n' + "    pass\n" * 59)
    (tmp_path / "table.py").write_text("TABLE = (\n" + "    1,\n" * 500 + ")\n")
    (tmp_path / "long.cpp").write_text("//\n" * 401)
    assert list(too_long(tmp_path)) == ["long.py: 402 lines", "long.py: f has 402 lines", "long.cpp: 401 lines"]
