#!/usr/bin/env python3
"""Seconds and peak memory of quantizing one layer of OLMoE-1B-7B's shape, from given statistics, by stage.

    python benchmarks/layer.py                                # moebius, mobie and gptq at 2 bit, two threads
    python benchmarks/layer.py --recipe moebius@0.5 --threads 1

Weights and statistics are random: inputs with a falling spectrum, every expert with its own share of tokens. Each recipe runs
in a process of its own, so that its peak memory is its own; the layer and its statistics are part of it.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

RECIPES = ["moebius", "mobie", "gptq@2"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", action="append", help="METHOD[@BITS] [KEY=VALUE]...; may be repeated")
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("build/bench-layer.json"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args.experts, args.hidden, args.inner, args.threads)))
        return
    rows = []
    for recipe in args.recipe or RECIPES:
        print(f"{recipe} ...", flush=True)
        shape = ["--experts", args.experts, "--hidden", args.hidden, "--inner", args.inner, "--threads", args.threads]
        command = [sys.executable, __file__, "--one", recipe, *map(str, shape)]
        rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]))
        stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in rows[-1]["seconds"].items())
        print(
            f"  {rows[-1]['total']:.1f} s, {rows[-1]['peak'] / 1e9:.2f} GB, {rows[-1]['bits']:.3f} bits: {stages}", flush=True
        )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"written to {args.out}")


def measure(text: str, experts: int, hidden: int, inner: int, threads: int) -> dict:
    """One recipe on one random layer."""
    import torch

    from moebius.cli.options import recipe_from_text
    from moebius.memory import WHILE_QUANTIZING, keep_freed_memory
    from moebius.methods import METHODS

    torch.set_num_threads(threads)
    keep_freed_memory(WHILE_QUANTIZING)  # as the command line does
    recipe = recipe_from_text(text)
    method = METHODS[recipe.method]
    seconds: dict[str, float] = {}
    stored = weights = 0
    for projection, shape in (("gate_up", (experts, 2 * inner, hidden)), ("down", (experts, hidden, inner))):
        weight, stats = random_projection(shape)
        weights += weight.numel()
        given = {}
        if method.survey is not None:
            start = time.perf_counter()
            survey = method.survey.survey(weight, stats, recipe, projection)
            seconds[f"{projection} survey"] = time.perf_counter() - start
            start = time.perf_counter()
            given = {"seen": survey, "share": method.survey.allocate([survey], recipe)[0]}
            seconds[f"{projection} budget"] = time.perf_counter() - start
        start = time.perf_counter()
        stored += method.quantize(weight, stats, recipe, projection, **given).stored_bits()
        seconds[f"{projection} quantize"] = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    total = sum(seconds.values())
    return {"recipe": text, "seconds": seconds, "total": total, "peak": peak, "bits": stored / weights}


def random_projection(shape: tuple[int, int, int]):
    """Weights (experts, out, in) in bfloat16, and statistics as calibration would give them."""
    import torch

    from moebius.types import ProjectionStats

    experts, outputs, inputs = shape
    generator = torch.Generator().manual_seed(0)
    weight = torch.empty(shape, dtype=torch.bfloat16)
    moments = torch.empty(experts, inputs, inputs)
    spectrum = torch.arange(1, inputs + 1).pow(-0.5)
    tokens = torch.randint(256, 4096, (experts,), generator=generator)
    for expert in range(experts):  # one at a time: the layer itself is to be the largest thing in memory
        weight[expert] = 0.02 * torch.randn(outputs, inputs, generator=generator)
        # 512 tokens stand for all of them: a Hessian that needs its layer.
        x = torch.randn(512, inputs, generator=generator) * spectrum
        moments[expert] = (x.mT @ x) * (tokens[expert] / 512)
    fisher = torch.rand(experts, outputs, generator=generator) * tokens.unsqueeze(1)
    return weight, ProjectionStats(tokens, torch.zeros(experts, inputs), moments, moments.unsqueeze(1), fisher)


if __name__ == "__main__":
    main()
