"""The only loop of the library: it walks the rows of a `StepTable`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff._evaluation import Evaluation, conditions
from fastdiff._graph_loop import GraphLoop, require_cuda
from fastdiff._guidance import Guidance, Weights, check_number
from fastdiff._loop import Loop, Start
from fastdiff._sample_step import SampleStep
from fastdiff._state import Model, first_parameter, layout
from fastdiff.ops._layout import memory_format
from fastdiff.ops.noise import Stream, as_seeds, randn
from fastdiff.path_noise import PathNoise
from fastdiff.table import StepTable
from fastdiff.thresholding import Thresholding

__all__ = ["MODES", "SampleStep", "Sampler"]

MODES = ("eager", "compile", "graph")


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
        mode: "eager"; "compile": the model through ``torch.compile(fullgraph=True)``, one graph for
            all rows, whose sums may round otherwise than the model's own; "graph": on a CUDA
            device, one captured step that is replayed for each row, with the row's number, the
            table, the times and the seeds in device memory. It is captured again where the shape
            or dtype of the state or of a condition changes or the model's weights lie in other
            memory, memory is kept between calls, and a call while another runs is a RuntimeError.
            The model must be one that a CUDA graph can hold: no look at a value from Python, no
            memory of earlier calls.
        unroll: in mode "graph", capture all rows as one graph: a launch a run, rows compiled each
            to its own terms; without callback and `iter`.
        batched: conditional and unconditional in one model call of 2N samples, or in two calls, as
            also where ``cond`` and ``uncond`` differ in more than the entries of their tensors.
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
        unroll: bool = False,
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
        if mode not in MODES:
            raise ValueError(f"Sampler: mode must be one of {', '.join(MODES)}, got {mode!r}")
        if unroll and mode != "graph":
            raise ValueError(f"Sampler: unroll must be False in mode {mode!r}, got {unroll}")
        if noise not in ("counter", "brownian"):
            raise ValueError(f"Sampler: noise must be 'counter' or 'brownian', got {noise!r}")
        if thresholding is not None and clip is not None:
            raise ValueError(f"Sampler: clip must be None with thresholding, got {clip}")
        if not (guide_model is None or callable(guide_model)):
            raise TypeError(
                f"Sampler: guide_model must be callable, got {type(guide_model).__name__}"
            )
        check_number("clip", clip, optional=True)
        if isinstance(clip, (int, float)) and clip < 0:
            raise ValueError(f"Sampler: clip must not be negative, got {clip}")
        path = PathNoise(table) if noise == "brownian" else None
        rows = table if path is None else path.table
        threshold = None if thresholding is None else Thresholding(rows, thresholding)
        first = first_parameter(model)
        self.model, self.table, self.batched = model, table, batched
        self.guidance, self.clip = guidance, clip
        self.guide_model, self.mode = guide_model, mode
        self.dtype = dtype or (first.dtype if first is not None else torch.float32)
        if device is None and first is not None:
            device = first.device
        self.device = None if device is None else torch.device(device)
        self._layout = layout(model)
        self._guidance = Guidance(table, guidance, guidance_interval, guidance_rescale)
        self._loop = Loop(
            rows if threshold is None else threshold.table,
            Evaluation(model, guide_model, batched, mode == "compile"),
            clip,
            threshold,
            path,
            self.dtype,
        )
        self._graphs = GraphLoop(self._loop, unroll) if mode == "graph" else None
        if self._graphs is not None and self.device is not None:
            require_cuda(self.device)

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
        cond, uncond = dict(cond or {}), dict(uncond or {})
        if self.guide_model is not None:
            uncond = uncond or cond
        x, seed_tensor = self._initial(shape, noise, seeds, cond)
        if self._graphs is not None:
            require_cuda(x.device)
        guidance = self._guidance.rows(x.device)
        calls = any(g.calls for g in guidance)
        if calls and not uncond and self.guide_model is None:
            raise ValueError(
                f"Sampler: uncond must be given for guidance {self.guidance}, got nothing"
            )
        joined = calls and self._loop.evaluation.joins
        given = conditions(cond, uncond, len(x), x.device, joined)
        start = Start(x, seed_tensor, given, guidance)
        if self._graphs is not None and x.numel():
            yield from self._graphs.steps(start, keep)
        else:
            yield from self._loop.steps(start, self._loop.memory(x), keep)

    def _initial(
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
            if memory_format(x) is None:  # which the rows would copy every time
                x = x.contiguous()
        else:
            assert shape is not None  # the first check
            device = self.device or torch.device("cpu")
            x = randn(values, shape, stream=Stream.INITIAL, device=device)
            x *= self.table.init_sigma
            if x.dim() == 4:
                x = x.contiguous(memory_format=self._layout)
        return x, values.to(device)
