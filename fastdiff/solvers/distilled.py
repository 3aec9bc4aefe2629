"""Few-step samplers of distilled networks: each step jumps towards clean data and adds noise back.

They solve no equation: with a network that is not distilled, more steps do not converge.
"""

from __future__ import annotations

import math

from fastdiff.solvers._checks import number
from fastdiff.solvers._walk import Point, Step, Walk
from fastdiff.solvers.ddim import ancestral
from fastdiff.table import StepTable


def lcm(walk: Walk, *, s_noise: float = 1.0, timestep_scaling: float | None = None) -> StepTable:
    """Luo et al. 2023 (arXiv:2310.04378), latent consistency models, multistep sampling.

    x' = alpha' D + sigma' n. Order none, one evaluation and one draw a step, no history.
    Other names: sample_lcm, LCMScheduler (with spacing "lcm" and timestep_scaling=10),
    FlowMatchLCMScheduler, FlowMatchEulerDiscreteScheduler with stochastic_sampling.

    Args:
        s_noise: scale of the noise.
        timestep_scaling: None takes the x0 prediction as the consistency function. A number s
            blends in the state by the paper's boundary condition at t = 0, as diffusers has
            it: D = c_skip x + c_out x0, c_skip = d^2/((s t)^2 + d^2), c_out = s t/sqrt((s t)^2
            + d^2) with d = 0.5. On discrete schedules alone.
    """
    s_noise = number("s_noise", s_noise, 0.0)
    scale = None if timestep_scaling is None else number("timestep_scaling", timestep_scaling, 0.0)
    if scale is not None and walk.schedule.kind != "discrete":
        kind = walk.schedule.kind
        raise ValueError(f"build: lcm must have timestep_scaling=None on kind {kind!r}")
    for step in walk:
        now, then = step.now, step.next
        x = {"d": then.alpha}
        if scale is not None:
            reach = math.hypot(scale * now.time, 0.5)
            x = {"x": then.alpha * (0.5 / reach) ** 2, "d": then.alpha * scale * now.time / reach}
        walk.evaluate(now, x, noise=s_noise * then.sigma)
    return walk.table("lcm", 1)


def tcd(walk: Walk, *, gamma: float = 0.3, s_noise: float = 1.0) -> StepTable:
    """Zheng et al. 2024 (arXiv:2402.19159), strategic stochastic sampling.

    A DDIM step to s = (1 - gamma) t' and noise back up to t', the forward process from s to t'.
    Order none, but 1 where gamma is 0, which is DDIM; one evaluation and one draw a step, no
    history. Other names: TCDScheduler, whose eta is this gamma and whose last
    point is t = 0, not clean data (`final="sigma_min"`).

    Args:
        gamma: share of the next time that is crossed twice, in [0, 1]; on a discrete schedule s is
            rounded down to a whole time.
        s_noise: scale of the noise.
    """
    gamma, s_noise = number("gamma", gamma, 0.0, 1.0), number("s_noise", s_noise, 0.0)
    for step in walk:
        then = step.next
        low = _below(walk, then, gamma)
        rise = then.alpha / low.alpha
        x, _ = ancestral(Step(step.now, low), 0.0)
        fresh = math.sqrt(max((then.sigma - rise * low.sigma) * (then.sigma + rise * low.sigma), 0))
        walk.evaluate(step.now, {k: rise * c for k, c in x.items()}, noise=s_noise * fresh)
    return walk.table("tcd", 1)


def _below(walk: Walk, then: Point, gamma: float) -> Point:
    """The point at (1 - gamma) of a time, itself where gamma is 0 or the data is clean."""
    if gamma == 0 or then.sigma == 0:
        return then
    time = (1 - gamma) * then.time
    return walk.at_time(math.floor(time) if walk.schedule.kind == "discrete" else time)


def consistency(walk: Walk, *, s_noise: float = 1.0) -> StepTable:
    """Song et al. 2023 (arXiv:2303.01469), consistency models, algorithm 1.

    x' = f(x) + sqrt(sigma'^2 - eps^2) n with eps the schedule's sigma_min. Order none, one
    evaluation and one draw a step, no history. For an EDM schedule alone. Other names:
    CMStochasticIterativeScheduler, stochastic_iterative_sampler.

    With prediction "edm" the network is the raw F and f = c_skip x + c_out F by the boundary
    condition of appendix C, c_skip = d^2/((sigma - eps)^2 + d^2), c_out = d (sigma - eps)/
    sqrt(sigma^2 + d^2), d = sigma_data, so that f is x at sigma = eps; with others f is the x0
    prediction. Clipping clips f.

    Args:
        s_noise: scale of the noise.
    """
    s_noise = number("s_noise", s_noise, 0.0)
    schedule = walk.schedule
    if schedule.kind != "edm":
        raise ValueError(f"build: consistency must have an EDM schedule, got {schedule.kind!r}")
    eps, data = schedule.sigma_min, schedule.sigma_data
    for step in walk:
        now, then = step.now.sigma, step.next.sigma
        convert = None
        if walk.prediction == "edm":
            skip = data**2 / ((now - eps) ** 2 + data**2)
            convert = skip, data * (now - eps) / math.hypot(now, data)
        noise = math.sqrt(max((then - eps) * (then + eps), 0.0))
        walk.evaluate(step.now, {"d": 1.0}, noise=s_noise * noise, convert=convert)
    return walk.table("consistency", 1)
