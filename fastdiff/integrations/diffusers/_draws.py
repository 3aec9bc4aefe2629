"""The noise of a step that comes as tensors, and the seeds of that which does not."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.integrations.diffusers._answers import Answer
from fastdiff.integrations.diffusers._moves import Move
from fastdiff.integrations.diffusers._noise import (
    CounterPath,
    brownian_tree,
    drawn,
    initial_seeds,
    seeds_of,
)
from fastdiff.integrations.diffusers._plan import Runtime
from fastdiff.integrations.diffusers._trace import NOISE
from fastdiff.ops.noise import Stream, randn


class Call(NamedTuple):
    """The arguments of one step."""

    model_output: Tensor
    timestep: Any
    sample: Tensor
    generator: Any
    options: dict[str, Any]  # numbers
    given: dict[str, Tensor]  # tensors like the sample
    learned: bool | None  # the model output carries a variance; None: its shape is another's
    key: tuple[Any, ...]

    def theirs(self, names: tuple[str, ...], return_dict: bool) -> dict[str, Any]:
        """The keyword arguments of diffusers' own step."""
        more = {"generator": self.generator} if "generator" in names else {}
        return {**self.options, **self.given, **more, "return_dict": return_dict}


class Draws:
    """The part of a drop-in that draws noise."""

    _fastdiff: Runtime
    config: Any

    def _seeds(self, generator: Any, x: Tensor) -> Tensor:
        """(N,) seeds of the samples, the same in every step of a run."""
        runtime = self._fastdiff
        # by number: a generator, or a list of them, may be seeded anew for the next picture
        of = (initial_seeds(generator), len(x), x.device)
        if runtime.seeds is None or runtime.seeds[0] != of:
            runtime.seeds = of, seeds_of(of[0], len(x)).to(x.device)
        return runtime.seeds[1]

    def _draw(
        self,
        tensors: dict[str, Tensor],
        move: Move,
        call: Call,
        answer: Answer | None,
        variance: Tensor | None,
    ) -> None:
        """Add the noise that comes as tensors."""
        like = call.model_output if variance is None else variance
        for k in range(move.draws):
            if move.spanned:
                assert answer is not None
                noise = self._sampler(call)(*answer.spans[k]).to(like.device)
            elif move.counter is not None:
                seeds, at = self._seeds(call.generator, like), len(NOISE) * move.counter + k
                noise = randn(
                    seeds, like.shape[1:], step=at, stream=Stream.STEP, device=like.device,
                    dtype=torch.float32 if answer is None else answer.noise[k],
                )  # fmt: skip
            else:
                dtype = torch.float32 if answer is None else answer.noise[k]
                noise = drawn(like, call.generator, dtype)
            if move.scaled is not None and variance is not None:
                scale, shift = move.scaled
                noise = noise * torch.exp(scale * variance.float() + shift)
            tensors[NOISE[k]] = noise

    def _sampler(self, call: Call) -> Any:
        """The noise sampler, made at its first use as diffusers does."""
        if self.__dict__["noise_sampler"] is None:
            if self.config.get("noise") == "counter":
                made: Any = CounterPath(self._seeds(call.generator, call.sample), call.sample)
            else:
                made = brownian_tree(self, call.generator, call.sample, call.model_output)
            self.noise_sampler = made
        return self.noise_sampler
