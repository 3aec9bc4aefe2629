"""Linear multistep methods on slopes, transcribed in float64 NumPy. No fastdiff here.

z and u are what the sources count in: x/alpha and sigma/alpha with the noise prediction as slope,
and on a flow x and t with the velocity, as ComfyUI's samplers see a flow model.
"""

from __future__ import annotations

import functools
import math
from itertools import pairwise

import numpy as np
from oracles import Array, Case, Problem
from scipy.integrate import quad


def _scale(p: Problem, i: int) -> float:
    return 1.0 if p.kind == "flow" else float(p.alphas[i])


def _coordinates(p: Problem) -> list[float]:
    return [float(s) for s in p.sigmas] if p.kind == "flow" else p.levels


def _evaluate(p: Problem, x: Array, i: int) -> tuple[Array, Array]:
    """The slope at a grid point, and the end of DDIM's equation 12 from there."""
    x0, eps = p.predict(x, *p.at(i))
    slope = eps - x0 if p.kind == "flow" else eps
    return slope, p.alphas[i + 1] * x0 + p.sigmas[i + 1] * eps


# --- k-diffusion's sample_lms, and the integrals of Zhang and Chen 2023 (arXiv:2204.13902) -------


def _lagrange(nodes: tuple[float, ...], j: int, tau):
    """linear_multistep_coeff's product; equation 15 of Zhang and Chen."""
    prod = 1.0
    for k, node in enumerate(nodes):
        if k != j:
            prod = prod * (tau - node) / (nodes[j] - node)
    return prod


@functools.cache
def lms_coefficients(then: float, nodes: tuple[float, ...]) -> list[float]:
    """quad is exact here, but for rounding: the integrands are cubic at most."""
    return [
        quad(lambda tau, j=j: _lagrange(nodes, j, tau), nodes[0], then, epsabs=0.0)[0]
        for j in range(len(nodes))
    ]


@functools.cache
def log_rho_coefficients(then: float, nodes: tuple[float, ...]) -> list[float]:
    """The antiderivatives ind_fn of DEISMultistepScheduler; their difference cancels."""
    if len(nodes) == 1:
        return [then - nodes[0]]
    nodes, then, log = tuple(map(np.longdouble, nodes)), np.longdouble(then), np.log
    if len(nodes) == 2:

        def ind2(t, b, c):
            return t * (-log(c) + log(t) - 1) / (log(b) - log(c))

        (s0, s1), t = nodes, then
        found = [ind2(t, s0, s1) - ind2(s0, s0, s1), ind2(t, s1, s0) - ind2(s0, s1, s0)]
        return [float(c) for c in found]

    def ind3(t, b, c, d):
        numerator = t * (
            log(c) * (log(d) - log(t) + 1) - log(d) * log(t) + log(d) + log(t) ** 2 - 2 * log(t) + 2
        )
        return numerator / ((log(b) - log(c)) * (log(b) - log(d)))

    (s0, s1, s2), t = nodes, then
    found = [
        ind3(t, s0, s1, s2) - ind3(s0, s0, s1, s2),
        ind3(t, s1, s2, s0) - ind3(s0, s1, s2, s0),
        ind3(t, s2, s0, s1) - ind3(s0, s2, s0, s1),
    ]
    return [float(c) for c in found]


def vp_constants() -> tuple[float, float]:
    """beta_d and beta_min of diff-sampler's edm2t with its defaults."""
    epsilon_s, low, high = 1e-3, math.log(0.002**2 + 1), math.log(80.0**2 + 1)
    beta_d = 2 * (low / epsilon_s - high) / (epsilon_s - 1)
    return beta_d, high - 0.5 * beta_d


@functools.cache
def tab_coefficients(then: float, nodes: tuple[float, ...]) -> list[float]:
    """Equation 15 in the time of edm2t: the sum of 10,000 terms in get_deis_coeff_list.

    Here by Gauss-Legendre in t, on panels that shrink towards the root of 1 - alphabar, where the
    integrand has its singularity; 1 - alphabar by expm1, as it loses eleven digits otherwise.
    """
    beta_d, beta_min = vp_constants()

    def time(level):
        return (math.sqrt(beta_min**2 + 2 * beta_d * math.log1p(level**2)) - beta_min) / beta_d

    root = (abs(beta_min) - beta_min) / beta_d
    start, end, ts = time(nodes[0]) - root, time(then) - root, tuple(map(time, nodes))
    edges = np.geomspace(start, end, 2 + int(math.log2(start / end)))
    at, weight = np.polynomial.legendre.leggauss(20)
    sums = np.zeros(len(nodes))
    for a, b in pairwise(edges):
        tau = root + (a + b) / 2 + (b - a) / 2 * at
        log_alpha = -0.5 * tau**2 * beta_d - tau * beta_min
        d_log_alpha = -tau * beta_d - beta_min
        integrand = -0.5 * d_log_alpha / np.sqrt(np.exp(log_alpha) * -np.expm1(log_alpha))
        for j in range(len(nodes)):
            sums[j] += (b - a) / 2 * np.sum(weight * integrand * _lagrange(ts, j, tau))
    return list(sums)


def _analytic_slope(p: Problem, x: Array, i: int) -> tuple[Array, Array]:
    """diff-sampler's analytical first step, d = z/sqrt(1 + level^2), and the same as velocity."""
    _, alpha, sigma = p.at(i)
    if alpha == 0:
        x0, eps = np.zeros_like(x), x / sigma
    else:
        z, level = x / alpha, p.levels[i]
        root = math.sqrt(1 + level**2)
        eps = z / root
        x0 = z / (root * (root + level))  # z - level*eps, which cancels
    return (eps - x0 if p.kind == "flow" else eps), p.alphas[i + 1] * x0 + p.sigmas[i + 1] * eps


def multistep(
    p: Problem,
    x: Array,
    order: int,
    coefficients,
    *,
    last_is_euler: bool = False,
    afs: bool = False,
    lower_order_final: bool = False,
    levels: bool = False,
) -> list:
    """sample_lms and deis_sampler: z' = z + sum of the coefficients times the last slopes.

    A slope at an infinite level has no place in a polynomial: the step from there is DDIM's, and
    the ramp of orders begins after it. `levels` counts in sigma/alpha on a flow too.
    """
    if levels:
        u, scale = p.levels, [float(a) for a in p.alphas]
    else:
        u, scale = _coordinates(p), [_scale(p, i) for i in range(p.steps + 1)]
    states: list = []
    slopes: list = []
    for i in range(p.steps):
        if afs and i == 0 and p.steps > 1:
            slope, first = _analytic_slope(p, x, i)
        else:
            slope, first = _evaluate(p, x, i)
        if levels:
            slope = p_noise(p, x, i)
        slopes.append((u[i], slope))
        slopes = [s for s in slopes if math.isfinite(s[0])][-order:]
        n = len(slopes)
        if lower_order_final:
            n = min(n, p.steps - i)
        if math.isinf(u[i]) or n == 1 or (u[i + 1] == 0 and last_is_euler):
            x = first
        else:
            used = slopes[len(slopes) - n :][::-1]
            weights = coefficients(u[i + 1], tuple(node for node, _ in used))
            z = x / scale[i] + sum(c * d for c, (_, d) in zip(weights, used, strict=True))
            x = scale[i + 1] * z
        states.append(x)
    return states


def p_noise(p: Problem, x: Array, i: int) -> Array:
    return p.predict(x, *p.at(i))[1]


# --- diff-sampler and ComfyUI: ipndm, ipndm_v, gradient_estimation --------------------------------


def ipndm(
    p: Problem, x: Array, max_order: int, afs: bool = False, denoise_last: bool = True
) -> list:
    """ipndm_sampler, with ComfyUI's last step or that of iplms; a step from an infinite level is
    DDIM's."""
    u, states, buffer = _coordinates(p), [], []
    for i in range(p.steps):
        h = u[i + 1] - u[i]
        if afs and i == 0 and p.steps > 1:
            d, first = _analytic_slope(p, x, i)
        else:
            d, first = _evaluate(p, x, i)
        order = min(max_order, i + 1)
        if order == 1 or (u[i + 1] == 0 and denoise_last):
            x = first
        else:
            if order == 2:
                mix = (3 * d - buffer[-1]) / 2
            elif order == 3:
                mix = (23 * d - 16 * buffer[-1] + 5 * buffer[-2]) / 12
            else:
                mix = (55 * d - 59 * buffer[-1] + 37 * buffer[-2] - 9 * buffer[-3]) / 24
            x = _scale(p, i + 1) * (x / _scale(p, i) + h * mix)
        buffer.append(d)
        states.append(x)
    return states


def gradient_estimation(p: Problem, x: Array, ge_gamma: float) -> list:
    """sample_gradient_estimation; a step from an infinite level is DDIM's."""
    u, states, old_d = _coordinates(p), [], None
    for i in range(p.steps):
        d, first = _evaluate(p, x, i)
        if u[i + 1] == 0 or i == 0:
            x = first
        else:
            dt = u[i + 1] - u[i]
            z = x / _scale(p, i) + d * dt
            z = z + (ge_gamma - 1) * (d - old_d) * dt
            x = _scale(p, i + 1) * z
        old_d = d
        states.append(x)
    return states


# --- Liu et al. 2022 (arXiv:2202.09778) -----------------------------------------------------------


def _transfer(p: Problem, x: Array, now: tuple, then: tuple, e: Array) -> Array:
    """phi of the paper (diffusers' _get_prev_sample), for any alpha and sigma; on a flow the slope
    is the velocity and the transfer Euler's."""
    if p.kind == "flow":
        return x + (then[0] - now[0]) * e
    (_, a, s), (_, a_next, s_next) = now, then
    return a_next / a * x - (a_next / a * s - s_next) * e


def _mixed(ets: list) -> Array:
    if len(ets) == 1:
        return ets[-1]
    if len(ets) == 2:
        return (3 * ets[-1] - ets[-2]) / 2
    if len(ets) == 3:
        return (23 * ets[-1] - 16 * ets[-2] + 5 * ets[-3]) / 12
    return (55 * ets[-1] - 59 * ets[-2] + 37 * ets[-3] - 9 * ets[-4]) / 24


def _slope_at(p: Problem, x: Array, point: tuple) -> Array:
    x0, eps = p.predict(x, *point)
    return eps - x0 if p.kind == "flow" else eps


def plms(p: Problem, x: Array, order: int) -> list:
    """PLMSSampler of latent diffusion (step_plms of PNDMScheduler): pseudo improved Euler first."""
    states: list = []
    ets: list = []
    u = _coordinates(p)
    for i in range(p.steps):
        now, then = p.at(i), p.at(i + 1)
        e, first = _evaluate(p, x, i)
        ets = [*ets, e][-order:]
        if i == 0:
            base, x = x, first
            states.append(x)
            if math.isfinite(u[0]) and u[1] > 0:
                x = _transfer(p, base, now, then, (e + _slope_at(p, x, then)) / 2)
                states.append(x)
            continue
        x = _transfer(p, x, now, then, _mixed(ets))
        states.append(x)
    return states


def pndm(p: Problem, x: Array) -> list:
    """gen_order_4 of the paper's code: Runge-Kutta while fewer than three slopes are known."""
    states: list = []
    ets: list = []
    u = _coordinates(p)
    for i in range(p.steps):
        now, then = p.at(i), p.at(i + 1)
        e_1, first = _evaluate(p, x, i)
        ets = [*ets, e_1][-4:]
        if len(ets) > 3:
            x = _transfer(p, x, now, then, _mixed(ets))
        elif math.isfinite(u[i]) and u[i + 1] > 0:
            t = (now[0] + then[0]) / 2
            mid = (t, *p.scales(p.level_of(t)))
            x_2 = _transfer(p, x, now, mid, e_1)
            e_2 = _slope_at(p, x_2, mid)
            x_3 = _transfer(p, x, now, mid, e_2)
            e_3 = _slope_at(p, x_3, mid)
            x_4 = _transfer(p, x, now, then, e_3)
            e_4 = _slope_at(p, x_4, then)
            x = _transfer(p, x, now, then, (e_1 + 2 * e_2 + 2 * e_3 + e_4) / 6)
            states += [x_2, x_3, x_4]
        else:
            x = first
        states.append(x)
    return states


# --- cases ----------------------------------------------------------------------------------------


def _lms(order):
    return lambda p, x: multistep(p, x, order, lms_coefficients)


def _ipndm_v(order, coefficients, afs=False):
    return lambda p, x: multistep(p, x, order, coefficients, last_is_euler=True, afs=afs)


def _deis(variant, order, **options):
    coefficients = {
        "tab": tab_coefficients, "rhoab": lms_coefficients, "logrho": log_rho_coefficients,
    }[variant]  # fmt: skip
    options |= {"last_is_euler": True, "levels": variant == "logrho"}
    return lambda p, x: multistep(p, x, order, coefficients, **options)


# the start-up or the grid decides the order: see test_peers_adams.py
BY_HAND = {"converges": False}

CASES = {
    "lms": Case("lms", {}, _lms(4), "defaults", ends_in_x0="line"),
    "lms-2": Case("lms", {"order": 2}, _lms(2), "one older slope", ends_in_x0="line"),
    "lms-3": Case("lms", {"order": 3}, _lms(3), "two older slopes", ends_in_x0="line"),
    "ipndm": Case("ipndm", {}, lambda p, x: ipndm(p, x, 4), "defaults"),
    "ipndm-1": Case("ipndm", {"max_order": 1}, lambda p, x: ipndm(p, x, 1), "no history"),
    "ipndm-last": Case(
        "ipndm", {"denoise_last": False}, lambda p, x: ipndm(p, x, 4, denoise_last=False),
        "as diffusers", ends_in_x0="line",
    ),
    "ipndm-afs": Case(
        "ipndm", {"max_order": 3, "afs": True}, lambda p, x: ipndm(p, x, 3, True),
        "the analytic slope is read twice, then leaves", **BY_HAND,
    ),
    "ipndm_v": Case("ipndm_v", {}, _ipndm_v(4, lms_coefficients), "defaults"),
    "ipndm_v-afs": Case(
        "ipndm_v", {"afs": True}, _ipndm_v(4, lms_coefficients, True), "analytic slope", **BY_HAND
    ),
    "deis": Case("deis", {}, _deis("tab", 3), "defaults: tab"),
    "deis-4": Case("deis", {"max_order": 4}, _deis("tab", 4), "three older slopes"),
    "deis-rhoab": Case("deis", {"variant": "rhoab"}, _deis("rhoab", 3), "in sigma/alpha"),
    "deis-logrho": Case(
        "deis", {"variant": "logrho"}, _deis("logrho", 3), "in its logarithm", **BY_HAND
    ),
    "deis-final": Case(
        "deis", {"variant": "logrho", "max_order": 2, "lower_order_final": True},
        _deis("logrho", 2, lower_order_final=True), "as diffusers below 15 steps",
    ),
    "deis-afs": Case(
        "deis", {"afs": True, "lower_order_final": True},
        _deis("tab", 3, afs=True, lower_order_final=True), "analytic slope", **BY_HAND,
    ),
    "gradient_estimation": Case(
        "gradient_estimation", {}, lambda p, x: gradient_estimation(p, x, 2.0), "defaults"
    ),
    "gradient_estimation-low": Case(
        "gradient_estimation", {"ge_gamma": 0.6}, lambda p, x: gradient_estimation(p, x, 0.6),
        "towards the older slope",
    ),
    "plms": Case(
        "plms", {}, lambda p, x: plms(p, x, 4), "defaults", ends_in_x0="line", **BY_HAND
    ),
    "plms-2": Case(
        "plms", {"order": 2}, lambda p, x: plms(p, x, 2), "S-PNDM", ends_in_x0="line", **BY_HAND
    ),
    "pndm": Case("pndm", {}, pndm, "defaults", ends_in_x0="line", amplifies=True, **BY_HAND),
}  # fmt: skip
