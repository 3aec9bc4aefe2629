"""Heun++: a step of three slopes, weighted by their levels."""

from __future__ import annotations

import math

from fastdiff.solvers._churn import Churn
from fastdiff.solvers._walk import Step, Walk, epsilon, velocity
from fastdiff.solvers.ddim import ancestral
from fastdiff.table import StepTable


def heunpp2(
    walk: Walk,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> StepTable:
    """ComfyUI's ``sample_heunpp2``: the slopes here, one and two steps on, the later ones weighted
    by their level over three times the first level of all.

    Order 1, whatever its evaluations: the weights are not those of a quadrature. Three evaluations
    a step, two in the last but one, one in the last; two slopes and the state at the step's start
    kept. The slope is that of Karras et al. 2022 (arXiv:2206.00364), the level t on a flow and
    sigma/alpha elsewhere; where that is infinite the step is Euler's, and the next level is taken
    for the first. Churn as in `euler`. Other names: Heun++.

    Args:
        s_churn, s_tmin, s_tmax, s_noise: as in `Churn`.
    """
    churn = Churn(s_churn, s_tmin, s_tmax, s_noise)
    is_flow = walk.schedule.kind == "flow"
    slope = velocity if is_flow else epsilon
    points = walk.points
    levels = [at.sigma if is_flow else at.ratio for at in points]
    first = next(level for level in levels if math.isfinite(level))
    for i, step in enumerate(walk):
        step = churn.before(walk, step)
        now, then = step.now, step.next
        more = min(2, walk.steps - 1 - i) if math.isfinite(levels[i]) else 0
        if not more:
            walk.evaluate(now, ancestral(step, 0.0)[0])
            continue
        weights = [level / ((more + 1) * first) for level in levels[i + 1 : i + 1 + more]]
        weights.insert(0, 1 - math.fsum(weights))
        walk.evaluate(now, ancestral(step, 0.0)[0], y={"x": 1.0}, push=slope(now))
        if more == 2:
            ahead = ancestral(Step(then, points[i + 2]), 0.0)[0]
            walk.evaluate(then, ahead, push=slope(then))
        at = points[i + more]
        e, f = slope(at)
        # in units of x0 the slope is the noise, on a flow it is x's own
        gain, length = (1.0, then.sigma - now.sigma) if is_flow else _ve(step)
        x = {"y": gain, "x": length * weights[-1] * e, "d": length * weights[-1] * f}
        x |= {f"h{k}": length * w for k, w in enumerate(weights[-2::-1])}
        walk.evaluate(at, x)
    return walk.table("heunpp2", 1)


def _ve(step: Step) -> tuple[float, float]:
    """alpha'/alpha, and alpha' times the change of sigma/alpha."""
    now, then = step.now, step.next
    return then.alpha / now.alpha, now.sigma * then.alpha / now.alpha * math.expm1(-step.h)
