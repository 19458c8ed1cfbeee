"""The numbers of a format, checked against each other before any memory is laid out by them.

A description comes from a file that anybody may have written. Kernels trust it, so whatever they would divide by, multiply into
a size or read as a place is checked here, once, when the module is built.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

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
_TYPES = {"int": int, "bool": bool, "str": str}


def check_fields(packed: Packed) -> None:
    """Refuse plain fields of the wrong type, or outside of what any matrix could have.

    Raises:
        ShapeError: names the format, the field, what it is and what it should be.
    """
    for field in dataclasses.fields(packed):
        kind = _TYPES.get(str(field.type))
        if kind is None:
            continue
        value = getattr(packed, field.name)
        if type(value) is not kind:
            raise ShapeError(f"{packed.name}: {field.name} is {str(value)[:40]!r}, wanted {field.type}")
        if kind is int:
            within(packed, field.name, *_RANGES.get(field.name, (0, MOST)))
        elif field.name in _WORDS and str(value) not in _WORDS[field.name]:
            raise ShapeError(
                f"{packed.name}: {field.name} is {str(value)[:40]!r}, wanted one of {', '.join(_WORDS[field.name])}"
            )


def within(packed: Packed, name: str, least: int, most: int) -> None:
    """Refuse a field that is not between two numbers, both included.

    Raises:
        ShapeError: names the format, the field, what it is and what it should be.
    """
    value = getattr(packed, name)
    if not least <= value <= most:
        shown = value if abs(value) < 1 << 63 else "a number of more than 64 bits"
        raise ShapeError(f"{packed.name}: {name} is {shown}, wanted {least} to {most}")
