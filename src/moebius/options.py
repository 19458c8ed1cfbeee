"""What a setting is, and how a method declares its own: name, default (which may depend on the bits), range and help."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from moebius.errors import RecipeError, UnknownNameError
from moebius.table import nearest

_BOOLEANS = {"true": True, "on": True, "yes": True, "1": True, "false": False, "off": False, "no": False, "0": False}
_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}

#: Words of a recipe that no option of a method may be called: they are there for every method.
RESERVED = frozenset(
    {"method", "bits", "options", "router", "rest", "shared_experts", "dense_layers"}
    | {"calibration", "windows", "window_length", "seed", "bos"}
)


@dataclass(frozen=True)
class Option:
    """One setting.

    Attributes:
        name: as it is given to ``Recipe.make`` and ``--set``.
        default: at the fewest bits; its type is the type of the setting.
        help: what it does, in one line.
        choices: the values it may have; empty: any in its range.
        low, high: smallest and largest value of a number.
        from_bits: bits and the default from there on, ascending.
        formerly: names it had in earlier versions, which are still read.
    """

    name: str
    default: Any
    help: str
    choices: tuple[Any, ...] = ()
    low: float = -math.inf
    high: float = math.inf
    from_bits: tuple[tuple[float, Any], ...] = ()
    formerly: tuple[str, ...] = ()

    def default_at(self, bits: float) -> Any:
        """The default of a recipe with so many bits."""
        return [self.default, *(value for start, value in self.from_bits if bits >= start)][-1]

    def parse(self, value: Any) -> Any:
        """A value, also given as text, in the type of the option.

        Raises:
            RecipeError: of another type, outside of the range, or none of the choices.
        """
        parsed = self._converted(value)
        if self.choices and parsed not in self.choices:
            raise RecipeError(f"option {self.name}: got {parsed!r}, wanted one of {', '.join(map(str, self.choices))}")
        if isinstance(parsed, (int, float)) and not self.low <= parsed <= self.high:
            raise RecipeError(f"option {self.name}: got {value}, wanted {self.range_text()}")
        return parsed

    def _converted(self, value: Any) -> Any:
        kind: Any = type(self.default)
        try:
            if kind is bool:
                return _BOOLEANS[str(value).lower()]
            if kind is int and isinstance(value, float) and not value.is_integer():
                raise ValueError
            return kind(value)
        except (ValueError, KeyError, TypeError, OverflowError):
            raise RecipeError(f"option {self.name}: got {value!r}, wanted {_KINDS[kind]}") from None

    @property
    def limited(self) -> bool:
        """Whether it is a number with a smallest and a largest value."""
        return self.low > -math.inf or self.high < math.inf

    def range_text(self) -> str:
        """What it may be, in words."""
        if self.choices:
            return ", ".join(map(str, self.choices))
        if not self.limited:
            return _KINDS[type(self.default)]
        return f"{_plain(self.low)} to {_plain(self.high)}"

    def default_text(self) -> str:
        """The default, and from how many bits on it is another."""
        return ", ".join([shown(self.default), *(f"{shown(value)} from {bits:g} bits on" for bits, value in self.from_bits)])


@dataclass(frozen=True)
class MethodOptions:
    """What a method reads of a recipe, and its bits: multiples of ``step`` in a range (any if it is 0), or one number.

    Attributes:
        default_bits: bits per expert weight of a recipe that names none.
        low, high: fewest and most.
        step: what bits are multiples of; 0: any number.
        options: in the order in which they are shown.

    Raises:
        RecipeError: a name that is taken, or a default that its own option would refuse.
    """

    options: tuple[Option, ...]
    default_bits: float
    low: float
    high: float
    step: float = 1

    def __post_init__(self) -> None:
        names = [name for option in self.options for name in (option.name, *option.formerly)]
        for option in self.options:
            if option.name in RESERVED or names.count(option.name) > 1:
                raise RecipeError(
                    f"option {option.name}: declared twice, or a word that recipes have for something else; rename it"
                )
            for value in (option.default, *(value for _, value in option.from_bits)):
                option.parse(value)

    def check_bits(self, method: str, bits: float) -> None:
        """Refuse bits that the method does not have.

        Raises:
            RecipeError: outside of the range, or between two steps.
        """
        if not self.low <= bits <= self.high or (self.step and bits % self.step):
            raise RecipeError(f"method {method!r}: got {bits:g} bits, wanted {self.bits_text()}")

    def bits_text(self) -> str:
        """Which bits there are, in words."""
        if self.low == self.high:
            return f"{self.low:g}"
        kind = "a number" if not self.step else "a whole number" if self.step == 1 else f"a multiple of {self.step:g}"
        return f"{kind} from {self.low:g} to {self.high:g}"


def by_name(options: Iterable[Option], name: str, whose: str) -> Option:
    """The option of this name, or that once had it.

    Raises:
        UnknownNameError: there is none; the message lists those that there are.
    """
    options = list(options)
    for option in options:
        if name == option.name or name in option.formerly:
            return option
    known = sorted(option.name for option in options)
    raise UnknownNameError(f"{whose} has no option {name!r}; it has: {', '.join(known)}{nearest(name, known)}")


def shown(value: Any) -> str:
    """A value as ``--set`` takes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _plain(limit: float) -> str:
    return f"{limit:.0f}" if float(limit).is_integer() and abs(limit) < 1e9 else f"{limit:g}"
