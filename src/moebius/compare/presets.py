"""Recipes that go together: the papers' ablations, and every method."""

from __future__ import annotations

from collections.abc import Sequence

from moebius.errors import RecipeError, UnknownNameError
from moebius.recipe import CalibrationSettings, Recipe
from moebius.recipe_text import candidate_from_text
from moebius.table import nearest

#: Label and recipe of every row of a preset, in the order of the table.
PRESETS = {
    "demo": [(text, text) for text in ("rtn@1", "gptq@2", "mobie", "mobie gain=true", "moebius")],
    # Table 4 of MoBiE: which of its three parts buys what.
    "ablation": [
        (label, f"mobie cejd={cejd} glas={glas} nges={nges}")
        for label, cejd, glas, nges in (
            ("none", "false", "false", "false"),
            ("CEJD", "true", "false", "false"),
            ("GLAS", "false", "true", "false"),
            ("NGES", "false", "false", "true"),
            ("CEJD + GLAS", "true", "true", "false"),
            ("CEJD + GLAS + NGES", "true", "true", "true"),
        )
    ],
    # Table 5 of KBVQ-MoE, figures 10 and 11 of MoBiE: their parts on other methods.
    "plug-and-play": [
        (text, text)
        for text in (
            *(f"{method}{parts}" for method in ("billm", "arb") for parts in ("", " glas=true", " glas=true nges=true")),
            *(
                f"{method}@2{parts}"
                for method in ("gptvq", "vptq")
                for parts in ("", " idre=true", " bcos=mean_variance", " idre=true bcos=mean_variance")
            ),
        )
    ],
    # Table 5 of MoBiE, and the pull of its null-space scales.
    "shared-bits": [(f"{bits} bit", f"mobie shared_bits={bits}") for bits in (16, 8, 4)],
    "lambda": [(f"λ = 0.{tenth}", f"mobie nges_lambda=0.{tenth}") for tenth in range(1, 10)],
    # Tables 4, 7, 14 and 15 of KBVQ-MoE.
    "klt": [
        ("SVD", "kbvq@2 klt=false"),
        ("KLT-SVD", "kbvq@2"),
        *((f"KLT-SVD, rank in/{share}", f"kbvq@2 rank_share={1 / share}") for share in (256, 64, 32)),
    ],
    "bcos": [(mode, f"kbvq@2 bcos={mode}") for mode in ("off", "mean", "variance", "mean_variance", "regression")],
    # Figure 9 of MoBiE: how much it needs to see, and how much it matters what.
    "calibration": [
        *((f"{windows} windows", f"mobie gain=true windows={windows}") for windows in (8, 16, 32, 64, 128)),
        *((f"seed {seed}", f"mobie gain=true seed={seed}") for seed in (1, 2, 3)),
    ],
    "methods": [
        (text, text)
        for text in (
            *(f"{method}@1{gain}" for method in ("rtn", "gptq") for gain in ("", " gain=true")),
            *("mobie", "mobie gain=true", "rtn@2 gain=true", "gptq@2", "gptq@2 act_order=true", "gptq@2 gain=true"),
            *("awq@2", "moequant@2", "mxmoe@2.25"),
            *("gptvq@2 error_feedback=false", "gptvq@2", "vptq@2", "nowag@2", "kbvq@2", "bitsmoe@2"),
            *(f"{method}{parts}" for method in ("arb", "billm") for parts in ("", " gain=true glas=true nges=true")),
            *("gptq@3", "awq@3", "bitsmoe@3"),
        )
    ],
}
#: Presets in which every recipe has a row of ``moebius`` beside it.
MATCHED = ("methods",)


def chosen_recipes(
    texts: Sequence[str], preset: str | None, calibration: CalibrationSettings
) -> dict[str, tuple[Recipe, CalibrationSettings]]:
    """Label to recipe and what it looks at, of the preset first.

    Raises:
        RecipeError: two recipes with one label.
        UnknownNameError: no such preset.
    """
    if preset is not None and preset not in PRESETS:
        raise UnknownNameError(f"no preset named {preset!r}; known: {', '.join(PRESETS)}{nearest(preset, PRESETS)}")
    presets = PRESETS[preset or "demo"] if preset or not texts else []
    candidates: dict[str, tuple[Recipe, CalibrationSettings]] = {}
    for label, text in [*presets, *((" ".join(text.split()), text) for text in texts)]:
        if label in candidates:
            raise RecipeError(f"recipe {label!r}: got it twice, wanted every recipe once")
        candidates[label] = candidate_from_text(text, calibration)
    return candidates
