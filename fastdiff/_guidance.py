"""The weight of guidance at each row of a table, and the second model call that it needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff.ops._checks import is_finite
from fastdiff.ops.guidance_rescale import guidance_rescale
from fastdiff.table import Row, StepTable

Weight = float | Tensor
Weights = Weight | Sequence[Weight] | Callable[[int, float], Weight] | None


class RowGuidance(NamedTuple):
    """Guidance of one row.

    Attributes:
        weight: w of ``u + w (c - u)``, a number or (N,) on the device of the state.
        calls: whether the unconditional output is wanted.
        phi: share of the rescaled output, or None.
    """

    weight: Weight
    calls: bool
    phi: Weight | None

    def scale(self, output: Tensor, other: Tensor | None) -> Tensor | None:
        """(N,) factors of the guided output, or None where it stays as it is."""
        if self.phi is None or other is None:
            return None
        return guidance_rescale(output, other, self.weight, self.phi)


def ratio(row: Row) -> float:
    """Noise level sigma / alpha of the state before a row; infinite for pure noise."""
    return row.sigma / row.alpha if row.alpha != 0 else math.inf


class Guidance:
    """What `Sampler` was asked to guide by, checked.

    Args:
        table: the rows.
        weights: None, a number, (N,) tensor, one of these a row in a sequence, or a function of
            (index of the row, its sigma / alpha) that returns one of these.
        interval: (low, high) in sigma / alpha: outside of low < sigma / alpha <= high the weight
            is 1; None: everywhere.
        phi: share of the rescaled output, a number or (N,) tensor; None or 0: none.

    Raises:
        TypeError, ValueError: an argument breaks its rule.
    """

    def __init__(
        self,
        table: StepTable,
        weights: Weights,
        interval: tuple[float, float] | None,
        phi: Weight | None,
    ) -> None:
        if isinstance(weights, (list, tuple)):
            if len(weights) != len(table):
                raise ValueError(
                    f"Sampler: guidance must have one weight a row ({len(table)}), "
                    f"got {len(weights)}"
                )
            for w in weights:
                check_number("guidance", w)
        elif not callable(weights):
            check_number("guidance", weights, optional=True)
        if interval is not None:
            _check_interval(interval)
        check_number("guidance_rescale", phi, optional=True)
        if isinstance(phi, (int, float)) and not 0 <= phi <= 1:
            raise ValueError(f"Sampler: guidance_rescale must lie in [0, 1], got {phi}")
        self._table, self._weights, self._interval = table, weights, interval
        self._phi = None if isinstance(phi, (int, float)) and phi == 0 else phi

    def _weight(self, index: int) -> Weight:
        row, weights = self._table.rows[index], self._weights
        level = ratio(row)
        if weights is None or not row.evaluates:
            return 1.0
        if self._interval is not None and not self._interval[0] < level <= self._interval[1]:
            return 1.0
        if isinstance(weights, (list, tuple)):
            weights = weights[index]
        elif callable(weights):
            weights = weights(index, level)
            check_number("guidance", weights)
        assert isinstance(weights, (int, float, Tensor))  # the checks
        return weights

    def rows(self, device: torch.device) -> list[RowGuidance]:
        """Guidance of every row, on the device: the loop then copies nothing."""

        def moved(value: Weight | None) -> Weight | None:
            return value.to(device, torch.float32) if isinstance(value, Tensor) else value

        phi, found = moved(self._phi), []
        for i, need in enumerate(self._table.needs):
            weight = moved(self._weight(i))
            assert weight is not None
            guides = isinstance(weight, Tensor) or weight != 1
            found.append(RowGuidance(weight, guides or need.uncond, phi if guides else None))
        return found


def check_number(name: str, value: object, *, optional: bool = False) -> None:
    """A finite number, a tensor of one a sample, or, where it is optional, None."""
    if value is None and optional:
        return
    if isinstance(value, Tensor):
        if value.dim() != 1:
            raise ValueError(
                f"Sampler: {name} must be a number or one a sample (N,), got {tuple(value.shape)}"
            )
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"Sampler: {name} must be a number, got {type(value).__name__}")
    if not is_finite(value, torch.float32):  # as the kernels take it
        raise ValueError(f"Sampler: {name} must be finite, got {value}")


def _check_interval(interval: object) -> None:
    pair = interval if isinstance(interval, (list, tuple)) else ()
    if len(pair) != 2 or not all(
        isinstance(v, (int, float)) and not isinstance(v, bool) for v in pair
    ):
        raise TypeError(
            f"Sampler: guidance_interval must be two numbers (low, high), got {interval!r}"
        )
    if not 0 <= pair[0] < pair[1]:
        raise ValueError(f"Sampler: guidance_interval must have 0 <= low < high, got {tuple(pair)}")
