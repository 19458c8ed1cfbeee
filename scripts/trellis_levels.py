"""Train the levels of the trellis on a Gaussian: the file `src/moebius/formats/trellis_levels.py`, printed.

Every state's level becomes the mean of the samples that chose it, until 40 rounds are over (the generalized Lloyd algorithm).
"""

from __future__ import annotations

import torch

from moebius import native

_STATES, _ROUNDS = 256, 40


def _trained(rate: int) -> tuple[torch.Tensor, float]:
    generator = torch.Generator().manual_seed(rate)
    levels = torch.randn(_STATES, generator=generator)
    error = 0.0
    for _ in range(_ROUNDS):
        samples = torch.randn(96, 2048, generator=generator)
        codes = torch.empty(samples.shape, dtype=torch.uint8)
        native.extension().search_trellis(samples, torch.ones_like(samples), levels, rate, codes)
        states = torch.zeros(codes.shape, dtype=torch.int64)
        for back in range(-(-8 // rate)):
            states |= codes.long().roll(back, 1) << (rate * back)
        states &= _STATES - 1
        error = float((samples - levels[states]).square().mean())
        count = torch.zeros(_STATES).index_add_(0, states.flatten(), torch.ones(samples.numel()))
        total = torch.zeros(_STATES).index_add_(0, states.flatten(), samples.flatten())
        levels = torch.where(count > 0, total / count.clamp_min(1), levels)
    return levels, error


def main() -> None:
    """Print the module."""
    print(
        '"""Levels of the trellis by rate: step, and 256 signed bytes in hexadecimal. Made by `scripts/trellis_levels.py`."""\n'
    )
    print("LEVELS = {")
    for rate in range(1, 5):
        levels, error = _trained(rate)
        step = float(f"{float(levels.abs().max()) / 127:.6f}")
        text = bytes((int(code) & 255) for code in (levels / step).round().clamp(-127, 127).tolist()).hex()
        print(f"    # distortion {error:.4f}\n    {rate}: (\n        {step},")
        for start in range(0, len(text), 100):
            print(f'        "{text[start : start + 100]}"' + ("," if start + 100 >= len(text) else ""))
        print("    ),")
    print("}")


if __name__ == "__main__":
    main()
