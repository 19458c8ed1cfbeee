"""What a step reads is what was counted by hand, and clocks tick once per token. Nothing here says how fast anything is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.tiny import save_tiny, tiny_model
from torch import Tensor

from moebius.evaluate.plan import checkpoint_size
from moebius.evaluate.random_checkpoint import write_random_checkpoint
from moebius.evaluate.roofline import fastest, read_bandwidth, step_bytes
from moebius.evaluate.size import ModelSize, packed_checkpoint_size
from moebius.evaluate.speed import LOOPS, Seconds, SpeedSettings, measure_speed, warm_up
from moebius.recipe import Recipe

# Of the tiny OLMoE: hidden, inner, experts, top-k, layers, vocabulary, outputs of keys and of values.
HIDDEN, INNER, EXPERTS, TOP_K, LAYERS, WORDS, KEYS = 48, 40, 8, 2, 2, 257, 24
ATTENTION = 2 * HIDDEN * HIDDEN + 2 * KEYS * HIDDEN + HIDDEN + KEYS  # with the norms of queries and keys
REST = LAYERS * (ATTENTION + EXPERTS * HIDDEN + 2 * HIDDEN) + HIDDEN + WORDS * HIDDEN
EXPERT = 3 * HIDDEN * INNER


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("olmoe", tmp_path_factory.mktemp("models") / "olmoe")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, config = tmp_path_factory.mktemp("packed"), tiny_model("olmoe").config
    config.dtype = torch.bfloat16
    write_random_checkpoint(config, folder, Recipe.make("mobie"))
    return folder


def test_bytes_of_a_step_by_hand(original: Path) -> None:
    size, model = checkpoint_size(original), tiny_model("olmoe").bfloat16()
    read = step_bytes(size, model)
    assert read is not None
    assert read.experts == 2 * LAYERS * TOP_K * EXPERT
    assert read.shared_factors == 0
    assert read.rest == 2 * (REST + HIDDEN)  # and a row of the embedding
    assert read.total == read.experts + read.rest


def test_bytes_of_a_batch_by_hand(original: Path) -> None:
    size, model = checkpoint_size(original), tiny_model("olmoe").bfloat16()
    read = step_bytes(size, model, 3)
    assert read is not None
    # An expert is left alone by one token with 6 in 8, by three with its cube.
    assert read.experts == pytest.approx(2 * LAYERS * EXPERTS * EXPERT * (1 - 0.75**3))
    assert read.rest == 2 * (REST + 3 * HIDDEN)
    everybody = step_bytes(size, model, 10_000)
    assert everybody is not None
    assert everybody.experts == size.expert_bits / 8


def test_bytes_of_a_packed_model_are_those_of_info(packed: Path) -> None:
    size, model = packed_checkpoint_size(packed), tiny_model("olmoe").bfloat16()
    read = step_bytes(size, model)
    assert read is not None
    assert 8 * (read.experts + read.shared_factors) == sum(m.activated_bits(TOP_K) for m in size.experts)
    # 8-bit factors of rank 48 and 48, which all experts share, and a scale for each of their rows.
    assert 8 * read.shared_factors == sum(m.shared_bits for m in size.experts) > 0
    assert read.rest == 2 * (REST + HIDDEN)
    touched = read.total - 2 * HIDDEN + 2 * WORDS * HIDDEN
    assert 8 * touched == size.bits - (1 - TOP_K / EXPERTS) * (size.expert_bits - 8 * read.shared_factors)


def test_a_table_that_is_the_head_as_well_is_read(tmp_path: Path) -> None:
    folder = save_tiny("olmoe", tmp_path, tie_word_embeddings=True)
    read = step_bytes(checkpoint_size(folder), tiny_model("olmoe", tie_word_embeddings=True).bfloat16())
    assert read is not None
    assert read.rest == 2 * (REST + HIDDEN)


def test_no_top_k_no_roofline() -> None:
    assert step_bytes(ModelSize((), 1, 16, top_k=None), tiny_model("olmoe")) is None


def test_bandwidth_is_bytes_over_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moebius.evaluate.roofline._READ_BYTES", 4096)
    assert 0 < read_bandwidth() < 1e13
    calls: list[int] = []
    assert fastest(lambda: calls.append(1), 4) >= 0
    assert len(calls) == 5  # one to warm up


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_time_for_the_beginning_and_every_token(loop: str, batch: int) -> None:
    model = tiny_model("olmoe")
    ids = torch.arange(5 * batch).view(batch, 5)
    for new in (1, 7):
        times = LOOPS[loop](model, ids, new)
        assert len(times) == new + 1
        assert times == sorted(times)


@pytest.mark.parametrize("loop", LOOPS)
def test_an_end_of_text_does_not_end_a_measurement(loop: str) -> None:
    model = tiny_model("olmoe")
    # The first token that it likes best is its end of text.
    with torch.inference_mode():
        model.generation_config.eos_token_id = int(model(torch.arange(5)[None]).logits[0, -1].argmax())
    assert len(LOOPS[loop](model, torch.arange(5)[None], 6)) == 7


def test_what_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[tuple[tuple[int, ...], int]] = []

    def fake(model: object, ids: Tensor, new: int) -> list[float]:
        runs.append((tuple(ids.shape), new))
        return [0.0, 4.0, *(4.0 + 0.5 * step for step in range(1, new))]

    monkeypatch.setitem(LOOPS, "moebius", fake)
    settings = SpeedSettings(prompt=20, context=3, new=5, batch=2, repeats=2)
    warm_up(tiny_model("olmoe"), settings, "moebius")
    runs.clear()
    seconds = measure_speed(tiny_model("olmoe"), settings, "moebius")
    assert runs == [((2, 20), 1), ((2, 3), 5)] * 2
    assert seconds == Seconds((4.0, 4.0), (0.5, 0.5))


def test_rates_are_tokens_of_all_sequences_over_seconds() -> None:
    seconds = Seconds((2.0, 4.0, 1.0), (0.5, 0.25, 1.0))
    rates = seconds.to_dict(SpeedSettings(prompt=100, context=16, new=11, batch=4))
    assert rates["prompt"] == {"tokens_per_second": 200, "best_tokens_per_second": 400, "seconds": [2.0, 4.0, 1.0]}
    assert rates["decode"] == {"tokens_per_second": 8, "best_tokens_per_second": 16, "seconds": [0.5, 0.25, 1.0]}
    assert rates["request"] is None  # decoding did not follow these prompts
    whole = seconds.to_dict(SpeedSettings(prompt=100, context=100, new=11, batch=4))["request"]
    assert whole["seconds"] == [7.0, 6.5, 11.0]
    assert whole["tokens_per_second"] == 44 / 7
