"""Noise schedules in float64: x_t = alpha(t) * x_0 + sigma(t) * noise.

Three kinds of time:

- `discrete`: t in [0, T-1], t = 0 the least noisy; t = -1 is clean data (alpha 1, sigma 0), the
  convention alphabar_{-1} = 1. Between integers log(sigma/alpha) is interpolated linearly.
- `edm`: t is the standard deviation sigma itself and alpha is 1; clean data at t = 0.
- `flow`: t in [0, 1], alpha = 1 - t and sigma = t; clean data at t = 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastdiff import spacings
from fastdiff.spacings import SPACINGS
from fastdiff.spacings._rules import integer as _integer
from fastdiff.spacings._rules import require as _require

__all__ = [
    "NAMES", "SPACINGS", "Grid", "Schedule", "cosine", "dynamic_shift", "edm", "flow",
    "from_betas", "from_config", "linear", "rescale_zero_terminal_snr", "scaled_linear", "sigmoid",
]  # fmt: skip

Array = NDArray[np.float64]


def _frozen(values: ArrayLike) -> Array:
    array = np.array(values, dtype=np.float64)
    array.flags.writeable = False
    return array


@dataclass(frozen=True, eq=False)
class Grid:
    """The strictly decreasing times a solver visits, with alpha and sigma there.

    Each is read-only float64 `(steps + 1,)`, noisiest first.
    """

    times: Array
    alphas: Array
    sigmas: Array


@dataclass(frozen=True)
class Schedule:
    """A noise schedule; build one with `linear()`, `cosine()`, `edm()`, `flow()`, ...

    Args:
        name: the builder's name, a key of `NAMES`.
        kind: what t means, see the module.
        params: the builder's arguments, enough to build the schedule again.
        alphas_cumprod: read-only float64 `(T,)` of alphabar for a discrete schedule, else None.
        sigma_min: least noisy t of the continuous kinds (edm, flow).
        sigma_max: noisiest t of the continuous kinds.
        sigma_data: standard deviation of the data, for EDM's preconditioning.
        shift: flow only: grids are warped by t' = shift * t / (1 + (shift - 1) * t).
    """

    name: str
    kind: Literal["discrete", "edm", "flow"]
    params: tuple[tuple[str, Any], ...]
    alphas_cumprod: Array | None = field(default=None, repr=False, compare=False)
    sigma_min: float = 0.0
    sigma_max: float = 1.0
    sigma_data: float = 0.5
    shift: float = 1.0

    @property
    def t_min(self) -> float:
        """The least noisy time that is not clean data."""
        return 0.0 if self.kind == "discrete" else self.sigma_min

    @property
    def t_max(self) -> float:
        """The noisiest time."""
        return self.sigma_max if self.alphas_cumprod is None else len(self.alphas_cumprod) - 1.0

    @property
    def t_clean(self) -> float:
        """The time of clean data, where a grid with `final="zero"` ends."""
        return -1.0 if self.kind == "discrete" else 0.0

    @property
    def init_sigma(self) -> float:
        """Standard deviation of the initial x."""
        return self.sigma_max if self.kind == "edm" else 1.0

    @property
    def betas(self) -> Array:
        """`(T,)` float64, 1 - alphabar_t / alphabar_{t-1}; discrete schedules only."""
        abar = self._abar("betas")
        return _frozen(1 - abar / np.concatenate([[1.0], abar[:-1]]))

    def alpha(self, t: ArrayLike) -> Array:
        """Signal scale at `t` (any shape); float64 of the same shape."""
        return self._scales("alpha", t)[0]

    def sigma(self, t: ArrayLike) -> Array:
        """Noise scale at `t` (any shape); float64 of the same shape."""
        return self._scales("sigma", t)[1]

    def ratio(self, t: ArrayLike) -> Array:
        """sigma(t) / alpha(t): the noise level as k-diffusion counts it; inf where alpha is 0."""
        alpha, sigma = self._scales("ratio", t)
        with np.errstate(divide="ignore"):
            return np.divide(sigma, alpha)

    def time(self, ratio: ArrayLike) -> Array:
        """The time where sigma/alpha equals `ratio` (any shape, >= 0); inverts `ratio`.

        For a discrete schedule the result is fractional and is clipped to [0, T-1], as in
        k-diffusion.
        """
        r = np.asarray(ratio, np.float64)
        _require((r >= 0).all(), "time", "ratio", "be >= 0", ratio)
        if self.kind == "edm":
            return r.copy()
        if self.kind == "flow":
            return np.divide(r, 1 + r, out=np.ones_like(r), where=r < np.inf)
        logs = self._logs()
        with np.errstate(divide="ignore", invalid="ignore"):
            log_r = np.log(r)
            low = np.clip(np.searchsorted(logs, log_r, side="right") - 1, 0, len(logs) - 2)
            # 0 where logs[low + 1] is infinite: every finite ratio is then at `low`
            part = np.clip((log_r - logs[low]) / (logs[low + 1] - logs[low]), 0, 1)
        return np.where(log_r >= logs[-1], len(logs) - 1.0, low + part)

    def points(
        self,
        steps: int,
        spacing: str | None = None,
        final: Literal["zero", "sigma_min"] = "zero",
        *,
        rho: float | None = None,
        steps_offset: int = 0,
        **options: Any,
    ) -> Grid:
        """The grid for `steps` intervals: always `steps + 1` points, or an error that says why not.

        Args:
            steps: number of intervals, >= 1 (and <= T for the integer spacings).
            spacing: None for the kind's default, the first of `SPACINGS[kind]`.
                "linspace", "leading", "trailing" of a discrete schedule are the integer times of
                Lin et al. 2023 (arXiv:2305.08891), table 2, rounded as diffusers' DDIM does.
                "linspace" of a flow runs from 1 to 0 and is warped by `shift`.
                The others are the functions of `fastdiff.spacings`, of sigma/alpha or, for a flow,
                of t (sigma/alpha is infinite at t = 1); a name with @ says whose of several it is.
            final: "zero" ends at clean data, "sigma_min" at `t_min` ("vp" and "laplace" at a
                lowest level of their own).
            rho: exponent of "karras" (7 unless told) and "polyexponential" (1).
            steps_offset: added to the times of "leading" (Stable Diffusion 1 uses 1).
            options: of the spacing.

        Raises:
            TypeError: `steps` is not an int. ValueError: a rule is broken, or points coincide.
        """
        n, allowed = _integer("points", "steps", steps, 1), SPACINGS[self.kind]
        spacing = allowed[0] if spacing is None else spacing
        rule = f"be one of {allowed} for kind {self.kind!r}"
        _require(spacing in allowed, "points", "spacing", rule, repr(spacing))
        to_zero = self._to_zero(final)
        offset = _integer("points", "steps_offset", steps_offset, 0)
        rule = "be 0 unless spacing is 'leading'"
        _require(not offset or spacing == "leading", "points", "steps_offset", rule, offset)
        if offset:
            options["steps_offset"] = offset
        if rho is not None and "rho" in spacings.options_of(spacing):
            options["rho"] = rho
        times = spacings.points(self, n, spacing, to_zero, options)
        return self._grid(times, to_zero, f"steps={n}, spacing={spacing!r}, final={final!r}")

    def custom(
        self,
        *,
        sigmas: ArrayLike | None = None,
        timesteps: ArrayLike | None = None,
        final: Literal["zero", "sigma_min"] = "zero",
    ) -> Grid:
        """The grid of given points, noisiest first.

        Args:
            sigmas: levels sigma/alpha, as k-diffusion counts them (times t for a flow, whose
                sigma is t).
            timesteps: times of the schedule; exactly one of the two is given.
            final: "zero" ends at clean data, which is added where the list does not end there
                itself (k-diffusion's lists do, those of diffusers do not); "sigma_min" takes the
                list as it is.

        Raises:
            ValueError: a point lies outside the schedule, or they do not fall.
        """
        one = (sigmas is None) != (timesteps is None)
        _require(one, "custom", "sigmas, timesteps", "be one list, not two", "two or none")
        to_zero = self._to_zero(final)
        times = np.array(timesteps if sigmas is None else sigmas, np.float64)
        _require(times.ndim == 1 and times.size > 0, "custom", "list", "be flat", times.shape)
        _require(np.isfinite(times).all(), "custom", "list", "be finite", times)
        if sigmas is not None and self.kind == "discrete":
            _require((times >= 0).all(), "custom", "sigmas", "be >= 0", times.min())
            times[times == 0] = self.t_clean
            times[times > 0] = spacings.times_of(self, times[times > 0])
        add = to_zero and times[-1] != self.t_clean
        return self._grid(times, add, "the given list")

    def _to_zero(self, final: str) -> bool:
        rule = "be 'zero' or 'sigma_min'"
        _require(final in ("zero", "sigma_min"), "points", "final", rule, final)
        return final == "zero"

    def _grid(self, times: Array, add_clean: bool, what: str) -> Grid:
        if add_clean and times[-1] != self.t_clean:
            times = np.append(times, self.t_clean)
        _require(len(times) > 1, "points", "times", "be at least two", f"one for {what}")
        got = f"points that coincide or rise for {what}"
        _require((np.diff(times) < 0).all(), "points", "times", "strictly decrease", got)
        return Grid(_frozen(times), *map(_frozen, self._scales("points", times)))

    def to_config(self) -> dict[str, Any]:
        """A JSON-able dict from which `from_config` builds an equal schedule."""
        config: dict[str, Any] = {"name": self.name}
        for key, value in self.params:
            value = value.to_config() if isinstance(value, Schedule) else value
            config[key] = list(value) if isinstance(value, tuple) else value
        return config

    def _abar(self, what: str) -> Array:
        abar = self.alphas_cumprod
        if abar is None:
            raise ValueError(f"schedules.{what}: kind must be 'discrete', got {self.kind!r}")
        return abar

    def _logs(self) -> Array:
        """log(sigma/alpha) at the integers; increasing, the last may be inf."""
        abar = self._abar("ratio")
        with np.errstate(divide="ignore"):
            return np.asarray(0.5 * (np.log1p(-abar) - np.log(abar)))

    def _scales(self, where: str, times: ArrayLike) -> tuple[Array, Array]:
        """alpha and sigma at `times`."""
        t = np.array(times, dtype=np.float64)
        high = math.inf if self.kind == "edm" else self.t_max
        inside = ((t >= 0) & (t <= high)) | (t == self.t_clean)
        rule = f"be {self.t_clean:g} or in [0, {high:g}]"
        _require(inside.all(), where, "t", rule, times)
        if self.kind == "edm":
            return np.ones_like(t), t
        if self.kind == "flow":
            return 1 - t, t
        abar, logs = self._abar(where), self._logs()
        low = np.minimum(np.maximum(t, 0).astype(np.int64), len(abar) - 1)
        high_index, part = np.minimum(low + 1, len(abar) - 1), t - low
        whole, at = t == np.floor(t), np.where(t < 0, 1.0, abar[low])
        with np.errstate(divide="ignore", invalid="ignore"):
            # at whole t the product may be 0 * inf; np.where then takes the exact value
            r = np.exp((1 - part) * logs[low] + part * logs[high_index])
            alpha = np.where(whole, np.sqrt(at), 1 / np.hypot(1, r))
            sigma = np.where(whole, np.sqrt(1 - at), 1 / np.hypot(1, 1 / r))
        return alpha, sigma


def _from_abar(name: str, params: dict[str, Any], abar: NDArray[Any]) -> Schedule:
    falls = (np.diff(abar) < 0).all() and 0 < abar[0] < 1 and abar[-1] >= 0
    rule = "fall strictly, from below 1 to 0 or more"
    _require(falls, name, "alphabar", rule, f"{abar[0]} ... {abar[-1]}")
    return Schedule(name, "discrete", tuple(params.items()), _frozen(abar))


def _beta_range(name: str, T: int, start: float, end: float) -> dict[str, Any]:
    """The arguments that three builders share, checked."""
    T = _integer(name, "T", T, 2)
    rule = "obey 0 < beta_start <= beta_end < 1"
    _require(0 < start <= end < 1, name, "beta_start, beta_end", rule, (start, end))
    return {"T": T, "beta_start": start, "beta_end": end}


def linear(T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
    """Betas uniform from `beta_start` to `beta_end`: Ho et al. 2020 (arXiv:2006.11239), sec. 4."""
    params = _beta_range("linear", T, beta_start, beta_end)
    return _from_abar("linear", params, np.cumprod(1 - np.linspace(beta_start, beta_end, T)))


def scaled_linear(T: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> Schedule:
    """Square roots of betas uniform: latent diffusion, Rombach et al. 2022 (arXiv:2112.10752)."""
    params = _beta_range("scaled_linear", T, beta_start, beta_end)
    roots = np.linspace(beta_start**0.5, beta_end**0.5, T)
    return _from_abar("scaled_linear", params, np.cumprod(1 - roots**2))


def sigmoid(T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
    """Betas along a logistic curve over [-6, 6], as GeoDiff (Xu et al. 2022, arXiv:2203.02923)
    and diffusers' DDPM "sigmoid" have it; not the logistic alphabar of Jabri et al. 2022.
    """
    params = _beta_range("sigmoid", T, beta_start, beta_end)
    betas = beta_start + (beta_end - beta_start) / (1 + np.exp(-np.linspace(-6, 6, T)))
    return _from_abar("sigmoid", params, np.cumprod(1 - betas))


def cosine(T: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> Schedule:
    """Nichol & Dhariwal 2021 (arXiv:2102.09672), equation 17, betas clipped at `max_beta`."""
    T = _integer("cosine", "T", T, 2)
    rule = "obey s >= 0 and 0 < max_beta < 1"
    _require(s >= 0 and 0 < max_beta < 1, "cosine", "s, max_beta", rule, (s, max_beta))
    f = np.cos((np.arange(T + 1) / T + s) / (1 + s) * (np.pi / 2)) ** 2
    params = {"T": T, "s": s, "max_beta": max_beta}
    return _from_abar("cosine", params, np.cumprod(1 - np.minimum(1 - f[1:] / f[:-1], max_beta)))


def from_betas(betas: ArrayLike) -> Schedule:
    """The discrete schedule of the given betas `(T,)`, each in (0, 1]; only the last may be 1."""
    b = np.array(betas, dtype=np.float64)
    _require(b.ndim == 1 and b.size > 1, "from_betas", "betas", "have shape (T,), T >= 2", b.shape)
    inside = (b > 0).all() and (b[:-1] < 1).all() and b[-1] <= 1
    rule = "lie in (0, 1), the last in (0, 1]"
    _require(inside, "from_betas", "betas", rule, f"{b.min()} ... {b.max()}")
    return _from_abar("from_betas", {"betas": tuple(b.tolist())}, np.cumprod(1 - b))


def edm(sigma_min: float = 0.002, sigma_max: float = 80.0, sigma_data: float = 0.5) -> Schedule:
    """Variance exploding, t = sigma: Karras et al. 2022 (arXiv:2206.00364), table 1."""
    fits = 0 < sigma_min < sigma_max < math.inf and 0 < sigma_data < math.inf
    rule = "obey 0 < sigma_min < sigma_max and 0 < sigma_data, all finite"
    params = {"sigma_min": sigma_min, "sigma_max": sigma_max, "sigma_data": sigma_data}
    _require(fits, "edm", ", ".join(params), rule, tuple(params.values()))
    return Schedule("edm", "edm", tuple(params.items()), None, sigma_min, sigma_max, sigma_data)


def flow(shift: float = 1.0, sigma_min: float = 1e-3) -> Schedule:
    """Straight paths, x_t = (1 - t) x_0 + t noise: rectified flow, Liu et al. 2022
    (arXiv:2209.03003); `shift` as in Esser et al. 2024 (arXiv:2403.03206), equation 23.
    """
    fits = 0 < shift < math.inf and 0 < sigma_min < 1
    rule = "obey 0 < shift, finite, and 0 < sigma_min < 1"
    _require(fits, "flow", "shift, sigma_min", rule, (shift, sigma_min))
    params = (("shift", shift), ("sigma_min", sigma_min))
    return Schedule("flow", "flow", params, None, sigma_min, 1.0, shift=shift)


def dynamic_shift(
    seq_len: int,
    *,
    base_seq_len: int = 256,
    max_seq_len: int = 4096,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
    time_shift_type: Literal["exponential", "linear"] = "exponential",
) -> float:
    """The `shift` of a flow for an image of `seq_len` tokens, as Flux and diffusers have it.

    mu lies on the line through (base_seq_len, base_shift) and (max_seq_len, max_shift); the shift
    is e^mu, as t' = e^mu / (e^mu + 1/t - 1), or mu itself for "linear".
    """
    n = _integer("dynamic_shift", "seq_len", seq_len, 1)
    rule = "be below max_seq_len"
    _require(base_seq_len < max_seq_len, "dynamic_shift", "base_seq_len", rule, base_seq_len)
    known = ("exponential", "linear")
    rule = f"be one of {known}"
    _require(time_shift_type in known, "dynamic_shift", "time_shift_type", rule, time_shift_type)
    slope = (max_shift - base_shift) / (max_seq_len - base_seq_len)
    mu = base_shift + slope * (n - base_seq_len)
    shift = math.exp(mu) if time_shift_type == "exponential" else mu
    _require(shift > 0, "dynamic_shift", "mu", "be > 0 for 'linear'", mu)
    return shift


def rescale_zero_terminal_snr(base: Schedule) -> Schedule:
    """Shift and scale sqrt(alphabar) so that it ends at 0: Lin et al. 2023 (arXiv:2305.08891),
    algorithm 1. sigma/alpha at T-1 is then infinite; predict v or data, never noise, there.
    """
    root = np.sqrt(base._abar("rescale_zero_terminal_snr"))
    scaled = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    return _from_abar("rescale_zero_terminal_snr", {"base": base}, scaled**2)


NAMES: dict[str, Callable[..., Schedule]] = {
    f.__name__: f for f in (
        linear, scaled_linear, cosine, sigmoid, from_betas, edm, flow, rescale_zero_terminal_snr,
    )
}  # fmt: skip


def from_config(config: Mapping[str, Any]) -> Schedule:
    """Build the schedule that `Schedule.to_config` described."""
    params = dict(config)
    name = params.pop("name", None)
    _require(name in NAMES, "from_config", "name", f"be one of {sorted(NAMES)}", repr(name))
    if isinstance(params.get("base"), Mapping):
        params["base"] = from_config(params["base"])
    try:
        return NAMES[str(name)](**params)
    except TypeError as error:
        rule = f"config must fit {name}(), got {params} ({error})"
        raise ValueError(f"schedules.from_config: {rule}") from error
