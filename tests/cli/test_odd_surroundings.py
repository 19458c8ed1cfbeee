"""What surrounds a run may be odd: terminals, limits, input, arguments. It says so in one line, and loses nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.tiny import byte_tokenizer, save_tiny
from tokenizers import normalizers
from typer.testing import CliRunner

from moebius.cli.app import app


def command(*arguments: object, **options: object) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})}  # type: ignore[dict-item]
    call = [sys.executable, "-m", "moebius.cli", *map(str, arguments)]
    return subprocess.run(call, capture_output=True, env=environment, timeout=120, **options)  # type: ignore[call-overload]


def chat(folder: Path, said: bytes, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    return command("chat", folder, "--tokens", "4", "--quiet", *arguments, input=said)


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose template refuses the system role, and whose tokenizer makes nothing of blanks."""
    folder = save_tiny("olmoe", tmp_path_factory.mktemp("strict") / "model")
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Strip()
    refuses = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}{{ m.content }}"
    )
    tokenizer.chat_template = refuses + "{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


def test_a_turn_that_the_template_refuses_is_one_line_and_the_talk_goes_on(strict: Path) -> None:
    got = chat(strict, b"hello\nagain\n", "--system", "x")
    assert got.returncode == 2
    assert got.stderr.count(b"the chat template refuses this turn (no system role)") == 2 and b"without --system" in got.stderr
    got = chat(strict, b" \nhello\n")
    assert got.returncode == 2 and got.stderr.count(b"tokenizes to nothing") == 1 and got.stdout.strip()
    assert chat(strict, b"\n").returncode == 0


def test_input_that_is_no_text_or_closed(strict: Path) -> None:
    assert chat(strict, b"h\xff\xfello\n").returncode == 0
    got = command("chat", strict, "--tokens", "4", preexec_fn=lambda: os.close(0))
    assert got.returncode == 0, got.stderr


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "COLUMNS": "7"}])
def test_terminals_that_know_few_characters(environment: dict[str, str], strict: Path, tmp_path: Path) -> None:
    out = tmp_path / "packed"
    got = command("quantize", strict, "--method", "rtn", "--bits", "8", "--out", out, env=environment)
    assert got.returncode == 0 and (out / "config.json").exists(), got.stderr
    for arguments in (("info", out), ("plan", strict), ("generate", out, "--prompt", "é", "--tokens", "3")):
        got = command(*arguments, env=environment)
        assert got.returncode == 0, got.stderr


@pytest.mark.parametrize("out", [".", "~/deep/er"])
def test_outputs_as_shells_write_them(out: str, strict: Path, tmp_path: Path) -> None:
    got = command("quantize", strict, "--method", "rtn", f"--out={out}", "--quiet", cwd=tmp_path, env={"HOME": str(tmp_path)})
    assert got.returncode == 0, got.stderr
    assert (tmp_path / out.removeprefix("~/") / "config.json").is_file()


@pytest.mark.parametrize("seed", ["-1", str(2**63), str(2**64)])
@pytest.mark.parametrize("name", ["quantize", "evaluate", "generate", "chat"])
def test_seeds_beyond_the_generators_are_refused(seed: str, name: str, strict: Path) -> None:
    result = CliRunner().invoke(app, [name, str(strict), "--seed", seed])
    assert result.exit_code == 2 and "--seed" in result.output


@pytest.mark.parametrize("temperature", ["1e-320", "1e-45", "1e300", "inf"])
def test_temperatures_at_the_edge_of_their_type(temperature: str, strict: Path) -> None:
    arguments = ["generate", str(strict), "--prompt", "a", "--tokens", "4", "--seed", str(2**63 - 1)]
    result = CliRunner().invoke(app, [*arguments, "--temperature", temperature])
    assert result.exit_code == 0, result.output
    assert CliRunner().invoke(app, [*arguments, "--temperature", "nan"]).exit_code == 2


def test_tokens_that_the_model_does_not_know_are_refused(tmp_path: Path) -> None:
    folder = save_tiny("olmoe", tmp_path / "model", vocab_size=90, eos_token_id=5, bos_token_id=5)
    for arguments in (["generate", str(folder), "--prompt", "~~~~"], ["evaluate", str(folder), "--windows", "2"]):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2 and "has 90 embeddings" in result.stderr, result.output


def test_texts_longer_than_the_model_are_told(strict: Path) -> None:
    for arguments in (
        ("generate", strict, "--prompt", "a" * 300, "--tokens", "2"),
        ("evaluate", strict, "--window-length", "300"),
    ):
        got = command(*arguments)
        assert got.returncode == 0 and got.stderr.count(b"longer than the model's 256 positions") == 1, got.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
@pytest.mark.parametrize("room", [60, 400])
def test_want_of_memory_is_one_line(room: int, tmp_path: Path) -> None:
    probe = "import torch, transformers, moebius.pipeline, psutil; print(psutil.Process().memory_info().vms)"
    imported = int(subprocess.run([sys.executable, "-c", probe], capture_output=True, check=True).stdout)

    def limit() -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (imported + room * 10**6,) * 2)

    got = command("quantize", "--out", tmp_path / "out", "--quiet", preexec_fn=limit)
    assert got.returncode == 2 and b"memory" in got.stderr and b"plan" in got.stderr and b"Traceback" not in got.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_sigterm_leaves_finished_work_and_nothing_else(strict: Path, tmp_path: Path) -> None:
    call = [sys.executable, "-m", "moebius.cli", "quantize", str(strict), "--out", str(tmp_path / "out"), "--method", "mobie"]
    call += ["--windows", "3000", "--window-length", "128", "--set", "glas_groups=8"]
    process = subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not (tmp_path / ".out.partial" / "run.json").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143 and b"ended; finished layers are kept" in said, said
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".tmp", ".npy")] and not (tmp_path / "out").exists()


@pytest.mark.parametrize("system", ["win32", "darwin"])
def test_imports_of_other_systems(system: str) -> None:
    code = f"""
import ctypes, pathlib, sys
import psutil
def library(name, *a, **k):
    raise TypeError("this system has no library of the process")
ctypes.CDLL = library if {system!r} == "win32" else ctypes.CDLL
if {system!r} == "win32":
    sys.modules["resource"] = None
sys.platform = {system!r}
import moebius.memory as memory
memory.keep_freed_memory()
def read(self, **k):
    raise OSError("there is no /proc")
pathlib.Path.read_text = read
memory.require_memory(1, "nothing")
print(memory.PeakMemory().bytes() / psutil.Process().memory_info().rss)
"""
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert got.returncode == 0, got.stderr
    ratio = float(got.stdout)
    # Here the system counts in kilobytes, whatever the platform is called.
    # A process inherits the peak of the one it was forked from.
    assert 0.5 < ratio * (1024 if system == "darwin" else 1) < 400


def test_what_a_run_left_that_was_killed_after_publishing_goes_away(strict: Path, tmp_path: Path) -> None:
    quantizing = ("quantize", strict, "--method", "rtn", "--bits", "8", "--quiet", "--out", tmp_path / "out")
    assert command(*quantizing).returncode == 0
    left = tmp_path / ".out.partial"
    left.mkdir()
    (left / "run.json").write_text("{}")
    got = command(*quantizing)
    assert got.returncode == 2 and b"not empty" in got.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("out", [".", "~/deep"])
def test_comparisons_into_outputs_as_shells_write_them(out: str, strict: Path, tmp_path: Path) -> None:
    small = ("--windows", "2", "--window-length", "32", "--text-windows", "2", "--quiet")
    got = command("compare", strict, "-r", "rtn@4", f"--out={out}", *small, cwd=tmp_path, env={"HOME": str(tmp_path)})
    assert got.returncode == 0, got.stderr
    assert (tmp_path / out.removeprefix("~/") / "comparison.png").is_file()
