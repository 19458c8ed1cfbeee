"""What transformers raises about a packed checkpoint is one line of a Moebius error; about others, errors stay as they are."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.packed import save_packed_tiny
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, OlmoeForCausalLM

import moebius  # noqa: F401 - registers the quantizer
from moebius.errors import CheckpointError, UnsupportedModelError

CONFIGS: dict[str, dict[str, Any]] = {
    "a dtype that is a list": {"dtype": []},
    "a width that is a word": {"hidden_size": "x"},
    "a width that no memory holds": {"hidden_size": 10**12},
    "a width that no integer holds": {"hidden_size": 10**30},
    "more layers than can be built": {"num_hidden_layers": 10**6},
    "more words than the files hold": {"vocab_size": 10**9},
    "a model that nobody knows": {"model_type": "runes"},
    "a model that writes nothing": {"model_type": "vit"},
    "a choice of experts that is a list": {"num_experts_per_tok": [2, 9]},
    "a choice of experts that is a truth": {"num_experts_per_tok": True},
}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_packed_tiny("olmoe", tmp_path_factory.mktemp("one_line"))


@pytest.fixture
def packed(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "packed"))


def configure(folder: Path, change: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))


def refused(kind: Any, folder: Path) -> str:
    with pytest.raises((CheckpointError, UnsupportedModelError)) as caught:
        kind.from_pretrained(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700
    return str(caught.value)


@pytest.mark.parametrize("what", CONFIGS)
def test_configs(packed: Path, what: str) -> None:
    configure(packed, CONFIGS[what])
    refused(AutoModelForCausalLM, packed)


@pytest.mark.parametrize("kind", [AutoConfig, AutoTokenizer, OlmoeForCausalLM])
def test_every_entrance(packed: Path, kind: Any) -> None:
    configure(packed, CONFIGS["a dtype that is a list"])
    refused(kind, packed)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe{", b'{"a":' * 100_000, b"[]", b'{"a": ' + b"9" * 5000 + b"}"])
@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
def test_files_that_are_no_json_of_that_kind(packed: Path, file: str, content: bytes) -> None:
    (packed / file).write_bytes(content)
    refused(AutoModelForCausalLM, packed)


def test_the_message_says_what_was_wrong(packed: Path) -> None:
    configure(packed, {"hidden_size": "x"})
    assert "'hidden_size': TypeError: Field 'hidden_size' expected int" in refused(AutoModelForCausalLM, packed)


def test_errors_about_other_checkpoints_stay_as_they_are(original: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(original.parent / "source", tmp_path / "source"))
    configure(source, {"dtype": []})
    with pytest.raises(IndexError):
        AutoModelForCausalLM.from_pretrained(source)
    with pytest.raises(OSError, match="nowhere"):
        AutoModelForCausalLM.from_pretrained(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    "program",
    [
        "import moebius; from transformers import AutoModelForCausalLM as Kind",
        "from transformers import AutoModelForCausalLM as Kind; import moebius",
        "import moebius; from transformers import OlmoeForCausalLM as Kind",
        "from transformers import AutoModelForCausalLM as Kind",
    ],
)
def test_in_any_order_of_imports(packed: Path, program: str) -> None:
    configure(packed, {"num_attention_heads": "x"})
    report = "\ntry:\n    Kind.from_pretrained({!r})\nexcept Exception as error:\n    print(type(error).__name__)"
    result = subprocess.run([sys.executable, "-c", program + report.format(str(packed))], capture_output=True, text=True)
    assert result.stdout == "CheckpointError\n", result.stderr
