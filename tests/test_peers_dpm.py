"""The DPM-Solvers of diffusers, which compute in float32, fed the same model outputs and noise."""

from __future__ import annotations

from itertools import product

import diffusers
import numpy as np
import pytest
from oracles_dpm import multistep
from oracles_dpm_singlestep import singlestep
from peers import (
    EPS,
    ROUNDINGS,
    Peer,
    assert_within,
    fixed_draw,
    outputs_of,
    run_with_budget,
    schedule_of,
)
from solver_cases import assert_same, problem_of, start

from fastdiff import schedules, solvers
from fastdiff.schedules import Grid

pytestmark = pytest.mark.filterwarnings("ignore:algorithm_type:FutureWarning")

MULTI, SINGLE = diffusers.DPMSolverMultistepScheduler, diffusers.DPMSolverSinglestepScheduler
STEPS = (1, 2, 3, 10, 14, 15, 50)  # 15 is where diffusers stops to lower the order at the end
EVERY = {
    "linspace": {"timestep_spacing": "linspace"},
    "leading": {"timestep_spacing": "leading"},
    "trailing": {"timestep_spacing": "trailing"},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
}
PLAIN = {"linspace": {}, "karras": EVERY["karras"], "exponential": EVERY["exponential"]}


def grid_of(scheduler):
    """Its levels, which alone make the steps; the outputs are given, so that times are names."""
    levels = scheduler.sigmas.double().numpy()
    times = np.append(np.linspace(1, 0.5, len(levels) - 1), 0.0)
    if scheduler.config.use_flow_sigmas:
        return Grid(times, 1 - levels, levels)
    return Grid(times, 1 / np.hypot(1, levels), levels / np.hypot(1, levels))


def noise_form_budget(table, grid, x, ours, outputs, single):
    """What float32 may be off by where the state and the noise prediction are both multiplied by up
    to alpha'/alpha and nearly cancel: the terms of the noise form itself, which the tables write as
    sigma'/sigma and x0. As in run_with_budget, h is off by EPS*(1 + 2|lambda|) of itself and more
    so is e^h. In units of x0; a stage of a singlestep method starts at the base of its step.
    """
    alphas, sigmas = grid.alphas, grid.sigmas
    before = [
        np.abs(x).max(),
        *(np.abs(s).max() * a for s, a in zip(ours, alphas[1:], strict=True)),
    ]
    base, total, budgets = 0, 0.0, []
    for i, (row, m) in enumerate(zip(table.rows, outputs, strict=True)):
        if not single or "h0" not in row.x:
            base = i
        d = abs(row.convert[0]) * before[i] + abs(row.convert[1]) * np.abs(m).max()
        eps = (before[i] + row.alpha * d) / row.sigma
        ratio, growth = alphas[i + 1] / alphas[base], alphas[i + 1] * sigmas[base] / alphas[base]
        lam = np.log(alphas[[base, i + 1]] / sigmas[[base, i + 1]])
        off = 1 + 2 * np.abs(lam).max()
        amount = ratio * before[base] + (1 + off) * growth * eps
        total += EPS / 2 * ROUNDINGS * amount / alphas[i + 1]
        budgets.append(total)
    return budgets


def compare(scheduler, steps, solver, options, prediction, label, monkeypatch):
    peer = Peer(scheduler, steps, monkeypatch)
    grid = grid_of(scheduler)
    flow = scheduler.config.use_flow_sigmas
    schedule = schedules.flow() if flow else schedule_of(scheduler)
    table = solvers.build_on(solver, schedule, grid, prediction=prediction, **options)
    x, outputs = start(schedule).astype(np.float32).astype(float), outputs_of(table)
    ours, budget = run_with_budget(table, x, outputs)
    ours[-1] = ours[-1] / grid.alphas[-1]
    if table.name.startswith("dpm_"):
        more = noise_form_budget(table, grid, x, ours, outputs, "single" in solver)
        budget = [a + b for a, b in zip(budget, more, strict=True)]
    theirs = peer.states(x, outputs, grid.alphas, levels=False)
    assert_within(theirs, ours, budget, label)
    return grid, schedule, outputs, x, theirs, ours, budget


def name_of(algorithm, kind):
    """The solver and its eta."""
    eta = {"eta": 1.0} if algorithm.startswith("sde") else {}
    return f"{'dpmpp' if algorithm.endswith('++') else 'dpm'}_{kind}", eta


MULTISTEP = [
    (algorithm, order, solver_type)
    for algorithm in ("dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver")
    for order, solver_type in ((1, "midpoint"), (2, "midpoint"), (2, "heun"), (3, "midpoint"))
    # its third order of the SDEs: see test_departures and test_third_order_sde_of_the_noise_form
    if order < 3 or not algorithm.startswith("sde")
]


@pytest.mark.parametrize(("algorithm", "order", "solver_type"), MULTISTEP)
def test_multistep(algorithm, order, solver_type, monkeypatch):
    data = algorithm.endswith("++")
    finals = ("zero", "sigma_min") if data else ("sigma_min",)  # diffusers refuses the others
    solver, eta = name_of(algorithm, "multistep")
    predictions = ("epsilon", "sample", "v_prediction")
    for label in product(predictions, finals, EVERY, STEPS, (True, False), (True, False)):
        prediction, final, spacing, steps, lower, euler = label
        if final == "sigma_min" and spacing in ("trailing", "karras", "exponential"):
            continue  # they end at sigma_min by themselves: the last step has no length
        scheduler = MULTI(
            beta_schedule="scaled_linear", algorithm_type=algorithm, solver_order=order,
            solver_type=solver_type, prediction_type=prediction, final_sigmas_type=final,
            lower_order_final=lower, euler_at_final=euler, **EVERY[spacing],
        )  # fmt: skip
        options = eta | {
            "order": order, "solver_type": solver_type,
            "lower_order_final": lower, "euler_at_final": euler,
        }  # fmt: skip
        compare(scheduler, steps, solver, options, prediction, label, monkeypatch)


SINGLESTEP = [
    (algorithm, order, solver_type)
    for algorithm in ("dpmsolver++", "dpmsolver", "sde-dpmsolver++")
    for order in (1, 2, 3)
    for solver_type in ("midpoint", "heun")
    if (order, solver_type, algorithm) != (3, "heun", "sde-dpmsolver++")  # see test_departures
]


@pytest.mark.parametrize(("algorithm", "order", "solver_type"), SINGLESTEP)
def test_singlestep(algorithm, order, solver_type, monkeypatch):
    finals = ("zero", "sigma_min") if algorithm.endswith("++") else ("sigma_min",)
    solver, eta = name_of(algorithm, "singlestep")
    predictions = ("epsilon", "sample", "v_prediction")
    for label in product(predictions, finals, PLAIN, STEPS, (True, False)):
        prediction, final, spacing, steps, lower = label
        if final == "sigma_min" and spacing != "linspace":
            continue  # as above
        if not lower and (steps % order or final == "zero"):
            continue  # diffusers turns it to True then
        scheduler = SINGLE(
            beta_schedule="scaled_linear", algorithm_type=algorithm, solver_order=order,
            solver_type=solver_type, prediction_type=prediction, final_sigmas_type=final,
            lower_order_final=lower, **PLAIN[spacing],
        )  # fmt: skip
        options = eta | {
            "order": order, "solver_type": solver_type, "lower_order_final": lower,
        }  # fmt: skip
        compare(scheduler, steps, solver, options, prediction, label, monkeypatch)


@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
@pytest.mark.parametrize("scheduler", [MULTI, SINGLE], ids=["multistep", "singlestep"])
def test_flow(scheduler, algorithm, order, solver_type, monkeypatch):
    """Flow-DPM-Solver of Sana: its grid begins short of t = 1."""
    single = scheduler is SINGLE
    if algorithm.startswith("sde") and order == 3 and not (single and solver_type == "midpoint"):
        return  # see test_departures
    solver, eta = name_of(algorithm, "singlestep" if single else "multistep")
    for label in product((1.0, 3.0), STEPS):
        shift, steps = label
        made = scheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift,
            algorithm_type=algorithm, solver_order=order, solver_type=solver_type,
            lower_order_final=True,
        )  # fmt: skip
        options = eta | {"order": order, "solver_type": solver_type}
        compare(made, steps, solver, options, "flow", label, monkeypatch)


# --- where diffusers departs from its source: the table follows the source ------------------

SIGN = (
    "the curvature's weight is (1 - e^{-2h} - 2h)/(2h)^2 - 1/2, which goes to -1 with h, for "
    "+ 1/2, which goes to 0 as h/3 (k-diffusion's sample_dpmpp_3m_sde has it)"
)
DEPARTURES = {
    "multistep": (MULTI, "midpoint", lambda *a: multistep(*a, lower_order_final=False)),
    "singlestep": (SINGLE, "heun", lambda *a: singlestep(*a, lower_order_final=False)),
}


@pytest.mark.parametrize("case", DEPARTURES)
def test_departures(case, monkeypatch):
    """Third order of "sde-dpmsolver++"."""
    scheduler, solver_type, oracle = DEPARTURES[case]
    made = scheduler(
        beta_schedule="scaled_linear", algorithm_type="sde-dpmsolver++", solver_order=3,
        solver_type=solver_type, final_sigmas_type="sigma_min", lower_order_final=False,
    )  # fmt: skip
    options = {"eta": 1.0, "order": 3, "solver_type": solver_type, "lower_order_final": False}
    peer = Peer(made, 12, monkeypatch)
    grid, schedule = grid_of(made), schedule_of(made)
    table = solvers.build_on(f"dpmpp_{case}", schedule, grid, **options)
    x, outputs = start(schedule).astype(np.float32).astype(float), outputs_of(table)
    ours, budget = run_with_budget(table, x, outputs)
    ours[-1] = ours[-1] / grid.alphas[-1]
    theirs = peer.states(x, outputs, grid.alphas, levels=False)
    assert_within(theirs[:2], ours[:2], budget[:2], "the rows before are the same")
    assert np.abs(theirs[2] - ours[2]).max() > 2 * budget[2], f"mended upstream? {SIGN}"
    p = problem_of(schedule, grid, "epsilon")
    feed = iter(outputs)
    p.network, p.noise = lambda *_: next(feed), fixed_draw
    want = oracle(p, x, 3, solver_type, "sde-dpmsolver++")
    assert_same(ours, [s / a for s, a in zip(want, grid.alphas[1:], strict=True)], case)
    # and the oracle with their sign is theirs: m0 - 2 m1 + m2 is what the curvature weighs
    i = 2
    lam = np.log(grid.alphas / grid.sigmas)
    h = lam[i + 1] - (lam[0] if case == "singlestep" else lam[i])
    x0 = [
        (s - grid.sigmas[k] * m) / grid.alphas[k]
        for k, (s, m) in enumerate(zip([x, *want], outputs, strict=False))
    ][:3]
    if case == "singlestep":
        r1, r0 = (lam[1] - lam[0]) / h, (lam[2] - lam[0]) / h
        bend = 2 * ((x0[2] - x0[0]) / r0 - (x0[1] - x0[0]) / r1) / (r0 - r1)
    else:
        r0, r1 = (lam[2] - lam[1]) / h, (lam[1] - lam[0]) / h
        bend = ((x0[2] - x0[1]) / r0 - (x0[1] - x0[0]) / r1) / (r0 + r1)
    assert_within([theirs[2]], [ours[2] - bend], [budget[2]], SIGN)


def test_third_order_sde_of_the_noise_form(monkeypatch):
    """diffusers takes solver_order=3 with "sde-dpmsolver" and fails at the third step."""
    made = MULTI(algorithm_type="sde-dpmsolver", solver_order=3, final_sigmas_type="sigma_min")
    peer = Peer(made, 20, monkeypatch)
    x = np.ones((2, 3))
    with pytest.raises(UnboundLocalError, match="x_t"):
        peer.states(x, [x] * 20, [1.0] * 21, levels=False)
    assert peer.row == 2


KDPM = {
    "dpm_2": diffusers.KDPM2DiscreteScheduler,
    "dpm_2_ancestral": diffusers.KDPM2AncestralDiscreteScheduler,
}


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # torch, under NumPy 2
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("solver", KDPM)
def test_kdpm2(solver, prediction, monkeypatch):
    """Its prediction_type "sample" is not implemented there."""
    for spacing, config in EVERY.items():
        scheduler = KDPM[solver](
            beta_schedule="scaled_linear", prediction_type=prediction, **config
        )
        schedule = schedule_of(scheduler)
        for steps in STEPS:
            if steps == 1 and spacing != "trailing":
                continue  # diffusers takes the least noisy level there
            if steps < 10 and solver == "dpm_2_ancestral":
                continue  # no digits left, see below
            peer = Peer(scheduler, steps, monkeypatch)
            levels = scheduler.sigmas.double().numpy()
            levels = np.concatenate([levels[:1], levels[1:][np.diff(levels) != 0]])
            assert len(levels) == steps + 1
            times = np.append(np.linspace(1, 0.5, steps), 0.0)
            grid = Grid(times, 1 / np.hypot(1, levels), levels / np.hypot(1, levels))
            table = solvers.build_on(solver, schedule, grid, prediction=prediction)
            x, outputs = start(schedule).astype(np.float32).astype(float), outputs_of(table)
            ours, budget = run_with_budget(table, x, outputs)
            if solver == "dpm_2_ancestral":
                # sigma_down^2 is a difference of squares there: it is off by EPS*(sigma/sigma')^2
                # of itself, which multiplies the whole of sigma*noise
                far = np.repeat((levels[:-2] / levels[1:-1]) ** 2, 2)
                sizes = np.array([np.abs(s).max() for s in [x / grid.alphas[0], *ours]])
                more = np.cumsum(EPS / 2 * ROUNDINGS * far * (sizes[:-2] + 1))
                budget = np.array(budget) + np.append(more, more[-1])
            theirs = peer.states(x, outputs, [*table.alphas, 1.0], levels=True)
            assert_within(theirs, ours, budget, (spacing, steps))
