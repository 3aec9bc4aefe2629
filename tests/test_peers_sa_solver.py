"""SA-Solver, both forms, against diffusers, and its coefficients at a thousand steps."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
from oracles_sa_solver import sa_solver
from peers import fixed_draw, outputs_of, schedule_of
from rows import run
from solver_cases import SCHEDULES, assert_same, draws, problem_of, start

from fastdiff import schedules, solvers
from fastdiff.schedules import Grid


def falling(t):
    """A tau that is another at each step."""
    return float(t) / 1000


OPTIONS = {
    "default": {"predictor_order": 2, "corrector_order": 2},
    "corrector-3": {"predictor_order": 2, "corrector_order": 3},
    "lowest": {"predictor_order": 1, "corrector_order": 2},
    "highest": {"predictor_order": 3, "corrector_order": 4},
    "full": {"predictor_order": 2, "corrector_order": 2, "lower_order_final": False},
    "ode": {"predictor_order": 2, "corrector_order": 2, "tau": 0.0},
    "always": {
        "predictor_order": 2, "corrector_order": 3, "tau": 0.7, "tau_start": 1e9, "tau_end": 0.0,
    },
    "noise": {"predictor_order": 2, "corrector_order": 2, "predict_x0": False},
    "noise-lowest": {"predictor_order": 1, "corrector_order": 2, "predict_x0": False},
    "noise-highest": {"predictor_order": 3, "corrector_order": 4, "predict_x0": False},
    "noise-full": {
        "predictor_order": 2, "corrector_order": 3, "predict_x0": False, "lower_order_final": False,
    },
    "noise-ode": {"predictor_order": 3, "corrector_order": 3, "predict_x0": False, "tau": 0.0},
    "noise-always": {
        "predictor_order": 2, "corrector_order": 3, "predict_x0": False,
        "tau": 0.7, "tau_start": 1e9, "tau_end": 0.0,
    },
    "falling": {"predictor_order": 2, "corrector_order": 2, "tau": falling},
    "noise-falling": {
        "predictor_order": 2, "corrector_order": 2, "predict_x0": False, "tau": falling,
    },
}  # fmt: skip
# its other spacings repeat the last level: a step of length 0, see test_a_step_of_length_0
SPACINGS = ("linspace", "leading", "trailing")
REPEATS = ("use_karras_sigmas", "use_exponential_sigmas", "use_flow_sigmas")


def make(
    prediction, spacing, steps, *, tau=1.0, tau_start=800, tau_end=200, predict_x0=True, **options
):
    """The scheduler with its float32 levels taken for exact, so that it computes in float64."""

    def tau_of(t):
        found = tau(t) if callable(tau) else tau if tau_end <= t <= tau_start else 0.0
        return torch.tensor(found, dtype=torch.float64)

    scheduler = diffusers.SASolverScheduler(
        beta_schedule="scaled_linear", prediction_type=prediction, timestep_spacing=spacing,
        algorithm_type="data_prediction" if predict_x0 else "noise_prediction",
        tau_func=tau_of, **options,
    )  # fmt: skip
    scheduler.set_timesteps(steps)
    scheduler.sigmas = scheduler.sigmas.double()
    return scheduler


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("case", OPTIONS)
def test_diffusers(case, prediction, monkeypatch):
    for spacing in SPACINGS:
        for steps in (1, 2, 3, 10, 50):
            if case.endswith("highest") and steps == 50:
                continue  # its sums of powers of lambda, up to 5^3, cancel to h^3 and lose 1e-12
            scheduler = make(prediction, spacing, steps, **OPTIONS[case])
            if scheduler.timesteps[-1] == 0:
                continue  # "trailing" ends there at 50 steps or more with a step of length 0
            levels = scheduler.sigmas.numpy()
            times = np.append(scheduler.timesteps.double().numpy(), 0.0)
            grid = Grid(times, 1 / np.hypot(1, levels), levels / np.hypot(1, levels))
            schedule = schedule_of(scheduler)
            table = solvers.build_on(
                "sa_solver", schedule, grid, prediction=prediction,
                simple_order_2=OPTIONS[case].get("predict_x0", True), **OPTIONS[case],
            )  # fmt: skip
            x, outputs = start(schedule), outputs_of(table)
            feed = iter(outputs)
            ours = run(table, x, lambda *_, feed=feed: next(feed), fixed_draw)
            sample, states = torch.from_numpy(x), []
            module = "diffusers.schedulers.scheduling_sasolver.randn_tensor"
            for i, (t, m) in enumerate(zip(scheduler.timesteps, outputs, strict=True)):
                noise = torch.from_numpy(fixed_draw(1, i))
                monkeypatch.setattr(module, lambda *_, noise=noise, **__: noise)
                sample = scheduler.step(torch.from_numpy(m), t, sample).prev_sample
                states.append(sample.numpy())
            assert_same(states, ours, (case, spacing, prediction, steps), np.abs(x).max())


@pytest.mark.parametrize("config", REPEATS)
def test_a_step_of_length_0(config):
    scheduler = diffusers.SASolverScheduler(beta_schedule="scaled_linear", **{config: True})
    scheduler.set_timesteps(10)
    assert scheduler.sigmas[-1] == scheduler.sigmas[-2], "mended upstream?"


@pytest.mark.parametrize("name", ["linear", "edm"])
@pytest.mark.parametrize("pece", [False, True])
@pytest.mark.parametrize("predict_x0", [True, False])
def test_a_thousand_steps(name, pece, predict_x0):
    """Where float32 coefficients are off by more than themselves: against 100 digits."""
    schedule = SCHEDULES[name][0]
    options = {"tau_start": 1e9, "tau_end": 0.0, "pece": pece, "predict_x0": predict_x0}
    table = solvers.build("sa_solver", schedule, 999, prediction="sample", **options)
    p = problem_of(schedule, schedule.points(999), "sample")
    x = start(schedule)
    want = sa_solver(p, x, interval=(0.0, 1e9), pece=pece, data=predict_x0)
    assert_same(run(table, x, p.network, draws), want, (name, pece, predict_x0))


@pytest.mark.parametrize(
    "options, rule",
    [
        ({"predictor_order": 4}, "predictor_order of sa_solver"),
        ({"corrector_order": 1}, "corrector_order of sa_solver"),
        ({"tau_start": 100, "tau_end": 200}, "tau_start of sa_solver"),
        ({"tau": falling, "tau_end": 200}, "tau of sa_solver"),
        ({"tau": lambda t: -1.0}, "tau must"),
        ({"simple_order_2": True, "predict_x0": False}, "simple_order_2 of sa_solver"),
    ],
)
def test_refuses(options, rule):
    with pytest.raises(ValueError, match=rule):
        solvers.build("sa_solver", schedules.linear(), 10, **options)
