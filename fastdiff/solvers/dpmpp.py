"""DPM-Solver++, multistep of second order: the ODE and the SDE form."""

from __future__ import annotations

import math

from fastdiff.solvers._checks import choice, number
from fastdiff.solvers._final import checked, to_clean
from fastdiff.solvers._phi import phi
from fastdiff.solvers._walk import Step, Walk
from fastdiff.table import StepTable

SOLVER_TYPES = ("midpoint", "heun")


def _multistep(
    walk: Walk, eta: float, s_noise: float, solver_type: str, final_order: int = 1
) -> None:
    """x' = (sigma'/sigma) e^{-eta h} x + alpha' (1 - e^{-(1+eta)h}) D + slope (D - D_old) + noise.

    A step to clean data is of first order, and after a step from alpha 0 (whose h is infinite)
    D_old has no weight.
    """
    last: Step | None = None
    for step in walk:
        h = step.h
        total = (1 + eta) * h
        decay = math.exp(-eta * h) if eta else 1.0
        x = {"x": step.gain * decay, "d": step.next.alpha * -math.expm1(-total)}
        if last is not None and math.isfinite(h):
            weight = (
                -math.expm1(-total) / 2 if solver_type == "midpoint" else total * phi(2, -total)
            )
            slope = step.next.alpha * weight * h / last.h
            x |= {"d": x["d"] + slope, "h0": -slope}
        if step.next.sigma == 0:
            x = to_clean(walk, step, final_order, pushes_x0=True)
        up = s_noise * step.next.sigma * math.sqrt(-math.expm1(-2 * eta * h)) if eta else 0.0
        walk.evaluate(step.now, x, noise=up, push=True)
        last = step


def dpmpp_2m(walk: Walk, *, solver_type: str = "midpoint", final_order: int = 1) -> StepTable:
    """Lu et al. 2022 (arXiv:2211.01095), algorithm 2.

    Order 2, one evaluation a step, no noise, one x0 kept. The first step is of first order, and so
    is a plain step to clean data. Other names: sample_dpmpp_2m, DPMSolverMultistepScheduler with
    algorithm_type "dpmsolver++".

    Args:
        solver_type: "midpoint" is the paper's; "heun" integrates the linear change exactly, as
            diffusers has it.
        final_order: of the step to clean data: 1 returns the x0 prediction, as other libraries do;
            2 takes the line through two of them to sigma 0, where they are far enough apart, so
            that on a grid with a fixed least level the order shows further (`_final` says why).
            `build` chooses 2 where it chooses the spacing.
    """
    choice("solver_type", solver_type, SOLVER_TYPES)
    _multistep(walk, 0.0, 0.0, solver_type, checked(final_order))
    return walk.table("dpmpp_2m", 2)


def dpmpp_2m_sde(
    walk: Walk, *, eta: float = 1.0, s_noise: float = 1.0, solver_type: str = "midpoint"
) -> StepTable:
    """Lu et al. 2022 (arXiv:2211.01095), SDE-DPM-Solver++(2M), appendix B, with k-diffusion's eta.

    Order 2 (weak: measured on Gaussian data), one evaluation and one draw a step, one x0 kept. The
    first step and the step to clean data are of first order. Other names: sample_dpmpp_2m_sde,
    DPMSolverMultistepScheduler with algorithm_type "sde-dpmsolver++".

    Args:
        eta: 0 is `dpmpp_2m`, 1 the paper's SDE.
        s_noise: scale of the noise.
        solver_type: as in `dpmpp_2m`; k-diffusion and diffusers default to "midpoint".
    """
    eta, s_noise = number("eta", eta, 0.0), number("s_noise", s_noise, 0.0)
    choice("solver_type", solver_type, SOLVER_TYPES)
    _multistep(walk, eta, s_noise, solver_type)
    return walk.table("dpmpp_2m_sde", 2)
