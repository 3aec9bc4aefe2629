"""Every solver's table against the literal transcription of its source, in float64."""

from __future__ import annotations

import math

import numpy as np
import oracles
import pytest
import torch
from oracles import variance_output
from rows import run
from solver_cases import (
    CASES,
    KINDS,
    SCHEDULES,
    SHAPE,
    assert_same,
    draws,
    grids,
    problem_of,
    start,
)

import fastdiff
from fastdiff import schedules, solvers
from fastdiff.ops.noise import Stream
from fastdiff.ops.reverse_step import reverse_step
from fastdiff.solvers import _walk


def fits(case, schedule, grid):
    """Whether the solver is defined on the grid; where it is not, `build` must refuse it."""
    found = CASES[case]
    return schedule.kind in found.kinds and not (found.signal and grid.alphas[0] == 0)


@pytest.mark.parametrize("schedule", [s for s, _ in SCHEDULES.values()], ids=list(SCHEDULES))
@pytest.mark.parametrize("case", CASES)
def test_refuses_where_it_is_not_defined(case, schedule):
    solver, options, *_ = CASES[case]
    if fits(case, schedule, schedule.points(6)):
        solvers.build(solver, schedule, 6, prediction="sample", **options)
        return
    with pytest.raises(ValueError, match=solver):
        solvers.build(solver, schedule, 6, prediction="sample", **options)


def rounding_scale(p, x, oracle, want):
    """How far the source's own states move per relative change of the network's outputs."""
    network, change = p.network, 2.0**-40
    p.network = lambda x_in, t: network(x_in, t) * (1 + change)
    moved = oracle(p, x)
    p.network = network
    return max(float(np.abs(m - w).max()) for m, w in zip(moved, want, strict=True)) / change


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 50])
@pytest.mark.parametrize("case", CASES)
def test_trajectory_equals_the_source(case, steps):
    solver, options, oracle, *_ = CASES[case]
    for name, spacing, final in grids():
        schedule = SCHEDULES[name][0]
        grid = schedule.points(steps, spacing, final)
        if not fits(case, schedule, grid):
            continue
        for prediction in KINDS[schedule.kind]:
            if prediction == "epsilon" and grid.alphas[0] == 0:
                continue  # refused, see test_epsilon_needs_signal
            table = solvers.build(
                solver, schedule, steps,
                prediction=prediction, spacing=spacing, final=final, **options,
            )  # fmt: skip
            p = problem_of(schedule, grid, prediction)
            x = start(schedule)
            got = run(table, x, p.network, draws, uncond=p.uncond, variance=variance_output)
            want = oracle(p, x)
            size = rounding_scale(p, x, oracle, want) if CASES[case].amplifies else 0.0
            assert_same(got, want, (case, name, spacing, final, prediction, steps), size)


@pytest.mark.parametrize("case", CASES)
def test_clipping_x0_is_clipping_in_the_source(case):
    solver, options, oracle, *_ = CASES[case]
    for name in ("linear", "edm", "flow"):
        schedule = SCHEDULES[name][0]
        if not fits(case, schedule, schedule.points(7)):
            continue
        prediction = KINDS[schedule.kind][-1]
        p = problem_of(schedule, schedule.points(7), prediction, clip=0.4)
        table = solvers.build(solver, schedule, 7, prediction=prediction, **options)
        x = start(schedule)
        got = run(table, x, p.network, draws, uncond=p.uncond, clip=0.4, variance=variance_output)
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
    solver, options, oracle, *_ = CASES[case]
    schedule = SCHEDULES[name][0]
    if not fits(case, schedule, schedule.points(6)):
        return  # refused, see test_refuses_where_it_is_not_defined
    prediction = KINDS[schedule.kind][-1]
    table = solvers.build(solver, schedule, 6, prediction=prediction, **options)
    p = problem_of(schedule, schedule.points(6), prediction)
    seeds = torch.tensor([11, 5])
    p.noise = lambda stream, step: (
        fastdiff.randn(seeds.tolist(), SHAPE[1:], step=step, stream=stream).double().numpy()
    )
    x = torch.from_numpy(start(schedule))
    y = torch.full(SHAPE, math.nan, dtype=torch.float64)
    history = torch.full((max(table.depth, 1), *SHAPE), math.nan, dtype=torch.float64)
    model_input = table.rows[0].c_in * x
    got = []
    for i, row in enumerate(table.rows):
        output = uncond = variance = None
        if row.evaluates:
            output = torch.from_numpy(p.network(model_input.numpy(), row.time))
            uncond = torch.from_numpy(p.uncond(model_input.numpy(), row.time))
            variance = torch.from_numpy(variance_output(x.numpy(), row.time))
        written = torch.empty_like(x)
        with fastdiff.use_backend("reference"):
            x = reverse_step(
                x, output, table, i,
                uncond=uncond, y=y, seeds=seeds, history=history, variance=variance,
                model_input=written,
            )  # fmt: skip
        model_input = written
        got.append(x.numpy())
    assert_same(got, oracle(p, start(schedule)), (case, name))


@pytest.mark.parametrize("case", CASES)
def test_every_draw_has_its_own_counter(case):
    solver, options, *_ = CASES[case]
    schedule = next(s for s, _ in SCHEDULES.values() if fits(case, s, s.points(12)))
    table = solvers.build(solver, schedule, 12, prediction="sample", **options)
    seen = set()
    for i, row in enumerate(table.rows):
        wanted = Stream.STEP if row.evaluates else Stream.CHURN
        # of its own index, or of an earlier row whose noise it draws again
        assert all(stream == wanted and (c == i or (stream, c) in seen) for stream, c in row.draws)
        seen |= set(row.draws)
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
    solver, options, *_ = CASES[case]
    if not fits(case, schedule, schedule.points(5)):
        return  # refused, see test_refuses_where_it_is_not_defined
    table = solvers.build(solver, schedule, 5, prediction="sample", **options)
    last = {k: c for k, c in table.rows[-1].x.items() if c}
    assert table.init_sigma == schedule.init_sigma
    assert not table.rows[-1].draws
    if CASES[case].ends_in_x0 != "line":
        assert (last == {"d": 1.0}) == CASES[case].ends_in_x0
        return
    # of a state on a line to x0 every slope is the same, and the step ends in that x0
    x0 = np.full(SHAPE, 0.7)
    x = schedule.alpha(schedule.t_max) * x0 + schedule.sigma(schedule.t_max) * start(schedule)
    end = run(table, x, lambda *_: x0, draws)[-1]
    assert np.abs(end - x0).max() <= 1e-12 * np.abs(x).max()


def test_eta_above_one_is_capped_as_in_k_diffusion():
    schedule = SCHEDULES["linear"][0]
    p = problem_of(schedule, schedule.points(10), "epsilon")
    table = solvers.build("euler_ancestral", schedule, 10, eta=3.0)
    x = start(schedule)
    got = run(table, x, p.network, draws)
    assert_same(got, oracles.euler_ancestral(p, x, 3.0, 1.0), "eta=3")


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("z", [1e-9, -1e-3, 0.0999, -0.1, 1.0, -1.0, -30.0, 30.0])
def test_phi_does_not_cancel(k, z):
    from mpmath import exp, factorial, mp, mpf

    from fastdiff.solvers._phi import phi

    with mp.workdps(60):
        exact = exp(mpf(z))
        for j in range(k):
            exact = (exact - 1 / factorial(j)) / mpf(z)
        # from |z| = 1 on, each step of the recurrence may cancel a factor (j + 1) or so
        assert abs(phi(k, z) - exact) <= 8 * k * 2**-52 * float(exact)
