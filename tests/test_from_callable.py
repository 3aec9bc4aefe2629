"""Tables imported from the samplers of k-diffusion."""

from __future__ import annotations

import functools
import inspect
import itertools
import math

import numpy as np
import pytest
import torch
from budget import assert_within_budget
from k_samplers import SCHEDULES, by_sampler, levels_of, sampler_of
from rows import run
from solver_cases import SHAPE, assert_same, draws, problem_of

import fastdiff
from fastdiff import StepTable, solvers
from fastdiff.reference.gmm import GaussianMixture
from fastdiff.schedules import Grid

CHURN = {"s_churn": 3.0, "s_noise": 1.003}
WINDOW = {"s_churn": 3.0, "s_tmin": 0.3, "s_tmax": 5.0}
ANCESTRAL = {"eta": 0.6, "s_noise": 1.01}
# sampler: options, why
SAMPLERS = {
    "euler": ({}, "no state but x"),
    "euler-churn": (CHURN, "a draw before the first call"),
    "euler-window": (WINDOW, "draws that are made and not used"),
    "euler_ancestral": (ANCESTRAL, "a draw a step"),
    "heun": ({}, "two stages"),
    "heun-churn": (CHURN, "two stages from a churned state"),
    "dpm_2": ({}, "a stage between levels"),
    "dpm_2-window": (WINDOW, "the same with churn"),
    "dpm_2_ancestral": (ANCESTRAL, "noise after the second stage"),
    "lms": ({}, "three slopes, whose states are gone"),
    "lms-2": ({"order": 2}, "one slope"),
    "lms-5": ({"order": 5}, "as many slopes as a table has"),
    "lms-6": ({"order": 6}, "one slope more: the anchor holds it"),
    "dpm_fast": ({}, "three stages, then two, then one"),
    "dpm_fast-eta": ({"eta": 0.5}, "noise too"),
    "dpm_fast-9": ({"calls": 9}, "another pattern of stages"),
    "dpmpp_2s_ancestral": (ANCESTRAL, "two stages of data"),
    "dpmpp_sde": ({}, "noise in the stage and in the step: an anchor"),
    "dpmpp_sde-options": ({**ANCESTRAL, "r": 0.3}, "another stage"),
    "dpmpp_2m": ({}, "one x0 of before"),
    "dpmpp_2m_sde": ({}, "with noise"),
    "dpmpp_2m_sde-heun": ({**ANCESTRAL, "solver_type": "heun"}, "options"),
    "dpmpp_3m_sde": (ANCESTRAL, "two x0 of before"),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("case", SAMPLERS)
def test_imported_table_is_the_sampler(case, name, monkeypatch):
    solver, options = case.split("-")[0], SAMPLERS[case][0]
    sampler, schedule = sampler_of(solver), SCHEDULES[name]
    last = {"edm": "edm", "linear": "v_prediction", "flow": "flow"}[name]
    for prediction, steps, final in (
        ("sample", 2, "zero"), (last, 9, "sigma_min"), (last, 20, "zero"),
    ):  # fmt: skip
        grid, levels = levels_of(name, steps, final)
        if solver == "dpm_fast":  # ends at the last level above 0, which is the end of its grid
            grid = Grid(*(v[:-1] if final == "zero" else v
                          for v in (grid.times, grid.alphas, grid.sigmas)))  # fmt: skip
            levels = np.divide(grid.sigmas, grid.alphas)
        p = problem_of(schedule, grid, prediction)
        table = StepTable.from_callable(
            sampler, levels, schedule=schedule, prediction=prediction, **options
        )
        noise = np.random.default_rng(7).normal(size=SHAPE)
        states = run(table, table.init_sigma * noise, p.network, draws)
        want = by_sampler(
            sampler, p, levels, levels[0] * noise, lambda k: draws(1, k), options, monkeypatch
        ).numpy()
        sizes = (np.abs(g).max() / a for g, a in zip(states[:-1], table.alphas[1:], strict=True))
        largest = max([np.abs(levels[0] * noise).max(), *sizes])
        got = states[-1] / grid.alphas[-1]
        # what a coefficient of 1e4 loses of the state it multiplies (Heun in two steps)
        condition = max(1.0, *(abs(c) for row in table.rows for c in row.x.values()))
        assert_same([got], [want], (case, name, steps), largest * condition)


OWN = {
    "euler": ({}, "default"),
    "euler_ancestral": ({"eta": 0.7, "s_noise": 1.01}, "options"),
    "heun": ({}, "default"),
    "dpmpp_2m": ({}, "default"),
    "dpmpp_2m_sde": ({}, "default"),
    "dpmpp_2m_sde-heun": ({"solver_type": "heun", "eta": 0.4}, "options"),
}


@pytest.mark.parametrize("case", OWN)
@pytest.mark.parametrize("name", ["edm", "linear"])  # flows: Heun's line is another one there
@pytest.mark.parametrize("steps", [4, 10, 30])  # few, usual, many
def test_imported_table_is_our_own(case, name, steps):
    """Number by number: the same rows, found from the sampler alone."""
    solver, options = case.split("-")[0], OWN[case][0]
    grid, levels = levels_of(name, steps)
    for prediction in ("epsilon", "sample"):
        own = solvers.build_on(solver, SCHEDULES[name], grid, prediction=prediction, **options)
        table = StepTable.from_callable(
            sampler_of(solver), levels, schedule=SCHEDULES[name], prediction=prediction, **options
        )
        assert table.depth == own.depth and table.nfe == own.nfe == sum(
            row.evaluates for row in table.rows
        )
        assert np.array_equal(table.ints, own.ints)
        scale = np.maximum(np.abs(own.floats), 1.0)
        assert np.abs((table.floats - own.floats) / scale).max() < 1e-11
        assert np.abs(table.times - own.times).max() < 1e-9 * own.times.max()
        assert table.init_sigma == pytest.approx(float(grid.sigmas[0]), rel=1e-12)


@pytest.mark.parametrize("r", [0.5, 0.3])  # the middle of the step in log sigma; before it
def test_overlapping_draws_share_a_brownian_path(r, monkeypatch):
    """dpmpp_sde draws over (t, s) and then over (t, t'), which holds it."""
    sampler, schedule = functools.partial(sampler_of("dpmpp_sde"), r=r), SCHEDULES["edm"]
    grid, levels = levels_of("edm", 6)
    p = problem_of(schedule, grid, "sample")
    table = StepTable.from_callable(
        sampler, levels, schedule=schedule, prediction="sample", brownian=True, name="sde"
    )
    assert table.name == "sde"
    ends = [levels[0]]
    for now, then in itertools.pairwise(levels[:-1]):
        ends += [float(now ** (1 - r) * then**r), float(then)]
    pairs = enumerate(itertools.pairwise(ends))
    steps = [draws(1, j) * math.sqrt(a - b) for j, (a, b) in pairs]
    spans = [span for i in range(0, len(steps), 2) for span in ((i, i + 1), (i, i + 2))]

    def noise(k):
        a, b = spans[k]
        return sum(steps[a:b]) / math.sqrt(ends[a] - ends[b])

    start = np.random.default_rng(7).normal(size=SHAPE)
    got = run(table, table.init_sigma * start, p.network, draws)[-1]
    want = by_sampler(sampler, p, levels, levels[0] * start, noise, {}, monkeypatch).numpy()
    assert_same([got], [want], r, float(np.abs(levels[0] * start).max()))
    assert StepTable.from_callable(sampler, levels).name == "sample_dpmpp_sde"
    apart = StepTable.from_callable(sampler, levels, schedule=schedule, prediction="sample")
    assert np.abs(run(apart, table.init_sigma * start, p.network, draws)[-1] - got).max() > 0.01


@pytest.mark.parametrize("case", ["heun-churn", "lms", "lms-6", "dpmpp_sde", "dpmpp_3m_sde"])
@pytest.mark.parametrize(
    ("name", "prediction"), [("linear", "epsilon"), ("edm", "edm"), ("flow", "flow")]
)
@pytest.mark.parametrize("backend", ["reference", "auto"])  # the definition; what users run
def test_end_to_end(case, name, prediction, backend):
    """Through `Sampler`, its kernels and its noise, as near to float64 as the peer in float32."""
    solver, options = case.split("-")[0], SAMPLERS[case][0]
    sampler, schedule, seeds, shape = sampler_of(solver), SCHEDULES[name], [3, 9], (3, 4, 5)
    _, levels = levels_of(name, 8)
    table = StepTable.from_callable(
        sampler, levels, schedule=schedule, prediction=prediction, **options
    )
    rng = torch.Generator().manual_seed(0)
    mixture = GaussianMixture(
        torch.tensor([0.4, 0.6], dtype=torch.float64),
        torch.randn(2, 60, dtype=torch.float64, generator=rng),
        torch.tensor([0.3, 0.5], dtype=torch.float64),
    )
    network = mixture.network(schedule, prediction)
    with fastdiff.use_backend(backend):
        got = fastdiff.Sampler(network, table)(shape, seeds=seeds)

    def by_peer(dtype):
        def denoise(z, sigma):
            level = float(sigma.reshape(-1)[0])
            time = schedule.time(level)
            alpha = {"edm": 1.0, "flow": 1 / (1 + level), "discrete": 1 / math.hypot(1, level)}[
                schedule.kind
            ]
            std = alpha * level
            data, c_in = schedule.sigma_data, 1.0
            if prediction == "edm":
                time, c_in = math.log(level) / 4, 1 / math.hypot(level, data)
            x = alpha * z
            m = network(c_in * x, torch.full((2,), float(time), dtype=dtype))
            if prediction == "epsilon":
                return (x - std * m) / alpha
            if prediction == "flow":
                return x - std * m
            return (data * c_in) ** 2 * x + level * data * c_in * m

        numbers = iter(range(10**6))

        def draw(*_, **__):
            return fastdiff.randn(seeds, shape, step=next(numbers), stream=1).to(dtype)

        more = {"noise_sampler": draw}
        named = inspect.signature(sampler).parameters
        more = {k: v for k, v in more.items() if k in named}
        start = fastdiff.randn(seeds, shape).to(dtype) * levels[0]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "randn_like", draw)
            sigmas = torch.from_numpy(levels).to(dtype)
            return sampler(denoise, start, sigmas, disable=True, **more, **options)

    # a step's coefficients are each rounded once, and so is each of its sums: eight at most
    assert_within_budget(got, by_peer(torch.float32), by_peer(torch.float64), 8.0 * len(table))
