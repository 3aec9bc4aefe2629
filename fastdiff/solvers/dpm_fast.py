"""DPM-Solver-fast: singlestep steps of order 3, and lower ones that fill up the evaluations."""

from __future__ import annotations

import math

from fastdiff.solvers._checks import number
from fastdiff.solvers._walk import Point, Step, Walk
from fastdiff.solvers.ddim import ancestral
from fastdiff.solvers.dpm_singlestep import lay_group
from fastdiff.table import StepTable


def _orders(evaluations: int) -> list[int]:
    """Of the steps, n // 3 + 1 of them."""
    whole, rest = divmod(evaluations, 3)
    return [3] * whole + [rest] if rest else [3] * (whole - 1) + [2, 1]


def _lay(walk: Walk, start: Point, end: Point, n: int, eta: float, s_noise: float) -> None:
    """Steps of equal size in log(sigma/alpha), stages at thirds or the half of each.

    With eta a step goes to the lower level of `euler_ancestral`, but not below the end, and noise
    brings it up again.
    """
    orders = _orders(n)
    span = math.log(end.ratio / start.ratio)
    ratios = [start.ratio * math.exp(span * i / len(orders)) for i in range(len(orders))]
    points = [start, *(walk.at_ratio(r) for r in ratios[1:]), end]
    for order, now, then in zip(orders, points, points[1:], strict=False):
        down, up = then, 0.0
        if eta:
            far = (then.ratio / now.ratio) ** 2
            left = (1 - eta) * (1 + eta) + eta**2 * far
            lower = max(then.ratio * math.sqrt(max(left, 0.0)), end.ratio)
            if lower < then.ratio:
                down = walk.at_ratio(lower)
                up = then.alpha * math.sqrt((then.ratio - lower) * (then.ratio + lower))
        h = math.log(down.ratio / now.ratio)
        stages = [walk.at_ratio(now.ratio * math.exp(h * k / order)) for k in range(1, order)]
        renoise = (then.alpha / down.alpha, s_noise * up)
        lay_group(walk, [now, *stages, down], "dpmsolver", noise_form=True, renoise=renoise)


def dpm_fast(walk: Walk, *, eta: float = 0.0, s_noise: float = 1.0) -> StepTable:
    """Lu et al. 2022 (arXiv:2206.00927): DPM-Solver-fast, section 3.4, with k-diffusion's eta.

    It makes its own grid, uniform in log(sigma/alpha): of the one given only the ends and the
    number of intervals count, and `steps` is the number of model evaluations. From the least noisy
    point a last evaluation steps to clean data where the grid ends there; a first step from alpha 0
    is of first order to the grid's second point.

    Order 3 where the last step is of order 2 (evaluations = 2 mod 3, no alpha 0); else 2, by one
    step of first order, which shows from about 600 evaluations on. One evaluation a grid interval,
    up to two noise predictions kept; eta > 0 draws noise once a step. Other names: sample_dpm_fast
    (with final="sigma_min"), singlestep_dpm_solver with skip_type "logSNR".

    Args:
        eta: share of fresh noise, at least 0; capped at the level of the end.
        s_noise: scale of the fresh noise.
    """
    eta, s_noise = number("eta", eta, 0.0), number("s_noise", s_noise, 0.0)
    points = list(walk.points)
    clean = points.pop() if points[-1].sigma == 0 else None
    pure = points[0].alpha == 0
    if pure:
        then = points[1] if len(points) > 1 else clean
        assert then is not None  # a grid has two points
        x, noise = ancestral(Step(points[0], then), min(eta, 1.0))
        walk.evaluate(points[0], x, noise=s_noise * noise)
        del points[0]
    if len(points) > 1:
        _lay(walk, points[0], points[-1], len(points) - 1, eta, s_noise)
    if clean is not None and points:
        walk.evaluate(points[-1], {"d": clean.alpha})
    return walk.table("dpm_fast", 3 if (len(points) - 1) % 3 == 2 and not pure else 2)
