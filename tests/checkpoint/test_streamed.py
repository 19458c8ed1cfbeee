"""A model that reads its weights when it uses them computes what a model in memory does, and holds next to nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.models.families import tiny
from tests.models.test_families import FAMILIES
from tests.tiny import save_tiny, tiny_model

from moebius.calibrate.layerwise import in_float32
from moebius.checkpoint.reader import SourceCheckpoint
from moebius.checkpoint.streamed import StreamedWeights
from moebius.errors import CheckpointError
from moebius.models.load import load_moe_model, skeleton
from moebius.types import MoeModel

IDS = torch.randint(0, 64, (2, 20), generator=torch.Generator().manual_seed(1))


def streamed(folder: Path) -> tuple[MoeModel, StreamedWeights]:
    checkpoint = SourceCheckpoint.open(folder)
    moe = skeleton(folder, checkpoint.dtype)
    return moe, StreamedWeights(checkpoint, moe)


def edited(folder: Path, **changes: torch.Tensor | None) -> Path:
    """The checkpoint with some tensors in place of others, names written with ``__`` for dots."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[name.replace("__", ".")]
        else:
            tensors[name.replace("__", ".")] = tensor
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def bytes_held(moe: MoeModel) -> int:
    tensors = [*moe.model.parameters(), *moe.model.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if not tensor.is_meta)


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_streaming_equals_loading(name: str, tmp_path: Path) -> None:
    """To the last bit: logits, every parameter and every buffer, those included that are never stored."""
    tiny(name).to(torch.bfloat16).save_pretrained(tmp_path)
    whole, (moe, weights) = load_moe_model(tmp_path).model, streamed(tmp_path)
    wanted, got = (model(input_ids=IDS, use_cache=False).logits for model in (whole, moe.model))
    assert torch.equal(got, wanted)
    buffers = dict(moe.model.named_non_persistent_buffers())
    for key, buffer in whole.named_non_persistent_buffers():
        assert buffers[key].dtype == buffer.dtype
        assert torch.equal(buffers[key], buffer)
    for key, value in whole.state_dict().items():
        assert (found := weights.load(key)).dtype == value.dtype
        assert torch.equal(found, value)


def test_little_is_held(tmp_path: Path) -> None:
    moe, weights = streamed(save_tiny("qwen2_moe", tmp_path))
    sizes = {name: 2 * p.numel() for name, p in tiny_model("qwen2_moe").named_parameters()}
    layer = sum(size for name, size in sizes.items() if name.startswith("model.layers.1."))
    outside = bytes_held(moe)
    assert outside < 2000
    with weights.layer(1):
        assert bytes_held(moe) == outside + layer
        with weights.layer(1):  # again, as a layer does that is run meanwhile
            assert bytes_held(moe) == outside + layer
        assert bytes_held(moe) == outside + layer
    assert bytes_held(moe) == outside
    moe.model(input_ids=IDS)
    assert bytes_held(moe) == outside
    experts = [name for name in sizes if ".experts." in name]
    with weights.layer(2, without=experts):
        assert moe.moe_layers[1].experts.get_parameter("down_proj").is_meta
        assert not moe.model.get_parameter("model.layers.2.mlp.gate.weight").is_meta


def test_a_layer_is_read_once_while_it_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moe, weights = streamed(save_tiny("olmoe", tmp_path))
    read: list[str] = []
    load = SourceCheckpoint.load
    monkeypatch.setattr(SourceCheckpoint, "load", lambda self, name: (read.append(name), load(self, name))[1])
    with weights.layer(0), weights.layer(1):
        moe.model(input_ids=IDS)
        moe.model(input_ids=IDS)
    assert len(read) == len(set(read))
    assert {name.split(".")[1] for name in read} == {"layers", "weight"}, "both layers and the head, no embeddings"


@torch.no_grad()
def test_weights_come_in_the_dtype_of_the_moment(tmp_path: Path) -> None:
    """Embeddings, head and layers follow a model that is turned to float32 for a while."""
    save_tiny("olmoe", tmp_path)
    whole, (moe, _) = load_moe_model(tmp_path).model, streamed(tmp_path)
    half = whole(input_ids=IDS).logits
    assert torch.equal(moe.model(input_ids=IDS).logits, half)
    with in_float32(whole), in_float32(moe.model):
        wanted = whole(input_ids=IDS).logits
        assert wanted.dtype == torch.float32
        assert torch.equal(moe.model(input_ids=IDS).logits, wanted)
    assert torch.equal(moe.model(input_ids=IDS).logits, half)


@torch.no_grad()
@pytest.mark.parametrize("stored", ["model.embed_tokens.weight", "lm_head.weight", "both", "both, not the same"])
def test_tied_weights(stored: str, tmp_path: Path) -> None:
    folder = save_tiny("qwen3_moe", tmp_path, tie_word_embeddings=True)
    embeddings = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    if stored == "lm_head.weight":
        edited(folder, model__embed_tokens__weight=None, lm_head__weight=embeddings)
    elif stored != "model.embed_tokens.weight":
        edited(folder, lm_head__weight=embeddings.clone() if stored == "both" else embeddings.flip(0))
    whole, (moe, _) = load_moe_model(folder).model, streamed(folder)
    assert torch.equal(moe.model(input_ids=IDS).logits, whole(input_ids=IDS).logits)
    assert moe.model.all_tied_weights_keys == whole.all_tied_weights_keys


def test_what_does_not_fit_is_refused_from_the_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny("olmoe", tmp_path)
    monkeypatch.setattr(SourceCheckpoint, "load", lambda self, name: pytest.fail(f"{name} was read"))
    gone = edited(folder, model__layers__1__mlp__gate__weight=None)
    with pytest.raises(CheckpointError, match=r"1 tensors are missing, such as model\.layers\.1\.mlp\.gate\.weight; fetch"):
        streamed(gone)
    wide = edited(folder, model__layers__1__mlp__gate__weight=torch.zeros(8, 47, dtype=torch.bfloat16))
    with pytest.raises(CheckpointError, match=r"mlp\.gate\.weight: got \(8, 47\), wanted \(8, 48\); is config"):
        streamed(wide)
    edited(folder, model__layers__1__mlp__gate__weight=torch.zeros(8, 48, dtype=torch.bfloat16))
    uneven = edited(folder, model__layers__0__mlp__experts__3__up_proj__weight=torch.zeros(40, 47, dtype=torch.bfloat16))
    with pytest.raises(CheckpointError, match=r"experts\.0\.gate_proj\.weight and those like it do not make .*gate_up_proj \("):
        streamed(uneven)


def test_experts_that_are_missing_one_are_refused(tmp_path: Path) -> None:
    folder = edited(save_tiny("olmoe", tmp_path), model__layers__0__mlp__experts__7__down_proj__weight=None)
    config = json.loads((folder / "config.json").read_text())
    assert config["num_experts"] == 8
    with pytest.raises(CheckpointError, match=r"experts\.down_proj: got \(7, 48, 40\), wanted \(8, 48, 40\)"):
        streamed(folder)
