"""The phi functions of exponential integrators, without cancellation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def phi(k: int, z: float) -> float:
    """phi_k(z) = sum of z^n/(n + k)!, so that phi_0 = exp and z phi_{k+1} = phi_k - 1/k!.

    Hochbruck and Ostermann 2010, equation 2.10; the weight of a change of degree k - 1 over a step.
    At z = -inf it is the limit, 0.
    """
    if k == 0:
        return math.exp(z)
    if z == -math.inf:
        return 0.0
    if abs(z) < 1.0:  # the recurrence would lose k digits a factor of 10 in z
        return math.fsum(z**n / math.factorial(n + k) for n in range(20))
    value = math.expm1(z) / z
    for j in range(1, k):
        value = (value - 1 / math.factorial(j)) / z
    return value


def adams(z: float, nodes: Sequence[float], half: float | None = None) -> list[float]:
    """Weights of D(0) and of D at the nodes for z int_0^1 e^{z(1 - s)} D(s) ds.

    Exact for the polynomial through the values (Lagrange; the nodes are not 0). A lone node may
    have `half`/2 times the difference quotient D(node)/node - D(0)/node in place of the exact
    z phi_2(z) times it. A node at -inf has no weight, as in the limit.
    """
    near = [r for r in nodes if math.isfinite(r)]
    if half is not None and len(near) == len(nodes) == 1:
        rho = [half / 2]
    else:
        rho = []
        for k in range(1, len(near) + 1):
            # the limit of z phi_{k+1}(z) at -inf is -1/k!
            rho.append(-1.0 if z == -math.inf else math.factorial(k) * z * phi(k + 1, z))
        if near:
            rho = np.linalg.solve([[r**k for r in near] for k in range(len(near))], rho).tolist()
    found = dict(zip(near, rho, strict=True))
    weights = [found[r] / r if r in found else 0.0 for r in nodes]
    return [math.expm1(z) - math.fsum(weights), *weights]
