"""Requests of different solvers, ages and guidance in one batch: each has the bits it has alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from torch import Tensor

import fastdiff
from fastdiff import Sampler, StepTable, schedules, solvers, use_backend
from fastdiff.backends import unavailable
from fastdiff.ops import as_seeds, guidance_rescale, reverse_step
from fastdiff.table import Row, join

SHAPE = (3, 7, 9)


@dataclass
class Request:
    """One image to make.

    Attributes:
        late: ticks after the first request at which this one enters the batch.
        phi: share of rescaled guidance; 0 for none.
    """

    solver: str
    steps: int
    late: int
    weight: float
    phi: float = 0.0
    clip: float | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def table(self) -> StepTable:
        return solvers.build(self.solver, schedules.scaled_linear(), self.steps, **self.options)


# every step count, age and weight another; one to three terms of history, noise, rows without a
# model call, two stages, a clipped one, unguided ones, a rescaled one
REQUESTS = (
    Request("ddim", 5, 0, 7.5, phi=0.7),
    Request("ddpm", 9, 1, 1.0, clip=1.0),
    Request("dpmpp_2m", 6, 0, 3.0),
    Request("dpmpp_2m_sde", 8, 2, 1.0),
    Request("heun", 3, 1, 2.0, clip=2.0),
    Request("euler_ancestral", 7, 3, 0.0),
    Request("euler", 4, 0, 5.0, options={"s_churn": 2.0}),
    Request("heun", 2, 4, 1.5, phi=1.0, options={"s_churn": 2.0}),
)


def outputs(x: Tensor, times: list[float]) -> tuple[Tensor, Tensor]:
    """Conditional and unconditional output, elementwise; NaN for a sample without a call."""
    t = torch.tensor(times, dtype=torch.float32).view(-1, 1, 1, 1)
    return x * 0.5 + t * 2.0**-10, x * 0.25 - t * 2.0**-11


def alone(request: Request, seed: int) -> Tensor:
    table, seeds = request.table(), as_seeds([seed])
    x = fastdiff.randn(seeds, SHAPE) * table.init_sigma
    history, y = torch.empty(max(1, table.depth), *x.shape), torch.empty_like(x)
    for i, row in enumerate(table.rows):
        c, u = outputs(x, [row.time])
        scale = guidance_rescale(c, u, request.weight, request.phi) if request.phi else None
        x = reverse_step(
            x, c, table, i, uncond=u, guidance=request.weight, scale=scale, clip=request.clip,
            history=history, y=y, seeds=seeds,
        )  # fmt: skip
    return x


def together(requests: tuple[Request, ...], seeds: Tensor) -> Tensor:
    tables = [r.table() for r in requests]
    table, offsets = join(tables)
    x = fastdiff.randn(seeds, SHAPE)
    x *= torch.tensor([t.init_sigma for t in tables]).float().view(-1, 1, 1, 1)
    history, y = torch.empty(max(1, table.depth), *x.shape), torch.empty_like(x)
    weight = torch.tensor([r.weight for r in requests])
    phi = torch.tensor([r.phi for r in requests])
    clip = torch.tensor([-1.0 if r.clip is None else r.clip for r in requests])
    sizes = set()
    for tick in range(max(r.late + len(t) for r, t in zip(requests, tables, strict=True))):
        ages = [tick - r.late for r in requests]
        on = [i for i, a in enumerate(ages) if 0 <= a < len(tables[i])]
        sizes.add(len(on))
        at = torch.tensor(on)
        rows = torch.tensor([offsets[i] + ages[i] for i in on])
        c, u = outputs(x[at], [table.rows[i].time for i in rows.tolist()])
        h, anchors = history[:, at], y[at]
        x[at] = reverse_step(
            x[at], c, table, rows, uncond=u, guidance=weight[at],
            scale=guidance_rescale(c, u, weight[at], phi[at]), clip=clip[at],
            history=h, y=anchors, seeds=seeds[at],
        )  # fmt: skip
        history[:, at], y[at] = h, anchors
    assert max(sizes) == 8 and len(sizes) > 3  # all at once, and fewer as they come and go
    return x


@pytest.mark.parametrize("backend", ("cpu", "reference"))
def test_mixed_requests_are_each_alone(backend: str) -> None:
    if unavailable(backend):
        pytest.skip(f"backend {backend}: {unavailable(backend)}")
    with use_backend(backend):
        seeds = [11 * i + 2**63 for i in range(len(REQUESTS))]
        mixed = together(REQUESTS, as_seeds(seeds))
        for i, (request, seed) in enumerate(zip(REQUESTS, seeds, strict=True)):
            assert_same_bits(mixed[i : i + 1], alone(request, seed), f"{i}: {request.solver}")


def test_joined_rows_are_the_rows_of_each_table() -> None:
    """Coefficients, history slots and the input scale of the row that follows."""
    tables = [solvers.build(n, schedules.edm(), 3, prediction="edm") for n in ("heun", "dpmpp_2m")]
    whole, offsets = join(tables)
    assert offsets == (0, len(tables[0])) and len(whole) == sum(len(t) for t in tables)
    assert whole.starts == offsets and whole.depth == max(t.depth for t in tables)
    for table, offset in zip(tables, offsets, strict=True):
        part = slice(offset, offset + len(table))
        assert (whole.floats[part] == table.floats).all()
        assert (whole.ints[part] == table.ints).all()
        assert whole.needs[part] == table.needs
    again, more = join([whole, tables[0]])
    assert again.starts == (*offsets, len(whole)) and more == (0, len(whole))


def test_join_refuses() -> None:
    with pytest.raises(ValueError, match="join: tables must not be empty"):
        join([])
    kinds = [solvers.build("ddim", schedules.linear(), 2, prediction=p)
             for p in ("epsilon", "sample")]  # fmt: skip
    with pytest.raises(ValueError, match="join: tables must have one prediction"):
        join(kinds)
    whole, _ = join([kinds[0], kinds[0]])
    with pytest.raises(ValueError, match="Sampler: table must be one solver's, got 2 joined ones"):
        Sampler(lambda x, t: x, whole)
    for starts in ((1,), (0, 0), (0, 5), ()):
        with pytest.raises(ValueError, match="StepTable: starts must rise from 0"):
            StepTable("t", kinds[0].rows, starts=starts)


def test_a_table_does_not_see_what_stood_before() -> None:
    rows = (Row(x={"x": 1.0}, time=1.0, push=True), Row(x={"x": 1.0, "h0": 1.0}, time=0.0))
    StepTable("whole", rows)
    with pytest.raises(ValueError, match="row 1 of parts must read history that was pushed"):
        StepTable("parts", rows, starts=(0, 1))
