"""Reading speed of one row of inputs times the linear layers of OLMoE-1B-7B outside its experts, in GB/s of what is stored.

Beside the packed layers stand, from the same run, PyTorch's bf16 product, PyTorch's own products with packed weights, and the
speed of reading plain memory. Matrices are many enough to come from memory each time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import torch
from kernel import fastest, read_bandwidth
from torch import Tensor
from torch.nn import functional

from moebius import native
from moebius.formats.integers import Integers
from moebius.kernels.packed_linear import prepare

SHAPES = {"attention": (2048, 2048, 48), "head": (50304, 2048, 2)}  # out, in, how many


def packed(rows: int, columns: int, bits: int, group_size: int, rng: torch.Generator) -> Integers:
    codes = torch.empty(1, rows, columns * bits // 8, dtype=torch.uint8).random_(0, 256, generator=rng)
    scales = torch.full((1, rows, columns // group_size), 0.01, dtype=torch.float16)
    return Integers(1, rows, columns, bits, group_size, codes=codes, scales=scales)


def seconds(calls: list[Callable[[Tensor], Tensor]], inputs: Tensor, repeats: int) -> float:
    """Of one call."""
    return fastest(lambda: [call(inputs) for call in calls], repeats) / len(calls)


def ours(shape: tuple[int, int], count: int, bits: int, group: int, rng: torch.Generator) -> tuple[list, int]:  # type: ignore[type-arg]
    matrices = [packed(*shape, bits, group, rng) for _ in range(count)]
    return [prepare(matrix) for matrix in matrices], matrices[0].stored_bits() // 8


def bf16(shape: tuple[int, int], count: int) -> tuple[list, int]:  # type: ignore[type-arg]
    weights = [torch.ones(shape, dtype=torch.bfloat16) for _ in range(count)]
    return [lambda inputs, w=w: functional.linear(inputs, w) for w in weights], 2 * shape[0] * shape[1]


def torch_int8(shape: tuple[int, int], count: int) -> tuple[list, int]:  # type: ignore[type-arg]
    weights, scales = [torch.ones(shape, dtype=torch.int8) for _ in range(count)], torch.ones(shape[0], dtype=torch.bfloat16)
    return [lambda x, w=w: torch._weight_int8pack_mm(x, w, scales) for w in weights], shape[0] * shape[1]


def torch_int4(shape: tuple[int, int], count: int) -> tuple[list, int]:  # type: ignore[type-arg]
    codes = torch.ones(shape, dtype=torch.int32)
    weights = [torch._convert_weight_to_int4pack_for_cpu(codes, 1) for _ in range(count)]
    scales = torch.ones(shape[1] // 128, shape[0], 2, dtype=torch.bfloat16)
    calls = [lambda x, w=w: torch._weight_int4pack_mm_for_cpu(x, w, 128, scales) for w in weights]
    return calls, shape[0] * shape[1] // 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=1, help="rows of inputs")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--level", help="set of instructions of the cpu kernel, such as avx2")
    parser.add_argument("--only-ours", action="store_true", help="leave out what PyTorch has")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    if arguments.level:
        native.use_level(arguments.level)
    rng, plain = torch.Generator().manual_seed(0), read_bandwidth(arguments.threads)
    rows = []
    for name, (out, inputs, count) in SHAPES.items():
        shape = (out, inputs)
        kinds: dict[str, Callable[[], tuple[list, int]]] = {  # type: ignore[type-arg]
            "int8": lambda shape=shape, count=count: ours(shape, count, 8, shape[1], rng),
            **{f"int4/{g}": lambda shape=shape, count=count, g=g: ours(shape, count, 4, g, rng) for g in (128, 32)},
        }
        if not arguments.only_ours:
            kinds |= {
                "bf16, torch": lambda shape=shape, count=count: bf16(shape, count),
                "int8, torch": lambda shape=shape, count=count: torch_int8(shape, count),
                "int4/128, torch": lambda shape=shape, count=count: torch_int4(shape, count),
            }
        states = torch.randn(arguments.rows, inputs, generator=rng).bfloat16()
        for kind, make in kinds.items():
            calls, size = make()
            took = seconds(calls, states, arguments.repeats)
            speed = size / took
            rows.append({"layer": name, "kind": kind, "us": round(1e6 * took, 1), "GB_s": round(speed / 1e9, 1)})
            rows[-1]["of_plain_read"] = round(speed / plain, 3)
    result = {"plain_read_GB_s": round(plain / 1e9, 1), "threads": arguments.threads, "level": native.level(), "rows": rows}
    if arguments.json:
        print(json.dumps(result))
        return
    print(f"plain read {result['plain_read_GB_s']} GB/s, {arguments.threads} threads, {native.level()}, rows: {arguments.rows}")
    for row in rows:
        print(f"{row['layer']:10} {row['kind']:16} {row['us']:8} us {row['GB_s']:6} GB/s {row['of_plain_read']:6.0%}")


if __name__ == "__main__":
    main()
