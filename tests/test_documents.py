"""What the documents name is there, and what is there is in the documents."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
_FOLDERS = ("src", "tests", "docs", "scripts", "benchmarks", "examples", "experiments")


def named_files(text: str) -> set[str]:
    """Paths of the repository, as links of Markdown leave out of account: those in code, without patterns and place holders."""
    words = re.findall(rf"(?<![\w/.-])(?:{'|'.join(_FOLDERS)})/[\w./-]*", text)
    return {word.rstrip(".") for word in words if "NAME" not in word}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_are_named_are_there(document: Path) -> None:
    text = document.read_text()
    assert {name for name in named_files(text) if not (ROOT / name).exists() and not (document.parent / name).exists()} == set()
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)
    assert [link for link in links if not (document.parent / link).exists()] == []


def test_a_file_that_is_not_there_is_found() -> None:
    assert named_files("see `src/moebius/nothing.py`, scripts/x.py --y. And methods/NAME.py") == {
        "src/moebius/nothing.py",
        "scripts/x.py",
    }


def test_every_experiment_has_its_command_and_commit() -> None:
    pages = sorted((ROOT / "docs" / "experiments").glob("*.md"))
    index = (ROOT / "docs" / "experiments.md").read_text()
    assert pages
    for page in pages:
        text = page.read_text()
        assert f"(experiments/{page.name})" in index, f"{page.name} is not in docs/experiments.md"
        lines = text.splitlines()
        for number, line in enumerate(lines):
            if line.startswith("|") and not lines[number - 1].startswith("|"):
                before = "\n".join(lines[max(0, number - 4) : number])
                assert re.search(r"commits? [0-9a-f]{7}\b", before), f"{page.name}:{number + 1}: no commit beside this table"
                assert re.search(r"`|not kept", before), f"{page.name}:{number + 1}: no command beside this table"


def test_every_script_of_an_experiment_is_spoken_of() -> None:
    spoken_of = "".join(page.read_text() for page in (ROOT / "docs" / "experiments").glob("*.md"))
    assert {p.name for p in (ROOT / "experiments").glob("*.py") if f"experiments/{p.name}" not in spoken_of} == set()


def test_every_environment_variable_is_documented() -> None:
    sources = [p for folder in ("src", "tests", "startup") for p in (ROOT / folder).rglob("*.py")]
    read = {name for p in sources for name in re.findall(r"[\"'](MOEBIUS_[A-Z_]+)[\"']", p.read_text())}
    read |= {name for p in sources for name in re.findall(r"environ(?:\.\w+)?[\[(]\s*[\"'](\w+)", p.read_text())}
    documented = set(re.findall(r"`([A-Z][A-Z_]{2,})`", (ROOT / "docs" / "environment.md").read_text()))
    assert {name for name in read if name not in documented} == {"TOKENIZERS_PARALLELISM"}  # silences a warning in tests
    own = {name for name in documented if name.startswith("MOEBIUS_")}
    assert own <= read


def test_the_glossary_has_25_words_in_order() -> None:
    words = re.findall(r"^\| \*\*(.+?)\*\*", (ROOT / "docs" / "glossary.md").read_text(), re.MULTILINE)
    assert len(words) == len(set(words)) == 25
    assert words == sorted(words, key=str.lower)


def test_the_changelog_is_of_this_version() -> None:
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    heading = re.search(r"^## (\S+) - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert version and heading and heading[1] == version[1]


def test_a_commit_is_checked_by_make_check() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [(repo["repo"], hook) for repo in config["repos"] for hook in repo["hooks"]]
    assert [(repo, hook["entry"]) for repo, hook in hooks] == [("local", "make check")]
    hook = hooks[0][1]
    assert hook["always_run"] and not hook["pass_filenames"] and hook["language"] == "system"
    assert "files" not in hook and "stages" not in hook
    assert re.search(r"^check:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_make_check_reads_the_api_and_its_callers_strictly() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]
    assert {"src/moebius", "examples", "tests/api_types.py"} <= set(config["files"])
    strict = next(override for override in config["overrides"] if "moebius.api" in override["module"])
    assert {"moebius", "api_types"} <= set(strict["module"]) and strict["disallow_untyped_defs"] and strict["warn_return_any"]
    assert (ROOT / "tests" / "api_types.py").read_text().startswith("# mypy: disallow-any-expr\n")
    assert re.search(r"^\t\$\(BIN\)/mypy$", (ROOT / "Makefile").read_text(), re.MULTILINE)
