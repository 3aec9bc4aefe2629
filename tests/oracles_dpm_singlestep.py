"""DPM-Solver and DPM-Solver++ with intermediate stages, transcribed, and their cases."""

from __future__ import annotations

import math

import numpy as np
import oracles
from oracles import STEP, Array, Case, Problem
from oracles_dpm import log_snr
from oracles_dpm_2 import get_ancestral_step


def order_list(steps: int, order: int, lower_order_final: bool, to_clean: bool) -> list[int]:
    """get_order_list of DPMSolverSinglestepScheduler; it asks for steps that `order` divides where
    lower_order_final is False, and what is left over is then a step of lower order."""
    third, half = steps // 3, steps // 2
    if order == 3:
        if steps % 3 == 0 and lower_order_final:
            orders = [1, 2, 3] * (third - 1) + [1, 2] + [1]
        else:
            orders = [1, 2, 3] * third + [1, 2][: steps % 3]
    elif order == 2:
        if steps % 2 == 0 and lower_order_final:
            orders = [1, 2] * (half - 1) + [1, 1]
        else:
            orders = [1, 2] * half + [1] * (steps % 2)
    else:
        orders = [1] * steps
    if to_clean:
        orders[-1] = 1
    return orders


def update(
    base: Array, points: list, outputs: list, solver_type: str, algorithm: str, noise
) -> Array:
    """From points[0] to points[-1]: one of singlestep_dpm_solver_{first,second,third}_order_update.

    `points` are (alpha, sigma, log-SNR) of the base, the stages and the end.
    """
    (a_s, s_s, lam_s), (a_t, s_t, lam_t) = points[0], points[-1]
    h, m = lam_t - lam_s, outputs
    r = [(lam - lam_s) / h for _, _, lam in points[1:-1]]
    heun, d0, d1, d2 = solver_type == "heun", m[0], 0.0, 0.0
    if len(m) == 2:
        d1 = (1 / r[0]) * (m[1] - m[0])
    elif len(m) == 3:
        r1, r0 = r
        d1_0, d1_1 = (1 / r1) * (m[1] - m[0]), (1 / r0) * (m[2] - m[0])
        if heun:
            d1 = (r0 * d1_0 - r1 * d1_1) / (r0 - r1)
            d2 = 2 * (d1_1 - d1_0) / (r0 - r1)
        else:
            heun, d1 = True, d1_1
    if algorithm == "dpmsolver++":
        first = math.exp(-h) - 1
        x = (s_t / s_s) * base - a_t * first * d0
        x = x + a_t * (first / h + 1) * d1 if heun else x - 0.5 * a_t * first * d1
        return x - a_t * ((math.exp(-h) - 1 + h) / h**2 - 0.5) * d2
    if algorithm == "dpmsolver":
        growth = a_t * s_s / (a_s * s_t)  # e^h, whose rounding would be that of h times e^h
        first = growth - 1
        x = (a_t / a_s) * base - s_t * first * d0
        x = x - s_t * (first / h - 1) * d1 if heun else x - 0.5 * s_t * first * d1
        return x - s_t * ((growth - 1 - h) / h**2 - 0.5) * d2
    first = 1 - math.exp(-2 * h)
    x = (s_t / s_s * math.exp(-h)) * base + a_t * first * d0
    x = x + a_t * (first / (-2 * h) + 1) * d1 if heun else x + 0.5 * a_t * first * d1
    x = x + a_t * ((first - 2 * h) / (2 * h) ** 2 + 0.5) * d2
    return x + s_t * math.sqrt(1 - math.exp(-2 * h)) * noise


def singlestep(
    p: Problem, x: Array, order: int, solver_type: str, algorithm: str, lower_order_final=True
) -> list:
    """DPMSolverSinglestepScheduler. From alpha 0 the first interval is a first-order step alone;
    "dpmsolver" and "taylor" are the original code's, whose second stage is always "taylor"'s."""
    states: list = []
    lam, n = log_snr(p), p.steps
    pure = math.isinf(lam[0])
    orders = [1] * pure
    if n > pure:
        orders += order_list(n - pure, order, lower_order_final, math.isinf(lam[-1]))
    final = {"dpmsolver": "midpoint", "taylor": "heun"}.get(solver_type, solver_type)
    for i, k in enumerate(orders):
        t, alpha, sigma = p.at(i)
        _, alpha_next, sigma_next = p.at(i + 1)
        x0, eps = p.predict(x, t, alpha, sigma)
        if k == 1:
            start, base, outputs = i, x, []
        outputs.append(x0 if algorithm.endswith("++") else eps)
        noise = p.noise(STEP, i) if algorithm.startswith("sde") else None
        if math.isinf(lam[i]) or math.isinf(lam[i + 1]):
            x = alpha_next * x0 + (sigma_next * eps if noise is None else sigma_next * noise)
        else:
            points = [(*p.at(j)[1:], lam[j]) for j in range(start, i + 2)]
            second_of_three = k == 2 and orders[i + 1 : i + 2] == [3]
            kind = "heun" if solver_type == "dpmsolver" and second_of_three else final
            x = update(base, points, outputs, kind, algorithm, noise)
        states.append(x)
    return states


def dpm_fast(p: Problem, x: Array, eta: float, s_noise: float) -> list:
    """k-diffusion's sample_dpm_fast and dpm_solver_fast with their 1-, 2- and 3-step; the steps
    that they do not take, from an infinite level and to clean data, are DDIM's."""
    states: list = []
    first, last = 0, p.steps
    if p.alphas[0] == 0:
        states += oracles.ddim(oracles._from(p, 0, 1), x, min(eta, 1.0), s_noise)
        x, first = states[0], 1
    if p.sigmas[-1] == 0:
        last -= 1
    if last > first:
        x = _fast(p, x / p.alphas[first], first, last, eta, s_noise, states)
    if last < p.steps and last >= first:
        states.append(p.predict(x, *p.at(last))[0])
    return states


def _fast(p, z, first, last, eta, s_noise, states):
    nfe, log = last - first, [-math.log(level) for level in (p.levels[first], p.levels[last])]
    m = nfe // 3 + 1
    ts = np.linspace(*log, m + 1)
    orders = [3] * (m - 2) + [2, 1] if nfe % 3 == 0 else [3] * (m - 1) + [nfe % 3]

    def sigma(t):
        return math.exp(-t)

    def eps(z, t):
        return (z - p.denoised(z, sigma(t))) / sigma(t)

    def reach(z, t):
        states.append(p.scales(sigma(t))[0] * z)
        return z

    for order, t, t_next in zip(orders, ts[:-1], ts[1:], strict=True):
        t_down, su = t_next, 0.0
        if eta:
            sd, _ = get_ancestral_step(sigma(t), sigma(t_next), eta)
            t_down = min(log[1], -math.log(sd)) if sd else log[1]
            su = max(sigma(t_next) ** 2 - sigma(t_down) ** 2, 0.0) ** 0.5
        h, e = t_down - t, eps(z, t)
        if order == 1:
            z = z - sigma(t_down) * math.expm1(h) * e
        elif order == 2:
            s1 = t + h / 2
            u1 = reach(z - sigma(s1) * math.expm1(h / 2) * e, s1)
            z = z - sigma(t_down) * math.expm1(h) * (e + (eps(u1, s1) - e))
        else:
            s1, s2 = t + h / 3, t + 2 * h / 3
            u1 = reach(z - sigma(s1) * math.expm1(h / 3) * e, s1)
            change = eps(u1, s1) - e
            weight = sigma(s2) * 2 * (math.expm1(2 * h / 3) / (2 * h / 3) - 1)
            u2 = reach(z - sigma(s2) * math.expm1(2 * h / 3) * e - weight * change, s2)
            change = eps(u2, s2) - e
            weight = sigma(t_down) * 1.5 * (math.expm1(h) / h - 1)
            z = z - sigma(t_down) * math.expm1(h) * e - weight * change
        if su:
            z = z + su * s_noise * p.noise(STEP, len(states))
        reach(z, t_next)
    return states[-1]


def _case(solver, algorithm, reason, **options):
    told = {"order": 2, "solver_type": "midpoint"} | options
    told.pop("eta", None)
    return Case(
        solver,
        options,
        lambda p, x: singlestep(p, x, algorithm=algorithm, **told),
        reason,
        # errors of third order cross zero on some of the grids: see test_dpm_orders.py
        converges=told["order"] < 3 or "eta" in options,
    )


NO_NOISE = {"eta": 0.0, "s_noise": 1.0}
PP, SDE, DPM = "dpmsolver++", "sde-dpmsolver++", "dpmsolver"
ONE, TWO = "dpmpp_singlestep", "dpm_singlestep"
CASES = {
    "dpmpp_singlestep": _case(ONE, PP, "default"),
    "dpmpp_singlestep-1": _case(ONE, PP, "is DDIM", order=1),
    "dpmpp_singlestep-heun": _case(ONE, PP, "the other type", solver_type="heun"),
    "dpmpp_singlestep-fixed": _case(ONE, PP, "one order", lower_order_final=False),
    "dpmpp_singlestep-3": _case(ONE, PP, "third order", order=3),
    "dpmpp_singlestep-3-heun": _case(ONE, PP, "with curvature", order=3, solver_type="heun"),
    "dpmpp_singlestep-3-dpmsolver": _case(
        ONE, PP, "the original code's stages", order=3, solver_type="dpmsolver"
    ),
    "dpmpp_singlestep-3-fixed": _case(
        ONE, PP, "one order", order=3, solver_type="taylor", lower_order_final=False
    ),
    "dpmpp_singlestep-sde": _case(ONE, SDE, "noise in both stages", eta=1.0),
    "dpmpp_singlestep-sde-heun": _case(
        ONE, SDE, "noise, the other type", eta=1.0, solver_type="heun"
    ),
    "dpmpp_singlestep-sde-3": _case(ONE, SDE, "noise in three stages", eta=1.0, order=3),
    "dpmpp_singlestep-sde-3-heun": _case(
        ONE, SDE, "noise, with curvature", eta=1.0, order=3, solver_type="heun"
    ),
    "dpm_singlestep": _case(TWO, DPM, "default"),
    "dpm_singlestep-1": _case(TWO, DPM, "is DDIM", order=1),
    "dpm_singlestep-taylor": _case(TWO, DPM, "the other type", solver_type="taylor"),
    "dpm_singlestep-3": _case(TWO, DPM, "third order", order=3),
    "dpm_singlestep-3-heun": _case(TWO, DPM, "with curvature", order=3, solver_type="heun"),
    "dpm_singlestep-3-dpmsolver": _case(
        TWO, DPM, "the original code's stages",
        order=3, solver_type="dpmsolver", lower_order_final=False,
    ),
    **{
        f"dpm_fast{suffix}": Case(
            "dpm_fast", options, lambda p, x, o=options: dpm_fast(p, x, **{**NO_NOISE, **o}),
            reason, converges=False,  # of order 3 or 2 by the count: see test_dpm_orders.py
        )
        for suffix, options, reason in (
            ("", {}, "default"),
            ("-noise", {"eta": 1.0}, "noise once a step"),
            ("-options", {"eta": 0.7, "s_noise": 1.01}, "options"),
        )
    },
}  # fmt: skip
