"""The samplers of diffusers and k-diffusion, driven with the same outputs and noise as a table.

diffusers computes in float32, so its error is bounded; k-diffusion runs in float64.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
import types

import numpy as np
import pytest
import torch
from oracles_dpm_2 import get_ancestral_step
from rows import run
from solver_cases import SHAPE, draws

from fastdiff import schedules
from fastdiff.schedules import Grid

EPS = float(np.finfo(np.float32).eps)
ROUNDINGS = 8  # a term's own scale (2), conversion (2), product (1), sum (1) and clean-up (2)


def schedule_of(scheduler):
    """The schedule of a scheduler's own float32 alphabar, so that only its steps can differ."""
    abar = scheduler.alphas_cumprod.double().numpy()
    return schedules.from_betas(1 - abar / np.concatenate([[1.0], abar[:-1]]))


def grid_of(scheduler):
    """The points of a scheduler that counts in sigma/alpha."""
    levels = scheduler.sigmas.double().numpy()
    levels = np.concatenate([levels[:1], levels[1:][np.diff(levels) != 0]])  # Heun has them twice
    times = np.concatenate([np.unique(scheduler.timesteps.double().numpy())[::-1], [-1.0]])
    return Grid(times[-len(levels) :], 1 / np.hypot(1, levels), levels / np.hypot(1, levels))


def outputs_of(table):
    """One fixed output for each evaluation, exact in float32."""
    rng = np.random.default_rng(5)
    return [rng.normal(size=SHAPE).astype(np.float32).astype(float) for _ in range(table.nfe)]


def fixed_draw(stream, counter):
    return draws(stream, counter).astype(np.float32).astype(float)


def run_with_budget(table, x, outputs, *, clip=None, variance=None):
    """States in units of x0 (divided by alpha), and what float32 may be off by after each row.

    A rounding is EPS/2 of the number rounded; a term of a row takes at most ROUNDINGS of them. The
    weights of the x0 prediction and of the noise hang on differences of levels: h, a difference of
    logarithms up to |lambda| in size, each rounded, is off by EPS*(1 + 2|lambda|)/h of itself. In
    units of x0 an error made once is carried on with factors of at most 1.
    """
    feed = iter(outputs)
    states = run(table, x, lambda *_: next(feed), fixed_draw, clip=clip, variance=variance)
    befores, feed = [x, *states[:-1]], iter(outputs)
    after = [*((row.alpha, row.sigma) for row in table.rows[1:]), (1.0, 0.0)]
    scaled, budgets, pushed, anchor = [], [], [], 0.0
    total = EPS / 2 * np.abs(x).max() / (table.rows[0].alpha or 1.0)
    for row, before, state, (alpha, sigma) in zip(table.rows, befores, states, after, strict=True):
        size = {"x": np.abs(before).max(), "y": anchor, "d": 0.0}
        size |= {f"n{k}": np.abs(fixed_draw(*draw)).max() for k, draw in enumerate(row.draws, 1)}
        size |= {f"h{k}": h for k, h in enumerate(reversed(pushed[-4:]))}
        if row.evaluates:
            size["m"] = np.abs(next(feed)).max()
            size["d"] = abs(row.convert[0]) * size["x"] + abs(row.convert[1]) * size["m"]
        if row.push:
            e, f = (0.0, 1.0) if row.push is True else row.push
            pushed.append(abs(e) * size["x"] + abs(f) * size["d"])
        if row.y is not None:
            anchor = sum(abs(c) * size[k] for k, c in row.y.items())
        amount = sum(abs(c) * size[k] for k, c in row.x.items())
        lam = [
            math.log(a / s) if a and s else 0.0 for a, s in ((row.alpha, row.sigma), (alpha, sigma))
        ]
        # a row that only renoises, or whose way down and up again ends at its own level, has no h
        if row.alpha and sigma and abs(lam[1] - lam[0]) > EPS:
            off = (1 + 2 * max(map(abs, lam))) / abs(lam[1] - lam[0])
            amount += off * sum(abs(c) * size[k] for k, c in row.x.items() if k != "x")
        total += EPS / 2 * ROUNDINGS * amount / alpha
        budgets.append(total)
        scaled.append(state / alpha)
    return scaled, budgets


def assert_within(peer, ours, budgets, label):
    assert len(peer) == len(ours)
    for i, (g, w, b) in enumerate(zip(peer, ours, budgets, strict=True)):
        worst = float(np.abs(g - w).max())
        assert worst <= b, (label, i, worst, b)
    # the budget must be able to notice a wrong coefficient
    assert budgets[-1] < 0.02 * max(np.abs(w).max() for w in ours), (label, budgets[-1])


class Peer:
    """Drives a scheduler: the same outputs and noise, states in units of x0."""

    def __init__(self, scheduler, steps, monkeypatch):
        self.scheduler, self.steps = scheduler, steps
        scheduler.set_timesteps(steps)
        self.row = 0
        module = sys.modules[type(scheduler).__module__]
        if hasattr(module, "randn_tensor"):
            monkeypatch.setattr(module, "randn_tensor", self.randn)
        self.stream = 1

    def randn(self, shape, **_):
        return torch.from_numpy(fixed_draw(self.stream, self.row)).float()

    def states(self, x, outputs, alphas, *, levels, variance=None, **kwargs):
        """`levels`: the scheduler's sample is x/alpha."""
        s = self.scheduler
        sample = torch.from_numpy(x / (alphas[0] if levels else 1.0)).float()
        states = []
        for t, m, alpha in zip(s.timesteps, outputs, alphas[1:], strict=False):
            s.scale_model_input(sample, t)
            m = torch.from_numpy(m).float()
            if variance is not None:
                m = torch.cat([m, torch.from_numpy(variance).float()], dim=1)
            sample = s.step(m, t, sample, **kwargs).prev_sample
            self.row += 1
            states.append(sample.double().numpy() / (1.0 if levels else alpha))
        return states


def denoiser(p, levels, times):
    """k-diffusion's model of a problem: its own times at the levels of the grid, exact."""
    known = dict(zip(np.round(levels, 9), times, strict=True))

    def denoise(z, sigma):
        level = float(sigma.reshape(-1)[0])
        return torch.from_numpy(p.denoised(z.numpy(), level, known.get(np.round(level, 9))))

    return denoise


def k_sampling():
    """k_diffusion.sampling alone: the package itself imports torchvision, wandb and CLIP."""
    return k_module("sampling")


def k_module(name):
    """One module of k_diffusion. For `layers`, whose DCT loss nobody here calls, the packages of
    that loss are empty names where they are not installed."""
    why = "k-diffusion (with torchdiffeq, torchsde and tqdm) is not installed"
    for needed in ("torchdiffeq", "torchsde", "scipy", "tqdm"):
        pytest.importorskip(needed, reason=why)
    if f"k_diffusion.{name}" in sys.modules:
        return sys.modules[f"k_diffusion.{name}"]
    found = importlib.util.find_spec("k_diffusion")
    if found is None:
        pytest.skip(why)
    package, utils = types.ModuleType("k_diffusion"), types.ModuleType("k_diffusion.utils")
    package.__path__ = list(found.submodule_search_locations)
    utils.append_dims = lambda x, n: x[(...,) + (None,) * (n - x.ndim)]
    package.utils = utils
    made = {"k_diffusion": package, "k_diffusion.utils": utils}
    if name == "layers":
        for absent, attributes in (
            ("dctorch", ("functional",)),
            ("einops", ("rearrange", "repeat")),
        ):
            if importlib.util.find_spec(absent) is None:
                made[absent] = types.ModuleType(absent)
                made[absent].__dict__.update(dict.fromkeys(attributes))
    sys.modules |= made
    try:
        return importlib.import_module(f"k_diffusion.{name}")
    finally:  # leave no half of a package behind
        for key in made:
            del sys.modules[key]


def stable_step(sigma_from, sigma_to, eta=1.0):
    """get_ancestral_step without the difference of squares, which loses the digits of a small
    sigma_down: the network would be asked elsewhere."""
    if sigma_to == 0:
        return sigma_to, 0.0
    down, up = get_ancestral_step(float(sigma_from), float(sigma_to), eta)
    return torch.tensor(down, dtype=torch.float64), up
