"""Ranges of settings, declared in the annotations of dataclass fields and checked in one place."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np


@dataclass(frozen=True)
class Range:
    """Bounds of a number.

    Attributes:
        low: smallest value.
        high: largest value.
        above: whether ``low`` itself is excluded.
        finite: whether infinity is refused; NaN always is.
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    finite: bool = True

    def __contains__(self, value: float) -> bool:
        if self.finite and not math.isfinite(value):
            return False
        return (self.low < value if self.above else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        if math.isfinite(self.high):
            return f"in {'(' if self.above else '['}{self.low:g}, {self.high:g}]"
        return "" if math.isinf(self.low) else f"{'>' if self.above else '>='} {self.low:g}"


PositiveInt = Annotated[int, Range(1)]
NonNegativeInt = Annotated[int, Range(0)]
PositiveFloat = Annotated[float, Range(0, above=True)]
NonNegativeFloat = Annotated[float, Range(0)]
FiniteFloat = Annotated[float, Range()]
PositiveOrInfinite = Annotated[float, Range(0, above=True, finite=False)]
Fraction = Annotated[float, Range(0, 1)]
PositiveFraction = Annotated[float, Range(0, 1, above=True)]


def check_settings(settings: object) -> None:
    """Checks the fields of a dataclass that are annotated with a `Range` or a `Literal`.

    Raises:
        ValueError: if a value is of the wrong kind, out of range, NaN or not one of the literals.
    """
    cls: Any = type(settings)
    owner = cls.__name__
    for name, (kind, rule, optional) in _rules(cls).items():
        value = getattr(settings, name)
        if optional and value is None:
            continue
        if not isinstance(rule, Range):
            if value not in rule:
                known = ", ".join(map(str, rule))
                raise ValueError(f"{owner}: unknown {name} {value!r}; there are: {known}")
            continue
        number: Any = Integral if kind is int else Real
        if isinstance(value, bool) or not isinstance(value, number) or value not in rule:
            unbounded = "a finite number" if rule.finite and math.isinf(rule.high) else "a number"
            called = "an integer" if kind is int else unbounded
            raise ValueError(f"{owner}: {name} must be {called} {rule}".rstrip() + f", got {value!r}")


def check_epsilons(epsilons: object) -> list[float]:
    """Several budgets as floats.

    Raises:
        TypeError: if it is not a sequence.
        ValueError: if it is empty, or an entry is not a finite number >= 0.
    """
    if isinstance(epsilons, str) or not isinstance(epsilons, Sequence | np.ndarray):
        raise TypeError(f"epsilons must be a list of numbers, got {epsilons!r}")
    if len(epsilons) == 0:
        raise ValueError("epsilons must not be empty")
    for index, value in enumerate(epsilons):
        if isinstance(value, bool) or not isinstance(value, Real) or float(value) not in Range(0):
            raise ValueError(f"epsilons must be finite numbers >= 0, got {value!r} at index {index}")
    return [float(value) for value in epsilons]


@functools.cache
def _rules(cls: Any) -> dict[str, tuple[Any, Any, bool]]:
    """Type, rule and whether ``None`` is allowed, for each field that has a rule."""
    if not dataclasses.is_dataclass(cls):
        return {}
    try:
        hints = get_type_hints(cls, include_extras=True)
    except NameError:  # unresolvable annotations
        return {}
    rules: dict[str, tuple[Any, Any, bool]] = {}
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        for part in parts:
            kind, *notes = get_args(part) or (part,)
            if get_origin(part) is Literal:
                rules[field.name] = (None, get_args(part), type(None) in parts)
            elif notes and isinstance(notes[0], Range):
                rules[field.name] = (kind, notes[0], type(None) in parts)
    return rules
