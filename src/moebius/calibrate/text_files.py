"""Text as people have it on disk: what is read is what is there, and what cannot be read is refused with its place."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from moebius.errors import CalibrationError, first_line

_CHUNK = 1 << 16
_HELD_OUT_SHARE = 20  # one part in twenty of a text that has no split of its own
_BOM = b"\xef\xbb\xbf"
#: How files begin that are something else, and what to do with them.
_OTHERS = {
    b"\xff\xfe": "UTF-16; convert it first: iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "UTF-16; convert it first: iconv -f UTF-16 -t UTF-8",
    b"\x1f\x8b": "compressed by gzip; unpack it first: gunzip",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; unpack it first: unzstd",
    b"BZh": "compressed by bzip2; unpack it first: bunzip2",
    b"PK\x03\x04": "a zip archive; unpack it first",
    b"PAR1": "parquet; give the folder it is in, which is read as a data set",
}

#: A conversation, ``[{"role": ..., "content": ...}, ...]``, as the text that the model would see.
Render = Callable[[list[Any]], str]


@dataclass(frozen=True)
class Documents:
    """Documents that are read one at a time, by their number."""

    count: int
    read: Callable[[int], str]


def share(count: int, held_out: bool) -> range:
    """The first 95 % of ``count`` things, or the rest of them."""
    cut = count - count // _HELD_OUT_SHARE
    return range(cut, count) if held_out else range(cut)


def text_file(path: Path, held_out: bool) -> Documents:
    """A text file as documents of 64 KiB, so that a huge one need not be read as a whole.

    Raises:
        CalibrationError: a file that cannot be opened or is no text; when it is read, the place of bytes that are no UTF-8.
    """
    begin, size = _checked(path)
    mine = share(size - begin, held_out)
    start, stop = mine.start + begin, mine.stop + begin

    def read(index: int) -> str:
        at = start + index * _CHUNK
        with path.open("rb") as file:
            # A character that begins before a border belongs to the piece that it begins in.
            first, last = (
                _border(file, place) if place not in (begin, size) else place for place in (at, min(at + _CHUNK, stop))
            )
            file.seek(first)
            return _decoded(path, file.read(last - first), first)

    return Documents(-(-len(mine) // _CHUNK), read)


def json_lines(path: Path, held_out: bool, render: Render) -> Documents:
    """A JSON-lines file; only the offsets of its lines are kept.

    Raises:
        CalibrationError: a file that cannot be opened or is no JSON lines; when it is read, a row without text, with its line.
    """
    begin, _ = _checked(path)
    offsets: list[tuple[int, int]] = []  # line and place
    offset = begin
    with path.open("rb") as file:
        file.seek(begin)
        for number, line in enumerate(file, 1):
            if line.strip():
                if not offsets and line.lstrip().startswith(b"["):
                    raise CalibrationError(
                        f"text {path}: is a JSON array, wanted JSON lines: one object a line; jq -c '.[]' makes them"
                    )
                offsets.append((number, offset))
            offset += len(line)
    mine = share(len(offsets), held_out)

    def read(index: int) -> str:
        number, place = offsets[mine[index]]
        with path.open("rb") as file:
            file.seek(place)
            line = file.readline()
        try:
            row = json.loads(_decoded(path, line, place))
        except (ValueError, RecursionError):
            raise CalibrationError(f"text {path}, line {number}: is not JSON; wanted one object a line") from None
        return row_text(row, f"text {path}, line {number}", render)

    return Documents(len(mine), read)


def row_text(row: Any, where: str, render: Render) -> str:
    """The text of a row: its ``text``, or its conversation through the chat template.

    Args:
        where: for messages, such as ``text chats.jsonl, line 3``.

    Raises:
        CalibrationError: a row of another shape, or a conversation that the template refuses.
    """
    if not isinstance(row, Mapping):
        raise CalibrationError(f"{where}: got {type(row).__name__}, wanted an object with 'text' or 'messages'")
    if isinstance(text := row.get("text"), str):
        return text
    if isinstance(messages := row.get("messages"), list):
        try:
            return render(messages)
        except CalibrationError as error:
            raise CalibrationError(f"{where}: {error}") from None
        except Exception as error:  # templates are programs
            raise CalibrationError(f"{where}: the chat template refuses its messages ({first_line(error)})") from error
    raise CalibrationError(
        f"{where}: got {_listed(row)}, wanted a string under 'text' or a chat under 'messages'; rewrite its rows as one of them"
    )


def chat_template(tokenizer: Any) -> Render:
    """How the chat template of a tokenizer writes a conversation."""

    def render(messages: list[Any]) -> str:
        if not getattr(tokenizer, "chat_template", None):
            raise CalibrationError(
                "is a chat ('messages'), and this tokenizer has no chat template to write it with; give 'text' rows"
            )
        return str(tokenizer.apply_chat_template(messages, tokenize=False))

    return render


def whole_file(path: Path) -> str:
    """All of a text file.

    Raises:
        CalibrationError: as :func:`text_file`.
    """
    begin, _ = _checked(path)
    return _decoded(path, path.read_bytes()[begin:], begin)


def whole_rows(path: Path, render: Render) -> list[str]:
    """The texts of all lines of a JSON-lines file.

    Raises:
        CalibrationError: as :func:`json_lines`.
    """
    pieces = [json_lines(path, held_out, render) for held_out in (False, True)]
    return [documents.read(index) for documents in pieces for index in range(documents.count)]


def _checked(path: Path) -> tuple[int, int]:
    """Where the text of a file begins, after a byte order mark, and where it ends."""
    try:
        with path.open("rb") as file:
            head = file.read(_CHUNK)
            size = file.seek(0, 2)
    except OSError as error:
        raise CalibrationError(f"text {path}: {error.strerror}; give a file that exists and can be read") from None
    for magic, what in _OTHERS.items():
        if head.startswith(magic):
            raise CalibrationError(f"text {path}: is {what}")
    if b"\0" in head:
        raise CalibrationError(f"text {path}: holds NUL bytes, as UTF-16 and binary files do; wanted UTF-8 text")
    return (len(_BOM) if head.startswith(_BOM) else 0), size


def _border(file: BinaryIO, place: int) -> int:
    """The first place from ``place`` on where a character begins."""
    file.seek(place)
    following = file.read(3)
    return place + next((i for i, byte in enumerate(following) if byte & 0xC0 != 0x80), len(following))


def _decoded(path: Path, data: bytes, offset: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"text {path}: byte {offset + error.start} ({data[error.start]:#04x}) is no UTF-8; "
            "convert it first, such as by iconv -f LATIN1 -t UTF-8"
        ) from None


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names) or "no fields"
