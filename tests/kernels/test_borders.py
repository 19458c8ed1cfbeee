"""What crosses into the kernels: hundreds of wrong calls, which every backend refuses or answers as the definition does."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from tests.kernels.test_agreement import (
    EXPERTS,
    Layer,
    bounds,
    disagreement,
    gated,
    graded,
    inputs,
    integers,
    mobie_layer,
    moebius_layer,
    needs_build,
    planes,
    signs,
)
from torch import Generator, Tensor

from moebius import native
from moebius.errors import CheckpointError, KernelError, MoebiusError, ShapeError
from moebius.formats import PackedProjection
from moebius.formats.integers import Integers
from moebius.kernels import packed_linear
from moebius.kernels.cpu_factors import kernel_of
from moebius.kernels.decoder_layer import Attention, DecoderLayer, GatedMlp, Matrix, RoutedExperts
from moebius.kernels.decoder_layer.cpu import normalize, place_heads
from moebius.kernels.routed_experts import PackedExperts, cpu, prepare, reference

pytestmark = needs_build

#: Other tensors in place of one that is right.
CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "one wider": lambda t: torch.cat([t, t[..., -1:]], -1),
    "one narrower": lambda t: t[..., :-1],
    "twice as wide": lambda t: torch.cat([t, t], -1),
    "no columns": lambda t: t[..., :0],
    "one row more": lambda t: torch.cat([t, t[:1]]),
    "one row less": lambda t: t[:-1],
    "no rows": lambda t: t[:0],
    "transposed": lambda t: t.mT.contiguous(),
    "a dimension more": lambda t: t.unsqueeze(0),
    "a dimension less": lambda t: t.flatten(),
    "every other column": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "transposed in memory": lambda t: t.mT.contiguous().mT,
    "one row for all": lambda t: t[:1].expand_as(t),
    "float64": lambda t: t.double(),
    "float16": lambda t: t.half(),
    "bfloat16": lambda t: t.bfloat16(),
    "int64": lambda t: t.long(),
    "int32": lambda t: t.int(),
    "int8": lambda t: t.to(torch.int8),
    "bool": lambda t: t.bool(),
    "complex": lambda t: t.to(torch.complex64),
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "far out": lambda t: t + 1_000_000,
    "negative": lambda t: -t - 1,
}


def outcome(run: Callable[[], Tensor]) -> Tensor | type[Exception]:
    """What comes of a call: a result, or how it was refused."""
    try:
        return run()
    except MoebiusError as error:
        return type(error)


def layers() -> dict[str, Layer]:
    generator = Generator().manual_seed(0)
    return {
        "planes": moebius_layer(generator, 65, 31, 63, 3),
        "signs": mobie_layer(generator, 65, 31, "output", 5),
    }


@pytest.mark.parametrize("kind", ["planes", "signs"])
@pytest.mark.parametrize("tokens", [2, 40])
def test_experts_refuse_what_the_definition_refuses(kind: str, tokens: int) -> None:
    layer = layers()[kind]
    experts = PackedExperts(*layer, gated)
    given = inputs(Generator().manual_seed(1), layer, tokens, "padding")
    run, refused = cpu.prepare(experts), 0
    for (_name, change), places in product(CHANGES.items(), [(0,), (1,), (2,), (0, 1, 2), (1, 2), (0, 2)]):
        call = [change(t) if i in places else t for i, t in enumerate(given)]
        wanted = outcome(lambda call=call: reference.routed_experts(*call, experts))  # type: ignore[misc]
        got = outcome(lambda call=call: run(*call))  # type: ignore[misc]
        if isinstance(wanted, Tensor) and wanted.isfinite().all():
            assert isinstance(got, Tensor) and got.dtype == wanted.dtype
            close, element = bounds()
            half = wanted.dtype in (torch.bfloat16, torch.float16)
            assert disagreement(got, wanted, close + 0.01 * half, 2 * element + 0.1 * half) is None, (_name, places)
        else:
            refused += 1
            assert isinstance(wanted, Tensor) or (got is wanted is ShapeError), (_name, places)
    assert refused > 60


@pytest.mark.parametrize(("bits", "group"), [(8, 0), (4, 32)])
@pytest.mark.parametrize("count", [3, 20])
def test_packed_linears_refuse_what_the_definition_refuses(bits: int, group: int, count: int) -> None:
    generator = Generator().manual_seed(0)
    codes = torch.randint(0, 2**bits, (1, 31, 65), generator=generator)
    weight = Integers.pack(codes, torch.rand(1, 31, 3 if group else 1), None, bits=bits, group_size=group or 65)
    run, states, refused = packed_linear.prepare(weight), torch.randn(count, 65, generator=generator), 0
    assert type(run).__name__ == "CpuLinear"
    for name, change in CHANGES.items():
        wanted = outcome(lambda change=change: packed_linear.reference.packed_linear(change(states), weight))  # type: ignore[misc]
        got = outcome(lambda change=change: run(change(states)))  # type: ignore[misc]
        if isinstance(wanted, Tensor):
            assert isinstance(got, Tensor) and got.dtype == wanted.dtype and got.shape == wanted.shape, name
            assert len(got) == 0 or disagreement(got, wanted, 0.03, 0.2) is None, name
        else:
            refused += 1
            assert got is wanted is ShapeError, name
    assert refused > 9


def test_parts_that_do_not_meet_are_refused() -> None:
    """Whatever the backend: before it is chosen."""
    generator = Generator().manual_seed(0)
    (gate_up, down), (other_up, other_down) = (
        moebius_layer(generator, hidden, inner, 63, 2) for hidden, inner in ((65, 31), (64, 30))
    )
    short = PackedProjection(planes(generator, "input", 62, 62, 2), right=gate_up.right)
    several = Integers.pack(torch.zeros(2, 63, 65), torch.ones(2, 63, 1), None, bits=8, group_size=65)
    assert PackedExperts(gate_up, PackedProjection(signs(generator, 63, 31, 0), left=down.left), gated).count == EXPERTS
    bias = torch.zeros(EXPERTS, 62)
    for wrong in (
        (other_up, down),
        (short, down),
        (replace(gate_up, right=several), down),
        (replace(gate_up, right=other_down.left), down),
        (gate_up, replace(down, left=None, right=gate_up.right)),
        (gate_up, PackedProjection(integers(generator, 65, 31))),
    ):
        with pytest.raises(ShapeError):
            PackedExperts(*wrong, gated)
    for biases in ((bias[:, :-1], None), (bias[:-1], None), (None, bias)):
        with pytest.raises(ShapeError, match="bias"):
            PackedExperts(gate_up, down, gated, *biases)
    with pytest.raises(ShapeError, match="got 62 units out of 62 channels, wanted the 31"):
        PackedExperts(gate_up, down, torch.tanh)


def test_damaged_tensors_are_refused() -> None:
    for gate_up, down in layers().values():
        for projection, other in ((gate_up, down), (down, gate_up)):
            for name, part in projection.parts().items():
                for tensor, value in part.tensors().items():
                    for changed in (value[..., :-1].contiguous(), value.double(), value.flatten()[:-1]):
                        damaged = replace(projection, **{name: part.replace(**{tensor: changed})})
                        pair = (damaged, other) if projection is gate_up else (other, damaged)
                        with pytest.raises(CheckpointError):
                            PackedExperts(*pair, gated)


def test_gradients_are_not_dropped() -> None:
    layer = layers()["planes"]
    states, index, weights = inputs(Generator().manual_seed(0), layer, 2, "all on one")
    run = cpu.prepare(PackedExperts(*layer, gated))
    for wanting in ((states.clone().requires_grad_(), weights), (states, weights.clone().requires_grad_())):
        with pytest.raises(KernelError, match="no gradients"):
            run(wanting[0], index, wanting[1])
        with torch.no_grad():
            run(wanting[0], index, wanting[1])


# The extension itself, whatever Python in front of it lets through


def wrong(tensor: Tensor, free: set[str]) -> list[Tensor]:
    """Changes after which a tensor is another one for C++, without those that it is free to have."""
    skipped = {"meta", "sparse", "far out", "negative", *free}
    if tensor.dim() == 1:
        skipped |= {"transposed", "transposed in memory"}
    if tensor.dim() == 4:  # caches may lie anywhere but for their heads
        skipped.add("one row for all")
    changed = [change(tensor) for name, change in CHANGES.items() if name not in skipped]
    kind, shape = tensor.dtype, tensor.shape
    return [t for t in changed if t.dtype != kind or t.shape != shape or (not t.is_contiguous() and t.numel())]


def refuses_all(call: Callable[..., Any], *right: Any, free: dict[int, set[str]] | None = None) -> int:
    """Calls with one tensor changed at a time; the call itself is fine."""
    call(*right)
    count = 0
    for place, argument in enumerate(right):
        if isinstance(argument, Tensor) and argument.dim():
            for changed in wrong(argument, (free or {}).get(place, set())):
                with pytest.raises((ShapeError, CheckpointError, TypeError)):
                    call(*right[:place], changed, *right[place + 1 :])
                count += 1
            for nonsense in (argument.data_ptr(), "tensor", argument.to("meta")):
                with pytest.raises((ShapeError, TypeError)):
                    call(*right[:place], nonsense, *right[place + 1 :])
    return count


def test_factors_check_what_they_are_handed() -> None:
    generator = Generator().manual_seed(0)
    count = 0
    for packed in (
        planes(generator, "input", 31, 65, 3),
        planes(generator, "output", 31, 65, 3),
        signs(generator, 31, 65, 7),
        graded(generator, "input", 31, 65),
        graded(generator, "output", 31, 65),
        integers(generator, 31, 65),
    ):
        factor = kernel_of(packed).factor
        index = torch.zeros(4, dtype=torch.int64)
        given = torch.zeros(4, packed.columns), torch.zeros(4, packed.rows)
        count += refuses_all(lambda a, b, c, factor=factor: factor.apply(a, b, c, 1, 1), *given, index)
        for per in (0, -1, 2):
            with pytest.raises(ShapeError):
                factor.apply(*given, None, per, 1)
        room = torch.empty(packed.rows * packed.columns, dtype=torch.bfloat16)
        assert factor.unpack(0, room, 1) > 0
        for matrix, target in ((packed.batch, room), (-1, room), (0, room[:-1]), (0, room.float()), (0, room[::2])):
            with pytest.raises((ShapeError, TypeError)):
                factor.unpack(matrix, target, 1)
    assert count > 200


def test_what_factors_are_made_of_is_checked() -> None:
    generator, extension = Generator().manual_seed(0), native.extension()
    held = kernel_of(planes(generator, "input", 31, 65, 3)).held
    table = torch.zeros(8, 7)
    # How many directions and entries there are is said by these scales alone, as far as signs and widths allow.
    free = {2: {"one wider"}, 3: {"one wider", "twice as wide"}}
    assert refuses_all(lambda *t: extension.planes(True, *t), *held, table, free=free) > 40
    for place, value in (((0, 0), 32), ((2, 0), -1), ((3, 1), 30000)):
        widths = held[0].clone()
        widths[place] = value
        with pytest.raises(CheckpointError, match="damaged"):
            extension.planes(True, widths, *held[1:], table)
    held = kernel_of(signs(generator, 31, 65, 7)).held
    assert refuses_all(lambda *t: extension.signs(65, *t), *held) > 60
    for column in (-1, 65, 2**30):
        picked = held[3].clone()
        picked[2, 3] = column
        with pytest.raises(ShapeError, match="no matrix has"):
            extension.signs(65, *held[:3], picked, *held[4:])
    packed = graded(generator, "input", 31, 65)
    held, runs = kernel_of(packed).held, packed.runs()
    assert refuses_all(lambda *t: extension.codes(True, 65, runs, *t), *held) > 5
    for grades in ([(9, 31)], [(0, 31)], [(8, 30)], [(8, 32)], [(8, -1), (8, 32)], [(8, 2**40)], [], [(3, 31)]):
        with pytest.raises((ShapeError, TypeError)):
            extension.codes(True, 65, grades, *held)
    for entries in (64, 66, -1, 2**40):
        with pytest.raises((ShapeError, TypeError)):
            extension.codes(True, entries, runs, *held)


def test_linears_check_what_they_are_handed() -> None:
    extension = native.extension()
    for bits, group, scales in ((8, 65, 1), (4, 32, 3)):
        codes = torch.zeros(31, (65 * bits + 7) // 8, dtype=torch.uint8)
        held = codes, torch.ones(31, scales).half()
        assert refuses_all(lambda *t, bits=bits, group=group: extension.PackedLinear(65, bits, group, *t), *held) > 20
        linear = extension.PackedLinear(65, bits, group, *held)
        assert refuses_all(lambda *t, linear=linear: linear.apply(*t, 1), torch.zeros(4, 65), torch.zeros(4, 31)) > 20
        for columns, other, size in ((64, bits, group), (65, 3, group), (65, bits, 31), (65, bits, 0), (-1, bits, group)):
            with pytest.raises(ShapeError):
                extension.PackedLinear(columns, other, size, codes[:, :-1], held[1])
        for first, rows in ((0, 32), (-1, 2), (30, 2), (2**31 - 1, 1)):
            with pytest.raises((ShapeError, TypeError)):
                linear.unpack(first, torch.empty(rows, 65), 1)


def test_decoder_layers_check_what_they_are_handed() -> None:
    layer = dense_layer(16, 24)
    states, positions = torch.zeros(2, 16), (torch.zeros(1, 4), torch.zeros(1, 4))
    caches = torch.zeros(2, 2, 3, 4), torch.zeros(2, 2, 3, 4)
    step = layer._layer.step
    assert refuses_all(lambda *t: step(*t, 1), states, *positions, *caches) > 60
    assert (
        refuses_all(lambda a, b, c: native.extension().normalize(a, b, 0.1, c, 1), states, torch.ones(16), torch.ones(2, 16))
        > 15
    )
    place = native.extension().place_heads
    heads = torch.zeros(4, 8), torch.zeros(2, 2, 3, 4), torch.ones(4), torch.ones(2, 4), torch.ones(2, 4)
    assert refuses_all(lambda *t: place(*t[:3], 0.1, *t[3:], 1), *heads, free={1: {"bfloat16"}}) > 40
    with pytest.raises(ShapeError):
        place_heads(torch.zeros(8, 8), torch.zeros(2, 2, 3, 4))  # four tokens for three places
    with pytest.raises(ShapeError):
        normalize(torch.zeros(2, 16), torch.ones(15), 0.1)
    with pytest.raises(ShapeError):
        Matrix(torch.zeros(4, 4).double())


def matrix(rows: int, columns: int) -> Matrix:
    return Matrix(torch.randn(rows, columns, generator=Generator().manual_seed(rows)))


def dense_layer(hidden: int, units: int, **other: Any) -> DecoderLayer:
    attention = Attention(
        matrix(16, hidden), matrix(8, hidden), matrix(8, hidden), matrix(hidden, 16), None, None, 4, 2, 4, 0.5
    )
    mlp = GatedMlp(matrix(units, hidden), matrix(units, hidden), matrix(hidden, units))
    return DecoderLayer(torch.ones(hidden), torch.ones(hidden), 1e-5, replace(attention, **other), mlp)


@pytest.mark.parametrize(
    "other",
    [
        {"heads": 3},
        {"heads": 0},
        {"key_heads": 0},
        {"key_heads": 3},
        {"width": 5},
        {"key": "wide"},
        {"output": "wide"},
        {"query_norm": torch.ones(5)},
        {"key_norm": torch.ones(3)},
        {"query_norm": torch.ones(4), "key_norm": torch.ones(8)},
    ],
)
def test_attention_that_does_not_fit_is_refused(other: dict[str, Any]) -> None:
    with pytest.raises(ShapeError):
        dense_layer(16, 24, **{name: matrix(9, 17) if value == "wide" else value for name, value in other.items()})


@pytest.mark.parametrize("top_k", [0, -1, EXPERTS + 1, 1 << 20])
def test_more_experts_for_a_token_than_there_are_are_refused(top_k: int) -> None:
    generator = Generator().manual_seed(0)
    experts = prepare(PackedExperts(*moebius_layer(generator, 16, 31, 20, 2), gated))
    layer = dense_layer(16, 24)
    for router, count in ((matrix(EXPERTS, 16), top_k), (matrix(EXPERTS + 1, 16), 2), (matrix(EXPERTS, 15), 2)):
        with pytest.raises(ShapeError):
            DecoderLayer(
                torch.ones(16), torch.ones(16), 1e-5, layer.attention, RoutedExperts(router, count, True, experts, None)
            )


def test_tensors_live_as_long_as_what_reads_them() -> None:
    """Nothing but the extension holds them; what takes their place in memory must not be read."""
    generator = Generator().manual_seed(0)
    packed = planes(generator, "input", 31, 65, 3)
    factor = kernel_of(packed).factor
    linear = packed_linear.prepare(integers(generator, 65, 65)).linear  # type: ignore[attr-defined]
    layer = dense_layer(16, 24)._layer
    states = torch.randn(3, 31, generator=generator)

    def results() -> list[Tensor]:
        out, wide = torch.empty(3, 65), torch.empty(3, 65)
        factor.apply(states, out, None, 1, 1)
        linear.apply(out, wide, 1)
        mine = torch.ones(1, 16)
        layer.step(mine, torch.ones(1, 4), torch.zeros(1, 4), torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 4), 1)
        return [out, wide, mine]

    before = results()
    del packed
    gc.collect()
    _littered = [torch.full((n,), torch.nan) for n in range(1, 3000)]
    assert all(torch.equal(a, b) for a, b in zip(before, results(), strict=True))
