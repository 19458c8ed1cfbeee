"""JSON that others wrote: read once, checked, and refused in one line that names the file and the place in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from moebius.errors import CheckpointError, first_line

#: The JSON file that every packed checkpoint has, see :mod:`moebius.checkpoint.manifest`.
MANIFEST_NAME = "moebius_manifest.json"
#: Larger files are no configuration: an index of a million tensors takes 200 MB.
MOST_BYTES = 1 << 29

#: No model has more layers; transformers builds every one of them before it looks at any weight.
MOST_LAYERS = 10_000

Kind = TypeVar("Kind")
_WORDS = {dict: "an object", list: "a list", str: "a text", int: "a whole number"}


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: a file that is missing, cannot be read, or holds something else: another encoding than UTF-8, a
            truncated text, brackets nested too deeply, numbers with thousands of digits, half a character.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise CheckpointError(f"{path}: got more than {MOST_BYTES >> 20} MiB of JSON; is it the right file?")
        content = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing or not a file; fetch it again") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    return parse_object(content, str(path))


def read_config(path: Path) -> dict[str, Any]:
    """The ``config.json`` of a model, whose counts of layers are such that the model can be built.

    Raises:
        CheckpointError: as :func:`read_object`, or more layers than any model has.
    """
    config = read_object(path)
    parts = [config]
    for part in parts:  # grows by what is found in it
        for name, value in part.items():
            if isinstance(value, dict):
                parts.append(value)
            elif isinstance(value, int) and value > MOST_LAYERS and ("layer" in name.lower() or name.endswith("depth")):
                raise CheckpointError(f"{path}: {name} is {str(value)[:40]}, wanted {MOST_LAYERS} at most; fetch it again")
    return config


def parse_object(content: bytes, where: str) -> dict[str, Any]:
    """:func:`read_object` of bytes that were read from somewhere.

    Raises:
        CheckpointError: see there.
    """
    if content.startswith(b"\xef\xbb\xbf"):
        raise CheckpointError(f"{where}: begins with a byte order mark, which JSON must not; save it as plain UTF-8")
    try:
        parsed = json.loads(content.decode("utf-8"))
        if b"\\ud" in content.lower():
            json.dumps(parsed, ensure_ascii=False).encode("utf-8")  # half a character can be neither printed nor written
    except UnicodeError:
        raise CheckpointError(f"{where}: cannot be read: not UTF-8; fetch it again") from None
    except RecursionError:
        raise CheckpointError(f"{where}: cannot be read: nested too deeply; fetch it again") from None
    except ValueError as error:
        reason = first_line(error)
        raise CheckpointError(f"{where}: cannot be read: not a JSON object ({reason}); fetch it again") from None
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{where}: not a JSON object; fetch it again")
    return parsed


def field(content: Mapping[str, Any], name: str, kind: type[Kind], where: object, default: Kind | None = None) -> Kind:
    """A value of a JSON object that must be of one kind.

    Args:
        content: the object.
        name: of the value.
        kind: ``dict``, ``list``, ``str`` or ``int``.
        where: the file, for the message.
        default: where the value is missing or null; without one, it must be there.

    Raises:
        CheckpointError: it is missing, or of another kind.
    """
    value = content.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        got = "nothing" if value is None else _WORDS.get(type(value), type(value).__name__)
        raise CheckpointError(f"{where}: {name} is {got}, wanted {_WORDS.get(kind, kind.__name__)}; fetch it again")
    return value
