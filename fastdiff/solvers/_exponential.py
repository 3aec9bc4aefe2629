"""What the DPM-Solver family shares: exact integrals of a prediction that is polynomial in log-SNR.

Over a step of log-SNR growth h, with the prediction M at its start and r = s/h,
x' = keep x + c (W1 M + W2 dM/dr + W3 d2M/dr2), where W_k = z phi_k(z): W1 = e^z - 1, and so on.

- data form (M = x0): keep = (sigma'/sigma) e^{-eta h}, c = -alpha', z = -(1 + eta) h;
- noise form (M = noise): keep = alpha'/alpha, c = -(1 + eta) sigma', z = h.

eta is the strength of the SDE's noise, 0 for the ODE.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from fastdiff.solvers._phi import phi
from fastdiff.solvers._walk import Point, Step, Walk, epsilon
from fastdiff.solvers.ddim import ancestral

# solver types of the original code and of diffusers: the weight of a slope is W1/2 or W2
SOLVER_TYPES = ("midpoint", "heun", "dpmsolver", "taylor")


class Form(NamedTuple):
    """keep, c and z of a step, see the module."""

    keep: float
    c: float
    z: float
    first: float  # weight of the prediction at the start, c W1

    def slope(self, solver_type: str) -> float:
        """Weight of its change over the step."""
        if solver_type in ("midpoint", "dpmsolver"):
            return self.first / 2
        return self.c * self.z * phi(2, self.z)

    @property
    def curvature(self) -> float:
        """Weight of its second derivative."""
        return self.c * self.z * phi(3, self.z)


def form_of(step: Step, noise_form: bool, eta: float) -> Form:
    """The form of a step of finite h."""
    h = step.h
    if noise_form:
        keep, c = step.next.alpha / step.now.alpha, -(1 + eta) * step.next.sigma
        # e^h by its own ratio where it is large: the rounding of h would be multiplied by it
        return Form(keep, c, h, c * (math.expm1(h) if h < 1 else keep / step.gain - 1))
    decay, z = math.exp(-eta * h) if eta else 1.0, -(1 + eta) * h
    return Form(step.gain * decay, -step.next.alpha, z, -step.next.alpha * math.expm1(z))


def fresh_noise(step: Step, noise_form: bool, eta: float) -> float:
    """Standard deviation of the SDE's noise over a step; none enters clean data."""
    if not eta or not step.next.sigma:
        return 0.0
    part = eta * math.expm1(2 * step.h) if noise_form else -math.expm1(-2 * eta * step.h)
    return step.next.sigma * math.sqrt(part)


def first_order(step: Step, noise_form: bool, eta: float) -> dict[str, float]:
    """Coefficients of x and d with the prediction held constant; h may be infinite."""
    if not noise_form and eta:
        h = step.h
        d = step.next.alpha * -math.expm1(-(1 + eta) * h)
        return {"x": step.gain * math.exp(-eta * h), "d": d}
    if not step.next.alpha:  # the end of an inversion
        return {"x": step.gain, "d": -step.gain * step.now.alpha}
    x = ancestral(step, 0.0)[0]  # where the two forms meet
    if noise_form and eta and step.next.sigma:
        x = add_newest(x, step.now, True, eta / (1 + eta) * form_of(step, True, eta).first)
    return x


def add_newest(x: dict[str, float], at: Point, noise_form: bool, weight: float) -> dict[str, float]:
    """The coefficients with the prediction of the row's own evaluation, in terms of x and d."""
    e, f = epsilon(at) if noise_form else (0.0, 1.0)
    return x | {"x": x.get("x", 0.0) + weight * e, "d": x.get("d", 0.0) + weight * f}


def needs_signal(walk: Walk, name: str, why: str) -> None:
    """Refuses a grid that begins at alpha 0."""
    if walk.points[0].alpha == 0:
        raise ValueError(
            f"build: {name} {why} must begin at alpha > 0, got alpha 0 at time "
            f"{walk.points[0].time:g}"
        )
