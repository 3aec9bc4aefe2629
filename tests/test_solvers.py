"""Every solver's table against the literal transcription of its source, in float64."""

from __future__ import annotations

import functools
import math

import numpy as np
import oracles
import pytest
import torch
from rows import run

import fastdiff
from fastdiff import schedules, solvers
from fastdiff.ops.noise import Stream
from fastdiff.ops.reverse_step import reverse_step
from fastdiff.solvers import _walk

SHAPE = (2, 3)
CHURN = (8.0, 0.05, 50.0, 1.003)
CHURN_OPTIONS = dict(zip(("s_churn", "s_tmin", "s_tmax", "s_noise"), CHURN, strict=True))
NO_CHURN = (0.0, 0.0, math.inf, 1.0)

SCHEDULES = {
    "linear": (schedules.linear(), "the betas of Ho et al."),
    "cosine": (schedules.cosine(T=400, max_beta=0.2), "clipped betas, another T"),
    "zero_snr": (
        schedules.rescale_zero_terminal_snr(schedules.scaled_linear()),
        "alpha is 0 at the first time of the trailing and linspace spacings",
    ),
    "edm": (schedules.edm(), "variance exploding"),
    "flow": (schedules.flow(), "alpha is 0 at the first time of every spacing"),
    "shifted_flow": (schedules.flow(shift=3.0), "a warped grid"),
}
KINDS = {
    "discrete": ("epsilon", "sample", "v_prediction"),
    "edm": ("epsilon", "sample", "edm"),
    "flow": ("sample", "flow"),
}


def heun_oracle(p, x, churn):
    return (oracles.flow_heun if p.kind == "flow" else oracles.heun)(p, x, churn)


def level_oracle(of_levels, fallback):
    """Sources that count in sigma/alpha say nothing where it is infinite: there DDIM's equation."""
    return lambda p, x: (of_levels if p.alphas[0] else fallback)(p, x)


def euler_oracle(churn):
    def run_oracle(p, x):
        if p.alphas[0]:
            return oracles.euler(p, x, churn)
        first = oracles.ddim(oracles._from(p, 0, 1), x, 0.0)
        if p.steps == 1:
            return first
        rest = oracles._from(p, 1, p.steps)
        rest.noise = lambda kind, row: p.noise(kind, row + 1)
        rest_churn = (churn[0] * rest.steps / p.steps, *churn[1:])  # s_churn is of all the steps
        return first + oracles.euler(rest, first[0], rest_churn)

    return run_oracle


# name: solver, options, oracle, reason
CASES = {
    "ddpm": ("ddpm", {}, lambda p, x: oracles.ddpm(p, x, "fixed_small", None), "default"),
    "ddpm-large": (
        "ddpm",
        {"variance": "fixed_large"},
        lambda p, x: oracles.ddpm(p, x, "fixed_large", None),
        "the other fixed variance",
    ),
    "ddpm-learned": (
        "ddpm",
        {"variance": "learned_range"},
        lambda p, x: oracles.ddpm(p, x, "learned_range", variance_output),
        "variance by the network",
    ),
    "ddim": ("ddim", {}, lambda p, x: oracles.ddim(p, x, 0.0), "deterministic"),
    "ddim-eta": ("ddim", {"eta": 0.3}, lambda p, x: oracles.ddim(p, x, 0.3), "between"),
    "ddim-eta1": ("ddim", {"eta": 1.0}, lambda p, x: oracles.ddim(p, x, 1.0), "equals DDPM"),
    "euler": ("euler", {}, euler_oracle(NO_CHURN), "deterministic"),
    "euler-churn": ("euler", CHURN_OPTIONS, euler_oracle(CHURN), "noise rows on the churn stream"),
    "euler_ancestral": (
        "euler_ancestral",
        {},
        level_oracle(
            lambda p, x: oracles.euler_ancestral(p, x, 1.0, 1.0),
            lambda p, x: oracles.ddim(p, x, 1.0),
        ),
        "default",
    ),
    "euler_ancestral-options": (
        "euler_ancestral",
        {"eta": 0.7, "s_noise": 1.01},
        level_oracle(
            lambda p, x: oracles.euler_ancestral(p, x, 0.7, 1.01),
            lambda p, x: oracles.ddim(p, x, 0.7, 1.01),
        ),
        "options",
    ),
    "heun": ("heun", {}, lambda p, x: heun_oracle(p, x, NO_CHURN), "deterministic"),
    "heun-churn": ("heun", CHURN_OPTIONS, lambda p, x: heun_oracle(p, x, CHURN), "algorithm 2"),
    "dpmpp_2m": ("dpmpp_2m", {}, lambda p, x: oracles.dpmpp_2m(p, x, "midpoint"), "default"),
    "dpmpp_2m-heun": (
        "dpmpp_2m",
        {"solver_type": "heun"},
        lambda p, x: oracles.dpmpp_2m(p, x, "heun"),
        "the other solver type",
    ),
    "dpmpp_2m_sde": (
        "dpmpp_2m_sde",
        {},
        lambda p, x: oracles.dpmpp_2m_sde(p, x, 1.0, 1.0, "midpoint"),
        "default",
    ),
    "dpmpp_2m_sde-heun": (
        "dpmpp_2m_sde",
        {"eta": 0.4, "s_noise": 1.01, "solver_type": "heun"},
        lambda p, x: oracles.dpmpp_2m_sde(p, x, 0.4, 1.01, "heun"),
        "every option",
    ),
    "dpmpp_2m_sde-ode": (
        "dpmpp_2m_sde",
        {"eta": 0.0},
        lambda p, x: oracles.dpmpp_2m(p, x, "midpoint"),
        "without noise it is dpmpp_2m",
    ),
}


MIX = np.random.default_rng(3).normal(size=(3, 3)) / 3


def data_model(x, phase):
    """A nonlinear guess of x0, bounded, whose slope is of order one."""
    return np.tanh(x @ MIX + np.cos(phase)) + 0.3 * np.sin(2 * x + phase)


def variance_output(x, t):
    return np.tanh(x @ MIX.T - 0.2)


@functools.cache
def scales(name, shift, t):
    schedule = next(s for s, _ in SCHEDULES.values() if (s.name, s.shift) == (name, shift))
    return float(schedule.alpha(t)), float(schedule.sigma(t))


def make_network(schedule, prediction):
    """The raw output whose conversion is near `data_model`: any function of (x_in, t) would do,
    and this one keeps trajectories of the size that samplers meet."""

    def network(x_in, t):
        if prediction == "edm":
            sigma, sd = math.exp(4 * t), schedule.sigma_data
            total = math.hypot(sigma, sd)
            x0 = data_model(x_in * total / (1 + sigma), t)
            return (x0 - sd**2 / total**2 * (total * x_in)) * total / (sigma * sd)
        alpha, sigma = scales(schedule.name, schedule.shift, t)
        x0 = data_model(x_in / (alpha + sigma), np.log1p(t))
        if prediction == "sample":
            return x0
        eps = (x_in - alpha * x0) / sigma
        return {
            "epsilon": eps,
            "v_prediction": alpha * eps - sigma * x0,
            "flow": eps - x0,
        }[prediction]

    return network


@functools.cache
def draws(kind, row):
    return np.random.default_rng((kind, row)).normal(size=SHAPE)


def problem_of(schedule, grid, prediction, **more):
    return oracles.Problem(
        times=grid.times,
        alphas=grid.alphas,
        sigmas=grid.sigmas,
        network=make_network(schedule, prediction),
        prediction=prediction,
        noise=draws,
        kind=schedule.kind,
        time_of=lambda level: float(schedule.time(level)),
        sigma_data=schedule.sigma_data,
        **more,
    )


def grids():
    """schedule name, spacing, final for every grid that exists."""
    for name, (schedule, _) in SCHEDULES.items():
        for spacing in schedules.SPACINGS[schedule.kind]:
            for final in ("zero", "sigma_min"):
                ramp = spacing in ("karras", "exponential")
                if ramp and name in ("zero_snr", "shifted_flow"):
                    continue  # refused: sigma/alpha infinite, or a shift that would be ignored
                yield name, spacing, final


def start(schedule):
    return schedule.init_sigma * np.random.default_rng(7).normal(size=SHAPE)


def assert_same(got, want, label, largest=0.0):
    """1e-12 of the largest state that the trajectory has passed through, at each row."""
    assert len(got) == len(want), label
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert np.isfinite(w).all() and np.isfinite(g).all(), (label, i)
        largest = max(largest, float(np.abs(w).max()))
        worst = float(np.abs(g - w).max())
        assert worst <= 1e-12 * largest, (label, i, worst / largest)


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 50])
@pytest.mark.parametrize("case", CASES)
def test_trajectory_equals_the_source(case, steps):
    solver, options, oracle, _ = CASES[case]
    for name, spacing, final in grids():
        schedule = SCHEDULES[name][0]
        grid = schedule.points(steps, spacing, final)
        for prediction in KINDS[schedule.kind]:
            if prediction == "epsilon" and grid.alphas[0] == 0:
                continue  # refused, see test_epsilon_needs_signal
            table = solvers.build(
                solver, schedule, steps,
                prediction=prediction, spacing=spacing, final=final, **options,
            )  # fmt: skip
            p = problem_of(schedule, grid, prediction)
            x = start(schedule)
            got = run(table, x, p.network, draws, variance=variance_output)
            assert_same(got, oracle(p, x), (case, name, spacing, final, prediction, steps))


@pytest.mark.parametrize("case", CASES)
def test_clipping_x0_is_clipping_in_the_source(case):
    solver, options, oracle, _ = CASES[case]
    for name in ("linear", "edm", "flow"):
        schedule = SCHEDULES[name][0]
        prediction = KINDS[schedule.kind][-1]
        p = problem_of(schedule, schedule.points(7), prediction, clip=0.4)
        table = solvers.build(solver, schedule, 7, prediction=prediction, **options)
        x = start(schedule)
        got = run(table, x, p.network, draws, clip=0.4, variance=variance_output)
        assert_same(got, oracle(p, x), (case, name))
        p.clip = None
        unclipped = oracle(p, x)
        assert np.abs(got[-1] - unclipped[-1]).max() > 0.01  # the bound was reached


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("clip", [None, 0.4])
def test_ddim_with_the_models_own_noise(eta, clip):
    for name in SCHEDULES:
        schedule = SCHEDULES[name][0]
        prediction = KINDS[schedule.kind][-1]
        options = {"eta": eta, "use_clipped_model_output": False}
        table = solvers.build("ddim", schedule, 7, prediction=prediction, **options)
        p = problem_of(schedule, schedule.points(7), prediction, clip=clip, rederive=False)
        x = start(schedule)
        got = run(table, x, p.network, draws, clip=clip)
        assert_same(got, oracles.ddim(p, x, eta), (name, eta, clip))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["linear", "edm", "flow"])
def test_the_op_runs_the_table(case, name):
    """ops.reverse_step in float64, with the library's own noise, model input and history."""
    solver, options, oracle, _ = CASES[case]
    schedule = SCHEDULES[name][0]
    prediction = KINDS[schedule.kind][-1]
    table = solvers.build(solver, schedule, 6, prediction=prediction, **options)
    p = problem_of(schedule, schedule.points(6), prediction)
    seeds = torch.tensor([11, 5])
    p.noise = lambda stream, step: (
        fastdiff.randn(seeds.tolist(), SHAPE[1:], step=step, stream=stream).double().numpy()
    )
    x = torch.from_numpy(start(schedule))
    history = torch.full((max(table.depth, 1), *SHAPE), math.nan, dtype=torch.float64)
    model_input = table.rows[0].c_in * x
    got = []
    for i, row in enumerate(table.rows):
        output = variance = None
        if row.evaluates:
            output = torch.from_numpy(p.network(model_input.numpy(), row.time))
            variance = torch.from_numpy(variance_output(x.numpy(), row.time))
        written = torch.empty_like(x)
        with fastdiff.use_backend("reference"):
            x = reverse_step(
                x, output, table, i,
                seeds=seeds, history=history, variance=variance, model_input=written,
            )  # fmt: skip
        model_input = written
        got.append(x.numpy())
    assert_same(got, oracle(p, start(schedule)), (case, name))


@pytest.mark.parametrize("case", CASES)
def test_every_draw_has_its_own_counter(case):
    solver, options, _, _ = CASES[case]
    table = solvers.build(solver, SCHEDULES["linear"][0], 12, **options)
    for i, row in enumerate(table.rows):
        wanted = Stream.STEP if row.evaluates else Stream.CHURN
        assert row.draws in ((), ((wanted, i),))
    assert (_walk.STEP, _walk.CHURN) == (Stream.STEP, Stream.CHURN)


def test_churn_stays_within_its_levels():
    every = schedules.edm().points(18).sigmas[:-1].tolist()
    for low, high in ((0.05, 50.0), (every[12], every[3])):  # the ends belong to them
        options = {"s_churn": 40.0, "s_tmin": low, "s_tmax": high}
        table = solvers.build("heun", schedules.edm(), 18, prediction="edm", **options)
        churned = [row.sigma for row in table.rows if not row.evaluates]
        assert churned == [s for s in every if low <= s <= high]
    assert table.nfe == 35  # Karras et al. 2022: 18 steps are 35 evaluations


@pytest.mark.parametrize("schedule", [s for s, _ in SCHEDULES.values()], ids=list(SCHEDULES))
@pytest.mark.parametrize("case", CASES)
def test_last_step_is_clean_and_noiseless(case, schedule):
    solver, options, _, _ = CASES[case]
    table = solvers.build(solver, schedule, 5, prediction="sample", **options)
    last = {k: c for k, c in table.rows[-1].x.items() if c}
    assert last == {"d": 1.0} and table.init_sigma == schedule.init_sigma


def test_eta_above_one_is_capped_as_in_k_diffusion():
    schedule = SCHEDULES["linear"][0]
    p = problem_of(schedule, schedule.points(10), "epsilon")
    table = solvers.build("euler_ancestral", schedule, 10, eta=3.0)
    x = start(schedule)
    got = run(table, x, p.network, draws)
    assert_same(got, oracles.euler_ancestral(p, x, 3.0, 1.0), "eta=3")


@pytest.mark.parametrize("h", [1e-9, 1e-3, 0.0999, 0.1, 1.0, 30.0])
def test_phi_does_not_cancel(h):
    from mpmath import exp, mp, mpf

    from fastdiff.solvers.dpmpp import _phi

    with mp.workdps(40):
        exact = 1 - (1 - exp(-mpf(h))) / mpf(h)
        # near 0.1 two digits cancel in the closed form, one unit in the last place of 1 each
        assert abs(_phi(h) - exact) <= 4 * 2**-52 * max(float(exact), 2**-4)
