"""Tables of distilled networks against the schedulers of diffusers, in float32."""

from __future__ import annotations

import sys

import diffusers
import numpy as np
import pytest
import torch
from peers import assert_within, fixed_draw, outputs_of, run_with_budget, schedule_of
from solver_cases import start

from fastdiff import schedules, solvers

STEPS = (1, 2, 3, 4, 10, 50)


def in_float32(x):
    return x.astype(np.float32).astype(float)


def states_of(scheduler, x, outputs, monkeypatch, **options):
    """The states after each step, and the noise drawn for row i is that of a table."""
    sample, states = torch.from_numpy(x).float(), []
    module = sys.modules[type(scheduler).__module__]
    for i, (t, m) in enumerate(zip(scheduler.timesteps, outputs, strict=True)):
        noise = torch.from_numpy(fixed_draw(1, i)).float()
        monkeypatch.setattr(module, "randn_tensor", lambda *_, noise=noise, **__: noise)
        scheduler.scale_model_input(sample, t)
        m = torch.from_numpy(m).float()
        sample = scheduler.step(m, t, sample, **options).prev_sample
        states.append(sample.double().numpy())
    return states


PREDICTIONS = ("epsilon", "sample", "v_prediction")


@pytest.mark.parametrize("original", [50, 100])  # the default, and another
@pytest.mark.parametrize("clip", [None, 0.7])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_lcm(prediction, clip, original, monkeypatch):
    scheduler = diffusers.LCMScheduler(
        prediction_type=prediction, clip_sample=clip is not None, clip_sample_range=clip or 1.0,
        original_inference_steps=original,
    )  # fmt: skip
    schedule = schedule_of(scheduler)
    for steps in STEPS:
        scheduler.set_timesteps(steps)
        table = solvers.build(
            "lcm", schedule, steps, prediction=prediction, spacing="lcm", timestep_scaling=10.0,
            original_inference_steps=original,
        )  # fmt: skip
        assert table.times.tolist() == scheduler.timesteps.tolist()
        x, outputs = in_float32(start(schedule)), outputs_of(table)
        ours, budget = run_with_budget(table, x, outputs, clip=clip)
        theirs = states_of(scheduler, x, outputs, monkeypatch)
        alphas = [*table.alphas[1:], 1.0]
        theirs = [s / a for s, a in zip(theirs, alphas, strict=True)]
        assert_within(theirs, ours, budget, (prediction, steps))


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_tcd(prediction, gamma, monkeypatch):
    """It ends at t = 0, one step above clean data; noise is drawn there by none."""
    scheduler = diffusers.TCDScheduler(prediction_type=prediction)
    schedule = schedule_of(scheduler)
    for steps in STEPS:
        scheduler.set_timesteps(steps)
        table = solvers.build(
            "tcd", schedule, steps,
            prediction=prediction, spacing="lcm", final="sigma_min", gamma=gamma,
        )  # fmt: skip
        assert table.times.tolist() == scheduler.timesteps.tolist()
        x, outputs = in_float32(start(schedule)), outputs_of(table)
        ours, budget = run_with_budget(table, x, outputs)
        ours[-1] = ours[-1] / float(schedule.alpha(0.0))
        theirs = states_of(scheduler, x, outputs, monkeypatch, eta=gamma)
        alphas = [*table.alphas[1:], float(schedule.alpha(0.0))]
        theirs = [s / a for s, a in zip(theirs, alphas, strict=True)]
        assert_within(theirs, ours, budget, (prediction, steps))


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("s_noise", [1.0, 1.01])
def test_consistency(s_noise, clip, monkeypatch):
    schedule = schedules.edm()
    for steps in (1, 2, 3, 10, 40):  # 40 is its num_train_timesteps
        scheduler = diffusers.CMStochasticIterativeScheduler(
            clip_denoised=clip is not None, s_noise=s_noise
        )
        scheduler.set_timesteps(steps)
        levels = scheduler.sigmas.double().numpy()[:-1]
        table = solvers.build(
            "consistency", schedule, sigmas=levels, prediction="edm", s_noise=s_noise
        )
        # the network's time is 1000 times ours; diffusers takes it before rounding its levels
        assert np.abs(table.times * 1000 - scheduler.timesteps.numpy()).max() < 1e-3
        x, outputs = in_float32(start(schedule)), outputs_of(table)
        ours, budget = run_with_budget(table, x, outputs, clip=clip)
        theirs = states_of(scheduler, x, outputs, monkeypatch)
        assert_within(theirs, ours, budget, steps)


def test_consistency_is_the_identity_at_sigma_min():
    """Song et al. 2023, the boundary condition: f(x, eps) = x."""
    table = solvers.build("consistency", schedules.edm(), sigmas=[1.0, 0.002], prediction="edm")
    assert table.rows[1].convert == (1.0, 0.0)


def test_consistency_on_karras_differs_from_diffusers():
    """Its grid is a stride of a 40-point ramp, which does not end at sigma_min."""
    scheduler = diffusers.CMStochasticIterativeScheduler()
    scheduler.set_timesteps(3)
    ours = schedules.edm().points(3).sigmas
    assert abs(float(scheduler.sigmas[0]) - ours[0]) < 1e-4
    assert float(scheduler.sigmas[2]) > 10 * ours[2]


def test_few_original_steps():
    for call, message in (
        (
            lambda: schedules.linear().points(51, "lcm"),
            "steps must be at most 50 for spacing='lcm'",
        ),
        (
            lambda: schedules.linear().points(3, "lcm", original_inference_steps=1001),
            "original_inference_steps must be at most 1000",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
