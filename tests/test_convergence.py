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

import fastdiff
from fastdiff import schedules, solvers
from fastdiff.ops.reverse_step import reverse_step

SCHEDULES = {
    "vp": (schedules.linear(), "discrete, at fractional times"),
    "cosine": (schedules.cosine(max_beta=0.2), "discrete, another curve"),
    "edm": (schedules.edm(), "variance exploding"),
    "flow": (schedules.flow(), "from sigma/alpha infinite"),
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
    scales = {row.time: (row.alpha, row.sigma) for row in table.rows if row.evaluates}
    return lambda x, t: x0(x, *scales[t])


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


DETERMINISTIC = {
    "ddim": ("ddim", {}, "first order"),
    "euler": ("euler", {}, "the same"),
    "heun": ("heun", {}, "two evaluations"),
    "dpmpp_2m": ("dpmpp_2m", {}, "one evaluation and one kept"),
    "dpmpp_2m-heun": ("dpmpp_2m", {"solver_type": "heun"}, "the other second order"),
    "dpmpp_2m_sde": ("dpmpp_2m_sde", {"eta": 0.0}, "its ODE"),
}
SMOOTH = {"discrete": ("karras", "exponential"), "edm": ("karras", "exponential"),
          "flow": ("linspace", "karras", "exponential")}  # fmt: skip


def order(errors):
    """Of the last halving of the step."""
    return math.log2(errors[-2] / errors[-1])


@pytest.mark.parametrize("data", ["gaussian", "mixture"])
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("case", DETERMINISTIC)
def test_order(case, name, data):
    solver, options, _ = DETERMINISTIC[case]
    schedule = SCHEDULES[name][0]
    x = start(schedule)
    for spacing in SMOOTH[schedule.kind]:
        if data == "gaussian":
            want = exact_gaussian(schedule, x, schedule.t_min)
        else:
            want = exact_mixture(name)
        errors = []
        for steps in (50, 100, 200, 400):
            table = solvers.build(
                solver, schedule, steps,
                prediction="sample", spacing=spacing, final="sigma_min", **options,
            )  # fmt: skip
            x0 = gaussian if data == "gaussian" else mixture
            got = run(table, x, network_of(table, x0), no_noise)[-1]
            errors.append(float(np.abs(got - want).max()))
        print(case, name, data, spacing, table.order, [f"{math.log2(a/b):.3f}" for a,b in zip(errors,errors[1:])], errors[-1])


STOCHASTIC = {
    "ddpm": ("ddpm", {}, "x"),
    "ddpm-large": ("ddpm", {"variance": "fixed_large"}, "x"),
    "ddim-half": ("ddim", {"eta": 0.5}, "x"),
    "euler_ancestral": ("euler_ancestral", {}, "x"),
    "ea-half": ("euler_ancestral", {"eta":.5}, "x"),
    "sde": ("dpmpp_2m_sde", {}, "x"),
    "sde-half": ("dpmpp_2m_sde", {"eta": 0.5}, "x"),
    "sde-heun": ("dpmpp_2m_sde", {"solver_type": "heun"}, "x"),
    "heun-churn": ("heun", {"s_churn": 5.0}, "x"),
    "euler-churn": ("euler", {"s_churn": 5.0}, "x"),
    "heun-churn80": ("heun", {"s_churn": 80.0}, "x"),
}


def affine_moments(table, mean, var):
    size = 2 + len(table.rows)
    def noise(_, row): return np.eye(size)[2 + row]
    const = np.eye(size)[0]
    scales = {row.time: (row.alpha, row.sigma) for row in table.rows if row.evaluates}
    def net(c, t):
        alpha, sigma = scales[t]
        total = sigma**2 + alpha**2 * STD**2
        return (MEAN * sigma**2 * const + alpha * STD**2 * c) / total
    c = run(table, np.eye(size)[1], net, noise)[-1]
    return c[0] + c[1] * mean, c[1] ** 2 * var + (c[2:] ** 2).sum()


def test_weak():
    for case, (solver, options, _) in STOCHASTIC.items():
        for name, (schedule, _) in SCHEDULES.items():
            for spacing in SMOOTH[schedule.kind]:
                a0, s0 = float(schedule.alpha(schedule.t_max)), float(schedule.sigma(schedule.t_max))
                a1, s1 = float(schedule.alpha(schedule.t_min)), float(schedule.sigma(schedule.t_min))
                em, ev = [], []
                for steps in (50, 100, 200, 400):
                    table = solvers.build(solver, schedule, steps, prediction="sample", spacing=spacing, final="sigma_min", **options)
                    m, v = affine_moments(table, a0 * MEAN, a0**2 * STD**2 + s0**2)
                    em.append(abs(m - a1 * MEAN)+1e-17); ev.append(abs(v - a1**2*STD**2 - s1**2))
                print(case, name, spacing, table.order, "mean", [f"{math.log2(a/b):.2f}" for a,b in zip(em,em[1:])], f"{em[-1]:.1e}", "var", [f"{math.log2(a/b):.2f}" for a,b in zip(ev,ev[1:])], f"{ev[-1]:.1e}")
