"""Perplexity, KL, agreement and routing similarity against hand calculation and their own laws."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from tests.tiny import tiny_model
from torch import Tensor, nn

from moebius.errors import CalibrationError, CheckpointError, ShapeError, UnsupportedModelError
from moebius.evaluate.evaluation import evaluate_model
from moebius.evaluate.routing import recorded_router_logits, routing_similarity


def windows(count: int = 5, length: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(0, 257, (count, length), generator=torch.Generator().manual_seed(seed))


def shaken(model: nn.Module, by: float = 0.05) -> nn.Module:
    """A copy whose expert weights are off by some noise."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "experts" in name and parameter.ndim == 3:
                parameter += by * torch.randn(parameter.shape, generator=generator)
    return other


class Unigram(nn.Module):
    """Predicts the same distribution everywhere."""

    def __init__(self, probabilities: list[float]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(probabilities).log())

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


def test_perplexity_of_a_known_distribution() -> None:
    # Targets are every token but the first: 1, 1, 2 with probabilities 1/4, 1/4, 1/4 and 0, 2, 2 with 1/2, 1/4, 1/4.
    result = evaluate_model(Unigram([0.5, 0.25, 0.25]), torch.tensor([[0, 1, 1, 2], [2, 0, 2, 2]]))
    assert result.tokens == 6
    assert result.perplexity == pytest.approx(2 ** (11 / 6), rel=1e-6)
    losses = torch.tensor([2.0, 5 / 3], dtype=torch.float64) * math.log(2)
    assert result.perplexity_error == pytest.approx(result.perplexity * losses.std().item() / math.sqrt(2), rel=1e-6)
    assert result.kl is None and result.top1_agreement is None and result.routing_similarity == []


def test_kl_and_agreement_of_known_distributions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moebius.evaluate.reference.describe", lambda model: SimpleNamespace(moe_layers=()))
    model, reference = Unigram([0.1, 0.6, 0.3]), Unigram([0.5, 0.25, 0.25])
    result = evaluate_model(model, torch.tensor([[0, 1, 2]]), reference=reference)
    # Σ p log p/q, which is another number the other way round.
    assert result.kl == pytest.approx(0.5 * math.log(5) + 0.25 * math.log(0.25 / 0.6) + 0.25 * math.log(0.25 / 0.3), rel=1e-6)
    assert result.top1_agreement == 0.0
    assert result.reference_perplexity == pytest.approx(4.0, rel=1e-6)
    assert result.perplexity_error is None  # one window has no spread


def test_a_token_the_reference_forbids_adds_nothing_to_kl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moebius.evaluate.reference.describe", lambda model: SimpleNamespace(moe_layers=()))
    result = evaluate_model(Unigram([0.25, 0.75, 0.0]), torch.tensor([[0, 1, 1]]), reference=Unigram([0.5, 0.5, 0.0]))
    assert result.kl == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), rel=1e-6)


@pytest.mark.parametrize("name", ["olmoe", "qwen2_moe", "deepseek_v2", "gpt_oss", "mixtral", "nemotron_h"])
def test_a_model_against_itself(name: str) -> None:
    model = tiny_model(name)
    result = evaluate_model(model, windows(), reference=copy.deepcopy(model), batch_size=2)
    assert result.kl == 0.0
    assert result.top1_agreement == 1.0
    assert result.routing_similarity and result.routing_similarity == pytest.approx([1.0] * len(result.routing_similarity))
    assert result.reference_perplexity == pytest.approx(result.perplexity, rel=1e-6)


def test_a_damaged_model_shows_in_every_figure() -> None:
    model = tiny_model("olmoe")
    little, much = (evaluate_model(shaken(model, by), windows(), reference=model) for by in (0.02, 0.3))
    assert 0 < little.kl < much.kl
    assert 1 >= little.top1_agreement > much.top1_agreement
    assert 1 > little.mean_routing_similarity > much.mean_routing_similarity
    # The first router sees what no expert has touched yet.
    assert much.routing_similarity[0] == pytest.approx(1.0)


def test_batches_do_not_matter() -> None:
    model = tiny_model("olmoe")
    other = shaken(model)
    one, all_ = (evaluate_model(other, windows(), reference=model, batch_size=size) for size in (1, 5))
    for a, b in zip(one.to_dict().values(), all_.to_dict().values(), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_agrees_with_transformers_loss() -> None:
    model, ids = tiny_model("olmoe"), windows()
    with torch.no_grad():
        loss = nn.functional.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert evaluate_model(model, ids).perplexity == pytest.approx(loss.exp().item(), rel=1e-5)


def test_routing_similarity_by_hand() -> None:
    # Softmax of (0, log 3) is (1/4, 3/4); of (log 3, 0) its mirror image: cosine 2·(3/16) / (10/16).
    got = routing_similarity(torch.tensor([[0.0, math.log(3)]]), torch.tensor([[math.log(3), 0.0]]))
    assert got.item() == pytest.approx(0.6)


@pytest.mark.parametrize("name", ["olmoe", "gpt_oss"])
def test_recorded_logits_are_the_routers_own(name: str) -> None:
    model = tiny_model(name)
    router_name = "model.layers.0.mlp." + ("router" if name == "gpt_oss" else "gate")
    own = []
    model.get_submodule(router_name).register_forward_hook(lambda module, inputs, output: own.append(output[0]))
    with torch.no_grad(), recorded_router_logits(model, {router_name: 8}) as logits:
        model(input_ids=windows())
    torch.testing.assert_close(logits[router_name], own[0])


def test_hooks_are_gone_afterwards() -> None:
    model = tiny_model("olmoe")
    evaluate_model(model, windows(1), reference=model)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_router_without_weight_speaks_through_its_output() -> None:
    class Packed(nn.Module):
        def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
            return hidden[..., :8] * 2, torch.zeros(1, dtype=torch.int64)

    model = nn.Sequential(Packed())
    hidden = torch.randn(2, 3, 16)
    with recorded_router_logits(model, {"0": 8}) as logits:
        model(hidden)
    assert torch.equal(logits["0"], hidden.flatten(0, 1)[:, :8] * 2)


def test_what_cannot_be_compared_is_refused() -> None:
    model = tiny_model("olmoe")
    with pytest.raises(ShapeError, match="vocabulary"):
        evaluate_model(model, windows() % 200, reference=tiny_model("olmoe", vocab_size=200))
    with pytest.raises(UnsupportedModelError, match="no router"):
        evaluate_model(Unigram([1 / 257] * 257), windows(), reference=model)
    for shape in ((0, 12), (3, 1)):
        with pytest.raises(CalibrationError, match="wanted at least 1 window"):
            evaluate_model(model, torch.zeros(shape, dtype=torch.int64))


def test_nan_weights_are_refused() -> None:
    model = tiny_model("olmoe")
    with torch.no_grad():
        model.get_output_embeddings().weight[3] = float("nan")
    with pytest.raises(CheckpointError, match="wanted a finite one"):
        evaluate_model(model, windows())


@pytest.mark.parametrize("name", ["olmoe", "qwen2_moe", "deepseek_v2", "gpt_oss"])
def test_routing_of_one_model_with_the_weights_of_another(name: str) -> None:
    original = tiny_model(name)
    shifted = copy.deepcopy(original)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for router in (module for path, module in shifted.named_modules() if path.endswith((".gate", ".router"))):
            router.weight += torch.randn(router.weight.shape, generator=generator)
    apart = evaluate_model(shifted, windows(), reference=original)
    # Only its routers differ: routed as the original, it is the original.
    together = evaluate_model(shifted, windows(), reference=original, routing_from=original)
    assert apart.kl > 0.01 and together.kl == pytest.approx(0, abs=1e-9)
    damaged = shaken(original, 0.3)
    alone = evaluate_model(damaged, windows(), reference=original)
    guided = evaluate_model(damaged, windows(), reference=original, routing_from=original)
    assert 0 < guided.kl < alone.kl
    assert not any(module._forward_pre_hooks for module in damaged.modules())
