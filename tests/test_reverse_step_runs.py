"""The solvers' own rows, which the CPU kernel runs in registers and in long runs, as bits."""

from __future__ import annotations

import pytest
import torch
from bits import assert_same_bits

import fastdiff
from fastdiff import schedules, solvers, use_backend
from fastdiff.ops import as_seeds, reverse_step
from fastdiff.table import Row, StepTable

# around the chunk of 1,024, the run of 16,384 and the 2^18 elements from which it prefetches
SIZES = [1, 1023, 1025, 16383, 16385, 40001, 2**18 + 3]
# terms: x and m; x, m and a clipped d; push and history; a draw; a draw and history; x, d and h0
SOLVERS = ["ddim", "dpmpp_2m", "ddpm", "dpmpp_2m_sde", "heun"]


@pytest.mark.parametrize("clip", [None, 0.75], ids=["free", "clipped"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", SOLVERS)
def test_solver_rows_are_the_reference_s_bits(isa: str, name: str, size: int, clip: float | None):
    table = solvers.build(name, schedules.linear(), 4)
    seeds, start = as_seeds([3, 2**63]), fastdiff.randn([1, 2], (size,))
    outputs = [fastdiff.randn([5, 6], (size,), step=i) for i in range(len(table))]
    states = {}
    for backend in ("reference", "cpu"):
        x, history = start.clone(), torch.full((max(1, table.depth), 2, size), float("nan"))
        with use_backend(backend):
            for i in range(len(table)):
                # in place and to a new tensor in turn
                out = x if i % 2 else None
                x = reverse_step(
                    x, outputs[i], table, i, clip=clip, history=history, seeds=seeds, out=out
                )
        states[backend] = x, history
    for got, want in zip(states["cpu"], states["reference"], strict=True):
        assert_same_bits(got, want)


def test_results_past_the_caches_are_the_reference_s_bits(isa: str):
    """From 2^21 elements on; the second sample starts inside a cache line, as ``aside`` does."""
    table = solvers.build("ddim", schedules.linear(), 4)
    for size in (2**20, 2**20 + 3):
        start, output = fastdiff.randn([1, 2], (size,)), fastdiff.randn([3, 4], (size,))
        aside = torch.empty(2 * size + 1)[1:].view(2, size)
        for out in (torch.empty_like(start), aside):
            with use_backend("cpu"):
                got = reverse_step(start, output, table, 1, out=out)
            with use_backend("reference"):
                assert_same_bits(got, reverse_step(start, output, table, 1))


# x' and y' from d, the anchor and three slots, as UniPC and SA-Solver of order 3 have them
TWO = StepTable(
    "two",
    (
        *(Row(x={"x": 1.0}, y={"x": 1.0}, time=9.0 - i, push=True) for i in range(3)),
        Row(
            x={"y": 0.9, "d": 0.5, "h0": -0.3, "h1": 0.2, "h2": 0.1, "n1": 0.3},
            y={"y": 0.8, "d": 0.4, "h0": 0.3, "h1": -0.1, "h2": 0.2, "n2": 0.2},
            time=5.0,
            convert=(0.0, 1.0),
            push=(0.7, -0.6),
            draws=((1, 1), (2, 1)),
        ),
        Row(x={"y": 0.9, "h0": 0.1, "h2": 0.1}, y={"d": 1.0, "h1": 0.3}, time=4.0),
    ),
)


@pytest.mark.parametrize("clip", [None, 0.75], ids=["free", "clipped"])
@pytest.mark.parametrize("size", SIZES)
def test_two_output_rows_are_the_reference_s_bits(isa: str, size: int, clip: float | None):
    seeds, start = as_seeds([3, 2**63]), fastdiff.randn([1, 2], (size,))
    outputs = [fastdiff.randn([5, 6], (size,), step=i) for i in range(len(TWO))]
    states = {}
    for backend in ("reference", "cpu"):
        x, y = start.clone(), torch.full((2, size), float("nan"))
        history = torch.full((TWO.depth, 2, size), float("nan"))
        model_input = torch.empty(2, size, dtype=torch.bfloat16)
        with use_backend(backend):
            for i in range(len(TWO)):
                x = reverse_step(
                    x, outputs[i], TWO, i, clip=clip, y=y, history=history, seeds=seeds,
                    out=x if i % 2 else None, model_input=model_input,
                )  # fmt: skip
        states[backend] = x, y, history, model_input
    for got, want in zip(states["cpu"], states["reference"], strict=True):
        assert_same_bits(got, want)
