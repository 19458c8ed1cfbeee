"""Quantize a model to one bit per expert weight, and talk to it.

usage: python examples/quantize_and_chat.py [MODEL [OUT]]      without a model: the reference model of this package
"""

from __future__ import annotations

import sys
from pathlib import Path

import moebius


def main(model: str | None = None, out: str = "one-bit") -> None:
    if not Path(out).exists():
        packed = moebius.quantize(model, out, bits=1.0)
        size = packed.size
        print(f"{size.bits_per_expert_weight:.2f} bits per expert weight, {size.bits / 8e6:.1f} MB in {packed.folder}")
    talk = moebius.chat(out)
    for line in sys.stdin:
        talk.ask(line.rstrip("\n"), tokens=40, on_text=lambda piece: print(piece, end="", flush=True))
        print()


if __name__ == "__main__":
    main(*sys.argv[1:])
