"""CFG++, Chung et al. 2024 (arXiv:2406.08070): the guided x0 with the unconditional noise.

A step goes to x' = alpha' D + sigma' eps_u, where D is the guided x0 prediction and eps_u the noise
that the unconditional x0 U leaves, (x - alpha U)/sigma: guidance no longer pushes the noise away
from what a sample of that level holds, so its scale lies in [0, 1] rather than about 7.5. The term
"u" of a row is the raw unconditional output; a row reads an earlier U from the anchor y. With an
unconditional output equal to the conditional one each is the solver that its name begins with.
"""

from __future__ import annotations

import math

from fastdiff.solvers._checks import number
from fastdiff.solvers._walk import Point, Step, Walk
from fastdiff.solvers.ddim import ancestral
from fastdiff.table import StepTable


def _add(*parts: tuple[float, dict[str, float]]) -> dict[str, float]:
    """The sum of weighted terms."""
    total: dict[str, float] = {}
    for weight, terms in parts:
        for name, c in terms.items():
            total[name] = total.get(name, 0.0) + weight * c
    return total


def _unguided(walk: Walk, at: Point) -> dict[str, float]:
    """The unconditional x0 U in terms of a row."""
    p, q = walk.conversion(at)
    return {"x": p, "u": q}


def _unguided_noise(walk: Walk, at: Point, alpha: float) -> dict[str, float]:
    """sigma eps_u = x - alpha U in terms of a row."""
    p, q = walk.conversion(at)
    return {"x": 1 - alpha * p, "u": -alpha * q}


def _euler(walk: Walk, step: Step, kept: float) -> dict[str, float]:
    """alpha' D + down eps_u, where kept is down/sigma."""
    noise = _unguided_noise(walk, step.now, step.now.alpha)
    return _add((1.0, {"d": step.next.alpha}), (kept, noise))


def _parts(step: Step, eta: float) -> tuple[float, float, float]:
    """(kept, share, up): down/sigma, alpha' - kept*alpha, and the level of the fresh noise."""
    x, up = ancestral(step, eta)
    return x.get("x", 0.0), x["d"], up


def euler_cfg_pp(walk: Walk) -> StepTable:
    """Chung et al. 2024 (arXiv:2406.08070), algorithm 2: DDIM with CFG++.

    Order 1, one evaluation of both outputs a step, no noise, no history. Other names:
    sample_euler_cfg_pp.
    """
    for step in walk:
        walk.evaluate(step.now, _euler(walk, step, step.gain))
    return walk.table("euler_cfg_pp", 1)


def euler_ancestral_cfg_pp(walk: Walk, *, eta: float = 1.0, s_noise: float = 1.0) -> StepTable:
    """`euler_ancestral` with CFG++, arXiv:2406.08070, as ComfyUI has it.

    Order 1 (weak), one evaluation of both outputs and one draw a step, no history. Other names:
    sample_euler_ancestral_cfg_pp.

    Args:
        eta, s_noise: as in `euler_ancestral`.
    """
    eta, s_noise = number("eta", eta, 0.0), number("s_noise", s_noise, 0.0)
    for step in walk:
        kept, _, up = _parts(step, eta)
        walk.evaluate(step.now, _euler(walk, step, kept), noise=s_noise * up)
    return walk.table("euler_ancestral_cfg_pp", 1)


def dpmpp_2s_ancestral_cfg_pp(walk: Walk, *, eta: float = 1.0, s_noise: float = 1.0) -> StepTable:
    """DPM-Solver++(2S) with ancestral noise and CFG++, arXiv:2406.08070, as ComfyUI has it.

    Order 2 (weak: measured on Gaussian data), two evaluations of both outputs and one draw a step,
    the guided state alpha (z + D - U) kept from the first to the second. A step to clean data and
    one from alpha = 0 is Euler's. On a flow it counts in sigma/alpha, where ComfyUI puts t.
    Other names: sample_dpmpp_2s_ancestral_cfg_pp.

    Args:
        eta, s_noise: as in `euler_ancestral`.
    """
    eta, s_noise = number("eta", eta, 0.0), number("s_noise", s_noise, 0.0)
    for step in walk:
        now, then = step.now, step.next
        kept, share, up = _parts(step, eta)
        if kept == 0.0 or now.alpha == 0.0:
            walk.evaluate(now, _euler(walk, step, kept), noise=s_noise * up)
            continue
        # half of the way in log(sigma/alpha), to where the step ends before its noise
        middle = walk.at_ratio(math.sqrt(now.ratio * kept * now.sigma / then.alpha))
        noise = _unguided_noise(walk, now, now.alpha)
        x = _add((1.0, {"d": middle.alpha}), (middle.sigma / now.sigma, noise))
        walk.evaluate(now, x, y=_add((1.0, {"d": now.alpha}), (1.0, noise)))
        walk.evaluate(middle, {"y": kept, "d": share}, noise=s_noise * up)
    return walk.table("dpmpp_2s_ancestral_cfg_pp", 2)


def dpmpp_2m_cfg_pp(walk: Walk) -> StepTable:
    """DPM-Solver++(2M) with CFG++, arXiv:2406.08070, as ComfyUI has it.

    Order 2, one evaluation of both outputs a step, no noise, the last U kept: the change over the
    last step is taken from the U before to the D now. On a flow it counts in sigma/alpha, where
    ComfyUI puts t. Other names: sample_dpmpp_2m_cfg_pp.
    """
    last: Step | None = None
    for step in walk:
        h, slope = step.h, 0.0
        if last is not None and math.isfinite(h):
            slope = step.next.alpha * -math.expm1(-h) / 2 * h / last.h
        x = _add((1.0, _euler(walk, step, step.gain)), (slope, {"d": 1.0, "y": -1.0}))
        walk.evaluate(step.now, x, y=_unguided(walk, step.now))
        last = step
    return walk.table("dpmpp_2m_cfg_pp", 2)


def res_multistep_cfg_pp(walk: Walk, *, eta: float = 0.0, s_noise: float = 1.0) -> StepTable:
    """Zhang and Chen 2023 (arXiv:2308.02157), RES of second order, with CFG++ as ComfyUI has it.

    Order 2 (weak with noise: measured on Gaussian data), one evaluation of both outputs a step and,
    unless eta is 0, one draw, the last U kept. The first step and the step to clean data are
    Euler's. On a flow it counts in sigma/alpha, where ComfyUI puts t. Other names:
    sample_res_multistep_cfg_pp; with eta = 1 sample_res_multistep_ancestral_cfg_pp.

    Args:
        eta, s_noise: as in `euler_ancestral`.
    """
    eta, s_noise = number("eta", eta, 0.0), number("s_noise", s_noise, 0.0)
    last = math.nan
    for step in walk:
        now, then = step.now, step.next
        kept, share, up = _parts(step, eta)
        x = _euler(walk, step, kept)
        h = math.inf  # of the step before its noise
        if kept and now.alpha:
            h = -math.log(kept * now.alpha / then.alpha)
            if not math.isnan(last):
                # alpha' h b2 of the source, whose b1 + b2 is phi_1
                older = -then.alpha * (1 + math.expm1(-h) / h) * h / last
                guided = {"x": kept, "d": kept * now.alpha}
                mixed = _add((share - older - kept * now.alpha, _unguided(walk, now)))
                x = _add((1.0, guided), (1.0, mixed), (older, {"y": 1.0}))
        walk.evaluate(now, x, y=_unguided(walk, now), noise=s_noise * up)
        last = h
    return walk.table("res_multistep_cfg_pp", 2)


def gradient_estimation_cfg_pp(walk: Walk, *, ge_gamma: float = 2.0) -> StepTable:
    """Permenter and Yuan 2024 (arXiv:2306.04848) with CFG++, as ComfyUI has it.

    Order 1, one evaluation of both outputs a step, no noise, the last unconditional slope kept. In
    x/alpha and sigma/alpha, on a flow in x and t, where the slope is x' = (x - U)/t. The first step
    and the step to clean data are Euler's. Other names: sample_gradient_estimation_cfg_pp.

    Args:
        ge_gamma: 1 is Euler, the paper's choice is 2.
    """
    gamma = number("ge_gamma", ge_gamma, -math.inf)
    is_flow = walk.schedule.kind == "flow"
    for i, step in enumerate(walk):
        now, then = step.now, step.next
        before, after = (1.0, 1.0) if is_flow else (now.alpha, then.alpha)
        slope = _add((1 / now.sigma, _unguided_noise(walk, now, before)))
        more = 0.0
        if i and then.sigma:
            # alpha' times the change of the level, times gamma - 1
            more = (gamma - 1) * (then.sigma - after / before * now.sigma)
        x = _add((1.0, {"d": after}), (then.sigma + more, slope), (-more, {"y": 1.0}))
        walk.evaluate(now, x, y=slope)
    return walk.table("gradient_estimation_cfg_pp", 1)
