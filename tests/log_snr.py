"""Scalars of the transcriptions that stand on log(alpha/sigma), in 100 digits.

A source's own formula then needs no special form for small steps, and its limit at alpha = 0 is
taken by putting in a number that is nearly 0: exp(-10^20) moves no digit.
"""

from __future__ import annotations

import functools

from mpmath import expm1, factorial, inf, log, mp, mpf

mp.dps = 100
NO_SIGNAL = -(mpf(10) ** 20)


def log_snr(p) -> list:
    """log(alpha/sigma) at each point of a problem."""
    return [_log_snr(float(a), float(s)) for a, s in zip(p.alphas, p.sigmas, strict=True)]


@functools.cache
def _log_snr(alpha: float, sigma: float):
    return inf if sigma == 0 else NO_SIGNAL if alpha == 0 else log(mpf(alpha) / mpf(sigma))


@functools.cache
def phi(k: int, z):
    """phi_1 = (e^z - 1)/z, phi_{k+1} = (phi_k - 1/k!)/z."""
    value = expm1(z) / z
    for j in range(1, k):
        value = (value - 1 / factorial(j)) / z
    return value
