"""DPM-Solver and DPM-Solver++, multistep, of order 1 to 3: the ODE and the SDE forms."""

from __future__ import annotations

import math
from collections.abc import Iterable

from fastdiff.solvers._checks import choice, flag, number, whole
from fastdiff.solvers._exponential import (
    SOLVER_TYPES,
    add_newest,
    first_order,
    form_of,
    fresh_noise,
    needs_signal,
)
from fastdiff.solvers._final import checked, to_clean
from fastdiff.solvers._walk import Step, Walk, epsilon
from fastdiff.table import StepTable

FEW = 15  # steps below which diffusers lowers the order at the end


def orders_of(steps: int, order: int, lower_order_final: bool, euler_at_final: bool) -> list[int]:
    """The order of each step: it grows to `order`, and falls again where the options say so."""
    orders = [min(order, i + 1) for i in range(steps)]
    if lower_order_final and steps < FEW:
        orders = [min(o, steps - i) if i >= steps - 2 else o for i, o in enumerate(orders)]
    if euler_at_final:
        orders[-1] = 1
    return orders


def lay(
    walk: Walk,
    steps: Iterable[Step],
    orders: Iterable[int],
    solver_type: str,
    *,
    noise_form: bool,
    eta: float = 0.0,
    s_noise: float = 1.0,
    final_order: int = 1,
) -> None:
    """The rows: derivatives of the prediction by divided differences of those pushed before.

    A step of infinite h (from alpha 0, to sigma 0) is of first order; after one from alpha 0 its
    prediction has no weight, as it lies infinitely far away.
    """
    past: list[Step] = []
    for step, wanted in zip(steps, orders, strict=True):
        x = first_order(step, noise_form, eta)
        order = wanted if math.isfinite(step.h) else 1
        if order > 1:
            x |= _differences(x, step, past, order, solver_type, noise_form, eta)
        if step.next.sigma == 0:
            x = to_clean(walk, step, final_order, pushes_x0=not noise_form)
        push = epsilon(step.now) if noise_form else True
        up = s_noise * fresh_noise(step, noise_form, eta)
        walk.evaluate(step.now, x, noise=up, push=push)
        past.append(step)


def _differences(
    x: dict[str, float],
    step: Step,
    past: list[Step],
    order: int,
    solver_type: str,
    noise_form: bool,
    eta: float,
) -> dict[str, float]:
    """The coefficients with the weights of the newest difference, and at order 3 of the next."""
    form, h, newer = form_of(step, noise_form, eta), step.h, past[-1].h
    first, second, older = form.slope(solver_type), 0.0, math.inf
    if order == 3:
        older = past[-2].h
        first = form.slope("heun")  # order 3 has one type in every source
        # the sources give the second difference the curvature's weight once; its derivative is two
        second = -(first * newer + form.curvature * h) / (newer + older)
        first -= second
    first, second = first * h / newer, second * h / older
    x = x | {"h0": second - first}
    if second:
        x["h1"] = -second
    return add_newest(x, step.now, noise_form, first)


def _multistep(
    walk: Walk,
    name: str,
    noise_form: bool,
    order: int,
    solver_type: str,
    eta: float,
    s_noise: float,
    lower_order_final: bool,
    euler_at_final: bool,
    final_order: int = 1,
) -> StepTable:
    order = whole("order", order, 1, 3)
    choice("solver_type", solver_type, SOLVER_TYPES)
    eta, s_noise = number("eta", eta, 0.0), number("s_noise", s_noise, 0.0)
    lower = flag("lower_order_final", lower_order_final)
    orders = orders_of(walk.steps, order, lower, flag("euler_at_final", euler_at_final))
    lay(
        walk, walk, orders, solver_type, noise_form=noise_form, eta=eta, s_noise=s_noise,
        final_order=checked(final_order, eta),
    )  # fmt: skip
    return walk.table(name, min(order, 2))


def dpmpp_multistep(
    walk: Walk,
    *,
    order: int = 2,
    solver_type: str = "midpoint",
    eta: float = 0.0,
    s_noise: float = 1.0,
    lower_order_final: bool = True,
    euler_at_final: bool = False,
    final_order: int = 1,
) -> StepTable:
    """Lu et al. 2022 (arXiv:2211.01095): DPM-Solver++, multistep, algorithm 2 and appendix B.

    The data form; three predictions as in the authors' code. Order 1 or 2; order=3 converges with
    order 2, as its first step is of first order and its curvature has half the weight that a
    third-order method needs, but with a smaller error. One evaluation a step, `order - 1` x0 kept;
    eta > 0 draws noise once a step. The step to clean data and the step from alpha 0 are of first
    order. Other names: multistep_dpm_solver, DPMSolverMultistepScheduler with "dpmsolver++" and, at
    eta = 1, "sde-dpmsolver++".

    Args:
        order: 1, 2 or 3.
        solver_type: "midpoint" or "heun", as in `dpmpp_2m`; the original code calls them
            "dpmsolver" and "taylor". Of second-order steps only.
        eta: strength of the SDE's noise, 0 for the ODE; general eta is k-diffusion's.
        s_noise: scale of the noise.
        lower_order_final: below 15 steps the last step is of order 1, the one before at most 2.
        euler_at_final: the last step is of order 1 at any number of steps.
        final_order: of the step to clean data, 1 or, without noise, 2, as in `dpmpp_2m`.
    """
    return _multistep(
        walk, "dpmpp_multistep", False, order, solver_type, eta, s_noise,
        lower_order_final, euler_at_final, final_order,
    )  # fmt: skip


def dpm_multistep(
    walk: Walk,
    *,
    order: int = 2,
    solver_type: str = "midpoint",
    eta: float = 0.0,
    s_noise: float = 1.0,
    lower_order_final: bool = True,
    euler_at_final: bool = False,
    final_order: int = 1,
) -> StepTable:
    """Lu et al. 2022 (arXiv:2206.00927): DPM-Solver, multistep.

    The noise form; its SDE is of arXiv:2211.01095, appendix B. Order 1 or 2, and order=3 as in
    `dpmpp_multistep`. One evaluation a step, `order - 1` noise predictions kept; eta > 0 draws
    noise once a step. The step to clean data takes x0, without noise; the step from alpha 0 is of
    first order. Other names: multistep_dpm_solver with "dpmsolver", DPMSolverMultistepScheduler
    with "dpmsolver" and, at eta = 1, "sde-dpmsolver".

    Args:
        order, solver_type, s_noise, lower_order_final, euler_at_final, final_order: as in
            `dpmpp_multistep`.
        eta: strength of the SDE's noise, 0 for the ODE; above 0 the grid must begin at alpha > 0,
            as the step multiplies the state and the noise by alpha'/alpha.

    Raises:
        ValueError: eta > 0 on a grid from alpha 0.
    """
    if number("eta", eta, 0.0):
        needs_signal(walk, "dpm_multistep", "with eta > 0")
    return _multistep(
        walk, "dpm_multistep", True, order, solver_type, eta, s_noise,
        lower_order_final, euler_at_final, final_order,
    )  # fmt: skip


def dpmpp_3m_sde(walk: Walk, *, eta: float = 1.0, s_noise: float = 1.0) -> StepTable:
    """k-diffusion's ``sample_dpmpp_3m_sde``, after Lu et al. 2022 (arXiv:2211.01095).

    Order 2 (weak), see `dpmpp_multistep`, one evaluation and one draw a step, two x0 kept. The
    first step and the step to clean data are of first order, the second is "heun". Steps draw
    independent noise, which over disjoint intervals is a Brownian motion in law. Other names:
    dpmpp_3m_sde_gpu.

    Args:
        eta: strength of the noise, 0 for the ODE.
        s_noise: scale of the noise.
    """
    return _multistep(walk, "dpmpp_3m_sde", False, 3, "heun", eta, s_noise, False, False)
