"""The steps of guided-diffusion on tables: one pass of `ops.reverse_step`, one more for x0."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff import solvers
from fastdiff._state import first_parameter
from fastdiff.integrations._guided_process import Model, Process
from fastdiff.integrations._torch_noise import randn_like
from fastdiff.ops.noise import Stream, as_seeds, randn
from fastdiff.ops.reverse_step import reverse_step
from fastdiff.solvers._walk import x0_conversion
from fastdiff.table import Row, StepTable


class Call(NamedTuple):
    """What a caller wants done at every step."""

    model: Model
    clip: bool
    denoised_fn: Callable[[Tensor], Tensor] | None
    cond_fn: Model | None
    kwargs: Mapping[str, Any]


class Steps(Process):
    """See `fastdiff.integrations.guided_diffusion.GaussianDiffusion`."""

    def _loop(
        self,
        kind: str,
        eta: float,
        call: Call,
        shape: Sequence[int],
        noise: Tensor | None,
        device: torch.device | str | None,
        progress: bool,
        seeds: Any,
        x0: bool,
    ) -> Iterator[dict[str, Tensor]]:
        """Yields the result of every step, without x0 where it is not wanted."""
        if noise is not None and tuple(noise.shape) != tuple(shape):
            raise ValueError(
                f"GaussianDiffusion: noise must have shape {tuple(shape)}, got {tuple(noise.shape)}"
            )
        if device is None:
            given = first_parameter(call.model) if noise is None else noise
            device = "cpu" if given is None else given.device
        if seeds is not None:
            seeds = as_seeds(seeds, shape[0], where="GaussianDiffusion").to(device)
        if noise is not None:
            x = noise.to(device)
        elif seeds is None:
            x = torch.randn(*shape, device=device)
        else:
            x = randn(seeds, shape[1:], stream=Stream.INITIAL, device=device)
        indices: Iterable[int] = reversed(range(self.num_timesteps))
        if progress:
            from tqdm import tqdm

            indices = tqdm(indices, total=self.num_timesteps)
        for i in indices:
            t = torch.full((len(x),), i, device=device)
            with torch.no_grad():
                out = self._step(kind, eta, call, x, t, seeds, self.num_timesteps - 1 - i, x0)
            yield out
            x = out["sample"]

    def _step(
        self,
        kind: str,
        eta: float,
        call: Call,
        x: Tensor,
        t: Tensor,
        seeds: Any,
        row: int | None = None,
        x0: bool = True,
    ) -> dict[str, Tensor]:
        """One step of each sample from its t; of all from ``row`` of the tables where it is given.

        A hook works on the predicted x0, which is then a tensor of its own, and the step goes on
        from there as that of a model which predicts it.
        """
        rows = self.num_timesteps - 1 - t.long() if row is None else row
        if seeds is not None:
            seeds = as_seeds(seeds, len(x), where="GaussianDiffusion")
        drawn = seeds is None and kind != "reverse"
        given, values = self._evaluate(call.model, x, t, call.kwargs)
        prediction, clip = self.prediction, 1.0 if call.clip else None
        result: dict[str, Tensor] = {}
        # the draws have the peer's order: a cond_fn may draw too
        noise = randn_like(x) if drawn and kind == "ddpm" else None
        pushed = None
        hooked = call.denoised_fn is not None or call.cond_fn is not None
        if x0 or hooked:
            clip_here = clip if call.denoised_fn is None else None
            predicted = reverse_step(
                x, given, self._table("x0", 0.0, prediction, False), rows, clip=clip_here
            )
            if call.denoised_fn is not None:
                predicted = call.denoised_fn(predicted)
                predicted = predicted.clamp(-1, 1) if call.clip else predicted
            if call.cond_fn is not None:
                gradient = call.cond_fn(x, self._timesteps(t), **call.kwargs).to(x.dtype)
                if kind == "ddpm":
                    pushed = self._variance(values, t, x)[0] * gradient
                else:
                    predicted = predicted + self._at(self._score_to_x0, t, x) * gradient
            result["pred_xstart"] = predicted
            if hooked:
                given, prediction, clip = predicted, "sample", None
        if drawn and kind == "ddim":
            noise = randn_like(x)
        table = self._table(kind, eta, prediction, drawn)
        if drawn:
            given = given.to(x.dtype)  # that of the noise, which goes in beside it
            if not any(need.uncond for need in table.needs):
                noise = None
            elif values is not None and kind == "ddpm":
                assert noise is not None  # it is drawn
                noise = (0.5 * self._variance(values, t, x)[1]).exp() * noise
        elif values is not None:
            values = values.to(given.dtype)
        sample = reverse_step(
            x, given, table, rows, uncond=noise, variance=values, seeds=seeds, clip=clip
        )
        result["sample"] = sample if pushed is None else sample + pushed
        return result

    def _table(self, kind: str, eta: float, prediction: str, drawn: bool) -> StepTable:
        """The table of a kind of step, row 0 the noisiest; kept once made.

        ``drawn``: its noise is given by the caller, as the input "u" that guidance by two outputs
        would take, in place of the kernel's own.
        """
        key = (kind, eta, prediction, drawn)
        if key not in self._tables:
            if kind in ("ddpm", "ddim"):
                options = {"variance": self.variance} if kind == "ddpm" else {"eta": eta}
                table = solvers.build(
                    kind, self.schedule, timesteps=self.timestep_map[::-1], prediction=prediction,
                    **options,
                )  # fmt: skip
            else:
                rows = [self._row(kind, i, prediction) for i in reversed(range(len(self._points)))]
                table = StepTable(kind, tuple(rows), prediction=prediction)
            if drawn:
                rows = [_with_given_noise(row) for row in table.rows]
                table = dataclasses.replace(table, rows=tuple(rows))
            self._tables[key] = table
        return self._tables[key]

    def _row(self, kind: str, i: int, prediction: str) -> Row:
        """A row that gives x0, or leads up from point i with the noise that x0 leaves."""
        at = self._points[i]
        x = {"d": 1.0}
        if kind == "reverse":
            above = float(self.alphas_cumprod_next[i])
            gain = math.sqrt(1 - above) / at.sigma
            x = {"x": gain, "d": math.sqrt(above) - at.alpha * gain}
        return Row(
            x=x, time=at.time, alpha=at.alpha, sigma=at.sigma,
            convert=x0_conversion(prediction, at, 1.0),
        )  # fmt: skip


def _with_given_noise(row: Row) -> Row:
    """The row with its noise, unscaled where its variance is learned, in place of "u"."""
    x = {"u" if term == "n1" else term: c for term, c in row.x.items()}
    return dataclasses.replace(row, x=x, draws=(), log_variance=None)
