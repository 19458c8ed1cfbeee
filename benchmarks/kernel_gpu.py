#!/usr/bin/env python3
"""Microseconds of one MoE block on a GPU: the Triton kernels on packed experts against grouped products of bf16 ones.

    python benchmarks/kernel_gpu.py                            # three models' shapes, batches of 1 to 16, prompts
    python benchmarks/kernel_gpu.py --shape olmoe-1b-7b --tokens 1 --tokens 512
    python benchmarks/kernel_gpu.py --device cpu --tiny        # a smoke run in Triton's interpreter, whose times say nothing

Weights are random. Every run is a CUDA graph of several layers with weights and tokens of their own, so that nothing is read
from the cache that a model would not find there. `block` is the bf16 block with its sorting and its weighted sum, `products`
its two grouped products alone; `ratio` is to the block, `products_ratio` to the products. `error` is the relative distance
of the packed block to the reference.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional

from moebius.formats import Packed, PackedProjection
from moebius.formats.base import empty_like_spec
from moebius.formats.bits import pack
from moebius.formats.graded import Graded
from moebius.formats.integers import Integers
from moebius.formats.planes import Planes
from moebius.formats.signs import Signs
from moebius.kernels.routed_experts import PackedExperts, reference

TOKENS = [1, 2, 4, 8, 16, 512, 1024]
METHODS = ["moebius", "mobie"]


@dataclass(frozen=True)
class Shape:
    """The routed experts of a layer."""

    experts: int
    top_k: int
    hidden: int
    inner: int

    @property
    def weights(self) -> int:
        """Of all experts of a layer."""
        return 3 * self.experts * self.hidden * self.inner


SHAPES = {
    "olmoe-1b-7b": Shape(64, 8, 2048, 1024),
    "qwen1.5-moe": Shape(60, 4, 2048, 1408),
    "qwen3-30b-a3b": Shape(128, 8, 2048, 768),
}
TINY = Shape(4, 2, 32, 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", choices=SHAPES, help="may be repeated; default: all")
    parser.add_argument("--method", action="append", choices=METHODS, help="may be repeated; default: both")
    parser.add_argument("--tokens", action="append", type=int, help=f"may be repeated; default: {TOKENS}")
    parser.add_argument("--layers", type=int, default=16, help="packed layers in a graph")
    parser.add_argument("--bf16-layers", type=int, default=4, help="bf16 layers in a graph")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a small shape, few tokens, one repeat")
    parser.add_argument("--out", type=Path, default=Path("build/bench-kernel-gpu.json"))
    args = parser.parse_args()
    if args.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device here: run this on a machine with one, or try --device cpu --tiny for a smoke run")
    shapes = {"tiny": TINY} if args.tiny else {name: SHAPES[name] for name in args.shape or SHAPES}
    if args.tiny:
        args.tokens, args.layers, args.bf16_layers, args.repeats = args.tokens or [1, 3], 1, 1, 1
    report: dict[str, Any] = {"machine": machine(args.device), "rows": []}
    print(report["machine"]["device"])
    print(f"{'shape':14} {'method':8} {'bits':>5} {'tokens':>6} {'us':>9} {'bf16 us':>9} {'ratio':>6} {'error':>8}")
    for name, shape in shapes.items():
        baseline = {tokens: bf16(shape, tokens, args) for tokens in args.tokens or TOKENS}
        for method in args.method or METHODS:
            layers = [random_layer(method, shape, seed, args.device) for seed in range(args.layers)]
            for tokens, base in baseline.items():
                row = {"shape": name, **asdict(shape), "method": method, "tokens": tokens, **base}
                row |= packed(shape, layers, tokens, args)
                row["ratio"] = row["block_us"] / row["packed_us"]
                row["products_ratio"] = row["products_us"] / row["packed_us"]
                report["rows"].append(row)
                times = f"{row['packed_us']:9.1f} {row['block_us']:9.1f} {row['ratio']:6.2f} {row['error']:8.1e}"
                print(f"{name:14} {method:8} {row['bits']:5.2f} {tokens:6} {times}", flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {args.out}")


# What is measured


def packed(
    shape: Shape, layers: list[tuple[PackedProjection, PackedProjection]], tokens: int, args: argparse.Namespace
) -> dict:
    """The block on packed experts: microseconds, peak memory with one layer's weights, bits, and how far off it is."""
    from moebius.kernels.routed_experts.triton import prepare  # not before main() has chosen a device

    ready = [prepare(PackedExperts(*layer, swiglu)) for layer in layers]
    inputs = [random_tokens(shape, tokens, seed, args.device) for seed in range(len(layers))]

    def run() -> None:
        for experts, given in zip(ready, inputs, strict=True):
            experts(*given)

    got = ready[0](*inputs[0]).float()
    wanted = reference.routed_experts(inputs[0][0].float(), *inputs[0][1:], PackedExperts(*layers[0], swiglu))
    stored = sum(projection.stored_bits() for projection in layers[0])
    return {
        "packed_us": microseconds(run, args) / len(layers),
        "packed_peak_bytes": peak(lambda: ready[0](*inputs[0]), args.device) + stored // 8,
        "bits": stored / shape.weights,
        "error": float((got - wanted).norm() / wanted.norm()),
    }


def bf16(shape: Shape, tokens: int, args: argparse.Namespace) -> dict:
    """The block with bf16 experts: microseconds of all of it and of its products, and peak memory with a layer's weights."""
    generator = torch.Generator(args.device).manual_seed(0)
    layers = []
    for _ in range(args.bf16_layers):
        sizes = (shape.experts, shape.hidden, 2 * shape.inner), (shape.experts, shape.inner, shape.hidden)
        options = {"generator": generator, "device": args.device, "dtype": torch.bfloat16}
        layers.append([torch.randn(size, **options) * size[1] ** -0.5 for size in sizes])
    inputs = [random_tokens(shape, tokens, seed, args.device) for seed in range(len(layers))]
    routed = [(*route(shape, given[1]), given) for given in inputs]

    def blocks() -> None:
        for layer, given in zip(layers, inputs, strict=True):
            grouped_block(shape, layer, given)

    def products() -> None:
        for layer, (order, ends, given) in zip(layers, routed, strict=True):
            grouped_products(layer, given[0][order // shape.top_k], ends)

    return {
        "block_us": microseconds(blocks, args) / len(layers),
        "products_us": microseconds(products, args) / len(layers),
        "bf16_peak_bytes": peak(lambda: grouped_block(shape, layers[0], inputs[0]), args.device) + 2 * shape.weights,
    }


def grouped_block(shape: Shape, layer: list[Tensor], given: tuple[Tensor, ...]) -> Tensor:
    """As a model would run it: (tokens, hidden)."""
    hidden, index, weights = given
    order, ends = route(shape, index)
    outputs = grouped_products(layer, hidden[order // shape.top_k], ends)
    scaled = outputs * weights.flatten()[order].unsqueeze(1)
    slots = scaled.new_empty(scaled.shape).index_copy_(0, order, scaled)
    return slots.view(*index.shape, -1).sum(1).to(hidden.dtype)


def route(shape: Shape, index: Tensor) -> tuple[Tensor, Tensor]:
    """Slots sorted by expert, and where each expert ends."""
    ranked, order = index.flatten().sort()
    experts = torch.arange(shape.experts, device=index.device)
    return order, torch.searchsorted(ranked, experts, right=True).int()


def grouped_products(layer: list[Tensor], states: Tensor, ends: Tensor) -> Tensor:
    """(slots, hidden)"""
    grouped = functional.grouped_mm
    return grouped(swiglu(grouped(states, layer[0], offs=ends)), layer[1], offs=ends)


def swiglu(states: Tensor) -> Tensor:
    gate, up = states.chunk(2, dim=-1)
    return functional.silu(gate) * up


# How it is measured


def microseconds(run: Callable[[], None], args: argparse.Namespace) -> float:
    """Median over replays of a CUDA graph; of plain calls without a GPU."""
    if args.device == "cpu":
        start = time.perf_counter()
        run()
        return 1e6 * (time.perf_counter() - start)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # compiles kernels, makes tables
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(args.repeats + 5):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end))
    return sorted(times[5:])[args.repeats // 2]


def peak(run: Callable[[], object], device: str) -> int:
    """Bytes that a call allocates at its peak; 0 without a GPU."""
    if device == "cpu":
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def machine(device: str) -> dict:
    import triton

    name = torch.cuda.get_device_name() if device == "cuda" else f"interpreter on {platform.processor() or platform.machine()}"
    return {"device": name, "torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()}


# Random layers, packed from the start


def random_tokens(shape: Shape, tokens: int, seed: int, device: str) -> tuple[Tensor, ...]:
    """Hidden states in bf16, experts, and routing weights that add up to one."""
    generator = torch.Generator(device).manual_seed(seed)
    hidden = torch.randn(tokens, shape.hidden, generator=generator, device=device).bfloat16()
    scores = torch.rand(tokens, shape.experts, generator=generator, device=device)
    weights, index = scores.topk(shape.top_k)
    return hidden, index, weights / weights.sum(1, keepdim=True)


def random_layer(method: str, shape: Shape, seed: int, device: str) -> tuple[PackedProjection, ...]:
    """Both projections, of about one bit per weight."""
    generator = torch.Generator(device).manual_seed(seed)
    if method == "mobie":
        gate_up = random_signs(generator, shape.experts, 2 * shape.inner, shape.hidden)
        down = random_signs(generator, shape.experts, shape.hidden, shape.inner)
        right, left = (random_integers(generator, shape.hidden) for _ in "rl")
    else:
        gate_up = random_planes(generator, shape.experts, shape.hidden, 2 * shape.inner, "input")
        down = random_planes(generator, shape.experts, shape.hidden, shape.inner, "output")
        right, left = (random_graded(generator, shape.hidden, side) for side in ("input", "output"))
    return PackedProjection(gate_up, right=right), PackedProjection(down, left=left)


def random_planes(generator: Generator, experts: int, directions: int, entries: int, side: str) -> Packed:
    """Three planes of falling width that differ between experts by a fifth: 0.95 signs per weight on average."""
    shares = torch.tensor([0.6, 0.25, 0.1], device=generator.device)
    spread = 0.8 + 0.4 * torch.rand(experts, 1, generator=generator, device=generator.device)
    widths = (directions * shares * spread).int()
    blank = Planes.skeleton(widths, side=side, directions=directions, entries=entries, scale_bits=8, device=generator.device)
    grid = torch.tensor([-0.25 * math.log(directions) - 0.5, 1 / 255], device=generator.device).half()
    filled = random_bytes(blank, generator)
    return filled.replace(
        widths=widths.short(),
        entry_grids=grid.expand(blank.live_matrices, 2).contiguous(),
        direction_grids=grid.expand(blank.live_matrices, 2).contiguous(),
    )


def random_graded(generator: Generator, size: int, side: str) -> Packed:
    """A square basis of five bits per weight."""
    runs = [8, size // 8], [6, size // 4], [4, size - size // 8 - size // 4]
    grades = " ".join(f"{bits}:{count}" for bits, count in runs)
    filled = random_bytes(empty_like_spec(Graded(1, size, size, side, grades).spec(), generator.device), generator)
    # Codes of 8 bits need a sixteenth of the scale of those of 4.
    scales = torch.cat([torch.full((count,), {8: 0, 6: 102, 4: 204}[bits]) for bits, count in runs])
    grid = torch.tensor([[-math.log(74 * size**0.5), math.log(2) / 51]], device=generator.device).half()
    return filled.replace(scale_codes=scales.to(torch.uint8).unsqueeze(0).to(generator.device), scale_grid=grid)


def random_signs(generator: Generator, experts: int, rows: int, columns: int) -> Packed:
    """MoBiE's factor with a second plane in a twentieth of the columns."""
    salient, device = max(1, columns // 20), generator.device
    blank = empty_like_spec(Signs(experts, rows, columns, salient).spec(), device)
    filled = random_bytes(blank, generator)
    ranks = torch.rand(experts, columns, generator=generator, device=device).argsort(1)
    return filled.replace(
        salient_mask=pack(ranks < salient, 1),
        row_scales=torch.full((experts, rows), columns**-0.5, device=device).half(),
        column_scales=torch.rand(experts, columns, generator=generator, device=device).half(),
        salient_column_scales=torch.rand(experts, salient, generator=generator, device=device).half(),
    )


def random_integers(generator: Generator, size: int) -> Packed:
    """A square shared factor of 8 bits."""
    filled = random_bytes(empty_like_spec(Integers(1, size, size, 8, size, False).spec(), generator.device), generator)
    return filled.replace(scales=torch.full((1, size, 1), 1 / (74 * size**0.5), device=generator.device).half())


def random_bytes(blank: Packed, generator: Generator) -> Any:
    """Random bits in all tensors of bytes."""
    tensors = {
        name: tensor.random_(0, 256, generator=generator)
        for name, tensor in blank.tensors().items()
        if tensor.dtype == torch.uint8
    }
    return blank.replace(**tensors)


if __name__ == "__main__":
    main()
