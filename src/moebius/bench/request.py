"""What to measure, checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from moebius.errors import RecipeError
from moebius.recipe import DEFAULT_METHOD, Recipe


@dataclass(frozen=True)
class BenchRequest:
    """What to measure: a packed checkpoint, the reference model packed for the occasion, or a shape with random weights.

    Attributes:
        packed: a packed checkpoint, folder or hub name; None: the reference model.
        original: the model that ``packed`` was made from.
        shape: of :func:`moebius.evaluate.shapes.shape_config`; in place of ``packed``.
        recipe: how the reference model or the shape is packed.
        original_layers: with ``shape``: layers of the original that are timed, and half as many, to scale up from; None: all.

    Raises:
        RecipeError: what contradicts itself.
    """

    packed: str | None
    original: str | None
    shape: str | None
    recipe: Recipe
    original_layers: int | None = None

    def __post_init__(self) -> None:
        packed, original, shape, layers = self.packed, self.original, self.shape, self.original_layers
        if shape is None and layers is not None:
            raise RecipeError(f"--original-layers {layers}: got no --shape; the layers of a checkpoint are what they are")
        if packed is not None and shape is not None:
            raise RecipeError(f"--shape {shape}: got a checkpoint as well, {packed}; wanted one of them")
        if packed is not None and self.recipe != Recipe.make(DEFAULT_METHOD):
            raise RecipeError(f"{packed}: is as it was packed; leave out --method, --bits, --rest and --set")
        if packed is None and original is not None:
            raise RecipeError(f"--original {original}: got no packed checkpoint to set against it; give both")
