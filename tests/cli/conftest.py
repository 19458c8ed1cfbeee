"""What the tests of the command line share: a tiny model, and a text that is read faster than the built-in one."""

from __future__ import annotations

import inspect
import textwrap
from pathlib import Path

import pytest
from tests.tiny import save_tiny


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the OLMoE architecture with 2 layers of 8 experts, 2 of them active, hidden 48, inner 40."""
    return save_tiny("olmoe", tmp_path_factory.mktemp("models") / "olmoe")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of some 20,000 characters, a twentieth of which is held out."""
    path = tmp_path_factory.mktemp("texts") / "source.txt"
    path.write_text(inspect.getsource(textwrap))
    return path


@pytest.fixture(scope="session")
def calibration(text: Path) -> list[str]:
    """Four windows of calibration text."""
    return ["--calibration", str(text), "--windows", "4", "--window-length", "32"]


@pytest.fixture(scope="session")
def held_out(text: Path) -> list[str]:
    """Four windows of held-out text."""
    return ["--text", str(text), "--windows", "4", "--window-length", "32"]
