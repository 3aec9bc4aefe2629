"""Ancestral steps of k-diffusion and ComfyUI: down to a lower level, then fresh noise."""

from __future__ import annotations

import math
from typing import NamedTuple

from fastdiff.solvers._walk import Point, Step, Walk


class Descent(NamedTuple):
    """A step to a lower level, then fresh noise up to the next: x' = factor x_down + up n.

    Attributes:
        down: sigma of the lower level, in the scale where the line to x0 is straight, see `line`.
        factor: on the state there.
        up: standard deviation of the fresh noise.
    """

    down: float
    factor: float
    up: float


def k_descent(step: Step, eta: float) -> Descent:
    """``get_ancestral_step`` of k-diffusion, in sigma/alpha: up^2 + down^2 = sigma'^2."""
    sigma, fresh = step.next.sigma, -(eta**2) * math.expm1(-2 * step.h)
    left = (1 - eta) * (1 + eta) + eta**2 * math.exp(-2 * step.h)  # 1 - fresh, not cancelled
    if left <= 0:
        return Descent(0.0, 1.0, sigma)
    return Descent(math.sqrt(left) * sigma, 1.0, math.sqrt(fresh) * sigma)


def flow_descent(step: Step, eta: float) -> Descent:
    """ComfyUI's for flows: t_down = t' (1 + (t'/t - 1) eta), scaled down to alpha' afterwards."""
    t, then = step.now.sigma, step.next
    lower = eta * then.sigma * (t - then.sigma) / t
    down = max(then.sigma - lower, 0.0)
    factor = then.alpha / (1 - down)
    # (t' - factor down)(t' + factor down), the first of which is (t' - t_down)/alpha_down
    up = (then.sigma - down) / (1 - down) * (then.sigma + factor * down)
    return Descent(down, factor, math.sqrt(up))


def line(walk: Walk, at: Point) -> tuple[float, float]:
    """(scale, level) in which a first-order step moves x/scale straight towards x0: x itself and t
    on a flow, as ComfyUI counts there, x/alpha and sigma/alpha elsewhere, as k-diffusion does."""
    return (1.0, at.sigma) if walk.schedule.kind == "flow" else (at.alpha, at.ratio)


def euler_row(walk: Walk, step: Step, to: Descent, s_noise: float) -> None:
    """One evaluation and a first-order step; from an infinite level too."""
    scale = line(walk, step.next)[0]
    level, down = line(walk, step.now)[1], to.down / scale
    x = {"x": to.down / step.now.sigma, "d": scale * (1 - down / level)}
    if not to.down:
        del x["x"]
    last_row(walk, step.now, x, to, s_noise)


def last_row(walk: Walk, at: Point, x: dict[str, float], to: Descent, s_noise: float) -> None:
    """The evaluation whose row ends at the next point."""
    walk.evaluate(at, {k: to.factor * c for k, c in x.items()}, noise=s_noise * to.up)
