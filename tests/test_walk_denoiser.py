"""A table walked with a denoiser and noise of the caller's, against the library's own loop."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from comfy_cases import denoise

from fastdiff import Sampler, randn, schedules
from fastdiff.integrations._walk_denoiser import (
    BrownianPath,
    _hand_over,
    joined_noise,
    scaled_noise,
    walk,
)
from fastdiff.ops import as_seeds
from fastdiff.schedules import Grid
from fastdiff.solvers import build, build_on

SHAPE = (2, 3, 4, 4)
SEEDS = as_seeds([3, 1 << 63])
LEVELS = np.array([16.0, 6.0, 3.0, 1.6, 0.9, 0.4, 0.0])
TIMES = np.array([1.0, 0.94, 0.86, 0.75, 0.6, 0.38, 0.0])
CHURN = {"s_churn": 8.0}
# solver and options: why its noise is another case
STOCHASTIC = {
    "euler_ancestral": ({}, "one draw a row"),
    "ddim": ({"eta": 1.0}, "one draw a row"),
    "heun": (CHURN, "rows without a model call"),
    "restart": ({}, "rows without a model call, levels visited twice"),
    "dpmpp_sde": ({}, "two draws a row, one of them again"),
    "seeds_3": ({}, "stages"),
    "dpmpp_singlestep": ({"eta": 0.5, "order": 3}, "a draw taken back"),
    "sa_solver": ({}, "some steps without"),
    "lcm": ({}, "x has no coefficient"),
    "euler_ancestral_cfg_pp": ({}, "the unconditional output has the free term"),
    "dpmpp_2s_ancestral_cfg_pp": ({}, "the row with the draw has no use for it"),
}


def table_of(solver, space="ve", **options):
    if space == "flow":
        grid, schedule = Grid(TIMES, 1 - TIMES, TIMES), schedules.flow()
    else:
        grid, schedule = Grid(LEVELS, np.ones_like(LEVELS), LEVELS), schedules.edm()
    return build_on(solver, schedule, grid, prediction="sample", **options)


def start(space="ve", dtype=torch.float64):
    noise = torch.from_numpy(np.random.default_rng(2).normal(size=SHAPE)).to(dtype)
    return noise * (LEVELS[0] if space == "ve" else 1.0)


def both(x, sigma):
    return denoise(x, sigma, "positive"), denoise(x, sigma, "negative")


def one(x, sigma):
    return denoise(x, sigma, "positive")


def grid(space):
    return (LEVELS if space == "ve" else TIMES).tolist()


class Source:
    """The kernel's own draws, as tensors."""

    def __init__(self):
        self.asked = []

    def __call__(self, draw):
        self.asked.append(draw)
        return randn(SEEDS, SHAPE[1:], step=draw.counter, stream=draw.stream)


@pytest.mark.parametrize("space", ["ve", "flow"])
@pytest.mark.parametrize("solver", STOCHASTIC)
def test_noise_handed_in_is_noise_drawn(solver, space):
    """In float64, whose roundings are all that the order of the sum can change."""
    table = table_of(solver, space, **STOCHASTIC[solver][0])
    source = Source()
    drawn = walk(table, both, start(space), grid(space), noise=SEEDS)
    given = walk(table, both, start(space), grid(space), noise=source)
    assert float((drawn - given).abs().max()) <= 1e-12 * float(start(space).abs().max())
    numbers = [(draw.stream, draw.counter) for draw in source.asked]
    assert len(numbers) == len(set(numbers)) > 0


@pytest.mark.parametrize("solver", STOCHASTIC)
def test_what_enters_the_row_itself(solver):
    """One draw of a row always does, but beside the unconditional output."""
    table = table_of(solver, **STOCHASTIC[solver][0])
    handed = _hand_over(table)
    two = {"dpmpp_sde", "dpmpp_singlestep"}
    apart = sum(map(len, handed.rest.values()))
    if solver == "euler_ancestral_cfg_pp":
        assert not handed.first and apart
    else:
        assert handed.first and (apart > 0) == (solver in two)
    assert not handed.table.stochastic


@pytest.mark.parametrize("solver", ["euler", "dpmpp_2m", "seeds_2", "heun", "restart", "sa_solver"])
def test_the_loop_of_the_library(solver):
    """Seeds give the bits of `Sampler`, with and without a callback."""
    table = table_of(solver)
    noise = start(dtype=torch.float32) / LEVELS[0]  # exact: a power of two
    want = Sampler(lambda x, t: one(x, t), table)(noise=noise, seeds=SEEDS)
    x = noise * LEVELS[0]
    before = x.clone()
    assert torch.equal(walk(table, one, x, grid("ve"), noise=SEEDS), want)
    seen = []
    kept = walk(table, one, x, grid("ve"), noise=SEEDS, callback=seen.append)
    assert torch.equal(kept, want) and torch.equal(x, before)
    assert len({s["x"].data_ptr() for s in seen}) == len(seen)


def test_a_model_may_keep_what_it_sees():
    kept = []

    def denoiser(x, sigma):
        kept.append((x, x.clone()))
        return one(x, sigma)

    walk(table_of("dpmpp_2m"), denoiser, start(), grid("ve"))
    assert all(torch.equal(x, before) for x, before in kept)


def test_the_path_of_the_library():
    table = table_of("euler_ancestral")
    noise = start(dtype=torch.float32) / LEVELS[0]
    want = Sampler(lambda x, t: one(x, t), table, noise="brownian")(noise=noise, seeds=SEEDS)
    got = walk(table, one, noise * LEVELS[0], grid("ve"), noise=BrownianPath(SEEDS))
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("solver", "options", "hats"),
    [("euler", {}, False), ("heun", CHURN, True), ("seeds_3", {}, False), ("heunpp2", {}, False)],
)
def test_callback_once_a_step(solver, options, hats):
    """Stages and corrections, which may stand at the level of another step, are not told."""
    seen, table = [], table_of(solver, **options)
    walk(table, one, start(), grid("ve"), noise=SEEDS, callback=seen.append)
    assert [s["i"] for s in seen] == list(range(len(LEVELS) - 1))
    assert [float(s["sigma"]) for s in seen] == LEVELS[:-1].tolist()
    for s in seen:
        assert (s["sigma_hat"] > s["sigma"]) == hats
        assert torch.equal(s["denoised"], one(s["x"], s["sigma_hat"].repeat(2)))


def test_spans_of_draws():
    """From the start of the step, or where the draw before it in the step ended."""
    source = Source()
    walk(table_of("euler_ancestral"), one, start(), grid("ve"), noise=source)
    spans = [(d.sigma, d.sigma_next) for d in source.asked]
    assert spans == list(pairwise(LEVELS))[:-1]
    source = Source()
    walk(table_of("seeds_2"), one, start(), grid("ve"), noise=source)
    first, second = source.asked[:2]
    assert first.sigma == 16.0 and first.sigma_next == second.sigma
    assert second.sigma_next == 6.0 and 6.0 < second.sigma < 16.0
    # no noise in the first steps: the first draw begins with its own step
    source = Source()
    quiet = table_of("sa_solver", tau_start=3.0, tau_end=0.9)
    walk(quiet, one, start(), grid("ve"), noise=source)
    assert (source.asked[0].sigma, source.asked[0].sigma_next) == (3.0, 1.6)


def test_joined_and_scaled_noise():
    table = table_of("dpmpp_sde")
    joined = joined_noise(table)
    assert all(len(row.draws) <= 1 for row in joined.rows) and joined.nfe == table.nfe
    for ours, theirs in zip(joined.rows, table.rows, strict=True):
        variance = sum(theirs.x.get(k, 0.0) ** 2 for k in ("n1", "n2"))
        # a square root and a square
        assert abs(ours.x.get("n1", 0.0) ** 2 - variance) <= 4 * np.finfo(float).eps * variance
    assert joined_noise(table_of("seeds_2")).rows == table_of("seeds_2").rows
    twice = scaled_noise(table_of("lcm"), 2.0)
    assert [r.x.get("n1") for r in twice.rows[:-1]] == [2 * s for s in LEVELS[1:-1]]


FORMS = {
    "channels_last": (lambda x: x.contiguous(memory_format=torch.channels_last), "read as it is"),
    "video": (lambda x: x.unsqueeze(2), "5-D latents"),
    "packed": (lambda x: x.reshape(2, 1, -1), "audio and video in one"),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_latents(form):
    make, x = FORMS[form][0], start(dtype=torch.float32)
    pointwise = lambda z, sigma: torch.tanh(z / (1 + sigma[0]))  # noqa: E731
    table = table_of("dpmpp_2m")
    want = walk(table, pointwise, x, grid("ve"))
    got = walk(table, pointwise, make(x), grid("ve"))
    assert got.shape == make(x).shape and torch.equal(got.reshape(x.shape), want)


def test_half_precision_is_the_models_alone():
    """The state stays in float32; what the model sees and the result are rounded."""
    seen = []

    def model(x, sigma):
        seen.append((x.dtype, sigma.dtype))
        return one(x, sigma)

    x = start(dtype=torch.float32).half()
    got = walk(table_of("euler"), model, x, grid("ve"))
    assert got.dtype == torch.float16 and set(seen) == {(torch.float16, torch.float16)}


def test_errors():
    table, x = table_of("euler_ancestral"), start()
    with pytest.raises(ValueError, match="noise must be given for euler_ancestral, got None"):
        walk(table, one, x, grid("ve"))
    with pytest.raises(ValueError, match=r"noise must have the state's shape .*, got \(1,\)"):
        walk(table, one, x, grid("ve"), noise=lambda _: torch.zeros(1))
    with pytest.raises(ValueError, match="sigmas must be points of euler_ancestral, got 5"):
        walk(table, one, x, [16.0, 5.0, 0.0], noise=SEEDS)
    with pytest.raises(ValueError, match="table must predict 'sample', got 'epsilon'"):
        walk(build("euler", schedules.edm(), 3), one, x, [80.0, 0.0])
    learned = build_on(
        "ddpm", schedules.edm(), Grid(LEVELS, np.ones(7), LEVELS), prediction="sample",
        variance="learned_range",
    )  # fmt: skip
    with pytest.raises(ValueError, match="noise must be seeds for a learned variance"):
        walk(learned, one, x, grid("ve"), noise=Source())
