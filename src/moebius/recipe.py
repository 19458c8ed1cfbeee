"""The frozen, validated settings of one quantization run.

A recipe is a method, a number of bits, the options that the method declares beside its code, and the few settings that every
method shares because they are about what lies outside the experts.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from moebius.errors import RecipeError
from moebius.options import MethodOptions, Option, by_name
from moebius.table import METHODS

DEFAULT_METHOD = "moebius"

ROUTER = Option("router", "keep", "keep the router in 16 bit, or binarize it with null-space scaling", ("keep", "binary"))
REST = Option(
    "rest",
    "bf16",
    "linear layers outside the experts (attention, shared experts, dense layers, head): as they are, or rounded to nearest",
    ("bf16", "int8", "int4"),
)
SHARED_EXPERTS = Option("shared_experts", 16, "bits of shared experts (rounded below 16; 16: as rest says)", (16, 8, 4, 3, 2))
DENSE_LAYERS = Option(
    "dense_layers", 16, "bits of the MLPs of layers without experts (rounded below 16; 16: as rest says)", (16, 8, 4, 3, 2)
)
#: What every recipe may say, whatever its method: how the layers outside the experts are stored.
COMMON = (ROUTER, REST, SHARED_EXPERTS, DENSE_LAYERS)

# Earlier versions wrote these for every method; those that never read them no longer have them.
_ONCE_COMMON = frozenset({"nges_lambda", "nges_iterations", "null_space_threshold"})


@dataclass(frozen=True)
class Recipe:
    """What to do to every expert matrix of a model. Build it with :meth:`make`, which knows each method's defaults.

    Attributes:
        method: a name in :data:`moebius.table.METHODS`.
        bits: bits per expert weight.
        options: name and value of every option of the method, sorted by name; each can be read as an attribute of the recipe.
        router: ``"keep"`` or ``"binary"``.
        rest: ``"bf16"``, ``"int8"`` or ``"int4"``, for linear layers outside the experts.
        shared_experts: bits of shared experts.
        dense_layers: bits of the MLPs of layers without experts.
    """

    method: str
    bits: float
    options: tuple[tuple[str, Any], ...] = ()
    router: str = ROUTER.default
    rest: str = REST.default
    shared_experts: int = SHARED_EXPERTS.default
    dense_layers: int = DENSE_LAYERS.default

    @classmethod
    def make(cls, method: str, bits: float | None = None, **options: Any) -> Recipe:
        """A validated recipe with the defaults of its method.

        Args:
            method: a name in :data:`moebius.table.METHODS`.
            bits: bits per expert weight; None takes the method's default.
            options: what the method declares, and the settings in :data:`COMMON`. Strings are parsed to the option's type.

        Raises:
            UnknownNameError: no such method, or an option the method does not have.
            RecipeError: a value of the wrong type or outside its range.
        """
        declared: MethodOptions = METHODS[method].options
        bits = declared.default_bits if bits is None else bits
        declared.check_bits(method, bits)
        known = (*declared.options, *COMMON)
        values = {option.name: option.default_at(bits) for option in known}
        given: dict[str, str] = {}
        for name, value in options.items():
            option = by_name(known, name, f"method {method!r}")
            if option.name in given:
                raise RecipeError(f"option {name}: got it twice, as {given[option.name]} too; give it once")
            given[option.name] = name
            values[option.name] = option.parse(value)
        common = {option.name: values.pop(option.name) for option in COMMON}
        return cls(method=method, bits=bits, options=tuple(sorted(values.items())), **common)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """The recipe that :meth:`to_dict` wrote, now or in an earlier version.

        Raises:
            MoebiusError: as :meth:`make`.
        """
        values = dict(values)
        method, bits = values.pop("method"), values.pop("bits")
        own = {option.name for option in METHODS[method].options.options}
        return cls.make(method, bits, **{k: v for k, v in values.items() if k in own or k not in _ONCE_COMMON})

    def to_dict(self) -> dict[str, Any]:
        """Method, bits and the options the method reads, ready for JSON."""
        common = {option.name: getattr(self, option.name) for option in COMMON}
        return {"method": self.method, "bits": self.bits, **dict(sorted({**dict(self.options), **common}.items()))}

    def value(self, option: Option) -> Any:
        """What the recipe says of an option, or the option's default where the method does not have it."""
        return dict(self.options).get(option.name, option.default_at(self.bits))

    def __getattr__(self, name: str) -> Any:
        # Only called for what is no field; `options` itself is none while a copy is being made.
        for option, value in self.__dict__.get("options", ()):
            if option == name:
                return value
        raise AttributeError(f"a recipe of method {self.__dict__.get('method')!r} has no option {name!r}")


@dataclass(frozen=True)
class CalibrationSettings:
    """Which tokens a run looks at.

    Attributes:
        text: ``"builtin"``, a path to a ``.txt`` or ``.jsonl`` file, or the name of a Hugging Face data set.
        windows: how many windows of tokens.
        window_length: tokens per window.
        seed: which windows are drawn.
        split: ``"train"`` or ``"held-out"``; of a single file, the held-out split is its last twentieth.
        bos: whether windows begin with the begin-of-text token: ``"auto"`` (where the tokenizer adds it), ``"on"``, ``"off"``.
    """

    text: str = "builtin"
    windows: int = 64
    window_length: int = 256
    seed: int = 0
    split: str = "train"
    bos: str = "auto"

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return dataclasses.asdict(self)
