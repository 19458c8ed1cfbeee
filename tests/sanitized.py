"""Tests with another build of the extension in place of the installed one: ``python -m tests.sanitized FOLDER ARGUMENTS``.

``make sanitize`` runs the kernel tests so, with a build that the address and the undefined-behavior sanitizer watch.
"""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

import moebius

NAME = "moebius.native._extension"


def main() -> int:
    folder, *arguments = sys.argv[1:]
    (path,) = Path(folder).glob("_extension*.so")
    spec = spec_from_file_location(NAME, path)
    assert spec is not None and spec.loader is not None and moebius.__file__
    sys.modules[NAME] = module = module_from_spec(spec)
    spec.loader.exec_module(module)
    from moebius import native

    assert native.extension() is module, native.missing()
    return int(pytest.main(arguments))


if __name__ == "__main__":
    sys.exit(main())
