"""The loop as CUDA graphs: one captured step replayed for every row, or all rows as one graph.

A captured step asks nothing of the host. The number of the row lies in device memory, and the step
reads its coefficients, its time and its weights of guidance by it: the kernels take one row a
sample anyway (a batch may stand at different rows), so here all samples stand at the same one, and
the step ends by adding 1. That is two graph nodes beside the model and the step kernel (a gather of
the times, the addition), and a third for guidance (a gather of the weights). Rows that call the
model alike share a capture; a table with rows of its own kind (re-noising, guidance in an interval)
has as many. Unrolled, every row is the kernel compiled to its terms, and none of these nodes is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff._evaluation import Conditions, Evaluation
from fastdiff._guidance import RowGuidance, Weight
from fastdiff._loop import Loop, Memory, Start
from fastdiff._sample_step import Evaluated, SampleStep
from fastdiff.backends import BackendError, forced, unavailable
from fastdiff.ops._step_checks import Cursor, joined
from fastdiff.ops.reverse_step import reverse_step

_WARM_UPS = 2  # compile the kernels and let the libraries choose theirs, neither of which records

Result = tuple[Tensor, ...]


class _Kind(NamedTuple):
    """Rows that one captured step can run."""

    evaluates: bool
    calls: bool  # the unconditional output too
    rescales: bool


class Static(NamedTuple):
    """The memory that captured kernels read and write, at addresses that stay."""

    loop: Loop
    start: Start
    memory: Memory
    model_input: Tensor
    weights: Tensor  # (rows, N) float32 weights of guidance
    rows: Tensor  # (2N,) int64 number of the row that comes; twice for a call of both batches


def require_cuda(device: torch.device) -> None:
    """Raises where there is nothing to capture with."""
    if device.type != "cuda":
        raise ValueError(
            f"Sampler: mode must be 'eager' or 'compile' on device {device}, got 'graph'"
        )
    reasons = {name: unavailable(name) for name in ("triton", "cuda")}
    if forced() not in ("auto", *reasons) or None not in reasons.values():
        why = "; ".join(f"{name}: {reason or 'able'}" for name, reason in reasons.items())
        raise BackendError(
            f"Sampler: mode 'graph' must run on the backend triton or cuda, got {forced()} ({why})"
        )


def capture(
    body: Callable[[], Result], rewind: Callable[[], None], device: torch.device
) -> Callable[[], Result]:
    """Record the body as a CUDA graph.

    Args:
        body: what to record; it writes static memory alone and returns tensors.
        rewind: called before each run of the body, and not recorded.

    Returns:
        A function that replays the graph and returns the tensors, which are the same each time.
    """
    # autocast would keep casts of the weights from the warm-up, and free them before the replays
    kept = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        return _captured(body, rewind, device)
    finally:
        torch.set_autocast_cache_enabled(kept)


def _captured(
    body: Callable[[], Result], rewind: Callable[[], None], device: torch.device
) -> Callable[[], Result]:
    with torch.cuda.device(device):
        side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        now = torch.cuda.current_stream()
        side.wait_stream(now)
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                rewind()
                body()
            rewind()
        now.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # another thread may allocate, or ask for an event, meanwhile
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = body()

    def replay() -> Result:
        graph.replay()
        return result

    return replay


class GraphLoop:
    """The loop in captured form; `steps` gives what `Loop.steps` gives.

    Args:
        loop: the rows.
        unroll: one graph for all rows.

    Raises:
        ValueError: the loop has what a graph can not hold.
    """

    def __init__(self, loop: Loop, unroll: bool) -> None:
        if loop.path is not None:
            raise ValueError("Sampler: noise must be 'counter' in mode 'graph', got 'brownian'")
        if loop.threshold is not None and not unroll:
            raise ValueError(
                "Sampler: thresholding must come with unroll in mode 'graph', got unroll=False"
            )
        self._loop, self._unroll = loop, unroll
        self._signature: Any = None
        self._static: Static | None = None
        self._numbers: list[float] | None = None  # weights of guidance that are on the device
        self._stream: Any = None  # of the last run
        self._replays: dict[Any, Callable[[], Result]] = {}
        self._busy = threading.Lock()

    def steps(self, start: Start, keep: bool) -> Iterator[SampleStep]:
        """Every row in turn; unrolled, the last one alone, and so not where ``keep``."""
        if keep and self._unroll:
            raise ValueError("Sampler: unroll must be False with a callback or iter, got True")
        if not self._busy.acquire(blocking=False):
            raise RuntimeError(
                "Sampler: mode must be 'eager' for runs at the same time, got 'graph'"
            )
        try:
            static = self._load(start)
            if self._unroll:
                yield from self._unrolled(static, start)
            else:
                yield from self._looped(static, start, keep)
        finally:
            self._busy.release()

    # --- memory -----------------------------------------------------------------------------

    def _load(self, start: Start) -> Static:
        """The run's numbers in static memory, which is new where something has another shape."""
        signature = _signature(start, self._loop.evaluation)
        if self._static is None or signature != self._signature:
            self._replays.clear()
            self._static = self._reserve(start)
            self._signature, self._numbers = signature, None
        static = self._static
        now = torch.cuda.current_stream(start.x.device)
        if self._stream is not None and self._stream != now:
            now.wait_stream(self._stream)  # the last run may still read what is filled here
        self._stream = now
        self._fill(static, start)
        return static

    @torch.inference_mode(False)  # or only calls in that mode could write it
    def _reserve(self, start: Start) -> Static:
        x, n = torch.empty_like(start.x), len(start.x)
        loop = self._loop
        if isinstance(loop.clip, Tensor):
            loop = replace(loop, clip=loop.clip.to(x.device, torch.float32))
        given = Conditions(*(_copies(part) for part in start.conditions))
        weights = torch.ones(len(start.guidance), n, dtype=torch.float32, device=x.device)
        guidance = [
            RowGuidance(weights[i] if row.calls else 1.0, row.calls, _each(row.phi, n, x.device))
            for i, row in enumerate(start.guidance)
        ]
        memory = loop.memory(x)
        return Static(
            loop,
            Start(x, torch.empty_like(start.seeds), given, guidance),
            memory,
            x if memory.model_input is None else memory.model_input,
            weights,
            torch.empty(2 * n, dtype=torch.int64, device=x.device),
        )

    def _fill(self, static: Static, start: Start) -> None:
        ours = static.start
        ours.x.copy_(start.x)
        ours.seeds.copy_(start.seeds)
        for mine, theirs in zip(ours.conditions, start.conditions, strict=True):
            for name, value in theirs.items():
                if isinstance(value, Tensor):
                    mine[name].copy_(value)
        numbers = [g.weight if isinstance(g.weight, (int, float)) else 1.0 for g in start.guidance]
        if numbers != self._numbers:  # a copy to the device waits for it
            static.weights.copy_(torch.tensor(numbers, dtype=torch.float32)[:, None])
            self._numbers = numbers
        for to, row in zip(static.weights, start.guidance, strict=True):
            if isinstance(row.weight, Tensor):
                to.copy_(row.weight)

    # --- one step ---------------------------------------------------------------------------

    def _looped(self, static: Static, start: Start, keep: bool) -> Iterator[SampleStep]:
        rows, x = self._loop.rows, static.start.x
        kinds = [
            _Kind(row.evaluates, row.evaluates and g.calls, row.evaluates and g.phi is not None)
            for row, g in zip(rows.rows, static.start.guidance, strict=True)
        ]
        for kind in dict.fromkeys(kinds):
            if kind not in self._replays:
                alike = [i for i, k in enumerate(kinds) if k == kind]
                self._replays[kind] = self._capture_step(static, start, alike)
        static.rows.zero_()
        if static.model_input is not x:
            static.model_input.copy_(rows.rows[0].c_in * x)
        for i, kind in enumerate(kinds):
            before = x.clone() if keep else x
            result = self._replays[kind]()
            evaluated = None
            if keep and kind.evaluates:
                output, other, scale = _unpacked(kind, [t.clone() for t in result])
                weight = start.guidance[i].weight
                evaluated = Evaluated(before, output, other, weight, scale, self._loop.clip)
            last = i == len(kinds) - 1
            yield SampleStep(rows, i, x.clone() if keep or last else x, evaluated)

    def _capture_step(self, static: Static, start: Start, alike: list[int]) -> Callable[[], Result]:
        at = Cursor(static.rows[: len(start.x)], joined(self._loop.rows, alike))
        guidance = static.start.guidance[alike[0]]

        def rewind() -> None:
            self._fill(static, start)
            static.rows.fill_(alike[0])

        return capture(lambda: self._step(static, at, guidance), rewind, static.rows.device)

    def _step(self, static: Static, at: Cursor, guidance: RowGuidance) -> Result:
        """One row, whichever comes; what the kernel did not write is returned."""
        loop, (x, seeds, given, _), memory = static.loop, static.start, static.memory
        output = other = variance = scale = None
        weight: Weight = 1.0
        if at.needs.output:
            count = loop.evaluation.count(len(x), guidance, given)
            times = memory.times.index_select(0, static.rows[:count])
            with torch.no_grad():
                output, other, variance = loop.evaluation(
                    static.model_input, times, given, guidance
                )
                if guidance.calls:
                    weight = static.weights.gather(0, at.rows[None])[0]
                    scale = guidance._replace(weight=weight).scale(output, other)
        reverse_step(
            x,
            output,
            loop.rows,
            at,
            uncond=other,
            guidance=weight,
            scale=scale,
            clip=loop.clip,
            variance=variance,
            y=memory.y,
            history=memory.history,
            seeds=seeds,
            out=x,
            model_input=memory.model_input,
        )
        static.rows.add_(1)
        return tuple(t for t in (output, other, scale) if t is not None)

    # --- all steps --------------------------------------------------------------------------

    def _unrolled(self, static: Static, start: Start) -> Iterator[SampleStep]:
        rows = static.loop.rows

        def body() -> Result:
            for step in static.loop.steps(static.start, static.memory, keep=False):
                last = step.x
            return (last,)

        if "all" not in self._replays:
            self._replays["all"] = capture(
                body, lambda: self._fill(static, start), static.rows.device
            )
        (x,) = self._replays["all"]()
        yield SampleStep(rows, len(rows) - 1, x.clone(), None)


def _unpacked(kind: _Kind, tensors: list[Tensor]) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Output, unconditional output and scale, of those that there are."""
    output, *more = tensors
    return output, more[0] if kind.calls else None, more[1] if kind.rescales else None


def _each(phi: Weight | None, n: int, device: torch.device) -> Tensor | None:
    if phi is None or isinstance(phi, Tensor):
        return phi
    return torch.full((n,), phi, dtype=torch.float32, device=device)


def _copies(given: dict[str, Any]) -> dict[str, Any]:
    return {k: torch.empty_like(v) if isinstance(v, Tensor) else v for k, v in given.items()}


def _weights(model: Any) -> tuple[Any, ...]:
    """Where the weights of a module lie: new values are read there, new memory is not."""
    if not isinstance(model, torch.nn.Module):
        return (id(model),)
    tensors = chain(model.parameters(), model.buffers())
    return model.training, tuple((t.data_ptr(), t.dtype) for t in tensors)


def _signature(start: Start, evaluation: Evaluation) -> tuple[Any, ...]:
    """What a capture depends on."""

    def of(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.shape, value.dtype, value.stride(), value.device
        if value is None or isinstance(value, (bool, int, float, str)):
            return type(value), value
        return id(value)  # alive as long as the static memory, which holds it

    given = tuple(
        tuple((name, of(value)) for name, value in part.items()) for part in start.conditions
    )
    calls = tuple(row.calls for row in start.guidance)
    device = start.x.device.type
    cast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    models = tuple(map(_weights, evaluation.models))
    return of(start.x), given, calls, forced(), cast, models
