"""DPM-Solver and DPM-Solver++ with several steps of history, transcribed, and their cases."""

from __future__ import annotations

import math

import numpy as np
from oracles import STEP, Array, Case, Problem


def log_snr(p: Problem) -> list[float]:
    with np.errstate(divide="ignore"):
        return list(np.log(p.alphas) - np.log(p.sigmas))


def multistep(
    p: Problem,
    x: Array,
    order: int,
    solver_type: str,
    algorithm: str,
    *,
    lower_order_final: bool = True,
    euler_at_final: bool = False,
    s_noise: float = 1.0,
) -> list:
    """DPMSolverMultistepScheduler: the updates of arXiv:2206.00927 and arXiv:2211.01095, but for
    the sign of the curvature D2 in "sde-dpmsolver++", which k-diffusion has right.

    A step of infinite log-SNR ratio is the limit of the first-order update, which is DDIM's.
    """
    states: list = []
    lam, n, outputs = log_snr(p), p.steps, []
    sde, data = algorithm.startswith("sde"), algorithm.endswith("++")
    for i in range(n):
        t, a_s, s_s = p.at(i)
        _, a_t, s_t = p.at(i + 1)
        x0, eps = p.predict(x, t, a_s, s_s)
        outputs.append(x0 if data else eps)
        h = lam[i + 1] - lam[i]
        k = min(order, i + 1)
        if i == n - 1 and (euler_at_final or (lower_order_final and n < 15)):
            k = 1
        if i == n - 2 and lower_order_final and n < 15:
            k = min(k, 2)
        if math.isinf(h):
            x = a_t * x0 + (0.0 if sde and data else s_t) * eps
            if sde and data and s_t:
                x = x + s_t * s_noise * p.noise(STEP, i)
            states.append(x)
            continue
        m0, d1, d2 = outputs[-1], 0.0, 0.0
        if k >= 2:
            r0 = (lam[i] - lam[i - 1]) / h
            d1 = d1_0 = (1 / r0) * (m0 - outputs[-2])
        if k == 3:
            r1 = (lam[i - 1] - lam[i - 2]) / h
            d1_1 = (1 / r1) * (outputs[-2] - outputs[-3])
            d1 = d1_0 + (r0 / (r0 + r1)) * (d1_0 - d1_1)
            d2 = (1 / (r0 + r1)) * (d1_0 - d1_1)
        heun = solver_type == "heun" or k == 3
        if algorithm == "dpmsolver++":
            first = math.exp(-h) - 1
            x = (s_t / s_s) * x - a_t * first * m0
            x = x + a_t * (first / h + 1) * d1 if heun else x - 0.5 * a_t * first * d1
            x = x - a_t * ((math.exp(-h) - 1 + h) / h**2 - 0.5) * d2
        elif algorithm == "dpmsolver":
            growth = a_t * s_s / (a_s * s_t)  # e^h, whose rounding would be that of h times e^h
            first = growth - 1
            x = (a_t / a_s) * x - s_t * first * m0
            x = x - s_t * (first / h - 1) * d1 if heun else x - 0.5 * s_t * first * d1
            x = x - s_t * ((growth - 1 - h) / h**2 - 0.5) * d2
        elif algorithm == "sde-dpmsolver++":
            first = 1 - math.exp(-2 * h)
            x = (s_t / s_s * math.exp(-h)) * x + a_t * first * m0
            x = x + a_t * (first / (-2 * h) + 1) * d1 if heun else x + 0.5 * a_t * first * d1
            x = x + a_t * ((first - 2 * h) / (2 * h) ** 2 + 0.5) * d2
            noise = p.noise(STEP, i) * s_noise
            x = x + s_t * math.sqrt(1 - math.exp(-2 * h)) * noise
        else:
            growth = a_t * s_s / (a_s * s_t)  # e^h, whose rounding would be that of h times e^h
            first = growth - 1
            x = (a_t / a_s) * x - 2 * s_t * first * m0
            x = x - 2 * s_t * (first / h - 1) * d1 if heun else x - s_t * first * d1
            x = x - 2 * s_t * ((growth - 1 - h) / h**2 - 0.5) * d2
            noise = p.noise(STEP, i) * s_noise
            x = x + s_t * math.sqrt(growth**2 - 1) * noise
        states.append(x)
    return states


def dpmpp_3m_sde(p: Problem, x: Array, eta: float, s_noise: float) -> list:
    """k-diffusion's sample_dpmpp_3m_sde, scaled by alpha. From an infinite log-SNR ratio the step
    is the limit of its first-order form, and the prediction there has no weight later."""
    states: list = []
    lam = log_snr(p)
    denoised_1 = denoised_2 = h_1 = h_2 = None
    for i in range(p.steps):
        t, alpha, sigma = p.at(i)
        _, alpha_next, sigma_next = p.at(i + 1)
        denoised, _ = p.predict(x, t, alpha, sigma)
        if sigma_next == 0:
            x = denoised
        else:
            h = lam[i + 1] - lam[i]
            h_eta = h * (eta + 1)
            decay = sigma_next / sigma * (math.exp(-h * eta) if eta else 1.0)
            x = decay * x + alpha_next * -math.expm1(-h_eta) * denoised
            if h_1 is not None:
                r0 = h_1 / h
                d1_0 = (denoised - denoised_1) / r0
                phi_2 = math.expm1(-h_eta) / h_eta + 1
                d1, d2 = d1_0, 0.0
                if h_2 is not None:
                    r1 = h_2 / h
                    d1_1 = (denoised_1 - denoised_2) / r1
                    d1 = d1_0 + (d1_0 - d1_1) * r0 / (r0 + r1)
                    d2 = (d1_0 - d1_1) / (r0 + r1)
                x = x + alpha_next * (phi_2 * d1 - (phi_2 / h_eta - 0.5) * d2)
            if eta:
                up = sigma_next * math.sqrt(-math.expm1(-2 * h * eta)) * s_noise
                x = x + up * p.noise(STEP, i)
            h_1, h_2 = h, h_1
        denoised_1, denoised_2 = denoised, denoised_1
        states.append(x)
    return states


def _case(solver, algorithm, reason, **options):
    """One case; the SDE of the noise form needs signal at the start."""
    told = {"order": 2, "solver_type": "midpoint"} | options
    sde = algorithm.startswith("sde")
    same = {k: v for k, v in told.items() if k not in ("eta",)}
    same["solver_type"] = {"dpmsolver": "midpoint", "taylor": "heun"}.get(
        same["solver_type"], same["solver_type"]
    )
    needs = sde and not algorithm.endswith("++")
    return Case(
        solver,
        options,
        lambda p, x: multistep(p, x, algorithm=algorithm, **same),
        reason,
        kinds=("discrete", "edm") if needs else ("discrete", "edm", "flow"),
        signal=needs,
        converges=options.get("s_noise", 1.0) == 1.0
        and (solver, algorithm, told["order"]) not in APART,
    )


# an error crosses zero on some of the grids: measured in test_dpm_orders.py
APART = {("dpmpp_multistep", "dpmsolver++", 3), ("dpm_multistep", "sde-dpmsolver", 1)}


CASES = {
    "dpmpp_multistep": _case("dpmpp_multistep", "dpmsolver++", "default"),
    "dpmpp_multistep-1": _case("dpmpp_multistep", "dpmsolver++", "is DDIM", order=1),
    "dpmpp_multistep-taylor": _case(
        "dpmpp_multistep", "dpmsolver++", "a name of the original code",
        solver_type="taylor", lower_order_final=False,
    ),
    "dpmpp_multistep-3": _case("dpmpp_multistep", "dpmsolver++", "third order", order=3),
    "dpmpp_multistep-3-high": _case(
        "dpmpp_multistep", "dpmsolver++", "third order to the end",
        order=3, solver_type="heun", lower_order_final=False,
    ),
    "dpmpp_multistep-sde": _case("dpmpp_multistep", "sde-dpmsolver++", "noise", eta=1.0),
    "dpmpp_multistep-sde-1": _case(
        "dpmpp_multistep", "sde-dpmsolver++", "noise, first order", eta=1.0, order=1
    ),
    "dpmpp_multistep-sde-3": _case(
        "dpmpp_multistep", "sde-dpmsolver++", "every option",
        eta=1.0, order=3, s_noise=1.01, euler_at_final=True,
    ),
    "dpm_multistep": _case("dpm_multistep", "dpmsolver", "default"),
    "dpm_multistep-1": _case("dpm_multistep", "dpmsolver", "is DDIM", order=1),
    "dpm_multistep-heun": _case(
        "dpm_multistep", "dpmsolver", "the other type", solver_type="heun", euler_at_final=True
    ),
    "dpm_multistep-3": _case("dpm_multistep", "dpmsolver", "third order", order=3),
    "dpm_multistep-3-high": _case(
        "dpm_multistep", "dpmsolver", "third order to the end",
        order=3, solver_type="dpmsolver", lower_order_final=False,
    ),
    "dpm_multistep-sde": _case("dpm_multistep", "sde-dpmsolver", "noise", eta=1.0),
    "dpm_multistep-sde-1": _case(
        "dpm_multistep", "sde-dpmsolver", "noise, first order", eta=1.0, order=1
    ),
    "dpm_multistep-sde-heun": _case(
        "dpm_multistep", "sde-dpmsolver", "noise, the other type", eta=1.0, solver_type="heun"
    ),
    "dpm_multistep-sde-3": _case(
        "dpm_multistep", "sde-dpmsolver", "every option, third order",
        eta=1.0, order=3, s_noise=1.01, lower_order_final=False,
    ),
    "dpmpp_3m_sde": Case(
        "dpmpp_3m_sde", {}, lambda p, x: dpmpp_3m_sde(p, x, 1.0, 1.0), "default"
    ),
    "dpmpp_3m_sde-options": Case(
        "dpmpp_3m_sde", {"eta": 0.4, "s_noise": 1.01},
        lambda p, x: dpmpp_3m_sde(p, x, 0.4, 1.01), "options", converges=False,
    ),
    "dpmpp_3m_sde-ode": Case(
        "dpmpp_3m_sde", {"eta": 0.0},
        lambda p, x: multistep(p, x, 3, "heun", "dpmsolver++", lower_order_final=False),
        "without noise it is DPM-Solver++(3M)", converges=False,  # as APART
    ),
}  # fmt: skip
