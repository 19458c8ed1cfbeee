"""The Triton kernels against the reference. Without a GPU they run in Triton's interpreter, see ``tests/conftest.py``.

In float32 the two differ by the order of sums alone, so that every bit and every scale has to be right. The tolerance is
itself tested: it rejects outputs that are 1 % off, one flipped sign and one row that was not written.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor
from torch.nn import functional

from moebius.errors import KernelError
from moebius.formats import PackedProjection
from moebius.formats.dense import Dense
from moebius.formats.graded import Graded
from moebius.formats.integers import Integers
from moebius.formats.logarithmic import encode
from moebius.formats.planes import Planes, pack_signs
from moebius.formats.signs import Signs
from moebius.kernels.routed_experts import PackedExperts, prepare, reference

pytest.importorskip("triton")
from moebius.kernels.routed_experts import triton as backend
from moebius.kernels.routed_experts import triton_kernels, triton_route
from moebius.kernels.routed_experts.activations import ACTIVATIONS

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's exp of large numbers is inf, as it should
ROOT = Path(__file__).parents[2]
DEVICE = "cuda" if torch.cuda.is_available() and not triton_kernels.INTERPRETED.value else "cpu"
EXPERTS = 5
#: Relative Frobenius norm and worst element relative to the largest. In bf16 five roundings add up.
TOLERANCE = {torch.float32: (2e-5, 2e-5), torch.bfloat16: (9e-3, 2e-2), torch.float16: (9e-3, 2e-2)}


@pytest.fixture(autouse=True)
def blank_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """New tensors hold NaN: what a kernel does not write, it must not pass on."""
    new_empty = Tensor.new_empty

    def filled(self: Tensor, *shape: int, **options: Any) -> Tensor:
        blank = new_empty(self, *shape, **options)
        return blank.fill_(torch.nan) if blank.is_floating_point() else blank

    monkeypatch.setattr(Tensor, "new_empty", filled)
    monkeypatch.setattr(backend, "_BUSY", 16)  # programs take milliseconds here


@dataclass(frozen=True)
class Case:
    """Arguments of the op."""

    hidden: Tensor
    index: Tensor
    weights: Tensor
    gate_up: PackedProjection
    down: PackedProjection
    activation: Callable[[Tensor], Tensor]
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    def experts(self) -> PackedExperts:
        return PackedExperts(self.gate_up, self.down, self.activation, self.gate_up_bias, self.down_bias)

    def given(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden, self.index, self.weights


def run(case: Case) -> Tensor:
    experts = case.experts()
    assert backend.refusal(experts) is None
    return backend.prepare(experts)(*case.given())


def swiglu(states: Tensor) -> Tensor:
    gate, up = states.chunk(2, dim=-1)
    return functional.silu(gate) * up


def error(got: Tensor, wanted: Tensor) -> tuple[float, float]:
    """Relative Frobenius norm, and the worst element relative to the largest wanted one."""
    difference = (got.double() - wanted.double()).nan_to_num(torch.inf)
    scale = wanted.double().norm(), wanted.double().abs().max()
    return float(difference.norm() / scale[0]), float(difference.abs().max() / scale[1])


def agrees(got: Tensor, wanted: Tensor, dtype: torch.dtype = torch.float32) -> bool:
    norm, worst = error(got, wanted)
    return norm <= TOLERANCE[dtype][0] and worst <= TOLERANCE[dtype][1]


def wanted_of(case: Case) -> Tensor:
    """In float32, whatever the dtype of the hidden states is."""
    return reference.routed_experts(case.hidden.float(), case.index, case.weights, case.experts())


def check(case: Case) -> Tensor:
    got, wanted = run(case), wanted_of(case)
    assert got.dtype == case.hidden.dtype
    assert got.shape == wanted.shape
    assert agrees(got, wanted, case.hidden.dtype), error(got, wanted)
    return got


# Random layers


def widths_of(generator: Generator, directions: int, planes: int) -> Tensor:
    """The first expert has everything, the third nothing."""
    widths = torch.randint(0, directions + 1, (EXPERTS, planes), generator=generator).sort(1, descending=True).values
    widths[0], widths[2] = directions, 0
    return widths


def planes(generator: Generator, directions: int, entries: int, side: str, widths: Tensor, bits: int = 8) -> Planes:
    positive = torch.rand(EXPERTS, widths.shape[1], directions, entries, generator=generator) > 0.5
    used = torch.arange(directions) < widths[:, :1].sum(1, keepdim=True)
    entry = encode(torch.rand(EXPERTS, entries, generator=generator) + 0.2, bits)
    direction = encode(torch.rand(EXPERTS, directions, generator=generator) + 0.2, bits, used)
    sizes: dict[str, Any] = {"side": side, "directions": directions, "entries": entries, "scale_bits": bits}
    return Planes.pack(pack_signs(positive, widths), widths, *entry, *direction, **sizes)


def graded(generator: Generator, directions: int, entries: int, side: str) -> Graded:
    bits = (
        torch.tensor([8, 6, 5, 4, 3, 1])[torch.randint(0, 6, (directions,), generator=generator)].sort(descending=True).values
    )
    codes = torch.stack([torch.randint(0, 2**b, (entries,), generator=generator) for b in bits.tolist()]).unsqueeze(0)
    scales = encode((torch.rand(1, directions, generator=generator) + 0.2) / (2**bits * entries**0.5), 8)
    return Graded.pack(codes, *scales, side=side, bits=bits.tolist())


def integers(generator: Generator, rows: int, columns: int, bits: int = 8) -> Integers:
    """Scales of either sign, and a zero."""
    codes = torch.randint(0, 2**bits, (1, rows, columns), generator=generator)
    scales = torch.randn(1, rows, 1, generator=generator) * 2**-bits
    scales[:, -1] = 0 if rows > 1 else 1
    return Integers.pack(codes, scales, None, bits=bits, group_size=columns)


def signs(generator: Generator, rows: int, columns: int, salient: int) -> Signs:
    """Scales of either sign, and zeros."""
    mask = torch.zeros(EXPERTS, columns, dtype=torch.bool)
    for row in mask:
        row[torch.randperm(columns, generator=generator)[:salient]] = True
    row_scales, column_scales = (
        torch.randn(EXPERTS, rows, generator=generator),
        torch.randn(EXPERTS, columns, generator=generator),
    )
    row_scales[0, rows // 2], column_scales[:, columns // 2] = 0, 0
    return Signs.pack(
        torch.rand(EXPERTS, rows, columns, generator=generator) > 0.5,
        row_scales,
        column_scales,
        salient_mask=mask,
        salient_positive=torch.rand(EXPERTS, rows, columns, generator=generator) > 0.5,
        salient_column_scales=torch.randn(EXPERTS, columns, generator=generator),
    )


def moebius_layer(
    generator: Generator, hidden: int, inner: int, rank: int, widths: Tensor, bits: int = 8
) -> tuple[PackedProjection, PackedProjection]:
    gate_up = planes(generator, rank, 2 * inner, "input", widths, bits)
    down = planes(generator, rank, inner, "output", widths, bits)
    return (
        PackedProjection(gate_up, right=graded(generator, rank, hidden, "input")),
        PackedProjection(down, left=graded(generator, rank, hidden, "output")),
    )


def mobie_layer(
    generator: Generator, hidden: int, inner: int, rank: int, side: str, salient: int, bits: int = 8
) -> tuple[PackedProjection, PackedProjection]:
    """``side`` as in the recipe: where the shared factors sit; ``"none"`` for none."""
    parts = []
    for out, inputs, mine in ((2 * inner, hidden, "input"), (hidden, inner, "output")):
        where = mine if side == "hidden" else side
        if where == "none":
            parts.append(PackedProjection(signs(generator, out, inputs, min(salient, inputs))))
        elif where == "output":
            left = integers(generator, out, rank, bits)
            parts.append(PackedProjection(signs(generator, rank, inputs, min(salient, inputs)), left=left))
        else:
            right = integers(generator, rank, inputs, bits)
            parts.append(PackedProjection(signs(generator, out, rank, min(salient, rank)), right=right))
    return parts[0], parts[1]


def tokens_for(
    generator: Generator, layer: tuple[PackedProjection, PackedProjection], tokens: int, top_k: int = 2, **changes: Any
) -> Case:
    """Random tokens for a layer: the last expert gets none, and some choices are padding."""
    index = torch.rand(tokens, EXPERTS - 1, generator=generator).topk(top_k).indices
    index[1::4, -1] = EXPERTS
    index[2::4, 0] = -1
    hidden = torch.randn(tokens, layer[0].shape[2], generator=generator)
    weights = torch.rand(tokens, top_k, generator=generator) + 0.1
    return on_device(replace(Case(hidden, index, weights, *layer, swiglu), **changes))


def on_device(case: Case) -> Case:
    def move(value: Any) -> Any:
        if isinstance(value, PackedProjection):
            moved = {k: p.replace(**{n: t.to(DEVICE) for n, t in p.tensors().items()}) for k, p in value.parts().items()}
            return PackedProjection(**moved)
        return value.to(DEVICE) if isinstance(value, Tensor) else value

    return Case(*(move(getattr(case, field.name)) for field in fields(case)))


@pytest.fixture
def generator() -> Iterator[Generator]:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def case(generator: Generator) -> Case:
    """A small layer of ``moebius`` whose experts all have all planes, and tokens for it."""
    widths = torch.tensor([[20, 11]]).repeat(EXPERTS, 1)
    return tokens_for(generator, moebius_layer(generator, 24, 18, 20, widths), 2)


# Agreement


@pytest.mark.parametrize(
    ("tokens", "hidden", "inner", "rank", "dtype"),
    [
        (1, 1, 1, 1, torch.float32),
        (3, 31, 63, 65, torch.float32),
        (2, 65, 31, 63, torch.float32),
        (2, 63, 65, 31, torch.float32),
        (1, 1000, 31, 63, torch.float32),
        (1, 63, 1000, 31, torch.float32),
        (1, 31, 3, 1000, torch.float32),
        (3, 31, 65, 63, torch.bfloat16),
        (2, 65, 63, 31, torch.float16),
    ],
)
def test_moebius(generator: Generator, tokens: int, hidden: int, inner: int, rank: int, dtype: torch.dtype) -> None:
    layer = moebius_layer(generator, hidden, inner, rank, widths_of(generator, rank, 3), bits=5)
    case = tokens_for(generator, layer, tokens)
    check(replace(case, hidden=case.hidden.to(dtype)))


@pytest.mark.parametrize("count", range(8))
def test_every_number_of_planes(generator: Generator, count: int) -> None:
    """As many in every direction of every expert."""
    widths = torch.full((EXPERTS, count), 17) if count else torch.zeros(EXPERTS, 1, dtype=torch.int64)
    case = tokens_for(generator, moebius_layer(generator, 20, 16, 17, widths), 2)
    if count:
        check(case)
        return
    assert not run(case).any()
    none = Planes.skeleton(torch.zeros(EXPERTS, 0), side="input", directions=17, entries=32, scale_bits=8, device=DEVICE)
    without = replace(case, gate_up=replace(case.gate_up, factor=none))
    assert not run(without).any()


@pytest.mark.parametrize(("side", "rank", "bits"), [("output", 31, 8), ("input", 65, 4), ("hidden", 63, 8), ("none", 0, 8)])
def test_mobie(generator: Generator, side: str, rank: int, bits: int) -> None:
    check(tokens_for(generator, mobie_layer(generator, 65, 31, rank, side, 3, bits), 3))


@pytest.mark.parametrize("salient", [0, 20])
def test_salient_columns(generator: Generator, salient: int) -> None:
    case = tokens_for(generator, mobie_layer(generator, 21, 33, 40, "hidden", salient), 2)
    check(replace(case, hidden=case.hidden.bfloat16()))


def test_planes_with_signs(generator: Generator) -> None:
    gate_up, _ = moebius_layer(generator, 30, 20, 20, widths_of(generator, 20, 2))
    _, down = mobie_layer(generator, 30, 20, 20, "input", 2)
    check(tokens_for(generator, (gate_up, down), 2))


@pytest.mark.parametrize(
    ("block", "spread"),
    [(0, "all"), (0, "one expert"), (0, "padding"), (16, "padding"), (16, "one expert"), (32, "all"), (64, "all")],
)
def test_many_tokens(generator: Generator, monkeypatch: pytest.MonkeyPatch, block: int, spread: str) -> None:
    """More of them than a program takes for an expert, found by scanning (0) and in sorted blocks."""
    if block:
        monkeypatch.setattr(triton_route, "_SCANNED", 0)
        monkeypatch.setattr(triton_route, "_block", lambda slots, experts: block)
    case = tokens_for(generator, moebius_layer(generator, 12, 9, 18, widths_of(generator, 18, 2)), 18, top_k=1)
    if spread == "one expert":
        case = replace(case, index=torch.full_like(case.index, 3))
    if spread == "padding":
        case = replace(case, index=torch.full_like(case.index, EXPERTS))
        assert not run(case).any()
    else:
        check(case)


def test_splits_of_sums(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums that several programs share."""
    monkeypatch.setattr(backend, "_BUSY", 512)
    check(tokens_for(generator, moebius_layer(generator, 300, 12, 150, widths_of(generator, 150, 2)), 1))


def test_no_tokens(case: Case) -> None:
    none = replace(case, hidden=case.hidden[:0], index=case.index[:0], weights=case.weights[:0])
    assert run(none).shape == none.hidden.shape


def test_inputs_of_other_layouts_and_types(case: Case) -> None:
    apart: dict[str, Any] = {
        name: torch.stack([value, torch.zeros_like(value)], -1)[..., 0].mT.contiguous().mT
        for name, value in (("hidden", case.hidden), ("index", case.index), ("weights", case.weights))
    }
    assert not any(value.is_contiguous() for value in apart.values())
    got = check(replace(case, **apart))
    assert torch.equal(got, run(case)), "repeats do not give the same bits"
    apart = {"index": case.index.int(), "weights": case.weights.bfloat16()}
    check(replace(case, **apart))


@pytest.mark.parametrize(
    ("name", "gated"), [("silu", True), ("gelu", True), ("gelu_tanh", True), ("relu_squared", False), ("silu", False)]
)
def test_activations_and_biases(generator: Generator, name: str, gated: bool) -> None:
    function = ACTIVATIONS[name]

    def activation(states: Tensor) -> Tensor:
        gate, up = states.chunk(2, dim=-1)
        return function(gate) * up if gated else function(states)

    inner = 10 if gated else 20  # channels of gate_up: 20
    gate_up, _ = mobie_layer(generator, 18, 10, 9, "input", 0)
    _, down = mobie_layer(generator, 18, inner, 9, "output", 0)
    up_bias, down_bias = (torch.randn(EXPERTS, channels, generator=generator) for channels in (20, 18))
    index = torch.tensor([[0, 3], [EXPERTS, 1]])
    biases = {"gate_up_bias": up_bias, "down_bias": down_bias}
    check(tokens_for(generator, (gate_up, down), 2, index=index, activation=activation, **biases))


def test_weights_that_were_loaded_in_place(case: Any) -> None:
    """Tables of a layer follow what is stored, not the tensor it is stored in."""
    check(case)
    case.gate_up.factor.widths.copy_(torch.tensor([[20, 19], [20, 3], [20, 12], [20, 11], [20, 10]]))  # as many signs in all
    check(case)
    case.down.left.scale_codes.copy_(case.down.left.scale_codes.flip(1))
    check(case)
    other = case.down.left.codes ^ 1  # in a tensor of its own, beside the old scales
    check(replace(case, down=replace(case.down, left=case.down.left.replace(codes=other))))


# The tolerance rejects


def test_rejects_one_percent(case: Case) -> None:
    got = check(case)
    assert not agrees(got * 1.01, wanted_of(case))
    half = replace(case, hidden=case.hidden.bfloat16())
    assert not agrees(check(half) * 1.01, wanted_of(half), torch.bfloat16)


def test_rejects_an_unwritten_row(case: Case) -> None:
    got = check(case)
    got[1] = 0
    assert not agrees(got, wanted_of(case))
    got[1] = torch.nan
    assert not agrees(got, wanted_of(case))


@pytest.mark.parametrize("name", ["gate_up", "down"])
def test_rejects_one_flipped_sign(case: Case, name: str) -> None:
    wanted = wanted_of(case)
    projection = getattr(case, name)
    flipped = projection.factor.signs.clone()
    expert = int(case.index[0, 0])
    flipped[31 * expert + 25, 1] ^= 1 << 5  # a second plane; 31 rows are 20 of the first and 11 of the second
    other = replace(projection, factor=projection.factor.replace(signs=flipped))
    got = run(replace(case, **{name: other}))
    assert not agrees(got, wanted)


# What is refused


def clamped(states: Tensor) -> Tensor:
    return swiglu(states.clamp(max=7))


def interleaved(states: Tensor) -> Tensor:
    return functional.silu(states[..., ::2]) * states[..., 1::2]


def test_refuses(case: Case) -> None:
    gate_up, down = case.gate_up, case.down
    assert backend.refusal(case.experts()) is None
    for activation in (clamped, interleaved, lambda states: states.gate):
        assert backend.refusal(PackedExperts(gate_up, down, activation)) is not None
    dense = Dense.pack(torch.randn(EXPERTS, *gate_up.factor.unpack().shape[1:]))
    shared = Dense.pack(gate_up.right.unpack())  # type: ignore[union-attr]
    rows, columns = shared.rows, shared.columns
    half = -(-columns // 2)
    grouped = Integers.pack(torch.ones(1, rows, columns), torch.ones(1, rows, 2), None, bits=8, group_size=half)
    channels = gate_up.factor.rows
    left = Integers.pack(torch.ones(1, channels, channels), torch.ones(1, channels, 1), None, bits=8, group_size=channels)
    for other in (
        replace(gate_up, factor=dense),
        replace(gate_up, right=shared),
        replace(gate_up, right=grouped),
        replace(gate_up, left=left),
    ):
        assert backend.refusal(PackedExperts(other, down, swiglu)) is not None


def test_refuses_directions_at_the_wrong_side() -> None:
    generator = Generator().manual_seed(0)
    widths = widths_of(generator, 16, 2)
    for side in ("input", "output"):
        packed = planes(generator, 16, 16, side, widths)
        reason = backend.refusal(PackedExperts(PackedProjection(packed), PackedProjection(packed), torch.tanh))
        assert reason is not None and "side" in reason


def test_says_why(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEBIUS_KERNEL", "triton")
    with pytest.raises(KernelError, match=r"the activation is none of silu"):
        prepare(replace(case, activation=clamped).experts())


def test_a_bound_method_is_tried_once(case: Case) -> None:
    calls = []

    class Experts:
        def gate(self, states: Tensor) -> Tensor:
            calls.append(len(states))
            return swiglu(states)

    packed = replace(case, activation=Experts().gate).experts()
    calls.clear()
    assert all(backend.refusal(packed) is None for _ in range(3))
    assert len(calls) == 1


# Beyond the interpreter


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, **environment, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=variables, capture_output=True, text=True, check=False)


def test_compiles_for_a_gpu(tmp_path: Path) -> None:
    """No GPU is needed for that, and every product with signs uses its tensor cores."""
    done = python("tests/kernels/compile_triton.py", "90", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    kernels = json.loads(done.stdout)
    names = {name.split()[0] for name in kernels}
    assert names == {name for name in vars(triton_kernels) if name.endswith("_kernel")}
    for name, ptx in kernels.items():
        assert ("mma" in ptx) == name.startswith(("shared", "over_rows", "along"))
        assert ("lop3" in ptx) == name.startswith(("over_rows", "along"))


def test_benchmark_smoke_run(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    done = python("benchmarks/kernel_gpu.py", "--device", "cpu", "--tiny", "--tokens", "1", "--out", str(out))
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [row["method"] for row in rows] == ["moebius", "mobie"]
    assert all(row["error"] < TOLERANCE[torch.bfloat16][0] for row in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_benchmark_says_that_there_is_no_gpu() -> None:
    done = python("benchmarks/kernel_gpu.py", "--tiny")
    assert done.returncode == 1
    assert done.stderr.startswith("no CUDA device here")
    assert done.stderr.count("\n") == 1
