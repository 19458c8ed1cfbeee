"""The protocols against independent re-implementations of the programs whose figures they are to equal."""

from __future__ import annotations

import inspect
import json
import math
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny import byte_tokenizer, tiny_model
from tokenizers.processors import TemplateProcessing

from moebius.errors import CalibrationError, UnknownNameError
from moebius.evaluate.evaluation import evaluate_model
from moebius.evaluate.protocol import evaluation_text


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "source.txt"
    path.write_text(inspect.getsource(textwrap)[:3000])
    return path


def bos_tokenizer() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 256)]
    )
    return tokenizer


def log_softmax(row: np.ndarray) -> np.ndarray:
    shifted = row.astype(np.float64) - row.max()
    return shifted - math.log(np.exp(shifted).sum())


@torch.no_grad()
def logits_of(model: Any, ids: list[int]) -> np.ndarray:
    return model(input_ids=torch.tensor([ids])).logits[0].numpy()


def gptq_perplexity(model: Any, ids: list[int], length: int) -> float:
    """As GPTQ's script has it: mean loss of a window times its length, summed, divided by all tokens."""
    losses = []
    for window in range(len(ids) // length):
        part = ids[window * length : (window + 1) * length]
        logits = logits_of(model, part)
        loss = np.mean([-log_softmax(logits[i])[part[i + 1]] for i in range(length - 1)])
        losses.append(loss * length)
    return math.exp(sum(losses) / (len(losses) * length))


def llama_cpp_figures(model: Any, base: Any, ids: list[int], n_ctx: int, bos: int | None) -> dict[str, float]:
    """As llama-perplexity counts: per chunk ``n_ctx - 1 - n_ctx / 2`` tokens from the middle on, sums of squares for errors."""
    nll = nll2 = kld = kld2 = same = 0.0
    count, all_kld = 0, []
    for chunk in range(len(ids) // n_ctx):
        part = ids[chunk * n_ctx : (chunk + 1) * n_ctx]
        if bos is not None:
            part = [bos, *part[1:]]
        logits, base_logits = logits_of(model, part), logits_of(base, part)
        first = n_ctx // 2
        for i in range(first, n_ctx - 1):
            q, p = log_softmax(logits[i]), log_softmax(base_logits[i])
            value, divergence = -q[part[i + 1]], float((np.exp(p) * (p - q)).sum())
            nll, nll2, kld, kld2 = nll + value, nll2 + value**2, kld + divergence, kld2 + divergence**2
            same += float(q.argmax() == p.argmax())
            all_kld.append(divergence)
            count += 1
    mean, mean_kld, share = nll / count, kld / count, same / count
    all_kld.sort()
    return {
        "perplexity": math.exp(mean),
        "perplexity_error": math.exp(mean) * math.sqrt((nll2 / count - mean**2) / (count - 1)),
        "kl": mean_kld,
        "kl_error": math.sqrt((kld2 / count - mean_kld**2) / (count - 1)),
        "kl_99": float(np.percentile(all_kld, 99)),
        "kl_999": float(np.percentile(all_kld, 99.9)),
        "top1_agreement": share,
        "top1_error": math.sqrt(share * (1 - share) / (count - 1)),
        "tokens": count,
    }


def test_gptq_equals_an_independent_implementation(text: Path) -> None:
    model, tokenizer = tiny_model("olmoe"), byte_tokenizer()
    shown = evaluation_text("gptq", str(text), tokenizer, window_length=96)
    assert shown.windows.shape == (3000 // 96, 96)
    got = evaluate_model(model, shown)
    assert got.perplexity == pytest.approx(gptq_perplexity(model, tokenizer(text.read_text())["input_ids"], 96), rel=1e-5)


@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize("length", [64, 65])
def test_llama_cpp_equals_an_independent_implementation(text: Path, begins: bool, length: int) -> None:
    model, base = tiny_model("olmoe"), tiny_model("olmoe")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj.mul_(1.3)
    tokenizer = bos_tokenizer() if begins else byte_tokenizer()
    shown = evaluation_text("llama.cpp", str(text), tokenizer, window_length=length)
    assert bool((shown.windows[:, 0] == 256).all()) is begins
    assert ("no BOS" in shown.description) is not begins
    got = evaluate_model(model, shown, reference=base)
    ids = tokenizer(text.read_text())["input_ids"]
    wanted = llama_cpp_figures(model, base, ids, length, 256 if begins else None)
    for name, value in wanted.items():
        assert getattr(got, name) == pytest.approx(value, rel=2e-4), name


def test_rows_are_joined_as_each_program_joins_them(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in ("one", "two", "three")))
    shown = evaluation_text("gptq", str(path), byte_tokenizer(), windows=1, window_length=15)
    assert byte_tokenizer().decode(shown.windows[0]) == "one\n\ntwo\n\nthree"


def test_rows_of_a_data_set_of_lines_are_taken_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    from moebius.calibrate import tokens

    rows = ["", " = Title = \n", "", " A line . \n"]
    split = datasets.Dataset.from_dict({"text": rows})
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(tmp_path / "wiki")
    monkeypatch.setitem(tokens.HUB_TEXTS, "wikitext2", tokens.HubText(str(tmp_path / "wiki"), {}, "text", separator="\n"))
    for protocol, joined in (("gptq", "\n\n".join(rows)), ("llama.cpp", "".join(rows))):
        shown = evaluation_text(protocol, "wikitext2", byte_tokenizer(), windows=1, window_length=len(joined))
        assert byte_tokenizer().decode(shown.windows[0]) == joined


def test_windows_are_as_long_as_the_model_allows(text: Path) -> None:
    assert evaluation_text("gptq", str(text), byte_tokenizer(), positions=256).windows.shape[1] == 256
    with pytest.raises(CalibrationError, match="the model has 256 positions"):
        evaluation_text("gptq", str(text), byte_tokenizer(), window_length=512, positions=256)


def test_what_cannot_be_measured_is_refused(text: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"known: windows, gptq, llama\.cpp"):
        evaluation_text("gtpq", str(text), byte_tokenizer())
    with pytest.raises(CalibrationError, match="found 3000 tokens, wanted 40 windows of 100"):
        evaluation_text("gptq", str(text), byte_tokenizer(), windows=40, window_length=100)
    with pytest.raises(CalibrationError, match="found 3000 tokens, wanted 1 windows of 4096"):
        evaluation_text("gptq", str(text), byte_tokenizer(), window_length=4096)
    with pytest.raises(CalibrationError, match="give 4 or more"):
        evaluation_text("llama.cpp", str(text), byte_tokenizer(), window_length=3)
