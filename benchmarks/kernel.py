"""Milliseconds per token of the experts alone, at the shape of OLMoE-1B-7B, with random packed weights.

    python benchmarks/kernel.py --bits 1.05 --threads 2

Every layer is built packed, never dense: 16 layers of 64 experts, eight of which each token meets, chosen anew for every token.
Shared factors are included, attention and the router are not. Beside it stand, from the same run, the speed of reading plain
memory, the same experts in bf16 (fewer layers of them, scaled up), and the reckoning of bytes and additions.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from moebius import native
from moebius.evaluate.roofline import fastest, read_bandwidth
from moebius.formats import PackedProjection
from moebius.formats.bits import packed_width
from moebius.formats.planes import Planes
from moebius.formats.random_contents import random_projection
from moebius.formats.signs import Signs
from moebius.kernels.routed_experts import PackedExperts, cpu, prepare
from moebius.methods import METHODS
from moebius.recipe import Recipe


@dataclass(frozen=True)
class Shape:
    """Layers of experts; the default is OLMoE-1B-7B."""

    layers: int = 16
    experts: int = 64
    top_k: int = 8
    hidden: int = 2048
    inner: int = 1024


def random_layer(
    method: str, shape: Shape, bits: float, generator: torch.Generator
) -> tuple[PackedProjection, PackedProjection]:
    """One layer as `moebius` would store it if all experts were alike and energies fell off as 1/k, or as `mobie` would with
    its shared factors at the hidden state.
    """
    recipe = Recipe.make("moebius", bits) if method == "moebius" else Recipe.make("mobie", side="hidden")
    plan = METHODS[method].plan
    up = plan((shape.experts, 2 * shape.inner, shape.hidden), recipe, "gate_up")
    down = plan((shape.experts, shape.hidden, shape.inner), recipe, "down")
    return random_projection(up, generator), random_projection(down, generator)


def gated(states: Tensor) -> Tensor:
    gate, up = states.chunk(2, dim=-1)
    return functional.silu(gate) * up


def bf16_seconds(shape: Shape, tokens: int, repeats: int, layers: int = 2) -> float:
    """The same experts in bf16 as transformers runs them one by one, seconds for all layers."""
    up = [torch.randn(shape.experts, 2 * shape.inner, shape.hidden, dtype=torch.bfloat16) for _ in range(layers)]
    down = [torch.randn(shape.experts, shape.hidden, shape.inner, dtype=torch.bfloat16) for _ in range(layers)]
    hidden = torch.randn(tokens, shape.hidden, dtype=torch.bfloat16)

    def step() -> None:
        for first, second in zip(up, down, strict=True):
            index = torch.rand(tokens, shape.experts).topk(shape.top_k).indices
            for expert in index.unique().tolist():
                mine = (index == expert).any(1).nonzero()[:, 0]
                functional.linear(gated(functional.linear(hidden[mine], first[expert])), second[expert])

    return fastest(step, repeats) * shape.layers / layers


def bytes_per_token(gate_up: PackedProjection, down: PackedProjection, top_k: int) -> int:
    """What one token reads of one layer: its experts' share of the factors, and the shared factors."""
    total = 0
    for projection in (gate_up, down):
        for name, part in projection.parts().items():
            stored = part.stored_bits() // 8
            total += stored * top_k // part.batch if name == "factor" else stored
    return total


def additions_per_token(gate_up: PackedProjection, down: PackedProjection, top_k: int) -> tuple[int, int]:
    """Signs that are added and codes that are multiplied, per token and layer."""
    signs = codes = 0
    for projection in (gate_up, down):
        factor = projection.factor
        if isinstance(factor, Planes):
            signs += factor.sign_rows * packed_width(factor.entries, 1) * 8 * top_k // factor.batch
        elif isinstance(factor, Signs):
            signs += factor.rows * (factor.columns + factor.salient) * top_k
        codes += sum(part.rows * part.columns for part in (projection.left, projection.right) if part is not None)
    return signs, codes


def extra_bytes(layer: tuple[PackedProjection, PackedProjection], experts: object) -> int:
    """What a kernel keeps of a layer besides the stored tensors."""
    if not isinstance(experts, cpu.CpuExperts):
        return 0
    stored = {t.data_ptr() for projection in layer for t in projection.tensors().values()}
    held = [t for kernel in (experts.gate_up, experts.down, *experts.shared.values()) for t in kernel.held]
    return sum(t.numel() * t.element_size() for t in held if t.data_ptr() not in stored)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=("moebius", "mobie"), default="moebius")
    parser.add_argument("--bits", type=float, default=1.05)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=1, help="tokens of one step")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--layers", type=int, default=Shape.layers)
    parser.add_argument("--kernel", help="reference, cpu or triton; the fastest if left out")
    parser.add_argument("--level", help="set of instructions of the cpu kernel, such as avx2")
    parser.add_argument("--no-bf16", action="store_true", help="spare the memory and time of the bf16 experts")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    if arguments.kernel:
        os.environ["MOEBIUS_KERNEL"] = arguments.kernel
    if arguments.level:
        native.use_level(arguments.level)

    shape, generator = Shape(layers=arguments.layers), torch.Generator().manual_seed(0)
    layers = [random_layer(arguments.method, shape, arguments.bits, generator)]
    layers += [tuple(_again(p, generator) for p in layers[0]) for _ in range(shape.layers - 1)]  # type: ignore[misc]
    ready = [prepare(PackedExperts(*layer, gated)) for layer in layers]
    hidden = torch.randn(arguments.tokens, shape.hidden, generator=generator).bfloat16()

    def step() -> None:
        states = hidden
        for experts in ready:
            weights, index = torch.rand(arguments.tokens, shape.experts).topk(shape.top_k)
            states = experts(states, index, weights)
            states = functional.rms_norm(states, (shape.hidden,))

    seconds = fastest(step, arguments.repeats)
    stored = sum(p.stored_bits() for p in layers[0]) / 8
    weights = shape.experts * 3 * shape.hidden * shape.inner
    read = bytes_per_token(*layers[0], shape.top_k) * shape.layers
    signs, codes = (n * shape.layers for n in additions_per_token(*layers[0], shape.top_k))
    bandwidth = read_bandwidth()
    result = {
        "method": arguments.method,
        "kernel": arguments.kernel or "fastest",
        "level": native.level() if native.levels() else None,
        "threads": arguments.threads,
        "tokens": arguments.tokens,
        "bits_per_weight": round(8 * stored / weights, 4),
        "held_beyond_the_files": f"{extra_bytes(layers[0], ready[0]) / stored:.1%}",
        "ms_per_step": round(1e3 * seconds, 2),
        "ms_per_token": round(1e3 * seconds / arguments.tokens, 2),
        "read_MB_per_token": round(read / 1e6, 1),
        "signs_per_token_M": round(signs / 1e6, 1),
        "codes_per_token_M": round(codes / 1e6, 1),
        "plain_read_GB_s": round(bandwidth / 1e9, 1),
        "ms_if_memory_were_all": round(1e3 * read / bandwidth, 2),
        "share_of_plain_read": round(read / seconds / bandwidth, 3) if arguments.tokens == 1 else None,
    }
    if not arguments.no_bf16:
        result["bf16_ms_per_step"] = round(1e3 * bf16_seconds(shape, arguments.tokens, 10), 2)
        result["times_bf16"] = round(result["bf16_ms_per_step"] / result["ms_per_step"], 2)
    print(json.dumps(result) if arguments.json else "\n".join(f"{name:24} {value}" for name, value in result.items()))


def _again(projection: PackedProjection, generator: torch.Generator) -> PackedProjection:
    """The same shapes at other places in memory."""
    copies = {n: p.replace(**{k: t.clone() for k, t in p.tensors().items()}) for n, p in projection.parts().items()}
    return PackedProjection(**copies)


if __name__ == "__main__":
    main()
