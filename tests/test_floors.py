"""The house's one rule: a package imports lower floors only, and siblings do not import each other."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import moebius

ROOT = Path(moebius.__file__).parent
FLOORS = {
    0: {"errors", "options", "table", "recipe", "recipe_text", "types", "progress", "memory", "process", "checks"}
    | {"json_file", "source", "reference_model", "unfinished", "callable_package", "private_transformers"},
    1: {"linalg", "formats", "native"},
    2: {"basis", "quantize", "allocate", "correct", "kernels"},
    3: {"methods", "models", "checkpoint", "calibrate", "runtime"},
    4: {"pipeline", "hf", "report"},
    5: {"evaluate", "generation"},
    6: {"compare", "bench"},
    7: {"api", "reproduce"},
    8: {"cli"},
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


def there() -> set[str]:
    """Packages and modules that are on disk."""
    return {p.name.removesuffix(".py") for p in ROOT.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}


def test_every_package_has_a_floor_and_every_floor_its_packages() -> None:
    assert there() - ROOT_MODULES == FLOOR_OF.keys()


def test_the_tree_in_the_readme_has_these_floors() -> None:
    tree = (Path(__file__).parent.parent / "README.md").read_text().split("```text")[1].split("```")[0]
    shown = {}
    for names, floor in re.findall(r"^  ((?:\w+(?:\.py|/) +)+)(\d)  ", tree, re.MULTILINE):
        shown |= {name.rstrip("/").removesuffix(".py"): int(floor) for name in names.split()}
    assert shown == FLOOR_OF


def test_packages_import_lower_floors_only() -> None:
    assert violations(ROOT) == []


def test_one_package_touches_the_extension() -> None:
    touching = [path for path in ROOT.rglob("*.py") if "_extension" in path.read_text()]
    assert {path.relative_to(ROOT).parts[0] for path in touching} == {"native"}


def test_a_violation_is_found(tmp_path: Path) -> None:
    (tmp_path / "quantize").mkdir()
    (tmp_path / "quantize" / "bad.py").write_text("def f():\n    from moebius.correct.gain import g\n    return g\n")
    assert violations(tmp_path) == ["quantize/bad.py imports correct"]
