"""``moebius bench`` from command to table and JSON. What the numbers are is not a matter of tests."""

from __future__ import annotations

import json
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import save_tiny, tiny_config
from transformers import PretrainedConfig
from typer.testing import CliRunner

from moebius.bench import run as bench_run
from moebius.bench.measure import Conditions
from moebius.bench.run import Bench, bench_shape, scaled_seconds
from moebius.cli.app import app
from moebius.cli.bench import speed_table
from moebius.errors import CheckpointError, OutputError, RecipeError, ResourceError
from moebius.evaluate.random_checkpoint import write_random_checkpoint
from moebius.evaluate.shapes import SHAPES
from moebius.evaluate.size import packed_checkpoint_size
from moebius.evaluate.speed import SpeedSettings
from moebius.progress import Progress, Silent
from moebius.recipe import Recipe

SETTINGS = SpeedSettings(prompt=12, context=12, new=4, batch=2, repeats=2)
SMALL = ["--prompt", "12", "--context", "12", "--new", "4", "--batch", "2", "--repeats", "2", "--threads", "1"]
MACHINE = {"device": "cpu", "name": "a processor", "threads": 1, "read_bytes_per_second": 1e9}


def config() -> PretrainedConfig:
    tiny = tiny_config("olmoe", num_hidden_layers=4)
    tiny.dtype = torch.bfloat16
    return tiny


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    """One that knows its machine and does everything in this process: a process of its own takes seconds to start."""

    def here(work: Any, *arguments: Any, progress: Progress) -> Any:
        return dict(MACHINE) if work is bench_run.machine else work(*arguments, progress)

    monkeypatch.setattr(bench_run, "in_process", here)
    return Bench(Conditions(SETTINGS, "cpu", "auto", 1), Silent())


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the command writes for the reference model, packed for the occasion, in processes of their own."""
    file = tmp_path_factory.mktemp("bench") / "speed.json"
    result = CliRunner().invoke(app, ["bench", "--method", "rtn", "--out", str(file), "--json", *SMALL, "--quiet"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == json.loads(file.read_text())
    return json.loads(file.read_text())


def test_the_reference_model_and_its_original(results: dict[str, Any]) -> None:
    assert results["name"] == "reference model" and results["recipe"]["method"] == "rtn"
    assert not results["random_weights"] and results["missing"] == []
    assert results["settings"] == {**SETTINGS.to_dict(), "dtype": "auto"}
    machine = results["machine"]
    assert machine["device"] == "cpu" and machine["threads"] == 1 and machine["name"] and machine["read_bytes_per_second"] > 0
    rows = {(row["model"], row["loop"]): row for row in results["rows"]}
    assert list(rows) == [("packed", "moebius"), ("packed", "transformers"), ("original", "transformers")]
    for row in rows.values():
        for figure in ("prompt", "decode", "request"):
            assert len(row[figure]["seconds"]) == 2
            assert row[figure]["best_tokens_per_second"] >= row[figure]["tokens_per_second"] > 0
        assert row["ready_seconds"] > row["load_seconds"] > 0
        assert row["peak_bytes"] >= row["resident_bytes"] > 0
        assert row["resident_to_files"] == row["resident_bytes"] / row["file_bytes"]
        roofline = row["roofline"]
        assert roofline["tokens_per_second"] == 2 * machine["read_bytes_per_second"] / roofline["bytes_per_step"]
        assert roofline["share_reached"] == row["decode"]["tokens_per_second"] / roofline["tokens_per_second"]
    assert rows["packed", "moebius"]["kernels"] and rows["original", "transformers"]["kernels"] == []
    assert rows["packed", "moebius"]["bits_per_expert_weight"] < 3
    assert rows["packed", "moebius"]["file_bytes"] < rows["original", "transformers"]["file_bytes"]
    gains = results["speedups"]["packed, moebius"]
    of_decode = [rows[key]["decode"]["tokens_per_second"] for key in (("packed", "moebius"), ("original", "transformers"))]
    assert gains["decode"] == of_decode[0] / of_decode[1]
    assert gains.keys() == {"decode", "prompt", "request", "ready", "memory"}


def test_the_table_has_a_column_per_row_and_the_gains(results: dict[str, Any]) -> None:
    table = speed_table(results)
    assert table.columns[1:] == (
        "packed",
        "packed, transformers’ generate",
        "original, transformers’ generate",
        "packed is better",
    )
    assert {len(row) for row in table.rows} == {5}
    cells = {row[0]: row[1:] for row in table.rows}
    row = results["rows"][0]
    assert cells["decode, tokens/s"][0] == f"{row['decode']['tokens_per_second']:,.1f}"
    assert cells["decode, tokens/s"][3] == f"{results['speedups']['packed, moebius']['decode']:.2f} ×"
    assert cells["bits per expert weight"][2] == "16.00"
    assert "batch 2, prompts of 12 tokens" in table.note


def test_a_shape_leaves_nothing_behind(bench: Bench, tmp_path: Path) -> None:
    bench_shape(bench, config(), Recipe.make("moebius"), tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert [(row["model"], row["loop"]) for row in bench.rows] == [
        ("packed", "moebius"),
        ("packed", "transformers"),
        ("original", "transformers"),
    ]
    assert bench.rows[0]["bits_per_expert_weight"] < 1.01 and bench.rows[2]["bits_per_expert_weight"] == 16
    read = [row["roofline"] for row in bench.rows]
    assert read[0]["shared_factors"] > 0 == read[2]["shared_factors"]
    assert read[0]["rest"] == read[2]["rest"]


def test_the_rest_of_the_model_may_be_packed_too(bench: Bench, tmp_path: Path) -> None:
    bench_shape(bench, config(), Recipe.make("moebius", rest="int8"), tmp_path)
    read = [row["roofline"]["rest"] for row in bench.rows]
    assert 0.5 * read[2] < read[0] < 0.6 * read[2]


def test_models_too_small_to_be_noticed_have_no_ratio_of_memory(bench: Bench, tmp_path: Path) -> None:
    bench_shape(bench, config(), Recipe.make("rtn"), tmp_path)
    for row in bench.rows:
        row["resident_bytes"] = 0
    assert bench.results()["speedups"]["packed, moebius"].keys() == {"decode", "prompt", "request", "ready"}


def test_the_shape_of_the_command(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "tiny", config)
    result = CliRunner().invoke(app, ["bench", "--shape", "tiny", "--method", "rtn", "--json", *SMALL, "--quiet"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["random_weights"] and found["name"] == "tiny" and len(found["rows"]) == 3
    assert "random weights" in speed_table(found).note


def test_a_line_through_fewer_layers() -> None:
    few, fewer = (
        {"prompt": {"seconds": [4.0, 3.0, 5.0]}, "decode": {"seconds": [0.4, 0.6, 0.5]}},
        {"prompt": {"seconds": [2.0, 1.0, 3.0]}, "decode": {"seconds": [0.3, 0.4, 0.2]}},
    )
    seconds = scaled_seconds([few, fewer], [4, 2], 10)
    # Two layers cost two seconds of a prompt and two tenths of a token; six more layers three times that.
    assert seconds.prompt == pytest.approx((9.0, 10.0, 11.0))
    assert seconds.step == pytest.approx((1.0, 1.1, 1.2))


def test_an_original_of_fewer_layers_is_scaled(bench: Bench, tmp_path: Path) -> None:
    bench_shape(bench, config(), Recipe.make("rtn"), tmp_path, original_layers=2)
    whole = bench.rows[2]
    assert whole["scaled_from_layers"] == [2, 1]
    assert whole["resident_bytes"] is None and whole["load_seconds"] is None
    assert whole["file_bytes"] == 2 * sum(p.numel() for p in bench_run.blank_model(config()).parameters())
    results = {"name": "tiny", "random_weights": True, **bench.results()}
    assert "original, transformers’ generate, scaled from 2 and 1 layers" in speed_table(results).columns
    assert results["speedups"]["packed, moebius"].keys() == {"decode", "prompt", "request"}
    with pytest.raises(RecipeError, match="wanted 2 to 4"):
        bench_shape(bench, config(), Recipe.make("rtn"), tmp_path, original_layers=5)


# --- what is refused ------------------------------------------------------------------------------------------------------


def free_memory(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: namedtuple("Memory", "available")(free))


def test_an_original_that_does_not_fit_is_missing_and_said_so(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_run, "_SPARE_BYTES", 0)
    free_memory(monkeypatch, 400_000)  # the packed model takes a quarter of a megabyte, the original a whole one
    bench_shape(bench, config(), Recipe.make("rtn"), tmp_path)
    assert [row["model"] for row in bench.rows] == ["packed", "packed"]
    (words,) = bench.missing
    assert words.startswith("original: takes about 0.0 GB of memory") and "--original-layers" in words
    assert bench.results()["speedups"] == {}
    table = speed_table({"name": "tiny", "random_weights": True, **bench.results()})
    assert {len(row) for row in table.rows} == {3}


def test_a_packed_model_that_does_not_fit_is_refused(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free_memory(monkeypatch, 300_000_000)
    with pytest.raises(ResourceError, match=r"packed: takes about 0\.5 GB of memory, 0\.3 GB are free"):
        bench_shape(bench, config(), Recipe.make("rtn"), tmp_path)
    free_memory(monkeypatch, 1 << 40)
    monkeypatch.setattr("shutil.disk_usage", lambda path: namedtuple("Disk", "free")(1000))
    with pytest.raises(ResourceError, match=r"packed: its files take 0\.0 GB, .* has 0\.0 GB free; set TMPDIR"):
        bench_shape(bench, config(), Recipe.make("rtn"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moebius.evaluate.random_checkpoint.write_shard", full)
    with pytest.raises(OutputError, match="No space left on device"):
        bench_shape(bench, config(), Recipe.make("rtn"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_packed_and_original_the_wrong_way_round(bench: Bench, tmp_path: Path) -> None:
    original, packed = save_tiny("olmoe", tmp_path / "original"), tmp_path / "packed"
    packed.mkdir()
    write_random_checkpoint(config(), packed, Recipe.make("rtn"))
    with pytest.raises(CheckpointError, match="did not pack; pack it first: moebius quantize"):
        bench_run.bench_checkpoints(bench, str(original), None)
    with pytest.raises(CheckpointError, match="wanted the one that it was made from"):
        bench_run.bench_checkpoints(bench, str(packed), str(packed))
    bench_run.bench_checkpoints(bench, str(packed), None)
    assert bench.missing == ["the original: name it with --original"]
    assert bench.rows[0]["file_bytes"] == packed_checkpoint_size(packed).file_bytes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "gpt-9"], "no shape named 'gpt-9'; known: olmoe-1b-7b"),
        (["MODEL", "--shape", "olmoe-1b-7b"], "wanted one of them"),
        (["MODEL", "--bits", "2"], "leave out --method, --bits, --rest and --set"),
        (["--original", "MODEL"], "got no packed checkpoint"),
        (["--original-layers", "4"], "got no --shape"),
        (["--out", "nowhere/speed.json"], "wanted a file in a folder that exists"),
        (["--method", "rtm"], "no method named 'rtm'"),
    ],
)
def test_questions_that_make_no_sense(model: Path, arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["bench", *(str(model) if a == "MODEL" else a for a in arguments), *SMALL])
    assert result.exit_code == 2 and result.stdout == ""
    assert message in result.stderr and result.stderr.count("\n") == 1
