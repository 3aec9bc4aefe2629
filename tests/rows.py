"""A table run in float64 NumPy, row by row: the tests' own reading of what a row says."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from fastdiff.table import StepTable

Array = np.ndarray


def run(
    table: StepTable,
    x: Array,
    network: Callable[[Array, float], Array],
    noise: Callable[[int, int], Array],
    *,
    uncond: Callable[[Array, float], Array] | None = None,
    clip: float | None = None,
    variance: Callable[[Array, float], Array] | None = None,
) -> list[Array]:
    """The states after each row. `network` takes (x_in, t), `noise` (stream, counter)."""
    states, history, y = [], [], None
    for row in table.rows:
        terms: dict[str, Array] = {"x": x}
        if y is not None:
            terms["y"] = y
        for k, h in enumerate(reversed(history[-4:])):
            terms[f"h{k}"] = h
        if row.evaluates:
            m = terms["m"] = network(row.c_in * x, row.time)
            d = row.convert[0] * x + row.convert[1] * m
            if uncond is not None:
                terms["u"] = uncond(row.c_in * x, row.time)
            terms["d"] = d if clip is None else np.clip(d, -clip, clip)
        for k, draw in enumerate(row.draws):
            terms[f"n{k + 1}"] = noise(*draw)
        if row.log_variance is not None:
            assert variance is not None
            scale, shift = row.log_variance
            terms["n1"] = np.exp(scale * variance(x, row.time) + shift) * terms["n1"]
        if row.push:
            e, f = (0.0, 1.0) if row.push is True else row.push
            pushed = e * x + f * terms["d"]

        def total(coefficients: Mapping[str, float], terms: dict[str, Array] = terms) -> Array:
            zero = np.zeros_like(terms["x"])
            return sum((c * terms[k] for k, c in coefficients.items() if c != 0), zero)

        x, y = total(row.x), y if row.y is None else total(row.y)
        if row.push:
            history.append(pushed)
        states.append(x)
    return states
