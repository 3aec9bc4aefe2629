"""Restart: noise forward and the flow back, several times over one interval of noise."""

from __future__ import annotations

import math
from itertools import pairwise

from fastdiff.solvers._checks import number, whole
from fastdiff.solvers._walk import Point, Step, Walk
from fastdiff.solvers.heun import lay
from fastdiff.spacings.levels import karras
from fastdiff.table import StepTable


def restart(
    walk: Walk,
    *,
    restarts: tuple[tuple[float, float, int, int], ...] = ((0.1, 2.0, 10, 1),),
    s_noise: float = 1.0,
    min_alpha: float = 1e-3,
) -> StepTable:
    """Xu et al. 2023 (arXiv:2306.14878), algorithm 1 (Restart) on Heun's method.

    Order 2 in the steps of the grid, up to the error that the restarts leave, whose own steps are
    fixed. Two evaluations a step, of the grid and of each restart; a restart adds one draw, in a
    row without an evaluation; one x0 kept. Other names: Restart of A1111, whose setting for 20 to
    35 steps is the default here (it takes the nine steps of the restart off the grid's).

    Args:
        restarts: (low, high, steps, times) each, levels in sigma/alpha: on reaching the point of
            the grid whose level is closest to `low` in ratio, noise is added up to `high` and the
            flow followed back in `steps` steps of Karras et al. 2022 (rho = 7), `times` times. An
            interval with `high` not above that point's level has nothing to do and is left out.
        s_noise: scale of the noise.
        min_alpha: as in `heun`.
    """
    s_noise, min_alpha = number("s_noise", s_noise, 0.0), number("min_alpha", min_alpha, 0.0)
    at: dict[Point, list[tuple[float, int, int]]] = {}
    inner = [p for p in walk.points[1:] if p.sigma > 0]
    for low, high, steps, times in restarts:
        low, high = number("low of restarts", low, 0.0), number("high of restarts", high, low)
        if low == 0:
            raise ValueError("build: low of restarts must be above 0, got 0")
        plan = (
            high,
            whole("steps of restarts", steps, 1, 1000),
            whole("times of restarts", times, 1, 1000),
        )
        if inner:
            near = min(inner, key=lambda p: abs(math.log(p.ratio / low)))
            at.setdefault(near, []).append(plan)
    for step in walk:
        lay(walk, step, min_alpha)
        for high, steps, times in at.get(step.next, ()):
            if high <= step.next.ratio:
                continue
            levels = karras(steps + 1, high, step.next.ratio)[:-1].tolist()
            points = [*(walk.at_ratio(level) for level in levels), step.next]
            for _ in range(times):
                walk.renoise(step.next, points[0], s_noise)
                for now, then in pairwise(points):
                    lay(walk, Step(now, then), min_alpha)
    return walk.table("restart", 2)
