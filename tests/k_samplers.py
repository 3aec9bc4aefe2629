"""The samplers of k-diffusion on the tests' networks and grids, in float64."""

from __future__ import annotations

import inspect

import numpy as np
import torch
from peers import denoiser, k_sampling
from scopes import default_dtype

from fastdiff import schedules
from fastdiff.schedules import Grid

SCHEDULES = {
    "edm": schedules.edm(),
    "linear": schedules.linear(),
    "flow": schedules.flow(sigma_min=0.02),
}


def fast(model, x, sigmas, eta=0.0, s_noise=1.0, noise_sampler=None, calls=11):
    """sample_dpm_fast has ends and a number of calls instead of a grid."""
    positive = sigmas[sigmas > 0]
    return k_sampling().sample_dpm_fast(
        model, x, float(positive[-1]), float(positive[0]), calls,
        eta=eta, s_noise=s_noise, noise_sampler=noise_sampler, disable=True,
    )  # fmt: skip


def sampler_of(name):
    return fast if name == "dpm_fast" else getattr(k_sampling(), f"sample_{name}")


def levels_of(name, steps, final="zero"):
    """A grid of the schedule, levels sigma/alpha, finite from the first."""
    schedule = SCHEDULES[name]
    if schedule.kind != "flow":
        grid = schedule.points(steps, "karras", final)
    else:
        t = np.linspace(0.95, 0.0 if final == "zero" else 0.05, steps + 1)
        grid = Grid(t, 1 - t, t)
    return grid, np.divide(grid.sigmas, grid.alphas)


def by_sampler(sampler, p, levels, x, noise, options, monkeypatch):
    """The sampler's own result; `noise` gives the draw of a number."""
    numbers = iter(range(10**6))

    def draw(*_):
        return torch.from_numpy(noise(next(numbers)))

    denoise = denoiser(p, levels, p.times)
    if "noise_sampler" in inspect.signature(sampler).parameters:
        options = {**options, "noise_sampler": draw}
    if "disable" in inspect.signature(sampler).parameters:
        options = {**options, "disable": True}
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn_like", draw)
        with default_dtype(torch.float64):
            return sampler(denoise, torch.from_numpy(x), torch.from_numpy(levels), **options)
