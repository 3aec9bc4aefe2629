"""The general sampler of EDM as rows: any of its noise schedules and scalings (Karras et al. 2022,
arXiv:2206.00364, equation 4 and algorithms 1 and 2, with the second-order family of appendix C.2).

The state is x = s(t) (x0 + sigma(t) noise) and follows dx/dt = A x - B D, with D the denoised data
of x/s at sigma, A = sigma'/sigma + s'/s and B = s sigma'/sigma.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastdiff.ops.noise import Stream
from fastdiff.table import Row, StepTable

Array = NDArray[np.float64]

SOLVERS = ("euler", "heun")
DISCRETIZATIONS = ("vp", "ve", "iddpm", "edm")
SCHEDULES = ("vp", "ve", "linear")
SCALINGS = ("vp", "none")


class VP(NamedTuple):
    """sigma(t)^2 + 1 = exp(beta_d t^2 / 2 + beta_min t), table 1."""

    beta_d: float
    beta_min: float

    @classmethod
    def between(cls, sigma_min: float, sigma_max: float, epsilon_s: float) -> VP:
        """The one with sigma_min at epsilon_s and sigma_max at 1."""
        low, high = math.log1p(sigma_min**2), math.log1p(sigma_max**2)
        beta_d = 2 * (low / epsilon_s - high) / (epsilon_s - 1)
        return cls(beta_d, high - beta_d / 2)

    def sigma(self, t: float) -> float:
        return math.sqrt(math.expm1(self.beta_d / 2 * t**2 + self.beta_min * t))

    def time(self, sigma: float) -> float:
        log = math.log1p(sigma**2)
        return 2 * log / (math.sqrt(self.beta_min**2 + 2 * self.beta_d * log) + self.beta_min)


class Path(NamedTuple):
    """A noise schedule and a scaling."""

    schedule: str
    scaling: str
    vp: VP

    def sigma(self, t: float) -> float:
        if self.schedule == "vp":
            return self.vp.sigma(t)
        return math.sqrt(t) if self.schedule == "ve" else t

    def time(self, sigma: float) -> float:
        if self.schedule == "vp":
            return self.vp.time(sigma)
        return sigma**2 if self.schedule == "ve" else sigma

    def scale(self, sigma: float) -> float:
        return 1 / math.hypot(1, sigma) if self.scaling == "vp" else 1.0

    def move(self, t: float, sigma: float, h: float) -> tuple[float, float]:
        """(h A, h B) at a time with its sigma."""
        if self.schedule == "vp":  # sigma' = (beta_min + beta_d t) (sigma + 1/sigma) / 2
            rise = h * (self.vp.beta_min + self.vp.beta_d * t) / 2 * (1 + 1 / sigma**2)
        else:
            rise = h / (2 * t) if self.schedule == "ve" else h / t
        s = self.scale(sigma)
        return (rise * s**2 if self.scaling == "vp" else rise), rise * s


def levels(
    discretization: str,
    steps: int,
    sigma_min: float,
    sigma_max: float,
    rho: float,
    epsilon_s: float,
    vp: VP,
    iddpm: tuple[float, float, int],
) -> Array:
    """(steps,) sigmas from the noisiest down: table 1, "time steps"; `iddpm` is (C_1, C_2, M)."""
    share = np.arange(steps) / max(steps - 1, 1)
    if discretization == "vp":
        return np.array([vp.sigma(t) for t in 1 + share * (epsilon_s - 1)])
    if discretization == "ve":
        return np.asarray(sigma_max * (sigma_min / sigma_max) ** share)
    if discretization == "iddpm":
        c_1, c_2, m = iddpm
        bar = np.sin(np.pi / 2 * np.arange(m + 1) / m / (c_2 + 1)) ** 2
        u = np.zeros(m + 1)
        for j in range(m, 0, -1):
            u[j - 1] = math.sqrt((u[j] ** 2 + 1) / max(bar[j - 1] / bar[j], c_1) - 1)
        u = u[(u >= sigma_min) & (u <= sigma_max)]
        if not len(u):
            raise ValueError(
                f"edm: sigma_min, sigma_max must hold a level of the iDDPM steps, "
                f"got {sigma_min:g}, {sigma_max:g}"
            )
        return np.asarray(u[np.rint((len(u) - 1) * share).astype(int)])
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return np.asarray((high + share * (low - high)) ** rho)


def build(
    name: str,
    path: Path,
    sigmas: Array,
    hats: Array,
    *,
    heun: bool,
    alpha: float,
    s_noise: float,
    given_noise: bool,
) -> tuple[StepTable, set[int]]:
    """The table, and the rows at which its steps begin.

    Args:
        sigmas: (steps,) levels; a last step leads to clean data.
        hats: (steps,) levels after the churn of each step; no row where they are the same.
        alpha: where the second evaluation lies, in steps from the first.
        given_noise: a churn row takes its noise as if it were a model output; else it draws it.
    """
    rows: list[Row] = []
    starts = set()
    times = [*map(path.time, sigmas.tolist()), 0.0]
    for i, (sigma, hat) in enumerate(zip(sigmas.tolist(), hats.tolist(), strict=True)):
        starts.add(len(rows))
        if hat != sigma:
            rows.append(_churn(path, sigma, hat, s_noise, len(rows), given_noise))
        t = path.time(hat)
        h = times[i + 1] - t
        a, b = path.move(t, hat, h)
        if not heun or i == len(sigmas) - 1:
            rows.append(_row(path, hat, {"x": 1 + a, "d": -b}))
            continue
        late = 1 / (2 * alpha)
        x, y = ({"x": 1 + w * a, "d": -w * b} for w in (alpha, 1 - late))
        rows.append(_row(path, hat, x, y))
        t += alpha * h
        if t <= 0:
            raise ValueError(f"{name}: alpha must keep every time above 0, got {alpha:g}")
        a, b = path.move(t, path.sigma(t), late * h)
        rows.append(_row(path, path.sigma(t), {"y": 1.0, "x": a, "d": -b}))
    first = float(sigmas[0])
    init_sigma, order = first * path.scale(first), 2 if heun else 1
    table = StepTable(name, tuple(rows), prediction="sample", init_sigma=init_sigma, order=order)
    return table, starts


def _row(path: Path, sigma: float, x: dict[str, float], y: dict[str, float] | None = None) -> Row:
    s = path.scale(sigma)
    return Row(x=x, y=y, time=sigma, alpha=s, sigma=s * sigma, c_in=1 / s)


def _churn(path: Path, sigma: float, hat: float, s_noise: float, i: int, given: bool) -> Row:
    now, then = path.scale(sigma), path.scale(hat)
    added = then * s_noise * math.sqrt(max((hat - sigma) * (hat + sigma), 0.0))
    x = {"x": then / now, "m" if given else "n1": added}
    draws = () if given else ((int(Stream.CHURN), i),)
    # a row with an output has a time
    return Row(
        x=x, time=sigma, alpha=now, sigma=now * sigma, draws=draws, evaluates=given
    )  # fmt: skip
