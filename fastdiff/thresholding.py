"""Dynamic thresholding inside a sampler: x0, its threshold, and the row that takes it from there.

A row's prediction is affine in x and the model output, but for a factor by sample that is known
only once the whole sample is: so the conversion to x0, with guidance, is a row of its own
(`ops.reverse_step`: one pass), `ops.dynamic_threshold` reads x0 three times and writes it once, and
the solver's row reads it as a model that predicts the sample. No kernel knows of it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from torch import Tensor

from fastdiff.ops.dynamic_threshold import check_numbers, dynamic_threshold
from fastdiff.ops.reverse_step import reverse_step
from fastdiff.table import Row, StepTable


class Thresholding:
    """The rows of a table around dynamic thresholding of x0.

    Args:
        table: of a solver whose rows read x0 (all of `fastdiff.solvers`).
        thresholding: ratio of the quantile, or (ratio, bound of the quantile).

    Attributes:
        table: the same rows for a model output that is x0 already.

    Raises:
        TypeError, ValueError: thresholding breaks its rule, or a row reads the raw output.
    """

    def __init__(self, table: StepTable, thresholding: float | tuple[float, float]) -> None:
        pair = thresholding if isinstance(thresholding, tuple) else (thresholding, math.inf)
        self.ratio, self.max_value = pair
        check_numbers(self.ratio, self.max_value)
        for i, row in enumerate(table.rows):
            read = {**row.x, **(row.y or {})}
            if any(read.get(term, 0.0) != 0.0 for term in ("m", "u")):
                raise ValueError(
                    "Sampler: thresholding must come with a solver whose rows read x0 alone, got "
                    f"row {i} of {table.name}"
                )
        self._to_x0 = StepTable(
            f"x0 of {table.name}",
            tuple(
                Row(x={"x": row.convert[0], "m": row.convert[1]}, time=0.0)
                if row.evaluates
                else Row(x={"x": 1.0}, evaluates=False)
                for row in table.rows
            ),
        )
        rows = tuple(dataclasses.replace(row, convert=(0.0, 1.0)) for row in table.rows)
        self.table = dataclasses.replace(table, rows=rows, prediction="sample")

    def x0(
        self,
        index: int,
        x: Tensor,
        output: Tensor,
        uncond: Tensor | None,
        guidance: Any,
        scale: Tensor | None,
    ) -> Tensor:
        """(N, *S) float32 thresholded x0 of a row that evaluates."""
        x0 = reverse_step(
            x, output, self._to_x0, index, uncond=uncond, guidance=guidance, scale=scale
        )
        return dynamic_threshold(x0, self.ratio, max_value=self.max_value, out=x0)[0]
