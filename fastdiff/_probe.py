"""Runs of a k-diffusion-style sampler on data of our choice, all that it does recorded.

A sampler with fixed steps is linear in its start, in what the model answers and in its noise. So a
run in float64 on a model that answers with basis vectors (a fresh unit vector for each call, one
for the start, one for each draw) hands to the model literally the row of its coefficients. Runs on
random data tell whether the sampler is linear at all. While a sampler runs, torch's default dtype
is float64 and its default device the CPU, and ``torch.randn_like`` gives the probe's draws: not to
be done beside other threads.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]
Sampler = Callable[..., Any]

WHERE = "StepTable.from_callable"
_TINY = 2.0**-20  # of the basis vectors: a clamp does not touch them, and the scaling is exact
_CALLS = 100  # calls a point of the grid, after which a sampler is taken never to end


def name_of(sampler: Sampler) -> str:
    """The sampler's own name, also under functools.partial."""
    inner = getattr(sampler, "func", sampler)
    return str(getattr(inner, "__name__", type(inner).__name__))


def refusal(sampler: Sampler, reason: str) -> ValueError:
    """The error for a sampler that has no table."""
    name = name_of(sampler)
    return ValueError(f"{WHERE}: sampler must have a table, but {name} has none: {reason}")


@dataclass
class Run:
    """What a sampler did.

    Attributes:
        start: its first state.
        inputs: what it handed to the model at each call.
        outputs: what the model answered.
        sigmas: level of each call.
        draws: noise it drew, in order.
        spans: (sigma, sigma_next) of each draw, None where the sampler does not say.
        end: its result.
    """

    start: Tensor
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    sigmas: list[float] = field(default_factory=list)
    draws: list[Tensor] = field(default_factory=list)
    spans: list[tuple[float, float] | None] = field(default_factory=list)
    end: Tensor = field(default_factory=lambda: torch.zeros(()))

    @property
    def states(self) -> list[Tensor]:
        """Every state: the model inputs and the result."""
        return [*self.inputs, self.end]


def _run(
    sampler: Sampler,
    sigmas: Array,
    start: Tensor,
    answer: Callable[[int, Tensor, float], Tensor],
    draw: Callable[[int], Tensor],
    options: dict[str, Any],
) -> Run:
    """Run the sampler on a model that answers `answer(call, x, sigma)` and noise `draw(number)`."""
    seen = Run(start)

    def model(x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
        levels = torch.as_tensor(sigma, dtype=torch.float64).reshape(-1)
        if bool((levels != levels[0]).any()):
            raise refusal(sampler, f"its samples stand at different sigmas, {levels.tolist()}")
        if x.shape != start.shape:
            raise refusal(sampler, f"it changes the shape of the state to {tuple(x.shape)}")
        call = len(seen.inputs)
        if call > _CALLS * len(sigmas):
            reason = f"it has an adaptive step count: {call} model calls on {len(sigmas)} sigmas"
            raise refusal(sampler, reason)
        seen.inputs.append(x.detach().clone())
        seen.sigmas.append(float(levels[0]))
        output = answer(call, seen.inputs[-1], seen.sigmas[-1])
        seen.outputs.append(output)
        return output.clone()  # the sampler may write to what it gets

    def noise(span: tuple[float, float] | None) -> Tensor:
        seen.draws.append(draw(len(seen.draws)))
        seen.spans.append(span)
        return seen.draws[-1].clone()

    def sampled(sigma: Any = None, sigma_next: Any = None, *_: Any, **__: Any) -> Tensor:
        known = sigma is not None and sigma_next is not None
        return noise((float(sigma), float(sigma_next)) if known else None)

    offered = {"extra_args": {}, "disable": True, "noise_sampler": sampled}
    named = inspect.signature(sampler).parameters
    arguments = {k: v for k, v in offered.items() if k in named and k not in options} | options
    with torch.device("cpu"), _float64(), _patched(noise, start):
        end = sampler(model, start.clone(), torch.from_numpy(sigmas.copy()), **arguments)
    if not isinstance(end, Tensor) or end.shape != start.shape:
        got = tuple(end.shape) if isinstance(end, Tensor) else type(end).__name__
        raise refusal(sampler, f"it must return the state, of shape {tuple(start.shape)}: {got}")
    seen.end = end.detach().clone()
    return seen


@contextlib.contextmanager
def _float64() -> Iterator[None]:
    """Scalars that a sampler makes itself are float64 too."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _patched(noise: Callable[[None], Tensor], start: Tensor) -> Iterator[None]:
    """torch.randn_like, and torch.randn of the state's shape, give the probe's draws."""
    like, plain = torch.randn_like, torch.randn

    def randn_like(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return noise(None) if x.shape == start.shape else like(x, *args, **kwargs)

    def randn(*size: Any, **kwargs: Any) -> Tensor:
        shape = size[0] if size and not isinstance(size[0], int) else kwargs.get("size", size)
        return noise(None) if tuple(shape) == start.shape else plain(*size, **kwargs)

    torch.randn_like, torch.randn = randn_like, randn  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.randn_like, torch.randn = like, plain


def on_data(sampler: Sampler, sigmas: Array, size: float, options: dict[str, Any]) -> Run:
    """A run on random data of a size with a nonlinear model; the same one for the same size."""
    seed, shape = int(abs(size) * 1024), (2, 3, 4, 5)  # others for another size
    rng = np.random.default_rng(seed)
    start = torch.from_numpy(size * sigmas[0] * rng.normal(size=shape))

    def answer(call: int, x: Tensor, sigma: float) -> Tensor:
        z = x / (size * (1 + sigma))
        return size * (torch.tanh(1.5 * z + call) + 0.3 * torch.sin(3 * z.flip(-1)))

    def draw(number: int) -> Tensor:
        own = np.random.default_rng((seed, number))
        return torch.from_numpy(size * own.normal(size=shape))

    return _run(sampler, sigmas, start, answer, draw, options)


def compare(sampler: Sampler, one: Run, other: Run) -> None:
    """Refuse a sampler whose calls differ between two runs."""
    if len(one.inputs) != len(other.inputs):
        counts = f"{len(one.inputs)} and {len(other.inputs)}"
        reason = f"it has an adaptive step count: {counts} model calls on different data"
        raise refusal(sampler, reason)
    for i, (a, b) in enumerate(zip(one.sigmas, other.sigmas, strict=True)):
        if a != b:
            reason = f"call {i + 1} is at a time that depends on the data: sigma {a:g} and {b:g}"
            raise refusal(sampler, reason)
    if len(one.draws) != len(other.draws):
        counts = f"{len(one.draws)} and {len(other.draws)}"
        raise refusal(sampler, f"its noise depends on the data: {counts} draws on different data")


def probed(
    sampler: Sampler, sigmas: Array, like: Run, options: dict[str, Any]
) -> tuple[Array, Run]:
    """Rows of coefficients of every state, (calls + 1, 1 + calls + draws), and the run."""
    calls, draws = len(like.inputs), len(like.draws)
    size = 1 + calls + draws

    def basis(i: int) -> Tensor:
        vector = torch.zeros(1, 1, 1, size, dtype=torch.float64, device="cpu")
        if i < size:  # a sampler that calls more often than before is refused below
            vector[..., i] = _TINY
        return vector

    def answer(call: int, x: Tensor, sigma: float) -> Tensor:
        return basis(1 + call if call < calls else size)

    def draw(number: int) -> Tensor:
        return basis(1 + calls + number if number < draws else size)

    run = _run(sampler, sigmas, basis(0), answer, draw, options)
    compare(sampler, like, run)
    rows = np.array([s.numpy().reshape(-1) for s in run.states]) / _TINY
    if not np.isfinite(rows).all():
        first = int(np.argwhere(~np.isfinite(rows))[0, 0])
        raise refusal(sampler, f"{state_name(first, calls)} is not finite")
    return rows, run


def constant(sampler: Sampler, sigmas: Array, options: dict[str, Any]) -> None:
    """Refuse a sampler that makes something of nothing."""
    nothing = torch.zeros(1, 1, 1, 2, dtype=torch.float64, device="cpu")

    def draw(number: int) -> Tensor:
        return nothing

    run = _run(sampler, sigmas, nothing, lambda call, x, sigma: nothing, draw, options)
    for i, state in enumerate(run.states):
        value = float(state.flatten()[0])
        if value != 0.0 and np.isfinite(value):
            name = state_name(i, len(run.inputs))
            raise refusal(sampler, f"it adds a constant, {value:g}, in {name}")


def state_name(i: int, calls: int) -> str:
    return f"the input of model call {i + 1} of {calls}" if i < calls else "the result"
