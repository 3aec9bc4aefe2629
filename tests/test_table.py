"""StepTable: what it refuses, what it derives, and how rows are packed."""

from __future__ import annotations

import inspect
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastdiff
from fastdiff import schedules, solvers, table
from fastdiff.ops.reverse_step import reverse_step
from fastdiff.table import Row, StepTable

NAN, INF = math.nan, math.inf


def row(x=None, **more):
    return Row(x={"x": 1.0} if x is None else x, time=1.0, **more)


PUSH = row({"x": 0.5, "d": 0.5}, push=True)
BAD = {
    "no rows": ((), "rows must not be empty, got 0 rows"),
    "unknown term": ((row({"z": 1.0}),), "row 0 of t must use terms among x, y, m, .*, got 'z'"),
    "unknown term of y": ((row(y={"h9": 1.0}),), "row 0 of t must use terms .*, got 'h9'"),
    "history too early": ((row({"h0": 1.0}),), "row 0 .* read history that was pushed, got h0 aft"),
    "history too old": ((PUSH, row({"h1": 1.0})), "row 1 .* got h1 after 1"),
    "history out of slots": ((*[PUSH] * 5, row({"h4": 1.0})), "row 5 .* got 'h4'"),
    "anchor too early": ((row({"y": 1.0}),), "read an anchor that was written, got y before any"),
    "output without a call": (
        (Row(x={"m": 1.0}, evaluates=False),),
        "evaluate the model to read its output, got m",
    ),
    "prediction without a call": (
        (Row(x={"d": 1.0}, evaluates=False),),
        "evaluate the model to read its output, got d",
    ),
    "guidance without a call": (
        (Row(x={"u": 1.0}, evaluates=False),),
        "evaluate the model to read its output, got u",
    ),
    "push without a call": (
        (Row(x={"x": 1.0}, evaluates=False, push=True),),
        "evaluate the model to push a prediction, got push=True",
    ),
    "noise without a counter": (
        (row({"x": 1.0, "n1": 1.0}),),
        "name the counter of each draw, got n1 without one",
    ),
    "second noise without a counter": (
        (row({"n2": 1.0}, draws=((1, 0),)),),
        "name the counter of each draw, got n2 without one",
    ),
    "three draws": (
        (row(draws=((1, 0), (1, 1), (1, 2))),),
        "draw noise at most twice, got 3 draws",
    ),
    "empty anchor": ((row(y={"x": 0.0}),), "give y a non-zero coefficient or leave it None"),
    "no time": ((Row(x={"x": 1.0}),), "have a finite time to evaluate the model at, got nan"),
    "infinite time": ((Row(x={"x": 1.0}, time=INF),), "have a finite time .*, got inf"),
    "NaN": ((row(), row({"x": NAN})), "row 1 of t must be finite"),
    "beyond float32": ((row({"x": 1e300}),), "row 0 of t must be finite in float32"),
    "variance of no model": (
        (Row(x={"x": 1.0}, evaluates=False, log_variance=(1.0, 0.0)),),
        "row 0 of t must evaluate the model to read its variance",
    ),
    "counter": (
        (row({"n1": 1.0}, draws=((1, 2**31),)),),
        "row 0 of t must have streams and counters in ",
    ),
    "infinite conversion": ((row(convert=(INF, 1.0)),), "row 0 of t must be finite"),
    "infinite log variance": (
        (row({"n1": 1.0}, draws=((1, 0),), log_variance=(1.0, -INF)),),
        "row 0 of t must be finite",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_refused(case):
    rows, message = BAD[case]
    with pytest.raises(ValueError, match=f"^StepTable: .*{message}"):
        StepTable("t", rows)


@pytest.mark.parametrize("init_sigma", [NAN, INF, -1.0])
def test_refused_init_sigma(init_sigma):
    with pytest.raises(ValueError, match="init_sigma must be finite and not negative, got"):
        StepTable("t", (row(),), init_sigma=init_sigma)


def test_anchor_and_uncond_are_needed_where_named():
    rows = (row(y={"x": 1.0}), row({"x": 0.5, "y": 0.5}), row({"x": 1.0, "u": 0.1}))
    t = StepTable("t", rows)
    assert t.anchored
    assert [(n.anchor, n.writes_anchor, n.uncond) for n in t.needs] == [
        (False, True, False), (True, False, False), (False, False, True),
    ]  # fmt: skip


def test_history_ages_become_slots():
    """Three deep: the k-th push goes to slot k % 3, and an age names the push that long ago."""
    read = row({"x": 1.0, "h0": 0.1, "h1": 0.2, "h2": 0.3, "d": 0.4}, push=True)
    t = StepTable("t", (PUSH, PUSH, PUSH, read, read, read))
    assert t.depth == 3
    assert t.ints[:, table.PUSH].tolist() == [0, 1, 2, 0, 1, -1]  # nobody reads the last
    h = table.A + table.TERMS.index("h0")
    for i, pushed in ((3, 3), (4, 4), (5, 5)):
        want = np.zeros(4)
        for age, c in enumerate((0.1, 0.2, 0.3)):
            want[(pushed - 1 - age) % 3] = c
        assert t.floats[i, h : h + 4].tolist() == want.tolist()


def test_push_that_nobody_reads_is_left_out():
    t = StepTable("t", (PUSH, PUSH, row({"x": 1.0, "h0": 0.5}), PUSH))
    assert t.ints[:, table.PUSH].tolist() == [-1, 0, -1, -1]
    assert [n.history for n in t.needs] == [0, 1, 1, 0]
    multistep = solvers.build("dpmpp_2m", schedules.linear(), 5)
    assert multistep.ints[:, table.PUSH].tolist() == [0, 0, 0, -1, -1]  # the last is first order


def test_model_input_scale_is_of_the_next_evaluation():
    t = solvers.build("euler", schedules.edm(), 4, prediction="edm")
    sigmas = t.sigmas
    assert t.floats[:-1, table.C_IN].tolist() == [1 / math.hypot(s, 0.5) for s in sigmas[1:]]
    assert t.floats[-1, table.C_IN] == 1.0
    assert t.times.tolist() == [math.log(s) / 4 for s in sigmas]


def test_arrays_are_read_only():
    t = solvers.build("heun", schedules.linear(), 3)
    for array in (t.floats, t.ints):
        with pytest.raises(ValueError, match="read-only"):
            array[0, 0] = 0
    with pytest.raises(AttributeError):
        t.name = "other"


def defined(name, schedule, prediction):
    """Whether the solver is defined there; test_solvers.py says where it must be."""
    try:
        return bool(solvers.build(name, schedule, 6, prediction=prediction))
    except ValueError:
        return False


ALL = [
    (name, schedule, prediction)
    for name in solvers.SOLVERS
    for schedule, prediction in (
        (schedules.linear(), "epsilon"), (schedules.edm(), "edm"), (schedules.flow(), "flow"),
    )
    if defined(name, schedule, prediction)
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "schedule", "prediction"), ALL, ids=[f"{n}-{p}" for n, _, p in ALL]
)
def test_folding_is_exact_in_float64(name, schedule, prediction):
    """Without a clip, d is folded into x and m: the same map up to one rounding a term."""
    t = solvers.build(name, schedule, 6, prediction=prediction)
    folded = t.packed(dtype=torch.float64).floats.numpy()
    kept = t.packed(dtype=torch.float64, clip=True).floats.numpy()
    assert (kept == t.floats).all()
    for i, start in itertools.product(range(len(t)), (table.A, table.B)):
        at = {term: k for k, term in enumerate(table.TERMS)}
        got, want = folded[i, start:], kept[i, start:].copy()
        got, want = got[: len(at)], want[: len(at)]
        if t.ints[i, table.PUSH] >= 0:
            assert (folded[i] == kept[i]).all()
            continue
        d = want[at["d"]]
        assert got[at["d"]] == 0.0
        for term, weight in (("x", kept[i, table.P]), ("m", kept[i, table.Q])):
            exact = want[at[term]] + d * weight
            rounding = np.finfo(float).eps * (abs(want[at[term]]) + abs(d * weight))
            assert abs(got[at[term]] - exact) <= rounding
            got[at[term]] = want[at[term]]
        want[at["d"]] = 0.0
        assert (got == want).all()


@pytest.mark.parametrize("clip", [False, True])
def test_rounded_once(clip):
    t = solvers.build("dpmpp_2m", schedules.linear(), 20)
    exact = t.packed(clip=clip, dtype=torch.float64).floats
    once = t.packed(clip=clip).floats
    assert once.dtype == torch.float32 and torch.equal(once, exact.float())
    assert t.packed(clip=clip).floats is once  # made on first use, then kept


@pytest.mark.parametrize("clip", [None, 0.5])
def test_packed_ints_are_a_copy(clip):
    t = solvers.build("ddpm", schedules.linear(), 4)
    packed = t.packed(clip=clip is not None)
    assert packed.ints.dtype == torch.int32 and packed.ints.tolist() == t.ints.tolist()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 4)), min_size=1, max_size=12),
    st.randoms(use_true_random=False),
)
def test_slots_hold_what_ages_name(plan, random):
    """Any plan of pushes and reads, run by the op with slots, equals a list of predictions."""
    rows, pushed = [], 0
    for push, ages in plan:
        x = {"x": 0.5, "d": 0.25}
        for age in range(min(ages, pushed, 4)):
            x[f"h{age}"] = random.uniform(-0.3, 0.3)
        rows.append(row(x, push=push))
        pushed += push
    t = StepTable("t", tuple(rows))
    x = start = torch.tensor([[0.7, -0.2]], dtype=torch.float64)
    history = torch.full((max(t.depth, 1), 1, 2), math.nan, dtype=torch.float64)
    plain, kept = start, []
    for i, r in enumerate(rows):
        output = torch.cos(3.0 * x + i)
        with fastdiff.use_backend("reference"):
            x = reverse_step(x, output, t, i, history=history, clip=100.0)
        m = torch.cos(3.0 * plain + i)
        terms = {"x": plain, "d": m} | {f"h{k}": h for k, h in enumerate(reversed(kept))}
        plain = sum(c * terms[k] for k, c in r.x.items())
        if r.push:
            kept.append(m)
    # rounding: 12 rows of 6 terms, each off by half a unit of numbers below 2
    assert (x - plain).abs().max() <= 12 * 6 * 2 * np.finfo(float).eps


# --- build ----------------------------------------------------------------------------------

LINEAR, EDM, FLOW = schedules.linear(), schedules.edm(), schedules.flow()
ZERO = schedules.rescale_zero_terminal_snr(LINEAR)
REFUSED = {
    "solver": (("x", LINEAR, 3), {}, ValueError, "solver must be one of ddpm, .*, got 'x'"),
    "solver type": ((3, LINEAR, 3), {}, TypeError, "solver must be a string, got int"),
    "schedule": (("ddim", 3, 3), {}, TypeError, "schedule must be a Schedule, got int"),
    "steps 0": (("ddim", LINEAR, 0), {}, ValueError, "steps must be an integer of .* 1, got 0"),
    "steps 2.0": (("ddim", LINEAR, 2.0), {}, TypeError, "steps must be an integer .*, got 2.0"),
    "steps True": (("ddim", LINEAR, True), {}, TypeError, "steps must be an integer .*, got True"),
    "spacing": (("ddim", EDM, 3), {"spacing": "leading"}, ValueError, "spacing must be one of kar"),
    "final": (("ddim", EDM, 3), {"final": "one"}, ValueError, "final must be one of zero"),
    "prediction": (("ddim", EDM, 3), {"prediction": "q"}, ValueError, "prediction .*, got 'q'"),
    "option": (("ddim", EDM, 3), {"s_churn": 1}, TypeError, "options of ddim must .*'s_churn'"),
    "eta": (("ddim", EDM, 3), {"eta": 1.5}, ValueError, r"eta must lie in \[0, 1\], got 1.5"),
    "eta NaN": (("ddim", EDM, 3), {"eta": NAN}, ValueError, "eta must lie in .*, got nan"),
    "eta type": (("ddim", EDM, 3), {"eta": "1"}, TypeError, "eta must be a number, got str"),
    "eta inf": (
        ("euler_ancestral", EDM, 3), {"eta": INF}, ValueError, "eta must be finite and at least 0",
    ),
    "s_noise": (("heun", EDM, 3), {"s_noise": -1.0}, ValueError, "s_noise must .*, got -1.0"),
    "s_tmax": (("heun", EDM, 3), {"s_tmin": 2, "s_tmax": 1}, ValueError, "s_tmax .* 2, got 1"),
    "variance": (("ddpm", EDM, 3), {"variance": "x"}, ValueError, "variance must be one of fix"),
    "solver_type": (("dpmpp_2m", EDM, 3), {"solver_type": 1}, TypeError, "solver_type must be a"),
    "flag": (
        ("ddim", EDM, 3), {"use_clipped_model_output": 1}, TypeError, "must be True or False, got",
    ),
    "v on edm": (("ddim", EDM, 3), {"prediction": "v_prediction"}, ValueError, "on a edm schedule"),
    "v on flow": (
        ("ddim", FLOW, 3), {"prediction": "v_prediction"}, ValueError, "one of sample, flow",
    ),
    "flow on vp": (("ddim", LINEAR, 3), {"prediction": "flow"}, ValueError, "on a discrete sch"),
    "edm on vp": (("ddim", LINEAR, 3), {"prediction": "edm"}, ValueError, "on a discrete schedule"),
    "epsilon on zero snr": (
        ("ddim", ZERO, 3), {}, ValueError, "one of sample, v_prediction .* alpha is 0 at time 999",
    ),
    "epsilon on flow": (("ddim", FLOW, 3), {}, ValueError, "whose alpha is 0 at time 1, got 'epsi"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_build_refuses(case):
    args, more, error, message = REFUSED[case]
    with pytest.raises(error, match=f"^build: .*{message}"):
        solvers.build(*args, **more)


def test_epsilon_is_fine_where_the_grid_leaves_out_alpha_0():
    t = solvers.build("ddim", ZERO, 3, spacing="leading")
    assert t.times.tolist() == [666.0, 333.0, 0.0]


def test_build_on_refuses_a_grid_that_does_not_fall():
    good = LINEAR.points(3)
    for grid in (
        schedules.Grid(good.times, good.alphas[::-1], good.sigmas[::-1]),
        schedules.Grid(good.times[:1], good.alphas[:1], good.sigmas[:1]),
        schedules.Grid(good.times, good.alphas * NAN, good.sigmas),
    ):
        with pytest.raises(ValueError, match=r"^build: grid must have"):
            solvers.build_on("ddim", LINEAR, grid)
    assert solvers.build_on("ddim", LINEAR, good).rows == solvers.build("ddim", LINEAR, 3).rows


def test_grid_options_reach_the_grid():
    t = solvers.build("ddim", EDM, 5, prediction="edm", rho=3.0)
    assert t.sigmas.tolist() == EDM.points(5, rho=3.0).sigmas[:-1].tolist()
    t = solvers.build("ddim", LINEAR, 5, spacing="leading", steps_offset=1)
    assert t.times.tolist() == [801.0, 601.0, 401.0, 201.0, 1.0]


@pytest.mark.parametrize("name", solvers.SOLVERS)
def test_builders_say_what_they_are(name):
    """Paper, order, evaluations, noise and history, and the names that others use."""
    builder = solvers.SOLVERS[name]
    doc = inspect.getdoc(builder)
    for word in ("arXiv:", "Order", "evaluation", "Other names:"):
        assert word in doc or (word == "arXiv:" and "k-diffusion" in doc), (name, word)
    assert "dra" in doc or "noise" in doc
    body = inspect.getsource(builder).split('"""')[2]
    assert len(body.strip().splitlines()) <= 30
