"""Flow tables against torchdiffeq's fixed grid and the flow schedulers of diffusers."""

from __future__ import annotations

import sys

import diffusers
import numpy as np
import pytest
import torch
from peers import assert_within, fixed_draw, outputs_of, run_with_budget
from rows import run
from solver_cases import SPACINGS, assert_same, problem_of, start

from fastdiff import schedules, solvers
from fastdiff.schedules import Grid

STEPS = (1, 2, 3, 10, 50)


# --- torchdiffeq, in float64 on the same network ---------------------------------------------

FIXED = {
    "flow_midpoint": ("midpoint", "two evaluations"),
    "flow_heun3": ("heun3", "three evaluations"),
    "flow_rk4": ("rk4", "the 3/8 rule"),
    "heun": ("heun2", "the trapezoid"),
    "euler": ("euler", "Euler's method"),
    "ddim": ("euler", "which DDIM is on a flow"),
}


@pytest.mark.parametrize("prediction", ["sample", "flow"])
@pytest.mark.parametrize("solver", FIXED)
def test_torchdiffeq(solver, prediction):
    odeint = pytest.importorskip("torchdiffeq", reason="torchdiffeq is not installed").odeint
    for schedule in (schedules.flow(), schedules.flow(shift=3.0)):
        for spacing in SPACINGS["flow"] if schedule.shift == 1 else ("linspace",):
            for final in ("sigma_min", "zero"):
                if final == "zero" and solver in ("flow_rk4", "heun"):
                    continue  # a stage at t = 0, see test_last_step_of_torchdiffeq
                for steps in STEPS:
                    grid = schedule.points(steps, spacing, final)
                    p = problem_of(schedule, grid, prediction)

                    def slope(t, x, p=p):
                        t = min(max(float(t), 0.0), 1.0)
                        x0, eps = p.predict(x.numpy(), t, 1 - t, t)
                        return torch.from_numpy(eps - x0)

                    table = solvers.build(
                        solver, schedule, steps,
                        prediction=prediction, spacing=spacing, final=final,
                    )  # fmt: skip
                    x = start(schedule)
                    got = run(table, x, p.network, lambda *_: None)
                    stride = len(table) // steps
                    want = odeint(
                        slope, torch.from_numpy(x), torch.from_numpy(grid.times.copy()),
                        method=FIXED[solver][0],
                    )  # fmt: skip
                    label = (solver, spacing, final, steps)
                    assert_same(got[stride - 1 :: stride], list(want[1:].numpy()), label)


def test_last_step_of_torchdiffeq():
    """Its rk4 and heun2 take a slope at t = 0, which the network of a flow has and no x0 has; the
    table takes the step with heun3, and with Euler."""
    odeint = pytest.importorskip("torchdiffeq", reason="torchdiffeq is not installed").odeint
    schedule = schedules.flow()
    p = problem_of(schedule, schedule.points(4), "sample")

    def slope(t, x):
        x0, eps = p.predict(x.numpy(), float(t), 1 - float(t), float(t))
        return torch.from_numpy(eps - x0)

    for solver, method, last in (("flow_rk4", "rk4", "heun3"), ("heun", "heun2", "euler")):
        table = solvers.build(solver, schedule, 4, prediction="sample")
        x, times = start(schedule), torch.from_numpy(schedule.points(4).times.copy())
        got = run(table, x, p.network, lambda *_: None)[-1]
        before = odeint(slope, torch.from_numpy(x), times[:-1], method=method)[-1]
        want = odeint(slope, before, times[-2:], method=last)[-1]
        assert_same([got], [want.numpy()], solver)


# --- diffusers, in float32 --------------------------------------------------------------------


def flow_grid(scheduler):
    """The points of a flow scheduler: its sigmas are t."""
    t = scheduler.sigmas.double().numpy()
    t = np.concatenate([t[:1], t[1:][np.diff(t) != 0]])  # Heun has them twice
    return Grid(t, 1 - t, t)


def states_of(scheduler, x, outputs, alphas, **options):
    sample, states = torch.from_numpy(x).float(), []
    for t, m, alpha in zip(scheduler.timesteps, outputs, alphas, strict=True):
        m = torch.from_numpy(m).float()
        sample = scheduler.step(m, t, sample, **options).prev_sample
        states.append(sample.double().numpy() / alpha)
    return states


def in_float32(x):
    return x.astype(np.float32).astype(float)


SCHEDULERS = {
    "euler": ("FlowMatchEulerDiscreteScheduler", {}, "Euler"),
    "ddim": ("FlowMatchEulerDiscreteScheduler", {}, "the same"),
    "heun": ("FlowMatchHeunDiscreteScheduler", {}, "Heun"),
    "lcm": ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, "noise anew"),
    "lcm-lcm": ("FlowMatchLCMScheduler", {}, "noise anew"),
}


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("case", SCHEDULERS)
def test_diffusers(case, shift, monkeypatch):
    name, config, _ = SCHEDULERS[case]
    for steps in STEPS:
        scheduler = getattr(diffusers, name)(shift=shift, **config)
        scheduler.set_timesteps(steps)
        grid = flow_grid(scheduler)
        schedule = schedules.flow(shift=shift)
        # float32 of the spacing that has its name
        assert np.abs(grid.times - schedule.points(steps, "normal").times).max() < 1e-6
        table = solvers.build_on(case.split("-")[0], schedule, grid, prediction="flow")
        outputs, x = outputs_of(table), in_float32(start(schedule))
        drawn = iter(range(10**6))

        def randn(*_, drawn=drawn, **__):
            return torch.from_numpy(fixed_draw(1, next(drawn))).float()

        monkeypatch.setattr(sys.modules[type(scheduler).__module__], "randn_tensor", randn)
        ours, budget = run_with_budget(table, x, outputs)
        theirs = states_of(scheduler, x, outputs, [*table.alphas[1:], 1.0])
        if case == "heun":  # between its two calls diffusers hands the same predicted state on
            assert len(theirs) == len(ours) == 2 * steps - 1
        # at the first point, alpha is 0: x is noise, and is counted in its own units
        assert_within(theirs, ours, budget, (case, steps))
