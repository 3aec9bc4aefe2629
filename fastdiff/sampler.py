"""The only loop of the library: it walks the rows of a `StepTable`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff._guidance import Guidance, RowGuidance, Weights, check_number
from fastdiff.ops.noise import Stream, as_seeds, randn
from fastdiff.ops.reverse_step import reverse_step
from fastdiff.path_noise import PathNoise
from fastdiff.reference.reverse_step import guide
from fastdiff.solvers._walk import Point, x0_conversion
from fastdiff.table import StepTable
from fastdiff.thresholding import Thresholding

Model = Callable[..., Tensor]


class _Evaluated(NamedTuple):
    """What a model call gave, and what was made of it."""

    before: Tensor
    output: Tensor
    uncond: Tensor | None
    weight: float | Tensor
    scale: Tensor | None
    clip: float | Tensor | None


class SampleStep:
    """What one row did.

    Attributes:
        index: row of the table.
        time: model time at which the row evaluated, NaN for a row without a model call.
        sigma: noise scale of the state before the row.
        x: (N, *S) state after the row.
    """

    def __init__(
        self,
        table: StepTable,
        index: int,
        x: Tensor,
        evaluated: _Evaluated | None,
    ) -> None:
        row = table.rows[index]
        self.index, self.time, self.sigma, self.x = index, row.time, row.sigma, x
        self._table, self._evaluated = table, evaluated

    @property
    def denoised(self) -> Tensor | None:
        """(N, *S) predicted clean data x0 at this row, computed when asked for; None without a
        model call."""
        if self._evaluated is None:
            return None
        before, output, uncond, weight, scale, clip = self._evaluated
        row = self._table.rows[self.index]
        m = output.to(before.dtype)
        if uncond is not None:
            m = guide(m, uncond.to(before.dtype), _column(weight, m))
        if scale is not None:
            m = _column(scale, m) * m
        at = Point(row.time, row.alpha, row.sigma)
        p, q = x0_conversion(self._table.prediction, at, self._table.sigma_data)
        x0 = p * before + q * m
        if clip is None:
            return x0
        bound = _column(clip, x0)
        if not isinstance(bound, Tensor):
            return x0.clamp(-bound, bound)
        return torch.where(bound < 0, x0, x0.clamp(-bound.abs(), bound.abs()))


def _column(value: float | Tensor, like: Tensor) -> float | Tensor:
    """One value a sample, shaped to broadcast over the sample."""
    if isinstance(value, Tensor):
        return value.to(like.device, like.dtype).view(-1, *[1] * (like.dim() - 1))
    return value


class Sampler:
    """Runs a model through the rows of a table.

    Args:
        model: ``model(x, t, **cond)`` with x (N, *S) in the model's dtype and t (N,) float32 as
            the schedule counts time; returns (N, *S), or (N, 2C, ...) where it also predicts a
            variance, which a table of learned variance reads and any other drops.
        table: from ``solvers.build``.
        guidance: weight w of classifier-free guidance ``u + w (c - u)`` (Ho and Salimans 2022,
            arXiv:2207.12598): a number, an (N,) tensor, a list or tuple of these with one a row,
            or a function of (index of the row, its sigma / alpha) that returns one; None: the
            conditional output alone. A row of weight 1 calls the model once.
        guidance_interval: (low, high): the weight is 1 but where low < sigma / alpha <= high
            (Kynkaanniemi et al. 2024, arXiv:2404.07724); None: everywhere.
        guidance_rescale: phi in [0, 1] of rescaled guidance, a number or (N,) tensor: the guided
            output is multiplied by ``phi std(c) / std(guided) + 1 - phi``, deviations over a
            sample (Lin et al. 2023, arXiv:2305.08891, section 3.4); None: not.
        guide_model: gives the unconditional output in place of ``model``, called like it with
            ``uncond``, or ``cond`` where that is not given: autoguidance, by a smaller or less
            trained model (Karras et al. 2024, arXiv:2406.02507).
        clip: bound of the converted prediction, a number or (N,) tensor; None: no clipping.
        thresholding: ratio of dynamic thresholding, 0.995 in the paper (Saharia et al. 2022), or
            (ratio, largest quantile): x0 is limited to a quantile of its own sample and divided by
            it (`ops.dynamic_threshold`); instead of ``clip``.
        noise: "counter" draws each row's noise anew; "brownian" takes it from one path a seed
            (`fastdiff.path_noise`), so that the picture stays the same when the steps change.
        mode: "eager".
        batched: conditional and unconditional in one model call of 2N samples, or in two calls.
        dtype: of the model input; None: of the model's first floating-point parameter, float32
            for a plain function.
        device: of the state; None: of the model's first parameter, or of the noise.

    Raises:
        TypeError, ValueError: an argument breaks its rule.
    """

    def __init__(
        self,
        model: Model,
        table: StepTable,
        *,
        guidance: Weights = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance_rescale: float | Tensor | None = None,
        guide_model: Model | None = None,
        clip: float | Tensor | None = None,
        thresholding: float | tuple[float, float] | None = None,
        noise: str = "counter",
        mode: str = "eager",
        batched: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if not callable(model):
            raise TypeError(f"Sampler: model must be callable, got {type(model).__name__}")
        if not isinstance(table, StepTable):
            raise TypeError(f"Sampler: table must be a StepTable, got {type(table).__name__}")
        if len(table.starts) > 1:
            raise ValueError(
                f"Sampler: table must be one solver's, got {len(table.starts)} joined ones"
            )
        if mode != "eager":
            raise ValueError(f"Sampler: mode must be 'eager', got {mode!r}")
        if noise not in ("counter", "brownian"):
            raise ValueError(f"Sampler: noise must be 'counter' or 'brownian', got {noise!r}")
        if thresholding is not None and clip is not None:
            raise ValueError(f"Sampler: clip must be None with thresholding, got {clip}")
        self._path = PathNoise(table) if noise == "brownian" else None
        rows = table if self._path is None else self._path.table
        self._threshold = None if thresholding is None else Thresholding(rows, thresholding)
        self._rows = rows if self._threshold is None else self._threshold.table
        if not (guide_model is None or callable(guide_model)):
            raise TypeError(
                f"Sampler: guide_model must be callable, got {type(guide_model).__name__}"
            )
        check_number("clip", clip)
        if isinstance(clip, (int, float)) and clip < 0:
            raise ValueError(f"Sampler: clip must not be negative, got {clip}")
        first = first_parameter(model)
        self.model, self.table, self.batched = model, table, batched
        self.guidance, self.clip = guidance, clip
        self.guide_model = guide_model
        self._guidance = Guidance(table, guidance, guidance_interval, guidance_rescale)
        self.dtype = dtype or (first.dtype if first is not None else torch.float32)
        if device is None and first is not None:
            device = first.device
        self.device = None if device is None else torch.device(device)

    def __call__(
        self,
        shape: Sequence[int] | None = None,
        *,
        noise: Tensor | None = None,
        seeds: Any = 0,
        cond: Mapping[str, Any] | None = None,
        uncond: Mapping[str, Any] | None = None,
        callback: Callable[[SampleStep], None] | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Samples of the model.

        Args:
            shape: shape of one sample; or give ``noise``.
            noise: (N, *S) unit-variance initial noise, instead of the seeds' own.
            seeds: int s for s, s+1, ..., a sequence of ints, or an (N,) int64 tensor. Image i
                depends on seed i alone. For an int, N is that of the noise or of the first tensor
                in ``cond``, else 1.
            cond: keyword arguments of the model; tensors with one entry a sample.
            uncond: the same for the unconditional output, needed for guidance.
            callback: called with the `SampleStep` of every row.
            progress: show a progress bar.

        Returns:
            (N, *S) float32.

        Raises:
            TypeError, ValueError: an argument breaks its rule.
        """
        steps = self._walk(shape, noise, seeds, cond, uncond, keep=callback is not None)
        if progress:
            from tqdm import tqdm

            steps = tqdm(steps, total=len(self.table), desc=self.table.name, unit="step")
        for step in steps:
            if callback is not None:
                callback(step)
        return step.x

    def iter(
        self,
        shape: Sequence[int] | None = None,
        *,
        noise: Tensor | None = None,
        seeds: Any = 0,
        cond: Mapping[str, Any] | None = None,
        uncond: Mapping[str, Any] | None = None,
    ) -> Iterator[SampleStep]:
        """Yields a `SampleStep` a row; the last one's ``x`` is what the call would return."""
        return self._walk(shape, noise, seeds, cond, uncond, keep=True)

    def _walk(
        self,
        shape: Sequence[int] | None,
        noise: Tensor | None,
        seeds: Any,
        cond: Mapping[str, Any] | None,
        uncond: Mapping[str, Any] | None,
        keep: bool,
    ) -> Iterator[SampleStep]:
        table = self.table
        cond, uncond = dict(cond or {}), dict(uncond or {})
        if self.guide_model is not None:
            uncond = uncond or cond
        x, seed_tensor = self._start(shape, noise, seeds, cond)
        n, device = len(x), x.device
        guidance = self._guidance.rows(device)
        if not uncond and self.guide_model is None and any(g.calls for g in guidance):
            raise ValueError(
                f"Sampler: uncond must be given for guidance {self.guidance}, got nothing"
            )
        cond, uncond = _on_device(cond, n, device), _on_device(uncond, n, device)
        times = torch.tensor(table.times, dtype=torch.float32, device=device)
        history = _slots(table.depth, x)
        y = torch.empty_like(x) if table.anchored else None
        spare = torch.empty_like(x)
        # the model input is the state itself where nothing would change but the name
        first_scale = table.rows[0].c_in
        separate = self.dtype != x.dtype or any(row.c_in != 1.0 for row in table.rows)
        model_input = torch.empty_like(x, dtype=self.dtype) if separate else None
        if model_input is not None:
            model_input.copy_(first_scale * x)
        for i, row in enumerate(table.rows):
            output = other = variance = scale = None
            if row.evaluates:
                given = x if model_input is None else model_input
                with torch.no_grad():
                    output, other = self._evaluate(given, times[i], cond, uncond, guidance[i])
                    if _has_variance(output, x):
                        output, variance = output.chunk(2, dim=1)
                    if other is not None and _has_variance(other, x):
                        other = other.chunk(2, dim=1)[0]
                    scale = guidance[i].scale(output, other)
            before, weight = x, guidance[i].weight
            if self._threshold is not None and output is not None:
                output = self._threshold.x0(i, before, output, other, weight, scale)
                other, weight, scale = None, 1.0, None
                variance = None if variance is None else variance.to(output.dtype)
            x = reverse_step(
                before,
                output,
                self._rows,
                i,
                uncond=other,
                guidance=weight,
                scale=scale,
                clip=self.clip,
                variance=variance,
                y=y,
                history=history,
                seeds=seed_tensor,
                out=None if keep else spare,
                model_input=model_input,
            )
            if self._path is not None:
                self._path.add(i, x, y, seed_tensor, model_input)
            spare = before
            evaluated = None
            if output is not None:
                evaluated = _Evaluated(before, output, other, weight, scale, self.clip)
            yield SampleStep(self._rows, i, x, evaluated)

    def _start(
        self,
        shape: Sequence[int] | None,
        noise: Tensor | None,
        seeds: Any,
        cond: Mapping[str, Any],
    ) -> tuple[Tensor, Tensor]:
        """The initial state and the seeds, on the device of the state."""
        if (shape is None) == (noise is None):
            raise ValueError("Sampler: shape or noise must be given, and not both")
        count = None
        if noise is not None:
            if not isinstance(noise, Tensor) or not noise.is_floating_point() or noise.dim() < 1:
                raise TypeError(f"Sampler: noise must be a floating-point tensor, got {noise!r}")
            count = noise.shape[0]
        elif isinstance(seeds, int):
            batches = [v.shape[0] for v in cond.values() if isinstance(v, Tensor) and v.dim() > 0]
            count = batches[0] if batches else 1
        values = as_seeds(seeds, count, where="Sampler")
        if noise is not None:
            device = self.device or noise.device
            x = noise.to(device, torch.float32) * self.table.init_sigma
        else:
            assert shape is not None  # the first check
            device = self.device or torch.device("cpu")
            x = randn(values, shape, stream=Stream.INITIAL, device=device)
            x *= self.table.init_sigma
        return x, values.to(device)

    def _evaluate(
        self,
        x: Tensor,
        time: Tensor,
        cond: Mapping[str, Any],
        uncond: Mapping[str, Any],
        guidance: RowGuidance,
    ) -> tuple[Tensor, Tensor | None]:
        """The conditional and, for guidance, the unconditional output."""
        n = len(x)
        if not guidance.calls:
            return self.model(x, time.expand(n), **cond), None
        if self.guide_model is not None or not self.batched:
            t, second = time.expand(n), self.guide_model or self.model
            return self.model(x, t, **cond), second(x, t, **uncond)
        both = {
            k: torch.cat([v, uncond[k]]) if isinstance(v, Tensor) and v.dim() > 0 else v
            for k, v in cond.items()
        }
        output = self.model(torch.cat([x, x]), time.expand(2 * n), **both)
        return output[:n], output[n:]


def _has_variance(output: Tensor, x: Tensor) -> bool:
    return x.dim() > 1 and output.shape == (x.shape[0], 2 * x.shape[1], *x.shape[2:])


def first_parameter(model: Model) -> Tensor | None:
    """The parameter whose dtype and device are taken for the model's; None for a function."""
    if not isinstance(model, torch.nn.Module):
        return None
    return next((p for p in model.parameters() if p.is_floating_point()), None)


def _on_device(kwargs: Mapping[str, Any], n: int, device: torch.device) -> dict[str, Any]:
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in kwargs.items()}
    for k, v in moved.items():
        if isinstance(v, Tensor) and v.dim() > 0 and v.shape[0] != n:
            raise ValueError(
                f"Sampler: {k} must have one entry a sample ({n}), got {tuple(v.shape)}"
            )
    return moved


def _slots(depth: int, x: Tensor) -> Tensor | None:
    """History slots, each in the memory order of x."""
    if depth == 0:
        return None
    if x.is_contiguous():
        return torch.empty((depth, *x.shape), dtype=x.dtype, device=x.device)
    return torch.stack([torch.empty_like(x)] * depth)
