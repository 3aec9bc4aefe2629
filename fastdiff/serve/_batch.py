"""The running batch: each image at its own row of its own table, all of them in one model call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff._evaluation import has_variance
from fastdiff._packing import Packing
from fastdiff.ops.guidance_rescale import guidance_rescale
from fastdiff.ops.noise import Stream, randn
from fastdiff.ops.reverse_step import reverse_step
from fastdiff.serve.request import Plan
from fastdiff.serve.sizes import FixedSizes
from fastdiff.table import HISTORY_SLOTS


class Sample:
    """An image of a plan.

    Args:
        plan: of its request.
        index: which of the plan's images.
        owner: whatever the caller wants to find again.

    Attributes:
        row: the row that comes next.
    """

    def __init__(self, plan: Plan, index: int, owner: Any = None) -> None:
        self.plan, self.index, self.owner, self.row = plan, index, owner, 0

    @property
    def done(self) -> bool:
        return self.row == len(self.plan.table)

    @property
    def evaluates(self) -> bool:
        """Whether a model call comes next."""
        return not self.done and self.plan.table.rows[self.row].evaluates

    @property
    def calls(self) -> bool:
        """Whether the next row wants the unconditional output."""
        return self.plan.calls[self.row]


class _Rows(Packing):
    """The rows at which the samples of a batch stand, one each."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        at = [(s.plan.table, s.row) for s in samples]
        self.floats = np.stack([table.floats[row] for table, row in at])
        self.ints = np.stack([table.ints[row] for table, row in at])
        self.needs = tuple(table.needs[row] for table, row in at)
        self._packed = {}


class Batch:
    """Samples that run together and come and go at any step; not thread-safe.

    All memory that outlasts a step is taken here, at the start.

    Args:
        model: with sizes in which it gives a sample the same bits.
        shape: of one image.
        slots: samples at a time.
        null: arguments of the model, one sample's, of which the shapes and dtypes are taken.
        dtype: of the model input.
        device: of the state.
    """

    def __init__(
        self,
        model: FixedSizes,
        shape: Sequence[int],
        slots: int,
        null: Mapping[str, Tensor],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.model, self.shape, self.slots, self.device = model, tuple(shape), slots, device
        self.samples: list[Sample] = []  # at the places 0, 1, ...

        def states(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(*size, dtype=dtype, device=device)

        self._x, self._y = states(slots, *shape), states(slots, *shape)
        self._history = states(HISTORY_SLOTS, slots, *shape)
        self._input = states(slots, *shape, dtype=dtype)
        self._seeds = states(slots, dtype=torch.int64)
        self._places = torch.arange(slots, device=device)
        # what a model call is told of a sample, with condition and without
        self._told = [
            {k: states(slots, *v.shape, dtype=v.dtype) for k, v in null.items()} for _ in range(2)
        ]

    def __len__(self) -> int:
        return len(self.samples)

    def add(self, sample: Sample) -> None:
        """Start a sample; there must be a slot for it."""
        place, plan = len(self.samples), sample.plan
        seed = plan.seeds[sample.index : sample.index + 1]
        x = randn(seed, self.shape, stream=Stream.INITIAL, device=self.device)
        x *= plan.table.init_sigma
        self._x[place] = x[0]
        self._input[place].copy_(plan.table.rows[0].c_in * x[0])
        self._seeds[place] = seed[0]
        for told, given in zip(self._told, (plan.cond, plan.uncond), strict=True):
            for key, value in given.items():
                told[key][place] = value[sample.index]
        self.samples.append(sample)

    def image(self, sample: Sample) -> Tensor:
        """(*S) state of a sample, to be copied before the next step."""
        return self._x[self.samples.index(sample)]

    def drop(self, sample: Sample) -> None:
        """End a sample; the last one takes its place."""
        place, last = self.samples.index(sample), len(self.samples) - 1
        if place != last:
            single = (self._x, self._y, self._input, self._seeds)
            every = (*single, *self._history, *(v for told in self._told for v in told.values()))
            for state in every:
                state[place] = state[last]
            self.samples[place] = self.samples[last]
        self.samples.pop()

    def step(self) -> list[tuple[Sample, Exception]]:
        """One model evaluation of every sample that is not done.

        Returns:
            the samples for which the model failed, with its reason; they are where they were.
        """
        # rows without a model call do not wait for those with one
        while idle := [i for i, s in enumerate(self.samples) if not (s.done or s.evaluates)]:
            self._advance(idle)
        failed: list[tuple[Sample, Exception]] = []
        places = [i for i, s in enumerate(self.samples) if s.evaluates]
        if places:
            self._evaluate(places, failed)
        return failed

    def _evaluate(self, places: list[int], failed: list[tuple[Sample, Exception]]) -> None:
        """Call the model for these places and step them; each alone where they fail together."""
        try:
            outputs = self._call(places)
        except Exception as error:
            if len(places) == 1:
                failed.append((self.samples[places[0]], error))
                return
            for i in places:
                self._evaluate([i], failed)
        else:
            self._advance(places, *outputs)

    def _call(self, places: list[int]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Conditional output, unconditional output where anybody wants one, variance if there."""
        samples = [self.samples[i] for i in places]
        guided = [k for k, s in enumerate(samples) if s.calls]
        every = [*samples, *(samples[k] for k in guided)]
        n, t = len(places), self._tensor([s.plan.table.rows[s.row].time for s in every])
        take = self._tensor([*places, *(places[k] for k in guided)], torch.int64)
        conditional, unconditional = self._told
        told = {
            key: torch.cat([conditional[key][take[:n]], unconditional[key][take[n:]]])
            for key in conditional
        }
        x, variance, other = self._input[take], None, None
        with torch.no_grad():
            output = self.model(x, t, **told)
        if has_variance(output, x):
            output, variance = output.chunk(2, dim=1)
            variance = variance[:n]
        if output.shape != x.shape:
            raise ValueError(
                f"Engine: model must return {tuple(x.shape)}, got {tuple(output.shape)}"
            )
        cond = output[:n]
        if guided:
            other = cond.clone()  # of weight 1, and so not read, where there is no other
            other[self._tensor(guided, torch.int64)] = output[n:]
        return cond, other, variance

    def _advance(
        self,
        places: list[int],
        cond: Tensor | None = None,
        uncond: Tensor | None = None,
        variance: Tensor | None = None,
    ) -> None:
        """The samples at these places run their rows."""
        samples = [self.samples[i] for i in places]
        n, at = len(places), self._tensor(places, torch.int64)
        states = (self._x, self._y, self._input)
        whole = n == len(self.samples)
        x, y, given = (state[:n] if whole else state[at] for state in states)
        history = self._history[:, :n] if whole else self._history[:, at]
        weights = self._tensor([s.plan.weights[s.row] for s in samples])
        clips = [s.plan.clip for s in samples]
        reverse_step(
            x,
            cond,
            _Rows(samples),
            self._places[:n],
            uncond=uncond,
            guidance=weights,
            scale=_scale(samples, cond, uncond, weights),
            clip=self._tensor(clips) if max(clips) >= 0 else None,
            variance=variance,
            y=y,
            history=history,
            seeds=self._seeds[at],
            out=x,
            model_input=given,
        )
        if not whole:
            for state, value in zip(states, (x, y, given), strict=True):
                state[at] = value
            self._history[:, at] = history
        for sample in samples:
            sample.row += 1

    def _tensor(self, values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)


def _scale(
    samples: Sequence[Sample], cond: Tensor | None, uncond: Tensor | None, weights: Tensor
) -> Tensor | None:
    """(N,) factors of rescaled guidance; None: nobody asked for it."""
    phis = [s.plan.phis[s.row] for s in samples]
    if cond is None or uncond is None or not any(phis):
        return None
    phi = torch.tensor(phis, dtype=torch.float32, device=cond.device)
    mine = phi > 0  # of the others, the factor is 1 whatever their outputs hold
    scale = torch.ones_like(phi)
    scale[mine] = guidance_rescale(cond[mine], uncond[mine], weights[mine], phi[mine])
    return scale
