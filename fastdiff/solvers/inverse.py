"""Inversion: from an image up to the noise that a solver would make it from.

The table walks the grid of `Schedule.points` from its end to its start. Its first state is the
image itself, so that its `init_sigma` is 1: ``Sampler(model, table)(noise=image)``.
"""

from __future__ import annotations

import math

from fastdiff.solvers._checks import choice, flag, whole
from fastdiff.solvers._exponential import SOLVER_TYPES
from fastdiff.solvers._walk import Point, Step, Walk
from fastdiff.solvers.dpm_multistep import lay, orders_of
from fastdiff.table import Row, StepTable


def _upwards(walk: Walk) -> list[Step]:
    points = walk.points[::-1]
    return [Step(points[i], points[i + 1]) for i in range(walk.steps)]


def _needs_noise(walk: Walk, name: str) -> None:
    if walk.points[-1].sigma == 0:
        raise ValueError(
            f"build: {name} must start at sigma > 0 for prediction {walk.prediction!r} "
            "(final='sigma_min'), got clean data"
        )


def _noise_of(walk: Walk, now: Point) -> dict[str, float]:
    """The noise in a state at `now`, of the state, the model output and the x0 prediction."""
    a, s = now.alpha, now.sigma
    if walk.prediction == "epsilon":
        return {"m": 1.0}
    if walk.prediction == "v_prediction":
        return {"x": s, "m": a}
    if walk.prediction == "flow":
        return {"x": 1.0, "m": a}
    return {"x": 1 / s, "d": -a / s}


def ddim_inverse(walk: Walk, *, evaluate: str = "next") -> StepTable:
    """DDIM upwards: Song et al. 2021 (arXiv:2010.02502), equation 13 and section 4.3.

    Order 1, one evaluation a step, no noise, no history. From clean data (final="zero") where the
    prediction tells the noise there: "epsilon", "v_prediction" and "flow"; "sample" and "edm" need
    final="sigma_min". Other names: DDIMInverseScheduler; with evaluate="now" ddim_reverse_sample
    of guided-diffusion; on a flow Euler upwards.

    Args:
        evaluate: "next" gives the model the time where the step ends, as diffusers does (its x0 and
            noise are then read at the scales of the state), "now" that of the state, which needs
            final="sigma_min".

    Raises:
        ValueError: a grid that starts at clean data where it may not.
    """
    choice("evaluate", evaluate, ("next", "now"))
    if evaluate == "now" or walk.prediction in ("sample", "edm"):
        _needs_noise(walk, "ddim_inverse")
    for step in _upwards(walk):
        now, then = step.now, step.next
        at = then if evaluate == "next" else now
        x = {"d": then.alpha}
        for term, c in _noise_of(walk, now).items():
            x[term] = x.get(term, 0.0) + then.sigma * c
        time, c_in, convert = at.time, 1.0, walk.conversion(now)
        if walk.prediction == "edm":  # the network's own scales belong to its time
            time, convert = math.log(at.sigma) / 4, walk.conversion(at)
            c_in = 1 / math.hypot(at.sigma, walk.schedule.sigma_data)
        walk.rows.append(
            Row(x=x, time=time, alpha=now.alpha, sigma=now.sigma, convert=convert, c_in=c_in)
        )
    return walk.table("ddim_inverse", 1, init_sigma=1.0)


def _multistep(
    walk: Walk, name: str, noise_form: bool, order: int, solver_type: str, lower_order_final: bool
) -> StepTable:
    order = whole("order", order, 1, 3)
    choice("solver_type", solver_type, SOLVER_TYPES)
    _needs_noise(walk, name)
    orders = orders_of(walk.steps, order, flag("lower_order_final", lower_order_final), False)
    lay(walk, _upwards(walk), orders, solver_type, noise_form=noise_form)
    return walk.table(name, min(order, 2), init_sigma=1.0)


def dpmpp_multistep_inverse(
    walk: Walk, *, order: int = 2, solver_type: str = "midpoint", lower_order_final: bool = True
) -> StepTable:
    """`dpmpp_multistep` upwards (arXiv:2211.01095): steps of negative h.

    Order 1 or 2 (order=3 as there), one evaluation a step, no noise, `order - 1` x0 kept. It starts
    at the least noisy time, so that it needs final="sigma_min". Other names:
    DPMSolverMultistepInverseScheduler with "dpmsolver++".

    Args:
        order, solver_type, lower_order_final: as in `dpmpp_multistep`.

    Raises:
        ValueError: a grid that starts at clean data.
    """
    return _multistep(walk, "dpmpp_multistep_inverse", False, order, solver_type, lower_order_final)


def dpm_multistep_inverse(
    walk: Walk, *, order: int = 2, solver_type: str = "midpoint", lower_order_final: bool = True
) -> StepTable:
    """`dpm_multistep` upwards (arXiv:2206.00927), as `dpmpp_multistep_inverse`.

    Order 1 or 2, one evaluation a step, no noise, `order - 1` noise predictions kept. Other names:
    DPMSolverMultistepInverseScheduler with "dpmsolver".

    Args:
        order, solver_type, lower_order_final: as in `dpmpp_multistep`.

    Raises:
        ValueError: a grid that starts at clean data.
    """
    return _multistep(walk, "dpm_multistep_inverse", True, order, solver_type, lower_order_final)
