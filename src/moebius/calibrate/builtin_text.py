"""The built-in text: the documentation and sources of the Python that runs.

Every CPython ships a few megabytes of English and code that nobody has to download: the language reference in
``pydoc_data.topics``, the docstrings of the modules written in C, and the sources of the standard library. Tests,
vendored packages, generated tables and anything that names the machine it was built on are left out.

One document in twenty is held out, chosen by its name alone (:func:`is_held_out`), so that training, calibration and
evaluation agree on the split without a list.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

# Generated tables, vendored wheels, tests, and files that record the machine Python was built on.
_SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "encodings",
    "pydoc_data",
    "ensurepip",
    "__pycache__",
}
_SKIPPED_PREFIXES = ("_sysconfigdata", "config-", "sitecustomize", "usercustomize")
_HELD_OUT_OF_256 = 13  # 5 %


@dataclass(frozen=True)
class Document:
    """A text with a name that is the same on every machine, such as ``source/asyncio/events.py`` or ``topic/lambda``."""

    name: str
    text: str


@cache
def builtin_documents(split: str = "train") -> tuple[Document, ...]:
    """The documents of one split, in a fixed shuffled order.

    Args:
        split: ``"train"`` (19 of 20 names) or ``"held-out"``.

    Returns:
        Documents sorted by the hash of their name, which mixes prose and code and depends on nothing else.
    """
    wanted = {"train": False, "held-out": True}[split]
    documents = [d for d in _all_documents() if is_held_out(d.name) is wanted]
    return tuple(sorted(documents, key=lambda d: _digest(d.name)))


def is_held_out(name: str) -> bool:
    """Whether the document of this name belongs to the held-out split."""
    return _digest(name)[0] < _HELD_OUT_OF_256


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def _all_documents() -> Iterator[Document]:
    for topic, text in topics.items():
        yield Document(f"topic/{topic}", text)
    for module in sorted(sys.builtin_module_names):
        if text := _docstrings(module):
            yield Document(f"docstrings/{module}", text)
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(_source_files(root)):
        name = "source/" + path.relative_to(root).as_posix()
        yield Document(name, path.read_text(encoding="utf-8", errors="replace"))


def _source_files(root: Path) -> Iterator[Path]:
    """Walks only the folders that count: site-packages may hold forty thousand files."""
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if _is_wanted(name)]
        yield from (Path(folder, name) for name in files if name.endswith(".py") and _is_wanted(name))


def _is_wanted(name: str) -> bool:
    return name not in _SKIPPED_FOLDERS and not name.startswith(_SKIPPED_PREFIXES)


def _docstrings(module_name: str) -> str:
    """The docstrings of a module written in C, one object after the other, as its help page would print them."""
    module = importlib.import_module(module_name)
    pieces = [inspect.getdoc(module) or ""]
    for name, member in sorted(vars(module).items()):
        if callable(member) and not name.startswith("_"):
            pieces.append(f"{module_name}.{name}\n{inspect.getdoc(member) or ''}")
            if inspect.isclass(member):
                pieces += [
                    f"{module_name}.{name}.{attribute}\n{inspect.getdoc(value) or ''}"
                    for attribute, value in sorted(vars(member).items())
                    if callable(value) and not attribute.startswith("_")
                ]
    return "\n\n".join(p for p in pieces if p)
