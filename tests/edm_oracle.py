"""EDM's general sampler in float64, step by step from the paper; knows nothing of fastdiff.

Karras et al. 2022 (arXiv:2206.00364): equation 4 for the ODE, table 1 for schedules, scalings and
levels, algorithm 2 for churn, appendix C.2 and algorithm 3 for the second-order family. Where
exp(z) - 1 or log(1 + z) of a small z would lose half the digits, expm1 and log1p stand.
"""

from __future__ import annotations

import math

import torch


def vp_sigma(t, beta_d, beta_min):
    return math.sqrt(math.expm1(0.5 * beta_d * t * t + beta_min * t))


def levels_of(kind, n, low, high, rho, epsilon_s, beta, iddpm):
    c_1, c_2, m = iddpm
    if kind == "vp":
        return [vp_sigma(1 + i / (n - 1) * (epsilon_s - 1), *beta) for i in range(n)]
    if kind == "ve":
        return [math.sqrt(high**2 * (low**2 / high**2) ** (i / (n - 1))) for i in range(n)]
    if kind == "edm":
        a, b = high ** (1 / rho), low ** (1 / rho)
        return [(a + i / (n - 1) * (b - a)) ** rho for i in range(n)]

    def bar(j):
        return math.sin(0.5 * math.pi * j / m / (c_2 + 1)) ** 2

    u = [0.0]
    for j in range(m, 0, -1):
        u.insert(0, math.sqrt((u[0] ** 2 + 1) / max(bar(j - 1) / bar(j), c_1) - 1))
    u = [v for v in u if low <= v <= high]
    return [u[round((len(u) - 1) / (n - 1) * i)] for i in range(n)]


class Curves:
    def __init__(self, schedule, scaling, beta_d, beta_min):
        self.schedule, self.scaling, self.beta = schedule, scaling, (beta_d, beta_min)

    def sigma(self, t):
        if self.schedule == "vp":
            return vp_sigma(t, *self.beta)
        return math.sqrt(t) if self.schedule == "ve" else t

    def sigma_slope(self, t):
        if self.schedule == "vp":
            sigma = self.sigma(t)
            return 0.5 * (self.beta[1] + self.beta[0] * t) * (sigma + 1 / sigma)
        return 0.5 / math.sqrt(t) if self.schedule == "ve" else 1.0

    def time(self, sigma):
        if self.schedule == "vp":
            beta_d, beta_min = self.beta
            log = math.log1p(sigma**2)
            return (math.sqrt(beta_min**2 + 2 * beta_d * log) - beta_min) / beta_d
        return sigma**2 if self.schedule == "ve" else sigma

    def s(self, t):
        return 1 / math.sqrt(1 + self.sigma(t) ** 2) if self.scaling == "vp" else 1.0

    def s_slope(self, t):
        if self.scaling == "vp":
            return -self.sigma(t) * self.sigma_slope(t) * self.s(t) ** 3
        return 0.0

    def slope(self, net, x, t, labels):
        sigma, s = self.sigma(t), self.s(t)
        denoised = net(x / s, torch.tensor(sigma, dtype=torch.float64), labels)
        rate = self.sigma_slope(t) / sigma
        return (rate + self.s_slope(t) / s) * x - rate * s * denoised


def sample(
    net, latents, labels, draw, n, low, high, rho, solver, discretization, schedule, scaling,
    epsilon_s, iddpm, alpha, churn, rounding=lambda sigma: sigma,
):  # fmt: skip
    """The states after each step; `draw` gives the noise of each."""
    s_churn, s_min, s_max, s_noise = churn
    beta_d = 2 * (math.log1p(low**2) / epsilon_s - math.log1p(high**2)) / (epsilon_s - 1)
    beta = (beta_d, math.log1p(high**2) - 0.5 * beta_d)
    curves = Curves(schedule, scaling, *beta)
    sigmas = levels_of(discretization, n, low, high, rho, epsilon_s, beta, iddpm)
    times = [curves.time(rounding(sigma)) for sigma in sigmas] + [0.0]
    x = latents * curves.sigma(times[0]) * curves.s(times[0])
    states = []
    for i in range(n):
        now, then = times[i], times[i + 1]
        noise, sigma = draw(x), curves.sigma(now)
        gamma = min(s_churn / n, math.sqrt(2) - 1) if s_min <= sigma <= s_max else 0.0
        hat = curves.time(rounding(sigma + gamma * sigma))
        added = max(curves.sigma(hat) ** 2 - sigma**2, 0.0) if gamma else 0.0
        x = curves.s(hat) / curves.s(now) * x + math.sqrt(added) * curves.s(hat) * s_noise * noise
        h = then - hat
        first = curves.slope(net, x, hat, labels)
        if solver == "euler" or i == n - 1:
            x = x + h * first
        else:
            middle = curves.slope(net, x + alpha * h * first, hat + alpha * h, labels)
            x = x + h * ((1 - 1 / (2 * alpha)) * first + 1 / (2 * alpha) * middle)
        states.append(x)
    return states
