"""Schedulers of diffusers that need no solver of their own: EDM's, Stable Audio's, CogVideoX's.

EDMEulerScheduler is `euler`, EDMDPMSolverMultistepScheduler `dpmpp_2m` or `dpmpp_2m_sde`, and
CosineDPMSolverMultistepScheduler `dpmpp_2m_sde`, each with prediction "edm" (a v_prediction there
is the same network with the other sign). CogVideoXDDIMScheduler is `ddim`, CogVideoXDPMScheduler
`dpmpp_2m_sde`. What differs is in the last tests.
"""

from __future__ import annotations

import math
import sys

import diffusers
import numpy as np
import pytest
import torch
from budget import assert_within_budget
from peers import EPS, assert_within, fixed_draw, outputs_of, run_with_budget, schedule_of
from solver_cases import start

from fastdiff import schedules, solvers
from fastdiff.schedules import Grid

STEPS = (1, 2, 3, 10, 50)


def in_float32(x):
    return x.astype(np.float32).astype(float)


def noise_of(row):
    return torch.from_numpy(fixed_draw(1, row)).float()


# --- EDM and Stable Audio ---------------------------------------------------------------------

SDE, HEUN = {"algorithm_type": "sde-dpmsolver++"}, {"solver_type": "heun"}
EULER, DPM, COSINE = (
    "EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "CosineDPMSolverMultistepScheduler",
)  # fmt: skip
EDM = {
    "euler": (EULER, {}, {}, "first order"),
    "ddim": (EULER, {}, {}, "the same"),
    "dpmpp_2m": (DPM, {}, {}, "default"),
    "dpmpp_2m-heun": (DPM, HEUN, HEUN, "the other solver type"),
    "dpmpp_2m_sde": (DPM, SDE, {}, "with noise"),
    "dpmpp_2m_sde-heun": (DPM, SDE | HEUN, HEUN, "with noise, the other solver type"),
    "dpmpp_2m_sde-audio": (COSINE, {}, {}, "Stable Audio"),
    "dpmpp_2m_sde-audio-heun": (COSINE, HEUN, HEUN, "Stable Audio, the other solver type"),
}


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["karras", "exponential"])
@pytest.mark.parametrize("case", EDM)
def test_edm(case, spacing, prediction, monkeypatch):
    name, config, options, _ = EDM[case]
    for steps in STEPS:
        if steps == 1 and spacing == "exponential":
            continue  # diffusers takes the least noisy level there
        scheduler = getattr(diffusers, name)(
            sigma_schedule=spacing, prediction_type=prediction, **config
        )
        c = scheduler.config
        schedule = schedules.edm(c.sigma_min, c.sigma_max, c.sigma_data)
        scheduler.set_timesteps(steps)
        levels = scheduler.sigmas.double().numpy()
        ours_levels = schedule.points(steps, spacing).sigmas
        # float32 of a seventh power, or of an exponential of up to log(500)
        assert (np.abs(levels - ours_levels) <= 16 * EPS * ours_levels).all()
        grid = Grid(levels, np.ones_like(levels), levels)
        table = solvers.build_on(case.split("-")[0], schedule, grid, prediction="edm", **options)
        times = scheduler.timesteps.double().numpy()
        if name == COSINE:
            assert np.abs(times - np.arctan(levels[:-1]) / math.pi * 2).max() <= 4 * EPS
        else:  # a quarter of a logarithm of at most 6.3, of a level that is off by EPS
            assert np.abs(times - table.times).max() <= 4 * EPS
        sign = -1.0 if prediction == "v_prediction" else 1.0
        x, outputs = in_float32(start(schedule)), outputs_of(table)
        ours, budget = run_with_budget(table, x, outputs)
        sample, theirs = torch.from_numpy(x).float(), []
        for i, (t, m) in enumerate(zip(scheduler.timesteps, outputs, strict=True)):
            draw = lambda *_, i=i, **__: noise_of(i)  # noqa: E731
            monkeypatch.setattr(
                sys.modules[type(scheduler).__module__], "randn_tensor", draw, raising=False
            )
            scheduler.noise_sampler = draw  # Stable Audio's Brownian increments, of unit variance
            got = scheduler.scale_model_input(sample, t)
            exact = table.rows[i].c_in * sample.double()
            # the factor is 1 / sqrt(level^2 + data^2): square, sum, root and quotient round, then
            # its product with the sample
            assert_within_budget(got, exact.float(), exact, ulps=4)
            sample = scheduler.step(sign * torch.from_numpy(m).float(), t, sample).prev_sample
            theirs.append(sample.double().numpy())
        assert_within(theirs, ours, budget, (case, steps))


# --- CogVideoX --------------------------------------------------------------------------------


# no epsilon without signal: noise alone says nothing of x0, and it is refused
KINDS = [
    ("epsilon", False), ("sample", False), ("v_prediction", False), ("sample", True),
    ("v_prediction", True),
]  # fmt: skip


@pytest.mark.parametrize(("prediction", "zero_snr"), KINDS)
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_cogvideox(spacing, prediction, zero_snr, monkeypatch):
    for name, solver in (("CogVideoXDDIMScheduler", "ddim"), ("CogVideoXDPMScheduler", None)):
        for steps in (1, 2, 10, 50):  # divisors of T: it steps back by T // steps
            scheduler = getattr(diffusers, name)(
                prediction_type=prediction, timestep_spacing=spacing,
                rescale_betas_zero_snr=zero_snr,
            )  # fmt: skip
            schedule = schedule_of(scheduler)
            scheduler.set_timesteps(steps)
            table = solvers.build(
                solver or "dpmpp_2m_sde", schedule, steps, prediction=prediction, spacing=spacing
            )
            assert table.times.tolist() == scheduler.timesteps.tolist()
            x, outputs = in_float32(start(schedule)), outputs_of(table)
            ours, budget = run_with_budget(table, x, outputs)
            sample, old, back, theirs = torch.from_numpy(x).float(), None, None, []
            for i, (t, m) in enumerate(zip(scheduler.timesteps, outputs, strict=True)):
                module = sys.modules[type(scheduler).__module__]
                # the DPM draws twice a step and uses the last
                monkeypatch.setattr(
                    module, "randn_tensor", lambda *_, i=i, **__: noise_of(i), raising=False
                )
                m = torch.from_numpy(m).float()
                if solver:
                    sample = scheduler.step(m, t, sample, return_dict=False)[0]
                else:
                    sample, old = scheduler.step(m, old, t, back, sample, return_dict=False)
                back = t
                alpha = table.alphas[i + 1] if i + 1 < len(table) else 1.0
                theirs.append(sample.double().numpy() / alpha)
            assert_within(theirs, ours, budget, (name, steps))


# --- what differs ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [EULER, DPM, COSINE])
def test_edm_starts_a_little_wider_in_diffusers(name):
    """sqrt(sigma_max^2 + 1) where Karras et al. 2022, algorithm 1, draw sigma_max * noise."""
    scheduler = getattr(diffusers, name)()
    c = scheduler.config
    ours = solvers.build("euler", schedules.edm(c.sigma_min, c.sigma_max), 3, prediction="edm")
    assert abs(float(scheduler.init_noise_sigma) - math.hypot(c.sigma_max, 1)) < 1e-9
    assert ours.init_sigma == c.sigma_max


@pytest.mark.parametrize("name", [EULER, DPM])
def test_edm_ends_twice_at_sigma_min_in_diffusers(name):
    """final_sigmas_type "sigma_min" evaluates the network once more and then stays where it is."""
    scheduler = getattr(diffusers, name)(final_sigmas_type="sigma_min")
    scheduler.set_timesteps(4)
    assert abs(float(scheduler.sigmas[-1] / scheduler.sigmas[-2]) - 1) <= 8 * EPS
    sample, moves = torch.full((2, 3), 2.0), []
    for t in scheduler.timesteps:
        scheduler.scale_model_input(sample, t)
        before, sample = sample, scheduler.step(torch.full((2, 3), 0.5), t, sample).prev_sample
        moves.append(float((sample - before).abs().max()))
    assert moves[-1] <= 8 * EPS * float(before.abs().max()) < moves[0]
    ours = schedules.edm().points(3, final="sigma_min").sigmas
    assert np.abs(scheduler.sigmas.double().numpy()[:-1] / ours - 1).max() < 16 * EPS


def test_cogvideox_does_not_clip():
    """clip_sample is True in its configuration and never read."""
    scheduler = diffusers.CogVideoXDDIMScheduler(prediction_type="sample")
    assert scheduler.config.clip_sample
    scheduler.set_timesteps(1)
    x = torch.full((1, 1), 3.0)
    got = scheduler.step(x, scheduler.timesteps[0], x, return_dict=False)[1]
    assert float(got.max()) == 3.0
