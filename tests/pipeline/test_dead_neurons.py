"""Neurons that do nothing, as in checkpoints padded to a round width, take nothing from those that do: in every method."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.tiny import byte_tokenizer, tiny_model
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM, PreTrainedModel

from moebius import CalibrationSettings, Recipe, quantize_model
from moebius.table import METHODS

INNER, PADDING = 40, 16


def padded(plain: PreTrainedModel) -> PreTrainedModel:
    """The same function with more neurons in every expert, all of them zero."""
    model = tiny_model("olmoe", intermediate_size=INNER + PADDING)
    state = plain.state_dict()
    for name, weight in list(state.items()):
        if name.endswith("experts.gate_up_proj"):
            state[name] = torch.cat([pad(half, (0, 0, 0, PADDING)) for half in weight.chunk(2, 1)], 1)
        if name.endswith("experts.down_proj"):
            state[name] = pad(weight, (0, PADDING))
    model.load_state_dict(state)
    return model


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    plain = tiny_model("olmoe", intermediate_size=INNER)
    folders = {}
    for name, model in (("plain", plain), ("padded", padded(plain))):
        folders[name] = tmp_path_factory.mktemp("sources") / name
        model.to(torch.bfloat16).save_pretrained(folders[name])
        byte_tokenizer().save_pretrained(folders[name])
    return folders


@torch.inference_mode()
def log_probabilities(folder: Path) -> torch.Tensor:
    ids = torch.randint(0, 256, (8, 32), generator=torch.Generator().manual_seed(0))
    logits: torch.Tensor = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
    return logits.log_softmax(-1)


@pytest.mark.parametrize("method", METHODS)
def test_padded_experts_are_quantized_as_well(sources: dict[str, Path], method: str, tmp_path: Path) -> None:
    bits = {"rtn": 3, "gptq": 3, "bitsmoe": 3, "moebius": 2}.get(method)
    divergence = {}
    for name, source in sources.items():
        recipe, settings = Recipe.make(method, bits), CalibrationSettings(windows=4, window_length=64)
        quantize_model(source, tmp_path / name, recipe, settings)
        original, packed = log_probabilities(source), log_probabilities(tmp_path / name)
        divergence[name] = float((original.exp() * (original - packed)).sum(-1).mean())
    assert divergence["padded"] < 1.25 * divergence["plain"] + 0.002, divergence
