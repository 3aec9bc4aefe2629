"""The inverse of the regularized incomplete beta function, in float64 and without scipy.

For shapes from 0.1 to 1,000, where the logarithms of the gamma functions keep their digits.
"""

from __future__ import annotations

import math

_TINY = 1e-300


def _continued_fraction(x: float, a: float, b: float) -> float:
    """The fraction of DLMF 8.17.22 by Lentz's method; quick where x < (a + 1)/(a + b + 2)."""
    c, d = 1.0, 1.0 / (1 - (a + b) * x / (a + 1))
    total = d
    m = 0
    while True:
        m += 1
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        factor = 1.0
        for term in (even, odd):
            d = 1 / (1 + term * d or _TINY)
            c = 1 + term / c or _TINY
            factor = c * d
            total *= factor
        if abs(factor - 1) < 2**-53:
            return total


def beta_cdf(x: float, a: float, b: float) -> float:
    """I_x(a, b), the probability that a Beta(a, b) variable is at most x in [0, 1]."""
    if not 0 < x < 1:
        return float(x >= 1)
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    front = math.exp(a * math.log(x) + b * math.log1p(-x) - log_beta)
    if x < (a + 1) / (a + b + 2):
        return front * _continued_fraction(x, a, b) / a
    return 1 - front * _continued_fraction(1 - x, b, a) / b


def beta_ppf(p: float, a: float, b: float) -> float:
    """The x in [0, 1] where `beta_cdf` is p: Newton's method on log x, kept inside a bracket."""
    if p <= 0 or p >= 1:
        return float(p >= 1)
    if p == 0.5 and a == b:
        return 0.5
    if p > beta_cdf(0.5, a, b):  # the tail near 1 keeps its digits as the tail near 0
        return 1 - beta_ppf(1 - p, b, a)
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    # where x^a / (a B) is p, the leading term of the cdf
    x = min(math.exp((math.log(p * a) + log_beta) / a), 0.5)
    if x == 0:  # below the smallest float64
        return 0.0
    low, high = 0.0, 0.5
    for _ in range(200):
        off = beta_cdf(x, a, b) - p
        low, high = (x, high) if off < 0 else (low, x)
        # d cdf / d log x
        slope = math.exp(a * math.log(x) + (b - 1) * math.log1p(-x) - log_beta)
        # a step is at most a factor e^8; where it leaves the bracket, halve that
        then = x * math.exp(-max(-8.0, min(off / slope, 8.0)))
        if not low < then < high:
            then = (low + high) / 2
        if abs(then - x) <= 2**-52 * x:
            return then
        x = then
    return x
