"""The loop over the rows of a table, and the memory that it runs in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff._evaluation import Conditions, Evaluation
from fastdiff._guidance import RowGuidance, Weight
from fastdiff._sample_step import Evaluated, SampleStep
from fastdiff._state import history_slots
from fastdiff.ops.reverse_step import reverse_step
from fastdiff.path_noise import PathNoise
from fastdiff.table import StepTable
from fastdiff.thresholding import Thresholding


class Start(NamedTuple):
    """What a run begins with, on the device of the state."""

    x: Tensor
    seeds: Tensor
    conditions: Conditions
    guidance: list[RowGuidance]


class Memory(NamedTuple):
    """What a run writes, but for the state itself."""

    times: Tensor  # (rows,) float32
    y: Tensor | None
    history: Tensor | None
    spare: Tensor
    model_input: Tensor | None  # None where the state is the model's input as it is


@dataclass(frozen=True)
class Loop:
    """The rows and all that stays the same from run to run."""

    rows: StepTable
    evaluation: Evaluation
    clip: Weight | None
    threshold: Thresholding | None
    path: PathNoise | None
    dtype: torch.dtype

    def memory(self, x: Tensor) -> Memory:
        """Memory for a run from the state x."""
        rows = self.rows.rows
        # the model input is the state itself where nothing would change but the name
        separate = self.dtype != x.dtype or any(row.c_in != 1.0 for row in rows)
        return Memory(
            times=torch.tensor(self.rows.times, dtype=torch.float32, device=x.device),
            y=torch.empty_like(x) if self.rows.anchored else None,
            history=history_slots(self.rows.depth, x),
            spare=torch.empty_like(x),
            model_input=torch.empty_like(x, dtype=self.dtype) if separate else None,
        )

    def steps(self, start: Start, memory: Memory, keep: bool) -> Iterator[SampleStep]:
        """Every row in turn; the state of a step lives on where ``keep``, else `start.x` and
        `memory.spare` take turns."""
        x, spare = start.x, memory.spare
        n, model_input = len(x), memory.model_input
        if model_input is not None:
            model_input.copy_(self.rows.rows[0].c_in * x)
        for i, row in enumerate(self.rows.rows):
            guidance = start.guidance[i]
            output = other = variance = scale = None
            if row.evaluates:
                given = x if model_input is None else model_input
                count = self.evaluation.count(n, guidance, start.conditions)
                times = memory.times[i].expand(count)
                with torch.no_grad():
                    output, other, variance = self.evaluation(
                        given, times, start.conditions, guidance
                    )
                    scale = guidance.scale(output, other)
            before, weight = x, guidance.weight
            if self.threshold is not None and output is not None:
                output = self.threshold.x0(i, before, output, other, weight, scale)
                other, weight, scale = None, 1.0, None
                variance = None if variance is None else variance.to(output.dtype)
            x = reverse_step(
                before,
                output,
                self.rows,
                i,
                uncond=other,
                guidance=weight,
                scale=scale,
                clip=self.clip,
                variance=variance,
                y=memory.y,
                history=memory.history,
                seeds=start.seeds,
                out=None if keep else spare,
                model_input=model_input,
            )
            if self.path is not None:
                self.path.add(i, x, memory.y, start.seeds, model_input)
            spare = before
            evaluated = None
            if output is not None:
                evaluated = Evaluated(before, output, other, weight, scale, self.clip)
            yield SampleStep(self.rows, i, x, evaluated)
