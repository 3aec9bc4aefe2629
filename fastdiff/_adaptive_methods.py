"""The two adaptive integrators of `AdaptiveSampler`, each sample at its own time with its own step.

An integrator sees a `Problem`: the state of the samples that are not done yet, and a function that
evaluates the model there. Scalars of a sample are float64 on the host; its error is a norm over its
own elements, taken sample by sample, so that no other sample of the batch can change a bit of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray
# (samples, levels, states) -> slope of each state; a level is s for dopri5 and t for dpm_adaptive
Slope = Callable[[Array, Array, Tensor], Tensor]


def column(values: Array, like: Tensor) -> Tensor:
    """One float64 a sample, rounded once, shaped to broadcast over the sample."""
    made = torch.from_numpy(np.asarray(values, np.float64)).to(like.device, like.dtype)
    return made.view(-1, *[1] * (like.dim() - 1))


def norms(scaled: Tensor) -> Array:
    """(n,) root mean square of each sample."""
    size = max(scaled[:1].numel(), 1)
    each = [
        float(torch.linalg.vector_norm(one, dtype=torch.float64)) / math.sqrt(size)
        for one in scaled
    ]
    return np.array(each)


@dataclass
class Progress:
    """What became of each sample so far: (N,) arrays."""

    level: Array  # where the sample stands
    end: float
    x: Tensor
    accepted: Array = field(init=False)
    rejected: Array = field(init=False)

    def __post_init__(self) -> None:
        self.accepted = np.zeros(len(self.level), np.int64)
        self.rejected = np.zeros(len(self.level), np.int64)

    def settle(self, samples: Array, ok: Array, x: Tensor, level: Array) -> None:
        """Take over the new states of those whose step was accepted."""
        taken = samples[ok]
        self.accepted[taken] += 1
        self.rejected[samples[~ok]] += 1
        self.level[taken] = level[ok]
        self.x[torch.from_numpy(taken).to(x.device)] = x[torch.from_numpy(ok).to(x.device)]


class StuckError(RuntimeError):
    """A step has shrunk to nothing."""


def _require_progress(moved: Array, samples: Array) -> None:
    if not moved.all():
        stuck = int(samples[~moved][0])
        raise StuckError(
            f"AdaptiveSampler: the step of sample {stuck} has shrunk to nothing: the tolerance "
            "cannot be met in this precision, or the model is not finite"
        )


# --- Dormand and Prince ------------------------------------------------------------------------

# Dormand and Prince 1980, RK5(4)7M: nodes, stages, and what the fifth order differs from the fourth
_NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (
    71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40,
)  # fmt: skip
_SAFETY, _LEAST_FACTOR, _MOST_FACTOR = 0.9, 0.2, 10.0


class Dopri5:
    """Order 5 with an error of order 4; level s falls from its start to `end`.

    Step control as Hairer, Norsett and Wanner 1993, II.4, with the constants of torchdiffeq.
    `measure` is the size of errors in units of their tolerance, (n, *S) to (n,).
    """

    def __init__(
        self,
        progress: Progress,
        slope: Slope,
        rtol: float,
        atol: float,
        *,
        measure: Callable[[Tensor], Array] = norms,
    ) -> None:
        self.progress, self._slope, self._rtol, self._atol = progress, slope, rtol, atol
        self._measure = measure
        everyone = np.arange(len(progress.level))
        self._k1 = slope(everyone, progress.level, progress.x)
        self._h = self._first_step(everyone)

    def active(self) -> Array:
        return np.flatnonzero(self.progress.level > self.progress.end)

    def _first_step(self, samples: Array) -> Array:
        """Hairer, Norsett and Wanner 1993, II.4, algorithm on page 169: one evaluation."""
        x, k1 = self.progress.x, self._k1
        scale = self._atol + self._rtol * x.abs()
        d0, d1 = self._measure(x / scale), self._measure(k1 / scale)
        h0 = np.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / np.maximum(d1, 1e-300))
        h0 = np.minimum(np.nan_to_num(h0, nan=1e-6), self.progress.level - self.progress.end)
        k2 = self._slope(samples, self.progress.level - h0, x - column(h0, x) * k1)
        d2 = self._measure((k2 - k1) / scale) / h0
        most = np.maximum(d1, d2)
        h1 = np.where(
            most <= 1e-15, np.maximum(1e-6, h0 * 1e-3), (0.01 / np.maximum(most, 1e-300)) ** 0.2
        )
        first: Array = np.nan_to_num(np.minimum(100 * h0, h1), nan=1e-6)
        return first

    def attempt(self, samples: Array) -> None:
        progress = self.progress
        index = torch.from_numpy(samples).to(progress.x.device)
        x, level = progress.x[index], progress.level[samples]
        left = level - progress.end
        h = np.minimum(self._h[samples], left)
        _require_progress(level - h < level, samples)
        step = column(-h, x)
        k = [self._k1[index]]
        for node, weights in zip(_NODES, _STAGES, strict=True):
            then = np.where(h == left, progress.end, level - h) if node == 1.0 else level - node * h
            new = x + step * _combine(weights, k)
            k.append(self._slope(samples, then, new))
        error = step * _combine(_ERROR, k)
        scale = self._atol + self._rtol * torch.maximum(x.abs(), new.abs())
        ratio = self._measure(error / scale)
        ok = ratio <= 1
        with np.errstate(divide="ignore"):
            factor = _SAFETY * ratio**-0.2
        least = np.where(ratio < 1, 1.0, _LEAST_FACTOR)
        factor = np.where(np.isnan(ratio), _LEAST_FACTOR, np.clip(factor, least, _MOST_FACTOR))
        self._h[samples] = h * factor
        progress.settle(samples, ok, new, then)
        kept = torch.from_numpy(ok).to(x.device)
        self._k1[index[kept]] = k[-1][kept]


def _combine(weights: Sequence[float], k: Sequence[Tensor]) -> Tensor:
    total = torch.zeros_like(k[0])
    for weight, slope in zip(weights, k, strict=True):
        if weight:
            total = total + weight * slope
    return total


# --- DPM-Solver 12 and 23 ----------------------------------------------------------------------


@dataclass(frozen=True)
class PID:
    """Step size control of `dpm_adaptive`, as k-diffusion has it (Soederlind 2003)."""

    h_init: float = 0.05
    pcoeff: float = 0.0
    icoeff: float = 1.0
    dcoeff: float = 0.0
    accept_safety: float = 0.81


class DpmAdaptive:
    """DPM-Solver-12 or -23 with error control: Lu et al. 2022 (arXiv:2206.00927), algorithm 3 and
    appendix C, in x/alpha; level t = log(alpha/sigma) rises to `end`. With eta, noise is added as
    in ancestral sampling after an accepted step.
    """

    def __init__(
        self,
        progress: Progress,
        slope: Slope,
        rtol: float,
        atol: float,
        order: int,
        eta: float,
        s_noise: float,
        pid: PID,
        noise: Callable[[int, int], Tensor],
    ) -> None:
        self.progress, self._slope, self._rtol, self._atol = progress, slope, rtol, atol
        self._order, self._eta, self._s_noise = order, eta, s_noise
        self._pid, self._noise = pid, noise
        n = len(progress.level)
        self._h = np.full(n, pid.h_init)
        self._errors: list[list[float]] = [[] for _ in range(n)]
        self._previous = progress.x.clone()
        self._eps = torch.zeros_like(progress.x)
        self._fresh = np.zeros(n, bool)  # whether _eps is that of the state: so after a rejection

    def active(self) -> Array:
        # k-diffusion's: a last step of 1e-5 would cost as much as any other
        return np.flatnonzero(self.progress.level < self.progress.end - 1e-5)

    def _aim(self, level: Array, then: Array) -> tuple[Array, Array]:
        """Where the deterministic part of a step ends, and the noise that follows."""
        if not self._eta:
            return then, np.zeros_like(then)
        now, to = np.exp(-level), np.exp(-then)
        up = np.minimum(to, self._eta * np.sqrt(to**2 * (now**2 - to**2) / now**2))
        with np.errstate(divide="ignore"):
            aim = np.minimum(self.progress.end, -0.5 * np.log(to**2 - up**2))
        # where the aim is the end there is no room for noise: not the root of a rounding error
        return aim, np.sqrt(np.where(aim > then, to**2 - np.exp(-2 * aim), 0.0))

    def attempt(self, samples: Array) -> None:
        progress = self.progress
        self._refresh(samples)
        index = torch.from_numpy(samples).to(progress.x.device)
        x, level, eps = progress.x[index], progress.level[samples], self._eps[index]
        then = np.minimum(progress.end, level + self._h[samples])
        _require_progress(then > level, samples)
        aim, up = self._aim(level, then)
        low, high = self._pair(samples, x, level, aim, eps)
        limit = torch.maximum(low.abs(), self._previous[index].abs())
        error = norms((low - high) / torch.clamp(self._rtol * limit, min=self._atol))
        ok = np.array([self._accept(int(i), e) for i, e in zip(samples, error, strict=True)])
        if self._eta:
            drawn = [
                self._noise(int(i), int(progress.accepted[i])) if o else torch.zeros_like(x[0])
                for i, o in zip(samples, ok, strict=True)
            ]
            high = high + column(up * self._s_noise, x) * torch.stack(drawn).to(x.dtype)
        progress.settle(samples, ok, high, then)
        kept = torch.from_numpy(ok).to(x.device)
        self._previous[index[kept]] = low[kept]
        self._fresh[samples] = ~ok

    def _refresh(self, samples: Array) -> None:
        """The noise prediction at the state of those who moved."""
        stale = samples[~self._fresh[samples]]
        if len(stale):
            index = torch.from_numpy(stale).to(self._eps.device)
            level = self.progress.level[stale]
            self._eps[index] = self._slope(stale, level, self.progress.x[index])

    def _pair(
        self, samples: Array, x: Tensor, level: Array, aim: Array, eps: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The estimates of the lower and the higher order."""
        h, end = aim - level, np.exp(-aim)

        def first(part: float) -> tuple[Array, Tensor]:
            """Time and state after `part` of the step at first order."""
            to = level + part * h
            return to, x - column(np.exp(-to) * np.expm1(part * h), x) * eps

        def second(to: float) -> Tensor:
            """The step at second order with the slope at `to` of it."""
            gap = column(end * np.expm1(h) / (2 * to), x)
            return whole - gap * (slope - eps)

        whole = first(1.0)[1]
        part = 1 / 2 if self._order == 2 else 1 / 3
        time, state = first(part)
        slope = self._slope(samples, time, state)
        if self._order == 2:
            return whole, second(part)
        time, state = first(2 / 3)
        curve = np.expm1(2 / 3 * h) / (2 / 3 * h) - 1
        state = state - column(np.exp(-time) * 2 * curve, x) * (slope - eps)
        last = self._slope(samples, time, state)
        bend = column(end * 1.5 * (np.expm1(h) / h - 1), x)
        return second(part), whole - bend * (last - eps)

    def _accept(self, i: int, error: float) -> bool:
        """The controller of one sample: the next step size, and whether this step counts."""
        pid = self._pid
        order = 1.5 if self._eta else float(self._order)
        b1 = (pid.pcoeff + pid.icoeff + pid.dcoeff) / order
        b2 = -(pid.pcoeff + 2 * pid.dcoeff) / order
        b3 = pid.dcoeff / order
        inverse = 1 / (error + 1e-8) if math.isfinite(error) else 0.0
        kept = self._errors[i] = self._errors[i] or [inverse] * 3
        kept[0] = inverse
        factor = 0.0 if inverse == 0 else kept[0] ** b1 * kept[1] ** b2 * kept[2] ** b3
        factor = 1 + math.atan(factor - 1)
        ok = factor >= pid.accept_safety
        if ok:
            kept[2], kept[1] = kept[1], kept[0]
        self._h[i] *= factor
        return ok
