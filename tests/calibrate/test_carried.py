"""What layers hand on beside the hidden state: routers' states, picks of indexers, shared keys and values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.models.families import tiny
from torch import Tensor, nn

from moebius.calibrate.layerwise import LayerRunner, calibrating, check_layerwise, frozen
from moebius.calibrate.observe import observed
from moebius.calibrate.states import HiddenStates, LayerState
from moebius.calibrate.stream import stream_statistics
from moebius.errors import UnsupportedModelError
from moebius.models.load import describe
from moebius.types import CalibrationNeeds, MoeModel

CARRYING = ("zaya", "glm_moe_dsa", "gemma4_text")
IDS = torch.randint(0, 64, (2, 20), generator=torch.Generator().manual_seed(1))


def states(moe: MoeModel) -> list[LayerState]:
    runner = LayerRunner(moe)
    found = [runner.embed(IDS)]
    for index in range(len(moe.decoder)):
        found.append(runner.layer(index, IDS, found[-1]))
    return found


def test_each_kind_is_carried() -> None:
    places = {}
    for name in CARRYING:
        moe = describe(tiny(name))
        with torch.no_grad(), frozen(moe):
            places[name] = {place[0] for state in states(moe) for place in state.carried}
    assert places["zaya"] == {"returned"}
    assert places["glm_moe_dsa"] == {"returned"}
    assert places["gemma4_text"] == {"shared_kv_states"}


@pytest.mark.parametrize("name", CARRYING)
def test_the_gradient_comes_back_by_every_way(name: str) -> None:
    """The layer-by-layer gradient at what the down projections put out is that of the whole model."""
    moe = describe(tiny(name))
    request = CalibrationNeeds(True, output_fisher=True)
    got = {stats.name: stats.down.output_fisher for stats in stream_statistics(moe, IDS, request, batch_size=1)}
    whole = fisher_of_the_whole(moe)
    assert set(whole) == set(got)
    for layer, wanted in whole.items():
        found = got[layer]
        assert found is not None
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


def fisher_of_the_whole(moe: MoeModel) -> dict[str, Tensor]:
    """Σ δ δᵀ from one graph of the whole model, a window at a time."""
    predicted = IDS[:, 1:].numel()
    sums: dict[str, Tensor] = {}
    for window in IDS.split(1):
        with calibrating(moe), observed(moe.moe_layers) as seen:
            # Weights are frozen: the graph has to begin somewhere.
            embeddings = moe.model.get_input_embeddings()
            assert isinstance(embeddings, nn.Module)
            hook = embeddings.register_forward_hook(lambda _, __, output: output.detach().requires_grad_())
            try:
                logits = moe.model(input_ids=window, use_cache=False).logits[:, :-1]
            finally:
                hook.remove()
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten(), reduction="sum") / predicted
            deltas = torch.autograd.grad(loss, [observation.outputs["down"] for _, observation in seen])
        for (layer, _), delta in zip(seen, deltas, strict=True):
            sums[layer.name] = sums.get(layer.name, 0) + delta.T @ delta
    return sums


def test_states_on_disk_come_back_whole(tmp_path: Path) -> None:
    state = LayerState(torch.randn(2, 3), {("returned", 1): torch.arange(4), ("kv", "a", 0): torch.randn(2).bool()})
    kept = HiddenStates(tmp_path)
    kept.put("1", 0, state)
    got = kept.pop("1", 0)
    assert list(got.tensors()) == list(state.tensors())
    for place, tensor in state.tensors().items():
        assert torch.equal(got.tensors()[place], tensor)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_carried_is_refused_before_any_layer() -> None:
    moe = describe(tiny("inkling2_text"))  # its layers are given the outputs of several before
    with pytest.raises(UnsupportedModelError, match=r"Inkling2ForCausalLM: model.layers .* layer by layer") as refused:
        next(stream_statistics(moe, IDS, CalibrationNeeds(inputs=True)))
    assert "\n" not in str(refused.value)


def test_a_layer_that_fails_alone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    moe = describe(tiny("olmoe"))
    ran: list[str] = []
    first, last = moe.decoder[0].forward, moe.decoder[2].forward
    monkeypatch.setattr(moe.decoder[0], "forward", lambda *args, **kwargs: (ran.append("first"), first(*args, **kwargs))[1])

    def after_the_first(*args: object, **kwargs: object) -> object:
        if not ran:
            raise KeyError("first")
        return last(*args, **kwargs)

    monkeypatch.setattr(moe.decoder[2], "forward", after_the_first)
    hook = moe.model.register_forward_pre_hook(lambda *_: ran.clear())
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.2 cannot be run layer by layer .*KeyError"):
        check_layerwise(moe, IDS)
    hook.remove()


def test_a_model_that_does_not_run_at_all_says_why_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    moe = describe(tiny("olmoe"))
    monkeypatch.setattr(moe.decoder[1], "forward", lambda *args, **kwargs: [][0])
    with pytest.raises(IndexError):
        check_layerwise(moe, IDS)
