"""Linear multistep tables: coefficients at many steps, orders that hang on the grid, options."""

from __future__ import annotations

import math

import numpy as np
import pytest
from rows import run
from test_convergence import (
    SCHEDULES,
    SMOOTH,
    STEPS,
    exact_gaussian,
    exact_mixture,
    gaussian,
    mixture,
    network_of,
    no_noise,
    start,
)

from fastdiff import schedules, solvers
from fastdiff.solvers import _adams

# --- coefficients ---------------------------------------------------------------------------------

GRIDS = {
    "linspace": (schedules.linear(), "linspace", "nearly every index of the training"),
    "karras": (schedules.linear(), "karras", "steps that shrink"),
    "edm": (schedules.edm(), "karras", "variance exploding"),
    "flow": (schedules.flow(), "linspace", "equal steps, from sigma/alpha infinite"),
}
VARIABLES = {  # of the polynomial, by what u is; and the options that select it
    "lms": ("lms", {}, lambda mp, u: u),
    "rhoab": ("deis", {"variant": "rhoab", "max_order": 4}, lambda mp, u: u),
    "tab": ("deis", {"max_order": 4}, lambda mp, u: vp_time(mp, u)),
    "logrho": ("deis", {"variant": "logrho", "max_order": 4}, lambda mp, u: mp.log(u)),
}


def vp_time(mp, u):
    low, high, t = mp.log1p(mp.mpf(0.002) ** 2), mp.log1p(80**2), mp.mpf(0.001)
    beta_d = 2 * (low / t - high) / (t - 1)
    beta_min = high - beta_d / 2
    return (mp.sqrt(beta_min**2 + 2 * beta_d * mp.log1p(u * u)) - beta_min) / beta_d


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("case", VARIABLES)
def test_coefficients_at_a_thousand_steps(case, name):
    """Each coefficient of a row against 40 digits, from the grid's own alpha and sigma."""
    from mpmath import mp, mpf

    schedule, spacing, _ = GRIDS[name]
    solver, options, variable = VARIABLES[case]
    steps = 999 if name == "linspace" else 1000  # 1,000 indices
    table = solvers.build(
        solver, schedule, steps, prediction="sample", spacing=spacing, final="sigma_min", **options
    )  # fmt: skip
    grid = schedule.points(steps, spacing, "sigma_min")
    straight = schedule.kind == "flow" and case != "logrho"
    with mp.workdps(40):
        a, s = [[mpf(float(v)) for v in values] for values in (grid.alphas, grid.sigmas)]
        c = [mpf(1)] * (steps + 1) if straight else a
        for i in (4, 5, 40, 333, 500, 750, 990, 997, 998):
            u = [s[i + 1 - k] / c[i + 1 - k] for k in range(5)]  # the next, the current, older ones
            v = [variable(mp, w) for w in u[1:]]

            def basis(r, j, v=v):
                at = variable(mp, r)
                return mp.fprod((at - v[k]) / (v[j] - v[k]) for k in range(4) if k != j)

            w = [c[i + 1] * mp.quad(lambda r, j=j: basis(r, j), [u[1], u[0]]) for j in range(4)]
            one = mpf(1) if straight else a[i]  # the slope is x/s - one*d/s
            want = {"x": c[i + 1] / c[i] + w[0] / s[i], "d": -w[0] * one / s[i]}
            want |= {f"h{j - 1}": w[j] for j in (1, 2, 3)}
            got = table.rows[i].x
            assert set(got) == set(want)
            for term, value in want.items():
                assert abs(got[term] - value) <= 1e-10 * abs(value), (i, term, got[term], value)


@pytest.mark.parametrize("k", [0, 1, 2, 3, 4])  # powers that occur
def test_lower_gamma_on_both_sides_of_its_branches(k):
    from mpmath import gammainc, mp, mpf

    with mp.workdps(30):
        for a in (1e-12, 1e-3, 0.5, 2.0, k + 4.999, k + 5.0, k + 5.001, 30.0, 800.0, math.inf):
            want = gammainc(k + 1, 0, mpf(a) if a < math.inf else mp.inf)
            assert abs(_adams._lower_gamma(k, a) - want) <= 8 * 2**-52 * want, a


# --- orders that the grid or the start-up decides -------------------------------------------------

LOG_RHO = {"variant": "logrho"}
AFS = {"afs": True}
# solver, options, schedule, spacing, order
ORDERS = [
    *(("plms", {}, name, s, 2) for name in ("vp", "cosine", "edm") for s in SMOOTH["edm"]),
    *(("plms", {"order": 2}, name, s, 2) for name in ("vp", "edm") for s in SMOOTH["edm"]),
    *(("pndm", {}, name, s, 2) for name in ("vp", "cosine", "edm") for s in SMOOTH["edm"]),
    *(("pndm", {}, "flow", s, 2) for s in SMOOTH["edm"]),
    ("plms", {}, "flow", "karras", 2),
    ("plms", {}, "flow", "exponential", 2),
    ("plms", {}, "flow", "linspace", 3),  # equal steps: pseudo improved Euler alone is left
    ("plms", {"order": 2}, "flow", "linspace", 2),
    *(("deis", LOG_RHO, name, "karras", 3) for name in ("vp", "cosine", "edm")),
    *(("deis", LOG_RHO, "flow", s, 2) for s in SMOOTH["flow"]),
    *(("ipndm", AFS, "flow", s, 1) for s in SMOOTH["flow"]),
    *(("ipndm_v", AFS, "flow", s, 1) for s in SMOOTH["flow"]),
    *(("deis", AFS, "flow", s, 1) for s in SMOOTH["flow"]),
]  # fmt: skip
# at least: the error of the order named shows late, and what shows before falls faster
AT_LEAST = [
    ("pndm", {}, "flow", "linspace", 4),  # equal steps: Runge-Kutta, then Adams-Bashforth
    *(("deis", LOG_RHO, name, "exponential", 3) for name in ("vp", "cosine", "edm")),
    *(("ipndm", AFS, name, s, 1) for name in ("vp", "edm") for s in SMOOTH["edm"]),
]


def orders(solver, options, name, spacing):
    schedule = SCHEDULES[name][0]
    x = start(schedule)
    for x0, want in (
        (gaussian, exact_gaussian(schedule, x, schedule.t_min)),
        (mixture, exact_mixture(name)),
    ):
        errors = []
        for n in STEPS:
            table = solvers.build(
                solver, schedule, n,
                prediction="sample", spacing=spacing, final="sigma_min", **options,
            )  # fmt: skip
            got = run(table, x, network_of(table, x0), no_noise)[-1]
            errors.append(float(np.abs(got - want).max()))
        yield table.order, math.log2(errors[0] / errors[1])


@pytest.mark.parametrize(("solver", "options", "name", "spacing", "order"), ORDERS)
def test_orders(solver, options, name, spacing, order):
    for stated, measured in orders(solver, options, name, spacing):
        assert abs(measured - order) < 0.25 and stated <= order, measured


@pytest.mark.parametrize(("solver", "options", "name", "spacing", "order"), AT_LEAST)
def test_orders_at_least(solver, options, name, spacing, order):
    for stated, measured in orders(solver, options, name, spacing):
        assert measured > order - 0.25 and stated <= order, measured


# --- evaluations and options ----------------------------------------------------------------------


def test_evaluations():
    edm = schedules.edm()
    for solver, options, nfe in (
        ("lms", {}, 10),
        ("plms", {}, 11),
        ("pndm", {}, 19),
        ("ipndm", AFS, 9),
        ("ipndm_v", AFS, 9),
        ("deis", AFS, 9),
    ):
        assert solvers.build(solver, edm, 10, **options).nfe == nfe, solver
    for solver in ("ipndm", "ipndm_v", "deis"):
        assert solvers.build(solver, edm, 1, afs=True).nfe == 1  # the network has its say


def test_names_of_one_method():
    """What the docstrings say of each other."""
    flow, linear = schedules.flow(), schedules.linear()

    def rows(solver, schedule=linear, **options):
        table = solvers.build(
            solver, schedule, 9, prediction="sample", final="sigma_min", **options
        )
        return table.floats

    assert np.array_equal(rows("lms"), rows("ipndm_v"))
    assert np.array_equal(rows("lms", order=3), rows("deis", variant="rhoab", max_order=3))
    # on equal steps the exact weights are those of equal steps
    exact, equal = rows("lms", flow), rows("ipndm", flow)
    assert np.abs(exact - equal).max() <= 1e-13 * np.abs(exact).max()
    euler = rows("euler")
    for name in ("lms", "ipndm", "ipndm_v", "deis"):
        order = {"order": 1} if name == "lms" else {"max_order": 1}
        assert np.array_equal(rows(name, **order), euler)
    assert np.array_equal(rows("gradient_estimation", ge_gamma=1.0)[:, :2], euler[:, :2])


@pytest.mark.parametrize(
    ("solver", "options", "error", "says"),
    [
        ("lms", {"order": 5}, ValueError, r"order must be an integer in \[1, 4\], got 5"),
        ("lms", {"order": 2.0}, TypeError, "order must be an integer, got float"),
        ("lms", {"order": True}, TypeError, "order must be an integer, got bool"),
        ("ipndm", {"max_order": 0}, ValueError, r"max_order must be an integer in \[1, 4\]"),
        ("ipndm", {"afs": 1}, TypeError, "afs must be True or False"),
        ("plms", {"order": 1}, ValueError, r"order must be an integer in \[2, 4\]"),
        ("deis", {"variant": "rho"}, ValueError, "variant must be one of tab, rhoab, logrho"),
        ("gradient_estimation", {"ge_gamma": math.inf}, ValueError, "ge_gamma must"),
        ("gradient_estimation", {"ge_gamma": "2"}, TypeError, "ge_gamma must be a number"),
    ],
)
def test_options_are_checked(solver, options, error, says):
    with pytest.raises(error, match=f"build: {says}"):
        solvers.build(solver, schedules.edm(), 5, **options)
