"""Evaluation protocols: which tokens of a text are shown to a model, and which of them are scored.

Perplexities can be laid beside each other only under one protocol. Two are those of published figures: ``gptq``, what papers
report since GPTQ (and MoBiE, KBVQ-MoE and BitsMoE with them), and ``llama.cpp``, its ``llama-perplexity`` tool.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moebius.calibrate.builtin_text import builtin_documents
from moebius.calibrate.text_files import chat_template, whole_file, whole_rows
from moebius.calibrate.tokens import HUB_TEXTS, begins_with, calibration_windows, data_set_rows, is_data_set
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
    make: Callable[[Wanted, Any], EvaluationText]


@dataclass(frozen=True)
class Wanted:
    """What is asked of a protocol.

    Attributes:
        text: as :func:`evaluation_text`.
        windows: how many; None: all there are.
        length: tokens per window.
        bos: whether windows begin with the begin-of-text token: ``auto`` (where the tokenizer adds it), ``on``, ``off``.
    """

    text: str
    windows: int | None
    length: int
    seed: int
    bos: str


def evaluation_text(
    protocol: str,
    text: str,
    tokenizer: Any,
    *,
    windows: int | None = None,
    window_length: int | None = None,
    seed: int = 0,
    bos: str = "auto",
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
        bos: of ``windows`` and ``llama.cpp``; ``gptq`` takes a text as the tokenizer gives it.
        positions: how many the model has, where that is known: a protocol's own windows are no longer than that.

    Raises:
        UnknownNameError: no such protocol.
        CalibrationError: a text shorter than one window.
    """
    if protocol not in PROTOCOLS:
        raise UnknownNameError(f"no protocol named {protocol!r}; known: {', '.join(PROTOCOLS)}")
    spec = PROTOCOLS[protocol]
    length = window_length or min(spec.window_length, positions or spec.window_length)
    return spec.make(Wanted(text, windows if windows is not None else spec.windows, length, seed, bos), tokenizer)


def _drawn(wanted: Wanted, tokenizer: Any) -> EvaluationText:
    settings = CalibrationSettings(wanted.text, wanted.windows or 1, wanted.length, wanted.seed, "held-out", wanted.bos)
    tokens = calibration_windows(settings, tokenizer)
    return EvaluationText("windows", f"{len(tokens)} windows of {wanted.length} tokens, drawn by seed {wanted.seed}", tokens)


def _gptq(wanted: Wanted, tokenizer: Any) -> EvaluationText:
    """``tokenizer("\\n\\n".join(rows))``, cut into consecutive windows; the rest at the end is dropped. Every token of a window
    but the first is scored (GPTQ's published evaluation code; the perplexity is the exponential of the mean over windows).
    """
    if wanted.bos != "auto":
        raise CalibrationError(f"bos={wanted.bos}: the gptq protocol takes a text as the tokenizer gives it; leave it at auto")
    ids = _token_ids(tokenizer, BLANK_LINE.join(_documents(wanted.text, BLANK_LINE, tokenizer)))
    cut = _cut(ids, wanted)
    description = f"{len(cut)} consecutive windows of {wanted.length} tokens, documents joined by blank lines"
    return EvaluationText("gptq", description, cut)


def _llama_cpp(wanted: Wanted, tokenizer: Any) -> EvaluationText:
    """The whole text in chunks; the first token of each gives way to BOS where the tokenizer begins texts with it, and only
    tokens after the middle are scored, so that each has at least half a chunk before it (llama.cpp, tools/perplexity).
    """
    length = wanted.length
    if length < 4:
        raise CalibrationError(f"--window-length {length}: llama.cpp's protocol scores half of a chunk; give 4 or more")
    chunks = _cut(_token_ids(tokenizer, "".join(_documents(wanted.text, "", tokenizer))), wanted).clone()
    begins = begins_with(tokenizer, wanted.bos)
    if begins:
        chunks[:, 0] = begins[0]
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


def _cut(ids: Tensor, wanted: Wanted) -> Tensor:
    windows, length, text = wanted.windows, wanted.length, wanted.text
    count = len(ids) // length
    if count < max(1, windows or 1):
        raise CalibrationError(
            f"evaluation text {text!r}: found {len(ids)} tokens, wanted {max(1, windows or 1)} windows of {length}; "
            "give a longer text, or ask for fewer or shorter windows"
        )
    count = count if windows is None else windows
    return ids[: count * length].view(count, length)


def _documents(text: str, separator: str, tokenizer: Any) -> list[str]:
    """The documents of a text, whole. Rows of a data set are taken as they are: those of WikiText end their lines themselves.
    Documents that are not lines of one file are kept apart by a blank line under either protocol.
    """
    render = chat_template(tokenizer)
    if text == "builtin":
        documents = [document.text for document in builtin_documents("held-out")]
    elif is_data_set(text):
        rows = data_set_rows(text, render)
        if HUB_TEXTS.get(text) is not None and HUB_TEXTS[text].separator is not None:
            return rows
        documents = rows
    else:
        path = Path(text).expanduser()
        documents = whole_rows(path, render) if path.suffix == ".jsonl" else [whole_file(path)]
    return documents if separator else [BLANK_LINE.join(documents)]
