"""DPM-Solver and DPM-Solver++, singlestep (Runge-Kutta): a group of rows is one step."""

from __future__ import annotations

from collections.abc import Sequence

from fastdiff.solvers._checks import choice, flag, number, whole
from fastdiff.solvers._exponential import (
    SOLVER_TYPES,
    add_newest,
    first_order,
    form_of,
    fresh_noise,
)
from fastdiff.solvers._walk import STEP, Point, Step, Walk, epsilon
from fastdiff.table import StepTable


def _corrections(
    points: Sequence[Point], k: int, stages: int, solver_type: str, noise_form: bool, eta: float
) -> list[float]:
    """What each prediction adds to stage k (1, 2 or 3) beyond the first-order step from the base.

    Stage 2 and 3 take the slope between the base and their newest prediction, "heun" at stage 3 the
    slope and the curvature through all of them.
    """
    if k == 1:
        return [0.0]
    form = form_of(Step(points[0], points[k]), noise_form, eta)
    parts = [Step(points[0], p).h / Step(points[0], points[k]).h for p in points[1:k]]
    heun = k == 3 or (solver_type == "dpmsolver" and stages == 3)
    slope = form.slope("heun" if heun else solver_type)
    if k == 2:
        return [-slope / parts[0], slope / parts[0]]
    one, two = 0.0, slope  # weights of the slopes to the first and to the second
    if solver_type in ("heun", "taylor"):
        bend = 2 * form.curvature
        one, two = slope * parts[1] - bend, bend - slope * parts[0]
        one, two = one / (parts[1] - parts[0]), two / (parts[1] - parts[0])
    return [-one / parts[0] - two / parts[1], one / parts[0], two / parts[1]]


def lay_group(
    walk: Walk,
    points: Sequence[Point],
    solver_type: str,
    *,
    noise_form: bool,
    eta: float = 0.0,
    s_noise: float = 1.0,
    renoise: tuple[float, float] = (1.0, 0.0),
) -> None:
    """Rows from points[0] to points[-1], evaluating the model at all but the last.

    Every stage starts at the base, points[0]. The base is not kept: first-order steps with one
    prediction compose, so a stage goes on from the one before by such a step, takes back what that
    stage had beyond it and adds its own. That spares writing and reading the anchor y; noise to be
    taken back is drawn again.

    Args:
        renoise: (factor, noise) on the last state, of ancestral steps.
    """
    stages, extra, kept = len(points) - 1, [0.0], (0, 0.0)
    for k in range(1, stages + 1):
        step, counter = Step(points[k - 1], points[k]), len(walk.rows)
        if k == 1:
            x = first_order(step, noise_form, eta)
            keep, drawn = 0.0, {}
        else:
            form = form_of(step, noise_form, eta)
            keep, drawn = form.keep, {kept[0]: -form.keep * kept[1]}
            x = {"x": form.keep, f"h{k - 2}": form.first}
        new = _corrections(points, k, stages, solver_type, noise_form, eta)
        change = [c - keep * old for c, old in zip(new, [*extra, 0.0], strict=False)]
        for age, c in enumerate(reversed(change[:-1])):
            x[f"h{age}"] = x.get(f"h{age}", 0.0) + c
        if k > 1:
            x = add_newest(x, step.now, noise_form, change[-1])
        up = s_noise * fresh_noise(Step(points[0], points[k]), noise_form, eta)
        drawn, extra, kept = drawn | {counter: up}, new, (counter, up)
        factor = 1.0
        if k == stages:
            factor = renoise[0]
            drawn[counter] += renoise[1]
        x = {term: factor * c for term, c in x.items()}
        draws = {c: weight for c, weight in drawn.items() if weight}
        x |= {f"n{i}": weight for i, weight in enumerate(draws.values(), 1)}
        push = (epsilon(step.now) if noise_form else True) if k < stages else False
        walk.evaluate(step.now, x, draws=tuple((STEP, c) for c in draws), push=push)


def _groups(steps: int, order: int, lower_order_final: bool) -> list[int]:
    """How many grid intervals each step spans; the sum is `steps`."""
    whole_groups, rest = divmod(steps, order)
    if lower_order_final and not rest and order > 1 and steps:
        return [order] * (whole_groups - 1) + [order - 1, 1]
    return [order] * whole_groups + [rest] * (rest > 0)


def _singlestep(
    walk: Walk,
    name: str,
    noise_form: bool,
    order: int,
    solver_type: str,
    lower_order_final: bool,
    eta: float = 0.0,
    s_noise: float = 1.0,
) -> StepTable:
    order = whole("order", order, 1, 3)
    choice("solver_type", solver_type, SOLVER_TYPES)
    eta, s_noise = number("eta", eta, 0.0), number("s_noise", s_noise, 0.0)
    lower = flag("lower_order_final", lower_order_final)
    pure = int(walk.points[0].alpha == 0)  # from there no log-SNR can be halved
    groups = [1] * pure + _groups(walk.steps - pure, order, lower)
    if walk.points[-1].sigma == 0 and groups[-1] > 1:
        groups[-1:] = [groups[-1] - 1, 1]
    at = 0
    for size in groups:
        points = walk.points[at : at + size + 1]
        lay_group(walk, points, solver_type, noise_form=noise_form, eta=eta, s_noise=s_noise)
        at += size
    # one first-order step over 1/n of a flow's time leaves an error of n^-2
    return walk.table(name, 1 if eta else min(order, 2 if pure else 3))


def dpmpp_singlestep(
    walk: Walk,
    *,
    order: int = 2,
    solver_type: str = "midpoint",
    eta: float = 0.0,
    s_noise: float = 1.0,
    lower_order_final: bool = True,
) -> StepTable:
    """Lu et al. 2022 (arXiv:2211.01095): DPM-Solver++, singlestep, algorithm 1.

    The data form; of third order as in the authors' code. `steps` counts model evaluations: a step
    of order k spans k intervals of the grid, evaluates at each of their points, and its
    intermediate points are the grid's own.

    Order 1, 2 or 3, but at most 2 from alpha 0, where the first step is of first order; 1 (weak)
    with noise. One evaluation a grid interval, `order - 1` x0 kept; eta > 0 draws noise for each
    stage from the start of its step, so that all but the last draw of a step is drawn again and
    taken back. The interval to clean data is a step of its own. Other names: singlestep_dpm_solver
    ("singlestep" and, with lower_order_final=False, "singlestep_fixed"),
    DPMSolverSinglestepScheduler with "dpmsolver++" and, at eta = 1, "sde-dpmsolver++".

    Args:
        order: 1, 2 or 3.
        solver_type: "midpoint" and "heun" of diffusers, "dpmsolver" and "taylor" of the original
            code. "taylor" is "heun"; "dpmsolver" is "midpoint" but for the second stage of order 3,
            which is "heun".
        eta: strength of the SDE's noise, 0 for the ODE.
        s_noise: scale of the noise.
        lower_order_final: where `steps` is a multiple of the order, the last of its steps is split
            into one of a lower order and one of first order.
    """
    return _singlestep(
        walk, "dpmpp_singlestep", False, order, solver_type, lower_order_final, eta, s_noise
    )


def dpm_singlestep(
    walk: Walk, *, order: int = 2, solver_type: str = "midpoint", lower_order_final: bool = True
) -> StepTable:
    """Lu et al. 2022 (arXiv:2206.00927): DPM-Solver-2 and -3, algorithms 1 and 2.

    The noise form. `steps` counts model evaluations, see `dpmpp_singlestep`. Order 1, 2 or 3, but
    at most 2 from alpha 0. One evaluation a grid interval, no noise drawn, `order - 1` noise
    predictions kept. Other names: singlestep_dpm_solver with "dpmsolver",
    DPMSolverSinglestepScheduler with "dpmsolver".

    Args:
        order, solver_type, lower_order_final: as in `dpmpp_singlestep`.
    """
    return _singlestep(walk, "dpm_singlestep", True, order, solver_type, lower_order_final)
