"""The phi functions of exponential integrators, without cancellation."""

from __future__ import annotations

import math


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
