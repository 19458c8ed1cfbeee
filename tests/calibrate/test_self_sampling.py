"""Windows that a model writes: the beam search of MoEQuant Eq. 13 and 14, against one without a cache or running sums."""

from __future__ import annotations

import pytest
import torch
from tests.tiny import ARCHITECTURES, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from moebius.calibrate.self_sampling import balanced_windows
from moebius.errors import UnsupportedModelError
from moebius.models.load import describe

HEAD = [256]


def imbalance(model: PreTrainedModel, ids: Tensor) -> tuple[float, Tensor]:
    """``σ`` of one sequence (Eq. 3, 4) by the experts that its tokens chose, and the log-probabilities of all its tokens."""
    chosen: list[Tensor] = []
    experts = [layer.experts for layer in describe(model).moe_layers]
    hooks = [module.register_forward_pre_hook(lambda _, args: chosen.append(args[1])) for module in experts]
    with torch.no_grad():
        likely = model(input_ids=ids.unsqueeze(0), use_cache=False).logits[0].float().log_softmax(1)
    for hook in hooks:
        hook.remove()
    deviations = []
    for index in chosen:
        shares = torch.bincount(index.flatten(), minlength=8).double() / index.numel()
        deviations.append(float(((shares - 1 / 8).square().sum() / 7).sqrt()))
    return sum(deviations) / len(deviations), likely


def searched(model: PreTrainedModel, begin: list[int], length: int, branches: int, temperature: float) -> list[int]:
    """The window that begins so: every candidate is scored from the whole of its text."""
    beams = [torch.tensor(begin)]
    while len(beams[0]) < length:
        scores = {}
        for beam in beams:
            sigma, likely = imbalance(model, beam)
            so_far = sum(float(likely[place, beam[place + 1]]) for place in range(len(begin) - 1, len(beam) - 1))
            for token, more in enumerate(likely[-1].tolist()):
                scores[(*beam.tolist(), token)] = -(so_far + more) / (len(beam) + 1) + sigma / temperature
        beams = [torch.tensor(text) for text in sorted(scores, key=lambda text: scores[text])[:branches]]

    def final(beam: Tensor) -> float:
        sigma, likely = imbalance(model, beam)
        return sigma / temperature - sum(float(likely[p, beam[p + 1]]) for p in range(len(begin) - 1, length - 1)) / length

    return min(beams, key=final).tolist()


@pytest.mark.parametrize(("name", "temperature"), [("olmoe", 1.2), ("olmoe", 0.02), ("qwen2_moe", 0.1)])
def test_the_search_is_that_of_the_paper(name: str, temperature: float) -> None:
    model = tiny_model(name).eval()
    got = balanced_windows(describe(model), 3, 7, head=HEAD, seed=5, branches=3, temperature=temperature)
    assert got.shape == (3, 7) and got[:, 0].tolist() == 3 * HEAD
    for window in got.tolist():
        assert window == searched(model, window[:2], 7, 3, temperature)


def test_windows_differ_by_their_first_tokens_and_repeat_with_the_seed() -> None:
    moe = describe(tiny_model("olmoe").train())
    first = balanced_windows(moe, 20, 5, head=[], seed=1)
    assert len(first[:, 0].unique()) == 20
    assert torch.equal(first, balanced_windows(moe, 20, 5, head=[], seed=1))
    assert not torch.equal(first, balanced_windows(moe, 20, 5, head=[], seed=2))
    assert moe.model.training


def test_experts_are_used_more_evenly_the_more_that_counts() -> None:
    model = tiny_model("olmoe").eval()
    spread = {}
    for temperature in (1e-3, 1e3):
        windows = balanced_windows(describe(model), 6, 12, head=[], seed=0, temperature=temperature)
        spread[temperature] = sum(imbalance(model, window)[0] for window in windows)
    assert spread[1e-3] < 0.9 * spread[1e3]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_writes_or_says_why_not(name: str) -> None:
    try:
        windows = balanced_windows(describe(tiny_model(name)), 2, 6, head=HEAD, seed=0)
    except UnsupportedModelError as error:
        assert "self_sampling=false" in str(error)
    else:
        assert windows.shape == (2, 6) and 0 <= int(windows.min()) <= int(windows.max()) < 257
