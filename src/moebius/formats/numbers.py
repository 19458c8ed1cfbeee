"""The numbers of a format, checked against each other before any memory is laid out by them.

A description comes from a file that anybody may have written. Kernels trust it, so whatever they would divide by, multiply into
a size or read as a place is checked here, once, when the module is built.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from moebius.errors import ShapeError

if TYPE_CHECKING:
    from moebius.formats.base import Packed

#: No count of a real matrix comes near; products of three of them stay inside 64 bits.
MOST = 1 << 20
#: Least and most of the fields that are not plain counts. Fields not listed lie between 0 and :data:`MOST`.
_RANGES: dict[str, tuple[int, int]] = {
    "batch": (1, MOST),
    "bits": (1, 8),
    "block": (1, MOST),
    "code_bits": (1, 16),
    "code_rows": (0, 1 << 40),
    "group_size": (1, MOST),
    "length": (1, MOST),
    "live": (0, 1 << 40),
    "payload_bytes": (0, 1 << 40),
    "planes": (0, 7),
    "salient_block": (1, MOST),
    "scale_bits": (1, 8),
    "sign_rows": (0, 1 << 40),
}
_WORDS = {"side": ("input", "output"), "dtype": ("float16", "bfloat16", "float32")}
_TYPES: dict[str, Any] = {"int": int, "bool": bool, "str": str}


def plain_fields(kind: Any) -> dict[str, Any]:
    """Names and types of the fields of a format that its description holds, as opposed to its tensors."""
    types = {field.name: str(getattr(field.type, "__name__", field.type)) for field in dataclasses.fields(kind)}
    return {name: _TYPES[word] for name, word in types.items() if word in _TYPES}


def stored_fields(kind: Any) -> set[str]:
    """Names of the fields of a format that are tensors."""
    return {field.name for field in dataclasses.fields(kind)} - plain_fields(kind).keys()


def check_fields(packed: Packed) -> None:
    """Refuse plain fields of the wrong type, or outside of what any matrix could have.

    Raises:
        ShapeError: names the format, the field, what it is and what it should be.
    """
    for name, kind in plain_fields(packed).items():
        value: Any = getattr(packed, name)
        if type(value) is not kind:
            raise ShapeError(f"{packed.name}: {name} is {str(value)[:40]!r}, wanted {kind.__name__}")
        if kind is int:
            within(packed, name, *_RANGES.get(name, (0, MOST)))
        elif name in _WORDS and value not in _WORDS[name]:
            raise ShapeError(f"{packed.name}: {name} is {value[:40]!r}, wanted one of {', '.join(_WORDS[name])}")


def within(packed: Packed, name: str, least: int, most: int) -> None:
    """Refuse a field that is not between two numbers, both included.

    Raises:
        ShapeError: names the format, the field, what it is and what it should be.
    """
    value = getattr(packed, name)
    if not least <= value <= most:
        shown = value if abs(value) < 1 << 63 else "a number of more than 64 bits"
        raise ShapeError(f"{packed.name}: {name} is {shown}, wanted {least} to {most}")
