"""What the loop tells of a row that it ran."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff.reference.reverse_step import guide
from fastdiff.solvers._walk import Point, x0_conversion
from fastdiff.table import StepTable


class Evaluated(NamedTuple):
    """What a model call gave, and what was made of it."""

    before: Tensor
    output: Tensor
    uncond: Tensor | None
    weight: float | Tensor
    scale: Tensor | None
    clip: float | Tensor | None


class SampleStep:
    """What one row did.

    Attributes:
        index: row of the table.
        time: model time at which the row evaluated, NaN for a row without a model call.
        sigma: noise scale of the state before the row.
        x: (N, *S) state after the row.
    """

    def __init__(
        self,
        table: StepTable,
        index: int,
        x: Tensor,
        evaluated: Evaluated | None,
    ) -> None:
        row = table.rows[index]
        self.index, self.time, self.sigma, self.x = index, row.time, row.sigma, x
        self._table, self._evaluated = table, evaluated

    @property
    def denoised(self) -> Tensor | None:
        """(N, *S) predicted clean data x0 at this row, computed when asked for; None without a
        model call."""
        if self._evaluated is None:
            return None
        before, output, uncond, weight, scale, clip = self._evaluated
        row = self._table.rows[self.index]
        m = output.to(before.dtype)
        if uncond is not None:
            m = guide(m, uncond.to(before.dtype), _column(weight, m))
        if scale is not None:
            m = _column(scale, m) * m
        at = Point(row.time, row.alpha, row.sigma)
        p, q = x0_conversion(self._table.prediction, at, self._table.sigma_data)
        x0 = p * before + q * m
        if clip is None:
            return x0
        bound = _column(clip, x0)
        if not isinstance(bound, Tensor):
            return x0.clamp(-bound, bound)
        return torch.where(bound < 0, x0, x0.clamp(-bound.abs(), bound.abs()))


def _column(value: float | Tensor, like: Tensor) -> float | Tensor:
    """One value a sample, shaped to broadcast over the sample."""
    if isinstance(value, Tensor):
        return value.to(like.device, like.dtype).view(-1, *[1] * (like.dim() - 1))
    return value
