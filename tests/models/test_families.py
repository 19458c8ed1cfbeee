"""Every family of transformers with fused experts, tiny: it runs layer by layer and packs, or is refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.models.families import families, tiny
from tests.tiny import byte_tokenizer
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moebius.calibrate.layerwise import LayerRunner, check_layerwise, frozen
from moebius.errors import UnsupportedModelError
from moebius.models.load import describe, skeleton
from moebius.pipeline import quantize_model
from moebius.recipe import CalibrationSettings, Recipe

#: Their config has towers for pictures and sound, whose defaults are those of a whole model.
NOT_SMALL = {
    "dots3_note": "holds two towers at the size of their defaults",
    "gemma4": "holds two towers at the size of their defaults",
    "qwen3_5_moe": "holds a tower at the size of its defaults",
    "qwen4_exp": "holds a tower at the size of its defaults",
}

#: What their layers are given is made of the outputs of several layers before.
NOT_BY_LAYER = {"inkling2_text", "inkling2_loop_text"}

FAMILIES = [name for name in families() if name not in NOT_SMALL]
IDS = torch.randint(0, 64, (2, 20), generator=torch.Generator().manual_seed(1))


def test_the_families_are_those_of_transformers() -> None:
    assert len(FAMILIES) > 50
    assert {"zaya", "gemma4_text", "glm_moe_dsa", "olmoe"} < set(FAMILIES)


@pytest.mark.parametrize("name", FAMILIES)
def test_family_packs_at_eight_bits(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    model.save_pretrained(tmp_path / "original")
    byte_tokenizer().save_pretrained(tmp_path / "original")
    recipe = Recipe.make("rtn", 8)
    quantize_model(tmp_path / "original", tmp_path / "packed", recipe, CalibrationSettings())
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32).eval()
    with torch.no_grad():
        wanted, got = (m(input_ids=IDS, use_cache=False).logits for m in (model, packed))
    # The median: a token whose experts were all but tied may go to others.
    error = ((got - wanted).norm(dim=-1) / wanted.norm(dim=-1)).median()
    assert 0 < error < 0.05


@pytest.mark.parametrize("name", FAMILIES)
def test_family_runs_layer_by_layer(name: str) -> None:
    moe = describe(tiny(name))
    assert all(layer.router is not None for layer in moe.moe_layers)
    if name in NOT_BY_LAYER:
        with pytest.raises(UnsupportedModelError, match=r"^[^\n]*layer by layer[^\n]*--method rtn$"):
            check_layerwise(moe, IDS)
        return
    check_layerwise(moe, IDS)
    with torch.no_grad(), frozen(moe):
        wanted, runner = moe.model(input_ids=IDS, use_cache=False).logits, LayerRunner(moe)
        state = runner.embed(IDS)
        for index in range(len(moe.decoder)):
            state = runner.layer(index, IDS, state)
        torch.testing.assert_close(runner.logits(IDS, state), wanted)


@pytest.mark.parametrize("model_type", ["aria", "mistral4", "openai_privacy_filter"])
def test_other_classes_are_refused_in_one_line(model_type: str) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"^{model_type}: not a causal [^\n]*not packed yet[^\n]*$"):
        skeleton(CONFIG_MAPPING[model_type]())
