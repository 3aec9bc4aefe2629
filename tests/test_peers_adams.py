"""Linear multistep tables against k-diffusion and diffusers, both in float64.

The schedulers of diffusers are float32 by their tables alone: with these widened, `step` computes
in float64, and the same code is compared to 1e-12 instead of within a budget.
"""

from __future__ import annotations

import math
from itertools import pairwise

import diffusers
import numpy as np
import oracles_adams as oracles
import pytest
import torch
from peers import denoiser, grid_of, k_sampling, outputs_of, schedule_of
from rows import run
from solver_cases import SPACINGS, assert_same, problem_of, start

from fastdiff import schedules, solvers
from fastdiff.schedules import Grid
from fastdiff.solvers import _adams

STEPS = [(1, "first step is last"), (2, "start-up alone"), (3, "odd"), (10, "ten"), (50, "many")]
BETAS = [("linear", "DDPM"), ("scaled_linear", "Stable Diffusion"), ("squaredcos_cap_v2", "cosine")]


def no_noise(*_):
    raise AssertionError("a deterministic table drew noise")


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ["linear", "edm"])
def test_lms_of_k_diffusion(name, order):
    sampling = k_sampling()
    schedule = {"linear": schedules.linear(), "edm": schedules.edm()}[name]
    for prediction in ("epsilon", "sample"):
        for spacing in SPACINGS[schedule.kind]:
            for steps, _ in STEPS:
                grid = schedule.points(steps, spacing)
                p = problem_of(schedule, grid, prediction)
                table = solvers.build(
                    "lms", schedule, steps, prediction=prediction, spacing=spacing, order=order
                )
                x = start(schedule)
                got = run(table, x, p.network, no_noise)
                want = sampling.sample_lms(
                    denoiser(p, p.levels, grid.times), torch.from_numpy(x / grid.alphas[0]),
                    torch.tensor(p.levels), disable=True, order=order,
                )  # fmt: skip
                largest = np.abs(x).max() / grid.alphas[0]
                label = (name, order, prediction, spacing, steps)
                assert_same([got[-1]], [want.numpy()], label, largest)


# --- diffusers ------------------------------------------------------------------------------------


def widened(scheduler, steps):
    """The scheduler with its own tables in float64."""
    scheduler.set_timesteps(steps)
    for name in ("sigmas", "alphas_cumprod", "final_alpha_cumprod"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, getattr(scheduler, name).double())
    return scheduler


def drive(scheduler, x, outputs, **kwargs):
    sample, states = torch.from_numpy(x), []
    for t, m in zip(scheduler.timesteps, outputs, strict=True):
        scheduler.scale_model_input(sample, t)
        sample = scheduler.step(torch.from_numpy(m), t, sample, **kwargs).prev_sample
        states.append(sample.numpy())
    return states


def fed(table, x, outputs):
    feed = iter(outputs)
    return run(table, x, lambda *_: next(feed), no_noise)


LMS_SPACINGS = {
    "linspace": {"timestep_spacing": "linspace"},
    "leading": {"timestep_spacing": "leading"},
    "trailing": {"timestep_spacing": "trailing"},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
}


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", LMS_SPACINGS)
@pytest.mark.parametrize("betas", [b for b, _ in BETAS])
def test_lms_of_diffusers(betas, spacing, prediction):
    for steps, _ in STEPS:
        for order in (1, 2, 4) if steps < 50 else (4,):  # its quadrature takes milliseconds
            scheduler = diffusers.LMSDiscreteScheduler(
                beta_schedule=betas, prediction_type=prediction, **LMS_SPACINGS[spacing]
            )
            schedule, scheduler = schedule_of(scheduler), widened(scheduler, steps)
            grid = grid_of(scheduler)  # its fractional times and float32 levels
            table = solvers.build_on("lms", schedule, grid, prediction=prediction, order=order)
            x, outputs = start(schedule), outputs_of(table)
            z = x / grid.alphas[0]
            ours = [s / a for s, a in zip(fed(table, x, outputs), grid.alphas[1:], strict=True)]
            theirs = drive(scheduler, z, outputs, order=order)
            assert_same(ours, theirs, (betas, spacing, steps, order), np.abs(z).max())


DEIS_SPACINGS = LMS_SPACINGS | {"flow": {"use_flow_sigmas": True, "flow_shift": 3.0}}


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("spacing", DEIS_SPACINGS)
def test_deis_of_diffusers(spacing, order):
    """Below 15 steps it lowers the order of the last steps. It never goes to clean data."""
    flow = spacing == "flow"
    for prediction in ("flow_prediction",) if flow else ("epsilon", "v_prediction", "sample"):
        for steps, _ in STEPS:
            scheduler = diffusers.DEISMultistepScheduler(
                solver_order=order, prediction_type=prediction, **DEIS_SPACINGS[spacing]
            )
            schedule, scheduler = schedule_of(scheduler), widened(scheduler, steps)
            # with these spacings the last level comes twice: a step of length 0, see below
            repeated = spacing in ("karras", "exponential", "flow")
            if repeated and steps == 1:
                continue  # that step alone
            sigmas = scheduler.sigmas.numpy()[: steps + (not repeated)]
            if flow:
                schedule, grid = schedules.flow(), Grid(sigmas, 1 - sigmas, sigmas)
            else:  # its times are rounded and may coincide; the network is not asked
                alphas = 1 / np.hypot(1, sigmas)
                grid = Grid(np.arange(len(sigmas), 0.0, -1), alphas, sigmas * alphas)
            lower = steps < 15
            table = solvers.build_on(
                "deis", schedule, grid, variant="logrho", max_order=order,
                prediction="flow" if flow else prediction,
                lower_order_final=lower and not repeated,
            )  # fmt: skip
            x, outputs = start(schedule), outputs_of(table)
            ours = fed(table, x, outputs)
            theirs = drive(scheduler, x, [*outputs, outputs[0]] if repeated else outputs)
            if repeated:
                # one step too many: it changes nothing, and lowers the orders one step early
                assert_same(theirs[-1:], theirs[-2:-1], (spacing, steps))
                theirs = theirs[:-1]
                if lower:  # the last step that moves is of order 2 at most
                    upto = len(ours) - (order > 2)
                    ours, theirs = ours[:upto], theirs[:upto]
            size = max(float(np.abs(x).max()), antiderivative(grid, order))
            assert_same(ours, theirs, (spacing, prediction, steps), size)


def antiderivative(grid, order):
    """The largest number that diffusers subtracts to get a coefficient of DEIS: u (1 + |log u|)^n
    over the product of n differences of logs, times the next alpha; of slopes near 1. It is given
    as the state whose 1e-12 are 16 roundings of it."""
    with np.errstate(divide="ignore"):
        u = grid.sigmas / grid.alphas
    gaps = -np.diff(np.log(u))
    near = np.minimum(gaps[1:], gaps[:-1]) if len(gaps) > 1 else gaps
    powers = ((1 + np.abs(np.log(u[1 : len(near) + 1]))) / near) ** (order - 1)
    largest = (u[1 : len(near) + 1] * grid.alphas[1 : len(near) + 1] * powers).max()
    return float(largest * 16 * np.finfo(float).eps / 1e-12)


def pndm_pair(config, steps, solver, prediction="epsilon"):
    """PNDMScheduler and the table on its times."""
    scheduler = diffusers.PNDMScheduler(
        skip_prk_steps=solver == "plms", prediction_type=prediction, **config
    )
    schedule, scheduler = schedule_of(scheduler), widened(scheduler, steps)
    times = [*dict.fromkeys(scheduler.timesteps.tolist())]
    if solver == "pndm":
        times = times[:5:2] + times[6:]  # without the middles
    times.append(-1.0 if scheduler.config.set_alpha_to_one else 0.0)
    grid = Grid(np.array(times, float), schedule.alpha(times), schedule.sigma(times))
    return scheduler, schedule, solvers.build_on(solver, schedule, grid, prediction=prediction)


PNDM_CONFIGS = {
    "leading": ({"timestep_spacing": "leading", "set_alpha_to_one": True}, "default spacing"),
    "trailing": ({"timestep_spacing": "trailing", "set_alpha_to_one": True}, "divides T"),
    "stable-diffusion": (
        {"timestep_spacing": "leading", "steps_offset": 1, "beta_schedule": "scaled_linear"},
        "ends at time 0",
    ),
    "cosine": (
        {"beta_schedule": "squaredcos_cap_v2", "set_alpha_to_one": True}, "another curve"
    ),
}  # fmt: skip


@pytest.mark.parametrize("solver", ["plms", "pndm"])
@pytest.mark.parametrize("config", PNDM_CONFIGS)
def test_pndm_of_diffusers(config, solver):
    for steps in (1, 2, 10, 50) if solver == "plms" else (4, 10, 50):  # it needs four for pndm
        if steps == 1 and config == "stable-diffusion":
            continue  # it leaves out the second evaluation, though the step ends above sigma 0
        scheduler, schedule, table = pndm_pair(PNDM_CONFIGS[config][0], steps, solver)
        assert scheduler.timesteps.tolist() == table.times.tolist()
        x, outputs = start(schedule), outputs_of(table)
        size = float(np.abs(x).max()) / table.rows[0].alpha
        assert_same(
            fed(table, x, outputs), drive(scheduler, x, outputs), (config, solver, steps), size
        )


def ipndm_pair(steps):
    """IPNDMScheduler with its betas (sigma) and alphas in float64, and the table."""
    scheduler = diffusers.IPNDMScheduler()
    scheduler.set_timesteps(steps)
    sigmas = np.sin(np.linspace(1, 0, steps + 1) * math.pi / 2) ** 2
    assert np.abs(scheduler.betas.numpy() - sigmas).max() < 1e-6
    scheduler.betas = torch.from_numpy(sigmas)
    scheduler.alphas = (1 - scheduler.betas**2) ** 0.5
    grid = Grid(np.arange(steps, -1.0, -1), scheduler.alphas.numpy(), sigmas)
    table = solvers.build_on(
        "ipndm", schedules.linear(), grid, prediction="v_prediction", denoise_last=False
    )
    return scheduler, table


@pytest.mark.parametrize("steps", [s for s, _ in STEPS])
def test_ipndm_of_diffusers(steps):
    scheduler, table = ipndm_pair(steps)
    x, outputs = start(schedules.linear()), outputs_of(table)
    outputs[0] = np.zeros_like(outputs[0])  # v it takes for 0 where alpha is 0, see below
    assert_same(fed(table, x, outputs), drive(scheduler, x, outputs), steps, np.abs(x).max())


# --- where they depart from their source: the table follows the source ----------------------------


def test_ipndm_ignores_its_first_output():
    """From alpha 0 it takes x0 = 0/1e-8 instead of -v."""
    scheduler, table = ipndm_pair(4)
    x, outputs = start(schedules.linear()), outputs_of(table)
    ours, theirs = fed(table, x, outputs), drive(scheduler, x, outputs)
    then = table.rows[1]
    assert_same([theirs[0]], [then.sigma * x], "no trace of the output")
    assert_same([ours[0]], [then.sigma * x - then.alpha * outputs[0]], "DDIM, equation 12")


PNDM_DEPARTURES = {
    "v": (
        "leading",
        10,
        "v_prediction",
        "mixes v of different times, not the noise they stand for",
    ),
    "linspace": ("linspace", 10, "epsilon", "steps back by T // steps, the times are 111 apart"),
    "trailing": ("trailing", 7, "epsilon", "steps back by 142 though the times are 143 apart"),
}


@pytest.mark.parametrize("solver", ["plms", "pndm"])
@pytest.mark.parametrize("case", PNDM_DEPARTURES)
def test_pndm_departs(case, solver):
    spacing, steps, prediction, reason = PNDM_DEPARTURES[case]
    config = {"timestep_spacing": spacing, "set_alpha_to_one": True}
    scheduler, schedule, _ = pndm_pair(config, steps, solver, prediction)
    table = solvers.build(solver, schedule, steps, prediction=prediction, spacing=spacing)
    x, outputs = start(schedule), outputs_of(table)
    ours, theirs = fed(table, x, outputs), drive(scheduler, x, outputs)
    assert np.abs(ours[-1] - theirs[-1]).max() > 1e-4, f"mended upstream? {reason}"
    assert_same(ours, from_source(solver, schedule, steps, spacing, prediction, x, outputs), case)


def test_pndm_rounds_the_middle_of_a_step_down():
    """40 steps are 25 apart, and the paper's middle is (t + t')/2 = t - 12.5; diffusers steps to
    t - 12 and tells the network t - 13."""
    config = {"timestep_spacing": "leading", "set_alpha_to_one": True}
    scheduler, schedule, _ = pndm_pair(config, 40, "pndm")
    table = solvers.build("pndm", schedule, 40, spacing="leading")
    assert scheduler.timesteps[:4].tolist() == [975, 962, 962, 950]
    assert table.times[:4].tolist() == [975, 962.5, 962.5, 950]
    x, outputs = start(schedule), outputs_of(table)
    ours, theirs = fed(table, x, outputs), drive(scheduler, x, outputs)
    assert np.abs(ours[1] - theirs[1]).max() > 1e-4
    want = from_source("pndm", schedule, 40, "leading", "epsilon", x, outputs)
    assert_same(ours, want, "the paper's middle", np.abs(x).max() / table.rows[0].alpha)


def from_source(solver, schedule, steps, spacing, prediction, x, outputs):
    p = problem_of(schedule, schedule.points(steps, spacing), prediction)
    feed = iter(outputs)
    p.network = lambda *_: next(feed)
    return oracles.plms(p, x, 4) if solver == "plms" else oracles.pndm(p, x)


def published_ipndm_v(then, nodes, mended=False):
    """The four weights in ipndm_v_sampler of diff-sampler and ComfyUI, or without their slips."""
    h = then - nodes[0]
    h1, h2, h3 = (a - b for a, b in pairwise(nodes))
    ratio = h * (h + h1) / (h1 * (h1 + h2))
    if mended:
        t1, sign, last = (1 - h / (3 * (h + h1))) * ratio / 2, -1, h2 / h3
    else:
        t1, sign, last = (1 - h / (3 * (h + h1)) * ratio) / 2, 1, h1 / h2
    t2 = (1 - h / (3 * (h + h1))) / 2
    t2 += sign * (1 - h / (2 * (h + h1))) * h / (6 * (h + h1 + h2))
    t2 *= ratio * (h + h1 + h2) / (h1 + h2 + h3)
    q = h1 * (h1 + h2) / (h2 * (h2 + h3))
    c1 = (2 + h / h1) / 2 + t1 + t2
    c2 = -(h / h1) / 2 - (1 + h1 / h2) * t1 - (1 + h1 / h2 + q) * t2
    c3 = t1 * h1 / h2 + (h1 / h2 + q * (1 + h2 / h3)) * t2
    return np.array([h * c for c in (c1, c2, c3, -t2 * q * last)])


@pytest.mark.parametrize(
    "nodes", [(5.0, 6.0, 7.0, 8.0), (5.0, 6.5, 8.0, 9.0), (5.0, 6.0, 9.0, 9.5)]
)
def test_published_ipndm_v_has_slips(nodes):
    want = oracles.lms_coefficients(4.0, nodes)
    assert abs(sum(want) + 1) < 1e-14  # the weights of a constant slope, over a step of -1
    assert np.abs(_adams.rho_weights(4.0, nodes) - np.array(want[1:])).max() < 1e-14
    assert np.abs(published_ipndm_v(4.0, nodes, mended=True) - want).max() < 1e-13
    assert np.abs(published_ipndm_v(4.0, nodes) - want).max() > 0.05  # even for equal steps


def test_tab_is_the_limit_of_the_published_sum():
    """get_deis_coeff_list adds N = 10,000 values of equal weight length / N, both ends whole: that
    is (1 - 1/N) of the trapezoid rule, plus the mean of the ends times length / N."""
    beta_d, beta_min = oracles.vp_constants()
    nodes, then = (10.0, 20.0, 35.0), 4.0

    def time(level):
        return (math.sqrt(beta_min**2 + 2 * beta_d * math.log1p(level**2)) - beta_min) / beta_d

    ts = np.array([time(u) for u in nodes])
    length = time(then) - ts[0]
    exact = np.array(_adams.vp_weights(then, nodes))
    for n in (10_000, 20_000):
        tau = np.linspace(ts[0], time(then), n)
        alpha = np.exp(-0.5 * tau**2 * beta_d - tau * beta_min)
        integrand = 0.5 * (tau * beta_d + beta_min) / np.sqrt(alpha * (1 - alpha))
        values = np.array([
            integrand * np.prod([(tau - b) / (a - b) for b in ts if b != a], axis=0)
            for a in ts[1:]
        ])  # fmt: skip
        published = values.sum(1) * length / n
        ends = values[:, [0, -1]].mean(1) * length
        rule = (values.sum(1) * length - ends) / (n - 1) - exact  # falls as 1 / N^2
        # a value is ten operations, on an exponential of up to 7; sums of numpy go in pairs
        rounding = 64 * np.finfo(float).eps * np.abs(values).sum(1) * abs(length) / n
        assert np.all(np.abs(published - exact - (ends - exact) / n) <= np.abs(rule) + rounding)
        assert np.all(np.abs(rule) + rounding < np.abs(ends - exact) / n / 1000)  # so it is seen
