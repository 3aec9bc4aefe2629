"""Restart (Xu et al. 2023, arXiv:2306.14878, algorithm 1), in float64 as printed."""

from __future__ import annotations

import math

import numpy as np
import oracles
from oracles import CHURN, Case

NO_CHURN = (0.0, 0.0, math.inf, 1.0)


def _heun(p, x):
    return (oracles.flow_heun if p.kind == "flow" else oracles.heun)(p, x, NO_CHURN)


def _on(p, times, levels):
    scales = np.array([p.scales(level) for level in levels])
    fields = {"times": np.array(times), "alphas": scales[:, 0], "sigmas": scales[:, 1]}
    return oracles.Problem(**{**p.__dict__, **fields})


def restart(p, x, restarts=((0.1, 2.0, 10, 1),), s_noise=1.0):
    """x at t_min, plus noise of variance t_max^2 - t_min^2, and Heun's method back to t_min."""
    states = []
    levels = np.array(p.levels)
    inner = [i for i in range(1, p.steps + 1) if levels[i] > 0]
    nearest = {
        r: min(inner, key=lambda i, r=r: abs(math.log(levels[i]) - math.log(r[0])))
        for r in restarts
        if inner
    }
    for i in range(p.steps):
        states += _heun(oracles._from(p, i, i + 1), x)
        x = states[-1]
        for r in (r for r in restarts if nearest.get(r) == i + 1):
            low, high, steps, times = levels[i + 1], *r[1:]
            if high <= low:
                continue
            k = np.arange(steps + 1) / steps
            grid = (high ** (1 / 7) + k * (low ** (1 / 7) - high ** (1 / 7))) ** 7
            grid[-1] = low
            at = [*(p.time_of(level) for level in grid[:-1]), float(p.times[i + 1])]
            part = _on(p, at, grid)
            for _ in range(times):
                noise = p.noise(CHURN, len(states))
                z = x / p.alphas[i + 1] + s_noise * math.sqrt(high**2 - low**2) * noise
                states.append(part.alphas[0] * z)
                states += _heun(part, states[-1])
                x = states[-1]
    return states


# the steps of a restart do not grow with the grid's, and so leave an error of their own
FIXED = {"converges": False}
TWO = ((0.1, 0.8, 3, 2), (2.0, 5.0, 2, 1))
CASES = {
    "restart": Case("restart", {}, restart, "default", **FIXED),
    "restart-two": Case(
        "restart",
        {"restarts": TWO, "s_noise": 1.003},
        lambda p, x: restart(p, x, TWO, 1.003),
        "two intervals, one of them twice",
        **FIXED,
    ),
    "restart-none": Case("restart", {"restarts": ()}, _heun, "it is heun", converges=True),
}
