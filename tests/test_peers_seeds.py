"""DPM++ SDE against k-diffusion and diffusers, each with its Brownian path of our draws."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
from peers import denoiser, fixed_draw, k_sampling, outputs_of, schedule_of
from rows import run
from solver_cases import SPACINGS as RAMPS
from solver_cases import assert_same, draws, problem_of, start

from fastdiff import schedules, solvers
from fastdiff.schedules import Grid

OPTIONS = {
    "default": {},
    "ode": {"eta": 0.0},
    "options": {"eta": 0.7, "s_noise": 1.01, "r": 0.4},
    "late": {"eta": 0.5, "r": 0.9},
    "capped": {"eta": 1.3},
}


def path(draw):
    """A noise sampler over sigma, called for the stage and then for the whole step: increments of
    one Brownian path, each over the root of its length. Rows are counted two a step."""
    calls = iter(range(10**6))
    stage = []

    def sample(start, end):
        start, end, row = float(start), float(end), next(calls)
        if row % 2 == 0:
            stage[:] = [end, draw(1, row)]
            return torch.from_numpy(stage[1])
        mid, first = stage
        total = (start - mid) ** 0.5 * first + abs(mid - end) ** 0.5 * draw(1, row)
        return torch.from_numpy(total / (start - end) ** 0.5)

    return sample


@pytest.mark.parametrize("name", ["linear", "edm"])
@pytest.mark.parametrize("case", OPTIONS)
def test_k_diffusion(case, name):
    sampling = k_sampling()
    schedule = {"linear": schedules.linear(), "edm": schedules.edm()}[name]
    for prediction in ("epsilon", "sample"):
        for spacing in RAMPS[schedule.kind]:
            for final in ("zero", "sigma_min"):
                for steps in (1, 2, 3, 10, 50):
                    grid = schedule.points(steps, spacing, final)
                    p = problem_of(schedule, grid, prediction)
                    table = solvers.build(
                        "dpmpp_sde", schedule, steps, prediction=prediction, spacing=spacing,
                        final=final, **OPTIONS[case],
                    )  # fmt: skip
                    x = start(schedule)
                    got = run(table, x, p.network, draws)
                    denoise = denoiser(p, p.levels, grid.times)
                    want = sampling.sample_dpmpp_sde(
                        denoise, torch.from_numpy(x / grid.alphas[0]), torch.tensor(p.levels),
                        disable=True, noise_sampler=path(draws), **OPTIONS[case],
                    )  # fmt: skip
                    scales = [*table.alphas[1:], grid.alphas[-1]]
                    sizes = [np.abs(g).max() / a for g, a in zip(got, scales, strict=True)]
                    largest = max([np.abs(x).max() / grid.alphas[0], *sizes])
                    label = (case, name, prediction, spacing, final, steps)
                    assert_same([got[-1] / grid.alphas[-1]], [want.numpy()], label, largest)


SPACINGS = {
    "linspace": {"timestep_spacing": "linspace"},
    "leading": {"timestep_spacing": "leading"},
    "trailing": {"timestep_spacing": "trailing"},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
}


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_diffusers(spacing, prediction):
    """Its float32 levels taken for exact, so that it computes in float64; "sample" is not there."""
    for steps in (1, 2, 3, 10, 50):
        scheduler = diffusers.DPMSolverSDEScheduler(
            beta_schedule="scaled_linear", prediction_type=prediction, **SPACINGS[spacing]
        )
        scheduler.set_timesteps(steps)
        scheduler.sigmas = scheduler.sigmas.double()
        levels = np.append(scheduler.sigmas[:-1:2].numpy(), 0.0)
        times = np.append(scheduler.timesteps[::2].numpy(), -1.0)
        schedule = schedule_of(scheduler)
        grid = Grid(times, 1 / np.hypot(1, levels), levels / np.hypot(1, levels))
        table = solvers.build_on("dpmpp_sde", schedule, grid, prediction=prediction, s_noise=1.01)
        x, outputs = start(schedule), outputs_of(table)
        feed = iter(outputs)
        ours = run(table, x, lambda *_, feed=feed: next(feed), fixed_draw)
        ours = [s / a for s, a in zip(ours, [*table.alphas[1:], 1.0], strict=True)]
        scheduler.noise_sampler = path(fixed_draw)
        sample, states = torch.from_numpy(x / table.alphas[0]), []
        for t, m in zip(scheduler.timesteps, outputs, strict=True):
            scheduler.scale_model_input(sample, t)
            sample = scheduler.step(torch.from_numpy(m), t, sample, s_noise=1.01).prev_sample
            states.append(sample.numpy())
        assert_same(states, ours, (spacing, prediction, steps), np.abs(x / table.alphas[0]).max())


def test_refuses():
    with pytest.raises(ValueError, match="r_1 of seeds_3"):
        solvers.build("seeds_3", schedules.linear(), 10, r_1=0.7, r_2=0.5)
