"""Windows of tokens to calibrate on: from the built-in text, a file, or a Hugging Face data set."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moebius.calibrate.builtin_text import builtin_documents
from moebius.calibrate.text_files import Documents, Render, chat_template, json_lines, row_text, share, text_file
from moebius.errors import CalibrationError, UnknownNameError, first_line
from moebius.recipe import CalibrationSettings

# Windows are drawn from this many times the tokens that are wanted, so that the seed matters and no two seeds take
# neighbouring text, while 64 windows of a text of gigabytes need a few hundred kilobytes of it.
_POOL = 8
# Characters per token-to-be of a window that one visit to a document takes: about 16 windows of English.
_PIECE_CHARACTERS = 64


@dataclass(frozen=True)
class HubText:
    """A data set on the hub: what ``datasets.load_dataset`` is given, and how its rows become text.

    Attributes:
        arguments: of ``load_dataset`` after the path.
        column: the column that holds text; None: ``text``, or the only column of strings.
        separator: joins neighbouring rows into one text where a row is a line and not a document; None keeps rows apart.
    """

    path: str
    arguments: dict[str, Any]
    column: str | None = None
    separator: str | None = None


#: Short names of the data sets that the papers calibrate on.
HUB_TEXTS = {
    "wikitext2": HubText("Salesforce/wikitext", {"name": "wikitext-2-raw-v1"}, "text", separator="\n"),
    # One shard of 1,024 is 356,000 documents, far more than calibration ever reads.
    "c4": HubText(
        "allenai/c4",
        {
            "data_files": {
                "train": "en/c4-train.00000-of-01024.json.gz",
                "validation": "en/c4-validation.00000-of-00008.json.gz",
            }
        },
        "text",
    ),
    # The data set itself is a script, which `datasets` no longer runs; the hub keeps its rows as parquet on a branch.
    "ptb": HubText(
        "ptb-text-only/ptb_text_only",
        {
            "revision": "refs/convert/parquet",
            "data_files": {split: f"penn_treebank/{split}/*.parquet" for split in ("train", "validation", "test")},
        },
        "sentence",
        separator="\n",
    ),
    # As with ptb, the script's rows as parquet: the sample of a billion tokens that its owners publish beside the whole.
    "redpajama": HubText(
        "togethercomputer/RedPajama-Data-1T-Sample",
        {"revision": "refs/convert/parquet", "data_files": {"train": "*/train/*.parquet"}},
        "text",
    ),
}


def calibration_windows(settings: CalibrationSettings, tokenizer: Any) -> Tensor:
    """Distinct windows of tokens, drawn by seed from a text.

    Documents are visited in an order drawn by seed, a piece of each at a time, until eight times the wanted tokens are
    there or the text is used up. They are joined with the tokenizer's end-of-text token between them, cut into windows that
    do not overlap, and the seed draws the windows, each of which begins with the begin-of-text token where the tokenizer would
    put it (``settings.bos``). Long texts are never tokenized as a whole.

    Args:
        settings: ``text`` is ``builtin``, a path to a ``.txt`` or ``.jsonl`` file (a ``text`` field per line), a folder that
            Hugging Face ``datasets`` can read, a short name (``wikitext2``, ``c4``, ``ptb``), or ``owner/name`` on the hub.
            ``split``: the built-in text and data sets have their own; of others, ``held-out`` is the last twentieth.
        tokenizer: of the model, from transformers.

    Returns:
        (windows, window_length) int64.

    Raises:
        CalibrationError: no such file, a file that cannot be read, or fewer tokens than wanted.
        UnknownNameError: a name that is neither a file nor a data set.
    """
    if settings.windows < 1 or settings.window_length < 2:
        raise CalibrationError(
            f"calibration wants {settings.windows} windows of {settings.window_length} tokens; at least 1 window of 2 is needed"
        )
    documents = _open_text(settings, chat_template(tokenizer))
    generator = torch.Generator().manual_seed(settings.seed)
    head = begins_with(tokenizer, settings.bos)
    length = settings.window_length - len(head)  # of what is drawn
    wanted = settings.windows * length
    tokens = _pool(documents, tokenizer, generator, _POOL * wanted, _PIECE_CHARACTERS * length)
    if len(tokens) < wanted:
        raise CalibrationError(
            f"calibration text {settings.text!r} ({settings.split}): found {len(tokens)} tokens, wanted {wanted} "
            f"({settings.windows} windows of {length}); give a longer text, or ask for fewer or shorter windows"
        )
    slots = len(tokens) // length
    pool = torch.tensor(tokens[: slots * length]).view(slots, length)
    drawn = pool[torch.randperm(slots, generator=generator)[: settings.windows]]
    return torch.cat([torch.tensor(head, dtype=torch.int64).expand(len(drawn), -1), drawn], 1)


def adds_bos(tokenizer: Any) -> bool:
    """Whether a tokenizer begins every text with its begin-of-text token."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]


def begins_with(tokenizer: Any, bos: str) -> list[int]:
    """What every window begins with: the begin-of-text token, or nothing.

    Args:
        bos: ``auto`` (where the tokenizer adds it), ``on`` or ``off``.

    Raises:
        CalibrationError: a begin-of-text token is asked for, and the tokenizer has none.
    """
    if bos == "off" or (bos == "auto" and not adds_bos(tokenizer)):
        return []
    if tokenizer.bos_token_id is None:
        raise CalibrationError("bos=on: this tokenizer has no begin-of-text token; leave it at auto")
    return [tokenizer.bos_token_id]


def windows_digest(windows: Tensor) -> str:
    """SHA-256 of the token ids of windows, the same on every machine."""
    return hashlib.sha256(windows.cpu().contiguous().numpy().astype("<i8").tobytes()).hexdigest()


def _pool(documents: Documents, tokenizer: Any, generator: torch.Generator, enough: int, piece: int) -> list[int]:
    """Tokens of documents in seeded order, at most ``piece`` characters of each per round, until there are enough."""
    order = torch.randperm(documents.count, generator=generator).tolist()
    start = int(torch.randint(1 << 30, (), generator=generator))
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    tokens: list[int] = []
    unfinished = order
    for turn in itertools.count():
        remaining = []
        for index in unfinished:
            text = documents.read(index)
            pieces = -(-len(text) // piece)
            if turn < pieces:
                # Not always the beginning: documents tend to begin alike, with titles and licences.
                at = (start + turn) % pieces * piece
                ids = tokenizer(text[at : at + piece], add_special_tokens=False, verbose=False)["input_ids"]
                tokens += separator + ids if tokens else ids
                if len(tokens) >= enough:
                    return tokens
            if turn + 1 < pieces:
                remaining.append(index)
        if not remaining:
            break
        unfinished = remaining
    return tokens


def _open_text(settings: CalibrationSettings, render: Render) -> Documents:
    """The documents of one split of a text, read when asked for."""
    if settings.split not in ("train", "held-out"):
        raise CalibrationError(f"calibration split: got {settings.split!r}, wanted 'train' or 'held-out'")
    held_out = settings.split == "held-out"
    text = settings.text
    if text == "builtin":
        builtin = builtin_documents(settings.split)
        return Documents(len(builtin), lambda index: builtin[index].text)
    path = Path(text).expanduser()
    if is_data_set(text):
        return _data_set(_hub_text(text), held_out, _PIECE_CHARACTERS * settings.window_length, render)
    if path.suffix == ".jsonl":
        return json_lines(path, held_out, render)
    if path.suffix == ".txt":
        return text_file(path, held_out)
    if path.exists():
        raise CalibrationError(f"calibration text {text}: got a {path.suffix or 'nameless'} file, wanted .txt or .jsonl")
    names = ", ".join(["builtin", *HUB_TEXTS])
    raise UnknownNameError(
        f"no calibration text named {text!r}; known: {names}, a .txt or .jsonl file, or owner/name of a data set on the hub"
    )


def is_data_set(text: str) -> bool:
    """Whether a text is a data set: a folder, a short name, or a name that looks like one on the hub."""
    path = Path(text).expanduser()
    return path.is_dir() or text in HUB_TEXTS or (text.count("/") == 1 and not path.exists() and not path.suffix)


def data_set_rows(text: str, render: Render) -> list[str]:
    """The held-out rows of a data set as they are and in their order: its test split, or the end of its only one.

    Args:
        text: one that :func:`is_data_set` knows.
        render: writes chats.

    Raises:
        CalibrationError: a data set that cannot be loaded, or has no column of text.
    """
    rows, mine, column = _rows(_hub_text(text), held_out=True)
    return [_row(value, column, f"data set {text}", render) for value in rows[mine.start : mine.stop][column]]


def _hub_text(text: str) -> HubText:
    path = Path(text).expanduser()
    return HUB_TEXTS.get(text, HubText(str(path) if path.is_dir() else text, {}))


def _rows(source: HubText, held_out: bool) -> tuple[Any, range, str]:
    """The rows of a data set of Hugging Face, from the hub or a local folder; which of them, and their column of text."""
    try:
        import datasets
    except ImportError as error:
        raise CalibrationError(
            f"calibration text {source.path!r} is a data set: install the package that reads them, pip install 'moebius[data]'"
        ) from error
    folder = Path(source.path)
    try:
        if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
            loaded = datasets.load_from_disk(source.path)
        else:
            loaded = datasets.load_dataset(source.path, **source.arguments)
    except Exception as error:  # `datasets` passes on whatever the hub, the network or a file format raised
        raise CalibrationError(
            f"calibration text {source.path!r}: cannot load this data set ({first_line(error)}); "
            "give a .txt or .jsonl file instead"
        ) from error
    splits = loaded if isinstance(loaded, dict) else {"train": loaded}
    rows, mine = _split(splits, held_out, source.path)
    return rows, mine, source.column or _text_column(rows, source.path)


def _row(value: Any, column: str, where: str, render: Render) -> str:
    """The text of a row, which may be empty."""
    if value is None:
        return ""
    return row_text({"messages" if column == "messages" else "text": value}, where, render)


def _data_set(source: HubText, held_out: bool, piece: int, render: Render) -> Documents:
    """A data set as documents."""
    rows, mine, column = _rows(source, held_out)
    if source.separator is None:
        where = f"data set {source.path}"
        return Documents(len(mine), lambda index: _row(rows[mine[index]][column], column, where, render))

    # Rows that are lines: neighbours make one text of about one piece.
    sample = rows[mine.start : min(mine.start + 256, mine.stop)][column]
    per_text = max(1, piece * len(sample) // max(1, sum(map(len, sample))))
    separator = source.separator

    def read(index: int) -> str:
        start = mine.start + index * per_text
        return separator.join(rows[start : min(start + per_text, mine.stop)][column])

    return Documents(-(-len(mine) // per_text), read)


def _split(splits: dict[str, Any], held_out: bool, path: str) -> tuple[Any, range]:
    """The rows of a split, and which of them: a data set without a test split holds out the end of its train split."""
    own = next((name for name in ("test", "validation") if name in splits), None)
    if held_out and own:
        return splits[own], range(len(splits[own]))
    if "train" not in splits:
        raise CalibrationError(f"calibration text {path!r}: no split named 'train'; it has: {', '.join(splits)}")
    rows = splits["train"]
    return rows, range(len(rows)) if own else share(len(rows), held_out)


def _text_column(rows: Any, path: str) -> str:
    strings = [name for name, feature in rows.features.items() if getattr(feature, "dtype", None) in ("string", "large_string")]
    if "text" in strings:
        return "text"
    if "messages" in rows.features:
        return "messages"
    if len(strings) != 1:
        raise CalibrationError(
            f"calibration text {path!r}: no column named 'text' or 'messages', and {len(strings)} columns of strings "
            f"({', '.join(strings)}); write the text you mean to a .jsonl file"
        )
    return strings[0]
