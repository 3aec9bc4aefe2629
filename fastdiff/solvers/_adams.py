"""Linear multistep rows: the frame they are straight in, and the integrals of their polynomials.

In the straight frame a state with a fixed x0 and a fixed noise moves on a line: z = x/c and
u = sigma/c with c = alpha, and c = 1 on a flow (whose own path x(t) is straight). There dz/du is
the noise prediction, on a flow the velocity noise - x0, and both are (z - x0)/u. This is what
k-diffusion and ComfyUI integrate: they hold z and call u sigma.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from fastdiff.solvers._walk import Point, Step, Walk, epsilon, velocity
from fastdiff.solvers.ddim import ancestral
from fastdiff.table import Row

# 64 nodes: the integrand of `vp_weights` is analytic within pi/2 of the real axis of log u, so that
# a step over a factor 40,000 of u (all of 80 to 0.002) is integrated to 16 digits
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(64)


class Frame:
    """The straight frame of a walk; `ratio=True` takes c = alpha on a flow too."""

    def __init__(self, walk: Walk, *, ratio: bool = False) -> None:
        self.flow = walk.schedule.kind == "flow" and not ratio

    def c(self, at: Point) -> float:
        """Scale of the state: x = c*z."""
        return 1.0 if self.flow else at.alpha

    def u(self, at: Point) -> float:
        """Coordinate of a point, infinite where alpha is 0 and the frame counts in sigma/alpha."""
        return at.sigma if self.flow else at.ratio

    def slope(self, at: Point) -> tuple[float, float]:
        """(e, f) of dz/du = e*x + f*d at a point with x0 prediction d."""
        return velocity(at) if self.flow else epsilon(at)

    def transfer(self, now: Point, then: Point) -> tuple[float, float]:
        """(a, b) of x' = a*x + b*slope, the step along a slope; `now` has a finite u."""
        return self.c(then) / self.c(now), self.c(then) * (self.u(then) - self.u(now))

    def row(self, step: Step, older: Mapping[str, float]) -> dict[str, float]:
        """Coefficients of z' = z + (u' - u) s + sum of w (s_old - s), with w by term of s_old.

        That is the sum of all weights times their slopes; written with differences, the first-order
        step keeps its own form, which has no cancellation.
        """
        x = ancestral(step, 0.0)[0]
        if older:
            (e, f), c = self.slope(step.now), self.c(step.next)
            total = c * math.fsum(older.values())
            x = {"x": x["x"] - total * e, "d": x["d"] - total * f}
            x |= {term: c * w for term, w in older.items()}
        return x

    def analytic(self, walk: Walk, step: Step) -> None:
        """A first step with the slope of data from N(0, 1), which needs no evaluation; kept in y.

        dz/du = z/sqrt(1 + u^2) in sigma/alpha: x0 = alpha x/(alpha^2 + sigma^2 + sigma hypot).
        """
        now, x = step.now, ancestral(step, 0.0)[0]
        total = math.hypot(now.alpha, now.sigma)
        x0 = now.alpha / (total * (total + now.sigma))
        e, f = self.slope(now)
        walk.rows.append(
            Row(
                x={"x": x["x"] + x["d"] * x0},
                y={"x": e + f * x0},
                alpha=now.alpha,
                sigma=now.sigma,
                evaluates=False,
            )
        )


def lagrange_weights(moments: Sequence[float], gaps: Sequence[float]) -> list[float]:
    """Integrals over the step of the Lagrange polynomials of the older slopes.

    Args:
        moments: ``moments[k]`` is the integral of s^k, s the variable of the polynomial counted
            from the current point; k from 1 to the number of gaps (the first entry is not read).
        gaps: s of the older points, newest first.

    s and the gaps have opposite signs, so that each sum below has terms of one sign: no digits
    cancel, however many steps there are.
    """
    weights = []
    for j, gap in enumerate(gaps):
        poly, scale = [1.0], gap
        for k, other in enumerate(gaps):
            if k != j:
                shifted = [0.0, *poly]
                poly = [a - other * b for a, b in zip(shifted, [*poly, 0.0], strict=True)]
                scale *= gap - other
        weights.append(sum(p * m for p, m in zip(poly, moments[1:], strict=False)) / scale)
    return weights


def rho_weights(then: float, nodes: Sequence[float]) -> list[float]:
    """Weights of the slopes at nodes[1:] for a polynomial in u; nodes[0] is the current u."""
    h = then - nodes[0]
    moments = [h ** (k + 1) / (k + 1) for k in range(len(nodes))]
    return lagrange_weights(moments, [u - nodes[0] for u in nodes[1:]])


def log_rho_weights(then: float, nodes: Sequence[float]) -> list[float]:
    """The same for a polynomial in log u."""
    now = nodes[0]
    a = -math.log1p((then - now) / now) if then else math.inf
    moments = [now * (-1) ** (k + 1) * _lower_gamma(k, a) for k in range(len(nodes))]
    return lagrange_weights(moments, [math.log1p((u - now) / now) for u in nodes[1:]])


def _lower_gamma(k: int, a: float) -> float:
    """Integral of s^k exp(-s) from 0 to a."""
    if a > k + 5:  # the tail is under a fifth of the whole: little cancels
        tail = sum(a**m / math.factorial(m) for m in range(k + 1)) if a < 700 else 0.0
        return math.factorial(k) * (1 - math.exp(-a) * tail)
    term = total = a ** (k + 1) / (k + 1)
    m = k + 2
    while term > total * 1e-17:  # terms of one sign
        term *= a / m
        total += term
        m += 1
    return total * math.exp(-a)


# the linear variance-preserving SDE that has sigma/alpha = 0.002 at t = 0.001 and 80 at t = 1:
# log(1 + u^2) = BETA_D t^2/2 + BETA_MIN t (Karras et al. 2022, table 1)
_LOW, _HIGH, _T_LOW = math.log1p(0.002**2), math.log1p(80.0**2), 1e-3
BETA_D = 2 * (_LOW / _T_LOW - _HIGH) / (_T_LOW - 1)
BETA_MIN = _HIGH - BETA_D / 2


def vp_weights(then: float, nodes: Sequence[float]) -> list[float]:
    """The same for a polynomial in that SDE's time t(u); u' is above 0.

    Its integrals have no closed form; Gauss-Legendre in log u gives them to the last digits.
    """
    now, older = nodes[0], len(nodes) - 1
    half = math.log1p((then - now) / now) / 2
    u = np.concatenate([nodes[1:], now * np.exp(half * (_NODES + 1))])
    # t(u) - t(now), as a difference of squares of d log(1 + u^2)/dt over their sum
    rate = np.sqrt(BETA_MIN**2 + 2 * BETA_D * np.log1p(u * u))
    first = math.sqrt(BETA_MIN**2 + 2 * BETA_D * math.log1p(now * now))
    s = 2 * np.log1p((u - now) * (u + now) / (1 + now * now)) / (rate + first)
    at, power = s[older:], half * _WEIGHTS * u[older:]
    moments = [0.0]  # no older slope needs the one of s^0
    for _ in range(older):
        power = power * at
        moments.append(float(power.sum()))
    return lagrange_weights(moments, s[:older].tolist())
