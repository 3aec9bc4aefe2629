"""Two-stage midpoint solvers of k-diffusion: dpm_2, its ancestral kin and dpmpp_2s_ancestral."""

from __future__ import annotations

import math

from fastdiff.solvers._ancestral import (
    Descent,
    euler_row,
    flow_descent,
    k_descent,
    last_row,
    line,
)
from fastdiff.solvers._checks import number
from fastdiff.solvers._churn import Churn
from fastdiff.solvers._walk import Point, Step, Walk
from fastdiff.table import StepTable


def midpoint_rows(
    walk: Walk, step: Step, to: Descent, s_noise: float, middle: Point, data: bool
) -> None:
    """A first-order step to `middle` and from the base on with the prediction found there.

    The base lies on the line from the middle away from x0 = D, so the second row needs D alone and
    not the base: x' goes on from the middle with its D', and D' - D corrects it. `data` takes D'
    over the whole step (DPM-Solver++), otherwise the noise or slope at the middle (DPM-Solver-2).
    """
    (_, level), (scale, mid) = line(walk, step.now), line(walk, middle)
    walk.evaluate(
        step.now,
        {"x": middle.sigma / step.now.sigma, "d": scale * (level - mid) / level},
        push=True,
    )
    scale = line(walk, step.next)[0]
    down = to.down / scale
    part = (down / mid if data else level / mid) * (level - mid) / level
    x = {"x": to.down / middle.sigma, "d": scale * ((mid - down) / mid + part), "h0": -scale * part}
    last_row(walk, middle, x, to, s_noise)


def _middle(walk: Walk, step: Step, down: float) -> Point:
    """Halfway in log-level to the lower level."""
    if walk.schedule.kind == "flow":
        return walk.at_time(math.sqrt(step.now.sigma * down))
    return walk.at_ratio(math.sqrt(step.now.ratio * (down / step.next.alpha)))


def _dpm_2(walk: Walk, step: Step, to: Descent, s_noise: float) -> None:
    if to.down and math.isfinite(line(walk, step.now)[1]):
        midpoint_rows(walk, step, to, s_noise, _middle(walk, step, to.down), data=False)
    else:
        euler_row(walk, step, to, s_noise)


def _descents(walk: Walk, eta: float) -> list[tuple[Step, Descent]]:
    eta = number("eta", eta, 0.0)
    descent = flow_descent if walk.schedule.kind == "flow" else k_descent
    return [(step, descent(step, eta)) for step in walk]


def dpm_2(
    walk: Walk,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> StepTable:
    """k-diffusion's ``sample_dpm_2``, DPM-Solver-2 of Lu et al. 2022 (arXiv:2206.00927).

    Algorithm 1 there, its midpoint halfway in log(sigma/alpha), with the churn of Karras et al.
    2022. Order 2, two evaluations a step and one in the step to clean data, no noise without churn,
    one x0 kept from the first to the second. On a flow the level is t, as in ComfyUI; elsewhere a
    step from alpha = 0 is Euler's. Churn as in `euler`. Other names: KDPM2DiscreteScheduler.

    Args:
        s_churn, s_tmin, s_tmax, s_noise: as in `Churn`.
    """
    churn = Churn(s_churn, s_tmin, s_tmax, s_noise)
    for step in walk:
        step = churn.before(walk, step)
        _dpm_2(walk, step, Descent(step.next.sigma, 1.0, 0.0), 0.0)
    return walk.table("dpm_2", 2)


def dpm_2_ancestral(walk: Walk, *, eta: float = 1.0, s_noise: float = 1.0) -> StepTable:
    """k-diffusion's ``sample_dpm_2_ancestral``, on a flow ComfyUI's with ``_RF``.

    `dpm_2` (arXiv:2206.00927) to the lower level of `euler_ancestral`, then fresh noise. Order 2
    (weak: measured on Gaussian data), two evaluations a step and one draw, one x0 kept from the
    first to the second; the step to clean data evaluates once and draws nothing. Other names:
    KDPM2AncestralDiscreteScheduler.

    Args:
        eta: share of fresh noise, at least 0; capped where it would exceed the next level, and the
            step is then Euler's (k-diffusion leaves out its noise there).
        s_noise: scale of the fresh noise.
    """
    s_noise = number("s_noise", s_noise, 0.0)
    for step, to in _descents(walk, eta):
        _dpm_2(walk, step, to, s_noise)
    return walk.table("dpm_2_ancestral", 2)


def dpmpp_2s_ancestral(walk: Walk, *, eta: float = 1.0, s_noise: float = 1.0) -> StepTable:
    """k-diffusion's ``sample_dpmpp_2s_ancestral``, on a flow ComfyUI's with ``_RF``.

    DPM-Solver++(2S) of Lu et al. 2022 (arXiv:2211.01095), algorithm 1 with r = 1/2, to the lower
    level of `euler_ancestral`, then fresh noise. Order 2 (weak: measured on Gaussian data), two
    evaluations a step and one draw, one x0 kept from the first to the second; the step to clean
    data evaluates once and draws nothing. A step from alpha = 0, whose midpoint in log-SNR is its
    start, is Euler's (ComfyUI evaluates again at t = 0.9999). Other names: DPM++ 2S a.

    Args:
        eta, s_noise: as in `dpm_2_ancestral`.
    """
    s_noise = number("s_noise", s_noise, 0.0)
    for step, to in _descents(walk, eta):
        if not to.down or math.isinf(step.h):
            euler_row(walk, step, to, s_noise)
            continue
        # down over its own alpha, where on a flow that is 1 - t
        ratio = to.down / (1 - to.down if walk.schedule.kind == "flow" else step.next.alpha)
        middle = walk.at_ratio(math.sqrt(step.now.ratio * ratio))
        midpoint_rows(walk, step, to, s_noise, middle, data=True)
    return walk.table("dpmpp_2s_ancestral", 2)
