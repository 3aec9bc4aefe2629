"""Measured order of convergence, on data whose score is known in closed form."""

from __future__ import annotations

import functools
import math

import numpy as np
import oracles
import pytest
import torch
from rows import run
from scipy.integrate import solve_ivp
from solver_cases import CASES as EQUAL
from solver_cases import ORDERS

import fastdiff
from fastdiff import schedules, solvers
from fastdiff.ops.reverse_step import reverse_step

CASES = EQUAL | ORDERS
SCHEDULES = {
    "vp": (schedules.linear(), "discrete, at fractional times"),
    "cosine": (schedules.cosine(max_beta=0.2), "discrete, another curve"),
    "edm": (schedules.edm(), "variance exploding"),
    "flow": (schedules.flow(sigma_min=0.02), "from sigma/alpha infinite, to several steps above 0"),
}
WEIGHTS, MEANS, STDS = np.array([0.3, 0.7]), np.array([-1.0, 0.8]), np.array([0.5, 0.4])
MEAN, STD = 0.4, 0.6


def gaussian(x, alpha, sigma):
    """E[x0 | x] for x0 of N(MEAN, STD^2)."""
    total = sigma**2 + alpha**2 * STD**2
    return (MEAN * sigma**2 + alpha * STD**2 * x) / total


def mixture(x, alpha, sigma):
    """E[x0 | x] for x0 of the mixture."""
    total = sigma**2 + alpha**2 * STDS**2
    away = x[..., None] - alpha * MEANS
    log_weight = np.log(WEIGHTS / np.sqrt(total)) - away**2 / (2 * total)
    weight = np.exp(log_weight - log_weight.max(-1, keepdims=True))
    each = (MEANS * sigma**2 + alpha * STDS**2 * x[..., None]) / total
    return (weight * each).sum(-1) / weight.sum(-1)


def network_of(table, x0):
    """The sample-predicting network that knows the data."""
    rows = [row for row in table.rows if row.evaluates]
    times = np.array([row.time for row in rows])

    def network(x, t):
        row = rows[int(np.abs(times - t).argmin())]
        # a transcription finds the time of a middle stage by its own sums
        assert abs(row.time - t) <= 1e-9 * (1 + abs(t))
        return x0(x, row.alpha, row.sigma)

    return network


def no_noise(*_):
    raise AssertionError("a deterministic table drew noise")


def start(schedule):
    return schedule.init_sigma * np.linspace(-2.0, 2.0, 9)


def exact_gaussian(schedule, x, final):
    """The probability flow keeps (x - alpha MEAN)/sqrt(alpha^2 STD^2 + sigma^2)."""
    alpha, sigma = float(schedule.alpha(schedule.t_max)), float(schedule.sigma(schedule.t_max))
    a, s = float(schedule.alpha(final)), float(schedule.sigma(final))
    score = (x - alpha * MEAN) / math.hypot(alpha * STD, sigma)
    return a * MEAN + math.hypot(a * STD, s) * score


@functools.cache
def exact_mixture(name):
    """DOP853 on the probability flow, to the last digits of float64."""
    schedule = SCHEDULES[name][0]
    x, options = start(schedule), {"method": "DOP853", "rtol": 1e-13, "atol": 1e-14}
    if schedule.kind == "flow":
        span = (1.0, schedule.t_min)
        found = solve_ivp(lambda t, x: (x - mixture(x, 1 - t, t)) / t, span, x, **options)
        return found.y[:, -1]
    high, low = float(schedule.ratio(schedule.t_max)), float(schedule.ratio(schedule.t_min))
    span = (math.log(high), math.log(low))
    x = x / float(schedule.alpha(schedule.t_max))
    found = solve_ivp(lambda u, z: z - mixture(z, 1.0, math.exp(u)), span, x, **options)
    return float(schedule.alpha(schedule.t_min)) * found.y[:, -1]


SMOOTH = {
    "discrete": ("karras", "exponential"),
    "edm": ("karras", "exponential"),
    "flow": ("linspace", "karras", "exponential"),
}


def measured(stochastic: bool) -> list[str]:
    """Cases whose order is measured, by whether they draw noise."""
    for case in CASES:
        assert set(CASES[case].kinds) & set(SMOOTH), case
    return [c for c in CASES if CASES[c].converges and draws_noise(c) == stochastic]


def draws_noise(case):
    schedule = next(s for s, _ in SCHEDULES.values() if s.kind in CASES[case].kinds)
    return solvers.build(
        CASES[case].solver, schedule, 4, prediction="sample",
        spacing="karras", final="sigma_min", **CASES[case].options,
    ).stochastic  # fmt: skip


# The last halving of the step is measured here. On a flow, dpmpp_2m starts with two steps of first
# order (log-SNR is infinite at t = 1), and its order nears 2 as slowly as 1/log(steps).
STEPS = (150, 300)
FAR = 0.25  # from the stated order


def tables(case, schedule, spacing, steps=STEPS):
    solver, options, *_ = CASES[case]
    for n in steps:
        yield solvers.build(
            solver, schedule, n,
            prediction="sample", spacing=spacing, final="sigma_min", **options,
        )  # fmt: skip


@pytest.mark.parametrize("data", ["gaussian", "mixture"])
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("case", measured(False))
def test_order(case, name, data):
    schedule = SCHEDULES[name][0]
    if schedule.kind not in CASES[case].kinds:
        return  # refused, see test_solvers.py
    x = start(schedule)
    if data == "gaussian":
        x0, want = gaussian, exact_gaussian(schedule, x, schedule.t_min)
    else:
        x0, want = mixture, exact_mixture(name)
    for spacing in SMOOTH[schedule.kind]:
        errors = []
        for table in tables(case, schedule, spacing):
            network = network_of(table, x0)
            got = run(table, x, network, no_noise, uncond=network)[-1]
            errors.append(float(np.abs(got - want).max()))
        measured, stated = math.log2(errors[0] / errors[1]), table.order
        if data == "gaussian" and CASES[case].gaussian_order is not None:
            stated = CASES[case].gaussian_order
        assert abs(measured - stated) < FAR, (spacing, measured, errors)


# --- solvers with noise, on Gaussian data: the whole run is affine ---------------------------


def affine_network(table, size):
    """The Gaussian denoiser on rows of coefficients: of 1, of the first state, of each draw."""
    one = np.eye(size)[0]

    def x0(c, alpha, sigma):
        total = sigma**2 + alpha**2 * STD**2
        return (MEAN * sigma**2 * one + alpha * STD**2 * c) / total

    return network_of(table, x0)


def moments(coefficients, mean, variance):
    """Mean and variance of the end of a run that starts with the given ones."""
    constant, first, *drawn = coefficients
    return constant + first * mean, first**2 * variance + sum(c**2 for c in drawn)


def table_moments(table, mean, variance):
    size = 2 + len(table)
    basis = np.eye(size)  # a draw is known by its row
    network = affine_network(table, size)
    end = run(table, basis[1], network, lambda _, row: basis[2 + row], uncond=network)[-1]
    return moments(end, mean, variance)


def marginal(schedule, t):
    alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
    return alpha * MEAN, alpha**2 * STD**2 + sigma**2


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("case", measured(True))
def test_weak_order(case, name):
    """The variance at the end, computed without sampling, nears the data's at the stated order."""
    schedule = SCHEDULES[name][0]
    if schedule.kind not in CASES[case].kinds:
        return  # refused, see test_solvers.py
    mean, variance = marginal(schedule, schedule.t_min)
    for spacing in SMOOTH[schedule.kind]:
        errors = []
        for table in tables(case, schedule, spacing):
            got = table_moments(table, *marginal(schedule, schedule.t_max))
            # an affine denoiser keeps the mean exactly: what is left is rounding, once a row
            assert abs(got[0] - mean) <= len(table) * np.finfo(float).eps
            errors.append(abs(got[1] - variance))
        measured = math.log2(errors[0] / errors[1])
        assert abs(measured - table.order) < FAR, (spacing, measured, errors)


SAMPLES = (4, 20000)
DEVIATIONS = 5.0  # a true run leaves this band once in 1.7 million checks


@pytest.mark.parametrize("name", ["vp", "edm"])
@pytest.mark.parametrize("case", measured(True))
def test_sampled_moments(case, name):
    """A run with the library's noise against the mean and variance of the source's recursion."""
    schedule = SCHEDULES[name][0]
    if schedule.kind not in CASES[case].kinds:
        return  # refused, see test_solvers.py
    steps = 12
    (table,) = tables(case, schedule, "karras", (steps,))
    grid = schedule.points(steps, "karras", "sigma_min")
    size = 2 + len(table)
    basis = np.eye(size)
    p = oracles.Problem(
        grid.times, grid.alphas, grid.sigmas,
        network=affine_network(table, size), prediction="sample",
        uncond=affine_network(table, size),
        noise=lambda _, row: basis[2 + row], kind=schedule.kind,
        time_of=lambda level: float(schedule.time(level)),
    )  # fmt: skip
    mean, variance = moments(CASES[case].oracle(p, basis[1])[-1], 0.0, schedule.init_sigma**2)
    by_table = table_moments(table, 0.0, schedule.init_sigma**2)
    # the scale of the rounding: coefficients of the first state times its own size, once a row; a
    # noise form may end wider than it began at so few steps
    rounding = 8 * size * np.finfo(float).eps * max(schedule.init_sigma**2, variance)
    assert abs(by_table[0] - mean) <= rounding and abs(by_table[1] - variance) <= rounding

    seeds = torch.arange(SAMPLES[0])
    x = schedule.init_sigma * fastdiff.randn(seeds.tolist(), SAMPLES[1:])
    network = network_of(table, gaussian)
    history, y = torch.empty((max(table.depth, 1), *SAMPLES)), torch.empty(SAMPLES)
    for i, row in enumerate(table.rows):
        output = network(x.double(), row.time).float() if row.evaluates else None
        x = reverse_step(x, output, table, i, uncond=output, seeds=seeds, history=history, y=y)
    x = x.double()
    n = x.numel()
    assert abs(float(x.mean()) - mean) < DEVIATIONS * math.sqrt(variance / n)
    assert abs(float(x.var()) - variance) < DEVIATIONS * variance * math.sqrt(2 / (n - 1))


@pytest.mark.parametrize("steps", [5, 10, 20, 50])  # from few to where the order shows
def test_heun_from_almost_no_signal(steps):
    """The cosine schedule ends at sigma/alpha = 2e4: Heun's first correction would be 1e3 times
    the change of x0. With Euler there it is closer to the exact flow than DDIM at every count."""
    schedule, s = schedules.cosine(), 0.5

    def posterior_mean(x, t):
        a, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
        return a * s * s / (a * a * s * s + sigma * sigma) * x

    def error(name, **options):
        table = solvers.build(name, schedule, steps, prediction="sample", **options)
        start = np.ones(1)
        last = run(table, start, posterior_mean, no_noise)[-1]
        a, sigma = float(schedule.alpha(999)), float(schedule.sigma(999))
        return abs(float(last[0]) - s / math.hypot(a * s, sigma))

    assert error("heun") < error("ddim")
    assert error("heun") < error("heun", min_alpha=0.0)
