"""Import of k-diffusion-style samplers: a sampler's coefficient rows as rows of a table.

`fastdiff._probe` finds the rows and `fastdiff._realise` a form that the kernel can run; here they
are checked against the sampler's own runs and laid in the space of a schedule.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from fastdiff._probe import (
    WHERE,
    Array,
    Run,
    Sampler,
    compare,
    constant,
    on_data,
    probed,
    refusal,
    state_name,
)
from fastdiff._realise import SLOTS, Plan, Realisation, realise
from fastdiff.schedules import Grid, Schedule, edm
from fastdiff.solvers import check_prediction
from fastdiff.solvers._walk import STEP, Point, Walk, epsilon
from fastdiff.table import Row, StepTable

_SIZES = (1.0, -64.0, 2.0**-10)  # of the random data: usual, beyond any clamp, below it
_LINEAR = 1e-9  # of a state that superposition may miss; rounding is 1e-13 in a hundred steps


def _superposition(rows: Array, run: Run) -> tuple[int, float]:
    """First state that is not its row applied to the data of a run, and by how much of itself."""
    known = (run.start, *run.outputs, *run.draws)
    data = np.array([t.numpy().reshape(-1) for t in known])
    for i, (row, state) in enumerate(zip(rows, run.states, strict=True)):
        want = state.numpy().reshape(-1)
        terms = np.abs(row[:, None] * data).max()
        miss = float(np.abs(row @ data - want).max() / max(terms, np.abs(want).max()))
        if not miss <= _LINEAR:
            return i, miss
    return -1, 0.0


def _check_linear(sampler: Sampler, rows: Array, runs: dict[float, Run]) -> None:
    failed = {size: _superposition(rows, run) for size, run in runs.items()}
    failed = {size: found for size, found in failed.items() if found[0] >= 0}
    if not failed:
        return
    i, miss = next(iter(failed.values()))
    guess = "it fails at every size of the data, as with a norm or a mixture of elements"
    if len(failed) < len(runs):
        guess = "it fails on large data alone, as with a clamp or a threshold"
    calls = len(next(iter(runs.values())).inputs)
    reason = f"superposition fails in {state_name(i, calls)} by {miss:.1e} of it; {guess}"
    raise refusal(sampler, reason)


def _brownian(sampler: Sampler, rows: Array, run: Run) -> Array:
    """Rows over independent increments, where each draw was one of a Brownian path in sigma.

    A draw over (a, b) is the increment divided by sqrt(|a - b|), as k-diffusion's
    BrownianTreeNoiseSampler has it: a sum over the parts between neighbouring points, each with
    weight sqrt(its share of the span). Draws over spans that overlap share their parts.
    """
    if not run.spans:
        return rows
    if None in run.spans:
        reason = "brownian needs a sampler that calls noise_sampler(sigma, sigma_next)"
        raise refusal(sampler, reason)
    spans = np.array(run.spans, dtype=np.float64).reshape(-1, 2)
    ends = np.sort(np.unique(spans))[::-1]
    # a level that the sampler computed twice, once by exp(log(sigma)), is one level
    apart = np.concatenate([[True], ends[1:] < ends[:-1] * (1 - 1e-9)])
    ends = ends[apart]
    at = np.abs(spans[..., None] - ends).argmin(axis=-1)
    lengths = ends[:-1] - ends[1:]
    weights = np.zeros((len(spans), len(lengths)))
    for k, (a, b) in enumerate(at):
        part = slice(min(a, b), max(a, b))
        weights[k, part] = np.sign(b - a) * np.sqrt(lengths[part] / lengths[part].sum())
    first = rows.shape[1] - len(spans)
    return np.hstack([rows[:, :first], rows[:, first:] @ weights])


def _replayed(found: Realisation, rows: Array, sigmas: Array) -> Array:
    """The states that the realisation goes through, as rows."""
    unit = np.eye(rows.shape[1])
    calls = len(found.rows)
    history: list[Array] = []
    terms = {"x": unit[0]}
    states = []

    def make(coefficients: dict[str, float], draws: tuple[int, ...]) -> Array:
        terms.update({f"n{k}": unit[1 + calls + j] for k, j in enumerate(draws, 1)})
        total = np.zeros(rows.shape[1])
        for term, c in coefficients.items():
            total = total + c * terms[term]
        return total

    if found.lead is not None:
        terms["x"] = make(found.lead.x, found.lead.draws)
    states.append(terms["x"])
    for i, plan in enumerate(found.rows):
        d = terms["d"] = unit[1 + i]
        terms.update({f"h{age}": h for age, h in enumerate(reversed(history[-SLOTS:]))})
        x = make(plan.x, plan.draws)
        y = None if plan.y is None else make(plan.y, plan.draws)
        if plan.push:
            history.append(d if found.kind == "data" else (terms["x"] - d) / (sigmas[i] or 1.0))
        terms["x"] = x
        if y is not None:
            terms["y"] = y
        states.append(x)
    return np.array(states)


def _lay(
    found: Realisation, calls: Array, sigmas: Array, schedule: Schedule, prediction: str, name: str
) -> StepTable:
    """The rows in the schedule's space, where x is alpha times the sampler's."""
    walk = Walk(schedule, Grid(sigmas, np.ones_like(sigmas), sigmas), prediction)
    points = [walk.at_ratio(float(s)) for s in (*calls, sigmas[-1])]
    held = 1.0  # alpha in which the anchor was written

    def scaled(plan: dict[str, float], now: Point, then: float) -> dict[str, float]:
        own = {"x": 1 / now.alpha, "y": 1 / held}
        return {t: then * c * own.get(t, 1.0) for t, c in plan.items()}

    def named(plan: Plan) -> tuple[tuple[int, int], ...]:
        return tuple((STEP, number) for number in plan.draws)

    first = points[0]
    if found.lead is not None:
        first = walk.at_ratio(float(sigmas[0]))
        x = scaled(found.lead.x, first, points[0].alpha)
        draws = named(found.lead)
        walk.rows.append(
            Row(x=x, alpha=first.alpha, sigma=first.sigma, draws=draws, evaluates=False)
        )
    for plan, now, then in zip(found.rows, points[:-1], points[1:], strict=True):
        x = scaled(plan.x, now, then.alpha)
        y = None if plan.y is None else scaled(plan.y, now, now.alpha)
        push: bool | tuple[float, float] = plan.push
        if plan.push and found.kind == "epsilon":
            push = epsilon(now) if now.sigma else (1 / now.alpha, -1.0)
        walk.evaluate(now, x, y=y, draws=named(plan), push=push)
        if y is not None:
            held = now.alpha
    return StepTable(
        name,
        tuple(walk.rows),
        prediction=prediction,
        init_sigma=first.alpha * float(sigmas[0]),
        sigma_data=schedule.sigma_data,
    )


def import_sampler(
    sampler: Sampler,
    sigmas: Any,
    *,
    schedule: Schedule | None,
    prediction: str,
    name: str | None,
    brownian: bool,
    options: dict[str, Any],
) -> StepTable:
    """`StepTable.from_callable`."""
    if not callable(sampler):
        raise TypeError(f"{WHERE}: sampler must be callable, got {type(sampler).__name__}")
    levels = np.asarray(torch.as_tensor(sigmas).detach().cpu().double().numpy())
    usable = levels.ndim == 1 and len(levels) >= 2 and np.isfinite(levels).all()
    if not (usable and (levels >= 0).all() and levels[0] > 0):
        rule = "sigmas must be two or more finite levels, the first above 0"
        raise ValueError(f"{WHERE}: {rule}, got {levels}")
    schedule = edm() if schedule is None else schedule
    if not isinstance(schedule, Schedule):
        raise TypeError(f"{WHERE}: schedule must be a Schedule, got {type(schedule).__name__}")
    check_prediction(prediction, schedule, math.nan, 1.0, WHERE)

    runs = {size: on_data(sampler, levels, size, options) for size in _SIZES}
    first, again = runs[_SIZES[0]], on_data(sampler, levels, _SIZES[0], options)
    if not first.inputs:
        raise refusal(sampler, "it never calls the model")
    for other in (again, *runs.values()):
        compare(sampler, first, other)
    if not all(torch.equal(a, b) for a, b in zip(first.states, again.states, strict=True)):
        reason = "two runs on the same data differ: it draws noise neither by noise_sampler, "
        raise refusal(sampler, reason + "which it must name, nor by torch.randn_like")
    rows, run = probed(sampler, levels, first, options)
    constant(sampler, levels, options)
    _check_linear(sampler, rows, runs)
    if brownian:
        rows = _brownian(sampler, rows, run)
    calls = np.array(run.sigmas)
    try:
        found = realise(rows[:-1], rows[-1], calls, rows.shape[1] - 1 - len(calls))
    except ValueError as error:
        raise refusal(sampler, str(error)) from error
    scale = np.ones(rows.shape[1])
    scale[0] = levels[0]
    miss = np.abs((_replayed(found, rows, calls) - rows) * scale).max() / np.abs(rows * scale).max()
    if not miss <= _LINEAR:
        raise refusal(sampler, f"its rows give another result, off by {miss:.1e}")
    label = name or str(getattr(sampler, "__name__", type(sampler).__name__))
    return _lay(found, calls, levels, schedule, prediction, label)
