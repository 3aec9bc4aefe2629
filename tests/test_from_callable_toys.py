"""Samplers that need or break a rule of `StepTable.from_callable`."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from k_samplers import SCHEDULES, by_sampler
from peers import k_sampling
from rows import run
from solver_cases import SHAPE, assert_same, draws, problem_of

from fastdiff import StepTable
from fastdiff.schedules import Grid

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


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor, tuple])
def test_levels_are_float64(kind):
    """0.6 is another number in float32."""
    levels = torch.tensor(LEVELS, dtype=torch.float64) if kind is torch.tensor else kind(LEVELS)
    assert StepTable.from_callable(toy(), levels).sigmas.tolist() == LEVELS[:-1]


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
