"""Heun++ (ComfyUI's sample_heunpp2), transcribed in float64 NumPy. No fastdiff here."""

from __future__ import annotations

import math

import oracles
from oracles import Array, Case, Problem

CHURN = (8.0, 0.05, 50.0, 1.003)
NO_CHURN = (0.0, 0.0, math.inf, 1.0)


def heunpp2(p: Problem, x: Array, churn: tuple) -> list:
    """Levels sigma/alpha with z = x/alpha and d = (z - D)/level; on a flow t with x itself.

    A step from an infinite level is DDIM's, and the level after it is the first.
    """
    states: list = []
    is_flow = p.kind == "flow"
    levels = [float(t) for t in p.times] if is_flow else p.levels
    first = next(level for level in levels if math.isfinite(level))

    def slope(z, t, level):
        if is_flow:
            x0, eps = p.predict(z, level, 1 - level, level)
            return eps - x0
        return (z - p.denoised(z, level, t)) / level

    def scale(k):
        return 1.0 if is_flow else p.alphas[k]

    for i in range(p.steps):
        if math.isinf(levels[i]):
            x = oracles.ddim(oracles._from(p, i, i + 1), x, 0.0)[0]
            states.append(x)
            continue
        t, level, z = float(p.times[i]), levels[i], x / scale(i)
        if math.isfinite(p.levels[i]):
            churned, hat, t = oracles._churn(p, x / p.alphas[i], i, states, churn)
            if hat != p.levels[i]:
                z, level = churned, hat
                if is_flow:
                    level = hat / (1 + hat)
                    z = (1 - level) * churned
        dt, d = levels[i + 1] - level, slope(z, t, level)
        if i == p.steps - 1:
            x = scale(i + 1) * (z + d * dt)
            states.append(x)
            continue
        z_2 = z + d * dt
        states.append(scale(i + 1) * z_2)
        d_2 = slope(z_2, float(p.times[i + 1]), levels[i + 1])
        if i == p.steps - 2:
            w2 = levels[i + 1] / (2 * first)
            mean = d * (1 - w2) + d_2 * w2
        else:
            z_3 = z_2 + d_2 * (levels[i + 2] - levels[i + 1])
            states.append(scale(i + 2) * z_3)
            d_3 = slope(z_3, float(p.times[i + 2]), levels[i + 2])
            w2, w3 = levels[i + 1] / (3 * first), levels[i + 2] / (3 * first)
            mean = (1 - w2 - w3) * d + w2 * d_2 + w3 * d_3
        x = scale(i + 1) * (z + mean * dt)
        states.append(x)
    return states


CASES = {
    "heunpp2": Case("heunpp2", {}, lambda p, x: heunpp2(p, x, NO_CHURN), "deterministic"),
    "heunpp2-churn": Case(
        "heunpp2",
        dict(zip(("s_churn", "s_tmin", "s_tmax", "s_noise"), CHURN, strict=True)),
        lambda p, x: heunpp2(p, x, CHURN),
        "noise rows on their stream",
        converges=False,
    ),
}
