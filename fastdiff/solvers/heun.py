"""Heun's second-order method of Karras et al."""

from __future__ import annotations

import math

from fastdiff.solvers._checks import number
from fastdiff.solvers._churn import Churn
from fastdiff.solvers._walk import Step, Walk
from fastdiff.solvers.ddim import ancestral
from fastdiff.table import StepTable


def heun(
    walk: Walk,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    min_alpha: float = 1e-3,
) -> StepTable:
    """Karras et al. 2022 (arXiv:2206.00364), algorithm 2; algorithm 1 without churn.

    Order 2, two evaluations a step and one in the step to clean data, one x0 kept from the first
    to the second. Churn as in `euler`. Other names: sample_heun, edm_sampler,
    HeunDiscreteScheduler, FlowMatchHeunDiscreteScheduler.

    The Euler point lies on the line from the state to x0 = D, so the slope there towards D is the
    first slope, and the trapezoid is a correction by the two predictions alone:
    x' = x_euler + (u/u' - 1)/2 (D' - D) in the space where the line is straight, u = sigma/alpha
    with x/alpha, or u = t with x itself on a flow. A step from alpha = 0 elsewhere has no finite
    u and stays Euler.

    Args:
        s_churn, s_tmin, s_tmax, s_noise: as in `Churn`.
    """
    churn = Churn(s_churn, s_tmin, s_tmax, s_noise)
    min_alpha = number("min_alpha", min_alpha, 0.0)
    for step in walk:
        lay(walk, churn.before(walk, step), min_alpha)
    return walk.table("heun", 2)


def lay(walk: Walk, step: Step, min_alpha: float) -> None:
    """The rows of one step."""
    is_flow, then = walk.schedule.kind == "flow", step.next
    corrected = then.sigma > 0 and (
        is_flow or (math.isfinite(step.h) and step.now.alpha >= min_alpha)
    )
    walk.evaluate(step.now, ancestral(step, 0.0)[0], push=corrected)
    if corrected:
        if is_flow:
            c = (step.now.sigma - then.sigma) / (2 * then.sigma)
        else:
            c = then.alpha * math.expm1(step.h) / 2
        walk.evaluate(then, {"x": 1.0, "d": c, "h0": -c})
