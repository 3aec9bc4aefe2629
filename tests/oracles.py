"""Each paper's sampling step, transcribed in float64 NumPy as it is printed. No fastdiff here.

Every function returns the states it passes through, one for each row that a table would have (a
churned state and the end of a first stage count), so that whole trajectories can be compared.

States are x = alpha*x0 + sigma*noise. Where a source counts in sigma alone (k-diffusion, Karras et
al. 2022), the state is divided by alpha first and multiplied by the next alpha afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

Array = np.ndarray
STEP, CHURN = 1, 2  # what a draw is for


@dataclass
class Problem:
    """What a sampler works on.

    Args:
        times, alphas, sigmas: the grid, noisiest first, ``(steps + 1,)``.
        network: raw output m(x_in, t).
        prediction: what m is.
        noise: the draw of a kind for the row with the given index.
        kind: of the schedule, which says what t means.
        time_of: time of a level sigma/alpha.
        clip: bound of x0, or None.
        rederive: whether the noise is derived again from the clipped x0.
        sigma_data: of the EDM preconditioning.
        uncond: raw unconditional output, for CFG++; None where the solver has no use for it.
        scales_at: alpha and sigma of a time.
    """

    times: Array
    alphas: Array
    sigmas: Array
    network: Callable[[Array, float], Array]
    prediction: str
    noise: Callable[[int, int], Array]
    kind: str
    time_of: Callable[[float], float]
    clip: float | None = None
    rederive: bool = True
    sigma_data: float = 0.5
    uncond: Callable[[Array, float], Array] | None = None
    scales_at: Callable[[float], tuple[float, float]] | None = None

    def level_of(self, t: float) -> float:
        """The level sigma/alpha of a time, for a solver that halves times."""
        alpha, sigma = self.scales_at(t)
        return sigma / alpha

    @property
    def steps(self) -> int:
        return len(self.times) - 1

    def predict(self, x: Array, t: float, alpha: float, sigma: float) -> tuple[Array, Array]:
        """x0 and noise that the network sees in x."""
        if self.prediction == "edm":  # Karras et al. 2022, equation 7 and table 1
            s2, d2 = sigma**2, self.sigma_data**2
            c_skip, c_out = d2 / (s2 + d2), sigma * self.sigma_data / math.sqrt(s2 + d2)
            c_in, c_noise = 1 / math.sqrt(s2 + d2), math.log(sigma) / 4
            x0 = c_skip * x + c_out * self.network(c_in * x, c_noise)
            eps = (x - alpha * x0) / sigma
        else:
            m = self.network(x, t)
            if self.prediction == "epsilon":
                x0, eps = (x - sigma * m) / alpha, m
            elif self.prediction == "sample":
                x0, eps = m, (x - alpha * m) / sigma
            elif self.prediction == "v_prediction":  # Salimans and Ho 2022, appendix D
                x0, eps = alpha * x - sigma * m, alpha * m + sigma * x
            else:  # flow: m = noise - x0, and x = (1 - t) x0 + t noise
                x0, eps = x - sigma * m, x + alpha * m
        if self.clip is not None:
            x0 = np.clip(x0, -self.clip, self.clip)
            if self.rederive:
                eps = (x - alpha * x0) / sigma
        return x0, eps

    def at(self, i: int) -> tuple[float, float, float]:
        return float(self.times[i]), float(self.alphas[i]), float(self.sigmas[i])

    def scales(self, level: float) -> tuple[float, float]:
        """alpha and sigma where sigma/alpha is the given level."""
        if self.kind == "edm":
            return 1.0, level
        if self.kind == "flow":
            return 1 / (1 + level), level / (1 + level)
        return 1 / math.sqrt(1 + level**2), level / math.sqrt(1 + level**2)

    def denoised(self, z: Array, level: float, t: float | None = None) -> Array:
        """k-diffusion's denoiser D(z; level), z = x0 + level*noise."""
        alpha, sigma = self.scales(level)
        t = self.time_of(level) if t is None else t
        return self.predict(alpha * z, t, alpha, sigma)[0]

    @property
    def levels(self) -> list[float]:
        return [s / a if a else math.inf for a, s in zip(self.alphas, self.sigmas, strict=True)]


MIX = np.random.default_rng(3).normal(size=(3, 3)) / 3


def variance_output(x, t):
    """A network's learned variance, in [-1, 1]."""
    return np.tanh(x @ MIX.T - 0.2)


class Case(NamedTuple):
    """A solver with options, and what it is held against.

    Args:
        solver: name in fastdiff's SOLVERS.
        options: of its builder.
        oracle: the states after each row, from a problem and the initial state.
        reason: why the case is there.
        kinds: of schedule on which the solver is defined.
        signal: whether it needs a grid that begins with alpha > 0.
        converges: whether its order of convergence is measured (with these options).
        ends_in_x0: whether a step to clean data ends in the x0 prediction alone: True, False, or
            "line" where it does so for a state on a straight line to x0.
        gaussian_order: order on Gaussian data where an error term vanishes there.
        amplifies: whether a stage feeds on the rounding of the one before, so that few long steps
            enlarge it.
    """

    solver: str
    options: dict
    oracle: Callable[[Problem, Array], list]
    reason: str
    kinds: tuple[str, ...] = ("discrete", "edm", "flow")
    signal: bool = False
    converges: bool = True
    ends_in_x0: bool | str = True
    gaussian_order: int | None = None
    amplifies: bool = False


# --- Ho et al. 2020 (arXiv:2006.11239) ------------------------------------------------------


def ddpm(p: Problem, x: Array, variance: str, v_output: Callable[[Array, float], Array]) -> list:
    """Algorithm 2 with the posterior of equations 6 and 7, betas respaced to the grid.

    `variance` is "fixed_small" (beta~, equation 7), "fixed_large" (beta) or "learned_range"
    (Nichol and Dhariwal 2021, equation 15, v in [0, 1] there, in [-1, 1] as the network gives it).
    """
    states = []
    for i in range(p.steps):
        t, alpha, sigma = p.at(i)
        _, alpha_prev, sigma_prev = p.at(i + 1)
        x0, _ = p.predict(x, t, alpha, sigma)
        abar, abar_prev = alpha**2, alpha_prev**2
        if p.kind == "discrete":
            beta = 1 - abar / abar_prev
            one_minus, one_minus_prev = 1 - abar, 1 - abar_prev
        else:  # the same posterior where alpha^2 + sigma^2 is not 1
            one_minus, one_minus_prev = sigma**2, sigma_prev**2
            beta = one_minus - abar / abar_prev * one_minus_prev
        mean = (
            math.sqrt(abar_prev) * beta / one_minus * x0
            + math.sqrt(abar / abar_prev) * one_minus_prev / one_minus * x
        )
        small = one_minus_prev / one_minus * beta
        if sigma_prev == 0:
            x = mean
        else:
            if variance == "learned_range":
                frac = (v_output(x, t) + 1) / 2
                log_variance = frac * math.log(beta) + (1 - frac) * math.log(small)
                std = np.exp(0.5 * log_variance)
            else:
                std = math.sqrt(beta if variance == "fixed_large" else small)
            x = mean + std * p.noise(STEP, i)
        states.append(x)
    return states


# --- Song et al. 2021 (arXiv:2010.02502) ----------------------------------------------------


def ddim(p: Problem, x: Array, eta: float, s_noise: float = 1.0) -> list:
    """Equation 12 with the sigma of equation 16, written for any alpha and sigma."""
    states = []
    for i in range(p.steps):
        t, alpha, sigma = p.at(i)
        _, alpha_prev, sigma_prev = p.at(i + 1)
        x0, eps = p.predict(x, t, alpha, sigma)
        # sqrt(1 - abar/abar_prev) of equation 16 is sqrt(sigma^2 - (alpha/alpha')^2 sigma'^2)
        beta = sigma**2 - (alpha / alpha_prev) ** 2 * sigma_prev**2
        up = eta * sigma_prev / sigma * math.sqrt(beta)
        x = alpha_prev * x0 + math.sqrt(max(sigma_prev**2 - up**2, 0.0)) * eps
        if up:
            x = x + up * s_noise * p.noise(STEP, i)
        states.append(x)
    return states


# --- k-diffusion ----------------------------------------------------------------------------


def _churn(p: Problem, z: Array, i: int, states: list, churn: tuple) -> tuple[Array, float, float]:
    """Karras et al. 2022 (arXiv:2206.00364), algorithm 2, lines 4 to 6: z_hat, its level, time."""
    s_churn, s_tmin, s_tmax, s_noise = churn
    level = p.levels[i]
    gamma = min(s_churn / p.steps, 2**0.5 - 1) if s_tmin <= level <= s_tmax else 0.0
    if gamma == 0:
        return z, level, float(p.times[i])
    hat = level * (gamma + 1)
    z = z + s_noise * p.noise(CHURN, len(states)) * (hat**2 - level**2) ** 0.5
    states.append(p.scales(hat)[0] * z)
    return z, hat, p.time_of(hat)


def euler(p: Problem, x: Array, churn: tuple) -> list:
    """Algorithm 2 of Karras et al. without its correction, as in k-diffusion's sample_euler."""
    states: list = []
    z = x / p.alphas[0]
    for i in range(p.steps):
        z, level, t = _churn(p, z, i, states, churn)
        d = (z - p.denoised(z, level, t)) / level
        z = z + d * (p.levels[i + 1] - level)
        states.append(p.alphas[i + 1] * z)
    return states


def euler_ancestral(p: Problem, x: Array, eta: float, s_noise: float) -> list:
    """sample_euler_ancestral with get_ancestral_step."""
    states: list = []
    z = x / p.alphas[0]
    for i in range(p.steps):
        level, level_next = p.levels[i], p.levels[i + 1]
        up, down = 0.0, level_next
        if eta:
            up = eta * (level_next**2 * (level**2 - level_next**2) / level**2) ** 0.5
            up = min(level_next, up)
            down = (level_next**2 - up**2) ** 0.5
        d = (z - p.denoised(z, level, float(p.times[i]))) / level
        z = z + d * (down - level)
        if level_next > 0 and up:
            z = z + p.noise(STEP, i) * s_noise * up
        states.append(p.alphas[i + 1] * z)
    return states


def heun(p: Problem, x: Array, churn: tuple) -> list:
    """Karras et al. 2022, algorithm 2. From an infinite level the step is Euler's (DDIM)."""
    states: list = []
    z = x / p.alphas[0] if p.alphas[0] else x
    for i in range(p.steps):
        if math.isinf(p.levels[i]):
            x = ddim(_from(p, i, i + 1), z, 0.0)[0]
            states.append(x)
            z = x / p.alphas[i + 1]
            continue
        z, level, t = _churn(p, z, i, states, churn)
        level_next = p.levels[i + 1]
        d = (z - p.denoised(z, level, t)) / level
        z_next = z + (level_next - level) * d
        states.append(p.alphas[i + 1] * z_next)
        if level_next != 0:
            d_next = (z_next - p.denoised(z_next, level_next, float(p.times[i + 1]))) / level_next
            z_next = z + (level_next - level) * (d / 2 + d_next / 2)
            states.append(p.alphas[i + 1] * z_next)
        z = z_next
    return states


def flow_heun(p: Problem, x: Array, churn: tuple) -> list:
    """Heun's method on dx/dt = noise - x0 (rectified flow, Liu et al. 2022), churn as above."""
    states: list = []
    for i in range(p.steps):
        t, t_next = float(p.times[i]), float(p.times[i + 1])
        if math.isfinite(p.levels[i]):
            z, level, _ = _churn(p, x / (1 - t), i, states, churn)
            t = level / (1 + level)
            x = (1 - t) * z
        x0, eps = p.predict(x, t, 1 - t, t)
        v = eps - x0
        x_next = x + (t_next - t) * v
        states.append(x_next)
        if t_next != 0:
            x0, eps = p.predict(x_next, t_next, 1 - t_next, t_next)
            x_next = x + (t_next - t) * (v + (eps - x0)) / 2
            states.append(x_next)
        x = x_next
    return states


# --- Lu et al. 2022 (arXiv:2211.01095) ------------------------------------------------------


def dpmpp_2m(p: Problem, x: Array, solver_type: str) -> list:
    """Algorithm 2 ("midpoint"); "heun" puts equation 11's second coefficient, exact for a linear
    change, in its place. The first step and those with an infinite log-SNR are of first order."""
    states = []
    with np.errstate(divide="ignore"):
        lam = np.log(p.alphas) - np.log(p.sigmas)
    old = None
    for i in range(p.steps):
        t, alpha, sigma = p.at(i)
        _, alpha_next, sigma_next = p.at(i + 1)
        x0, _ = p.predict(x, t, alpha, sigma)
        h = lam[i + 1] - lam[i]
        first_order = i == 0 or not (math.isfinite(h) and math.isfinite(lam[i] - lam[i - 1]))
        if first_order:
            x = sigma_next / sigma * x - alpha_next * (math.exp(-h) - 1) * x0
        else:
            r = (lam[i] - lam[i - 1]) / h
            if solver_type == "midpoint":
                d = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * old
                x = sigma_next / sigma * x - alpha_next * (math.exp(-h) - 1) * d
            else:
                slope = (x0 - old) / r
                x = sigma_next / sigma * x - alpha_next * (math.exp(-h) - 1) * x0
                x = x + alpha_next * ((math.exp(-h) - 1) / h + 1) * slope
        old = x0
        states.append(x)
    return states


def dpmpp_2m_sde(p: Problem, x: Array, eta: float, s_noise: float, solver_type: str) -> list:
    """k-diffusion's sample_dpmpp_2m_sde, written with alpha and sigma. From an infinite log-SNR
    ratio the step is the limit of its first-order form, and so is the step after it."""
    states = []
    with np.errstate(divide="ignore"):
        lam = np.log(p.alphas) - np.log(p.sigmas)
    old = None
    for i in range(p.steps):
        t, alpha, sigma = p.at(i)
        _, alpha_next, sigma_next = p.at(i + 1)
        x0, _ = p.predict(x, t, alpha, sigma)
        if sigma_next == 0:
            x = x0
        else:
            h = lam[i + 1] - lam[i]
            eta_h = eta * h if eta else 0.0
            x = (
                sigma_next / sigma * math.exp(-eta_h) * x
                + alpha_next * -math.expm1(-h - eta_h) * x0
            )
            if old is not None and math.isfinite(lam[i - 1]):
                r = (lam[i] - lam[i - 1]) / h
                if solver_type == "heun":
                    weight = -math.expm1(-h - eta_h) / (-h - eta_h) + 1
                else:
                    weight = 0.5 * -math.expm1(-h - eta_h)
                x = x + alpha_next * weight * (1 / r) * (x0 - old)
            if eta:
                up = sigma_next * math.sqrt(-math.expm1(-2 * eta_h)) * s_noise
                x = x + p.noise(STEP, i) * up
        old = x0
        states.append(x)
    return states


def _from(p: Problem, first: int, last: int) -> Problem:
    part = slice(first, last + 1)
    cut = {k: getattr(p, k)[part] for k in ("times", "alphas", "sigmas")}
    return Problem(**{**p.__dict__, **cut})
