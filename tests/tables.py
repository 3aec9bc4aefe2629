"""Random tables that use every feature of a row, inputs for them, and guarded memory."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

import fastdiff
from fastdiff.ops import _native, reverse_step
from fastdiff.table import Row, StepTable

ROWS = 7
NO_MODEL = 3  # row without an evaluation
LEARNED = 5  # row with a learned variance
Format = torch.memory_format

needs_extension = pytest.mark.skipif(_native.extension is None, reason=str(_native.missing))


def random_table(rng: np.random.Generator) -> StepTable:
    """Seven rows: history of every depth, an anchor from row 0 on, two draws, CFG++'s uncond term,
    a row without a model call and one with a learned variance; pushes of d, of x and d, of one.
    """
    pushes: list[bool | tuple[float, float]] = [True] * ROWS
    pushes[1], pushes[2] = (rng.normal(), rng.normal()), (rng.normal(), 0.0)
    pushes[5] = (0.0, rng.normal())
    rows = []
    for i in range(ROWS):
        evaluates = i != NO_MODEL
        x = {"x": rng.normal(), "n1": rng.normal()}
        if i > 0:
            x["y"] = rng.normal()
        if evaluates:
            x["m"], x["d"] = rng.normal(), rng.normal()
            if i % 2:
                x["u"] = rng.normal()
        for age in range((0, 1, 2, 3, 3, 4, 4)[i]):
            x[f"h{age}"] = rng.normal()
        if i % 3 == 0:
            x["n2"] = rng.normal()
        y = {"x": 1.0} if i == 0 else None
        if i in (2, 4):
            y = {"x": rng.normal(), "n1": rng.normal(), "d": rng.normal(), "h0": rng.normal()}
        rows.append(
            Row(
                x=x,
                y=y,
                time=float(i) if evaluates else float("nan"),
                convert=(rng.normal(), rng.normal()),
                push=evaluates and pushes[i],
                draws=((1, i), (2, i)),
                log_variance=(0.4, -0.7) if i == LEARNED else None,
                evaluates=evaluates,
                c_in=0.5 + 0.125 * i,
            )
        )
    return StepTable("random", tuple(rows))


@dataclass
class Guard:
    """Memory with a border of sentinels on both sides of one tensor.

    The tensor starts at an odd element, so that it has no vector's alignment.
    """

    shape: tuple[int, ...]
    format: Format = torch.contiguous_format
    dtype: torch.dtype = torch.float32
    fill: float = float("nan")
    tensor: torch.Tensor = field(init=False)

    BORDER = 65
    SENTINEL = -77.0

    def __post_init__(self) -> None:
        like = torch.empty(self.shape, dtype=self.dtype, device="meta")
        like = like.contiguous(memory_format=self.format)
        size = like.numel()
        self._all = torch.full((size + 2 * self.BORDER,), self.SENTINEL, dtype=self.dtype)
        self._all[self.BORDER : self.BORDER + size] = self.fill
        self.tensor = self._all.as_strided(self.shape, like.stride(), self.BORDER)

    def check(self, what: str) -> None:
        """Fail where a write went beyond the tensor."""
        for side in (self._all[: self.BORDER], self._all[len(self._all) - self.BORDER :]):
            if not bool((side == self.SENTINEL).all()):
                raise AssertionError(f"{what}: written outside its memory")


@dataclass
class Inputs:
    """All arguments of a walk through a table; a subset of the batch by `take`."""

    x: torch.Tensor
    outputs: list[torch.Tensor]
    unconds: list[torch.Tensor]
    variance: torch.Tensor
    seeds: torch.Tensor
    guidance: float | torch.Tensor = 1.0
    clip: float | torch.Tensor | None = None
    scale: torch.Tensor | None = None

    def take(self, index: torch.Tensor) -> Inputs:
        def part(t: torch.Tensor) -> torch.Tensor:
            return t[index]

        return Inputs(
            part(self.x),
            [part(t) for t in self.outputs],
            [part(t) for t in self.unconds],
            part(self.variance),
            part(self.seeds),
            part(self.guidance) if isinstance(self.guidance, torch.Tensor) else self.guidance,
            part(self.clip) if isinstance(self.clip, torch.Tensor) else self.clip,
            None if self.scale is None else part(self.scale),
        )


def random_inputs(
    rng: np.random.Generator,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    fmt: Format = torch.contiguous_format,
    guidance: float | torch.Tensor = 2.5,
    clip: float | torch.Tensor | None = None,
) -> Inputs:
    """Inputs for a batch of ``shape``; weights that differ by sample bring a scale."""

    def normal(kind: torch.dtype) -> torch.Tensor:
        t = torch.from_numpy(rng.standard_normal(shape)).to(kind)
        return t.contiguous(memory_format=fmt)

    scale = None
    if isinstance(guidance, torch.Tensor):
        scale = torch.from_numpy(rng.uniform(0.5, 1.5, shape[0])).float()
    seeds = [int(s) for s in rng.integers(0, 2**64, shape[0], dtype=np.uint64)]
    return Inputs(
        normal(torch.float32),
        [normal(dtype) for _ in range(ROWS)],
        [normal(dtype) for _ in range(ROWS)],
        normal(dtype),
        fastdiff.ops.as_seeds(seeds),
        guidance,
        clip,
        scale,
    )


def walk(
    table: StepTable,
    inputs: Inputs,
    *,
    in_place: bool = False,
    rows: range | None = None,
    state_dtype: torch.dtype = torch.float32,
) -> dict[str, torch.Tensor]:
    """Run the rows in order; every output starts as NaN between sentinels.

    Returns:
        x, y, model_input, and the history slots that a row pushed into.
    """
    fmt = torch.contiguous_format
    if not inputs.x.is_contiguous():
        fmt = torch.channels_last if inputs.x.dim() == 4 else torch.channels_last_3d
    shape, kind = tuple(inputs.x.shape), inputs.outputs[0].dtype
    state = [Guard(shape, fmt, state_dtype) for _ in range(2)]
    y, slots = Guard(shape, fmt, state_dtype), max(1, table.depth)
    # slots as the tensor dimension that `Guard` cannot order: stack them by hand
    history = torch.full((slots, inputs.x.numel() + 3), float("nan"), dtype=state_dtype)
    ring = history.as_strided((slots, *shape), (history.stride(0), *y.tensor.stride()), 0)
    model_input = Guard(shape, fmt, kind)
    state[0].tensor.copy_(inputs.x)
    now = 0
    for i in range(len(table)) if rows is None else rows:
        source = state[now].tensor
        if not in_place:
            now = 1 - now
        reverse_step(
            source,
            inputs.outputs[i] if table.rows[i].evaluates else None,
            table,
            i,
            uncond=inputs.unconds[i],
            guidance=inputs.guidance,
            scale=inputs.scale,
            clip=inputs.clip,
            variance=inputs.variance,
            y=y.tensor,
            history=ring,
            seeds=inputs.seeds,
            out=state[now].tensor,
            model_input=model_input.tensor,
        )
    for guard, name in ((state[0], "x"), (state[1], "out"), (y, "y"), (model_input, "model_input")):
        guard.check(name)
    if not bool(history[:, inputs.x.numel() :].isnan().all()):
        raise AssertionError("history: written outside its memory")
    return {
        "x": state[now].tensor,
        "y": y.tensor,
        "history": ring,
        "model_input": model_input.tensor,
    }


# of three samples that walk a table each at its own row; a row that another needs is passed by
MIXED_ROWS = ([1, 3, 5], [2, 4, 0], [6, 3, 3], [3, 3, 3])


def mixed(table: StepTable, inputs: Inputs, rows: list[int]) -> dict[str, torch.Tensor]:
    """One step with a row of the table for each sample.

    What a row does not write stays NaN, or what it was.
    """
    order = (0, *range(2, inputs.x.dim()), 1)
    plain = inputs.x.is_contiguous()
    given = torch.stack([t.float() for t in inputs.unconds[: table.depth]])
    if not plain:
        last = torch.stack([t.permute(order).contiguous() for t in given])
        given = last.permute(0, 1, last.dim() - 1, *range(2, last.dim() - 1))
    state = {
        "out": torch.full_like(inputs.x, float("nan")),
        "y": inputs.variance.float() * 0.5,
        "history": given,
        "model_input": torch.full_like(inputs.outputs[0], float("nan")),
    }
    reverse_step(
        inputs.x,
        inputs.outputs[0],
        table,
        torch.tensor(rows),
        uncond=inputs.unconds[4],
        guidance=inputs.guidance,
        scale=inputs.scale,
        clip=inputs.clip,
        variance=inputs.variance,
        seeds=inputs.seeds,
        **state,
    )
    return state
