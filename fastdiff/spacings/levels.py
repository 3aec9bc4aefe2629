"""Spacings of levels: sigma/alpha, or t for a flow."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fastdiff.spacings._beta import beta_ppf
from fastdiff.spacings._rules import integer, positive, require, shapes

if TYPE_CHECKING:
    from fastdiff.schedules import Schedule

Array = NDArray[np.float64]


# --- ramps: n levels from high to low ---------------------------------------------------------


def karras(n: int, high: float, low: float, *, rho: float = 7.0) -> Array:
    """Karras et al. 2022 (arXiv:2206.00364), equation 5."""
    positive(rho=rho)
    top, bottom = high ** (1 / rho), low ** (1 / rho)
    return np.asarray((top + np.linspace(0.0, 1.0, n) * (bottom - top)) ** rho)


def exponential(n: int, high: float, low: float) -> Array:
    """Uniform in the logarithm; diffusers' `use_lu_lambdas` on its own ends is the same."""
    ramp = np.linspace(0.0, 1.0, n)
    return np.asarray(np.exp(math.log(high) + ramp * (math.log(low) - math.log(high))))


def polyexponential(n: int, high: float, low: float, *, rho: float = 1.0) -> Array:
    """k-diffusion's: the logarithm falls as a power, log low + u^rho log(high/low), u from 1."""
    positive(rho=rho)
    ramp = np.linspace(1.0, 0.0, n) ** rho
    return np.asarray(np.exp(ramp * math.log(high / low) + math.log(low)))


def laplace(n: int, high: float, low: float, *, mu: float = 0.0, beta: float = 0.5) -> Array:
    """Hang et al. 2024 (arXiv:2407.03297), quantiles of a Laplace density of log(sigma/alpha).

    As ComfyUI's get_sigmas_laplace has it: centre `mu`, scale `beta`, clamped to [low, high], with
    1e-5 inside the logarithm, so that many points coincide at the ends and are refused.
    """
    positive(beta=beta)
    away = 0.5 - np.linspace(0.0, 1.0, n)
    logs = mu - beta * np.sign(away) * np.log(1 - 2 * np.abs(away) + 1e-5)
    return np.clip(np.exp(logs), low, high)


def kl_optimal(n: int, high: float, low: float) -> Array:
    """Uniform in arctan: Sabour et al. 2024 (arXiv:2404.14507), their closed form for a Gaussian.

    With `final="zero"` it is ComfyUI's kl_optimal (n levels and 0), with "sigma_min" A1111's (n + 1
    levels, none of them 0).
    """
    ramp = np.linspace(0.0, 1.0, n)
    return np.asarray(np.tan(ramp * math.atan(low) + (1 - ramp) * math.atan(high)))


def beta_levels(n: int, high: float, low: float, *, alpha: float = 0.6, beta: float = 0.6) -> Array:
    """Lee et al. 2024 (arXiv:2407.12173), as diffusers' use_beta_sigmas and A1111 have it: the
    quantiles of Beta(alpha, beta), uniform probabilities from 1 to 0, laid on the levels.
    """
    shapes(alpha, beta)
    part = np.array([beta_ppf(p, alpha, beta) for p in 1 - np.linspace(0.0, 1.0, n)])
    return np.asarray(low + part * (high - low))


RAMPS: dict[str, Callable[..., Array]] = {
    "karras": karras,
    "exponential": exponential,
    "polyexponential": polyexponential,
    "laplace": laplace,
    "kl_optimal": kl_optimal,
    "beta@diffusers": beta_levels,
}


def ramp(
    s: Schedule,
    n: int,
    to_zero: bool,
    name: str,
    others: tuple[str, ...],
    options: dict[str, float],
) -> Array:
    """The ramp of a name; `others` need no finite level and take a shift."""
    if s.kind == "flow":
        # the ramp has its own density of points, so a shift could only be ignored
        rule = f"be one of {others} for a flow with shift={s.shift}"
        require(s.shift == 1, "points", "spacing", rule, repr(name))
        high, low = s.t_max, s.t_min
    else:
        high, low = float(s.ratio(s.t_max)), float(s.ratio(s.t_min))
    rule = f"be one of {others} where sigma/alpha is infinite at t_max"
    require(math.isfinite(high), "points", "spacing", rule, repr(name))
    levels = RAMPS[name](n if to_zero else n + 1, high, low, **options)
    if name != "laplace":  # whose ends are where its quantiles are
        levels[0] = high
        if len(levels) > 1:
            levels[-1] = low
    return levels if s.kind == "flow" else times_of(s, levels)


def times_of(s: Schedule, levels: Array) -> Array:
    """The times of levels, the ends exactly: a rounding error there would leave the domain.

    A list of levels in float32 is off by up to 1e-6 of itself, which counts as the end too.
    """
    high, low = float(s.ratio(s.t_max)), float(s.ratio(s.t_min))
    inside = (levels >= low * (1 - 1e-6)) & (levels <= high * (1 + 1e-6))
    rule = f"have sigma/alpha in [{low:.6g}, {high:.6g}], the schedule's range"
    require(inside.all(), "points", "grid", rule, f"{levels.max():.6g} ... {levels.min():.6g}")
    times = s.time(levels)
    times = np.where(np.abs(levels - high) <= 1e-6 * high, s.t_max, times)
    return np.where(np.abs(levels - low) <= 1e-6 * low, s.t_min, times)


# --- levels of their own ----------------------------------------------------------------------


def vp(
    s: Schedule, n: int, to_zero: bool,
    *, beta_d: float = 19.9, beta_min: float = 0.1, eps_s: float = 1e-3,
) -> Array:  # fmt: skip
    """k-diffusion's get_sigmas_vp: t uniform from 1 to `eps_s` in Song et al. 2021
    (arXiv:2011.13456), equation 33, sigma^2 = exp(beta_d t^2/2 + beta_min t) - 1.

    Its levels are its own; where the schedule has not such levels it is refused.
    """
    positive(beta_d=beta_d, beta_min=beta_min)
    require(0 < eps_s < 1, "points", "eps_s", "obey 0 < eps_s < 1", eps_s)
    t = np.linspace(1.0, eps_s, n if to_zero else n + 1)
    return times_of(s, np.sqrt(np.expm1(beta_d * t**2 / 2 + beta_min * t)))


# Sabour et al. 2024 (arXiv:2404.14507): levels sigma/alpha of ten steps, as its authors publish
# them (research.nvidia.com/labs/toronto-ai/AlignYourSteps/howto.html)
AYS = {
    "ays@sd1": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "ays@sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    "ays@svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}


def align_your_steps(s: Schedule, n: int, to_zero: bool, name: str) -> Array:
    """Ten published steps, others by interpolation of the logarithms over the step number.

    The last level is the 0 of `final="zero"` (ComfyUI, diffusers); A1111 puts 0 after it.
    """
    table = np.array(AYS[name])
    ends = float(s.ratio(s.t_max)), float(s.ratio(s.t_min))
    # three decimals are published: 0.029 is 0.02917
    fits = abs(ends[0] / table[0] - 1) < 1e-2 and abs(ends[1] / table[-1] - 1) < 1e-2
    rule = f"have sigma/alpha from {table[0]} to {table[-1]} for {name!r}"
    require(fits, "points", "schedule", rule, f"{ends[0]:.6g} to {ends[1]:.6g}")
    at = np.linspace(0.0, len(table) - 1.0, n + 1)
    levels = np.exp(np.interp(at, np.arange(len(table)), np.log(table)))
    levels[0], levels[-1] = ends
    times = times_of(s, levels)
    return times[:-1] if to_zero else times


def linear_quadratic(
    s: Schedule, n: int, to_zero: bool,
    *, threshold_noise: float = 0.025, linear_steps: int | None = None,
) -> Array:  # fmt: skip
    """Genmo's Mochi: 1 - t grows evenly to `threshold_noise` in the first `linear_steps` (half of
    them unless told), then as a parabola that joins on smoothly and ends at 1.
    """
    require(s.shift == 1, "points", "spacing", "be 'linspace' for a shifted flow", s.shift)
    require(0 < threshold_noise < 1, "points", "threshold_noise", "lie in (0, 1)", threshold_noise)
    first = n // 2 if linear_steps is None else integer("points", "linear_steps", linear_steps, 1)
    if n == 1:
        return np.array([1.0]) if to_zero else np.array([1.0, s.t_min])
    require(first < n, "points", "linear_steps", f"be below steps={n}", first)
    slope, rest = threshold_noise / first, n - first
    excess = first - threshold_noise * n
    a = excess / (first * rest**2)
    i = np.arange(n + 1.0)
    parabola = a * i**2 + (slope - 2 * excess / rest**2) * i + a * first**2
    times = 1 - np.where(i < first, slope * i, parabola)
    times[-1] = s.t_min
    return times[:-1] if to_zero else times
