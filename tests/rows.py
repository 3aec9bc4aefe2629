"""A table run in float64 NumPy, row by row: the tests' own reading of what a row says."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fastdiff.table import StepTable

Array = np.ndarray


def run(
    table: StepTable,
    x: Array,
    network: Callable[[Array, float], Array],
    noise: Callable[[int, int], Array],
    *,
    clip: float | None = None,
    variance: Callable[[Array, float], Array] | None = None,
) -> list[Array]:
    """The states after each row. `network` takes (x_in, t), `noise` (stream, counter)."""
    states, history = [], []
    for row in table.rows:
        terms: dict[str, Array] = {"x": x}
        for k, h in enumerate(reversed(history[-4:])):
            terms[f"h{k}"] = h
        if row.evaluates:
            m = terms["m"] = network(row.c_in * x, row.time)
            d = row.convert[0] * x + row.convert[1] * m
            terms["d"] = d if clip is None else np.clip(d, -clip, clip)
        for k, draw in enumerate(row.draws):
            terms[f"n{k + 1}"] = noise(*draw)
        if row.log_variance is not None:
            assert variance is not None
            scale, shift = row.log_variance
            terms["n1"] = np.exp(scale * variance(x, row.time) + shift) * terms["n1"]
        x = sum((c * terms[k] for k, c in row.x.items() if c != 0), np.zeros_like(x))
        if row.push:
            history.append(terms["d"])
        states.append(x)
    return states
