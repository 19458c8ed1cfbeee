#!/usr/bin/env python3
"""Seconds and peak memory of quantizing a model, one process per recipe.

    python benchmarks/quantize.py                     # the reference model, every method
    python benchmarks/quantize.py MODEL --windows 128 --recipe "mobie gain=true" --recipe gptq@2

Prints a table of ratios to the first recipe of the same run (machines are noisy, ratios less so) and writes JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

RECIPES = ["rtn@1", "gptq@2", "mobie", "mobie side=hidden", "mobie gain=true"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="default: the embedded reference model")
    parser.add_argument("--recipe", action="append", help="METHOD[@BITS] [KEY=VALUE]...; may be repeated")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("build/bench-quantize.json"))
    args = parser.parse_args()
    rows = [measure(args.model, recipe, args.windows) for recipe in args.recipe or RECIPES]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"machine": machine(), "windows": args.windows, "rows": rows}, indent=1) + "\n")
    print(f"\n{'recipe':28} {'load':>7} {'quantize':>9} {'write':>7} {'ratio':>7} {'peak GB':>8}")
    base = rows[0]["total"]
    for row in rows:
        seconds = row["seconds"]
        stages = seconds["load"], seconds["calibrate and quantize"], seconds["write"]
        times = f"{stages[0]:7.1f} {stages[1]:9.1f} {stages[2]:7.1f} {row['total'] / base:7.2f}"
        print(f"{row['recipe']:28} {times} {row['peak'] / 1e9:8.2f}")
    print(f"written to {args.out}")


def measure(model: str | None, recipe: str, windows: int) -> dict:
    """One run in a process of its own, so that its peak memory is its own."""
    print(f"{recipe} ...", flush=True)
    head, *options = recipe.split()
    method, _, bits = head.partition("@")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "moebius.cli", "quantize", *([model] if model else []), "--method", method]
        command += ["--json", "--quiet", "--windows", str(windows), "--out", f"{folder}/packed"]
        command += ["--bits", bits] if bits else []
        for option in options:
            command += ["--set", option]
        report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["report"]
    return {
        "recipe": recipe,
        "seconds": report["seconds"],
        "total": sum(report["seconds"].values()),
        "peak": report["peak_memory_bytes"],
    }


def machine() -> dict:
    import torch

    return {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


if __name__ == "__main__":
    main()
