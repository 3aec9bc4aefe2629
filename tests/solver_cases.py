"""What every solver is tested on: schedules, a network, fixed draws, and the cases of all families.

A family's transcriptions and cases stand together in `oracles_<family>.py`, found by that name.
"""

from __future__ import annotations

import functools
import math
from importlib import import_module
from pathlib import Path

import numpy as np
import oracles
from oracles import MIX, Case

from fastdiff import schedules

CASES: dict[str, Case] = {}
ORDERS: dict[str, Case] = {}  # more cases, measured for their order of convergence alone
for _file in sorted(Path(__file__).parent.glob("oracles_*.py")):
    _family = import_module(_file.stem)
    assert not set(_family.CASES) & set(CASES), _file
    CASES |= _family.CASES
    ORDERS |= getattr(_family, "ORDERS", {})

SHAPE = (2, 3)
SCHEDULES = {
    "linear": (schedules.linear(), "the betas of Ho et al."),
    "cosine": (schedules.cosine(T=400, max_beta=0.2), "clipped betas, another T"),
    "zero_snr": (
        schedules.rescale_zero_terminal_snr(schedules.scaled_linear()),
        "alpha is 0 at the first time of the trailing and linspace spacings",
    ),
    "edm": (schedules.edm(), "variance exploding"),
    "flow": (schedules.flow(), "alpha is 0 at the first time of every spacing"),
    "shifted_flow": (schedules.flow(shift=3.0), "a warped grid"),
}
KINDS = {
    "discrete": ("epsilon", "sample", "v_prediction"),
    "edm": ("epsilon", "sample", "edm"),
    "flow": ("sample", "flow"),
}


def data_model(x, phase):
    """A nonlinear guess of x0, bounded, whose slope is of order one."""
    return np.tanh(x @ MIX + np.cos(phase)) + 0.3 * np.sin(2 * x + phase)


@functools.cache
def scales(name, shift, t):
    schedule = next(s for s, _ in SCHEDULES.values() if (s.name, s.shift) == (name, shift))
    return float(schedule.alpha(t)), float(schedule.sigma(t))


def make_network(schedule, prediction, phase=0.0):
    """The raw output whose conversion is near `data_model`: any function of (x_in, t) would do,
    and this one keeps trajectories of the size that samplers meet."""

    def network(x_in, t):
        if prediction == "edm":
            sigma, sd = math.exp(4 * t), schedule.sigma_data
            total = math.hypot(sigma, sd)
            x0 = data_model(x_in * total / (1 + sigma), t + phase)
            return (x0 - sd**2 / total**2 * (total * x_in)) * total / (sigma * sd)
        alpha, sigma = scales(schedule.name, schedule.shift, t)
        x0 = data_model(x_in / (alpha + sigma), np.log1p(t) + phase)
        if prediction == "sample":
            return x0
        eps = (x_in - alpha * x0) / sigma
        return {
            "epsilon": eps,
            "v_prediction": alpha * eps - sigma * x0,
            "flow": eps - x0,
        }[prediction]

    return network


@functools.cache
def draws(kind, row):
    return np.random.default_rng((kind, row)).normal(size=SHAPE)


def problem_of(schedule, grid, prediction, **more):
    return oracles.Problem(
        times=grid.times,
        alphas=grid.alphas,
        sigmas=grid.sigmas,
        network=make_network(schedule, prediction),
        prediction=prediction,
        noise=draws,
        kind=schedule.kind,
        time_of=lambda level: float(schedule.time(level)),
        sigma_data=schedule.sigma_data,
        uncond=make_network(schedule, prediction, phase=0.7),
        scales_at=lambda t: (float(schedule.alpha(t)), float(schedule.sigma(t))),
        **more,
    )


# One of each shape; the other spacings give no new kind of grid, see test_spacings.py.
SPACINGS = {
    "discrete": ("trailing", "linspace", "leading", "karras", "exponential"),
    "edm": ("karras", "exponential"),
    "flow": ("linspace", "karras", "exponential"),
}


def grids():
    """schedule name, spacing, final for every such grid that exists."""
    for name, (schedule, _) in SCHEDULES.items():
        for spacing in SPACINGS[schedule.kind]:
            for final in ("zero", "sigma_min"):
                ramp = spacing in ("karras", "exponential")
                if ramp and name in ("zero_snr", "shifted_flow"):
                    continue  # refused: sigma/alpha infinite, or a shift that would be ignored
                yield name, spacing, final


def start(schedule):
    return schedule.init_sigma * np.random.default_rng(7).normal(size=SHAPE)


def assert_same(got, want, label, largest=0.0):
    """1e-12 of the largest state that the trajectory has passed through, at each row."""
    assert len(got) == len(want), label
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert np.isfinite(w).all() and np.isfinite(g).all(), (label, i)
        largest = max(largest, float(np.abs(w).max()))
        worst = float(np.abs(g - w).max())
        assert worst <= 1e-12 * largest, (label, i, worst / largest)


def home(solver):
    """A schedule on which the solver is defined with its defaults, and what to predict there."""
    kinds = next(case.kinds for case in CASES.values() if case.solver == solver)
    schedule = next(s for s, _ in SCHEDULES.values() if s.kind in kinds)
    return schedule, KINDS[schedule.kind][0]
