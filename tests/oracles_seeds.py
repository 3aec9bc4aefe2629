"""SEEDS-2, SEEDS-3 and DPM-Solver++ (SDE), transcribed in float64 NumPy. No fastdiff here."""

from __future__ import annotations

import math

import numpy as np
import oracles
from oracles import STEP, Array, Case, Problem


def first_order(p: Problem, x: Array, i: int, row: int, eta: float, s_noise: float) -> Array:
    """The exact step for a constant x0, from alpha = 0 or to clean data."""
    _, alpha_next, sigma_next = p.at(i + 1)
    x0, eps = p.predict(x, *p.at(i))
    if sigma_next == 0:
        return alpha_next * x0
    if not eta:
        return alpha_next * x0 + sigma_next * eps
    return alpha_next * x0 + s_noise * sigma_next * p.noise(STEP, row)


def ei_h_phi_1(h):
    return math.expm1(h)


def ei_h_phi_2(h):
    return (math.expm1(h) - h) / h


def seeds(p: Problem, x: Array, eta: float, s_noise: float, stages: tuple, kind: str) -> list:
    """Gonzalez et al. 2023 (arXiv:2305.14267), algorithms of SEEDS-2 and SEEDS-3, with the eta and
    "phi_1" of ComfyUI: the noise of a stage is that of one path, rescaled and added to."""
    states: list = []
    for i in range(p.steps):
        t, alpha_s, sigma_s = p.at(i)
        _, alpha_t, sigma_t = p.at(i + 1)
        if alpha_s == 0 or sigma_t == 0:
            x = first_order(p, x, i, len(states), eta, s_noise)
            states.append(x)
            continue
        level_s, h = sigma_s / alpha_s, math.log(alpha_t * sigma_s / (alpha_s * sigma_t))
        base, models, noise, at = x, [], np.zeros_like(x), 0.0
        for r in (*stages, 1.0):
            models.append(p.predict(x, t, alpha_s, sigma_s)[0])
            if r == 1:
                t, alpha_s, sigma_s = p.at(i + 1)
            else:
                level = level_s * math.exp(-r * h)  # exp(-(lambda_s + r h))
                t, (alpha_s, sigma_s) = p.time_of(level), p.scales(level)
            z = -r * h * (1 + eta)
            if len(models) == 1:
                weights = [ei_h_phi_1(z)]
            elif kind == "phi_1":
                fac = 1 / (2 * stages[0])
                weights = [(1 - fac) * ei_h_phi_1(z), fac * ei_h_phi_1(z)]
            else:  # of the last model and the first
                late = r / stages[len(models) - 2] * ei_h_phi_2(z)
                weights = [ei_h_phi_1(z) - late, *[0.0] * (len(models) - 2), late]
            x = sigma_s / p.sigmas[i] * math.exp(-r * h * eta) * base
            for w, model in zip(weights, models, strict=True):
                x = x - alpha_s * w * model
            if eta:
                segment = (at - r) * h * eta
                fresh = math.sqrt(-math.expm1(2 * segment))
                noise = math.exp(segment) * noise
                if fresh:
                    noise = noise + fresh * p.noise(STEP, len(states))
                x = x + s_noise * sigma_s * noise
            at = r
            states.append(x)
    return states


def dpmpp_sde(p: Problem, x: Array, eta: float, s_noise: float, r: float) -> list:
    """k-diffusion's sample_dpmpp_sde. Its Brownian tree over sigma gives (W(b) - W(a))/sqrt(b - a);
    here from the increments before and after the stage, each by its own draw."""
    states: list = []

    def get_ancestral_step(a, b):
        up = min(b, eta * (b**2 * (a**2 - b**2) / a**2) ** 0.5)
        return (b**2 - up**2) ** 0.5, up

    for i in range(p.steps):
        a, b = p.levels[i], p.levels[i + 1]
        if math.isinf(a) or b == 0:
            part, row = oracles._from(p, i, i + 1), len(states)
            part.noise = lambda kind, _, row=row: p.noise(kind, row)
            x = oracles.ddim(part, x, min(eta, 1.0), s_noise)[0]
            states.append(x)
            continue
        z, (_, alpha, sigma) = x / p.alphas[i], p.at(i)
        h = math.log(p.alphas[i + 1] * sigma / (alpha * p.sigmas[i + 1]))
        s = b if r == 1 else a * math.exp(-r * h)
        first = p.noise(STEP, len(states))
        d = p.denoised(z, a, float(p.times[i]))
        down, up = get_ancestral_step(a, s)
        z_2 = down / a * z - (down / a - 1) * d + first * s_noise * up
        alpha = p.alphas[i + 1] if r == 1 else p.scales(s)[0]
        states.append(alpha * z_2)
        d_2 = p.denoised(z_2, s, float(p.times[i + 1]) if r == 1 else None)
        down, up = get_ancestral_step(a, b)
        fac = 1 / (2 * r)
        path = math.sqrt(a - s) * first
        if r < 1:
            path = path + math.sqrt(s - b) * p.noise(STEP, len(states))
        z = down / a * z - (down / a - 1) * ((1 - fac) * d + fac * d_2)
        x = p.alphas[i + 1] * (z + path / math.sqrt(a - b) * s_noise * up)
        states.append(x)
    return states


def seeds_case(solver, reason, *, eta=1.0, s_noise=1.0, stages=None, kind="phi_2", **more):
    names = {"seeds_2": ("r",), "seeds_3": ("r_1", "r_2")}[solver]
    options = {"eta": eta, "s_noise": s_noise, **dict(zip(names, stages, strict=True))}
    if solver == "seeds_2":
        options["solver_type"] = kind
    return Case(
        solver, options, lambda p, x: seeds(p, x, eta, s_noise, stages, kind), reason, **more
    )


def sde_case(reason, *, eta=1.0, s_noise=1.0, r=0.5, **more):
    options = {"eta": eta, "s_noise": s_noise, "r": r}
    return Case("dpmpp_sde", options, lambda p, x: dpmpp_sde(p, x, eta, s_noise, r), reason, **more)


HALF, THIRDS = (0.5,), (1 / 3, 2 / 3)
CASES = {
    "seeds_2": Case("seeds_2", {}, lambda p, x: seeds(p, x, 1.0, 1.0, HALF, "phi_1"), "default"),
    "seeds_2-phi_2": seeds_case("seeds_2", "the other type", stages=HALF),
    "seeds_2-options": seeds_case(
        "seeds_2", "options", eta=0.4, s_noise=1.01, stages=(0.7,), kind="phi_1", converges=False
    ),
    "seeds_2-ode": seeds_case("seeds_2", "no noise", eta=0.0, stages=HALF, kind="phi_1"),
    "exp_heun_2_x0": seeds_case("seeds_2", "no noise", eta=0.0, stages=(1.0,)),
    "exp_heun_2_x0_sde": seeds_case("seeds_2", "the stage is the end", stages=(1.0,)),
    "seeds_3": Case("seeds_3", {}, lambda p, x: seeds(p, x, 1.0, 1.0, THIRDS, "phi_2"), "default"),
    "seeds_3-options": seeds_case(
        "seeds_3", "options", eta=0.4, s_noise=1.01, stages=(0.4, 0.8), converges=False
    ),
    "seeds_3-ode": seeds_case("seeds_3", "no noise", eta=0.0, stages=THIRDS),
    "dpmpp_sde": Case("dpmpp_sde", {}, lambda p, x: dpmpp_sde(p, x, 1.0, 1.0, 0.5), "default"),
    "dpmpp_sde-ode": sde_case("no noise: DPM-Solver++(2S)", eta=0.0),
    "dpmpp_sde-options": sde_case("options", eta=0.7, s_noise=1.01, r=0.4, converges=False),
    "dpmpp_sde-end": sde_case("the stage is the end, eta capped", eta=1.3, r=1.0, converges=False),
}
