"""First-order solvers of k-diffusion: Euler with churn, and its ancestral kin."""

from __future__ import annotations

import math

from fastdiff.solvers._ancestral import euler_row, flow_descent
from fastdiff.solvers._checks import flag, number
from fastdiff.solvers._churn import Churn
from fastdiff.solvers._walk import Walk
from fastdiff.solvers.ddim import ancestral
from fastdiff.table import StepTable


def euler(
    walk: Walk,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> StepTable:
    """Karras et al. 2022 (arXiv:2206.00364), algorithm 2 without its correction.

    Order 1, one evaluation a step, no history; s_churn > 0 adds a row of noise before each
    evaluation whose sigma/alpha lies in [s_tmin, s_tmax]. Without churn it is DDIM with eta = 0.
    Other names: sample_euler, EulerDiscreteScheduler.

    Args:
        s_churn, s_tmin, s_tmax, s_noise: as in `Churn`.
    """
    churn = Churn(s_churn, s_tmin, s_tmax, s_noise)
    for step in walk:
        step = churn.before(walk, step)
        walk.evaluate(step.now, ancestral(step, 0.0)[0])
    return walk.table("euler", 1)


def euler_ancestral(
    walk: Walk, *, eta: float = 1.0, s_noise: float = 1.0, rf: bool = False
) -> StepTable:
    """Euler to a lower level, then fresh noise up to the next: k-diffusion's
    ``sample_euler_ancestral`` (``get_ancestral_step``), after Song et al. 2021, equation 16.

    Order 1 (weak), one evaluation and one draw a step, no history. In exact arithmetic it is DDIM
    with the same eta. Other names: Euler a, EulerAncestralDiscreteScheduler; with rf=True ComfyUI's
    ``sample_euler_ancestral_RF``.

    Args:
        eta: share of fresh noise, at least 0; capped where it would exceed the next level.
        s_noise: scale of the fresh noise.
        rf: on a flow, take ComfyUI's lower level t' (1 + (t'/t - 1) eta), which draws less noise.
    """
    eta, s_noise = number("eta", eta, 0.0), number("s_noise", s_noise, 0.0)
    if flag("rf", rf):
        if walk.schedule.kind != "flow":
            kind = walk.schedule.kind
            raise ValueError(f"build: euler_ancestral must be on a flow for rf=True, got {kind!r}")
        for step in walk:
            euler_row(walk, step, flow_descent(step, eta), s_noise)
        return walk.table("euler_ancestral", 1)
    for step in walk:
        x, noise = ancestral(step, eta)
        walk.evaluate(step.now, x, noise=s_noise * noise)
    return walk.table("euler_ancestral", 1)
