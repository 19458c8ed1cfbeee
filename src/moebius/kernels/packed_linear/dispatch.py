"""Which implementation runs a packed linear layer. On a GPU, and for formats without kernels, it is the reference."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from moebius.errors import ShapeError
from moebius.formats import Packed
from moebius.kernels import choice
from moebius.kernels.packed_linear import cpu, reference

#: The fastest first.
BACKENDS = ("cpu", "reference")


class Linear(Protocol):
    """A packed linear layer, ready to run. It reads the tensors of the layer as they lie in memory.

    Attributes:
        copied: but of these it holds something made of them: once they are written to, prepare the layer anew.
    """

    @property
    def copied(self) -> tuple[Tensor, ...]: ...

    def __call__(self, inputs: Tensor) -> Tensor:
        """See :func:`moebius.kernels.packed_linear.reference.packed_linear`."""


def prepare(weight: Packed) -> Linear:
    """The matrix in the hands of the backend that suits it. It reads these tensors as long as it lives.

    Raises:
        CheckpointError: a packed tensor that is not what its format says.
        ShapeError: more or fewer matrices than one.
        KernelError: as :func:`moebius.kernels.choice.choose`. A backend that has no packed linears stands for the reference.
    """
    weight.check("packed linear layer")
    if weight.batch != 1:
        raise ShapeError(f"packed linear layer: got {weight.batch} matrices, wanted one")
    asked = choice.forced()
    asked = asked if not asked or asked in BACKENDS else "reference"
    name, reason = choice.choose(BACKENDS, lambda name: cpu.refusal(weight) if name == "cpu" else None, asked)
    choice.tell_once(f"linear layers of {weight.name}: {name} kernels, because {reason}")
    if name == "reference" and not asked:
        advice = "--rest int8 and --rest int4 have kernels on the CPU, and --rest bf16 needs none"
        choice.tell_unpacked(f"linear layers of {weight.name}", cpu.refusal(weight) or reason, advice)
    return cpu.CpuLinear(weight) if name == "cpu" else reference.DefinedLinear(weight)
