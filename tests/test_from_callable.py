"""Tables imported from samplers: those of k-diffusion, and toys that need or break a rule."""

from __future__ import annotations

import functools
import inspect
import itertools
import math

import numpy as np
import pytest
import torch
from budget import assert_within_budget
from peers import k_sampling
from rows import run
from solver_cases import SHAPE, assert_same, draws, problem_of

import fastdiff
from fastdiff import StepTable, schedules, solvers
from fastdiff.reference.gmm import GaussianMixture
from fastdiff.schedules import Grid

CHURN = {"s_churn": 3.0, "s_noise": 1.003}
WINDOW = {"s_churn": 3.0, "s_tmin": 0.3, "s_tmax": 5.0}
ANCESTRAL = {"eta": 0.6, "s_noise": 1.01}
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

    known = dict(zip(np.round(levels, 9), p.times, strict=True))

    def denoise(z, sigma):
        level = float(sigma.reshape(-1)[0])
        return torch.from_numpy(p.denoised(z.numpy(), level, known.get(np.round(level, 9))))

    if "noise_sampler" in inspect.signature(sampler).parameters:
        options = {**options, "noise_sampler": draw}
    if "disable" in inspect.signature(sampler).parameters:
        options = {**options, "disable": True}
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn_like", draw)
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            return sampler(denoise, torch.from_numpy(x), torch.from_numpy(levels), **options)
        finally:
            torch.set_default_dtype(before)


# sampler: options, why
SAMPLERS = {
    "euler": ({}, "no state but x"),
    "euler-churn": (CHURN, "a draw before the first call"),
    "euler-window": (WINDOW, "draws that are made and not used"),
    "euler_ancestral": (ANCESTRAL, "a draw a step"),
    "heun": ({}, "two stages"),
    "heun-churn": (CHURN, "two stages from a churned state"),
    "dpm_2": ({}, "a stage between levels"),
    "dpm_2-window": (WINDOW, "the same with churn"),
    "dpm_2_ancestral": (ANCESTRAL, "noise after the second stage"),
    "lms": ({}, "three slopes, whose states are gone"),
    "lms-2": ({"order": 2}, "one slope"),
    "lms-5": ({"order": 5}, "as many slopes as a table has"),
    "lms-6": ({"order": 6}, "one slope more: the anchor holds it"),
    "dpm_fast": ({}, "three stages, then two, then one"),
    "dpm_fast-eta": ({"eta": 0.5}, "noise too"),
    "dpm_fast-9": ({"calls": 9}, "another pattern of stages"),
    "dpmpp_2s_ancestral": (ANCESTRAL, "two stages of data"),
    "dpmpp_sde": ({}, "noise in the stage and in the step: an anchor"),
    "dpmpp_sde-options": ({**ANCESTRAL, "r": 0.3}, "another stage"),
    "dpmpp_2m": ({}, "one x0 of before"),
    "dpmpp_2m_sde": ({}, "with noise"),
    "dpmpp_2m_sde-heun": ({**ANCESTRAL, "solver_type": "heun"}, "options"),
    "dpmpp_3m_sde": (ANCESTRAL, "two x0 of before"),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("case", SAMPLERS)
def test_imported_table_is_the_sampler(case, name, monkeypatch):
    solver, options = case.split("-")[0], SAMPLERS[case][0]
    sampler, schedule = sampler_of(solver), SCHEDULES[name]
    last = {"edm": "edm", "linear": "v_prediction", "flow": "flow"}[name]
    for prediction, steps, final in (
        ("sample", 2, "zero"), (last, 9, "sigma_min"), (last, 20, "zero"),
    ):  # fmt: skip
        grid, levels = levels_of(name, steps, final)
        if solver == "dpm_fast":  # ends at the last level above 0, which is the end of its grid
            grid = Grid(*(v[:-1] if final == "zero" else v
                          for v in (grid.times, grid.alphas, grid.sigmas)))  # fmt: skip
            levels = np.divide(grid.sigmas, grid.alphas)
        p = problem_of(schedule, grid, prediction)
        table = StepTable.from_callable(
            sampler, levels, schedule=schedule, prediction=prediction, **options
        )
        noise = np.random.default_rng(7).normal(size=SHAPE)
        states = run(table, table.init_sigma * noise, p.network, draws)
        want = by_sampler(
            sampler, p, levels, levels[0] * noise, lambda k: draws(1, k), options, monkeypatch
        ).numpy()
        sizes = (np.abs(g).max() / a for g, a in zip(states[:-1], table.alphas[1:], strict=True))
        largest = max([np.abs(levels[0] * noise).max(), *sizes])
        got = states[-1] / grid.alphas[-1]
        # what a coefficient of 1e4 loses of the state it multiplies (Heun in two steps)
        condition = max(1.0, *(abs(c) for row in table.rows for c in row.x.values()))
        assert_same([got], [want], (case, name, steps), largest * condition)


OWN = {
    "euler": ({}, "default"),
    "euler_ancestral": ({"eta": 0.7, "s_noise": 1.01}, "options"),
    "heun": ({}, "default"),
    "dpmpp_2m": ({}, "default"),
    "dpmpp_2m_sde": ({}, "default"),
    "dpmpp_2m_sde-heun": ({"solver_type": "heun", "eta": 0.4}, "options"),
}


@pytest.mark.parametrize("case", OWN)
@pytest.mark.parametrize("name", ["edm", "linear"])  # flows: Heun's line is another one there
@pytest.mark.parametrize("steps", [4, 10, 30])  # few, usual, many
def test_imported_table_is_our_own(case, name, steps):
    """Number by number: the same rows, found from the sampler alone."""
    solver, options = case.split("-")[0], OWN[case][0]
    grid, levels = levels_of(name, steps)
    for prediction in ("epsilon", "sample"):
        own = solvers.build_on(solver, SCHEDULES[name], grid, prediction=prediction, **options)
        table = StepTable.from_callable(
            sampler_of(solver), levels, schedule=SCHEDULES[name], prediction=prediction, **options
        )
        assert table.depth == own.depth and table.nfe == own.nfe == sum(
            row.evaluates for row in table.rows
        )
        assert np.array_equal(table.ints, own.ints)
        scale = np.maximum(np.abs(own.floats), 1.0)
        assert np.abs((table.floats - own.floats) / scale).max() < 1e-11
        assert np.abs(table.times - own.times).max() < 1e-9 * own.times.max()
        assert table.init_sigma == pytest.approx(float(grid.sigmas[0]), rel=1e-12)


@pytest.mark.parametrize("r", [0.5, 0.3])  # the middle of the step in log sigma; before it
def test_overlapping_draws_share_a_brownian_path(r, monkeypatch):
    """dpmpp_sde draws over (t, s) and then over (t, t'), which holds it."""
    sampler, schedule = functools.partial(sampler_of("dpmpp_sde"), r=r), SCHEDULES["edm"]
    grid, levels = levels_of("edm", 6)
    p = problem_of(schedule, grid, "sample")
    table = StepTable.from_callable(
        sampler, levels, schedule=schedule, prediction="sample", brownian=True, name="sde"
    )
    assert table.name == "sde"
    ends = [levels[0]]
    for now, then in itertools.pairwise(levels[:-1]):
        ends += [float(now ** (1 - r) * then**r), float(then)]
    pairs = enumerate(itertools.pairwise(ends))
    steps = [draws(1, j) * math.sqrt(a - b) for j, (a, b) in pairs]
    spans = [span for i in range(0, len(steps), 2) for span in ((i, i + 1), (i, i + 2))]

    def noise(k):
        a, b = spans[k]
        return sum(steps[a:b]) / math.sqrt(ends[a] - ends[b])

    start = np.random.default_rng(7).normal(size=SHAPE)
    got = run(table, table.init_sigma * start, p.network, draws)[-1]
    want = by_sampler(sampler, p, levels, levels[0] * start, noise, {}, monkeypatch).numpy()
    assert_same([got], [want], r, float(np.abs(levels[0] * start).max()))
    apart = StepTable.from_callable(sampler, levels, schedule=schedule, prediction="sample")
    assert np.abs(run(apart, table.init_sigma * start, p.network, draws)[-1] - got).max() > 0.01


@pytest.mark.parametrize("case", ["heun-churn", "lms", "lms-6", "dpmpp_sde", "dpmpp_3m_sde"])
@pytest.mark.parametrize(
    ("name", "prediction"), [("linear", "epsilon"), ("edm", "edm"), ("flow", "flow")]
)
@pytest.mark.parametrize("backend", ["reference", "auto"])  # the definition; what users run
def test_end_to_end(case, name, prediction, backend):
    """Through `Sampler`, its kernels and its noise, as near to float64 as the peer in float32."""
    solver, options = case.split("-")[0], SAMPLERS[case][0]
    sampler, schedule, seeds, shape = sampler_of(solver), SCHEDULES[name], [3, 9], (3, 4, 5)
    _, levels = levels_of(name, 8)
    table = StepTable.from_callable(
        sampler, levels, schedule=schedule, prediction=prediction, **options
    )
    rng = torch.Generator().manual_seed(0)
    mixture = GaussianMixture(
        torch.tensor([0.4, 0.6], dtype=torch.float64),
        torch.randn(2, 60, dtype=torch.float64, generator=rng),
        torch.tensor([0.3, 0.5], dtype=torch.float64),
    )
    network = mixture.network(schedule, prediction)
    with fastdiff.use_backend(backend):
        got = fastdiff.Sampler(network, table)(shape, seeds=seeds)

    def by_peer(dtype):
        def denoise(z, sigma):
            level = float(sigma.reshape(-1)[0])
            time = schedule.time(level)
            alpha = {"edm": 1.0, "flow": 1 / (1 + level), "discrete": 1 / math.hypot(1, level)}[
                schedule.kind
            ]
            std = alpha * level
            data, c_in = schedule.sigma_data, 1.0
            if prediction == "edm":
                time, c_in = math.log(level) / 4, 1 / math.hypot(level, data)
            x = alpha * z
            m = network(c_in * x, torch.full((2,), float(time), dtype=dtype))
            if prediction == "epsilon":
                return (x - std * m) / alpha
            if prediction == "flow":
                return x - std * m
            return (data * c_in) ** 2 * x + level * data * c_in * m

        numbers = iter(range(10**6))

        def draw(*_, **__):
            return fastdiff.randn(seeds, shape, step=next(numbers), stream=1).to(dtype)

        more = {"noise_sampler": draw}
        named = inspect.signature(sampler).parameters
        more = {k: v for k, v in more.items() if k in named}
        start = fastdiff.randn(seeds, shape).to(dtype) * levels[0]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "randn_like", draw)
            sigmas = torch.from_numpy(levels).to(dtype)
            return sampler(denoise, start, sigmas, disable=True, **more, **options)

    # a step's coefficients are each rounded once, and so is each of its sums: eight at most
    assert_within_budget(got, by_peer(torch.float32), by_peer(torch.float64), 8.0 * len(table))


# --- toys -----------------------------------------------------------------------------------

LEVELS = [10.0, 4.0, 1.5, 0.6, 0.2, 0.0]


def toy(change=lambda x, d, i: (x, d)):
    """Euler's method with a hook."""

    def sampler(model, x, sigmas):
        for i in range(len(sigmas) - 1):
            d = model(x, sigmas[i].expand(len(x)))
            x, d = change(x, d, i)
            x = x + (x - d) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
        return x

    return sampler


def in_place(model, x, sigmas):
    """Euler, writing to all it gets."""
    for i in range(len(sigmas) - 1):
        d = model(x, sigmas[i].expand(len(x)))
        x.sub_(d).mul_(sigmas[i + 1] / sigmas[i])
        x.add_(d)
        d.zero_()
    sigmas.zero_()
    return x


def test_a_sampler_may_write_to_what_it_gets():
    table = StepTable.from_callable(in_place, LEVELS)
    assert np.allclose(table.floats, StepTable.from_callable(toy(), LEVELS).floats, atol=1e-14)


def runge_kutta(model, x, sigmas, extra_args=None):
    """The classical method of fourth order: three stages' slopes, and x itself."""
    for a, b in itertools.pairwise(sigmas):
        h, mid = b - a, (a + b) / 2
        slope = lambda x, s: (x - model(x, s.expand(len(x)), **extra_args)) / s  # noqa: E731
        k1 = slope(x, a)
        k2 = slope(x + h / 2 * k1, mid)
        k3 = slope(x + h / 2 * k2, mid)
        k4 = slope(x + h * k3, b)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


def test_four_stages(monkeypatch):
    levels = np.array(LEVELS[:-1])
    schedule = SCHEDULES["edm"]
    table = StepTable.from_callable(runge_kutta, levels, prediction="sample")
    assert (table.nfe, table.name) == (16, "runge_kutta")
    p = problem_of(schedule, Grid(levels, np.ones(5), levels), "sample")
    x = np.random.default_rng(7).normal(size=SHAPE)
    got = run(table, 10 * x, p.network, draws)[-1]
    options = {"extra_args": {}}
    want = by_sampler(runge_kutta, p, levels, 10 * x, None, options, monkeypatch).numpy()
    assert_same([got], [want], "rk4", float(np.abs(10 * x).max()))


def adaptive(model, x, sigmas):
    return k_sampling().sample_dpm_adaptive(model, x, 0.1, float(sigmas[0]), disable=True)


def endless(model, x, sigmas):
    while float(model(x, sigmas[:1]).abs().max()) > 0:
        pass
    return x


def data_times(model, x, sigmas):
    for s in sigmas[:-1]:
        x = model(x, (s + x.std()).expand(len(x)))
    return x


def own_noise(model, x, sigmas):
    for s in sigmas[:-1]:
        x = model(x, s.expand(len(x))) + torch.empty_like(x).normal_()
    return x


def averaging(model, x, sigmas):
    """Every prediction stays, none in a sum that could be carried on."""
    seen = []
    for i, s in enumerate(sigmas[:-1]):
        seen.append(model(x, s.expand(len(x))))
        x = sum(math.cos(3.7 * (i + 1) * (j + 1)) * d for j, d in enumerate(seen))
    return x


def three_draws(model, x, sigmas):
    for s in sigmas[:-1]:
        x = model(x, s.expand(len(x))) + sum(torch.randn(x.shape) for _ in range(3))
    return x


def some_noise(model, x, sigmas):
    for s in sigmas[:-1]:
        x = model(x, s.expand(len(x)))
        if x.mean() > 0:
            x = x + torch.randn_like(x)
    return x


def enlarging(model, x, sigmas):
    return model(torch.cat([x, x]), sigmas[:1])


def two_levels(model, x, sigmas):
    return model(x, sigmas[: len(x)] if len(x) > 1 else sigmas[:1])


REFUSED = {
    "clamp": (
        toy(lambda x, d, i: (x, d.clamp(-1, 1))),
        r"superposition fails in the input of model call 2 of 5 by .*large data alone, .* clamp",
    ),
    "late clamp of x": (
        toy(lambda x, d, i: (x.clamp(-3, 3) if i == 3 else x, d)),
        r"superposition fails in the input of model call 5 of 5 by .* clamp",
    ),
    "clamp at the end": (
        toy(lambda x, d, i: (x, d.clamp(-1, 1) if i == 4 else d)),
        r"superposition fails in the result by .* clamp",
    ),
    "norm": (
        toy(lambda x, d, i: (x, d / d.std() * x.std())),
        r"superposition fails in the input of model call 2 of 5 by .*every size .* norm",
    ),
    "mean": (
        toy(lambda x, d, i: (x, d - d.mean())),
        r"superposition fails in the input of model call 2 .* mixture of elements",
    ),
    "dynamic threshold": (
        toy(lambda x, d, i: (x, d.clamp(-1, 1) * max(1.0, float(d.abs().quantile(0.9))))),
        "superposition fails .* threshold",
    ),
    "adaptive": (adaptive, r"adaptive step count: \d+ and \d+ model calls on different data"),
    "endless": (endless, r"adaptive step count: \d+ model calls on 6 sigmas"),
    "times": (data_times, r"call 1 is at a time that depends on the data: sigma .* and "),
    "unseen noise": (own_noise, "two runs on the same data differ: it draws noise neither by"),
    "history": (averaging, r"more history than a table has: what follows evaluation \d+ of 16"),
    "lms of order 7": (
        lambda model, x, sigmas: k_sampling().sample_lms(model, x, sigmas, order=7, disable=True),
        "more history than a table has",
    ),
    "three draws": (three_draws, "more noise than a row has: 3 draws after evaluation 1 of 5"),
    "noise by data": (some_noise, "its noise depends on the data: .* draws on different data"),
    "constant": (toy(lambda x, d, i: (x + 0.25, d)), r"adds a constant, -?0\.\d*, in the input"),
    "shape": (enlarging, r"changes the shape of the state to \(4, 3, 4, 5\)"),
    "levels": (two_levels, r"its samples stand at different sigmas"),
    "no call": (lambda model, x, sigmas: x, "it never calls the model"),
    "no state": (lambda model, x, sigmas: None, "must return the state, of shape .*: NoneType"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_reason(case):
    sampler, words = REFUSED[case]
    long = case in ("history", "lms of order 7")  # a short one has no room for much history
    sigmas = [*np.geomspace(10, 0.1, 16), 0.0] if long else LEVELS
    randn_like, randn = torch.randn_like, torch.randn
    with pytest.raises(ValueError, match=words):
        StepTable.from_callable(sampler, sigmas)
    assert (torch.randn_like, torch.randn) == (randn_like, randn)
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((3, LEVELS), {}, TypeError, "sampler must be callable, got int"),
        ((toy(), [1.0]), {}, ValueError, "sigmas must be two or more finite levels"),
        ((toy(), [0.0, 1.0]), {}, ValueError, "the first above 0"),
        ((toy(), [math.inf, 1.0]), {}, ValueError, "finite"),
        ((toy(), LEVELS), {"schedule": "linear"}, TypeError, "schedule must be a Schedule"),
        ((toy(), LEVELS), {"prediction": "flow"}, ValueError, "prediction must be one of"),
        ((some_noise, LEVELS), {"unknown": 1}, TypeError, "unexpected keyword"),
    ],
)
def test_arguments_are_checked(arguments, options, error, words):
    with pytest.raises(error, match=words):
        StepTable.from_callable(*arguments, **options)


def test_brownian_needs_spans():
    def sampler(model, x, sigmas):
        for s in sigmas[:-1]:
            x = model(x, s.expand(len(x))) + torch.randn_like(x)
        return x

    with pytest.raises(ValueError, match=r"brownian needs a sampler that calls noise_sampler"):
        StepTable.from_callable(sampler, LEVELS, brownian=True)
    assert not StepTable.from_callable(toy(), LEVELS, brownian=True).stochastic
