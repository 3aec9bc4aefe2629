"""A solver as data: one row of float64 coefficients a step, executed by ``ops.reverse_step``.

A row, with one model evaluation, says::

    m  = guidance(model outputs)
    d  = clip(p*x + q*m)
    x' = sum of a[term] * term         y' = sum of b[term] * term     (two-output rows only)
    history <- push (e*x + f*d)                                        (where the row says so)
    model_input = c_in of the next row * x'

over the terms of `TERMS`. Noise is no slot: a row names the counters of its draws, so a later row
can draw the same noise again.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastdiff._packing import Packed, Packing, fits
from fastdiff._rows import (
    C_IN,
    COUNTER1,
    COUNTER2,
    EVALUATES,
    FLAGS,
    HISTORY_SLOTS,
    LEARNED_VARIANCE,
    LV_SCALE,
    LV_SHIFT,
    PUSH,
    PUSH_D,
    PUSH_X,
    ROW_FLOATS,
    ROW_INTS,
    STREAM1,
    STREAM2,
    TERMS,
    A,
    B,
    Needs,
    P,
    Q,
    Row,
    check_types,
    is_number,
    lay,
    needs_of,
)

if TYPE_CHECKING:
    from fastdiff.schedules import Schedule

__all__ = [
    "COUNTER1",
    "COUNTER2",
    "C_IN",
    "EVALUATES",
    "FLAGS",
    "HISTORY_SLOTS",
    "LEARNED_VARIANCE",
    "LV_SCALE",
    "LV_SHIFT",
    "PUSH",
    "PUSH_D",
    "PUSH_X",
    "ROW_FLOATS",
    "ROW_INTS",
    "STREAM1",
    "STREAM2",
    "TERMS",
    "A",
    "B",
    "Needs",
    "P",
    "Packed",
    "Q",
    "Row",
    "StepTable",
    "join",
]  # fmt: skip


@dataclass(frozen=True)
class StepTable(Packing):
    """The rows of one solver on one noise schedule, validated when built.

    Attributes:
        name: solver name, as in ``fastdiff.solvers.SOLVERS``.
        prediction: what the model predicts (epsilon, sample, v_prediction, flow, edm).
        rows: the rows as the solver wrote them.
        init_sigma: standard deviation of the initial state (dimensionless).
        order: stated order of convergence.
        sigma_data: standard deviation of the data, for the "edm" prediction.
        starts: rows at which a table begins, more than one where tables were joined: history and
            anchor of what stood before are not seen from there.
        floats: (rows, ROW_FLOATS) float64, history by memory slot; read-only.
        ints: (rows, ROW_INTS) int32; read-only.

    Raises:
        ValueError: a row reads what no earlier row wrote, or holds what float32 does not.
        TypeError: a row is no `Row`, or a part of it no number.
    """

    name: str
    rows: tuple[Row, ...]
    prediction: str = "epsilon"
    init_sigma: float = 1.0
    order: int = 1
    sigma_data: float = 0.5
    starts: tuple[int, ...] = (0,)
    floats: np.ndarray = field(init=False, repr=False, compare=False)
    ints: np.ndarray = field(init=False, repr=False, compare=False)
    needs: tuple[Needs, ...] = field(init=False, repr=False, compare=False)
    depth: int = field(init=False)
    _packed: dict[tuple[bool | None, torch.device, torch.dtype], Packed] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        check_types(self.rows)
        rows = tuple(self.rows)
        if not rows:
            raise ValueError("StepTable: rows must not be empty, got 0 rows")
        if not is_number(self.init_sigma):
            got = type(self.init_sigma).__name__
            raise TypeError(f"StepTable: init_sigma must be a number, got {got}")
        if not (math.isfinite(self.init_sigma) and self.init_sigma >= 0):
            raise ValueError(
                f"StepTable: init_sigma must be finite and not negative, got {self.init_sigma}"
            )
        floats = np.zeros((len(rows), ROW_FLOATS))
        ints = np.zeros((len(rows), ROW_INTS), dtype=np.int32)
        starts = tuple(self.starts)
        if starts[:1] != (0,) or any(a >= b for a, b in itertools.pairwise((*starts, len(rows)))):
            raise ValueError(
                f"StepTable: starts must rise from 0 to below {len(rows)}, got {starts}"
            )
        needs: list[Needs] = []
        depth = 0
        for begin, end in itertools.pairwise((*starts, len(rows))):
            mine = lay(self.name, rows, begin, end, floats, ints)
            depth = max(depth, mine)
            needs += (needs_of(rows[i], mine, int(ints[i, PUSH])) for i in range(begin, end))
        fit = fits(floats, ints)
        if not fit.all():
            bad = int(np.flatnonzero(~fit)[0])
            raise ValueError(
                f"StepTable: row {bad} of {self.name} must be finite in float32, got {rows[bad]}"
            )
        floats.setflags(write=False)
        ints.setflags(write=False)
        for key, value in (
            ("rows", rows),
            ("floats", floats),
            ("ints", ints),
            ("depth", depth),
            ("needs", tuple(needs)),
        ):
            object.__setattr__(self, key, value)

    @classmethod
    def from_callable(
        cls,
        sampler: Callable[..., Any],
        sigmas: Any,
        *,
        schedule: Schedule | None = None,
        prediction: str = "epsilon",
        name: str | None = None,
        brownian: bool = False,
        **options: Any,
    ) -> StepTable:
        """The table of a k-diffusion-style sampler, found by running it on basis vectors.

        Args:
            sampler: ``sampler(model, x, sigmas, ...)``, where ``model(x, sigma)`` with sigma (N,)
                predicts clean data from x = x0 + sigma*noise. Noise that it takes from a
                ``noise_sampler`` argument or from ``torch.randn_like`` becomes draws, counted as
                the sampler makes them.
            sigmas: (steps + 1,) noise levels as the sampler wants them, the last one often 0.
            schedule: of the model that the table is for, whose x is alpha times the sampler's and
                whose time is that of sigma/alpha; None: `schedules.edm`, x and sigma themselves.
            prediction: what that model predicts, as in `solvers.build`.
            name: of the table; None: the sampler's own.
            brownian: draws over spans (sigma, sigma_next) that overlap are increments of one
                Brownian path, k-diffusion's default for the "sde" samplers; False: independent.
            options: handed to the sampler.

        Returns:
            The table, whose initial state is sigmas[0] * noise in the sampler's space. Its order is
            given as 1: a run does not tell it.

        Raises:
            TypeError, ValueError: an argument breaks its rule, or the sampler has no table, with
                the reason: adaptive steps, clamps, norms, more history than a row reads.
        """
        from fastdiff._from_callable import import_sampler  # it needs this module

        return import_sampler(
            sampler, sigmas, schedule=schedule, prediction=prediction, name=name,
            brownian=brownian, options=options,
        )  # fmt: skip

    @property
    def times(self) -> np.ndarray:
        """(rows,) float64 model time of each row, NaN where the row does not evaluate."""
        return np.array([row.time for row in self.rows])

    @property
    def alphas(self) -> np.ndarray:
        """(rows,) float64 signal scale of the state before each row."""
        return np.array([row.alpha for row in self.rows])

    @property
    def sigmas(self) -> np.ndarray:
        """(rows,) float64 noise scale of the state before each row."""
        return np.array([row.sigma for row in self.rows])

    @property
    def nfe(self) -> int:
        """Number of model evaluations of the whole table."""
        return sum(row.evaluates for row in self.rows)

    @property
    def stochastic(self) -> bool:
        """Whether any row draws noise."""
        return any(need.seeds for need in self.needs)

    @property
    def anchored(self) -> bool:
        """Whether any row keeps a second state y."""
        return any(need.anchor or need.writes_anchor for need in self.needs)


def join(tables: Sequence[StepTable]) -> tuple[StepTable, tuple[int, ...]]:
    """Several tables as one, so that a batch may mix requests that run different ones.

    Sample i of `ops.reverse_step` stands at row ``offsets[k] + r`` where it runs row r of table k,
    and has the bits that it has alone. The joined table starts no sampling of its own: its
    ``init_sigma`` is 1, take that of each table.

    Args:
        tables: of one prediction and one sigma_data, since they share a model; any solvers,
            schedules and numbers of rows.

    Returns:
        the table, and the offset of each of ``tables``.

    Raises:
        ValueError: no tables, or tables of more than one kind of prediction.
    """
    if not tables:
        raise ValueError("join: tables must not be empty, got none")
    kinds = {(t.prediction, t.sigma_data) for t in tables}
    if len(kinds) > 1:
        raise ValueError(f"join: tables must have one prediction and sigma_data, got {kinds}")
    offsets = tuple(itertools.accumulate((len(t) for t in tables[:-1]), initial=0))
    whole = StepTable(
        "joined",
        tuple(row for t in tables for row in t.rows),
        prediction=tables[0].prediction,
        order=min(t.order for t in tables),
        sigma_data=tables[0].sigma_data,
        starts=tuple(o + s for o, t in zip(offsets, tables, strict=True) for s in t.starts),
    )
    return whole, offsets
