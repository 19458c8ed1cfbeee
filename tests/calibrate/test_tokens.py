"""Windows from every kind of text: distinct, drawn by seed, from the right split, and never from more text than needed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tests.tiny import byte_tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from moebius.calibrate import text_files, tokens
from moebius.calibrate.tokens import HubText, calibration_windows, windows_digest
from moebius.errors import CalibrationError, MoebiusError, UnknownNameError
from moebius.recipe import CalibrationSettings

TOKENIZER = byte_tokenizer()
END = TOKENIZER.eos_token_id


def windows_of(text: str | Path, windows: int = 4, window_length: int = 32, **options: Any) -> Tensor:
    return calibration_windows(CalibrationSettings(str(text), windows, window_length, **options), TOKENIZER)


def numbered(first: int, count: int) -> str:
    """Text of which every 8 characters say where they are."""
    return "".join(f"{n:07d} " for n in range(first, first + count))


def places(window: Tensor) -> list[int]:
    """The numbers that are whole in a window."""
    return [int(piece) for piece in TOKENIZER.decode(window).split() if len(piece) == 7]


def test_builtin_text_and_seed() -> None:
    first = windows_of("builtin", windows=8, window_length=128)
    assert first.shape == (8, 128)
    assert first.dtype == torch.int64
    assert len({tuple(w.tolist()) for w in first}) == 8
    again, other = (windows_of("builtin", windows=8, window_length=128, seed=seed) for seed in (0, 1))
    assert torch.equal(first, again)
    assert windows_digest(first) == windows_digest(again) != windows_digest(other)


def test_builtin_splits_have_no_window_in_common() -> None:
    train, held_out = (windows_of("builtin", windows=64, window_length=64, split=split) for split in ("train", "held-out"))
    assert not {tuple(w.tolist()) for w in train} & {tuple(w.tolist()) for w in held_out}


def test_digest_is_that_of_the_ids() -> None:
    ids = torch.arange(6).view(2, 3)
    assert windows_digest(ids) == windows_digest(ids.clone())
    assert windows_digest(ids) != windows_digest(ids.flip(0))


def test_text_file_windows_do_not_overlap(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(numbered(0, 1000))
    drawn = windows_of(file, windows=200, window_length=32)
    numbers = [n for window in drawn for n in places(window)]
    assert len(numbers) == len(set(numbers)) >= 500
    assert max(numbers) < 950  # the last twentieth is held out
    held_out = [n for window in windows_of(file, windows=12, split="held-out") for n in places(window)]
    assert min(held_out) >= 949
    assert max(held_out) > 990


def test_whole_text_can_be_asked_for(tmp_path: Path) -> None:
    """2,000 characters, of which 1,900 are in the train split: 59 windows of 32, and not one more."""
    file = tmp_path / "text.txt"
    file.write_text("x" * 2000)
    assert windows_of(file, windows=59).shape == (59, 32)
    with pytest.raises(CalibrationError, match=r"found 1900 tokens, wanted 1920 \(60 windows of 32\); give a longer text"):
        windows_of(file, windows=60)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("héllo wörld ".encode("utf-16") * 400, "is UTF-16; convert it first"),
        ("héllo wörld ".encode("utf-16-le") * 400, "holds NUL bytes"),
        ("hello wörld ".encode("latin-1") * 400, r"byte 7 \(0xf6\) is no UTF-8"),
        (b"\x1f\x8b" + b"x" * 4000, "compressed by gzip"),
        (b"PAR1" + b"x" * 4000, "is parquet"),
    ],
)
@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_what_is_no_text_is_refused(data: bytes, said: str, suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"text.{suffix}"
    file.write_bytes(data)
    with pytest.raises(CalibrationError, match=said):
        windows_of(file)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    plain, marked = tmp_path / "plain.txt", tmp_path / "marked.txt"
    plain.write_bytes("héllo wörld ".encode() * 400)
    marked.write_bytes(b"\xef\xbb\xbf" + plain.read_bytes())
    assert torch.equal(windows_of(plain), windows_of(marked))


def test_characters_across_the_borders_of_pieces_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "_CHUNK", 7)
    (tmp_path / "text.txt").write_text(text := "wörld €uro 𝄞 " * 40)
    pieces = [text_files.text_file(tmp_path / "text.txt", held_out) for held_out in (False, True)]
    assert "".join(part.read(index) for part in pieces for index in range(part.count)) == text


def test_chats_are_written_by_the_template(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    row = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "wörld"}]}
    file = tmp_path / "chats.jsonl"
    file.write_text((json.dumps(row) + "\n") * 40)
    with pytest.raises(CalibrationError, match=r"line \d+: is a chat .* no chat template"):
        calibration_windows(CalibrationSettings(text=str(file), windows=4, window_length=32), tokenizer)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    windows = calibration_windows(CalibrationSettings(text=str(file), windows=8, window_length=64), tokenizer)
    assert "<user>hello<assistant>wörld" in tokenizer.decode(windows.flatten())
    tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    with pytest.raises(CalibrationError, match="the chat template refuses its messages"):
        calibration_windows(CalibrationSettings(text=str(file), windows=4, window_length=32), tokenizer)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"instruction": "a", "output": "b"}', r"got 'instruction', 'output', wanted a string under 'text' or a chat"),
        ('"just a string"', "got str, wanted an object"),
        ('{"text": 5}', "got 'text', wanted a string"),
        ('[{"text": "a"}]', "is a JSON array"),
        ("{half", "is not JSON"),
        ("[" * 100_000, "is a JSON array"),
        ('{"text":' + "[" * 100_000, "is not JSON"),
    ],
)
def test_rows_of_other_shapes_are_refused_by_line(line: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text((line + "\n") * 40)
    with pytest.raises(CalibrationError, match=said):
        windows_of(tmp_path / "rows.jsonl")


def test_windows_begin_with_bos_where_the_tokenizer_adds_it(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("hello world " * 400)
    adds = byte_tokenizer()
    adds.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", END)]
    )
    for split in ("train", "held-out"):
        settings = CalibrationSettings(text=str(tmp_path / "text.txt"), windows=4, window_length=32, split=split)
        plain, begun = calibration_windows(settings, byte_tokenizer()), calibration_windows(settings, adds)
        assert plain.shape == begun.shape == (4, 32)
        assert bool((begun[:, 0] == END).all()) and not bool((plain[:, 0] == END).all())
        off = dataclasses.replace(settings, bos="off")
        assert torch.equal(calibration_windows(off, adds), plain)
        on = dataclasses.replace(settings, bos="on")
        assert torch.equal(calibration_windows(on, byte_tokenizer()), begun)


@pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl", "short.txt", "short.jsonl", "blank.jsonl"])
def test_too_short(name: str, tmp_path: Path) -> None:
    contents = {"short.txt": "hello", "short.jsonl": '{"text": "hello"}\n', "blank.jsonl": "\n\n"}
    (tmp_path / name).write_text(contents.get(name, ""))
    for split in ("train", "held-out"):
        with pytest.raises(CalibrationError, match=r"found \d tokens, wanted 128"):
            windows_of(tmp_path / name, split=split)


def write_lines(file: Path, documents: list[str]) -> Path:
    file.write_text("".join(json.dumps({"text": text, "other": 1}) + "\n\n" for text in documents))
    return file


def test_json_lines_are_joined_by_the_end_of_text(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "text.jsonl", ["a" * 11, "b" * 11, "c" * 11, "d" * 11])
    ids = windows_of(file, windows=1, window_length=47).flatten().tolist()
    assert [i for i, token in enumerate(ids) if token == END] == [11, 23, 35]
    for start in (0, 12, 24, 36):
        assert len(set(ids[start : start + 11])) == 1


def test_json_lines_hold_out_the_last_documents(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "text.jsonl", [chr(ord("A") + n) * 100 for n in range(40)])
    held_out = TOKENIZER.decode(windows_of(file, windows=3, split="held-out").flatten())
    assert set(held_out) - set("<|endoftext|>") == {"g", "h"}
    train = TOKENIZER.decode(windows_of(file, windows=119, split="train").flatten(), skip_special_tokens=True)
    assert not {"g", "h"} & set(train)


def test_a_tokenizer_without_end_of_text(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "text.jsonl", ["a" * 11, "b" * 11])
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    ids = calibration_windows(CalibrationSettings(str(file), 1, 22), tokenizer).flatten()
    assert sorted(TOKENIZER.decode(ids)) == sorted("a" * 11 + "b" * 11)


@pytest.mark.parametrize("line", ["{", "[1]", '{"content": "x"}', '{"text": 3}'])
def test_bad_json_line(line: str, tmp_path: Path) -> None:
    file = tmp_path / "text.jsonl"
    file.write_text('{"text": "ok"}\n' + line + "\n")
    with pytest.raises(CalibrationError, match="2"):
        windows_of(file)


class CountingTokenizer:
    """Counts the characters it is given."""

    eos_token_id = bos_token_id = END
    chat_template = None

    def __init__(self) -> None:
        self.characters = 0

    def __call__(self, text: str, **options: Any) -> Any:
        self.characters += len(text)
        return TOKENIZER(text, **options)


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_long_texts_are_not_tokenized_as_a_whole(kind: str, tmp_path: Path) -> None:
    file = tmp_path / f"text.{kind}"
    if kind == "txt":
        file.write_text(numbered(0, 1_000_000))
    else:
        write_lines(file, [numbered(n * 5000, 5000) for n in range(200)])
    counting = CountingTokenizer()
    drawn = calibration_windows(CalibrationSettings(str(file), 16, 64), counting)
    assert counting.characters <= 8 * 16 * 64 + 64 * 64
    numbers = [n for window in drawn for n in places(window)]
    assert max(numbers) - min(numbers) > 200_000  # from all over the text


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "disk"])
def test_data_set_in_a_folder(kind: str, tmp_path: Path) -> None:
    rows = {
        split: datasets.Dataset.from_dict({"text": [c * 50 for _ in range(40)]}) for split, c in (("train", "a"), ("test", "b"))
    }
    for split, data in rows.items():
        if kind == "parquet":
            data.to_parquet(tmp_path / "set" / f"{split}.parquet")
        if kind == "jsonl":
            (tmp_path / "set").mkdir(exist_ok=True)
            data.to_json(tmp_path / "set" / f"{split}.jsonl")
    if kind == "disk":
        datasets.DatasetDict(rows).save_to_disk(tmp_path / "set")
    for split, letter in (("train", "a"), ("held-out", "b")):
        text = TOKENIZER.decode(windows_of(tmp_path / "set", split=split).flatten(), skip_special_tokens=True)
        assert set(text) == {letter}


def test_data_set_with_one_split_holds_out_its_end(tmp_path: Path) -> None:
    data = datasets.Dataset.from_dict({"body": ["a" * 50] * 95 + ["b" * 50] * 5, "label": [0] * 100})
    data.to_parquet(tmp_path / "set" / "train.parquet")
    for split, letter in (("train", "a"), ("held-out", "b")):
        text = TOKENIZER.decode(windows_of(tmp_path / "set", split=split).flatten(), skip_special_tokens=True)
        assert set(text) == {letter}


def test_rows_that_are_lines_are_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A short name whose rows are sentences: neighbours stay neighbours, and end of text is rare."""
    data = datasets.Dataset.from_dict({"sentence": [f"{n:07d} ends" for n in range(2000)]})
    data.to_parquet(tmp_path / "set" / "train.parquet")
    monkeypatch.setitem(tokens.HUB_TEXTS, "ptb", HubText(str(tmp_path / "set"), {}, "sentence", separator="\n"))
    drawn = windows_of("ptb", windows=20, window_length=64)
    assert int((drawn == END).sum()) < 5
    neighbours = [(a, b) for window in drawn for a, b in zip(places(window), places(window)[1:], strict=False)]
    assert len(neighbours) > 20
    assert sum(b == a + 1 for a, b in neighbours) >= len(neighbours) - 5


def test_short_names_ask_for_the_right_thing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def load_dataset(path: str, **arguments: Any) -> Any:
        asked.append((path, arguments))
        column = "sentence" if "ptb" in path else "text"
        return datasets.DatasetDict({"train": datasets.Dataset.from_dict({column: ["word " * 100] * 20})})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in ("wikitext2", "c4", "ptb", "redpajama", "someone/something"):
        assert windows_of(name).shape == (4, 32)
    assert [path for path, _ in asked] == [
        "Salesforce/wikitext",
        "allenai/c4",
        "ptb-text-only/ptb_text_only",
        "togethercomputer/RedPajama-Data-1T-Sample",
        "someone/something",
    ]
    assert asked[0][1] == {"name": "wikitext-2-raw-v1"}


def test_data_set_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(CalibrationError, match="cannot load this data set") as caught:
        windows_of("moebius-tests/no-such-data-set")
    assert "\n" not in str(caught.value)


def test_columns_that_leave_it_open(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"question": ["a"] * 40, "answer": ["b"] * 40}).to_parquet(tmp_path / "set" / "train.parquet")
    with pytest.raises(CalibrationError, match=r"2 columns of strings \(question, answer\)"):
        windows_of(tmp_path / "set")


@pytest.mark.parametrize(
    ("text", "error", "match"),
    [
        ("missing.txt", CalibrationError, "No such file"),
        ("missing.jsonl", CalibrationError, "No such file"),
        ("image.png", CalibrationError, r"got a \.png file, wanted \.txt or \.jsonl"),
        ("wikitext", UnknownNameError, "no calibration text named .*; known: builtin, wikitext2, c4, ptb, redpajama, a .txt"),
    ],
)
def test_unknown_texts(
    text: str, error: type[MoebiusError], match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "image.png").write_bytes(b"x")
    with pytest.raises(error, match=match):
        windows_of(text)


def test_impossible_settings() -> None:
    with pytest.raises(CalibrationError, match="at least 1 window of 2"):
        windows_of("builtin", windows=0)
    with pytest.raises(CalibrationError, match="wanted 'train' or 'held-out'"):
        windows_of("builtin", split="test")
