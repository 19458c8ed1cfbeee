"""What each part of a paper's method buys: MoBiE with and without its null-space guided suppression (NGES).

usage: python examples/ablate_a_component.py [MODEL [OUT]]      without a model: the reference model of this package
"""

from __future__ import annotations

import sys

import moebius


def main(model: str | None = None, out: str = "ablation", *, windows: int = 16) -> None:
    recipes = ["mobie nges=true", "mobie nges=false"]
    result = moebius.compare(model, recipes, out=out, windows=windows, text_windows=windows)
    for row in result.rows:
        divergence = "" if row.kl is None else f", KL {row.kl:.4f} nats from the original"
        print(f"{row.label}: {row.bits_per_expert_weight:.2f} bits, perplexity {row.perplexity:.2f}{divergence}")


if __name__ == "__main__":
    main(*sys.argv[1:3])
