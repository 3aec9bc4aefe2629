"""Tables against the schedulers of diffusers.

They compute in float32 and are fed the same model outputs and the same noise, so that the update is
affine and its error can be bounded.
"""

from __future__ import annotations

import math
import sys

import diffusers
import numpy as np
import oracles
import pytest
import torch
from peers import (
    EPS,
    Peer,
    assert_within,
    fixed_draw,
    grid_of,
    outputs_of,
    run_with_budget,
    schedule_of,
)
from rows import run
from solver_cases import SHAPE, assert_same, draws, problem_of, start

from fastdiff import solvers

BETAS = [
    ("linear", "DDPM"),
    ("scaled_linear", "Stable Diffusion"),
    ("squaredcos_cap_v2", "improved DDPM"),
]
STEPS = [(1, "first step is last"), (7, "does not divide T"), (10, "divides T"), (50, "many")]


def x_of(schedule):
    return start(schedule).astype(np.float32).astype(float)


# --- DDPM and DDIM: alphabar in float32, the state is x -------------------------------------


@pytest.mark.parametrize("betas", [b for b, _ in BETAS])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_ddpm(betas, variance, prediction, monkeypatch):
    for spacing, clip in (("leading", None), ("linspace", 0.7), ("trailing", 0.7)):
        for steps, _ in STEPS:
            if steps == 1 and spacing == "linspace":
                continue  # diffusers takes the least noisy time there
            if variance != "fixed_small" and spacing == "trailing":
                continue  # diffusers adds noise to clean data, see test_departures
            if steps == 1 and betas == "squaredcos_cap_v2":
                continue  # sigma/alpha is 2e4: x0 has no digits left in float32
            scheduler = diffusers.DDPMScheduler(
                beta_schedule=betas, variance_type=variance, prediction_type=prediction,
                timestep_spacing=spacing, clip_sample=clip is not None, clip_sample_range=clip or 1,
            )  # fmt: skip
            schedule = schedule_of(scheduler)
            table = solvers.build(
                "ddpm", schedule, steps, prediction=prediction, spacing=spacing, variance=variance
            )
            peer = Peer(scheduler, steps, monkeypatch)
            assert scheduler.timesteps.tolist() == table.times.tolist()
            x, outputs = x_of(schedule), outputs_of(table)
            v = np.tanh(outputs[-1]) if variance == "learned_range" else None
            ours, budget = run_with_budget(table, x, outputs, clip=clip, variance=lambda *_, v=v: v)
            theirs = peer.states(x, outputs, [*table.alphas, 1.0], levels=False, variance=v)
            assert_within(theirs, ours, budget, (spacing, steps))


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_ddim(prediction, eta, zero_snr, monkeypatch):
    if zero_snr and (prediction == "epsilon" or eta == 1):
        return  # refused; NaN in diffusers, see test_ddim_is_nan_in_diffusers
    cases = [("leading", 10), ("leading", 50), ("trailing", 10), ("trailing", 50), ("trailing", 1)]
    for spacing, steps in cases:  # the steps must divide T, see test_departures
        for clip, rederive in ((None, True), (0.7, True), (0.7, False)):
            scheduler = diffusers.DDIMScheduler(
                beta_schedule="scaled_linear", prediction_type=prediction, timestep_spacing=spacing,
                clip_sample=clip is not None, clip_sample_range=clip or 1,
                rescale_betas_zero_snr=zero_snr,
            )  # fmt: skip
            schedule = schedule_of(scheduler)
            table = solvers.build(
                "ddim", schedule, steps, prediction=prediction, spacing=spacing,
                eta=eta, use_clipped_model_output=rederive,
            )  # fmt: skip
            peer = Peer(scheduler, steps, monkeypatch)
            assert scheduler.timesteps.tolist() == table.times.tolist()
            x, outputs = x_of(schedule), outputs_of(table)
            ours, budget = run_with_budget(table, x, outputs, clip=clip)
            theirs = peer.states(
                x, outputs, [*table.alphas, 1.0], levels=False,
                eta=eta, use_clipped_model_output=rederive,
            )  # fmt: skip
            assert_within(theirs, ours, budget, (spacing, steps, clip, rederive))


# --- schedulers that count in sigma/alpha ---------------------------------------------------

SPACING = {
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "trailing": {"timestep_spacing": "trailing"},
    "leading": {"timestep_spacing": "leading"},
}
DPM = {"algorithm_type": "dpmsolver++"}
SDE = {"algorithm_type": "sde-dpmsolver++"}
HEUN = {"solver_type": "heun"}
EULER = ["trailing", "leading", "karras", "exponential"]
A, B, C = "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler"
D = "DPMSolverMultistepScheduler"

# solver, options, scheduler, its config, spacings that both have
LEVELS = {
    "euler": ("euler", {}, A, {}, EULER),
    "ddim": ("ddim", {}, A, {}, ["trailing"]),  # the two are one
    "euler_ancestral": ("euler_ancestral", {}, B, {}, ["trailing", "leading"]),
    "heun": ("heun", {}, C, {}, EULER),
    "dpmpp_2m": ("dpmpp_2m", {}, D, DPM, ["trailing", "karras", "exponential"]),
    "dpmpp_2m-heun": ("dpmpp_2m", HEUN, D, DPM | HEUN, ["trailing", "karras"]),
    "dpmpp_2m_sde": ("dpmpp_2m_sde", {}, D, SDE, ["trailing", "karras", "exponential"]),
    "dpmpp_2m_sde-heun": ("dpmpp_2m_sde", HEUN, D, SDE | HEUN, ["trailing", "karras"]),
}


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("case", LEVELS)
def test_levels(case, prediction, monkeypatch):
    solver, options, name, config, spacings = LEVELS[case]
    if prediction == "sample" and name == B:
        return  # not implemented there
    for spacing in spacings:
        for steps, _ in STEPS:
            if steps == 1 and name in (A, C) and spacing in ("karras", "exponential"):
                continue  # diffusers takes the least noisy level there
            scheduler = getattr(diffusers, name)(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                prediction_type=prediction, **config, **SPACING[spacing],
            )  # fmt: skip
            schedule = schedule_of(scheduler)
            table = solvers.build(
                solver, schedule, steps, prediction=prediction, spacing=spacing, **options
            )
            peer = Peer(scheduler, steps, monkeypatch)
            if name != D:  # it rounds the times and keeps the levels
                times = scheduler.timesteps.double().numpy()
                # float32 logs of up to 5 apart by at least 2e-3 (one index): 5 EPS / 2e-3 indices
                assert np.abs(times - table.times).max() <= EPS / 2 * 1000 + 5 * EPS / 2e-3
            x, outputs = x_of(schedule), outputs_of(table)
            ours, budget = run_with_budget(table, x, outputs)
            alphas = [*table.alphas, 1.0]
            is_dpm = name == D
            theirs = peer.states(x, outputs, alphas, levels=not is_dpm)
            assert_within(theirs, ours, budget, (spacing, steps))


@pytest.mark.parametrize("case", ["dpmpp_2m", "dpmpp_2m_sde", "dpmpp_2m-heun"])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_dpm_on_the_linspace_of_diffusers(case, final, monkeypatch):
    """Its linspace leaves out time 0, so the grid is handed over."""
    solver, options, name, config, _ = LEVELS[case]
    for steps in (7, 20):
        scheduler = getattr(diffusers, name)(
            beta_schedule="scaled_linear", final_sigmas_type=final, lower_order_final=False,
            timestep_spacing="linspace", **config,
        )  # fmt: skip
        schedule = schedule_of(scheduler)
        peer = Peer(scheduler, steps, monkeypatch)
        grid = grid_of(scheduler)
        table = solvers.build_on(solver, schedule, grid, **options)
        x, outputs = x_of(schedule), outputs_of(table)
        ours, budget = run_with_budget(table, x, outputs)
        ours[-1] = ours[-1] / grid.alphas[-1]
        theirs = peer.states(x, outputs, grid.alphas, levels=False)
        assert_within(theirs, ours, budget, (final, steps))


def test_euler_churn_adds_the_same_noise(monkeypatch):
    """The update is the same; diffusers evaluates the network before the noise, see below."""
    options = {"s_churn": 5.0, "s_tmin": 0.0, "s_tmax": math.inf, "s_noise": 1.003}
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_schedule="scaled_linear", use_karras_sigmas=True
    )
    schedule = schedule_of(scheduler)
    table = solvers.build("euler", schedule, 10, spacing="karras", **options)
    peer = Peer(scheduler, 10, monkeypatch)
    monkeypatch.setattr(
        sys.modules[type(scheduler).__module__], "randn_tensor",
        lambda *_, **__: torch.from_numpy(fixed_draw(2, 2 * peer.row)).float(),
    )  # fmt: skip
    x, outputs = x_of(schedule), outputs_of(table)
    feed = iter(outputs)
    states = run(table, x, lambda *_: next(feed), fixed_draw)[1::2]
    alphas = [*table.alphas[::2], 1.0]
    _, budget = run_with_budget(table, x, outputs)
    theirs = peer.states(x, outputs, alphas, levels=True, **options)
    ours = [s / a for s, a in zip(states, alphas[1:], strict=True)]
    assert_within(theirs, ours, budget[1::2], "churn")


# --- where diffusers departs from its source: the table follows the source ------------------


V = np.tanh(draws(1, 99))


def departure_ddim(spacing, steps):
    scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing, clip_sample=False)
    return scheduler, ("ddim", {}, spacing, steps), lambda p, x: oracles.ddim(p, x, 0.0)


def departure_ddpm(variance, spacing, steps):
    scheduler = diffusers.DDPMScheduler(
        timestep_spacing=spacing, variance_type=variance, clip_sample=False
    )
    table = ("ddpm", {"variance": variance}, spacing, steps)
    return scheduler, table, lambda p, x: oracles.ddpm(p, x, variance, lambda *_: V)


DEPARTURES = {
    "ddim-linspace": (
        departure_ddim("linspace", 10),
        "steps back by T // steps = 100 though the times are 111 apart",
    ),
    "ddim-trailing": (
        departure_ddim("trailing", 7),
        "steps back by T // steps = 142 though the times are 143 apart",
    ),
    "ddpm-large-trailing": (
        departure_ddpm("fixed_large", "trailing", 10),
        "adds noise of variance beta to clean data, as the last time is not 0",
    ),
    "ddpm-learned-trailing": (
        departure_ddpm("learned_range", "trailing", 10),
        "adds noise to clean data, between beta and 1e-20 by the network",
    ),
}


@pytest.mark.parametrize("case", DEPARTURES)
def test_departures(case, monkeypatch):
    (scheduler, (solver, options, spacing, steps), oracle), reason = DEPARTURES[case]
    schedule = schedule_of(scheduler)
    table = solvers.build(solver, schedule, steps, spacing=spacing, **options)
    peer = Peer(scheduler, steps, monkeypatch)
    x, outputs = x_of(schedule), outputs_of(table)
    ours, budget = run_with_budget(table, x, outputs, variance=lambda *_: V)
    v = V if "learned" in case else None
    theirs = peer.states(x, outputs, [*table.alphas, 1.0], levels=False, variance=v)
    assert np.abs(theirs[-1] - ours[-1]).max() > 2 * budget[-1], f"mended upstream? {reason}"
    p = problem_of(schedule, schedule.points(steps, spacing), "epsilon")
    feed = iter(outputs)
    p.network, p.noise = lambda *_: next(feed), fixed_draw
    want = [s / a for s, a in zip(oracle(p, x), p.alphas[1:], strict=True)]
    assert_same(ours, want, case)


def test_v_prediction_under_churn_departs(monkeypatch):
    """diffusers converts v with the level before the churn; the state already is after it."""
    scheduler = diffusers.EulerDiscreteScheduler(prediction_type="v_prediction")
    Peer(scheduler, 10, monkeypatch)
    scheduler.set_begin_index(7)
    m, z, t = torch.full(SHAPE, 0.5), torch.full(SHAPE, 3.0), scheduler.timesteps[7]
    scheduler.scale_model_input(z, t)
    got = scheduler.step(m, t, z, s_churn=100.0, s_noise=0.0).pred_original_sample[0, 0]
    before = float(scheduler.sigmas[7])
    x0 = [3 / (r**2 + 1) - 0.5 * r / math.sqrt(r**2 + 1) for r in (before, before * math.sqrt(2))]
    assert abs(float(got) - x0[0]) < 8 * EPS * abs(x0[0]) < abs(x0[0] - x0[1])


def test_ddim_is_nan_in_diffusers_from_zero_snr_with_eta_1():
    """1 - abar' - std^2 is 0 there and rounds to below 0; the table takes the limit."""
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", prediction_type="v_prediction", timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
    )  # fmt: skip
    scheduler.set_timesteps(10)
    x, t = torch.ones(SHAPE), scheduler.timesteps[0]
    assert scheduler.step(x, t, x, eta=1.0).prev_sample.isnan().any()
