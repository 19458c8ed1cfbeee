"""One test per assumption about the inside of transformers, and nothing of the package reaches past the one module."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.tiny import save_tiny, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, OlmoeForCausalLM
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer

import moebius
from moebius import private_transformers as private

ROOT = Path(moebius.__file__).parent
#: Documented: for quantizers, streamers, logging and configs of one's own.
PUBLIC = {"transformers.utils.quantization_config", "transformers.quantizers.auto", "transformers.quantizers.base"}
PUBLIC |= {"transformers.generation.streamers", "transformers.utils"}
#: Attributes of models, modules and configs that transformers keeps to itself.
ATTRIBUTES = ("_is_hf_initialized", "_weight_conversions", "_is_quantized", "hf_quantizer", "_commit_hash", "_apply_gate")
ATTRIBUTES += ("_attn_implementation", "_keys_to_ignore_on_load_unexpected", "all_tied_weights_keys")


def reaching(root: Path) -> list[str]:
    """Files that reach into transformers without the seam: imports, and attributes in code (not in comments)."""
    found = []
    for path in sorted(root.rglob("*.py")):
        if path.name == "private_transformers.py":
            continue
        tree = ast.parse(path.read_text())
        modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
        private_modules = {m for m in modules if m.startswith("transformers.") and m not in PUBLIC}
        names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        names |= {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
        found += [f"{path.relative_to(root)}: {name}" for name in sorted(private_modules | (names & set(ATTRIBUTES)))]
    return found


def test_one_module_reaches_into_transformers() -> None:
    assert reaching(ROOT) == []


def test_what_reaches_past_it_is_found(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("from transformers.cache_utils import Cache\nmodule._apply_gate(x)\n'_commit_hash'\n")
    assert reaching(tmp_path) == ["bad.py: _apply_gate", "bad.py: _commit_hash", "bad.py: transformers.cache_utils"]


def test_the_quantizer_registers_from_the_middle_of_transformers_imports() -> None:
    code = "import moebius; from transformers import PreTrainedModel; import transformers.quantizers.auto as auto"
    code += "; assert 'moebius' in auto.AUTO_QUANTIZER_MAPPING"
    done = subprocess.run([sys.executable, "-W", "error::RuntimeWarning", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_layers_of_a_cache_are_in_a_list_and_hold_keys_and_values() -> None:
    model = tiny_model("olmoe")
    output = model(input_ids=torch.arange(5)[None], use_cache=True)
    cache = getattr(output, "past_key_values", None) or output.cache
    assert isinstance(cache, private.DynamicCache) and isinstance(cache, private.Cache)
    layer = cache.layers[0]
    assert type(layer) is private.DynamicLayer and layer.keys.shape == layer.values.shape == (1, 2, 5, 12)
    layer.update(layer.keys, layer.values)
    assert layer.keys.shape[2] == 10
    empty = private.DynamicLayer()
    empty.lazy_initialization(layer.keys, layer.values)
    assert empty.is_initialized


def test_attention_functions_are_registered_by_name() -> None:
    model, calls = tiny_model("olmoe"), []
    assert private.attention_of(model) == "sdpa"

    def attend(*arguments: object, **options: object) -> object:
        calls.append(1)
        return private.sdpa_attention_forward(*arguments, **options)

    private.register_attention("counted", attend)
    expected = model(input_ids=torch.arange(5)[None]).logits
    model.set_attn_implementation("counted")
    assert torch.equal(model(input_ids=torch.arange(5)[None]).logits, expected) and len(calls) == 2
    assert private.attention_of(model) == "counted"


def test_hooks_of_transformers_come_from_one_module() -> None:
    model = tiny_model("olmoe")
    model(input_ids=torch.arange(3)[None], output_router_logits=True)  # puts them there
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    assert hooks and all(private.is_capturing_hook(hook) for hook in hooks)
    assert not private.is_capturing_hook(lambda *_: None)


def test_experts_have_a_gate() -> None:
    experts = next(m for m in tiny_model("olmoe").modules() if hasattr(m, "gate_up_proj"))
    states = torch.randn(3, 80)
    left, right = states.chunk(2, dim=-1)
    assert torch.allclose(private.gate(experts)(states), nn.functional.silu(left) * right)


def test_what_is_marked_is_not_initialized(tmp_path: Path) -> None:
    model = tiny_model("olmoe")
    linear = model.model.layers[0].self_attn.q_proj
    other = model.model.layers[1].self_attn.q_proj
    for module in (linear, other):
        nn.init.constant_(module.weight, 7.0)
        for value in (module, module.weight):
            value._is_hf_initialized = False
    private.mark_initialized(linear)
    private.mark_initialized(linear.weight)
    model.initialize_weights()
    assert (linear.weight == 7).all() and not (other.weight == 7).all()


def test_a_model_knows_its_quantizer_and_registration_finds_its_table(tmp_path: Path) -> None:
    from tests.packed import save_packed_tiny

    folder = save_packed_tiny("olmoe", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(private.quantizer_of(model), HfQuantizer)
    assert private.quantizer_of(tiny_model("olmoe")) is None
    assert model.config._is_quantized  # what a plain model must not have
    model._weight_conversions = []
    private.forget_quantization(model)
    assert not hasattr(model.config, "_is_quantized") and "_weight_conversions" not in vars(model)
    assert importlib.util.find_spec("transformers.quantizers.auto") is not None
    assert "moebius" in auto.AUTO_QUANTIZER_MAPPING and "moebius" in auto.AUTO_QUANTIZATION_CONFIG_MAPPING


def test_unexpected_names_are_ignored_by_pattern(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_tiny("olmoe", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "model.surplus": torch.zeros(1), "model.other": torch.zeros(1)}, folder / "model.safetensors")

    class Ignoring(OlmoeForCausalLM):
        def __init__(self, config: object) -> None:
            super().__init__(config)
            private.ignore_unexpected(self, r"^model\.surplus$")

    _, report = Ignoring.from_pretrained(folder, output_loading_info=True)
    assert set(report["unexpected_keys"]) == {"model.other"}


def test_ties_are_names_of_parameters() -> None:
    tied = tiny_model("olmoe", tie_word_embeddings=True)
    assert dict(private.ties_of(tied)) == {"lm_head.weight": "model.embed_tokens.weight"}
    assert not private.ties_of(tiny_model("olmoe"))


def test_a_tie_can_be_undone() -> None:
    tied = tiny_model("olmoe", tie_word_embeddings=True)
    private.untie(tied, "lm_head.weight")
    assert not private.ties_of(tied)


def test_classes_say_in_which_dtype_their_parameters_are_loaded() -> None:
    model = tiny_model("olmoe").to(torch.bfloat16)
    assert set(private.loaded_dtypes(model).values()) == {torch.bfloat16}
    model._keep_in_fp32_modules_strict = {"gate"}
    wide = {name for name, dtype in private.loaded_dtypes(model).items() if dtype == torch.float32}
    assert "model.layers.0.mlp.gate.weight" in wide and all("gate" in name for name in wide)


def test_classes_say_what_a_checkpoint_may_lack() -> None:
    model = tiny_model("olmoe")
    assert private.must_be_stored(model, ["lm_head.weight"]) == {"lm_head.weight"}
    model._keys_to_ignore_on_load_missing = [r"^lm_head"]
    assert private.must_be_stored(model, ["lm_head.weight"]) == set()


def test_stored_names_are_renamed_and_fused_by_transformers_own_tables() -> None:
    model = tiny_model("mixtral")
    transforms = private.get_model_conversion_mapping(model)
    converters = [t for t in transforms if isinstance(t, private.WeightConverter)]
    renamings = [t for t in transforms if isinstance(t, private.WeightRenaming)]
    state = model.state_dict()
    name = "model.layers.0.block_sparse_moe.experts.3.w1.weight"
    target, pattern = private.rename_source_key(name, renamings, converters, model.base_model_prefix, state)
    assert target == "model.layers.0.mlp.experts.gate_up_proj"
    assert pattern in {p for converter in converters for p in converter.source_patterns}
    assert sorted(["a.10", "a.9"], key=private.dot_natural_key) == ["a.9", "a.10"]
    renaming = private.WeightRenaming(r"^old\.", "new.")
    assert isinstance(renaming.compiled_sources, re.Pattern) and renaming.rename_source_key("old.x")[0] == "new.x"


def test_files_of_the_hub_are_fetched_by_name(tmp_path: Path) -> None:
    (tmp_path / "there.json").write_text("{}")
    assert private.fetched_file(str(tmp_path), "there.json", object()) == str(tmp_path / "there.json")
    assert private.fetched_file(str(tmp_path), "missing.json", object()) is None


def test_the_report_of_a_load_that_failed_is_held_by_the_frame_that_raised(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_tiny("olmoe", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "model.norm.weight": torch.zeros(3)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError) as caught:
        AutoModelForCausalLM.from_pretrained(folder)
    assert "model.norm.weight" in (private.loading_report(caught.value) or "")
    assert private.loading_report(ValueError("another")) is None
