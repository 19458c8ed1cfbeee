"""The frozen, validated settings of one quantization run.

A recipe is a method, a number of bits and the switches of that method. The fields below are every switch there is; each
method lists the ones it reads and the defaults it wants (:data:`METHOD_OPTIONS`), and refuses the others by name.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from moebius.errors import RecipeError, UnknownNameError


def _option(default: Any, help: str, choices: tuple[Any, ...] = ()) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class Recipe:
    """What to do to every expert matrix of a model. Build it with :meth:`make`, which knows each method's defaults."""

    method: str = "moebius"
    bits: float = 1.0
    group_size: int = _option(128, "input channels that share one scale; 0: the whole row")
    side: str = _option("output", "where the shared factor of the joint SVD sits", ("output", "input", "hidden"))
    rank: int = _option(0, "directions kept by the joint SVD; 0: all of them")
    shared_bits: int = _option(8, "bits of the shared factor", (16, 8, 4))
    cejd: bool = _option(True, "cross-expert joint decomposition (off: each expert's own weight is binarized)")
    glas: bool = _option(True, "saliency from the gradient of the global loss (off: from the local Hessian)")
    glas_groups: int = _option(1, "groups of output channels with a Hessian of their own")
    nges: bool = _option(True, "null-space scaling of rows and columns so that routing does not shift")
    nges_lambda: float = _option(0.2, "pull of the null-space scales towards one (λ of Eq. 50)")
    nges_iterations: int = _option(15, "alternating updates of the null-space scales")
    null_space_threshold: float = _option(1e-2, "eigenvalues below this share of the largest span the null space")
    salient_fraction: float = _option(0.05, "share of columns that get a second sign plane")
    alternations: int = _option(10, "alternating updates of row and column scales (Eq. 48)")
    error_feedback: bool = _option(True, "push the error of a block of columns into the columns after it")
    block_size: int = _option(128, "columns per block of the error feedback: a matter of speed")
    damping: float = _option(0.01, "share of the mean diagonal added to every Hessian")
    layer_lean: float = _option(0.03, "how much an expert's Hessian leans on the mean of its layer (ρ)")
    planes: int = _option(
        4, "sign planes that a direction of an expert has at most (6 from 1.25 bits on, 7 from 2.5)", (1, 2, 3, 4, 5, 6, 7)
    )
    scale_bits: int = _option(
        5, "bits of the scale of a direction or an entry of a sign plane (6 from 1.5 bits on, 8 from 2)", (3, 4, 5, 6, 7, 8)
    )
    sweeps: int = _option(1, "passes over the planes after the first, each in view of all errors")
    felt: bool = _option(False, "fit planes to the tokens by how much the loss feels their outputs (moebius: on below one bit)")
    codes: str = _option(
        "planes",
        "sign planes behind shared bases, trellis codes without a basis, or what is expected to lose less",
        ("auto", "planes", "trellis"),
    )
    refine: bool = _option(False, "train scales and bases afterwards, so that the logits become the original's")
    refine_steps: int = _option(200, "steps of that, of four calibration windows each")
    idre: bool = _option(True, "keep the directions that all experts share in 16 bit and quantize the rest (off: quantize all)")
    klt: bool = _option(True, "find those directions in the coordinates of the inputs (off: in those of the weights)")
    rank_share: float = _option(1 / 128, "how many of them, as a share of the input channels")
    bcos: str = _option(
        "mean_variance",
        "give outputs their variance and their mean back, one of them, or what a regression says",
        ("off", "mean", "variance", "mean_variance", "regression"),
    )
    allocation: str = _option("lagrangian", "solver that spreads bits over directions", ("lagrangian", "ilp"))
    gain: bool = _option(False, "scale each row so that its output keeps its variance")
    router: str = _option("keep", "keep the router in 16 bit, or binarize it with null-space scaling", ("keep", "binary"))
    rest: str = _option(
        "bf16",
        "linear layers outside the experts (attention, shared experts, dense layers, head): as they are, or rounded to nearest",
        ("bf16", "int8", "int4"),
    )
    shared_experts: int = _option(16, "bits of shared experts (rounded below 16; 16: as rest says)", (16, 8, 4, 3, 2))
    dense_layers: int = _option(
        16, "bits of the MLPs of layers without experts (rounded below 16; 16: as rest says)", (16, 8, 4, 3, 2)
    )

    @classmethod
    def make(cls, method: str, bits: float | None = None, **options: Any) -> Recipe:
        """A validated recipe with the defaults of its method.

        Args:
            method: a name in :data:`METHOD_OPTIONS`.
            bits: bits per expert weight; None takes the method's default.
            options: any field of this class that the method reads. Strings are parsed to the field's type.

        Raises:
            UnknownNameError: no such method, or an option the method does not have.
            RecipeError: a value of the wrong type or outside its range.
        """
        if method not in METHOD_OPTIONS:
            known = ", ".join(METHOD_OPTIONS)
            raise UnknownNameError(f"no method named {method!r}; known: {known}{_nearest(method, METHOD_OPTIONS)}")
        spec = METHOD_OPTIONS[method]
        for key in options:
            if key not in spec.options:
                known = ", ".join(sorted(spec.options))
                raise UnknownNameError(f"method {method!r} has no option {key!r}; it has: {known}{_nearest(key, spec.options)}")
        bits = spec.default_bits if bits is None else bits
        spec.check_bits(method, bits)
        values = {**spec.defaults(bits), **{k: _parse(k, v) for k, v in options.items()}}
        recipe = cls(method=method, bits=bits, **values)
        recipe._check()
        return recipe

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """The recipe that :meth:`to_dict` wrote."""
        values = dict(values)
        return cls.make(values.pop("method"), values.pop("bits"), **values)

    def to_dict(self) -> dict[str, Any]:
        """Method, bits and the options the method reads, ready for JSON."""
        return {
            "method": self.method,
            "bits": self.bits,
            **{k: getattr(self, k) for k in sorted(METHOD_OPTIONS[self.method].options)},
        }

    def _check(self) -> None:
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise RecipeError(f"option {name}: got {value}, wanted {low} to {high}")
        for option in dataclasses.fields(self):
            choices = option.metadata.get("choices")
            value = getattr(self, option.name)
            if choices and value not in choices:
                raise RecipeError(f"option {option.name}: got {value!r}, wanted one of {', '.join(map(str, choices))}")


@dataclass(frozen=True)
class MethodOptions:
    """What a method reads of a recipe, and its bits: multiples of ``step`` in a range (any if it is 0), or one number."""

    options: frozenset[str]
    default_bits: float
    low: float
    high: float
    step: float = 1
    overrides: dict[str, Any] = field(default_factory=dict)
    overrides_by_bits: Callable[[float], dict[str, Any]] = lambda bits: {}

    def check_bits(self, method: str, bits: float) -> None:
        if not self.low <= bits <= self.high or (self.step and bits % self.step):
            kind = "a number" if not self.step else "a whole number" if self.step == 1 else f"a multiple of {self.step:g}"
            wanted = f"{self.low:g}" if self.low == self.high else f"{kind} from {self.low:g} to {self.high:g}"
            raise RecipeError(f"method {method!r}: got {bits:g} bits, wanted {wanted}")

    def defaults(self, bits: float) -> dict[str, Any]:
        return {**self.overrides, **self.overrides_by_bits(bits)}


_EVERY_METHOD = frozenset(
    {"gain", "router", "rest", "shared_experts", "dense_layers", "nges_lambda", "nges_iterations", "null_space_threshold"}
    | {"damping", "layer_lean"}
)

_VECTORS = {"idre", "klt", "rank_share", "bcos", "error_feedback"}
_GROUPED_SIGNS = {"group_size", "salient_fraction", "glas", "glas_groups", "nges"}


def _whole_rows_at_one_bit(bits: float) -> dict[str, Any]:
    """A scale for every 128 weights would cost an eighth of a bit: one per row is enough."""
    return {"group_size": 0} if bits == 1 else {}


def _by_budget(bits: float) -> dict[str, Any]:
    """Where most directions get no bits at all, it matters which tokens the rest is fitted to; later it does not pay. Where
    bits are scarce, they do not belong in the fifth plane of what calibration showed most of; where they are not, four planes
    are too few for it, and the more planes there are, the more of what is left is the rounding of scales.
    """
    planes = 7 if bits >= 2.5 else 6 if bits >= 1.25 else 4
    return {"felt": bits < 1, "planes": planes, "scale_bits": 8 if bits >= 2 else 6 if bits >= 1.5 else 5}


METHOD_OPTIONS = {
    "moebius": MethodOptions(
        _EVERY_METHOD | {"block_size", "planes", "scale_bits", "sweeps", "felt", "codes", "refine", "refine_steps"},
        default_bits=1,
        low=0.3,
        high=4,
        step=0,
        overrides={"gain": True},
        overrides_by_bits=_by_budget,
    ),
    "mobie": MethodOptions(
        _EVERY_METHOD
        | {"side", "rank", "shared_bits", "cejd", "glas", "glas_groups", "nges", "salient_fraction"}
        | {"alternations", "error_feedback", "block_size"},
        default_bits=1,
        low=1,
        high=1,
    ),
    "rtn": MethodOptions(
        _EVERY_METHOD | {"group_size"}, default_bits=2, low=1, high=8, overrides_by_bits=_whole_rows_at_one_bit
    ),
    "gptq": MethodOptions(
        _EVERY_METHOD | {"group_size", "block_size"}, default_bits=2, low=1, high=8, overrides_by_bits=_whole_rows_at_one_bit
    ),
    # Codes stand for four weights each: quarters of a bit are whole bits of a code.
    "gptvq": MethodOptions(
        _EVERY_METHOD | _VECTORS, default_bits=2, low=1, high=3, step=0.25, overrides={"idre": False, "bcos": "off"}
    ),
    "kbvq": MethodOptions(_EVERY_METHOD | _VECTORS, default_bits=2, low=1, high=3, step=0.25),
    "bitsmoe": MethodOptions(
        _EVERY_METHOD | {"group_size", "rank", "shared_bits", "allocation"},
        default_bits=2,
        low=0.5,
        high=8,
        step=0,
        overrides={"shared_bits": 16},
    ),
    # What they store for a matrix depends on its shape; about two and a half bits.
    "billm": MethodOptions(
        _EVERY_METHOD | _GROUPED_SIGNS, default_bits=1, low=1, high=1, overrides={"glas": False, "nges": False}
    ),
    "arb": MethodOptions(
        _EVERY_METHOD | _GROUPED_SIGNS | {"alternations"},
        default_bits=1,
        low=1,
        high=1,
        overrides={"glas": False, "nges": False},
    ),
}

_RANGES: dict[str, tuple[float, float]] = {
    "group_size": (0, 1 << 20),
    "rank": (0, 1 << 20),
    "glas_groups": (1, 1 << 20),
    "rank_share": (0.0, 1.0),
    "nges_lambda": (0.0, 1e6),
    "nges_iterations": (0, 1000),
    "null_space_threshold": (0.0, 1.0),
    "salient_fraction": (0.0, 1.0),
    "alternations": (0, 1000),
    "sweeps": (0, 1000),
    "refine_steps": (1, 1_000_000),
    "block_size": (1, 1 << 20),
    "damping": (0.0, 1.0),
    "layer_lean": (0.0, 1.0),
}


_BOOLEANS = {"true": True, "on": True, "yes": True, "1": True, "false": False, "off": False, "no": False, "0": False}


def _parse(name: str, value: Any) -> Any:
    """A value given as text, as the type of the field it is for."""
    kind: Any = {f.name: type(f.default) for f in dataclasses.fields(Recipe)}[name]
    try:
        return _BOOLEANS[str(value).lower()] if kind is bool else kind(value)
    except (ValueError, KeyError):
        wanted = "true or false" if kind is bool else {int: "a whole number", float: "a number", str: "a word"}[kind]
        raise RecipeError(f"option {name}: got {value!r}, wanted {wanted}") from None


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


@dataclass(frozen=True)
class CalibrationSettings:
    """Which tokens a run looks at.

    Attributes:
        text: ``"builtin"``, a path to a ``.txt`` or ``.jsonl`` file, or the name of a Hugging Face data set.
        windows: how many windows of tokens.
        window_length: tokens per window.
        seed: which windows are drawn.
        split: ``"train"`` or ``"held-out"``; of a single file, the held-out split is its last twentieth.
    """

    text: str = "builtin"
    windows: int = 64
    window_length: int = 256
    seed: int = 0
    split: str = "train"

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return dataclasses.asdict(self)
