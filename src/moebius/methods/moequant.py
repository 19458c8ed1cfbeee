"""MoEQuant (Hu et al., 2025): GPTQ on text that uses all experts, with tokens that count by their affinity to the expert.

Expert-balanced self-sampling (EBSS, Eq. 13) lets the model write its own calibration windows, see
:func:`moebius.calibrate.self_sampling.balanced_windows`; affinity-guided quantization (AGQ, Eq. 18) weighs each token with its
routing weight ``c`` in the Hessian, ``H = Σ c x xᵀ``. Each is a switch; with both off it is ``gptq``.

Deviations: levels are those of ``gptq`` here, groups with zero points, where the paper rounds symmetrically with one scale per
row (``group_size=0`` for rows); shared experts stay in 16 bit as with every method here, so AGQ has nothing to weigh there.
"""

from __future__ import annotations

from moebius.methods.base import Method
from moebius.methods.gptq import ACT_ORDER, plan, quantize
from moebius.methods.options import BLOCK_SIZE, CONDITIONING, INTEGER_GROUP_SIZE
from moebius.options import MethodOptions, Option
from moebius.recipe import Recipe
from moebius.types import CalibrationNeeds


def needs(recipe: Recipe) -> CalibrationNeeds:
    """The Hessian with tokens weighed by affinity, on windows that the model has written itself."""
    return CalibrationNeeds(inputs=True, affinity=recipe.affinity, self_sampled=recipe.self_sampling)


AFFINITY = Option("affinity", True, "count tokens by the routing weight of the expert (off: once each)")
SELF_SAMPLING = Option(
    "self_sampling", True, "calibrate on text that the model writes, with its experts in balance (off: on the calibration text)"
)
OPTIONS = MethodOptions(
    (AFFINITY, SELF_SAMPLING, INTEGER_GROUP_SIZE, ACT_ORDER, BLOCK_SIZE, *CONDITIONING), default_bits=2, low=1, high=8
)
METHOD = Method("gptq on text of the model's own, tokens weighed by their affinity", OPTIONS, quantize, plan, needs)
