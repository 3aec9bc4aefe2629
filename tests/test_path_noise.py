"""`Sampler(noise="brownian")`: the law of its noise, and pictures that stay at other steps."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from solver_cases import home

from fastdiff import Sampler, schedules, solvers
from fastdiff.ops import Stream, brownian, randn, reverse_step
from fastdiff.path_noise import PATH, PathNoise
from fastdiff.table import Row, StepTable

SCHEDULES = {
    "discrete": schedules.scaled_linear(),
    "edm": schedules.edm(),
    "zero": schedules.rescale_zero_terminal_snr(schedules.linear()),
}
# one draw a row, without and with history; the others run in the test of all solvers below
STOCHASTIC = ("ddpm", "euler_ancestral", "dpmpp_2m_sde")


def _table(name: str, kind: str, steps: int, **options: Any) -> StepTable:
    prediction = {"discrete": "epsilon", "edm": "edm", "zero": "v_prediction"}[kind]
    return solvers.build(name, SCHEDULES[kind], steps, prediction=prediction, **options)


def _zero(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(x)


def _model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return x * 0.5


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("name", STOCHASTIC)
def test_loop_adds_the_increments_of_its_rows(name: str, kind: str) -> None:
    table = _table(name, kind, 7)
    noise = randn([4, 9], (3, 5))
    got = Sampler(_model, table, noise="brownian")(noise=noise, seeds=[4, 9])

    quiet = PathNoise(table).table
    assert table.stochastic and not quiet.stochastic
    times = [
        max(2 * math.log2(row.alpha / row.sigma), PATH["low"]) if row.alpha else PATH["low"]
        for row in table.rows
    ]
    history = torch.empty(max(table.depth, 1), 2, 3, 5)
    x, drawn = noise * table.init_sigma, 0
    for i, row in enumerate(table.rows):
        output = _model(row.c_in * x, x)
        x = reverse_step(x, output, quiet, i, history=history)
        if "n1" in row.x:
            drawn += 1
            w = brownian([4, 9], (3, 5), times[i], times[i + 1], **PATH)
            x = x + row.x["n1"] * w
    assert drawn == 6  # the last row enters clean data
    assert_same_bits(got, x)


def test_two_draws_a_row_take_spans_of_their_own() -> None:
    """The second stage reads the first one's noise again: one span each, n1 and n2 and y alike."""
    rows = (
        Row(x={"x": 1.0, "n1": 0.5}, y={"x": 1.0}, sigma=1.0, draws=((1, 0),), time=2.0),
        Row(
            x={"y": 1.0, "n1": 0.25, "n2": 2.0}, y={"y": 1.0, "n2": -1.0},
            sigma=0.5, draws=((1, 0), (1, 1)), time=1.0,
        ),
        Row(x={"x": 1.0, "y": 1.0}, sigma=0.25, time=0.5),
    )  # fmt: skip
    noise = randn([3], (6,))
    got = Sampler(_zero, StepTable("two", rows), noise="brownian")(noise=noise, seeds=[3])
    first, second = (brownian([3], (6,), a, b, **PATH) for a, b in ((0.0, 2.0), (2.0, 4.0)))
    x = (noise + 0.25 * first) + 2.0 * second
    assert_same_bits(got, x + (noise + -1.0 * second))


def test_steps_are_longer_than_leaves() -> None:
    """Every step of DDPM's own thousand, and of four times as many, has an increment."""
    schedule_of = {1000: schedules.linear(), 4000: schedules.linear(4000)}
    tables = [solvers.build("ddpm", schedule, n) for n, schedule in schedule_of.items()]
    tables += [_table("ddpm", "discrete", 1000), _table("ddpm", "zero", 1000)]
    tables += [_table("euler_ancestral", "edm", 1000)]
    for table in tables:
        noise = PathNoise(table)
        x = torch.zeros(1, 1)
        for i in range(len(table)):
            noise.add(i, x, None, torch.tensor([1]), None)
        assert bool(x.isfinite())


def test_churn_stays_as_it_is() -> None:
    table = solvers.build("euler", schedules.edm(), 6, prediction="edm", s_churn=4.0)
    assert table.stochastic and PathNoise(table).table.stochastic
    plain = Sampler(_zero, table)((4,), seeds=[1])
    assert_same_bits(Sampler(_zero, table, noise="brownian")((4,), seeds=[1]), plain)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_model_sees_the_noise(dtype: torch.dtype) -> None:
    """c_in of the next row times the state with its noise, in the model's dtype."""
    table = _table("euler_ancestral", "edm", 4)
    seen: list[torch.Tensor] = []

    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append(x.clone())
        return x * 0.5

    steps = Sampler(model, table, noise="brownian", dtype=dtype).iter((3, 5), seeds=[4])
    states = [s.x.clone() for s in steps]
    for row, x, given in zip(table.rows[1:], states, seen[1:], strict=False):
        assert_same_bits(given, (row.c_in * x).to(dtype))


def test_image_depends_on_its_seed_alone() -> None:
    sampler = Sampler(_model, _table("dpmpp_2m_sde", "discrete", 5), noise="brownian")
    many = sampler((3, 6), seeds=range(40, 80))
    assert_same_bits(sampler((3, 6), seeds=[57]), many[17:18])


# --- what it is for -----------------------------------------------------------------------------


def _mixture(schedule: schedules.Schedule) -> Any:
    """The noise prediction of data that is N(-1, 0.2^2) or N(1, 0.2^2) an element, exactly."""

    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        a = torch.from_numpy(schedule.alpha(t.double().numpy())).view(-1, 1)
        s = torch.from_numpy(schedule.sigma(t.double().numpy())).view(-1, 1)
        x = x.double()
        total = (0.2 * a) ** 2 + s**2
        side = torch.tanh(a * x / total)  # E[mode | x]
        x0 = side + 0.04 * a / total * (x - a * side)
        return ((x - a * x0) / s).float()

    return model


def _rms(x: torch.Tensor) -> float:
    return float(x.double().pow(2).mean().sqrt())


@pytest.mark.parametrize("name", STOCHASTIC)
def test_picture_stays_when_the_steps_change(name: str) -> None:
    """4,096 elements of two modes. With noise of its own for each step count the pictures of 10, 20
    and 40 steps have nothing but their start in common."""
    schedule = schedules.scaled_linear()
    size = 4096
    pictures: dict[str, list[torch.Tensor]] = {}
    for noise in ("counter", "brownian"):
        pictures[noise] = [
            Sampler(_mixture(schedule), solvers.build(name, schedule, steps), noise=noise)(
                (size,), seeds=[7]
            )
            for steps in (10, 20, 40, 80)
        ]
    apart = {noise: [_rms(a - b) for a, b in pairwise(found)] for noise, found in pictures.items()}
    # modes that flip count 2 each: a path that converges flips fewer with every doubling
    path, own = apart["brownian"], apart["counter"]
    assert all(p < 0.5 * o for p, o in zip(path, own, strict=True)), apart
    assert path[2] < 0.75 * path[0], apart
    # and the law is that of the solver: equal moments within five standard errors
    for found, other in zip(pictures["brownian"], pictures["counter"], strict=True):
        for power in (1, 2):
            a, b = found.double() ** power, other.double() ** power
            error = math.sqrt((float(a.var()) + float(b.var())) / size)
            assert abs(float(a.mean() - b.mean())) < 5 * error


# --- what it refuses ----------------------------------------------------------------------------


def test_errors() -> None:
    table = _table("ddpm", "discrete", 3)
    with pytest.raises(ValueError, match=r"noise must be 'counter' or 'brownian', got 'iid'"):
        Sampler(_zero, table, noise="iid")
    learned = _table("ddpm", "discrete", 3, variance="learned_range")
    message = "Sampler: noise must be 'counter' for a learned variance, got 'brownian' for ddpm"
    with pytest.raises(ValueError, match=message):
        Sampler(_zero, learned, noise="brownian")
    noisy = {"x": {"x": 1.0, "n1": 1.0}}
    back = StepTable("back", (
        Row(**noisy, sigma=1.0, draws=((1, 0),), time=3.0),
        Row(x={"x": 1.0}, sigma=0.5, time=2.0),
        Row(**noisy, sigma=1.0, draws=((1, 2),), time=3.0),
        Row(x={"x": 1.0}, sigma=0.5, time=2.0),
    ))  # fmt: skip
    message = re.escape("goes back in time or draws twice for one span, got 'brownian' for back")
    with pytest.raises(ValueError, match=message):
        Sampler(_zero, back, noise="brownian")


@pytest.mark.parametrize("name", solvers.SOLVERS)
def test_every_solver_with_noise_takes_it_from_the_path(name: str) -> None:
    """Two draws a row, earlier draws again and noise in the anchor included."""
    schedule, prediction = home(name)
    table = solvers.build(name, schedule, 6, prediction=prediction)
    given = {"label": torch.zeros(2)} if any(need.uncond for need in table.needs) else {}

    def model(x: torch.Tensor, t: torch.Tensor, label: torch.Tensor | None = None) -> torch.Tensor:
        return x * 0.5

    def run(seeds: list[int], noise: str) -> torch.Tensor:
        some = {k: v[: len(seeds)] for k, v in given.items()}
        start = randn([3] * len(seeds), (2, 5))
        sampler = Sampler(model, table, noise=noise)
        return sampler(noise=start, seeds=seeds, cond=some, uncond=some)

    both = run([1, 2], "brownian")
    assert bool(both.isfinite().all())
    assert_same_bits(run([2], "brownian")[0], both[1])
    assert torch.equal(both[0], both[1]) != table.stochastic
    # churn keeps its own stream
    steps = any(stream == Stream.STEP for row in table.rows for stream, _ in row.draws)
    assert torch.equal(both, run([1, 2], "counter")) != steps
