"""Bad input gets one clear line and a non-zero exit, and leaves no half-made output."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from moebius.cli.app import app
from moebius.errors import CheckpointError, MoebiusError
from moebius.table import METHODS

SMALL = ["--windows", "4", "--window-length", "32", "--quiet"]


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    """A copy of the model to be damaged."""
    return Path(shutil.copytree(model, tmp_path / "copy"))


@pytest.fixture
def workplace(tmp_path: Path) -> Iterator[Path]:
    """An empty folder that has to be empty afterwards but for what the test puts there."""
    folder = tmp_path / "workplace"
    folder.mkdir()
    yield folder
    assert sorted(p.name for p in folder.iterdir()) == [], "half-made output was left behind"


@pytest.fixture
def no_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Anything that reads models fails: what is refused here is refused before a model is loaded."""
    for name in ("moebius.pipeline", "moebius.models.load", "moebius.hf.loading", "moebius.compare.run"):
        monkeypatch.setitem(sys.modules, name, None)


def refused(*arguments: str | Path, exit_code: int = 2) -> str:
    """The one line that a command prints when it refuses."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == exit_code, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr


# --- refused before anything is loaded ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_models")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--method", "mobi"],
            f"no method named 'mobi'; known: {', '.join(METHODS)} (did you mean 'mobie'?)",
        ),
        (["--set", "gian=true"], "method 'moebius' has no option 'gian'"),
        (["--method", "rtn", "--set", "side=input"], "method 'rtn' has no option 'side'"),
        (["--method", "mobie", "--set", "side=left"], "option side: got 'left', wanted one of output, input, hidden"),
        (["--set", "gain=maybe"], "option gain: got 'maybe', wanted true or false"),
        (["--set", "gain"], "wanted KEY=VALUE"),
        (["--bits", "0"], "method 'moebius': got 0 bits, wanted a number from 0.3 to 4"),
        (["--method", "mobie", "--bits", "2"], "method 'mobie': got 2 bits, wanted 1"),
        (["--method", "gptq", "--bits", "2.5"], "got 2.5 bits, wanted a whole number from 1 to 8"),
        (["--method", "rtn", "--bits", "9"], "got 9 bits"),
        (["--calibration", "nowhere.txt"], "nowhere.txt: no such file"),
    ],
)
def test_settings_that_make_no_sense(workplace: Path, model: Path, arguments: list[str], message: str) -> None:
    assert message in refused("quantize", model, "--out", workplace / "out", *SMALL, *arguments)


@pytest.mark.usefixtures("no_models")
@pytest.mark.parametrize("command", ["quantize", "compare"])
def test_output_folder_that_is_not_empty(tmp_path: Path, model: Path, command: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("ten years of work")
    assert "not empty" in refused(command, model, "--out", tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.tex"]


@pytest.mark.usefixtures("no_models")
@pytest.mark.parametrize("command", ["quantize", "evaluate", "generate", "info", "plan", "compare", "bench"])
def test_no_such_model(tmp_path: Path, command: str) -> None:
    assert "no such file or folder" in refused(command, tmp_path / "no-model")


@pytest.mark.usefixtures("no_models")
def test_recipes_of_a_comparison(workplace: Path, model: Path) -> None:
    out = workplace / "out"
    assert "no method named 'rtm'" in refused("compare", model, "--recipe", "rtm@1", "--out", out)
    assert "twice" in refused("compare", model, "--recipe", "rtn@1", "--recipe", "rtn@1", "--out", out)


def test_usage_errors_are_refused() -> None:
    for arguments in (["quantize", "--windows", "0"], ["quantize", "--colour", "red"], ["paint"], ["compare", "--preset", "x"]):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2 and result.stdout == ""


# --- checkpoints ----------------------------------------------------------------------------------------------------------


def rewritten(folder: Path, change: str) -> None:
    """Put NaN or Inf into the last expert matrix of a checkpoint."""
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    name = max(n for n in tensors if "experts" in n)
    tensors[name].view(-1)[5] = float(change)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_weights_that_are_not_finite(workplace: Path, copy: Path, value: str) -> None:
    rewritten(copy, value)
    line = refused("quantize", copy, "--method", "rtn", "--out", workplace / "out", *SMALL)
    assert "experts" in line and "NaN or Inf" in line


def test_truncated_shard(workplace: Path, copy: Path) -> None:
    file = next(copy.glob("*.safetensors"))
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 100)
    assert file.name in refused("quantize", copy, "--method", "rtn", "--out", workplace / "out", *SMALL)
    assert file.name in refused("evaluate", copy, "--windows", "1", "--window-length", "16", "--quiet")
    assert file.name in refused("generate", copy, "--quiet")


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_damaged_packed_checkpoint(model: Path, tmp_path: Path, damage: str) -> None:
    packed = tmp_path / "packed"
    result = CliRunner().invoke(app, ["quantize", str(model), "--method", "rtn", "--out", str(packed), "--quiet"])
    assert result.exit_code == 0, result.output
    shard = min(packed.glob("*.safetensors"))
    if damage == "missing":
        shard.unlink()
    else:
        with shard.open("r+b") as stream:
            stream.truncate(shard.stat().st_size - 100)
    for command in ("evaluate", "generate", "info"):
        assert shard.name in refused(command, packed)


def test_missing_shard(workplace: Path, copy: Path) -> None:
    file = next(copy.glob("*.safetensors"))
    names = list(load_file(file))
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    tensors = load_file(file)
    for shard, members in shards.items():
        save_file({n: tensors[n] for n in members}, copy / shard, metadata={"format": "pt"})
    file.unlink()
    index = {"metadata": {}, "weight_map": {n: shard for shard, members in shards.items() for n in members}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    (copy / "model-00002-of-00002.safetensors").unlink()
    line = refused("quantize", copy, "--method", "rtn", "--out", workplace / "out", *SMALL)
    assert "model-00002-of-00002.safetensors" in line and "missing" in line


def test_a_dense_model(workplace: Path, tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    assert "dense model" in refused("quantize", tmp_path / "dense", "--method", "rtn", "--out", workplace / "out", *SMALL)
    assert "dense model" in refused("plan", tmp_path / "dense")


def test_a_folder_that_is_no_checkpoint(workplace: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused("quantize", tmp_path / "empty", "--out", workplace / "out", *SMALL)


# --- calibration ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "", "found 0 tokens, wanted 128"),
        ("short.txt", "Too short.", "tokens, wanted 128"),
        ("short.jsonl", '{"text": "Too short."}\n', "tokens, wanted 128"),
        ("wrong.jsonl", '{"words": "No text here."}\n', "wanted a string under 'text'"),
    ],
)
def test_calibration_text(workplace: Path, tmp_path: Path, model: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    out = workplace / "out"
    assert message in refused("quantize", model, "--method", "gptq", "--calibration", tmp_path / name, "--out", out, *SMALL)


# --- while it runs --------------------------------------------------------------------------------------------------------


def test_a_full_disk(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moebius.checkpoint import shards

    real, calls = shards.os.fsync, []

    def fsync(descriptor: int) -> None:
        # run.json, then shard and record of the first layer; the shard of the second does not fit.
        calls.append(stat.S_ISREG(os.fstat(descriptor).st_mode))  # folders are flushed too
        if sum(calls) == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(shards.os, "fsync", fsync)
    out = tmp_path / "out"
    assert "disk is full" in refused("quantize", model, "--method", "rtn", "--out", out, *SMALL)
    assert not out.exists()
    partial = tmp_path / ".out.partial"
    assert len(list(partial.rglob("*.safetensors"))) == 1, "the finished layer stays, the unfinished one goes"
    monkeypatch.undo()
    result = CliRunner().invoke(app, ["quantize", str(model), "--method", "rtn", "--out", str(out), *SMALL])
    assert result.exit_code == 0, result.output
    assert out.exists() and not partial.exists()


def test_interrupted_run_says_how_to_go_on(tmp_path: Path, model: Path) -> None:
    command = [sys.executable, "-m", "moebius.cli", "quantize", str(model), "--out", str(tmp_path / "out")]
    # Far more calibration than a second's worth, so that the signal finds it at work.
    command += ["--windows", "2000", "--window-length", "128", "--method", "mobie", "--set", "glas_groups=8"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    time.sleep(0.5)
    while process.poll() is None and "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.2)
    time.sleep(10)  # until all is imported: in the middle of that, Python has an exit code of its own for a signal
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert stdout == ""
    assert "error: interrupted; finished layers are kept, and the same command resumes\n" in stderr
    assert "Traceback" not in stderr
    assert not (tmp_path / "out").exists()


# --- what nobody expected -------------------------------------------------------------------------------------------------


def test_an_unexpected_error_is_one_line_with_its_place(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.setattr("moebius.cli.info.path_or_hub_name", broken)
    line = refused("info", model, exit_code=1)
    assert line.startswith("error: ZeroDivisionError at moebius/cli/info.py:")
    assert "division by zero; set MOEBIUS_DEBUG=1" in line


@pytest.mark.parametrize(("flags", "variables"), [(["--debug"], {}), ([], {"MOEBIUS_DEBUG": "1"})])
def test_debug_keeps_the_traceback(
    model: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], variables: dict[str, str]
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("moebius.cli.info.path_or_hub_name", broken)
    result = CliRunner().invoke(app, [*flags, "info", str(model)], env=variables)
    assert isinstance(result.exception, ZeroDivisionError)


def test_every_known_cause_is_an_error_of_moebius_with_its_exit_code(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class OwnCodeError(MoebiusError):
        exit_code = 7

    def broken(*_: object) -> None:
        raise OwnCodeError("where: got, wanted")

    monkeypatch.setattr("moebius.cli.info.path_or_hub_name", broken)
    assert refused("info", model, exit_code=7) == "error: where: got, wanted\n"
    assert CheckpointError.exit_code == 2


def test_ctrl_c_in_a_command_that_keeps_nothing(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("moebius.cli.info.path_or_hub_name", interrupted)
    assert refused("info", model, exit_code=130) == "error: interrupted\n"
