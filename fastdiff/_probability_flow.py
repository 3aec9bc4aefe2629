"""A probability-flow ODE and the integral of its divergence, with error control by sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from fastdiff._adaptive_methods import Array, Dopri5, Progress, norms
from fastdiff.reference.flow import divergence, hutchinson

# (states, level of each, their places in the batch) -> dy/ds
Velocity = Callable[[Tensor, Array, Tensor], Tensor]


def transport(
    velocity: Velocity,
    y: Tensor,
    ends: Sequence[float],
    probe: Tensor | None,
    rtol: float,
    atol: float,
    progress: Callable[[int], object] | None = None,
) -> tuple[Tensor, Tensor, Array]:
    """Take states from the lower of two levels to the higher one.

    Args:
        velocity: of samples that do not mix.
        y: `(N, *S)` float64. ends: of s, the first the lower.
        probe: of Hutchinson's estimate, the shape of y; None for the exact divergence.
        rtol, atol: of a step, for y (root mean square) and for the integral each.
        progress: called with the number of samples at every evaluation.

    Returns:
        y at the end, the integral of the divergence `(N,)`, and the evaluations of each `(N,)`.

    Raises:
        RuntimeError: the tolerance cannot be met.
    """
    nfe = np.zeros(len(y), np.int64)

    def slope(samples: Array, level: Array, state: Tensor) -> Tensor:
        if not len(samples):
            return state
        nfe[samples] += 1
        if progress is not None:
            progress(len(samples))
        index = torch.from_numpy(samples).to(state.device)

        def at(y: Tensor, _: Tensor) -> Tensor:
            return velocity(y, -level, index)

        now = state[:, :-1].view(-1, *y.shape[1:])
        time = now.new_zeros(len(now))  # `at` knows the levels, in float64 on the host
        with torch.no_grad():  # which tells them to keep no graph of the derivative
            if probe is None:
                v, trace = divergence(at, now, time)
            else:
                v, trace = hutchinson(at, now, time, probe[index])
        # the integrator goes down in -s
        return -torch.cat([v.detach().flatten(1), trace.detach()[:, None]], 1)

    state = torch.cat([y.flatten(1), y.new_zeros(len(y), 1)], 1)
    run = Progress(np.full(len(y), -ends[0]), -ends[1], state)
    solver = Dopri5(run, slope, rtol, atol, measure=_worst)
    while len(samples := solver.active()):
        solver.attempt(samples)
    return run.x[:, :-1].view_as(y), run.x[:, -1], nfe


def _worst(scaled: Tensor) -> Array:
    """The larger error, of the state or of the integral of its divergence."""
    worst: Array = np.maximum(norms(scaled[:, :-1]), norms(scaled[:, -1:]))
    return worst
