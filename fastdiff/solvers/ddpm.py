"""Ancestral sampling by the exact posterior (DDPM)."""

from __future__ import annotations

import math

from fastdiff.solvers._checks import choice
from fastdiff.solvers._walk import Walk
from fastdiff.table import StepTable


def ddpm(walk: Walk, *, variance: str = "fixed_small") -> StepTable:
    """Ho et al. 2020 (arXiv:2006.11239), equations 6, 7 and 11 and algorithm 2.

    Order 1 (weak), one evaluation and one draw a step, no history. On a subsequence of times the
    betas are respaced, 1 - alphabar_t/alphabar_prev (Nichol and Dhariwal 2021, arXiv:2102.09672,
    section 4); no noise enters clean data. Other names: p_sample, DDPMScheduler, ancestral.

    Args:
        variance: "fixed_small" is beta~, "fixed_large" is beta, "learned_range" lies between them
            by the model's variance output (Nichol and Dhariwal 2021, equation 15).
    """
    choice("variance", variance, ("fixed_small", "fixed_large", "learned_range"))
    for step in walk:
        now, then, h = step.now, step.next, step.h
        kept = -math.expm1(-2 * h)  # beta / sigma^2
        small, large = then.sigma * math.sqrt(kept), now.sigma * math.sqrt(kept)
        noise, log_variance = large if variance == "fixed_large" else small, None
        if variance == "learned_range" and small:
            spread = 2 * math.log(now.sigma / then.sigma)  # log beta - log beta~
            noise, log_variance = 1.0, (spread / 4, math.log(small) + spread / 4)
        x = {"x": math.exp(-h) * step.gain, "d": then.alpha * kept}
        walk.evaluate(now, x, noise=noise if then.sigma else 0.0, log_variance=log_variance)
    return walk.table("ddpm", 1)
