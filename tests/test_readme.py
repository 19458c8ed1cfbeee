"""The README's tree is the tree on disk."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_captioned_tree_names_every_package() -> None:
    tree = (ROOT / "README.md").read_text().split("```text")[1].split("```")[0]
    named = set(re.findall(r"^  (\w+)/ ", tree, re.MULTILINE))
    there = {p.name for p in (ROOT / "src" / "moebius").iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert named == there


def test_the_two_commands_are_targets_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "test", "check", "bench"):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
