"""A packed checkpoint is opened rightly by every program and every class, or not at all."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.packed import save_packed_tiny
from tests.tiny import ARCHITECTURES, byte_tokenizer
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    OlmoeForCausalLM,
    PreTrainedModel,
)

import moebius
from moebius.checkpoint.manifest import MANIFEST_NAME, verify, write_manifest
from moebius.checkpoint.shards import read_folder
from moebius.errors import CheckpointError, OutputError, UnsupportedModelError
from moebius.hf.hashes import HASHES

IDS = torch.arange(8)[None]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_packed_tiny("olmoe", tmp_path_factory.mktemp("opening"), everything=True)


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "copy"))


def load(folder: Path, **options: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )


LOAD = "from transformers import {kind}; print(type({kind}.from_pretrained({folder!r})).__name__)"


# --- without `import moebius` ---------------------------------------------------------------------------------------------


def test_opens_without_import(packed: Path) -> None:
    done = python(
        LOAD.format(kind="AutoModelForCausalLM", folder=str(packed)) + "; import sys; assert 'moebius' in sys.modules"
    )
    assert done.stdout == "OlmoeForCausalLM\n", done.stderr


def test_start_costs_no_import() -> None:
    done = python("import sys; print({'moebius', 'torch', 'transformers', 'numpy'} & sys.modules.keys(), sys.meta_path)")
    assert done.stdout.startswith("set()") and "RegisterWhenImported" in done.stdout and not done.stderr


def test_a_package_that_cannot_be_imported_does_not_stop_transformers() -> None:
    broken = "import sys; sys.modules['moebius'] = None"  # an import of it fails from now on
    done = python(f"{broken}; import transformers.quantizers.auto as a; print(len(a.AUTO_QUANTIZER_MAPPING))")
    assert done.returncode == 0 and int(done.stdout) > 5 and "packed checkpoints will not load" in done.stderr


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_without_moebius_loading_raises(name: str, tmp_path: Path) -> None:
    """The guard of every parameter that is packed, in what the writer and in what ``save_pretrained`` writes."""
    folder = save_packed_tiny(name, tmp_path, everything=True)
    load(folder).save_pretrained(tmp_path / "again")
    modules = json.loads((folder / "config.json").read_text())["quantization_config"]["modules"]
    wanted = {module if "factor" in spec else f"{module}.weight" for module, spec in modules.items()}
    for written in (folder, tmp_path / "again"):
        guards = {n for n, tensor in read_folder(written, guards=True).items() if tensor.is_guard}
        assert guards == wanted
        assert sum(t.end - t.begin for n, t in read_folder(written, guards=True).items() if n in guards) == 0


@pytest.mark.parametrize("kind", ["AutoModelForCausalLM", "AutoModel"])
def test_turned_off_it_raises(packed: Path, kind: str) -> None:
    done = python(LOAD.format(kind=kind, folder=str(packed)), MOEBIUS_REGISTER="0")
    assert done.returncode == 1 and done.stdout == "" and "ignore_mismatched_sizes" in done.stderr


@pytest.mark.parametrize("kept", ["mlp.experts.down_proj", "shared_expert.up_proj.weight", "mlp.gate.weight"])
def test_each_guard_alone_is_enough(tmp_path: Path, kept: str) -> None:
    """Experts, packed linear layers and packed routers: none may be random."""
    folder = save_packed_tiny("qwen2_moe", tmp_path, everything=True)
    found = 0
    for path in folder.glob("packed-*.safetensors"):
        tensors = {n: t for n, t in load_file(path).items() if t.numel() or n.endswith(kept)}
        found += sum(not t.numel() for t in tensors.values())
        save_file(tensors, path, {"format": "pt"})
    done = python(LOAD.format(kind="AutoModelForCausalLM", folder=str(folder)), MOEBIUS_REGISTER="0")
    assert found and done.returncode == 1 and done.stdout == "" and "ignore_mismatched_sizes" in done.stderr


def test_written_before_there_were_guards(copy: Path, packed: Path) -> None:
    for path in copy.glob("packed-*.safetensors"):
        save_file({n: t for n, t in load_file(path).items() if t.numel()}, path, {"format": "pt"})
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    there = read_folder(packed).keys()
    index["weight_map"] = {n: f for n, f in index["weight_map"].items() if n in there}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    assert verify(copy, hashes=True) == len(there)
    assert torch.equal(logits(load(copy)), logits(load(packed)))


# --- experts that the config leaves out -----------------------------------------------------------------------------------


def leave_out(folder: Path, layer: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    modules = config["quantization_config"]["modules"]
    config["quantization_config"]["modules"] = {path: spec for path, spec in modules.items() if layer not in path}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("guards", [True, False])
def test_a_layer_that_modules_leaves_out(copy: Path, guards: bool) -> None:
    if not guards:
        for path in copy.glob("packed-*.safetensors"):
            save_file({n: t for n, t in load_file(path).items() if t.numel()}, path, {"format": "pt"})
        index = json.loads((copy / "model.safetensors.index.json").read_text())
        there = {n for path in copy.glob("*.safetensors") for n in load_file(path)}
        index["weight_map"] = {n: f for n, f in index["weight_map"].items() if n in there}
        (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    leave_out(copy, "layers.1.mlp.experts")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts\.gate_up_proj: .*leaves it out"):
        load(copy)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts\.\w+_proj: .*leaves it out"):
        moebius.verify(copy)


def test_all_modules_left_out(copy: Path) -> None:
    leave_out(copy, "layers")
    for opens in (load, moebius.verify):
        with pytest.raises(CheckpointError, match=r"no packed `modules`|leaves it out"):
            opens(copy)


# --- the class that it is loaded with -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["olmoe", "qwen3_next", "gpt_oss", "nemotron_h"])
def test_base_model(name: str, tmp_path: Path) -> None:
    folder = save_packed_tiny(name, tmp_path, everything=True)
    base, whole = AutoModel.from_pretrained(folder, dtype=torch.float32), load(folder)
    with torch.no_grad():
        wanted = whole.base_model(IDS).last_hidden_state
        assert torch.equal(base(IDS).last_hidden_state, wanted)
        base.save_pretrained(tmp_path / "base")
        assert verify(tmp_path / "base", hashes=True) > 0
        assert torch.equal(AutoModel.from_pretrained(tmp_path / "base", dtype=torch.float32)(IDS).last_hidden_state, wanted)


def test_its_own_class_and_a_classifier(packed: Path) -> None:
    assert torch.equal(logits(OlmoeForCausalLM.from_pretrained(packed, dtype=torch.float32)), logits(load(packed)))
    with pytest.raises(UnsupportedModelError, match="Unrecognized configuration class"):
        AutoModelForSequenceClassification.from_pretrained(packed)  # OLMoE has none: what transformers says, in one line


def test_code_of_its_own_is_not_asked_for(tmp_path: Path) -> None:
    from tests.packed import write_packed
    from tests.tiny import save_tiny

    source = save_tiny("olmoe", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_own.Own",
        "AutoModelForCausalLM": "modeling_own.Own",
        "AutoTokenizer": "t.T",
    }
    (source / "config.json").write_text(json.dumps(config))
    folder = write_packed(source, tmp_path / "packed")
    assert json.loads((folder / "config.json").read_text())["auto_map"] == {"AutoTokenizer": "t.T"}
    assert torch.equal(logits(load(folder, trust_remote_code=True)), logits(load(folder)))


def test_disk_offload_with_buffers(packed: Path, tmp_path: Path) -> None:
    places = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "disk", "model.norm": "cpu"}
    places |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = load(packed, device_map=places, offload_folder=tmp_path / "offload", offload_buffers=True)
    assert all(buffer.is_meta for buffer in model.model.layers[0].mlp.experts.buffers())
    for _ in range(2):
        assert torch.equal(logits(model), logits(load(packed)))


def test_infinities_outside_of_what_is_packed(copy: Path) -> None:
    path = copy / "rest-00000.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"][0, 0] = float("inf")
    save_file(tensors, path, {"format": "pt"})
    write_manifest(copy)
    assert load(copy).lm_head.weight[0, 0] == float("inf")
    tensors["lm_head.weight"][0, 0] = float("nan")
    save_file(tensors, path, {"format": "pt"})
    write_manifest(copy)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: holds NaN"):
        load(copy)


# --- saved over, uploaded, damaged ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["5GB", "50KB"])
def test_saved_over_itself_twice(copy: Path, size: str) -> None:
    model = load(copy)
    with torch.no_grad():
        model.model.norm.weight += 1
    wanted = logits(model)
    for _ in range(2):
        model.save_pretrained(copy, max_shard_size=size)
        stored = {t.file.name for t in read_folder(copy, guards=True).values()}
        assert {p.name for p in copy.glob("*.safetensors")} == stored and not list(copy.glob(".saving-*"))
        assert (copy / "model.safetensors.index.json").exists() == (size == "50KB")
        assert verify(copy, hashes=True) > 0
        assert torch.equal(logits(load(copy)), wanted)
    assert (copy / "tokenizer.json").is_file()


def test_other_files_of_a_folder_stay(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"mine")
    load(packed).save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == b"mine"
    with pytest.raises(OutputError, match="no variants"):
        load(packed).save_pretrained(tmp_path, variant="fp16")


def test_the_tokenizer_and_its_templates_come_along(copy: Path, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"default": "{{ messages[0].content }}", "tool_use": "T{{ messages[0].content }}"}
    tokenizer.save_pretrained(copy)
    load(copy).save_pretrained(tmp_path / "again")
    assert AutoTokenizer.from_pretrained(tmp_path / "again").chat_template == tokenizer.chat_template


def test_upload_is_the_whole_checkpoint(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    class Api:
        def __init__(self, token: Any = None) -> None:
            assert token == "secret"

        def create_repo(self, repo_id: str, **options: Any) -> Any:
            return type("Url", (), {"repo_id": f"me/{repo_id}"})

        def upload_folder(self, **options: Any) -> None:
            calls.append(
                {**options, "there": sorted(str(p.relative_to(tmp_path / "up")) for p in (tmp_path / "up").rglob("*"))}
            )

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    (tmp_path / "up").mkdir()
    (tmp_path / "up" / "diary.txt").write_text("private")
    load(packed).save_pretrained(tmp_path / "up", push_to_hub=True, token="secret", commit_message="packed")
    (call,) = calls
    assert call["repo_id"] == "me/up" and call["commit_message"] == "packed"
    assert (
        {"config.json", "model.safetensors", MANIFEST_NAME, "tokenizer.json"}
        <= set(call["allow_patterns"])
        <= set(call["there"])
    )
    assert "diary.txt" not in call["allow_patterns"]


def flip(folder: Path) -> None:
    path = min(folder.glob("packed-*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


def test_hashes_while_loading(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flip(copy)
    load(copy)  # not asked for
    monkeypatch.setenv(HASHES, "1")
    with pytest.raises(CheckpointError, match="not those that were written"):
        load(copy)
    monkeypatch.setenv(HASHES, "maybe")
    with pytest.raises(CheckpointError, match="MOEBIUS_HASHES: got 'maybe'"):
        load(copy)


DAMAGES: dict[str, tuple[str, Callable[[Any], object]]] = {
    "modules a list": ("config.json", lambda c: c["quantization_config"].update(modules=[1])),
    "modules empty": ("config.json", lambda c: c["quantization_config"].update(modules={})),
    "a module a number": ("config.json", lambda c: c["quantization_config"]["modules"].update(x=3)),
    "a part a text": ("config.json", lambda c: c["quantization_config"]["modules"].update(x={"factor": "signs"})),
    "manifest a list": (MANIFEST_NAME, lambda m: m.update(tensors=[])),
    "an entry a number": (MANIFEST_NAME, lambda m: m["tensors"].update({"lm_head.weight": 4})),
    "an entry without a hash": (MANIFEST_NAME, lambda m: m["tensors"]["lm_head.weight"].pop("sha256")),
    "an entry's file null": (MANIFEST_NAME, lambda m: m["tensors"]["lm_head.weight"].update(file=None)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_wrong_types_are_one_line(copy: Path, damage: str) -> None:
    file, change = DAMAGES[damage]
    content = json.loads((copy / file).read_text())
    change(content)
    (copy / file).write_text(json.dumps(content))
    for opens in (load, moebius.verify):
        with pytest.raises(CheckpointError) as caught:
            opens(copy)
        assert "\n" not in str(caught.value)
