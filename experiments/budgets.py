"""docs/experiments/budgets.md: what `moebius` stores and loses at each budget.

usage: python experiments/budgets.py [MODEL] [--calibration FILE] [--text FILE] [--windows N] [--out FOLDER]
"""

from __future__ import annotations

import argparse

import moebius

BUDGETS = (0.5, 0.75, 1.0, 1.5, 2.0)


def main(arguments: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="default: the reference model")
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--text", default="builtin")
    parser.add_argument("--windows", type=int, default=256)
    parser.add_argument("--text-windows", type=int, default=64)
    parser.add_argument("--out", default="budgets")
    chosen = parser.parse_args(arguments)
    result = moebius.compare(
        chosen.model,
        [f"moebius@{bits:g}" for bits in BUDGETS],
        out=chosen.out,
        calibration=chosen.calibration,
        windows=chosen.windows,
        text=chosen.text,
        text_windows=chosen.text_windows,
    )
    return result.table().markdown()


if __name__ == "__main__":
    print(main())
