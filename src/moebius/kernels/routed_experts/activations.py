"""What an activation is, found out by trying: models write the same one in many ways."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.weak import WeakIdKeyDictionary

#: What the kernels can do to a channel.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu_squared": lambda x: functional.relu(x).square(),
}

_SEEN = WeakIdKeyDictionary()


def recognize(activation: Callable[[Tensor], Tensor], channels: int) -> tuple[str, bool] | None:
    """Which of :data:`ACTIVATIONS` a function is, and whether it gates: models write the same one in many ways."""
    bound = getattr(activation, "__self__", None)
    owner = activation if bound is None else bound  # bound methods do not live long
    seen = _SEEN.setdefault(owner, {})
    key = (getattr(activation, "__name__", ""), channels)
    if key not in seen:
        seen[key] = _try(activation, channels)
    return seen[key]


@torch.no_grad()
def _try(activation: Callable[[Tensor], Tensor], channels: int) -> tuple[str, bool] | None:
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (64, channels), generator=generator) * 2.0 - 1
    # Small and large numbers: some activations clamp.
    probe = signs * 10 ** (torch.rand(64, channels, generator=generator) * 5 - 2)
    try:
        got = activation(probe.clone())
    except Exception:  # whatever it wants, it is none of ours
        return None
    if not torch.is_tensor(got):
        return None
    for name, function in ACTIVATIONS.items():
        gate, up = probe.tensor_split(2, dim=1)
        for gated in (False, True) if channels % 2 == 0 else (False,):
            wanted = function(gate) * up if gated else function(probe)
            if got.shape == wanted.shape and torch.allclose(got, wanted, rtol=1e-4, atol=1e-4):
                return name, gated
    return None
