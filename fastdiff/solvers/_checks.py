"""Argument checks of the builders."""

from __future__ import annotations

import math
import operator
from numbers import Real


def number(
    name: str,
    value: object,
    low: float,
    high: float = math.inf,
    *,
    finite: bool = True,
    where: str = "build",
) -> float:
    """The option as a float in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{where}: {name} must be a number, got {type(value).__name__}")
    v = float(value)
    if not low <= v <= high or (finite and math.isinf(v)):
        rule = f"lie in [{low:g}, {high:g}]"
        if math.isinf(high):
            rule = f"be {'finite and ' if finite else ''}at least {low:g}"
        raise ValueError(f"{where}: {name} must {rule}, got {value}")
    return v


def choice(name: str, value: object, allowed: tuple[str, ...], where: str = "build") -> str:
    """The option as one of the allowed words."""
    if not isinstance(value, str):
        raise TypeError(f"{where}: {name} must be a string, got {type(value).__name__}")
    if value not in allowed:
        raise ValueError(f"{where}: {name} must be one of {', '.join(allowed)}, got {value!r}")
    return value


def flag(name: str, value: object) -> bool:
    """The option as True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"build: {name} must be True or False, got {type(value).__name__}")
    return value


def whole(name: str, value: object, low: int, high: int, where: str = "build") -> int:
    """The option as an int in [low, high]."""
    if isinstance(value, bool) or not hasattr(type(value), "__index__"):
        raise TypeError(f"{where}: {name} must be an integer, got {type(value).__name__}")
    v = operator.index(value)  # type: ignore[arg-type]
    if not low <= v <= high:
        raise ValueError(f"{where}: {name} must be an integer in [{low}, {high}], got {v}")
    return v
