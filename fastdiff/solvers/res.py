"""Exponential multistep solver of second order (RES), without and with ancestral noise."""

from __future__ import annotations

import math

from fastdiff.solvers._checks import number
from fastdiff.solvers._phi import adams
from fastdiff.solvers._walk import Walk
from fastdiff.solvers.ddim import ancestral
from fastdiff.table import StepTable


def _multistep(walk: Walk, eta: float, s_noise: float) -> None:
    """A step falls to the level `down` and noise lifts it to the next; h runs to `down`."""
    last_h = last_down = 0.0
    for i, step in enumerate(walk):
        x, up = ancestral(step, eta)
        fallen = x["d"] / step.next.alpha  # 1 - exp(-h)
        left = x.get("x", 0.0) * step.now.alpha / step.next.alpha  # exp(-h)
        down = math.inf if left == 0 else -math.log1p(-fallen) if fallen < 0.5 else -math.log(left)
        if i and math.isfinite(down):
            # the last prediction stands as far back as its own step went down
            node = -last_down / down if math.isfinite(last_h) else -math.inf
            new, old = (-step.next.alpha * w for w in adams(-down, [node]))
            x |= {"d": new, "h0": old}
        walk.evaluate(step.now, x, noise=s_noise * up, push=True)
        last_h, last_down = step.h, down


def res_multistep(walk: Walk) -> StepTable:
    """Zhang and Bao-Wang 2023 (arXiv:2308.02157), the two-step multistep method.

    Order 2, one evaluation a step, no noise, one x0 kept. The first step and the step to clean data
    are of first order. Other names: sample_res_multistep.
    """
    _multistep(walk, 0.0, 0.0)
    return walk.table("res_multistep", 2)


def res_multistep_ancestral(walk: Walk, *, eta: float = 1.0, s_noise: float = 1.0) -> StepTable:
    """`res_multistep` (arXiv:2308.02157) to a lower level, then fresh noise up to the next, as
    ComfyUI has it.

    Order 2 (with noise weak, measured on Gaussian data), one evaluation and one draw a step, one x0
    kept. The last prediction is placed by the distance its own step went down. Other names:
    sample_res_multistep_ancestral.

    Args:
        eta: share of fresh noise, at least 0; capped as in `euler_ancestral`.
        s_noise: scale of the noise.
    """
    eta, s_noise = number("eta", eta, 0.0), number("s_noise", s_noise, 0.0)
    _multistep(walk, eta, s_noise)
    return walk.table("res_multistep_ancestral", 2)
