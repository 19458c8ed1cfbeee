"""What calibration must gather, put together."""

from __future__ import annotations

import pytest

from moebius.types import CalibrationNeeds

NOTHING = CalibrationNeeds()
ONE_EACH = {
    "inputs": True,
    "loss_weighted": True,
    "glas_groups": 3,
    "output_fisher": True,
    "router_moment": True,
}


@pytest.mark.parametrize(("name", "value"), ONE_EACH.items())
def test_every_need_asks_for_a_calibration_and_survives_a_union(name: str, value: object) -> None:
    need = CalibrationNeeds(**{name: value})
    assert not NOTHING.anything and need.anything
    assert need.gradients == (name in ("loss_weighted", "glas_groups", "output_fisher"))
    assert need | NOTHING == NOTHING | need == need | need == need


def test_a_union_wants_what_either_wants() -> None:
    together = NOTHING
    for name, value in ONE_EACH.items():
        together |= CalibrationNeeds(**{name: value})
    assert together == CalibrationNeeds(**ONE_EACH)
    assert (CalibrationNeeds(glas_groups=2) | CalibrationNeeds(glas_groups=5)).glas_groups == 5
