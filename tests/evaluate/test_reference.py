"""A stored reference says what the original says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.evaluate.test_evaluation import shaken, windows
from tests.tiny import tiny_model

from moebius.errors import CheckpointError, OutputError
from moebius.evaluate.distance import LikeliestTokens, WholeDistribution
from moebius.evaluate.evaluation import evaluate_model
from moebius.evaluate.protocol import EvaluationText
from moebius.evaluate.reference import REFERENCE_NAME, StoredReference, is_stored_reference, save_reference


@pytest.mark.parametrize(("top_k", "near"), [(None, 2e-3), (257, 1e-5), (200, 0.2)])
def test_a_stored_reference_stands_for_the_model(tmp_path: Path, top_k: int | None, near: float) -> None:
    original, text = tiny_model("olmoe"), EvaluationText("llama.cpp", "five chunks", windows(), first_target=7)
    save_reference(original, text, tmp_path / "reference", settings={}, top_k=top_k, batch_size=2)
    stored = StoredReference(tmp_path / "reference")
    other = shaken(original)
    got = evaluate_model(other, stored.text, reference=stored, batch_size=stored.batch_size)
    wanted = evaluate_model(other, text, reference=original, batch_size=2)
    assert got.kl == pytest.approx(wanted.kl, rel=near)
    # What is known of fewer tokens can only be nearer.
    assert top_k != 200 or got.kl < wanted.kl
    assert got.reference_perplexity == pytest.approx(wanted.reference_perplexity, rel=1e-6)
    assert got.perplexity == wanted.perplexity
    assert got.top1_agreement == wanted.top1_agreement
    assert got.routing_similarity == pytest.approx(wanted.routing_similarity, rel=1e-3)


def test_the_tail_counts_as_one_token() -> None:
    p, q = torch.tensor([[0.5, 0.3, 0.1, 0.1]]), torch.tensor([[0.25, 0.25, 0.4, 0.1]])
    top = LikeliestTokens.of(p.log(), 2)
    merged = WholeDistribution(torch.tensor([[0.5, 0.3, 0.2]]).log()).divergence(torch.tensor([[0.25, 0.25, 0.5]]).log())
    torch.testing.assert_close(top.divergence(q.log()), merged)
    assert LikeliestTokens.of(p.log(), 4).divergence(q.log()).item() == pytest.approx((p * (p / q).log()).sum().item())


def test_a_reference_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, text = tiny_model("olmoe"), EvaluationText("windows", "five windows", windows())

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("moebius.evaluate.reference.save_file", full)
        with pytest.raises(OutputError, match="No space left"):
            save_reference(original, text, tmp_path / "reference", settings={})
    assert list(tmp_path.iterdir()) == []
    save_reference(original, text, tmp_path / "reference", settings={})
    assert is_stored_reference(tmp_path / "reference")
    with pytest.raises(OutputError, match="exists"):
        save_reference(original, text, tmp_path / "reference", settings={})


def test_a_damaged_reference_is_refused(tmp_path: Path) -> None:
    text = EvaluationText("windows", "five windows", windows())
    save_reference(tiny_model("olmoe"), text, tmp_path / "reference", settings={})
    batch = tmp_path / "reference" / "batch-00000.safetensors"
    batch.write_bytes(batch.read_bytes()[:100])
    stored = StoredReference(tmp_path / "reference")
    with pytest.raises(CheckpointError, match="store the reference again"):
        evaluate_model(tiny_model("olmoe"), stored.text, reference=stored, batch_size=stored.batch_size)
    (tmp_path / "reference" / REFERENCE_NAME).write_text("[]")
    with pytest.raises(CheckpointError, match="not a stored reference"):
        StoredReference(tmp_path / "reference")
