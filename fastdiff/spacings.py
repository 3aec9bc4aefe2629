"""Where the points of a grid lie: the rules behind `Schedule.points`, in float64.

A rule is named by its origin where two projects mean different numbers by one word. A ramp places
levels sigma/alpha (times t on a flow); a rule of times places indices of a schedule's table of T
noise levels, which for a flow is u = 1/T, ..., 1 warped by its shift, as ComfyUI has it.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastdiff._beta import beta_ppf

if TYPE_CHECKING:
    from fastdiff.schedules import Schedule

Array = NDArray[np.float64]

# the spacings of each kind of schedule, its default first
SPACINGS: dict[str, tuple[str, ...]] = {
    "discrete": (
        "trailing", "linspace", "leading", "karras", "exponential", "polyexponential", "laplace",
        "kl_optimal", "vp", "beta@diffusers", "beta@comfy", "normal", "sgm_uniform", "simple",
        "ddim_uniform", "ays@sd1", "ays@sdxl",
    ),
    "edm": (
        "karras", "exponential", "polyexponential", "laplace", "kl_optimal", "vp",
        "beta@diffusers", "ays@svd",
    ),
    "flow": (
        "linspace", "karras", "exponential", "polyexponential", "kl_optimal", "beta@diffusers",
        "beta@comfy", "normal", "sgm_uniform", "simple", "ddim_uniform", "linear_quadratic",
    ),
}  # fmt: skip


def _require(ok: bool | np.bool_, where: str, argument: str, rule: str, got: object) -> None:
    if not ok:
        raise ValueError(f"schedules.{where}: {argument} must {rule}, got {got}")


def _integer(where: str, name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not hasattr(type(value), "__index__"):
        raise TypeError(f"schedules.{where}: {name} must be an int, got {value!r}")
    number = operator.index(value)
    _require(number >= least, where, name, f"be >= {least}", value)
    return number


def _positive(**options: float) -> None:
    for name, value in options.items():
        _require(0 < value < math.inf, "points", name, "be > 0 and finite", value)


def _shapes(alpha: float, beta: float) -> None:
    for name, value in (("alpha", alpha), ("beta", beta)):
        _require(0.1 <= value <= 1000, "points", name, "lie in [0.1, 1000]", value)


# --- ramps: n levels from high to low ---------------------------------------------------------


def karras(n: int, high: float, low: float, *, rho: float = 7.0) -> Array:
    """Karras et al. 2022 (arXiv:2206.00364), equation 5."""
    _positive(rho=rho)
    top, bottom = high ** (1 / rho), low ** (1 / rho)
    return np.asarray((top + np.linspace(0.0, 1.0, n) * (bottom - top)) ** rho)


def exponential(n: int, high: float, low: float) -> Array:
    """Uniform in the logarithm; diffusers' `use_lu_lambdas` on its own ends is the same."""
    ramp = np.linspace(0.0, 1.0, n)
    return np.asarray(np.exp(math.log(high) + ramp * (math.log(low) - math.log(high))))


def polyexponential(n: int, high: float, low: float, *, rho: float = 1.0) -> Array:
    """k-diffusion's: the logarithm falls as a power, log low + u^rho log(high/low), u from 1."""
    _positive(rho=rho)
    ramp = np.linspace(1.0, 0.0, n) ** rho
    return np.asarray(np.exp(ramp * math.log(high / low) + math.log(low)))


def laplace(n: int, high: float, low: float, *, mu: float = 0.0, beta: float = 0.5) -> Array:
    """Hang et al. 2024 (arXiv:2407.03297), quantiles of a Laplace density of log(sigma/alpha).

    As ComfyUI's get_sigmas_laplace has it: centre `mu`, scale `beta`, clamped to [low, high], with
    1e-5 inside the logarithm, so that many points coincide at the ends and are refused.
    """
    _positive(beta=beta)
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
    _shapes(alpha, beta)
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


def _ramp(s: Schedule, n: int, to_zero: bool, name: str, options: dict[str, float]) -> Array:
    if s.kind == "flow":
        # the ramp has its own density of points, so a shift could only be ignored
        rule = f"be one of {_allowed('flow', _OF_TIMES)} for a flow with shift={s.shift}"
        _require(s.shift == 1, "points", "spacing", rule, repr(name))
        high, low = s.t_max, s.t_min
    else:
        high, low = float(s.ratio(s.t_max)), float(s.ratio(s.t_min))
    rule = f"be one of {_allowed('discrete', _OF_TIMES)} where sigma/alpha is infinite at t_max"
    _require(math.isfinite(high), "points", "spacing", rule, repr(name))
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
    _require(inside.all(), "points", "grid", rule, f"{levels.max():.6g} ... {levels.min():.6g}")
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
    _positive(beta_d=beta_d, beta_min=beta_min)
    _require(0 < eps_s < 1, "points", "eps_s", "obey 0 < eps_s < 1", eps_s)
    t = np.linspace(1.0, eps_s, n if to_zero else n + 1)
    return times_of(s, np.sqrt(np.expm1(beta_d * t**2 / 2 + beta_min * t)))


# Sabour et al. 2024 (arXiv:2404.14507): levels sigma/alpha of ten steps, as its authors publish
# them (research.nvidia.com/labs/toronto-ai/AlignYourSteps/howto.html)
AYS = {
    "ays@sd1": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "ays@sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    "ays@svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}


def _ays(s: Schedule, n: int, to_zero: bool, name: str) -> Array:
    """Ten published steps, others by interpolation of the logarithms over the step number.

    The last level is the 0 of `final="zero"` (ComfyUI, diffusers); A1111 puts 0 after it.
    """
    table = np.array(AYS[name])
    ends = float(s.ratio(s.t_max)), float(s.ratio(s.t_min))
    # three decimals are published: 0.029 is 0.02917
    fits = abs(ends[0] / table[0] - 1) < 1e-2 and abs(ends[1] / table[-1] - 1) < 1e-2
    rule = f"have sigma/alpha from {table[0]} to {table[-1]} for {name!r}"
    _require(fits, "points", "schedule", rule, f"{ends[0]:.6g} to {ends[1]:.6g}")
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
    _require(s.shift == 1, "points", "spacing", "be 'linspace' for a shifted flow", s.shift)
    _require(0 < threshold_noise < 1, "points", "threshold_noise", "lie in (0, 1)", threshold_noise)
    first = n // 2 if linear_steps is None else _integer("points", "linear_steps", linear_steps, 1)
    if n == 1:
        return np.array([1.0]) if to_zero else np.array([1.0, s.t_min])
    _require(first < n, "points", "linear_steps", f"be below steps={n}", first)
    slope, rest = threshold_noise / first, n - first
    excess = first - threshold_noise * n
    a = excess / (first * rest**2)
    i = np.arange(n + 1.0)
    parabola = a * i**2 + (slope - 2 * excess / rest**2) * i + a * first**2
    times = 1 - np.where(i < first, slope * i, parabola)
    times[-1] = s.t_min
    return times[:-1] if to_zero else times


# --- times: indices 0 to T-1 of the table of noise levels -------------------------------------


def linspace(s: Schedule, n: int, to_zero: bool, *, shift_terminal: float | None = None) -> Array:
    """Integer times from T-1 to 0; of a flow, from 1 to 0 before the shift.

    `shift_terminal` (flows with `final="zero"`) stretches 1 - t so that the last time above 0 is
    that, as LTX-Video and diffusers have it.
    """
    if s.kind == "flow":
        # the last point is t_min itself after the warp, so it is unwarped first
        last = 0.0 if to_zero else s.t_min / (s.shift + (1 - s.shift) * s.t_min)
        times = _warp(s, np.linspace(1.0, last, n + 1))
        times[-1] = 0.0 if to_zero else s.t_min
        if shift_terminal is not None:
            rule = "lie in (0, 1), with final='zero' and at least two steps"
            fits = 0 < shift_terminal < 1 and to_zero and n > 1
            _require(fits, "points", "shift_terminal", rule, shift_terminal)
            times[:-1] = 1 - (1 - times[:-1]) * ((1 - shift_terminal) / (1 - times[-2]))
        return times
    rule = "be left out unless the schedule is a flow"
    _require(shift_terminal is None, "points", "shift_terminal", rule, shift_terminal)
    count = n if to_zero else n + 1
    total = _enough(s, n, count, "linspace")
    # one point is the noisiest; np.linspace would give the least noisy
    return np.linspace(0, total - 1, count).round()[::-1] if count > 1 else np.array([total - 1.0])


def leading(s: Schedule, n: int, to_zero: bool, *, steps_offset: int = 0) -> Array:
    count = n if to_zero else n + 1
    total = _enough(s, n, count, "leading")
    times = (np.arange(count) * (total // count))[::-1].astype(np.float64) + steps_offset
    rule = f"keep the times below {total}, and be 0 with final='sigma_min'"
    fits = times[0] < total and (to_zero or not steps_offset)
    _require(fits, "points", "steps_offset", rule, steps_offset)
    return times


def trailing(s: Schedule, n: int, to_zero: bool) -> Array:
    total = _enough(s, n, n, "trailing")
    # as diffusers writes it, sums and all, so that halves round the same way
    times = np.round(np.arange(total, 0, -total / n))[:n] - 1
    return times if to_zero else np.append(times, s.t_min)


def simple(s: Schedule, n: int, to_zero: bool, *, T: int = 1000) -> Array:
    """ComfyUI's simple_scheduler: every T/n-th level of the table, rounded down, from the top."""
    total = _table(s, T)
    _require(n <= total, "points", "steps", f"be at most {total} for spacing='simple'", n)
    index = total - 1 - np.array([int(i * (total / n)) for i in range(n)], np.float64)
    return _of_table(s, index, total, to_zero)


def ddim_uniform(s: Schedule, n: int, to_zero: bool, *, T: int = 1000) -> Array:
    """ComfyUI's ddim_scheduler: every (T//n)-th level of the table, counted up from index 1.

    Where T//n steps do not fill the table it has more levels than asked for, and is refused.
    """
    total = _table(s, T)
    index = np.arange(1, total, max(total // n, 1), dtype=np.float64)[::-1]
    rule = f"be such that T // steps fits into T = {total} that often, for 'ddim_uniform'"
    _require(len(index) == n, "points", "steps", rule, f"{n}, which gives {len(index)} steps")
    return _of_table(s, index, total, to_zero)


def normal(s: Schedule, n: int, to_zero: bool, *, T: int = 1000) -> Array:
    """ComfyUI's normal_scheduler: uniform (fractional) times from the top of the table to its end.

    On a flow the end is the table's lowest level, warped again on the way back: the grid of
    diffusers' FlowMatchEulerDiscreteScheduler, where that is so too.
    """
    return _uniform(s, n if to_zero else n + 1, 0, to_zero, T)


def sgm_uniform(s: Schedule, n: int, to_zero: bool, *, T: int = 1000) -> Array:
    """As `normal` with one point more, whose last is left out (Stability's generative-models)."""
    times = _uniform(s, n + 1, 1, to_zero, T)
    return times if to_zero else np.append(times, s.t_min)


def beta_times(
    s: Schedule, n: int, to_zero: bool, *, alpha: float = 0.6, beta: float = 0.6, T: int = 1000
) -> Array:
    """ComfyUI's beta_scheduler: quantiles of Beta(alpha, beta) of the probabilities 1, ..., 1/n,
    rounded to whole indices of the table. Where two coincide ComfyUI drops one and returns fewer
    steps; here that is refused.
    """
    _shapes(alpha, beta)
    total = _table(s, T)
    quantiles = [beta_ppf(p, alpha, beta) for p in 1 - np.linspace(0.0, 1.0, n, endpoint=False)]
    return _of_table(s, np.rint(np.array(quantiles) * (total - 1)), total, to_zero)


def _enough(s: Schedule, steps: int, count: int, name: str) -> int:
    total = int(s.t_max) + 1
    rule = f"be at most {total - count + steps} for spacing={name!r}"
    _require(count <= total, "points", "steps", rule, steps)
    return total


def _warp(s: Schedule, u: Array) -> Array:
    return np.asarray(s.shift * u / (1 + (s.shift - 1) * u))


def _table(s: Schedule, T: int) -> int:
    """The number of noise levels in a model's table."""
    return int(s.t_max) + 1 if s.kind == "discrete" else _integer("points", "T", T, 2)


def _of_table(s: Schedule, index: Array, total: int, to_zero: bool) -> Array:
    times = index if s.kind == "discrete" else _warp(s, (index + 1) / total)
    return times if to_zero else np.append(times, s.t_min)


def _uniform(s: Schedule, count: int, drop: int, to_zero: bool, T: int) -> Array:
    total = _table(s, T)
    if s.kind == "discrete":
        times = np.linspace(total - 1.0, 0.0, count)
    else:
        lowest = float(_warp(s, np.array(1 / total)))
        times = _warp(s, np.linspace(1.0, lowest, count))
        if not to_zero and not drop:
            times[-1] = s.t_min
    return times[: count - drop]


_OF_TIMES: dict[str, Callable[..., Array]] = {
    "linspace": linspace,
    "leading": leading,
    "trailing": trailing,
    "beta@comfy": beta_times,
    "normal": normal,
    "sgm_uniform": sgm_uniform,
    "simple": simple,
    "ddim_uniform": ddim_uniform,
}
_OTHER: dict[str, Callable[..., Array]] = {"vp": vp, "linear_quadratic": linear_quadratic}


def _allowed(kind: str, among: Iterable[str]) -> tuple[str, ...]:
    return tuple(name for name in SPACINGS[kind] if name in among)


def options_of(name: str) -> tuple[str, ...]:
    """The options that a spacing takes."""
    rule = RAMPS.get(name) or _OF_TIMES.get(name) or _OTHER.get(name)
    if rule is None:  # a published table has none
        return ()
    named = inspect.signature(rule).parameters.values()
    return tuple(p.name for p in named if p.kind is p.KEYWORD_ONLY)


OPTIONS = tuple(
    dict.fromkeys(o for names in SPACINGS.values() for name in names for o in options_of(name))
)


def times(s: Schedule, n: int, name: str, to_zero: bool, options: dict[str, Any]) -> Array:
    """n + 1 falling times, or n where clean data is to follow."""
    unknown = sorted(set(options) - set(options_of(name)))
    if unknown:
        among = [x for x in SPACINGS[s.kind] if unknown[0] in options_of(x)]
        rule = f"be left out unless spacing is one of {among}"
        _require(False, "points", unknown[0], rule, options[unknown[0]])
    if name in RAMPS:
        return _ramp(s, n, to_zero, name, options)
    if name in AYS:
        return _ays(s, n, to_zero, name)
    return (_OF_TIMES.get(name) or _OTHER[name])(s, n, to_zero, **options)
