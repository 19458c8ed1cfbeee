"""Perplexity over all positions of a text, in consecutive windows: the figures of docs/experiments that speak of positions.

usage: python experiments/perplexity.py MODEL TEXT [--window-length N]
"""

from __future__ import annotations

import argparse

import moebius


def main(arguments: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--window-length", type=int, default=256)
    chosen = parser.parse_args(arguments)
    result = moebius.evaluate(chosen.model, text=chosen.text, protocol="gptq", window_length=chosen.window_length)
    print(f"{result.perplexity:.3f} over {result.tokens:,} positions ({result.description})")
    return result.perplexity


if __name__ == "__main__":
    main()
