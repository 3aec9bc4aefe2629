"""Orders of the DPM-Solvers whose error crosses zero on some grids of test_convergence.py."""

from __future__ import annotations

import math

import numpy as np
import pytest
from rows import run
from solver_cases import CASES
from test_convergence import (
    FAR,
    SCHEDULES,
    exact_gaussian,
    exact_mixture,
    gaussian,
    marginal,
    mixture,
    network_of,
    no_noise,
    start,
    table_moments,
    tables,
)

from fastdiff import solvers

# solver and the order that its table states off flows; on a flow the first step, of first order
# over 1/n of the time, leaves 2
APART = {
    name: case
    for name, case in CASES.items()
    if case.solver in ("dpmpp_multistep", "dpmpp_singlestep", "dpm_singlestep")
    and case.options.get("order", 0) == 3
    and not (case.converges or case.options.get("eta"))
}


def test_these_are_the_cases_measured_here():
    assert {case.solver for case in APART.values()} == {
        "dpmpp_multistep", "dpmpp_singlestep", "dpm_singlestep",
    }  # fmt: skip


@pytest.mark.parametrize("data", ["gaussian", "mixture"])
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("case", APART)
def test_order(case, name, data):
    """Where the grid is uniform in log-SNR (in log t on a flow) no error crosses zero."""
    schedule = SCHEDULES[name][0]
    x = start(schedule)
    exact = exact_gaussian(schedule, x, schedule.t_min), exact_mixture(name)
    x0, want = (gaussian, exact[0]) if data == "gaussian" else (mixture, exact[1])
    errors = []
    for table in tables(case, schedule, "exponential"):
        got = run(table, x, network_of(table, x0), no_noise)[-1]
        errors.append(float(np.abs(got - want).max()))
    third = "singlestep" in case and schedule.kind != "flow"
    assert table.order == (3 if third else 2)
    assert abs(math.log2(errors[0] / errors[1]) - table.order) < FAR, errors


@pytest.mark.parametrize("name", ["vp", "cosine", "edm"])
def test_first_order_sde_of_the_noise_form(name):
    """Of first order, though on a grid uniform in log-SNR what is of first order in the variance of
    Gaussian data nearly cancels."""
    schedule = SCHEDULES[name][0]
    _, variance = marginal(schedule, schedule.t_min)
    errors = {}
    for spacing in ("karras", "exponential"):
        errors[spacing] = []
        for table in tables("dpm_multistep-sde-1", schedule, spacing):
            assert table.order == 1
            got = table_moments(table, *marginal(schedule, schedule.t_max))[1]
            errors[spacing].append(abs(got - variance))
    a, b = errors["karras"]
    assert abs(math.log2(a / b) - 1) < FAR, errors
    assert errors["exponential"][1] < 0.15 * b


@pytest.mark.parametrize("eta", [0.0, 0.5])
@pytest.mark.parametrize("name", ["vp", "edm"])
def test_dpm_fast(name, eta):
    """Of order 3 where no step is of first order; that one shows late, as it is the last."""
    schedule = SCHEDULES[name][0]
    x, want = start(schedule), exact_mixture(name)

    def error(n):
        table = solvers.build(
            "dpm_fast",
            schedule,
            n,
            prediction="sample",
            spacing="exponential",
            final="sigma_min",
            eta=eta,
        )
        assert table.nfe == n and table.order == (3 if n % 3 == 2 else 2)
        if eta:
            got = table_moments(table, *marginal(schedule, schedule.t_max))[1]
            return abs(got - marginal(schedule, schedule.t_min)[1])
        return float(np.abs(run(table, x, network_of(table, mixture), no_noise)[-1] - want).max())

    assert abs(math.log2(error(302) / error(605)) - 3) < FAR
    if name == "vp" and not eta:
        assert abs(math.log2(error(600) / error(1200)) - 2) < FAR
