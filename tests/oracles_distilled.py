"""Samplers of distilled networks: LCM, TCD and consistency models."""

from __future__ import annotations

import math

import numpy as np
import oracles
from oracles import STEP, Case


def lcm(p, x, s_noise=1.0, timestep_scaling=None):
    """Luo et al. 2023, multistep sampling; the boundary condition as LCMScheduler.step has it."""
    states = []
    for i in range(p.steps):
        t, alpha, sigma = p.at(i)
        _, alpha_next, sigma_next = p.at(i + 1)
        denoised = p.predict(x, t, alpha, sigma)[0]
        if timestep_scaling is not None:
            scaled = t * timestep_scaling
            c_skip = 0.5**2 / (scaled**2 + 0.5**2)
            c_out = scaled / (scaled**2 + 0.5**2) ** 0.5
            denoised = c_out * denoised + c_skip * x
        x = alpha_next * denoised
        if sigma_next:
            x = x + sigma_next * s_noise * p.noise(STEP, i)
        states.append(x)
    return states


def tcd(p, x, gamma, s_noise=1.0):
    """Zheng et al. 2024: strategic stochastic sampling."""
    states = []
    for i in range(p.steps):
        t, alpha, sigma = p.at(i)
        t_next, alpha_next, sigma_next = p.at(i + 1)
        x0, eps = p.predict(x, t, alpha, sigma)
        if sigma_next == 0:
            alpha_s, sigma_s = alpha_next, 0.0
        elif gamma == 0:
            alpha_s, sigma_s = alpha_next, sigma_next
        else:
            s = (1 - gamma) * t_next
            s = math.floor(s) if p.kind == "discrete" else s
            alpha_s, sigma_s = p.scales_at(s)
        x = alpha_s * x0 + sigma_s * eps
        fresh = sigma_next**2 - (alpha_next / alpha_s) ** 2 * sigma_s**2
        x = alpha_next / alpha_s * x
        if fresh > 0 and gamma > 0:
            x = x + math.sqrt(fresh) * s_noise * p.noise(STEP, i)
        states.append(x)
    return states


def consistency(p, x, s_noise=1.0):
    """Song et al. 2023, algorithm 1 with the boundary condition of appendix C."""
    eps, sd = 0.002, p.sigma_data
    states = []
    for i in range(p.steps):
        t, _, sigma = p.at(i)
        sigma_next = float(p.sigmas[i + 1])
        if p.prediction == "edm":
            c_skip = sd**2 / ((sigma - eps) ** 2 + sd**2)
            c_out = (sigma - eps) * sd / math.sqrt(sigma**2 + sd**2)
            c_in, c_noise = 1 / math.sqrt(sigma**2 + sd**2), 1000 * 0.25 * math.log(sigma)
            f = c_skip * x + c_out * p.network(c_in * x, c_noise / 1000)
            if p.clip is not None:
                f = np.clip(f, -p.clip, p.clip)
        else:
            f = p.predict(x, t, 1.0, sigma)[0]
        x = f
        if sigma_next > eps:
            x = x + math.sqrt(sigma_next**2 - eps**2) * s_noise * p.noise(STEP, i)
        states.append(x)
    return states


# A network that is not distilled is no consistency function, and more steps lead nowhere.
NO_LIMIT = {"converges": False}
CASES = {
    "lcm": Case("lcm", {}, lcm, "default", **NO_LIMIT),
    "lcm-options": Case(
        "lcm",
        {"timestep_scaling": 10.0, "s_noise": 1.01},
        lambda p, x: lcm(p, x, 1.01, 10.0),
        "the boundary condition",
        kinds=("discrete",),
        ends_in_x0=False,
        **NO_LIMIT,
    ),
    "tcd": Case("tcd", {}, lambda p, x: tcd(p, x, 0.3), "default", **NO_LIMIT),
    "tcd-options": Case(
        "tcd",
        {"gamma": 1.0, "s_noise": 1.01},
        lambda p, x: tcd(p, x, 1.0, 1.01),
        "all the way down",
        **NO_LIMIT,
    ),
    "tcd-ode": Case(
        "tcd", {"gamma": 0.0}, lambda p, x: oracles.ddim(p, x, 0.0), "without noise it is ddim"
    ),
    "consistency": Case("consistency", {}, consistency, "default", kinds=("edm",), **NO_LIMIT),
    "consistency-options": Case(
        "consistency",
        {"s_noise": 1.01},
        lambda p, x: consistency(p, x, 1.01),
        "options",
        kinds=("edm",),
        **NO_LIMIT,
    ),
}
