"""Compile the Triton kernels for an NVIDIA GPU that need not be there: ``python compile_triton.py 90`` for sm_90.

The interpreter runs Python; only the compiler knows whether it is also Triton. Prints the kernels and their PTX as JSON.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

import torch
from tests.kernels.test_triton import Case, mobie_layer, moebius_layer, tokens_for, widths_of
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from moebius.kernels.routed_experts import triton as backend


class Absent:
    """What Triton asks of a driver before it launches anything."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", int(sys.argv[1]), 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int = 0) -> int:
        return 0


def main() -> None:
    driver.set_active(Absent())
    found: dict[str, str] = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        assert kernel.asm["cubin"]
        found[f"{self.fn.__name__} {len(found)}"] = kernel.asm["ptx"]

    JITFunction.run = compile_only
    for case in cases():
        backend.prepare(case.experts())(*case.given())
    print(json.dumps(found))


def cases() -> list[Case]:
    """Few and many tokens, both methods, in bf16."""
    generator = torch.Generator().manual_seed(0)
    layers = (
        moebius_layer(generator, 256, 128, 256, widths_of(generator, 256, 3)),
        mobie_layer(generator, 64, 32, 64, "output", 3),
    )
    made = [tokens_for(generator, layers[0], 4), tokens_for(generator, layers[1], 4), tokens_for(generator, layers[0], 200)]
    return [replace(case, hidden=case.hidden.bfloat16()) for case in made]


if __name__ == "__main__":
    main()
