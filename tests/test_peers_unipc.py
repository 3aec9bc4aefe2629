"""UniPC against diffusers, and its order where the common tests cannot show it."""

from __future__ import annotations

import math

import diffusers
import numpy as np
import pytest
import torch
from peers import outputs_of, schedule_of
from rows import run
from solver_cases import SHAPE, assert_same, start
from test_convergence import (
    FAR,
    SCHEDULES,
    exact_gaussian,
    exact_mixture,
    gaussian,
    mixture,
    network_of,
    no_noise,
)
from test_convergence import start as first_state

from fastdiff import schedules, solvers
from fastdiff.schedules import Grid

STEPS = (1, 2, 3, 10, 50)
OPTIONS = {
    "default": ({}, {}),
    "order-1": ({"order": 1}, {"solver_order": 1}),
    "order-3": ({"order": 3}, {"solver_order": 3}),
    "bh1": ({"order": 3, "solver_type": "bh1"}, {"solver_order": 3, "solver_type": "bh1"}),
    "noise": ({"predict_x0": False}, {"predict_x0": False}),
    "noise-bh1": (
        {"predict_x0": False, "solver_type": "bh1", "order": 3},
        {"predict_x0": False, "solver_type": "bh1", "solver_order": 3},
    ),
    "skip": ({"disable_corrector": (0, 2)}, {"disable_corrector": [0, 2]}),
    "unip": ({"corrector": False}, {"disable_corrector": list(range(50))}),
    "full": ({"lower_order_final": False}, {"lower_order_final": False}),
}
SPACING = {
    "linspace": {"timestep_spacing": "linspace"},
    "leading": {"timestep_spacing": "leading"},
    "trailing": {"timestep_spacing": "trailing"},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "flow": {"use_flow_sigmas": True, "flow_shift": 3.0},
}
PREDICTIONS = ["epsilon", "sample", "v_prediction", "flow_prediction"]

# where diffusers has no answer, see test_not_there
NOT_THERE = {
    "karras-sigma_min": "its last level comes twice: a step of length 0",
    "exponential-sigma_min": "the same",
    "flow-sigma_min": "the same",
    "noise-zero": "the noise form to sigma 0 multiplies 0 by infinity",
    "noise-bh1-zero": "the same",
    "bh1-zero": "B(h) = -infinity is multiplied by a sum of nothing",
    "full-zero": "a step of order 2 to sigma 0 divides by an infinite h",
}


def refused(case, spacing, final, prediction, steps):
    gone = f"{spacing}-{final}" in NOT_THERE
    if not (case == "full" and steps == 1):
        gone |= f"{case}-{final}" in NOT_THERE
    is_flow = prediction == "flow_prediction"
    return gone or (spacing == "flow") != is_flow or (is_flow and case.startswith("noise"))


def make(case, spacing, final, prediction, steps):
    """The scheduler with its float32 levels taken for exact, so that it computes in float64."""
    scheduler = diffusers.UniPCMultistepScheduler(
        beta_schedule="scaled_linear", prediction_type=prediction, final_sigmas_type=final,
        **SPACING[spacing], **OPTIONS[case][1],
    )  # fmt: skip
    scheduler.set_timesteps(steps)
    scheduler.sigmas = scheduler.sigmas.double()
    return scheduler


def their_states(scheduler, x, outputs):
    sample, states = torch.from_numpy(x), []
    for t, m in zip(scheduler.timesteps, outputs, strict=True):
        sample = scheduler.step(torch.from_numpy(m), t, sample).prev_sample
        states.append(sample.numpy())
    return states


def own_grid(scheduler):
    """Its points; their times are names."""
    levels = scheduler.sigmas.numpy()
    times = np.arange(len(levels), 0, -1) - 1.0
    if scheduler.config.use_flow_sigmas:
        return Grid(times / len(levels), 1 - levels, levels)
    return Grid(times, 1 / np.hypot(1, levels), levels / np.hypot(1, levels))


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("case", OPTIONS)
def test_diffusers(case, prediction):
    for spacing in SPACING:
        for final in ("zero", "sigma_min"):
            for steps in STEPS:
                at = (case, spacing, final, prediction, steps)
                if refused(*at):
                    continue
                scheduler = make(*at)
                is_flow = spacing == "flow"
                schedule = schedules.flow() if is_flow else schedule_of(scheduler)
                table = solvers.build_on(
                    "unipc", schedule, own_grid(scheduler),
                    prediction="flow" if is_flow else prediction, **OPTIONS[case][0],
                )  # fmt: skip
                x, outputs = start(schedule), outputs_of(table)
                feed = iter(outputs)
                ours = run(table, x, lambda *_, feed=feed: next(feed), no_noise)
                assert_same(their_states(scheduler, x, outputs), ours, at, np.abs(x).max())


@pytest.mark.parametrize("case", NOT_THERE)
def test_not_there(case):
    head, final = case.rsplit("-", 1)
    case, spacing = (head, "linspace") if head in OPTIONS else ("default", head)
    prediction = "flow_prediction" if spacing == "flow" else "epsilon"
    scheduler = make(case, spacing, final, prediction, 5)
    if case == "default":
        assert scheduler.sigmas[-1] == scheduler.sigmas[-2], "mended upstream?"
        return
    x = np.ones(SHAPE)
    assert not np.isfinite(their_states(scheduler, x, [x] * 5)[-1]).any(), "mended upstream?"


# --- order --------------------------------------------------------------------------------------

FULL = {"lower_order_final": False}
UNIP = {"order": 3, "corrector": False, **FULL}
# schedule, spacing, data, options, steps: where an order shows that others hide elsewhere
ORDERS = {
    "lower-final": ("flow", "linspace", "mixture", {}, 1200),
    "lower-final-3": ("flow", "linspace", "gaussian", {"order": 3}, 150),
    "lower-final-bh1": ("flow", "linspace", "mixture", {"solver_type": "bh1"}, 1200),
    "start": ("flow", "karras", "gaussian", FULL, 300),
    "start-3": ("flow", "karras", "mixture", {"order": 3, **FULL}, 300),
    "start-unip-3": ("flow", "exponential", "mixture", UNIP, 150),
    # on Gaussian data with equal steps in log(alpha/sigma) the third order cancels over the path
    "unip-3": ("vp", "karras", "gaussian", UNIP, 150),
    "unip-3-mixture": ("edm", "karras", "mixture", UNIP, 150),
    "unip-3-noise": (
        "cosine", "karras", "mixture", {"predict_x0": False, **UNIP}, 150,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ORDERS)
def test_order(case):
    name, spacing, data, options, steps = ORDERS[case]
    schedule = SCHEDULES[name][0]
    x, errors = first_state(schedule), []
    want = exact_mixture(name)
    if data == "gaussian":
        want = exact_gaussian(schedule, x, schedule.t_min)
    for n in (steps, 2 * steps):
        table = solvers.build(
            "unipc", schedule, n,
            prediction="sample", spacing=spacing, final="sigma_min", **options,
        )  # fmt: skip
        x0 = {"gaussian": gaussian, "mixture": mixture}[data]
        got = run(table, x, network_of(table, x0), no_noise)[-1]
        errors.append(float(np.abs(got - want).max()))
    assert abs(math.log2(errors[0] / errors[1]) - table.order) < FAR, errors


@pytest.mark.parametrize("options", [{"order": 0}, {"order": 4}, {"order": True}])
def test_refuses(options):
    with pytest.raises(ValueError, match="order of unipc"):
        solvers.build("unipc", schedules.linear(), 10, **options)
