"""DPM-Solvers against k-diffusion's own samplers, in float64 on the same network and noise."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from peers import denoiser, k_sampling, stable_step
from rows import run
from scopes import default_dtype
from solver_cases import SPACINGS, assert_same, draws, problem_of, start

from fastdiff import schedules, solvers

CHURN = {"s_churn": 3.0, "s_noise": 1.003}
OPTIONS = {"eta": 0.7, "s_noise": 1.01}
SCHEDULES = {"linear": schedules.linear(), "edm": schedules.edm()}

# solver, its options, why
CASES = {
    "dpm_2": ("dpm_2", {}, "deterministic"),
    "dpm_2-churn": ("dpm_2", CHURN, "noise at every level"),
    "dpm_2_ancestral": ("dpm_2_ancestral", {}, "default"),
    "dpm_2_ancestral-options": ("dpm_2_ancestral", OPTIONS, "options"),
    "dpmpp_2s_ancestral": ("dpmpp_2s_ancestral", {}, "default"),
    "dpmpp_2s_ancestral-options": ("dpmpp_2s_ancestral", OPTIONS, "options"),
    "dpmpp_2s_ancestral-capped": ("dpmpp_2s_ancestral", {"eta": 2.7}, "levels reach 0"),
    "dpmpp_3m_sde": ("dpmpp_3m_sde", {}, "default"),
    "dpmpp_3m_sde-options": ("dpmpp_3m_sde", {"eta": 0.4, "s_noise": 1.01}, "options"),
    "dpmpp_3m_sde-ode": ("dpmpp_3m_sde", {"eta": 0.0}, "without noise"),
}


def sizes_of(got, x, table, last=1.0):
    """The largest x/alpha on the way: k-diffusion's own states."""
    alphas = [*table.alphas, last]
    return max(np.abs(s).max() / a for s, a in zip([x, *got], alphas, strict=True))


def draws_of(table):
    """What noise a sampler gets: the draws of the table's rows, in turn."""
    counters = iter([row.draws[0] for row in table.rows if row.draws])
    return lambda *_: torch.from_numpy(draws(*next(counters)))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("case", CASES)
def test_k_diffusion(case, name, monkeypatch):
    sampling = k_sampling()
    solver, options, _ = CASES[case]
    schedule = SCHEDULES[name]
    predictions = ("epsilon", "sample", "v_prediction" if name == "linear" else "edm")
    spacings = SPACINGS[schedule.kind]
    monkeypatch.setattr(sampling, "get_ancestral_step", stable_step)
    for label in product(predictions, spacings, ("zero", "sigma_min"), (1, 2, 3, 10, 50)):
        prediction, spacing, final, steps = label
        if steps == 1 and "3m" in case and final == "zero":
            continue  # UnboundLocalError in k-diffusion 0.1.1: h of a lone last step
        grid = schedule.points(steps, spacing, final)
        p = problem_of(schedule, grid, prediction)
        table = solvers.build(
            solver, schedule, steps,
            prediction=prediction, spacing=spacing, final=final, **options,
        )  # fmt: skip
        x = start(schedule)
        got = run(table, x, p.network, draws)
        noise = draws_of(table)
        # dpm_2 draws noise that it does not use, too
        monkeypatch.setattr(torch, "randn_like", noise if options else torch.zeros_like)
        want = getattr(sampling, f"sample_{solver}")(
            denoiser(p, p.levels, grid.times), torch.from_numpy(x / grid.alphas[0]),
            torch.tensor(p.levels), disable=True, **options,
            **({} if solver == "dpm_2" else {"noise_sampler": noise}),
        )  # fmt: skip
        last = float(grid.alphas[-1])
        assert_same([got[-1] / last], [want.numpy()], label, sizes_of(got, x, table, last))


@pytest.fixture
def float64():
    """dpm_fast makes tensors of its levels itself."""
    with default_dtype(torch.float64):
        yield


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("options", [{}, {"eta": 1.0}, OPTIONS], ids=["ode", "eta", "both"])
def test_dpm_fast(name, options, monkeypatch, float64):
    sampling = k_sampling()
    schedule = SCHEDULES[name]
    monkeypatch.setattr(sampling, "get_ancestral_step", stable_step)
    for prediction in ("epsilon", "sample"):
        for evaluations in (1, 2, 3, 4, 5, 6, 10, 50):
            grid = schedule.points(evaluations, "exponential", "sigma_min")
            p = problem_of(schedule, grid, prediction)
            table = solvers.build(
                "dpm_fast", schedule, evaluations,
                prediction=prediction, spacing="exponential", final="sigma_min", **options,
            )  # fmt: skip
            assert table.nfe == evaluations
            x = start(schedule)
            got = run(table, x, p.network, draws)
            drawn = draws_of(table)

            def noise(_, sigma_next, drawn=drawn, end=p.levels[-1]):
                # it is asked for noise of weight 0 too: without eta, and in the last step
                return drawn() if options and float(sigma_next) > end * (1 + 1e-6) else 0.0

            want = sampling.sample_dpm_fast(
                denoiser(p, p.levels[:1], grid.times[:1]), torch.from_numpy(x / grid.alphas[0]),
                p.levels[-1], p.levels[0], evaluations,
                disable=True, noise_sampler=noise, **options,
            )  # fmt: skip
            last = float(grid.alphas[-1])
            label = (name, options, prediction, evaluations)
            assert_same([got[-1] / last], [want.numpy()], label, sizes_of(got, x, table, last))


def test_capped_dpm_2_ancestral_keeps_its_noise():
    """Where the lower level is 0 k-diffusion's dpm_2_ancestral returns clean data in the middle of
    the run: its noise stands in the other branch. dpmpp_2s_ancestral has it in both."""
    sampling, schedule = k_sampling(), SCHEDULES["edm"]
    table = solvers.build("dpm_2_ancestral", schedule, 4, eta=50.0, prediction="sample")
    levels = torch.tensor(schedule.points(4).sigmas[:2])
    x = start(schedule)
    want = {
        solver: getattr(sampling, f"sample_{solver}")(
            lambda z, _: 0 * z, torch.from_numpy(x), levels, eta=50.0, disable=True,
            noise_sampler=lambda *_: torch.from_numpy(draws(1, 0)),
        ).numpy()
        for solver in ("dpm_2_ancestral", "dpmpp_2s_ancestral")
    }  # fmt: skip
    assert not want["dpm_2_ancestral"].any()
    got = run(table, x, lambda x, _: 0 * x, draws)[0]
    assert_same([got], [want["dpmpp_2s_ancestral"]], "capped")
    assert math.isclose(np.abs(got / draws(1, 0)).max(), float(levels[1]))
