"""ER-SDE-Solvers (Cui et al. 2023, arXiv:2309.06169), transcribed in NumPy. No fastdiff here."""

from __future__ import annotations

import functools
import math

import log_snr  # noqa: F401  (sets the digits)
import oracles
from mpmath import exp, mpf
from oracles import STEP, Array, Case, Problem
from scipy.integrate import quad as float_quad

SCALERS = {
    "er_sde": lambda v: v * (exp(mpf(v) ** 0.3) + 10),
    "sde": lambda v: mpf(v) ** 2,
    "ode": lambda v: mpf(v),
}


@functools.cache
def integrals(name: str, start: float, end: float) -> tuple[float, float]:
    """phi(end) times the integrals of 1/phi and (v - start)/phi over v from end to start."""
    numbers = {
        "er_sde": lambda v: v * (math.exp(v**0.3) + 10),
        "sde": lambda v: v**2,
        "ode": lambda v: v,
    }
    phi, found = numbers[name], []
    for power in (0, 1):

        def part(u, power=power):  # over u = log(v), which tames the range
            v = math.exp(u)
            return v * (v - start) ** power * phi(end) / phi(v)

        span = (math.log(end), math.log(start))
        found.append(float_quad(part, *span, epsabs=0, epsrel=1e-13, limit=500)[0])
    return tuple(found)


def er_sde(p: Problem, x: Array, s_noise: float, name: str, max_stage: int) -> list:
    """Algorithm 3 (and its first stages), the integrals by an adaptive quadrature.

    From alpha = 0 the step is its limit, and that prediction is not used again.
    """
    phi, states, denoised, slopes, levels = SCALERS[name], [], [], [], []
    for i in range(p.steps):
        s, t = p.levels[i], p.levels[i + 1]
        x0, _ = p.predict(x, *p.at(i))
        alpha_t = p.alphas[i + 1]
        if t == 0:
            x = alpha_t * x0
        elif math.isinf(s):
            part = oracles._from(p, i, i + 1)
            part.noise = lambda kind, _, row=i: p.noise(kind, row)
            x = oracles.ddim(part, x, 0.0 if name == "ode" else 1.0, s_noise)[0]
        else:
            r = phi(t) / phi(s)
            x = alpha_t / p.alphas[i] * float(r) * x + alpha_t * float(1 - r) * x0
            dt, slope = t - s, None
            if denoised and max_stage > 1:
                whole, bent = integrals(name, s, t)
                slope = (x0 - denoised[-1]) / (s - levels[-1])
                x = x + alpha_t * (dt + whole) * slope
                if len(denoised) > 1 and max_stage > 2:
                    bend = (slope - slopes[-1]) / ((s - levels[-2]) / 2)
                    x = x + alpha_t * (dt**2 / 2 + bent) * bend
            up = float(mpf(t) ** 2 - mpf(s) ** 2 * r**2)
            if name != "ode":
                x = x + alpha_t * s_noise * math.sqrt(up) * p.noise(STEP, i)
            denoised, slopes, levels = [*denoised, x0], [*slopes, slope], [*levels, s]
        states.append(x)
    return states


def case(reason, *, s_noise=1.0, scaler="er_sde", stage=3, **more):
    options = {"s_noise": s_noise, "noise_scaler": scaler, "max_stage": stage}
    return Case(
        "er_sde", options, lambda p, x: er_sde(p, x, s_noise, scaler, stage), reason, **more
    )


# Without noise the error crosses 0 on a flow near 150 steps: ORDERS measures the other schedules.
CASES = {
    "er_sde": Case("er_sde", {}, lambda p, x: er_sde(p, x, 1.0, "er_sde", 3), "default"),
    "er_sde-1": case("lowest", stage=1),
    "er_sde-2": case("between", stage=2),
    "er_sde-sde": case("the reverse SDE", scaler="sde"),
    "er_sde-ode": case("no noise", scaler="ode", converges=False),
    "er_sde-noise": case("s_noise", s_noise=1.01, stage=2, converges=False),
}
ORDERS = {
    f"er_sde-ode-{stage}": case("no noise", scaler="ode", stage=stage, kinds=("discrete", "edm"))
    for stage in (2, 3)
}
