"""ER-SDE: its integrals against 30 digits, and its refusals."""

from __future__ import annotations

import pytest
from mpmath import exp, log, mp, mpf, quad

from fastdiff import schedules, solvers
from fastdiff.solvers.er_sde import NOISE_SCALERS, _moments

EXACT = {
    "er_sde": lambda v: v * (exp(v ** mpf("0.3")) + 10),
    "sde": lambda v: v**2,
    "ode": lambda v: v,
}


# a step of 1,000, one of 10, all of EDM's range in one, and past it on a nearly silent schedule
@pytest.mark.parametrize("start, end", [(1.0, 0.99), (3.0, 1.0), (80.0, 0.002), (2e4, 0.5)])
@pytest.mark.parametrize("name", NOISE_SCALERS)
def test_integrals(name, start, end):
    phi = EXACT[name]
    got = _moments(NOISE_SCALERS[name], start, end)
    with mp.workdps(30):
        a, b = mpf(start), mpf(end)
        pieces = [log(b) + (log(a) - log(b)) * k / 8 for k in range(9)]
        for power, value in enumerate(got):
            want = quad(
                lambda u, k=power: exp(u) * (exp(u) - a) ** k * (phi(b) / phi(exp(u)) - 1), pieces
            )
            # phi(end)/phi(v) - 1 is a difference of numbers near 1 where the step is short
            scale = (a - b) ** (power + 1) if start / end < 2 else abs(want)
            assert abs(value - want) <= 64 * 2**-52 * scale


@pytest.mark.parametrize(
    "options, rule",
    [
        ({"max_stage": 4}, "max_stage of er_sde must be 1, 2 or 3"),
        ({"noise_scaler": "none"}, "noise_scaler must be one of er_sde, sde, ode"),
    ],
)
def test_refuses(options, rule):
    with pytest.raises(ValueError, match=rule):
        solvers.build("er_sde", schedules.linear(), 10, **options)
