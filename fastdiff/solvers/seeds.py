"""Single-step exponential solvers of the reverse SDE: SEEDS and DPM-Solver++ (SDE)."""

from __future__ import annotations

import math
from collections.abc import Iterator

from fastdiff.solvers._checks import choice, number
from fastdiff.solvers._phi import adams
from fastdiff.solvers._walk import STEP, Point, Step, Walk
from fastdiff.solvers.ddim import ancestral
from fastdiff.table import StepTable

SOLVER_TYPES = ("phi_1", "phi_2")


def _exact(step: Step, eta: float, s_noise: float) -> tuple[float, float]:
    """(gain, noise) of the linear part of the SDE over a step, exact."""
    gain = step.gain * (math.exp(-eta * step.h) if eta else 1.0)
    fresh = -math.expm1(-2 * eta * step.h) if eta else 0.0
    return gain, s_noise * step.next.sigma * math.sqrt(fresh)


def _steps(walk: Walk, eta: float, s_noise: float) -> Iterator[Step]:
    """The steps that have stages; the others are laid here, by their exact first-order form."""
    for step in walk:
        if math.isfinite(step.h):
            yield step
            continue
        gain, noise = _exact(step, eta, s_noise)
        x = {"d": step.next.alpha} | ({"x": gain} if gain else {})
        walk.evaluate(step.now, x, noise=noise)


def _between(walk: Walk, step: Step, r: float) -> Point:
    """The point that is the share r of a step's length in log(alpha/sigma)."""
    return step.next if r == 1 else walk.at_ratio(step.now.ratio * math.exp(-r * step.h))


def seeds_2(
    walk: Walk,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    r: float = 0.5,
    solver_type: str = "phi_1",
) -> StepTable:
    """Gonzalez et al. 2023 (arXiv:2305.14267), SEEDS-2 in its x0 form.

    Order 2 (with noise weak, measured on Gaussian data), two evaluations and two draws a step, one
    x0 kept. The noise of the stage is carried to the end inside the stage itself. A step from
    alpha = 0, or to clean data, is one of first order. Other names: sample_seeds_2; r = 1 with
    "phi_2" is exp_heun_2_x0_sde, with eta = 0 exp_heun_2_x0.

    Args:
        eta: 0 is the ODE, 1 the paper's SDE.
        s_noise: scale of the noise.
        r: where the stage is, in (0, 1], as a share of the step in log(alpha/sigma).
        solver_type: "phi_2" integrates the linear change of x0 exactly, "phi_1" takes its mean.
    """
    eta, s_noise = number("eta", eta, 0.0), number("s_noise", s_noise, 0.0)
    r = number("r", r, 1e-3, 1.0)
    choice("solver_type", solver_type, SOLVER_TYPES)
    for step in _steps(walk, eta, s_noise):
        stage = Step(step.now, _between(walk, step, r))
        z = -(1 + eta) * step.h
        gain, noise = _exact(stage, eta, s_noise)
        first = -stage.next.alpha * math.expm1(r * z)
        walk.evaluate(step.now, {"x": gain, "d": first}, noise=noise, push=True)
        gain, noise = _exact(Step(stage.next, step.next), eta, s_noise) if r < 1 else (1.0, 0.0)
        half = math.expm1(z) if solver_type == "phi_1" else None
        old, new = (-step.next.alpha * w for w in adams(z, [r], half))
        x = {"x": gain, "h0": old - gain * first, "d": new}
        walk.evaluate(stage.next, x, noise=noise)
    return walk.table("seeds_2", 2)


def seeds_3(
    walk: Walk,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    r_1: float = 1 / 3,
    r_2: float = 2 / 3,
) -> StepTable:
    """Gonzalez et al. 2023 (arXiv:2305.14267), SEEDS-3 in its x0 form.

    Order 3, with noise 2 (weak, measured on Gaussian data), from alpha = 0 also 2; three
    evaluations and three draws a step, two x0 kept. Noise and steps of first order as in
    `seeds_2`. Other names: sample_seeds_3.

    Args:
        eta, s_noise: as in `seeds_2`.
        r_1, r_2: where the stages are, 0 < r_1 < r_2 <= 1.
    """
    eta, s_noise = number("eta", eta, 0.0), number("s_noise", s_noise, 0.0)
    r_1, r_2 = number("r_1", r_1, 1e-3, 1.0), number("r_2", r_2, 1e-3, 1.0)
    if r_1 >= r_2:
        raise ValueError(f"build: r_1 of seeds_3 must be less than r_2, got {r_1} and {r_2}")
    for step in _steps(walk, eta, s_noise):
        one, two = _between(walk, step, r_1), _between(walk, step, r_2)
        z = -(1 + eta) * step.h
        gain, noise = _exact(Step(step.now, one), eta, s_noise)
        first = -one.alpha * math.expm1(r_1 * z)
        walk.evaluate(step.now, {"x": gain, "d": first}, noise=noise, push=True)
        gain, noise = _exact(Step(one, two), eta, s_noise)
        old, new = (-two.alpha * w for w in adams(r_2 * z, [r_1 / r_2]))
        x = {"x": gain, "h0": old - gain * first, "d": new}
        walk.evaluate(one, x, noise=noise, push=True)
        gain, noise = _exact(Step(two, step.next), eta, s_noise) if r_2 < 1 else (1.0, 0.0)
        start, last = (-step.next.alpha * w for w in adams(z, [r_2]))
        x = {"x": gain, "h1": start - gain * old, "h0": -gain * new, "d": last}
        walk.evaluate(two, x, noise=noise)
    return walk.table("seeds_3", 2 if eta or walk.points[0].alpha == 0 else 3)


def dpmpp_sde(walk: Walk, *, eta: float = 1.0, s_noise: float = 1.0, r: float = 0.5) -> StepTable:
    """DPM-Solver++ (Lu et al. 2022, arXiv:2211.01095) of two stages on the SDE, as k-diffusion's
    ``sample_dpmpp_sde`` has it.

    Order 2 (with noise weak, measured on Gaussian data), two evaluations and two draws a step, one
    x0 and the state at the step's start kept. Both stages start from there; k-diffusion takes their
    noise from one Brownian path over sigma/alpha, so the second is a mix of the first's draw and a
    new one by the square roots of the intervals: exact in distribution. A step from alpha = 0, or
    to clean data, is Euler's. Other names: DPM++ SDE, DPMSolverSDEScheduler.

    Args:
        eta: share of fresh noise, at least 0; capped as in `euler_ancestral`.
        s_noise: scale of the noise.
        r: where the stage is, in (0, 1], as a share of the step in log(alpha/sigma).
    """
    eta, s_noise = number("eta", eta, 0.0), number("s_noise", s_noise, 0.0)
    r = number("r", r, 1e-3, 1.0)
    for step in walk:
        whole, whole_up = ancestral(step, eta)
        if not math.isfinite(step.h):
            walk.evaluate(step.now, whole, noise=s_noise * whole_up)
            continue
        mid = _between(walk, step, r)
        x, up = ancestral(Step(step.now, mid), eta)
        drawn = len(walk.rows)
        walk.evaluate(step.now, x, y={"x": 1.0}, noise=s_noise * up, push=True)
        late = whole["d"] / (2 * r)
        x = {"y": whole.get("x", 0.0), "h0": whole["d"] - late, "d": late}
        draws: tuple[tuple[int, int], ...] = ()
        if up:
            # the shares of the interval in sigma/alpha before and after the stage
            share = -math.expm1(-r * step.h) / -math.expm1(-step.h)
            x["n1"] = s_noise * whole_up * math.sqrt(share)
            draws = ((STEP, drawn),)
            if r < 1:
                x["n2"] = s_noise * whole_up * math.sqrt(1 - share)
                draws = (*draws, (STEP, len(walk.rows)))
        walk.evaluate(mid, x, draws=draws)
    return walk.table("dpmpp_sde", 2)
