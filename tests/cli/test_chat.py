"""Talking to a model, line by line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import byte_tokenizer, save_tiny
from typer.testing import CliRunner

from moebius.cli.app import app
from moebius.generation import complete
from moebius.generation.chat import Conversation
from moebius.runtime.generation import Session

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def talker(tmp_path: Path) -> Path:
    """A tiny model whose tokenizer has a chat template."""
    folder = save_tiny("olmoe", tmp_path / "talker")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def chat(model: Path, lines: str, *arguments: str) -> Any:
    result = CliRunner().invoke(app, ["chat", str(model), "--tokens", "8", *arguments], input=lines)
    assert result.exit_code == 0, result.output
    return result


def prompts_of(model: Path, lines: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[str]:
    """What the model was asked to continue, line after line."""
    seen, stream = [], Session.stream

    def spy(self: Session, ids: torch.Tensor, **options: Any) -> Any:
        seen.append(byte_tokenizer().decode(ids[0]))
        return stream(self, ids, **options)

    monkeypatch.setattr(Session, "stream", spy)
    chat(model, lines, *arguments)
    return seen


def test_turns_follow_the_template_with_all_that_was_said(talker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = prompts_of(talker, "one\n\ntwo\n", monkeypatch, "--system", "be brief")
    assert first == "<system>be brief</><user>one</><assistant>"
    assert second.startswith(first) and second.endswith("</><user>two</><assistant>")


def test_clear_forgets_and_quit_ends(talker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert prompts_of(talker, "one\n/clear\ntwo\n/quit\nthree\n", monkeypatch) == [
        "<user>one</><assistant>",
        "<user>two</><assistant>",
    ]


def test_without_a_template_the_text_goes_on(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = prompts_of(model, "def f(\nimport\n", monkeypatch)
    assert first == "def f(" and second.startswith("def f(") and second.endswith("import")


def test_answers_go_to_stdout_and_all_else_to_stderr(talker: Path) -> None:
    result = chat(talker, "one\n")
    assert "tokens/s" in result.stderr and "tokens/s" not in result.stdout
    assert "/quit" in result.stderr
    quiet = chat(talker, "one\n", "--quiet")
    assert quiet.stdout == result.stdout and quiet.stderr == ""


def test_an_answer_that_was_cut_short_is_remembered_as_far_as_it_went(talker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    streamer = complete._Pieces
    finalized, pieces = streamer.on_finalized_text, []

    def interrupt(self: complete._Pieces, text: str, stream_end: bool = False) -> None:
        finalized(self, text, stream_end)
        pieces.append(text)
        if len(pieces) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(streamer, "on_finalized_text", interrupt)
    _, second = prompts_of(talker, "one\ntwo\n", monkeypatch)
    assert second == f"<user>one</><assistant>{''.join(pieces[:3])}</><user>two</><assistant>"


def test_a_conversation_without_turns_begins_with_what_the_model_is_told() -> None:
    conversation = Conversation(byte_tokenizer(), "Once")
    assert byte_tokenizer().decode(conversation.ask("upon")[0]) == "Once\nupon"
