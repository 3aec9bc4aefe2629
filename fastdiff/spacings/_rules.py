"""Argument checks of schedules and spacings."""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np


def require(ok: bool | np.bool_, where: str, argument: str, rule: str, got: object) -> None:
    if not ok:
        raise ValueError(f"schedules.{where}: {argument} must {rule}, got {got}")


def integer(where: str, name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not hasattr(type(value), "__index__"):
        raise TypeError(f"schedules.{where}: {name} must be an int, got {value!r}")
    number = operator.index(value)
    require(number >= least, where, name, f"be >= {least}", value)
    return number


def positive(**options: float) -> None:
    for name, value in options.items():
        require(0 < value < math.inf, "points", name, "be > 0 and finite", value)


def shapes(alpha: float, beta: float) -> None:
    for name, value in (("alpha", alpha), ("beta", beta)):
        require(0.1 <= value <= 1000, "points", name, "lie in [0.1, 1000]", value)
