"""Tests with another build of the extension in place of the installed one: ``python -m tests.sanitized FOLDER ARGUMENTS``.

With ``-m MODULE ARGUMENTS`` it runs a module instead of pytest. ``make sanitize`` runs the kernel tests so, and ``make fuzz
SANITIZE=1`` the fuzzer, with a build that the address and the undefined-behavior sanitizer watch.
"""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from runpy import run_module

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
    if arguments[:1] == ["-m"]:
        sys.argv[1:] = arguments[2:]
        run_module(arguments[1], run_name="__main__")
        return 0
    return int(pytest.main(arguments))


if __name__ == "__main__":
    sys.exit(main())
