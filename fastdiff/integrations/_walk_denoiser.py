"""A table walked with another library's denoiser and noise, as k-diffusion's samplers are called.

The state is k-diffusion's x = x0 + sigma*noise (a table on `schedules.edm`), or a flow's
x = (1 - sigma)*x0 + sigma*noise (on `schedules.flow`); both predict "sample", so that a row's time
is the sigma that the denoiser is given.

Noise that comes as a tensor enters the row itself: its coefficient goes to the term that the row
has free, the raw unconditional output u, or m in a row without a model call, and the kernel still
makes one pass. Only a second draw of a row, or one beside CFG++, is added afterwards.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdiff._state import history_slots
from fastdiff.ops.noise import Stream
from fastdiff.ops.reverse_step import reverse_step
from fastdiff.path_noise import PathNoise
from fastdiff.table import Row, StepTable

__all__ = [
    "BrownianPath", "Denoiser", "Draw", "NoiseSource", "joined_noise", "scaled_noise", "walk",
]  # fmt: skip

# (x (N, *S), sigma (N,)) -> x0 prediction (N, *S), or that and the unconditional one (CFG++)
Denoiser = Callable[[Tensor, Tensor], "Tensor | tuple[Tensor, Tensor]"]

_TERMS = ("n1", "n2")
_CLOSE = 1e-9  # levels of rows are the grid's own, but for a solver that makes its own grid


class Draw(NamedTuple):
    """What a noise source is asked for.

    Attributes:
        stream: `Stream.STEP`, or `Stream.CHURN` for noise added before an evaluation.
        counter: number of the draw in the table; each is asked for once.
        sigma, sigma_next: level at which the noise begins to act, and of the state after it.
    """

    stream: int
    counter: int
    sigma: float
    sigma_next: float


NoiseSource = Callable[[Draw], Tensor]


class BrownianPath(NamedTuple):
    """Step noise from one path a seed (`fastdiff.path_noise`); churn keeps its counters.

    Attributes:
        seeds: (N,) int64, one a sample.
    """

    seeds: Tensor


class _Addend(NamedTuple):
    """A draw that a row reads as a tensor."""

    draw: tuple[int, int]
    to_x: float
    to_y: float


@dataclasses.dataclass(frozen=True)
class _Handed:
    """A table that reads its noise as tensors.

    Attributes:
        table: its rows, without draws.
        first: the draw handed over as a term of the row, by row.
        rest: those to be added afterwards, by row.
        last_use: the row after which a draw is not wanted again.
    """

    table: StepTable
    first: dict[int, tuple[int, int]]
    rest: dict[int, list[_Addend]]
    last_use: dict[tuple[int, int], int]


def _used(row: Row) -> dict[str, tuple[int, int]]:
    """The draws that a row reads, by term."""
    y = row.y or {}
    return {
        term: draw
        for term, draw in zip(_TERMS, row.draws, strict=False)
        if row.x.get(term, 0.0) or y.get(term, 0.0)
    }


def _moved(coefficients: Mapping[str, float], term: str | None, to: str) -> dict[str, float]:
    """Without noise, but for the one that goes to another term."""
    kept = {k: c for k, c in coefficients.items() if k not in _TERMS}
    if term is not None and coefficients.get(term, 0.0):
        kept[to] = coefficients[term]
    return kept


def _hand_over(table: StepTable) -> _Handed:
    first: dict[int, tuple[int, int]] = {}
    rest: dict[int, list[_Addend]] = {}
    last_use: dict[tuple[int, int], int] = {}
    rows = []
    for i, row in enumerate(table.rows):
        used, y = _used(row), row.y or {}
        if used and row.log_variance is not None:
            raise ValueError(
                f"walk: noise must be seeds for a learned variance, got a source for {table.name}"
            )
        last_use |= dict.fromkeys(used.values(), i)
        to = "u" if row.evaluates else "m"
        # u is free where the row does not read it; y must not lose its only term
        is_free = not (row.x.get("u") or y.get("u"))
        term = next(iter(used), None) if is_free else None
        if term is not None:
            first[i] = used.pop(term)
        rest[i] = [_Addend(draw, row.x.get(k, 0.0), y.get(k, 0.0)) for k, draw in used.items()]
        new = dataclasses.replace(
            row,
            x=_moved(row.x, term, to),
            y=None if row.y is None else _moved(row.y, term, to),
            draws=(),
        )
        if term is not None and not row.evaluates:
            # the noise is the output of a call that is not made
            new = dataclasses.replace(new, evaluates=True, time=0.0, convert=(0.0, 1.0))
        rows.append(new)
    return _Handed(dataclasses.replace(table, rows=tuple(rows)), first, rest, last_use)


def _starts(table: StepTable, sigmas: Sequence[float]) -> list[int]:
    """The row with which each step begins: the last one at its level, as stages of the steps
    before may stand there too."""
    levels = table.sigmas
    found = []
    for sigma in sigmas[:-1]:
        at = np.flatnonzero(np.isclose(levels, sigma, rtol=_CLOSE, atol=0.0))
        if not len(at):
            raise ValueError(f"walk: sigmas must be points of {table.name}, got {sigma}")
        found.append(int(at[-1]))
    return found


def _draws(table: StepTable, sigmas: Sequence[float], starts: list[int]) -> dict[Any, Draw]:
    """Each draw, by stream and counter.

    It acts from the start of its step, or from the end of the draw before it in that step; those of
    `joined_noise` from the start.
    """
    joined = table.name in _JOINS
    ends = [*table.sigmas[1:], sigmas[-1]]
    step, end = -1, math.inf
    found: dict[Any, Draw] = {}
    for i, (row, after) in enumerate(zip(table.rows, ends, strict=True)):
        while step + 1 < len(starts) and starts[step + 1] <= i:
            step, end = step + 1, math.inf
        for stream, counter in _used(row).values():
            if (stream, counter) in found:
                continue
            start = sigmas[max(step, 0)]
            if not joined and end < start:
                start = end
            found[stream, counter] = Draw(stream, counter, start, float(after))
            end = float(after)
    return found


# Solvers whose second draw of a step is put together from increments of one path, so that a source
# which has that path gives the whole of it at once.
_JOINS = ("dpmpp_sde",)


def joined_noise(table: StepTable) -> StepTable:
    """The table with one draw a row where its solver joins two increments of a path.

    k-diffusion's ``sample_dpmpp_sde`` asks its noise sampler for the stage and then again for the
    whole step; the table of `dpmpp_sde` writes the second as a sum of two independent draws. For a
    `NoiseSource` the two are one draw over the step. Other tables come back as they are.
    """
    if table.name not in _JOINS:
        return table
    rows = []
    for i, row in enumerate(table.rows):
        if row.draws:
            x = {k: c for k, c in row.x.items() if k not in _TERMS}
            x["n1"] = math.hypot(*(row.x.get(k, 0.0) for k in _TERMS))
            row = dataclasses.replace(row, x=x, draws=((int(Stream.STEP), i),))
        rows.append(row)
    return dataclasses.replace(table, rows=tuple(rows))


def scaled_noise(table: StepTable, factor: float) -> StepTable:
    """The table with every draw multiplied by a number."""
    if factor == 1:
        return table

    def scaled(coefficients: Mapping[str, float]) -> dict[str, float]:
        return {k: c * factor if k in _TERMS else c for k, c in coefficients.items()}

    rows = tuple(
        dataclasses.replace(row, x=scaled(row.x), y=None if row.y is None else scaled(row.y))
        for row in table.rows
    )
    return dataclasses.replace(table, rows=rows)


class _Handover:
    """Asks a source for each draw once, and keeps it while later rows read it again."""

    def __init__(
        self, handed: _Handed, draws: dict[Any, Draw], source: NoiseSource, like: Tensor
    ) -> None:
        self._handed, self._draws, self._source, self._like = handed, draws, source, like
        self._kept: dict[tuple[int, int], Tensor] = {}

    def get(self, row: int, draw: tuple[int, int]) -> Tensor:
        noise = self._kept.pop(draw, None)
        if noise is None:
            given = self._source(self._draws[draw])
            if given.shape != self._like.shape:
                got, want = tuple(given.shape), tuple(self._like.shape)
                raise ValueError(f"walk: noise must have the state's shape {want}, got {got}")
            noise = given.to(self._like)
        if self._handed.last_use[draw] > row:
            self._kept[draw] = noise
        return noise

    def term(self, row: int) -> Tensor | None:
        """What the row reads in place of an output."""
        draw = self._handed.first.get(row)
        return None if draw is None else self.get(row, draw)

    def add(self, row: int, x: Tensor, y: Tensor | None) -> None:
        """The draws that the row has no term for."""
        for addend in self._handed.rest[row]:
            noise = self.get(row, addend.draw)
            x.add_(noise, alpha=addend.to_x)
            if addend.to_y and y is not None:
                y.add_(noise, alpha=addend.to_y)


@torch.no_grad()
def walk(
    table: StepTable,
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Sequence[float],
    *,
    noise: Tensor | BrownianPath | NoiseSource | None = None,
    callback: Callable[[dict[str, Any]], object] | None = None,
    disable: bool | None = True,
) -> Tensor:
    """The state after all rows of a table.

    Args:
        table: with prediction "sample", on an EDM or a flow schedule.
        denoiser: ``denoiser(x, sigma)`` with x (N, *S) in the dtype given and sigma (N,); returns
            the x0 prediction (N, *S), or a tuple of it and the unconditional one, which the tables
            of CFG++ read.
        x: (N, *S) state at the first sigma, any floating dtype; computed in float32, or float64
            where it is that. It is not written to.
        sigmas: (steps + 1,) levels of the steps, falling; those of the grid of the table.
        noise: (N,) int64 seeds (each row draws its own in the kernel), a `BrownianPath`, or a
            function of a `Draw` that returns (N, *S) unit-variance noise; None where the table
            draws none.
        callback: called once a step, at its first evaluation, with the dict of k-diffusion: x,
            i, sigma, sigma_hat, denoised.
        disable: no progress bar; None: none where standard error is no terminal.

    Returns:
        (N, *S), dtype of x.

    Raises:
        ValueError: noise is missing or of another shape, the path can not serve the table, or the
            sigmas are not the table's.
    """
    if table.prediction != "sample":
        raise ValueError(f"walk: table must predict 'sample', got {table.prediction!r}")
    if table.stochastic and noise is None:
        raise ValueError(f"walk: noise must be given for {table.name}, got None")
    starts = _starts(table, sigmas)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    state = x.to(dtype)
    seeds = path = handover = None
    rows = table
    if isinstance(noise, BrownianPath):
        path, seeds = PathNoise(table), noise.seeds.to(x.device)
        rows = path.table
    elif isinstance(noise, Tensor):
        seeds = noise.to(x.device)
    elif noise is not None:
        draws = _draws(table, sigmas, starts)
        handed = _hand_over(table)
        rows, handover = handed.table, _Handover(handed, draws, noise, state)
    n = len(x)
    times = torch.tensor(table.times, dtype=x.dtype, device=x.device)
    levels = torch.tensor(sigmas, dtype=x.dtype, device=x.device)
    history = history_slots(rows.depth, state)
    y = torch.empty_like(state) if rows.anchored else None
    step, told = -1, True
    with _bar(len(starts), disable) as advance:
        for i, row in enumerate(table.rows):
            while step + 1 < len(starts) and starts[step + 1] <= i:
                step, told = step + 1, False
            output = other = None
            if row.evaluates:
                shown = state.to(x.dtype)
                given = denoiser(shown, times[i].repeat(n))
                output, other = given if isinstance(given, tuple) else (given, None)
                if callback is not None and not told:
                    sigma, hat = levels[step], times[i]
                    seen = {"x": shown, "i": step, "sigma": sigma, "sigma_hat": hat}
                    callback(seen | {"denoised": output})
                told = True
                output = output.to(dtype)
                other = None if other is None else other.to(dtype)
            if handover is not None and (term := handover.term(i)) is not None:
                output, other = (output, term) if row.evaluates else (term, None)
            # in new memory: a model or a callback may keep what it was shown
            state = reverse_step(
                state, output, rows, i, uncond=other, y=y, history=history, seeds=seeds
            )
            if handover is not None:
                handover.add(i, state, y)
            if path is not None and seeds is not None:
                path.add(i, state, y, seeds, None)
            if i + 1 == len(table) or i + 1 in starts:
                advance()
    return state.to(x.dtype)


@contextlib.contextmanager
def _bar(steps: int, disable: bool | None) -> Any:
    """A progress bar; yields the function that moves it on."""
    from tqdm import tqdm

    with tqdm(total=steps, disable=disable) as bar:
        yield bar.update
