"""Churn: noise added before an evaluation."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastdiff.solvers._checks import number
from fastdiff.solvers._walk import Step, Walk


@dataclass(frozen=True)
class Churn:
    """Karras et al. 2022 (arXiv:2206.00364), algorithm 2, lines 4 to 6; levels are sigma/alpha.

    Args:
        s_churn: total churn; a step takes min(s_churn/steps, sqrt(2) - 1).
        s_tmin, s_tmax: levels between which noise is added.
        s_noise: scale of that noise.
    """

    s_churn: float
    s_tmin: float
    s_tmax: float
    s_noise: float

    def __post_init__(self) -> None:
        for name in ("s_churn", "s_tmin", "s_noise"):
            object.__setattr__(self, name, number(name, getattr(self, name), 0.0))
        s_tmax = number("s_tmax", self.s_tmax, self.s_tmin, finite=False)
        object.__setattr__(self, "s_tmax", s_tmax)

    def before(self, walk: Walk, step: Step) -> Step:
        """The step from the noisier point, after a row that leads there; the same step if none.

        Where sigma/alpha is infinite there is no noisier point.
        """
        r = step.now.ratio
        inside = self.s_tmin <= r <= self.s_tmax and math.isfinite(r)
        gamma = min(self.s_churn / walk.steps, math.sqrt(2) - 1) if inside else 0.0
        if gamma == 0.0:
            return step
        hat = walk.at_ratio(r * (1 + gamma))
        walk.renoise(step.now, hat, self.s_noise)
        return Step(hat, step.next)
