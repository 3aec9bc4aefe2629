"""Where the points of a grid lie: the rules behind `Schedule.points`, in float64.

A rule is named by its origin where two projects mean different numbers by one word. `levels` holds
those that place sigma/alpha (t on a flow), `times` those that place indices of the model's table
of noise levels.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fastdiff.spacings import levels, times
from fastdiff.spacings._rules import require
from fastdiff.spacings.levels import AYS, RAMPS, Array, times_of

if TYPE_CHECKING:
    from fastdiff.schedules import Schedule

__all__ = ["AYS", "OPTIONS", "SPACINGS", "options_of", "points", "rule_of", "times_of"]

# the spacings of each kind of schedule, its default first
SPACINGS: dict[str, tuple[str, ...]] = {
    "discrete": (
        "trailing", "linspace", "leading", "karras", "exponential", "polyexponential", "laplace",
        "kl_optimal", "vp", "beta@diffusers", "beta@comfy", "normal", "sgm_uniform", "simple",
        "ddim_uniform", "lcm", "ays@sd1", "ays@sdxl",
    ),
    "edm": (
        "karras", "exponential", "polyexponential", "laplace", "kl_optimal", "vp",
        "beta@diffusers", "ays@svd",
    ),
    "flow": (
        "linspace", "karras", "exponential", "polyexponential", "kl_optimal", "beta@diffusers",
        "beta@comfy", "normal", "sgm_uniform", "simple", "ddim_uniform", "linear_quadratic",
    ),
}  # fmt: skip


_OF_TIMES: dict[str, Callable[..., Array]] = {
    "linspace": times.linspace,
    "leading": times.leading,
    "trailing": times.trailing,
    "beta@comfy": times.beta_times,
    "normal": times.normal,
    "sgm_uniform": times.sgm_uniform,
    "simple": times.simple,
    "ddim_uniform": times.ddim_uniform,
    "lcm": times.lcm,
}
_OF_LEVELS: dict[str, Callable[..., Array]] = {
    "vp": levels.vp,
    "linear_quadratic": levels.linear_quadratic,
}


def rule_of(name: str) -> Callable[..., Array] | None:
    """The function of a spacing; a published table has none."""
    return RAMPS.get(name) or _OF_TIMES.get(name) or _OF_LEVELS.get(name)


def options_of(name: str) -> tuple[str, ...]:
    """The options that a spacing takes."""
    rule = rule_of(name)
    if rule is None:
        return ()
    named = inspect.signature(rule).parameters.values()
    return tuple(p.name for p in named if p.kind is p.KEYWORD_ONLY)


OPTIONS = tuple(
    dict.fromkeys(o for names in SPACINGS.values() for name in names for o in options_of(name))
)


def points(s: Schedule, n: int, name: str, to_zero: bool, options: dict[str, Any]) -> Array:
    """n + 1 falling times, or n where clean data is to follow."""
    unknown = sorted(set(options) - set(options_of(name)))
    if unknown:
        among = [x for x in SPACINGS[s.kind] if unknown[0] in options_of(x)]
        rule = f"be left out unless spacing is one of {among}"
        require(False, "points", unknown[0], rule, options[unknown[0]])
    if name in RAMPS:
        others = tuple(x for x in SPACINGS[s.kind] if x in _OF_TIMES)
        return levels.ramp(s, n, to_zero, name, others, options)
    if name in AYS:
        return levels.align_your_steps(s, n, to_zero, name)
    return (_OF_TIMES.get(name) or _OF_LEVELS[name])(s, n, to_zero, **options)
