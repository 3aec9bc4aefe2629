"""Step noise from a Brownian path: the same picture, up to the solver's error, at any step count.

A solver's draws are taken as increments of one path W a seed, whose time is the logarithm of the
signal-to-noise ratio (alpha/sigma)^2. Increments over spans that do not overlap are independent, so
each run has the law that the solver has with fresh draws; and a step of one run and the two steps
that halve it in another see the same noise. Which time joins pictures best depends on the data: for
an x0 that the noise does not move it is the ratio itself, for one that follows the noise it is
sigma^2. Of the times (sigma/alpha)^p the logarithm, between the two, was closest on a Gaussian and
on a mixture (k-diffusion's is p = 1, and nearly as close).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.ops.brownian import brownian
from fastdiff.ops.noise import Stream
from fastdiff.table import Row, StepTable

# One path for all schedules and step counts: 128 octaves of the signal-to-noise ratio, a cell each,
# in leaves of 1/512 octave (0.14 %; a step of DDPM's 1,000 is at least four times longer).
_LOW, _HIGH = -64.0, 64.0
PATH: dict[str, Any] = {"low": _LOW, "high": _HIGH, "depth": 16, "cells": 128}
_TERMS = ("n1", "n2")


class _Term(NamedTuple):
    """A coefficient of x' or y' and the increment that it multiplies."""

    to_y: bool
    coefficient: float
    span: tuple[float, float]


def _time(row: Row) -> float:
    """The time of the path at the state before a row."""
    if row.sigma <= 0:
        return _HIGH
    if row.alpha <= 0:
        return _LOW
    return min(max(2 * math.log2(row.alpha / row.sigma), _LOW), _HIGH)


def _spans(table: StepTable) -> dict[int, tuple[float, float]]:
    """The stretch of time of each step draw, by counter.

    A draw belongs to the row that names it first: it covers the time from the end of the draw
    before to the state after the row.
    """
    found: dict[int, tuple[float, float]] = {}
    now = _time(table.rows[0])
    ends = [_time(row) for row in table.rows[1:]] + [_HIGH]
    for i, (row, end) in enumerate(zip(table.rows, ends, strict=True)):
        for counter in _counters(row):
            if counter in found:
                continue
            if not now < end:
                raise ValueError(
                    "Sampler: noise must be 'counter' for a solver that goes back in time or draws "
                    f"twice for one span, got 'brownian' for {table.name}, row {i}"
                )
            found[counter] = (now, end)
            now = end
    return found


def _counters(row: Row) -> list[int]:
    """Counters of the step draws that the row uses."""
    used = [
        k
        for k, term in enumerate(_TERMS)
        if row.x.get(term, 0.0) != 0.0 or (row.y or {}).get(term, 0.0) != 0.0
    ]
    return [row.draws[k][1] for k in used if row.draws[k][0] == Stream.STEP]


def _terms(row: Row, spans: dict[int, tuple[float, float]]) -> list[_Term]:
    return [
        _Term(to_y, coefficients[term], spans[row.draws[k][1]])
        for to_y, coefficients in ((False, row.x), (True, row.y or {}))
        for k, term in enumerate(_TERMS)
        if coefficients.get(term, 0.0) != 0.0 and row.draws[k][0] == Stream.STEP
    ]


def _quiet(row: Row) -> Row:
    """The row without its step draws."""
    silent = {
        term for term, (stream, _) in zip(_TERMS, row.draws, strict=False) if stream == Stream.STEP
    }
    x = {k: c for k, c in row.x.items() if k not in silent}
    y = None if row.y is None else {k: c for k, c in row.y.items() if k not in silent}
    return dataclasses.replace(row, x=x, y=y)


class PathNoise:
    """The step draws of a table, taken from the Brownian path.

    Args:
        table: of a solver whose time goes one way; its churn, if any, stays as it is.

    Attributes:
        table: the same rows without their step draws, for `ops.reverse_step`.

    Raises:
        ValueError: the table goes back in time, its variance is learned (the noise would have to
            be scaled by element), or a row writes y by noise alone.
    """

    def __init__(self, table: StepTable) -> None:
        if any(row.log_variance is not None for row in table.rows):
            raise ValueError(
                f"Sampler: noise must be 'counter' for a learned variance, got 'brownian' for "
                f"{table.name}"
            )
        spans = _spans(table)
        self._terms = [_terms(row, spans) for row in table.rows]
        self.table = dataclasses.replace(table, rows=tuple(_quiet(row) for row in table.rows))

    def add(
        self, index: int, x: Tensor, y: Tensor | None, seeds: Tensor, model_input: Tensor | None
    ) -> None:
        """Add the noise of a row to x' and y', and bring the model input up to date."""
        terms = self._terms[index]
        for to_y, coefficient, (t0, t1) in terms:
            state = y if to_y else x
            assert state is not None  # the row writes it
            brownian(
                seeds,
                state.shape[1:],
                t0,
                t1,
                **PATH,
                add_to=state,
                scale=coefficient,
                out=state,
            )
        if model_input is not None and any(not term.to_y for term in terms):
            c_in = self.table.rows[index + 1].c_in if index + 1 < len(self.table) else 1.0
            torch.mul(x, c_in, out=model_input)


__all__ = ["PATH", "PathNoise"]
