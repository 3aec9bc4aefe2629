"""Options of the DPM-Solvers: what they refuse, what they save, and the functions they share."""

from __future__ import annotations

import math

import pytest

from fastdiff import schedules, solvers
from fastdiff.solvers._exponential import phi

LINEAR, FLOW = schedules.linear(), schedules.flow()
REFUSED = {
    "order-0": (
        "dpmpp_multistep",
        {"order": 0},
        ValueError,
        r"must be an integer in \[1, 3\], got 0",
    ),
    "order-4": (
        "dpm_singlestep",
        {"order": 4},
        ValueError,
        r"must be an integer in \[1, 3\], got 4",
    ),
    "order-half": ("dpm_multistep", {"order": 1.5}, TypeError, "order must be an integer"),
    "order-true": ("dpm_multistep", {"order": True}, TypeError, "order must be an integer"),
    "type": ("dpmpp_singlestep", {"solver_type": "rk"}, ValueError, "solver_type must be one of"),
    "lower": ("dpm_multistep", {"lower_order_final": 1}, TypeError, "lower_order_final must be"),
    "euler": ("dpmpp_multistep", {"euler_at_final": 1}, TypeError, "euler_at_final must be True"),
    "eta": ("dpmpp_3m_sde", {"eta": -1.0}, ValueError, "eta must be finite and at least 0"),
    "eta-fast": ("dpm_fast", {"eta": -1.0}, ValueError, "eta must be finite and at least 0"),
    "churn": ("dpm_2", {"s_churn": -1.0}, ValueError, "s_churn must be finite and at least 0"),
    "noise": ("dpm_2_ancestral", {"s_noise": -1}, ValueError, "s_noise must be finite and at"),
    "rf": ("euler_ancestral", {"rf": True}, ValueError, "must be on a flow for rf=True"),
    "rf-type": ("euler_ancestral", {"rf": 1}, TypeError, "rf must be True or False"),
    "no-eta": ("dpm_singlestep", {"eta": 1.0}, TypeError, "options of dpm_singlestep must be"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    solver, options, error, message = REFUSED[case]
    with pytest.raises(error, match=f"^build: .*{message}"):
        solvers.build(solver, LINEAR, 5, **options)


def test_the_sde_of_the_noise_form_needs_signal():
    with pytest.raises(ValueError, match="dpm_multistep with eta > 0 must begin at alpha > 0"):
        solvers.build("dpm_multistep", FLOW, 5, prediction="flow", eta=1.0)


@pytest.mark.parametrize(("steps", "orders"), [
    (4, [1, 2, 2, 1]), (14, [1, 2, *[3] * 10, 2, 1]), (15, [1, 2, *[3] * 13]),
])  # fmt: skip
def test_orders_of_a_multistep_table(steps, orders):
    """By what a row reads of the past; diffusers stops to lower the order at 15 steps."""
    table = solvers.build("dpmpp_multistep", LINEAR, steps, order=3, final="sigma_min")
    assert [1 + ("h0" in row.x) + ("h1" in row.x) for row in table.rows] == orders


def test_singlestep_keeps_no_anchor():
    """No state is written beside x, and a stage reads at most the predictions of its own step."""
    for name, options in (("dpm_singlestep", {}), ("dpmpp_singlestep", {"eta": 1.0})):
        table = solvers.build(name, LINEAR, 9, order=3, **options)
        assert not table.anchored and table.depth == 2 and table.nfe == len(table) == 9
        assert all(len(row.draws) <= 2 for row in table.rows)


@pytest.mark.parametrize("k", [0, 1, 2, 3])
@pytest.mark.parametrize("z", [1e-9, 1e-3, 0.5, 0.999, 1.0, 5.0, 30.0])
def test_phi_does_not_cancel(k, z):
    from mpmath import exp, factorial, mp, mpf

    for at in (z, -z):
        with mp.workdps(60):
            exact = (exp(mpf(at)) - sum(mpf(at) ** j / factorial(j) for j in range(k))) / mpf(
                at
            ) ** k
            # from 1 on each of the k divisions follows a difference that costs at most two bits
            assert abs(phi(k, at) - exact) <= 2**-52 * 4**k * abs(exact)
    assert phi(k, 0.0) == 1 / math.factorial(k)
