"""fastdiff's own choice of grid and last step keeps the order of convergence to clean data."""

from __future__ import annotations

import math

import numpy as np
import pytest
from rows import run
from scipy.integrate import solve_ivp
from test_convergence import (
    FAR,
    exact_gaussian,
    gaussian,
    mixture,
    network_of,
    no_noise,
    start,
)

from fastdiff import schedules, solvers

SCHEDULES = {
    "linear": (schedules.linear(), "the default spacing is even in (sigma/alpha)^2 near its end"),
    "scaled_linear": (schedules.scaled_linear(), "of latent models, whose least level is higher"),
    "cosine": (schedules.cosine(), "of the shipped model, from sigma/alpha 2e4"),
    "edm": (schedules.edm(), "a ramp to a fixed least level by default"),
}
SOLVERS = {
    "2M": ("dpmpp_2m", {}),
    "3M": ("dpmpp_multistep", {"order": 3}),
    "noise": ("dpm_multistep", {}),
    "UniPC-2": ("unipc", {}),
    "UniPC-3": ("unipc", {"order": 3}),
}
STEPS = (80, 160, 320)


def exact(schedule, data, x):
    """The end of the probability flow at clean data."""
    if data == "gaussian":
        return exact_gaussian(schedule, x, schedule.t_clean)
    z, high = x / float(schedule.alpha(schedule.t_max)), float(schedule.ratio(schedule.t_max))
    low = 1e-7  # below it the flow moves by 1e-14
    found = solve_ivp(
        lambda u, z: z - mixture(z, 1.0, math.exp(u)), (math.log(high), math.log(low)), z,
        method="DOP853", rtol=1e-13, atol=1e-14,
    )  # fmt: skip
    return found.y[:, -1]


def errors(solver, schedule, data, want, **more):
    name, options = SOLVERS[solver]
    x, x0 = start(schedule), gaussian if data == "gaussian" else mixture
    found = []
    for steps in STEPS:
        table = solvers.build(name, schedule, steps, prediction="sample", **options, **more)
        end = run(table, x, network_of(table, x0), no_noise)[-1]
        found.append(float(np.abs(end - want).max()))
    return found, table.order


@pytest.mark.parametrize("data", ["gaussian", "mixture"])
@pytest.mark.parametrize("name", ["linear", "cosine", "edm"])
def test_own_choice_keeps_the_order(name, data):
    """The stated order or more; that of UniPC is higher where its low last step does not show."""
    schedule = SCHEDULES[name][0]
    want = exact(schedule, data, start(schedule))
    for solver in SOLVERS:
        found, order = errors(solver, schedule, data, want)
        measured = math.log2(found[0] / found[2]) / 2
        assert measured > order - FAR, (solver, measured, found)


@pytest.mark.parametrize("data", ["gaussian", "mixture"])
@pytest.mark.parametrize("solver", ["2M", "UniPC-2", "UniPC-3"])
def test_where_the_least_level_is_high(solver, data):
    """q = (sigma/alpha)^2 of scaled_linear ends at 8.5e-4. A plain last step leaves an error of
    order q, which the number of steps does not change; the line leaves one of order q^2."""
    schedule = SCHEDULES["scaled_linear"][0]
    want = exact(schedule, data, start(schedule))
    q = float(schedule.ratio(schedule.t_min)) ** 2
    own, _ = errors(solver, schedule, data, want)
    plain, _ = errors(solver, schedule, data, want, spacing="exponential")
    assert q / 10 < plain[2] < 3 * q and own[2] < plain[2] / 8


@pytest.mark.parametrize("data", ["gaussian", "mixture"])
@pytest.mark.parametrize("solver", ["3M", "UniPC-2", "UniPC-3"])
def test_a_grid_even_in_q_loses_the_order(solver, data):
    """What the own choice leaves: the schedule's default, as diffusers takes it."""
    schedule = SCHEDULES["linear"][0]
    want = exact(schedule, data, start(schedule))
    lost, order = errors(solver, schedule, data, want, spacing="trailing")
    own, _ = errors(solver, schedule, data, want)
    assert math.log2(lost[1] / lost[2]) < order - FAR and own[2] < lost[2] / 5


def test_the_choice():
    """It is what a caller can name; and a named spacing, few steps, noise, order 1, a flow and a
    start at alpha 0 have the plain forms."""
    linear, edm, flow = schedules.linear(), schedules.edm(), schedules.flow()
    no_signal = schedules.rescale_zero_terminal_snr(linear)
    own = {"spacing": "exponential", "final_order": 2}
    same = [
        ("dpmpp_2m", linear, 10, {}, own),
        ("unipc", linear, 10, {"order": 3}, own),
        ("unipc", edm, 10, {}, {"spacing": "karras", "final_order": 2}),
        ("dpmpp_2m", linear, 10, {"final": "sigma_min"}, {"spacing": "exponential"}),
        ("dpmpp_2m", linear, 10, {"final_order": 1}, {"spacing": "exponential"}),
        ("dpmpp_2m", linear, 9, {}, {"spacing": "trailing"}),
        ("dpmpp_2m", flow, 10, {}, {"spacing": "linspace"}),
        ("dpmpp_2m", no_signal, 10, {}, {"spacing": "trailing"}),
        ("dpmpp_multistep", linear, 10, {"eta": 1.0}, {"spacing": "trailing"}),
        ("dpmpp_multistep", linear, 10, {"order": 1}, {"spacing": "trailing"}),
        ("ddim", linear, 10, {}, {"spacing": "trailing"}),
    ]
    for name, schedule, steps, options, named in same:
        table = solvers.build(name, schedule, steps, prediction="sample", **options)
        named = solvers.build(name, schedule, steps, prediction="sample", **(options | named))
        assert table.rows == named.rows, (name, schedule.name, options)


@pytest.mark.parametrize("spacing", ["exponential", "karras", "trailing"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_line_has_bounded_weights(solver, spacing):
    """At any number of steps: the network's rounding is not multiplied."""
    name, options = SOLVERS[solver]
    for steps in (2, 10, 100, 1000):
        table = solvers.build(
            name, schedules.linear(), steps, spacing=spacing, final_order=2, **options
        )
        last = {k: c for k, c in table.rows[-1].x.items() if c}
        assert set(last) in ({"d", "h0"}, {"d", "y"})
        assert abs(sum(last.values()) - 1) < 1e-12 and 1 < last["d"] <= 1.5


@pytest.mark.parametrize(
    "name, options, rule",
    [
        ("dpmpp_2m", {"final_order": 3}, "final_order must be an integer in"),
        ("dpmpp_multistep", {"final_order": 2, "eta": 1.0}, "final_order must be 1 with eta > 0"),
    ],
)
def test_refuses(name, options, rule):
    with pytest.raises(ValueError, match=rule):
        solvers.build(name, schedules.linear(), 10, **options)
