"""The solvers' own rows, which the CPU kernel runs in registers and in long runs, as bits."""

from __future__ import annotations

import pytest
import torch
from bits import assert_same_bits

import fastdiff
from fastdiff import schedules, solvers, use_backend
from fastdiff.ops import as_seeds, reverse_step

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
