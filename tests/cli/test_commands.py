"""Every command from end to end on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import save_tiny
from typer.testing import CliRunner, Result

from moebius.checkpoint.shards import read_folder
from moebius.cli.app import app
from moebius.compare import presets
from moebius.compare import run as comparison_run


def run(*arguments: str | Path) -> Result:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return result


def run_json(*arguments: str | Path) -> Any:
    return json.loads(run(*arguments, "--json").stdout)


@pytest.fixture(scope="module")
def packed(model: Path) -> Path:
    out = model.parent / "packed"
    run("quantize", model, "--method", "rtn", "--bits", "4", "--out", out)
    return out


# --- quantize -------------------------------------------------------------------------------------------------------------


def test_quantize_prints_one_json_document_and_counts_what_it_wrote(
    model: Path, tmp_path: Path, calibration: list[str]
) -> None:
    result = run_json(
        "quantize", model, "--method", "gptq", "--bits", "3", "--set", "gain=on", "--out", tmp_path / "out", *calibration
    )
    assert result["report"]["recipe"]["gain"] is True
    assert result["report"]["calibration"]["windows"] == 4
    stored = read_folder(tmp_path / "out")
    expert_bits = sum(8 * (t.end - t.begin) for name, t in stored.items() if ".experts." in name)
    assert result["size"]["expert_bytes"] * 8 == expert_bits
    assert result["size"]["bits_per_expert_weight"] == expert_bits / (2 * 8 * 48 * 40 * 3)
    assert result["size"]["file_bytes"] == sum(f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors"))


def test_quantize_shows_bits_and_the_way_on(model: Path, tmp_path: Path, calibration: list[str]) -> None:
    result = run("quantize", model, "--method", "rtn", "--out", tmp_path / "out", "--quiet", *calibration)
    assert "activated average (paper, Eq. 46)" in result.stdout
    assert f"moebius generate {tmp_path / 'out'}" in result.stderr


def test_default_output_folder_is_named_after_model_and_recipe(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calibration: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run("quantize", model, "--method", "rtn", "--bits", "8", *calibration)
    assert [p.name for p in tmp_path.iterdir()] == ["olmoe-rtn-8bit"]


# --- evaluate -------------------------------------------------------------------------------------------------------------


def test_evaluate_against_the_original(model: Path, packed: Path, held_out: list[str]) -> None:
    result = run_json("evaluate", packed, "--reference", model, *held_out)
    assert 0 < result["kl"] < 0.5
    assert 0.5 < result["top1_agreement"] <= 1
    assert len(result["routing_similarity"]) == 2
    assert result["tokens"] == 4 * 31
    assert result["protocol"] == "windows" and "4 windows of 32 tokens" in result["description"]
    alone = run_json("evaluate", model, *held_out)
    assert alone["perplexity"] == pytest.approx(result["reference_perplexity"], rel=1e-6)
    assert alone["kl"] is None


@pytest.mark.parametrize("protocol", ["gptq", "llama.cpp"])
def test_evaluate_names_its_protocol_and_stores_a_reference(
    model: Path, packed: Path, text: Path, tmp_path: Path, protocol: str
) -> None:
    shown = ["--protocol", protocol, "--text", text, "--windows", "3", "--window-length", "64"]
    first = run("evaluate", model, *shown, "--save-reference", tmp_path / "reference")
    assert "--reference" in first.stderr and "of 64 tokens" in " ".join(first.stdout.split())
    stored = run_json("evaluate", packed, "--reference", tmp_path / "reference")
    beside = run_json("evaluate", packed, *shown, "--reference", model)
    assert stored["protocol"] == protocol and stored["tokens"] == beside["tokens"]
    assert stored["kl"] == pytest.approx(beside["kl"], rel=1e-2)
    assert stored["perplexity"] == pytest.approx(beside["perplexity"], rel=1e-6)
    routed = run_json("evaluate", packed, *shown, "--reference", model, "--routing-from", model)
    assert routed["kl"] != beside["kl"] and routed["routing_from"] == str(model)
    refused = CliRunner().invoke(app, ["evaluate", str(packed), "--reference", str(tmp_path / "reference"), "--windows", "5"])
    assert refused.exit_code == 2 and "leave it out" in refused.stderr


def test_evaluate_says_how_to_get_kl(model: Path, packed: Path, held_out: list[str]) -> None:
    result = run("evaluate", packed, *held_out)
    assert "--reference ORIGINAL" in result.stderr
    assert "perplexity" in result.stdout
    assert "--reference" not in run("evaluate", model, *held_out).stderr
    assert "MoE layer" in run("evaluate", packed, "--reference", model, *held_out).stdout


# --- generate -------------------------------------------------------------------------------------------------------------


def test_generate_is_greedy_unless_asked_and_drawn_by_seed(packed: Path) -> None:
    def text(*arguments: str) -> str:
        return run_json("generate", packed, "--prompt", "def f(", "--tokens", "12", *arguments)["completion"]

    assert text() == text("--seed", "5")
    hot = [text("--temperature", "3", "--seed", seed) for seed in ("1", "1", "2")]
    assert hot[0] == hot[1] != hot[2]
    assert hot[0] != text()


def test_generate_streams_prompt_and_completion(packed: Path) -> None:
    shown = run("generate", packed, "--prompt", "def f(", "--tokens", "12")
    assert shown.stdout.startswith("def f(")
    assert "tokens in" in shown.stderr
    completion = run_json("generate", packed, "--prompt", "def f(", "--tokens", "12")["completion"]
    assert shown.stdout.rstrip("\n") == ("def f(" + completion).rstrip("\n")


def test_an_empty_prompt_is_refused(packed: Path) -> None:
    assert CliRunner().invoke(app, ["generate", str(packed), "--prompt", ""]).exit_code == 2


# --- info -----------------------------------------------------------------------------------------------------------------


def test_info_of_a_packed_checkpoint(packed: Path) -> None:
    values = run_json("info", packed, "--verify")
    assert values["verified"] is True
    assert values["recipe"]["method"] == "rtn"
    assert 4 < values["bits_per_expert_weight"] < 5
    assert values["bits_per_weight"] > values["bits_per_expert_weight"]
    assert len(values["modules"]) == 4
    text = run("info", packed).stdout
    for piece in ("Quantized modules", "model.layers.0.mlp.experts.gate_up_proj", "whole model", "on disk", "Recipe"):
        assert piece in text


def test_info_lists_tokens_per_expert_where_calibration_counted_them(
    model: Path, tmp_path: Path, calibration: list[str]
) -> None:
    run("quantize", model, "--method", "gptq", "--out", tmp_path / "out", "--quiet", *calibration)
    layers = run_json("info", tmp_path / "out")["layers"]
    assert [sum(layer["tokens_per_expert"]) for layer in layers] == [4 * 32 * 2] * 2
    assert "Tokens per expert" in run("info", tmp_path / "out").stdout


def test_info_of_an_original(model: Path) -> None:
    values = run_json("info", model)
    assert values["bits_per_expert_weight"] == values["bits_per_weight"] == 16
    assert values["expert_weights"] == 2 * 8 * 48 * 40 * 3
    assert CliRunner().invoke(app, ["info", str(model), "--verify"]).exit_code == 2


def test_verify_finds_a_flipped_bit(packed: Path, tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(packed, tmp_path / "damaged"))
    tensor = next(t for name, t in read_folder(folder).items() if ".experts." in name)
    with tensor.file.open("r+b") as file:
        file.seek(tensor.begin)
        byte = file.read(1)[0]
        file.seek(tensor.begin)
        file.write(bytes([byte ^ 1]))
    result = CliRunner().invoke(app, ["info", str(folder), "--verify"])
    assert result.exit_code == 2 and tensor.name in result.stderr


# --- plan -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "recipe"),
    [
        ("olmoe", ["--method", "rtn", "--bits", "1"]),
        ("olmoe", ["--method", "gptq", "--bits", "3", "--set", "group_size=32"]),
        ("olmoe", ["--method", "mobie"]),
        ("olmoe", ["--method", "mobie", "--set", "side=hidden", "--set", "rank=16", "--set", "shared_bits=4"]),
        ("olmoe", ["--method", "rtn", "--set", "router=binary"]),
        ("qwen2_moe", ["--method", "rtn", "--set", "shared_experts=4", "--set", "dense_layers=8"]),
        ("gpt_oss", ["--method", "mobie", "--set", "cejd=false"]),
    ],
)
def test_plan_from_the_config_alone_is_what_quantize_writes(
    tmp_path: Path, architecture: str, recipe: list[str], calibration: list[str]
) -> None:
    source = save_tiny(architecture, tmp_path / "model")
    written = run_json("quantize", source, *recipe, "--out", tmp_path / "out", *calibration)["size"]
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    planned = run_json("plan", tmp_path / "config.json", *recipe)
    modules = {m["name"]: m for m in planned["after"]["modules"]}
    assert modules == {m["name"]: m for m in written["modules"]}
    assert planned["after"]["bytes"] == written["bytes"]
    assert planned["after"]["weights"] == written["weights"] == planned["before"]["weights"]


def test_plan_counts_memory_by_what_the_method_needs(model: Path) -> None:
    def memory(*recipe: str) -> dict[str, int]:
        return run_json("plan", model, "--windows", "4", "--window-length", "32", *recipe)["memory_bytes"]

    nothing, inputs, gradients = (memory("--method", name) for name in ("rtn", "gptq", "mobie"))
    assert nothing["statistics"] == nothing["hidden_states"] == 0
    # Second moments of gate_up (hidden 48) and down (inner 40), and means.
    assert inputs["statistics"] == 4 * 8 * (48 * 48 + 48 + 40 * 40 + 40)
    assert gradients["statistics"] == 4 * 8 * (2 * 48 * 48 + 48 + 80 + 2 * 40 * 40 + 40 + 48)
    assert gradients["hidden_states"] == 3 * 4 * 32 * 48 * 4
    assert gradients["logits"] == 3 * 32 * 257 * 4
    assert nothing["total"] == nothing["model"] + nothing["workspace"]
    assert nothing["total"] < inputs["total"] < gradients["total"]
    assert "Memory while quantizing" in run("plan", model).stdout


def test_plan_as_a_program_prints_json_alone(model: Path) -> None:
    command = [sys.executable, "-m", "moebius.cli", "plan", str(model), "--json"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(shown.stdout)["recipe"]["method"] == "moebius"
    assert shown.stderr == ""


# --- compare --------------------------------------------------------------------------------------------------------------

COMPARE = ["--recipe", "rtn@8", "--recipe", "rtn@2 gain=true windows=3", "--text-windows", "3", "--samples", "1"]


def test_compare(model: Path, tmp_path: Path, text: Path, calibration: list[str]) -> None:
    out = tmp_path / "out"
    results = run_json("compare", model, *COMPARE, *calibration, "--text", text, "--out", out)
    assert json.loads((out / "results.json").read_text()) == results
    original, good, bad = results["rows"]
    assert original["bits_per_expert_weight"] == 16 and original["kl"] is None and original["recipe"] is None
    assert good["kl"] < bad["kl"] and good["top1_agreement"] > bad["top1_agreement"]
    assert good["mean_routing_similarity"] > bad["mean_routing_similarity"]
    assert good["bits_per_expert_weight"] > 8 > bad["bits_per_expert_weight"] > 2
    assert good["seconds"] > 0 and 1e8 < good["peak_memory_bytes"] < 1e11
    assert good["calibration"]["windows"] == 4 and bad["calibration"]["windows"] == 3
    assert all(len(row["completions"]) == 1 for row in results["rows"])
    assert (out / "comparison.png").read_bytes()[:4] == b"\x89PNG"
    assert "| rtn@2 gain=true windows=3 |" in (out / "comparison.md").read_text()
    assert str(tmp_path) not in (out / "results.json").read_text() + (out / "comparison.md").read_text()
    windows = ["--text", text, "--windows", "3", "--window-length", "32"]
    alone = run_json("evaluate", out / bad["folder"], "--reference", model, *windows)
    assert alone["kl"] == pytest.approx(bad["kl"], rel=1e-5)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_moebius_is_set_beside_every_method(
    model: Path, tmp_path: Path, text: Path, calibration: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At just below what each stores, once where two store the same; a run that was stopped goes on with the same rows."""
    others = ["rtn@2", "rtn@2 gain=true", "gptq@3", "rtn@8"]
    monkeypatch.setitem(presets.PRESETS, "methods", [(text, text) for text in others])
    real = comparison_run.quantize_model

    def stopped(source: str, out: Path, *arguments: Any, **options: Any) -> Any:
        if out.name.startswith("moebius-2."):
            raise KeyboardInterrupt
        return real(source, out, *arguments, **options)

    out = tmp_path / "out"
    command = ["compare", model, "--preset", "methods", *calibration, "--text", text, "--text-windows", "3", "--out", out]
    with monkeypatch.context() as patch:
        patch.setattr(comparison_run, "quantize_model", stopped)
        assert CliRunner().invoke(app, [*map(str, command), "--quiet"]).exit_code == 130
    results = run_json(*command)
    bits = {row["label"]: row["bits_per_expert_weight"] for row in results["rows"]}
    assert list(bits.values())[1:] == sorted(list(bits.values())[1:]) and bits["original"] == 16
    mine = [row for row in results["rows"] if row["label"].startswith("moebius@")]
    assert len(mine) == len({bits[label] for label in others}) == 3
    for label in others[:3]:
        assert max(b for b in (bits[row["label"]] for row in mine) if b <= bits[label]) > 0.98 * bits[label]
    assert mine[-1]["recipe"]["bits"] == 4, "rtn@8 stores more than moebius goes to"
    assert results["recipes"].keys() == bits.keys() - {"original"}
    assert (out / mine[0]["folder"]).is_dir()
    assert "KL at equal bits: " in (out / "comparison.md").read_text()


def test_a_stopped_comparison_goes_on(
    model: Path, tmp_path: Path, calibration: list[str], text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    real = comparison_run.quantize_model

    def once(source: str, out: Path, *arguments: Any, **options: Any) -> Any:
        done.append(out.name)
        if len(done) == 2:
            raise KeyboardInterrupt
        return real(source, out, *arguments, **options)

    measured: list[bool] = []
    real_evaluate = comparison_run.evaluate_model

    def counted(*arguments: Any, **options: Any) -> Any:
        measured.append(True)
        return real_evaluate(*arguments, **options)

    monkeypatch.setattr(comparison_run, "quantize_model", once)
    monkeypatch.setattr(comparison_run, "evaluate_model", counted)
    command = ["compare", str(model), *COMPARE, *calibration, "--text", str(text), "--quiet", "--out", str(tmp_path / "out")]
    stopped = CliRunner().invoke(app, command)
    assert stopped.exit_code == 130 and not (tmp_path / "out").exists()
    other = CliRunner().invoke(app, [*command, "--seed", "1"])
    assert other.exit_code == 2 and "other settings" in other.stderr
    finished = run(*command)
    assert done == ["rtn-8", "rtn-2-gain-true-windows-3", "rtn-2-gain-true-windows-3"]
    assert len(measured) == 3, "the original and both recipes, each once"
    assert "rtn@2 gain=true windows=3" in finished.stdout and "After 'def read_lines" in finished.stdout


# --- the program ----------------------------------------------------------------------------------------------------------


def test_help_and_version_load_nothing_heavy() -> None:
    code = "import sys, moebius.cli.__main__; print([m for m in ('torch', 'transformers', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_program_prints_its_version_and_helps_with_every_command() -> None:
    shown = subprocess.run([sys.executable, "-m", "moebius.cli", "--version"], capture_output=True, text=True, check=True)
    assert shown.stdout.startswith("moebius 0.")
    for command in ("quantize", "evaluate", "generate", "info", "plan", "compare"):
        text = run(command, "--help").stdout
        assert "Examples" in text and f"moebius {command}" in text
    assert CliRunner().invoke(app, []).exit_code == 2
