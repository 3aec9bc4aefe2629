"""Denoising diffusion implicit models, and the ancestral step they share with k-diffusion."""

from __future__ import annotations

import math

from fastdiff.solvers._checks import flag, number
from fastdiff.solvers._walk import Step, Walk
from fastdiff.table import StepTable


def ancestral(step: Step, eta: float) -> tuple[dict[str, float], float]:
    """(coefficients, noise) of a step that keeps the part `down` of the noise and draws `up` anew.

    up^2 + down^2 = sigma'^2, and x' = alpha' x0 + down (x - alpha x0)/sigma + up n, where
    up = eta sigma' sqrt(1 - exp(-2h)) is at most sigma'.
    """
    h, then = step.h, step.next
    left = (1 - eta) * (1 + eta) + eta**2 * math.exp(-2 * h)  # (down/sigma')^2
    if left <= 0.0:
        return {"d": then.alpha}, then.sigma
    fresh = -(eta**2) * math.expm1(-2 * h)  # (up/sigma')^2 = 1 - left
    log_down = 0.5 * (math.log1p(-fresh) if fresh < 0.5 else math.log(left))
    x = {"x": math.exp(log_down) * step.gain, "d": then.alpha * -math.expm1(log_down - h)}
    return x, math.sqrt(fresh) * then.sigma


def ddim(walk: Walk, *, eta: float = 0.0, use_clipped_model_output: bool = True) -> StepTable:
    """Song et al. 2021 (arXiv:2010.02502), equation 12 with the sigma of equation 16.

    Order 1, one evaluation a step, no history; eta > 0 draws once a step and eta = 1 is DDPM with
    the small variance. Other names: DDIMScheduler; with eta = 0 k-diffusion's euler; the flow Euler
    step on a flow.

    Args:
        eta: share of fresh noise, in [0, 1].
        use_clipped_model_output: derive the noise from the clipped x0, as guided-diffusion does;
            False keeps the model's own, as diffusers does unless told otherwise. The same thing
            where nothing is clipped.
    """
    eta = number("eta", eta, 0.0, 1.0)
    rederive = flag("use_clipped_model_output", use_clipped_model_output)
    for step in walk:
        x, noise = ancestral(step, eta)
        if not rederive:
            (p, q), gain = walk.conversion(step.now), x.get("x", 0.0)
            excess = gain * step.now.alpha  # x0 taken out of the noise is not the clipped one
            x = {"x": gain - excess * p, "m": -excess * q, "d": x["d"] + excess}
        walk.evaluate(step.now, x, noise=noise)
    return walk.table("ddim", 1)
