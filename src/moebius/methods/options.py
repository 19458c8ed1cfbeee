"""Options that several methods declare, each in one place, so that they mean the same everywhere."""

from __future__ import annotations

import dataclasses

from moebius.options import Option

_LONG = 1 << 20

GAIN = Option("gain", False, "scale each row so that its output keeps its variance")
DAMPING = Option("damping", 0.01, "share of the mean diagonal added to every Hessian", low=0, high=1)
SHRINKAGE = Option(
    "shrinkage",
    0.03,
    "how much an expert's Hessian is drawn to the mean of its layer (ρ)",
    low=0,
    high=1,
    formerly=("layer_lean",),
)
#: What every method reads that looks at inputs.
CONDITIONING = (GAIN, DAMPING, SHRINKAGE)

GROUP_SIZE = Option("group_size", 128, "input channels that share one scale; 0: the whole row", low=0, high=_LONG)
#: A scale for every 128 weights would cost an eighth of a bit: at one bit, one per row is enough.
INTEGER_GROUP_SIZE = dataclasses.replace(GROUP_SIZE, default=0, from_bits=((2, 128),))
BLOCK_SIZE = Option("block_size", 128, "columns per block of the error feedback: a matter of speed", low=1, high=_LONG)
ERROR_FEEDBACK = Option("error_feedback", True, "push the error of a block of columns into the columns after it")

RANK = Option("rank", 0, "directions kept by the joint SVD; 0: all of them", low=0, high=_LONG)
SHARED_BITS = Option("shared_bits", 8, "bits of the shared factor", (16, 8, 4))

SALIENT_FRACTION = Option("salient_fraction", 0.05, "share of columns that get a second sign plane", low=0, high=1)
ALTERNATIONS = Option("alternations", 10, "alternating updates of row and column scales (Eq. 48)", low=0, high=1000)

GLAS = Option("glas", True, "saliency from the gradient of the global loss (off: from the local Hessian)")
GLAS_GROUPS = Option("glas_groups", 1, "groups of output channels with a Hessian of their own", low=1, high=_LONG)
NGES = Option("nges", True, "null-space scaling of rows and columns so that routing does not shift")
NGES_LAMBDA = Option("nges_lambda", 0.2, "pull of the null-space scales towards one (λ of Eq. 50)", low=0, high=1e6)
NGES_ITERATIONS = Option("nges_iterations", 15, "alternating updates of the null-space scales", low=0, high=1000)
NULL_SPACE_THRESHOLD = Option(
    "null_space_threshold", 1e-2, "eigenvalues below this share of the largest span the null space", low=0, high=1
)
#: Null-space scaling, and what it is done with.
NULL_SPACE = (NGES, NGES_LAMBDA, NGES_ITERATIONS, NULL_SPACE_THRESHOLD)


def off(option: Option) -> Option:
    """The same switch, off unless asked for."""
    return dataclasses.replace(option, default=False)
