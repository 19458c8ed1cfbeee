"""docs/experiments/basis.md, "Cheaper grades of the basis": what a direction of the basis pays for its bits.

The budget counts the error that rounding a direction leaves (`ROUNDING_NOISE`); here it counts a share of it, and may have
other grades to choose from. `2` is a grade that the product has not: its error is that of two bits on a Gaussian.

usage: python experiments/grades.py [MODEL] [--calibration FILE] [--text FILE] [--windows N] [--bits B ...] [--out FOLDER]
"""

from __future__ import annotations

import argparse

import moebius
from moebius.formats.graded import ROUNDING_NOISE
from moebius.methods import moebius as method

TWO_BITS = 0.1188
#: Grades, and the share of their error that counts.
VARIANTS: tuple[tuple[tuple[int, ...], float], ...] = (
    ((8, 6, 5, 4, 3), 1.0),
    ((8,), 1.0),
    ((6, 5, 4, 3), 1.0),
    ((6, 5, 4, 3, 2), 1.0),
    ((8, 6, 5, 4, 3), 4.0),
    ((8, 6, 5, 4, 3), 0.5),
    ((8, 6, 5, 4, 3), 0.25),
    ((8, 6, 5, 4, 3), 0.12),
    ((8, 6, 5, 4, 3, 2), 0.12),
)


def main(arguments: list[str] | None = None) -> list[str]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="default: the reference model")
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--text", default="builtin")
    parser.add_argument("--windows", type=int, default=256)
    parser.add_argument("--text-windows", type=int, default=48)
    parser.add_argument("--bits", type=float, nargs="+", default=[0.5, 1.0, 2.0])
    parser.add_argument("--variants", type=int, default=len(VARIANTS), help="how many of the list")
    parser.add_argument("--out", default="grades")
    chosen = parser.parse_args(arguments)
    lines = ["| bits | grades, share of the error that counts | perplexity | KL |", "|---|---|---:|---:|"]
    noise = {**ROUNDING_NOISE, 2: TWO_BITS}
    original, original_grades = dict(ROUNDING_NOISE), method._GRADES
    try:
        for number, (grades, share) in enumerate(VARIANTS[: chosen.variants]):
            ROUNDING_NOISE.clear()
            ROUNDING_NOISE.update({grade: noise[grade] * share for grade in grades})
            method._GRADES = grades
            result = moebius.compare(
                chosen.model,
                [f"moebius@{bits:g}" for bits in chosen.bits],
                out=f"{chosen.out}-{number}",
                calibration=chosen.calibration,
                windows=chosen.windows,
                text=chosen.text,
                text_windows=chosen.text_windows,
            )
            for bits, row in zip(chosen.bits, result.rows[1:], strict=True):
                name = "/".join(map(str, grades))
                lines.append(f"| {bits:g} | {name}, {share:g} | {row.perplexity:.2f} | {row.kl:.4f} |")
    finally:
        ROUNDING_NOISE.clear()
        ROUNDING_NOISE.update(original)
        method._GRADES = original_grades
    return lines


if __name__ == "__main__":
    print("\n".join(main()))
