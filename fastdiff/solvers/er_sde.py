"""Solvers of the extended reverse-time SDE."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from fastdiff.solvers._checks import choice, number
from fastdiff.solvers._walk import Walk
from fastdiff.table import StepTable

# psi of each noise scaler phi(v) = v psi(v), v = sigma/alpha
NOISE_SCALERS: dict[str, Callable[[float], float]] = {
    "er_sde": lambda v: math.exp(v**0.3) + 10.0,
    "sde": lambda v: v,
    "ode": lambda v: 1.0,
}
NODES, WEIGHTS = np.polynomial.legendre.leggauss(24)


def _moments(psi: Callable[[float], float], start: float, end: float) -> tuple[float, float]:
    """Integrals of phi(end)/phi(v) - 1, and of (v - start) times it, over v from end to start.

    Gauss-Legendre in log(v), in pieces of at most one: to the last digits of float64.
    """
    pieces = math.ceil(math.log(start / end))
    edges = np.linspace(math.log(end), math.log(start), pieces + 1)
    zeroth, first, top = [], [], end * psi(end)
    halves = np.diff(edges) / 2
    for a, half in zip(edges, halves, strict=False):
        for at, w in zip(NODES, WEIGHTS, strict=True):
            v = math.exp(a + half * (1 + at))
            part = half * w * v * (top / (v * psi(v)) - 1)
            zeroth.append(part)
            first.append((v - start) * part)
    return math.fsum(zeroth), math.fsum(first)


def er_sde(
    walk: Walk, *, s_noise: float = 1.0, noise_scaler: str = "er_sde", max_stage: int = 3
) -> StepTable:
    """Cui et al. 2023 (arXiv:2309.06169), ER-SDE-Solver-1, -2 and -3 in the x0 form.

    One evaluation and one draw a step, up to two x0 kept. Order 2, with noise weak and measured on
    Gaussian data; 1 for max_stage 1. The third stage lowers the error, not the order: its first
    slope is that of the middle of the last interval. The original sums 200 points for its
    integrals; here they are exact to float64, so the two agree as far as those sums do. An x0
    predicted at alpha = 0 has no weight in later steps. Other names: sample_er_sde.

    Args:
        s_noise: scale of the noise.
        noise_scaler: phi of the paper, of v = sigma/alpha: "er_sde" is v (exp(v^0.3) + 10), its
            choice; "sde" is v^2, the reverse SDE; "ode" is v, without noise.
        max_stage: predictions used, 1 to 3.
    """
    s_noise = number("s_noise", s_noise, 0.0)
    psi = NOISE_SCALERS[choice("noise_scaler", noise_scaler, tuple(NOISE_SCALERS))]
    if isinstance(max_stage, bool) or max_stage not in (1, 2, 3):
        raise ValueError(f"build: max_stage of er_sde must be 1, 2 or 3, got {max_stage!r}")
    seen: list[float] = []
    for step in walk:
        now, then = step.now, step.next
        v, end = now.ratio, then.ratio
        if end == 0:
            walk.evaluate(now, {"d": then.alpha})
            break
        # phi(end) v / (phi(v) end); the noise added is what it leaves of the variance
        kept = 1.0 if noise_scaler == "ode" else psi(end) / psi(v) if math.isfinite(v) else 0.0
        x = {"x": step.gain * kept, "d": then.alpha * (1 - kept * math.exp(-step.h))}
        if seen and max_stage > 1:
            zeroth, first = _moments(psi, v, end)
            slope = then.alpha * zeroth / (v - seen[-1])
            x |= {"d": x["d"] + slope, "h0": -slope}
            if len(seen) > 1 and max_stage > 2:
                bend = 2 * then.alpha * first / (v - seen[-2])
                new, old = bend / (v - seen[-1]), bend / (seen[-1] - seen[-2])
                x |= {"d": x["d"] + new, "h0": x["h0"] - new - old, "h1": old}
        if math.isfinite(v):
            seen.append(v)
        up = s_noise * then.sigma * math.sqrt((1 - kept) * (1 + kept))
        walk.evaluate(now, x, noise=up, push=True)
    return walk.table("er_sde", min(max_stage, 2))
