"""RES multistep (arXiv:2308.02157; ComfyUI), transcribed in float64 NumPy. No fastdiff here."""

from __future__ import annotations

import math

import log_snr  # noqa: F401  (sets the digits)
import oracles
from mpmath import mpf
from oracles import STEP, Array, Case, Problem


def res_multistep(p: Problem, x: Array, eta: float, s_noise: float) -> list:
    """With t = -log(sigma): z' = e^{-h} z + h (b1 D + b2 D_old), b of phi_1 and phi_2.

    From an infinite level the step is DDIM's, and the D_old from there has no weight.
    """
    states, old, old_down = [], None, None
    for i in range(p.steps):
        a, b = p.levels[i], p.levels[i + 1]
        x0, _ = p.predict(x, *p.at(i))
        if math.isinf(a):
            part = oracles._from(p, i, i + 1)
            x = oracles.ddim(part, x, eta, s_noise)[0]
            old, old_down = None, b
            states.append(x)
            continue
        high, low = mpf(a), mpf(b)  # where up nears b, float64 has no digits left of down
        up = min(low, eta * (low**2 * (high**2 - low**2) / high**2) ** 0.5)
        up, down = float(up), float((low**2 - up**2) ** 0.5)
        z = x / p.alphas[i]
        if down == 0 or old is None:
            z = z + (z - x0) / a * (down - a)
        else:
            t, t_old, t_next = -math.log(a), -math.log(old_down), -math.log(down)
            t_prev = -math.log(p.levels[i - 1])
            h = t_next - t
            c2 = (t_prev - t_old) / h
            phi_1 = math.expm1(-h) / -h
            phi_2 = (phi_1 - 1) / -h
            z = math.exp(-h) * z + h * ((phi_1 - phi_2 / c2) * x0 + phi_2 / c2 * old)
        if b > 0 and up:
            z = z + p.noise(STEP, i) * s_noise * up
        x, old, old_down = p.alphas[i + 1] * z, x0, down
        states.append(x)
    return states


def ancestral_case(reason, eta, s_noise, **more):
    options = {"eta": eta, "s_noise": s_noise}
    return Case(
        "res_multistep_ancestral", options,
        lambda p, x: res_multistep(p, x, eta, s_noise), reason, **more,
    )  # fmt: skip


CASES = {
    "res_multistep": Case(
        "res_multistep", {}, lambda p, x: res_multistep(p, x, 0.0, 1.0), "default"
    ),
    "res_multistep_ancestral": Case(
        "res_multistep_ancestral", {}, lambda p, x: res_multistep(p, x, 1.0, 1.0), "default"
    ),
    "res_multistep_ancestral-ode": ancestral_case("no noise", 0.0, 1.0),
    "res_multistep_ancestral-options": ancestral_case("options", 0.6, 1.01, converges=False),
}
