"""`reverse_step` against the formula of a row as written, in float64 and in float32."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from budget import assert_within_budget
from tables import Inputs, needs_extension, random_inputs, random_table

from fastdiff import use_backend
from fastdiff.ops import reverse_step
from fastdiff.reference.noise import normals
from fastdiff.table import PUSH, Row, StepTable


def _formula(
    table: StepTable, i: int, inputs: Inputs, state: dict[str, np.ndarray], past: list[np.ndarray],
    dtype: Any,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Row i as the docstring of fastdiff/table.py says it, by ages and without folding.

    "bound" of a result: the sum of the magnitudes of its terms, which a rounding error is
    proportional to.
    """
    row = table.rows[i]
    x = state["x"].astype(dtype)
    terms = {"x": (x, np.abs(x)), "y": (state["y"].astype(dtype), np.abs(state["y"]))}
    for age, h in enumerate(past[:4]):
        terms[f"h{age}"] = (h.astype(dtype), np.abs(h))
    if row.evaluates:
        m, u = inputs.outputs[i].numpy().astype(dtype), inputs.unconds[i].numpy().astype(dtype)
        w = dtype(inputs.guidance)
        size = np.abs(u) + np.abs(w) * (np.abs(m) + np.abs(u))
        m = u + w * (m - u)
        d = dtype(row.convert[0]) * x + dtype(row.convert[1]) * m
        d_size = abs(row.convert[0]) * np.abs(x) + abs(row.convert[1]) * size
        if inputs.clip is not None:
            d = np.clip(d, -dtype(inputs.clip), dtype(inputs.clip))
        terms |= {"m": (m, size), "u": (u, np.abs(u)), "d": (d, d_size)}
    seeds = inputs.seeds.numpy().view(np.uint64)
    for k, (stream, counter) in enumerate(row.draws):
        n = normals(seeds, x[0].size, counter, stream).reshape(x.shape).astype(dtype)
        if k == 0 and row.log_variance is not None:
            scale, shift = (dtype(c) for c in row.log_variance)
            n = np.exp(scale * inputs.variance.numpy().astype(dtype) + shift) * n
        terms[f"n{k + 1}"] = (n, np.abs(n))

    results = {}
    for name, coefficients in (("x", row.x), ("y", row.y)):
        if coefficients is not None:
            results[name] = sum(dtype(c) * terms[k][0] for k, c in coefficients.items())
            results[f"{name} bound"] = sum(abs(c) * terms[k][1] for k, c in coefficients.items())
    if row.push:
        e, f = (0.0, 1.0) if row.push is True else row.push
        results["pushed"] = dtype(e) * x + dtype(f) * terms["d"][0]
        results["pushed bound"] = abs(e) * np.abs(x) + abs(f) * terms["d"][1]
    last = i + 1 == len(table.rows)
    results["model_input"] = dtype(1.0 if last else table.rows[i + 1].c_in) * results["x"]
    return results


def _rows_with_formulas(
    clip: float | None, dtype: torch.dtype, backend: str
) -> list[tuple[dict[str, torch.Tensor], dict[str, np.ndarray], dict[str, np.ndarray]]]:
    """Per row, from the same state: what the op gave, the formula in its dtype and in float64."""
    rng = np.random.default_rng(10)
    table = random_table(rng)
    inputs = random_inputs(rng, (2, 3, 20, 20), guidance=2.5, clip=clip)
    kind = np.float64 if dtype == torch.float64 else np.float32
    x = inputs.x.to(dtype)
    y, h = torch.zeros_like(x), torch.full((table.depth, *x.shape), float("nan"), dtype=dtype)
    past: list[np.ndarray] = []
    found = []
    for i, row in enumerate(table.rows):
        state = {"x": x.numpy().copy(), "y": y.numpy().copy()}
        same = _formula(table, i, inputs, state, past, kind)
        exact = _formula(table, i, inputs, state, past, np.float64)
        model_input = torch.empty_like(x)
        with use_backend(backend):
            x = reverse_step(
                x, inputs.outputs[i] if row.evaluates else None, table, i,
                uncond=inputs.unconds[i], guidance=inputs.guidance, clip=clip,
                variance=inputs.variance, y=y, history=h, seeds=inputs.seeds,
                model_input=model_input,
            )  # fmt: skip
        got = {"x": x, "y": y.clone(), "model_input": model_input}
        slot = int(table.ints[i, PUSH])
        if slot >= 0:
            got["pushed"] = h[slot].clone()
        found.append(({k: v for k, v in got.items() if k in same}, same, exact))
        if row.push:
            past.insert(0, got["pushed"].numpy() if slot >= 0 else exact["pushed"])
        # keep the next row's inputs of order one
        x = x / x.abs().max()
    return found


@pytest.mark.parametrize("clip", (None, 1.5), ids=("no-clip", "clip"))
def test_float64_reference_is_the_formula(clip: float | None) -> None:
    """To 32 roundings of the magnitudes summed: at most 11 terms, each of at most two products."""
    for got, _, exact in _rows_with_formulas(clip, torch.float64, "reference"):
        for name, value in got.items():
            bound = 32 * 2.0**-53 * exact["x bound" if name == "model_input" else f"{name} bound"]
            assert (np.abs(value.numpy() - exact[name]) <= bound).all(), name


@needs_extension
@pytest.mark.parametrize("clip", (None, 1.5), ids=("no-clip", "clip"))
def test_float32_is_within_the_budget(clip: float | None) -> None:
    """As near to float64 as NumPy's float32 on the formula as written."""
    for got, same, exact in _rows_with_formulas(clip, torch.float32, "cpu"):
        for name, value in got.items():
            same_dtype, truth = (torch.from_numpy(np.asarray(r[name])) for r in (same, exact))
            # 2 ulp: the polynomial exp of a learned variance (csrc/step.h)
            assert_within_budget(value, same_dtype.float(), truth.double(), ulps=2)


def test_float64_runs_on_the_reference_alone() -> None:
    x = torch.ones(1, 4, dtype=torch.float64)
    table = StepTable("t", (Row(x={"x": 1 / 3}, evaluates=False),))
    assert reverse_step(x, None, table, 0)[0, 0].item() == 1 / 3
