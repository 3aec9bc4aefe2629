"""One row of a step table: what it says, its rules, and its place in the packed arrays."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

# The terms of a row in their order of summation; equal to FdTerm in csrc/step.h.
TERMS = ("x", "y", "m", "d", "h0", "h1", "h2", "h3", "n1", "n2", "u")
HISTORY_SLOTS = 4

# Positions in a packed row; equal to FdRowFloat and FdRowInt in csrc/step.h.
P, Q, A, B, C_IN, LV_SCALE, LV_SHIFT, PUSH_X, PUSH_D = 0, 1, 2, 13, 24, 25, 26, 27, 28
ROW_FLOATS = 32
FLAGS, PUSH, STREAM1, COUNTER1, STREAM2, COUNTER2, ROW_INTS = 0, 1, 2, 3, 4, 5, 8
EVALUATES, LEARNED_VARIANCE = 1, 2

_NO_DRAW = (0, 0)


@dataclass(frozen=True)
class Row:
    """One row as a solver writes it, in float64.

    Args:
        x: coefficients of x' by term name; ``h0`` is the newest pushed prediction, ``h3`` the
            oldest (ages, not memory slots).
        y: coefficients of y' by term name, or None where the anchor state stays as it is.
        time: model time of the evaluation, NaN for a row without one.
        alpha, sigma: of the state before the row (``x = alpha*x0 + sigma*noise``).
        convert: (p, q) of the converted prediction ``d = p*x + q*m``.
        push: what enters the history: False for nothing, True for d, or (e, f) for e*x + f*d: a
            noise or slope prediction, which depends on the state of its own row and so can not be
            put together from d and x later.
        draws: up to two (stream, counter) pairs, of the terms n1 and n2.
        log_variance: (scale, shift): n1 is multiplied by ``exp(scale*v + shift)`` with v the
            model's variance output (Nichol and Dhariwal 2021, eq. 15).
        evaluates: False for a row without a model call (re-noising, an analytic first step).
        c_in: the model input of this row is ``c_in * x``.
    """

    x: Mapping[str, float]
    y: Mapping[str, float] | None = None
    time: float = float("nan")
    alpha: float = 1.0
    sigma: float = 0.0
    convert: tuple[float, float] = (0.0, 1.0)
    push: bool | tuple[float, float] = False
    draws: tuple[tuple[int, int], ...] = ()
    log_variance: tuple[float, float] | None = None
    evaluates: bool = True
    c_in: float = 1.0


class Needs(NamedTuple):
    """What a row reads and writes besides x, so that a caller can check before it runs."""

    output: bool
    uncond: bool
    variance: bool
    anchor: bool
    writes_anchor: bool
    history: int
    seeds: bool


def is_number(value: object) -> bool:
    """A real number that float64 holds."""
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) < 1 << 1023
    return isinstance(value, (float, np.integer, np.floating))


def check_types(rows: Any) -> None:
    """Raises TypeError where something is not what a row is made of."""
    if not isinstance(rows, Sequence):
        raise TypeError(f"StepTable: rows must be a sequence, got {type(rows).__name__}")
    for i, row in enumerate(rows):
        if not isinstance(row, Row):
            raise TypeError(f"StepTable: row {i} must be a Row, got {type(row).__name__}")
        for name, rule, ok in (
            ("x", "map terms to numbers", _terms(row.x)),
            ("y", "map terms to numbers, or be None", row.y is None or _terms(row.y)),
            ("convert", "be two numbers", _numbers(row.convert, 2)),
            ("push", "be a bool or two numbers", type(row.push) is bool or _numbers(row.push, 2)),
            (
                "log_variance",
                "be None or two numbers",
                row.log_variance is None or _numbers(row.log_variance, 2),
            ),
            ("draws", "be pairs of integers", _pairs(row.draws)),
            ("c_in, time, alpha, sigma", "be numbers",
             _numbers((row.c_in, row.time, row.alpha, row.sigma), 4)),
        ):  # fmt: skip
            if not ok:
                raise TypeError(f"StepTable: {name} of row {i} must {rule}, got {row}")


def _terms(value: object) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(k, str) and is_number(c) for k, c in value.items()
    )


def _numbers(value: object, count: int) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == count and all(map(is_number, value))


def _pairs(value: object) -> bool:
    return isinstance(value, (tuple, list)) and all(
        _numbers(d, 2) and all(isinstance(part, (int, np.integer)) for part in d) for d in value
    )


def lay(
    name: str, rows: tuple[Row, ...], begin: int, end: int, floats: np.ndarray, ints: np.ndarray
) -> int:
    """Check and write rows [begin, end), one table; returns the history slots that it needs."""
    part = rows[begin:end]
    for i, row in enumerate(part, begin):
        unknown = sorted({*row.x, *(row.y or {})} - set(TERMS))
        if unknown:
            rule = f"use terms among {', '.join(TERMS)}, got {unknown[0]!r}"
            raise ValueError(f"StepTable: row {i} of {name} must {rule}")
    depth = max((_age(k) + 1 for row in part for k in _used(row) if k[0] == "h"), default=0)
    pushed, anchored = 0, False
    push_row: list[int] = []
    read: set[int] = set()
    for i, row in enumerate(part, begin):
        _check(name, i, row, pushed, anchored)
        _write(floats[i], ints[i], row, pushed, depth)
        read.update(pushed - 1 - _age(k) for k in _used(row) if k[0] == "h")
        if row.push:
            push_row.append(i)
            pushed += 1
        anchored |= row.y is not None
    # the kernel writes the input of the model call that follows
    floats[begin:end, C_IN] = [row.c_in for row in part[1:]] + [1.0]
    for k, i in enumerate(push_row):
        if k not in read:  # nobody reads it: spare the write
            ints[i, PUSH], floats[i, PUSH_X : PUSH_D + 1] = -1, 0.0
    return depth


def _age(term: str) -> int:
    return int(term[1:])


def _used(row: Row) -> list[str]:
    return [k for out in (row.x, row.y or {}) for k, c in out.items() if c != 0.0]


def _check(name: str, i: int, row: Row, pushed: int, anchored: bool) -> None:
    where = f"StepTable: row {i} of {name} must"
    used = _used(row)
    for term in used:
        if term[0] == "h" and _age(term) >= min(pushed, HISTORY_SLOTS):
            raise ValueError(f"{where} read history that was pushed, got {term} after {pushed}")
        if term == "y" and not anchored:
            raise ValueError(f"{where} read an anchor that was written, got y before any")
        if term in ("m", "d", "u") and not row.evaluates:
            raise ValueError(f"{where} evaluate the model to read its output, got {term}")
        if term in ("n1", "n2") and len(row.draws) < _age(term):
            raise ValueError(f"{where} name the counter of each draw, got {term} without one")
    if row.y is not None and not any(row.y.values()):
        raise ValueError(f"{where} give y a non-zero coefficient or leave it None, got {row.y}")
    if row.log_variance is not None and not row.evaluates:
        raise ValueError(f"{where} evaluate the model to read its variance, got evaluates=False")
    if not all(0 <= part < 1 << 31 for draw in row.draws for part in draw):
        raise ValueError(f"{where} have streams and counters in [0, 2**31), got {row.draws}")
    if len(row.draws) > 2:
        raise ValueError(f"{where} draw noise at most twice, got {len(row.draws)} draws")
    if row.push is not False and not row.evaluates:
        raise ValueError(f"{where} evaluate the model to push a prediction, got push=True")
    if row.evaluates and not math.isfinite(row.time):
        raise ValueError(f"{where} have a finite time to evaluate the model at, got {row.time}")


def _write(floats: np.ndarray, ints: np.ndarray, row: Row, pushed: int, depth: int) -> None:
    floats[P], floats[Q] = row.convert
    for start, out in ((A, row.x), (B, row.y or {})):
        for term, c in out.items():
            if term[0] == "h":
                if c != 0.0:
                    floats[start + TERMS.index("h0") + (pushed - 1 - _age(term)) % depth] += c
            else:
                floats[start + TERMS.index(term)] = c
    if row.push and depth:
        ints[PUSH] = pushed % depth
        floats[PUSH_X : PUSH_D + 1] = (0.0, 1.0) if row.push is True else row.push
    else:
        ints[PUSH] = -1
    draws = (*row.draws, _NO_DRAW, _NO_DRAW)
    ints[STREAM1], ints[COUNTER1] = draws[0]
    ints[STREAM2], ints[COUNTER2] = draws[1]
    ints[FLAGS] = EVALUATES if row.evaluates else 0
    if row.log_variance is not None:
        floats[LV_SCALE], floats[LV_SHIFT] = row.log_variance
        ints[FLAGS] |= LEARNED_VARIANCE


def needs_of(row: Row, depth: int, push: int) -> Needs:
    used = _used(row)
    return Needs(
        output=row.evaluates,
        uncond="u" in used,
        variance=row.log_variance is not None and "n1" in used,
        anchor="y" in used,
        writes_anchor=row.y is not None,
        history=depth if push >= 0 or any(t[0] == "h" for t in used) else 0,
        seeds="n1" in used or "n2" in used,
    )
