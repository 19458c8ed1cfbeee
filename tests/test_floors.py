"""The house's one rule: a package imports lower floors only, and siblings do not import each other."""

from __future__ import annotations

import ast
from pathlib import Path

import moebius

ROOT = Path(moebius.__file__).parent
FLOORS = {
    0: {"errors", "options", "table", "recipe", "types", "progress", "memory", "json_file", "reference_model", "unfinished"},
    1: {"linalg", "formats"},
    2: {"basis", "quantize", "allocate", "correct", "kernels"},
    3: {"methods", "models", "checkpoint", "calibrate", "runtime"},
    4: {"pipeline", "distributed", "hf", "evaluate", "report"},
    5: {"cli"},
}
FLOOR_OF = {package: floor for floor, packages in FLOORS.items() for package in packages}
ROOT_MODULES = {"__init__"}


def imports_of(path: Path) -> set[str]:
    """First-level moebius packages that a file imports, lazily or not."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != "moebius" else [f"moebius.{a.name}" for a in node.names]
        found |= {n.split(".")[1] for n in names if n.startswith("moebius.")}
    return found


def violations(root: Path) -> list[str]:
    wrong = []
    for path in sorted(root.rglob("*.py")):
        package = path.relative_to(root).parts[0].removesuffix(".py")
        if package in ROOT_MODULES:
            continue
        wrong += [
            f"{path.relative_to(root)} imports {imported}"
            for imported in sorted(imports_of(path) - {package})
            if imported in FLOOR_OF and FLOOR_OF[imported] >= FLOOR_OF[package] > 0
        ]
    return wrong


def test_every_package_has_a_floor() -> None:
    names = {p.name.removesuffix(".py") for p in ROOT.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert names - ROOT_MODULES <= FLOOR_OF.keys()


def test_packages_import_lower_floors_only() -> None:
    assert violations(ROOT) == []


def test_a_violation_is_found(tmp_path: Path) -> None:
    (tmp_path / "quantize").mkdir()
    (tmp_path / "quantize" / "bad.py").write_text("def f():\n    from moebius.correct.gain import g\n    return g\n")
    assert violations(tmp_path) == ["quantize/bad.py imports correct"]
