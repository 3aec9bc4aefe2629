"""Explicit Runge-Kutta methods in t on a flow, dx/dt = noise - x0 (Liu et al. 2022).

Euler's method is `euler` (or `ddim`), Heun's of second order is `heun`.
"""

from __future__ import annotations

from typing import NamedTuple

from fastdiff.solvers._checks import choice
from fastdiff.solvers._walk import Point, Walk, velocity
from fastdiff.table import StepTable


class Tableau(NamedTuple):
    """Butcher's tableau: stage i stands at t + c[i] h, on x + h sum_j a[i][j] k_j."""

    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]


MIDPOINT = Tableau((0.0, 0.5), ((), (0.5,)), (0.0, 1.0))
HEUN3 = Tableau((0.0, 1 / 3, 2 / 3), ((), (1 / 3,), (0.0, 2 / 3)), (0.25, 0.0, 0.75))
RK4 = {
    "3/8": Tableau(
        (0.0, 1 / 3, 2 / 3, 1.0),
        ((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)),
        (1 / 8, 3 / 8, 3 / 8, 1 / 8),
    ),
    "classic": Tableau(
        (0.0, 0.5, 0.5, 1.0),
        ((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)),
        (1 / 6, 1 / 3, 1 / 3, 1 / 6),
    ),
}


def _runge_kutta(walk: Walk, name: str, tableau: Tableau) -> None:
    """One row a stage. The first keeps x in the anchor, each but the last pushes its slope.

    The slope of a row's own stage is (x - D)/t; at t = 0 it has none, so a method whose last stage
    stands there takes the step to clean data with `HEUN3`.
    """
    if walk.schedule.kind != "flow":
        kind = walk.schedule.kind
        raise ValueError(f"build: {name} must have a flow schedule, got kind {kind!r}")
    for step in walk:
        used = HEUN3 if step.next.sigma == 0 and tableau.c[-1] == 1 else tableau
        t, h = step.now.sigma, step.next.sigma - step.now.sigma
        last = len(used.c) - 1
        for i, c in enumerate(used.c):
            if c in (0.0, 1.0):
                at = step.next if c else step.now
            else:
                at = Point(t + c * h, 1 - (t + c * h), t + c * h)
            weights = used.b if i == last else used.a[i + 1]
            own = h * weights[i] / at.sigma
            x = {"x": own, "d": -own}
            x |= {f"h{i - 1 - j}": h * weights[j] for j in range(i)}
            if i == 0:
                walk.evaluate(at, x | {"x": 1 + own}, y={"x": 1.0}, push=velocity(at))
            else:
                walk.evaluate(at, x | {"y": 1.0}, push=velocity(at) if i < last else False)


def flow_midpoint(walk: Walk) -> StepTable:
    """The explicit midpoint method (Runge 1895) on rectified flow, arXiv:2209.03003.

    Order 2, two evaluations a step, no noise, the state kept at the start of the step. On a flow
    schedule alone. Other names: torchdiffeq's "midpoint" on the same grid.
    """
    _runge_kutta(walk, "flow_midpoint", MIDPOINT)
    return walk.table("flow_midpoint", 2)


def flow_heun3(walk: Walk) -> StepTable:
    """Heun's method of third order (Heun 1900) on rectified flow, arXiv:2209.03003.

    Order 3, three evaluations a step, no noise, the state at the start of the step and the slopes
    of its stages kept. On a flow schedule alone. Other names: torchdiffeq's "heun3" on the same
    grid.
    """
    _runge_kutta(walk, "flow_heun3", HEUN3)
    return walk.table("flow_heun3", 3)


def flow_rk4(walk: Walk, *, variant: str = "3/8") -> StepTable:
    """Kutta's methods of fourth order (Kutta 1901) on rectified flow, arXiv:2209.03003.

    Order 4, four evaluations a step, no noise, the state at the start of the step and the slopes of
    its stages kept. The step to clean data is `flow_heun3`'s, as neither has a slope at t = 0. On
    a flow schedule alone. Other names: torchdiffeq's "rk4" on the same grid.

    Args:
        variant: "3/8" is the rule that torchdiffeq calls rk4, "classic" the better known one.
    """
    choice("variant", variant, tuple(RK4))
    _runge_kutta(walk, "flow_rk4", RK4[variant])
    return walk.table("flow_rk4", 4)
