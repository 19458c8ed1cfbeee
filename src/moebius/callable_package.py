"""Packages that share their name with a function of :mod:`moebius.api`: ``moebius.quantize(...)`` calls the one, and
``from moebius.quantize.binary import ...`` looks into the other.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any


class CallablePackage(ModuleType):
    """A package that is called as the function of its name. Type checkers see that function alone."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self.__wrapped__(*arguments, **options)

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The function; ``help`` and ``inspect.signature`` follow it."""
        function: Callable[..., Any] = getattr(import_module("moebius.api"), self.__name__.rpartition(".")[2])
        return function

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.__wrapped__)


def make_callable(package: str) -> None:
    """Let a package be called; it is the one that says so, as ``make_callable(__name__)``."""
    sys.modules[package].__class__ = CallablePackage
