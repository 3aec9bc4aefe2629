"""Inversions: tables that walk from the image up to noise."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from itertools import product

import diffusers
import numpy as np
import pytest
import torch
from oracles_dpm import multistep
from peers import Peer, assert_within, outputs_of, run_with_budget, schedule_of
from rows import run
from solver_cases import KINDS, SCHEDULES, assert_same, grids, problem_of, start
from test_convergence import MEAN, STD, gaussian, network_of, no_noise
from test_convergence import SCHEDULES as SMOOTH

from fastdiff import Sampler, schedules, solvers
from fastdiff.schedules import Grid

pytestmark = pytest.mark.filterwarnings("ignore:algorithm_type:FutureWarning")

UP = ("ddim_inverse", "dpmpp_multistep_inverse", "dpm_multistep_inverse")


def ddim_inverse(p, x, evaluate):
    """DDIMInverseScheduler's step at the scales of the state, the model asked at the time where the
    step ends; with evaluate="now" ddim_reverse_sample of guided-diffusion."""
    states = []
    for i in range(p.steps):
        t, alpha, sigma = p.at(i)
        t_next, alpha_next, sigma_next = p.at(i + 1)
        asked = t_next if evaluate == "next" else t
        if p.prediction == "edm":
            x0, _ = p.predict(x, asked, 1.0, sigma_next if evaluate == "next" else sigma)
            eps = (x - x0) / sigma
        elif p.prediction == "epsilon":
            eps = p.network(x, asked)
            x0 = (x - sigma * eps) / alpha
        else:
            x0, eps = p.predict(x, asked, alpha, sigma)
        x = alpha_next * x0 + sigma_next * eps
        states.append(x)
    return states


def upwards(p):
    """The problem on the grid from its end to its start."""
    return replace(p, times=p.times[::-1], alphas=p.alphas[::-1], sigmas=p.sigmas[::-1])


def image(schedule):
    return start(schedule) / schedule.init_sigma


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 50])
@pytest.mark.parametrize("evaluate", ["next", "now"])
def test_ddim_inverse_equals_the_source(evaluate, steps):
    seen = set()
    for name, spacing, final in grids():
        schedule = SCHEDULES[name][0]
        grid = schedule.points(steps, spacing, final)
        for prediction in KINDS[schedule.kind]:
            if prediction == "epsilon" and grid.alphas[0] == 0:
                continue  # refused, as everywhere
            if final == "zero" and (evaluate == "now" or prediction in ("sample", "edm")):
                continue  # see test_refuses_clean_data
            p = upwards(problem_of(schedule, grid, prediction))
            table = solvers.build_inverse(
                "ddim_inverse", schedule, steps,
                prediction=prediction, spacing=spacing, final=final, evaluate=evaluate,
            )  # fmt: skip
            x = image(schedule)
            got = run(table, x, p.network, no_noise)
            assert_same(got, ddim_inverse(p, x, evaluate), (name, spacing, final, prediction))
            seen.add((schedule.kind, prediction))
    assert seen == {(kind, p) for kind, ps in KINDS.items() for p in ps}


MULTISTEP = {
    "default": ({}, "default"),
    "heun": ({"solver_type": "heun"}, "the other type"),
    "third": ({"order": 3}, "third order"),
    "first": ({"order": 1}, "DDIM with the time of the state"),
    "high": ({"order": 3, "lower_order_final": False}, "third order to the end"),
}


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 50])
@pytest.mark.parametrize("case", MULTISTEP)
@pytest.mark.parametrize("form", ["dpmpp", "dpm"])
def test_multistep_inverse_equals_the_source(form, case, steps):
    options, _ = MULTISTEP[case]
    told = {"order": 2, "solver_type": "midpoint"} | options
    algorithm = "dpmsolver++" if form == "dpmpp" else "dpmsolver"
    for name, spacing, final in grids():
        schedule = SCHEDULES[name][0]
        grid = schedule.points(steps, spacing, final)
        for prediction in KINDS[schedule.kind]:
            if final == "zero" or (prediction == "epsilon" and grid.alphas[0] == 0):
                continue  # refused
            p = upwards(problem_of(schedule, grid, prediction))
            table = solvers.build_inverse(
                f"{form}_multistep_inverse", schedule, steps,
                prediction=prediction, spacing=spacing, **options,
            )  # fmt: skip
            x = image(schedule)
            got = run(table, x, p.network, no_noise)
            want = multistep(p, x, algorithm=algorithm, **told)
            assert_same(got, want, (name, spacing, prediction))


@pytest.mark.parametrize("name", UP)
def test_refuses_clean_data(name):
    for schedule, prediction in ((schedules.edm(), "edm"), (schedules.linear(), "sample")):
        with pytest.raises(ValueError, match=f"build: {name} must start at sigma > 0"):
            solvers.build_inverse(name, schedule, 5, prediction=prediction, final="zero")
    with pytest.raises(ValueError, match="build: ddim_inverse must start at sigma > 0"):
        solvers.build_inverse("ddim_inverse", schedules.linear(), 5, final="zero", evaluate="now")
    with pytest.raises(ValueError, match="build: inverse must be one of ddim_inverse"):
        solvers.build_inverse("ddim", schedules.linear(), 5)
    with pytest.raises(TypeError, match=f"options of {name} must be among"):
        solvers.build_inverse(name, schedules.linear(), 5, eta=1.0)


@pytest.mark.parametrize("name", UP)
def test_says_what_it_is(name):
    doc = inspect.getdoc(solvers.INVERSES[name])
    assert all(word in doc for word in ("arXiv:", "Order", "evaluation", "noise", "Other names:"))
    table = solvers.build_inverse(name, schedules.edm(), 4, prediction="edm")
    assert table.name == name and table.init_sigma == 1.0 and not table.stochastic
    assert table.nfe == len(table) == 4 and set(solvers.INVERSES) == set(UP)


@pytest.mark.parametrize("schedule", SMOOTH)
@pytest.mark.parametrize("name", UP)
def test_order(name, schedule):
    """Against the probability flow of Gaussian data, which keeps (x - mean)/deviation."""
    schedule = SMOOTH[schedule][0]
    low, high = schedule.t_min, schedule.t_max
    scales = [(float(schedule.alpha(t)), float(schedule.sigma(t))) for t in (low, high)]
    (a, s), (a_end, s_end) = scales
    x = np.linspace(-2, 2, 9)
    score = (x - a * MEAN) / math.hypot(a * STD, s)
    want = a_end * MEAN + math.hypot(a_end * STD, s_end) * score
    options = {"evaluate": "now"} if name == "ddim_inverse" else {"lower_order_final": False}
    errors = []
    for steps in (150, 300):
        # the step to log-SNR -inf is of first order: where those before it are long in log-SNR
        # the order nears 2 as slowly as 1/log(steps), and so a flow is measured on even times
        spacing = "linspace" if schedule.kind == "flow" else "exponential"
        table = solvers.build_inverse(
            name, schedule, steps, prediction="sample", spacing=spacing, **options
        )
        got = run(table, x, network_of(table, gaussian), no_noise)[-1]
        errors.append(float(np.abs(got - want).max()))
    assert abs(math.log2(errors[0] / errors[1]) - table.order) < 0.25, errors


def test_there_and_back_with_the_sampler():
    """An image goes up and comes back the nearer the more steps there are."""
    schedule = schedules.linear()
    x = torch.from_numpy(np.random.default_rng(0).normal(MEAN, STD, (2, 1, 4, 4))).float()

    def model(x, t):
        t = t.double().numpy()
        a, s = (f(t).reshape(-1, 1, 1, 1) for f in (schedule.alpha, schedule.sigma))
        x0 = gaussian(x.double().numpy(), a, s)
        return torch.from_numpy((x.double().numpy() - a * x0) / s).float()

    errors = []
    for steps in (10, 100):
        up = solvers.build_inverse("ddim_inverse", schedule, steps, final="zero")
        noise = Sampler(model, up)(noise=x)
        down = solvers.build("ddim", schedule, steps)
        errors.append(float((Sampler(model, down)(noise=noise) - x).abs().max()))
    assert errors[1] < errors[0] / 5
    assert abs(float(noise.std()) - 1) < 0.3  # of 32 draws


# --- diffusers ------------------------------------------------------------------------------


def in_units_of_x0(table, ours, budget, last):
    """run_with_budget for a walk upwards: the last alpha is not 1, and an error made once grows.

    A row multiplies it by the derivative of x'/alpha' with respect to x/alpha, and what the row
    reads of earlier predictions by theirs.
    """
    ours[-1] = ours[-1] / last
    alphas = [*table.alphas, last]
    made = np.diff([0.0, *budget]) / [*[1.0] * (len(budget) - 1), last]
    total, grown, slopes = 0.0, [], []
    for row, more, now, then in zip(table.rows, made, alphas, alphas[1:], strict=False):
        (p, _), x = row.convert, row.x
        carry = abs(x.get("x", 0.0) + x.get("d", 0.0) * p) * now / then
        if row.push:
            e, f = (0.0, 1.0) if row.push is True else row.push
            for k, slope in enumerate(reversed(slopes)):
                carry += abs(x.get(f"h{k}", 0.0)) * slope / then
            slopes.append(abs(e + f * p) * now)
        total = total * max(carry, 1.0) + more
        grown.append(total)
    return ours, grown


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_ddim_inverse_of_diffusers(prediction, monkeypatch):
    """Its "sample" divides by 0 at clean data; the steps must divide T, it goes by T // steps."""
    for spacing, steps in product(("leading", "trailing"), (1, 2, 10, 50)):
        scheduler = diffusers.DDIMInverseScheduler(
            beta_schedule="scaled_linear", prediction_type=prediction, timestep_spacing=spacing,
            clip_sample=False,
        )  # fmt: skip
        schedule = schedule_of(scheduler)
        table = solvers.build_inverse(
            "ddim_inverse", schedule, steps, prediction=prediction, spacing=spacing, final="zero"
        )
        peer = Peer(scheduler, steps, monkeypatch)
        assert scheduler.timesteps.tolist() == table.times.tolist()
        x, outputs = image(schedule).astype(np.float32).astype(float), outputs_of(table)
        ours, budget = run_with_budget(table, x, outputs)
        alphas = [*table.alphas, float(schedule.alpha(table.times[-1]))]
        ours, budget = in_units_of_x0(table, ours, budget, alphas[-1])
        theirs = peer.states(x, outputs, alphas, levels=False)
        assert_within(theirs, ours, budget, (spacing, steps))


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize("form", ["dpmpp", "dpm"])
def test_multistep_inverse_of_diffusers(form, solver_type, order, monkeypatch):
    for prediction, steps, lower in product(
        ("epsilon", "sample", "v_prediction"), (1, 2, 3, 10, 14, 15, 50), (True, False)
    ):
        if form == "dpm" and order == 3 and prediction != "epsilon" and steps > 3:
            continue  # noise out of x from sigma = 0.03 on, extrapolated twice: no digits left
        scheduler = diffusers.DPMSolverMultistepInverseScheduler(
            beta_schedule="scaled_linear", prediction_type=prediction, solver_order=order,
            solver_type=solver_type, lower_order_final=lower,
            algorithm_type="dpmsolver++" if form == "dpmpp" else "dpmsolver",
        )  # fmt: skip
        schedule = schedule_of(scheduler)
        peer = Peer(scheduler, steps, monkeypatch)
        levels = scheduler.sigmas.double().numpy()[::-1]
        times = np.linspace(1, 0, steps + 1)
        grid = Grid(times, 1 / np.hypot(1, levels), levels / np.hypot(1, levels))
        walk = solvers._walk_of(schedule, grid, prediction)
        table = solvers.INVERSES[f"{form}_multistep_inverse"](
            walk, order=order, solver_type=solver_type, lower_order_final=lower
        )
        x, outputs = image(schedule).astype(np.float32).astype(float), outputs_of(table)
        ours, budget = run_with_budget(table, x, outputs)
        alphas = [*table.alphas, float(grid.alphas[0])]
        ours, budget = in_units_of_x0(table, ours, budget, alphas[-1])
        theirs = peer.states(x, outputs, alphas, levels=False)
        assert_within(theirs, ours, budget, (prediction, steps, lower))
