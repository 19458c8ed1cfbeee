"""Evaluation protocols: which tokens of a text are shown to a model, and which of them are scored.

Perplexities can be laid beside each other only under one protocol. Two are those of published figures: ``gptq``, what papers
report since GPTQ (and MoBiE, KBVQ-MoE and BitsMoE with them), and ``llama.cpp``, its ``llama-perplexity`` tool.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moebius.calibrate.builtin_text import builtin_documents
from moebius.calibrate.tokens import HUB_TEXTS, calibration_windows, data_set_rows, is_data_set
from moebius.errors import CalibrationError, UnknownNameError
from moebius.recipe import CalibrationSettings

#: What joins documents that a text is made of: a blank line, as GPTQ's evaluation has it.
BLANK_LINE = "\n\n"


@dataclass(frozen=True)
class EvaluationText:
    """What a model is shown and scored on.

    Attributes:
        protocol: name of the protocol, and in ``description`` what it did.
        windows: token ids. (windows, window_length) int64
        first_target: position in a window of the first token that is scored; all after it are.
        independent: what the standard error of the perplexity takes as independent: ``windows`` or ``tokens``.
    """

    protocol: str
    description: str
    windows: Tensor
    first_target: int = 1
    independent: str = "windows"

    @property
    def targets_per_window(self) -> int:
        """How many tokens of a window are scored."""
        return self.windows.shape[1] - self.first_target


@dataclass(frozen=True)
class Protocol:
    """How a text becomes windows.

    Attributes:
        window_length: tokens per window unless told otherwise; fewer where the model has fewer positions.
        windows: how many unless told otherwise; None: all there are.
        make: from text, windows, window length, seed and tokenizer to what is scored.
    """

    window_length: int
    windows: int | None
    make: Callable[[str, int | None, int, int, Any], EvaluationText]


def evaluation_text(
    protocol: str,
    text: str,
    tokenizer: Any,
    *,
    windows: int | None = None,
    window_length: int | None = None,
    seed: int = 0,
    positions: int | None = None,
) -> EvaluationText:
    """The windows of a text under a protocol.

    Args:
        protocol: a key of :data:`PROTOCOLS`.
        text: as ``CalibrationSettings.text``; ``gptq`` and ``llama.cpp`` take the whole of a file, and the test split of a
            data set.
        tokenizer: of the model, from transformers.
        windows, window_length: None takes the protocol's own.
        seed: which windows ``windows`` draws; the others take them in order.
        positions: how many the model has, where that is known.

    Raises:
        UnknownNameError: no such protocol.
        CalibrationError: a window longer than the model's positions, or a text shorter than one window.
    """
    if protocol not in PROTOCOLS:
        raise UnknownNameError(f"no protocol named {protocol!r}; known: {', '.join(PROTOCOLS)}")
    spec = PROTOCOLS[protocol]
    if window_length is not None and positions is not None and window_length > positions:
        raise CalibrationError(
            f"--window-length {window_length}: the model has {positions} positions; ask for no more than that"
        )
    length = window_length or min(spec.window_length, positions or spec.window_length)
    return spec.make(text, windows if windows is not None else spec.windows, length, seed, tokenizer)


def _drawn(text: str, windows: int | None, length: int, seed: int, tokenizer: Any) -> EvaluationText:
    settings = CalibrationSettings(text=text, windows=windows or 1, window_length=length, seed=seed, split="held-out")
    tokens = calibration_windows(settings, tokenizer)
    return EvaluationText("windows", f"{len(tokens)} windows of {length} tokens, drawn by seed {seed}", tokens)


def _gptq(text: str, windows: int | None, length: int, seed: int, tokenizer: Any) -> EvaluationText:
    """``tokenizer("\\n\\n".join(rows))``, cut into consecutive windows; the rest at the end is dropped. Every token of a window
    but the first is scored (GPTQ's published evaluation code; the perplexity is the exponential of the mean over windows).
    """
    ids = _token_ids(tokenizer, BLANK_LINE.join(_documents(text, BLANK_LINE)))
    cut = _cut(ids, windows, length, text)
    return EvaluationText("gptq", f"{len(cut)} consecutive windows of {length} tokens, documents joined by blank lines", cut)


def _llama_cpp(text: str, windows: int | None, length: int, seed: int, tokenizer: Any) -> EvaluationText:
    """The whole text in chunks; the first token of each gives way to BOS where the tokenizer begins texts with it, and only
    tokens after the middle are scored, so that each has at least half a chunk before it (llama.cpp, tools/perplexity).
    """
    if length < 4:
        raise CalibrationError(
            f"--window-length {length}: llama.cpp's protocol scores the second half of a chunk; give 4 or more"
        )
    ids = _token_ids(tokenizer, "".join(_documents(text, "")))
    chunks = _cut(ids, windows, length, text).clone()
    bos = tokenizer.bos_token_id
    begins = bos is not None and len(ids) > 0 and int(ids[0]) == bos
    if begins:
        chunks[:, 0] = bos
    head = "BOS at the head of each" if begins else "no BOS, which this tokenizer does not add"
    description = f"{len(chunks)} chunks of {length} tokens, {head}, the second half of each scored"
    return EvaluationText("llama.cpp", description, chunks, first_target=length // 2 + 1, independent="tokens")


#: Protocol by name.
PROTOCOLS = {
    "windows": Protocol(256, 64, _drawn),
    "gptq": Protocol(2048, None, _gptq),
    "llama.cpp": Protocol(512, None, _llama_cpp),
}


def _token_ids(tokenizer: Any, text: str) -> Tensor:
    """The text as a whole, with what the tokenizer puts around a text."""
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)


def _cut(ids: Tensor, windows: int | None, length: int, text: str) -> Tensor:
    count = len(ids) // length
    if count < max(1, windows or 1):
        raise CalibrationError(
            f"evaluation text {text!r}: found {len(ids)} tokens, wanted {max(1, windows or 1)} windows of {length}; "
            "give a longer text, or ask for fewer or shorter windows"
        )
    count = count if windows is None else windows
    return ids[: count * length].view(count, length)


def _documents(text: str, separator: str) -> list[str]:
    """The documents of a text, whole. Rows of a data set are taken as they are: those of WikiText end their lines themselves.
    Documents that are not lines of one file are kept apart by a blank line under either protocol.
    """
    if text == "builtin":
        documents = [document.text for document in builtin_documents("held-out")]
    elif is_data_set(text):
        rows = data_set_rows(text)
        if HUB_TEXTS.get(text) is not None and HUB_TEXTS[text].separator is not None:
            return rows
        documents = rows
    else:
        path = Path(text).expanduser()
        documents = _json_rows(path) if path.suffix == ".jsonl" else [_read(path)]
    return documents if separator else [BLANK_LINE.join(documents)]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"evaluation text {path}: cannot be read as UTF-8 ({error}); convert it first") from error


def _json_rows(path: Path) -> list[str]:
    rows = []
    for number, line in enumerate(_read(path).splitlines(), 1):
        if line.strip():
            try:
                rows.append(json.loads(line)["text"])
            except (ValueError, KeyError, TypeError) as error:
                raise CalibrationError(
                    f"evaluation text {path}: line {number} is not a JSON object with a 'text' field"
                ) from error
    return rows
