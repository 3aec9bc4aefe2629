"""Adaptive steps for the probability-flow ODE: every sample of a batch goes at its own pace.

Not a table: a step's size depends on the error of the step before. A sample's steps depend on its
own state alone, so its picture is the same in any batch. The updates are plain PyTorch, as the
model's evaluations (six a step of dopri5) are what an adaptive run costs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdiff._adaptive_methods import PID, Array, Dopri5, DpmAdaptive, Progress, column
from fastdiff.ops.noise import Stream, as_seeds, randn
from fastdiff.reference.reverse_step import guide
from fastdiff.schedules import Schedule
from fastdiff.solvers import build
from fastdiff.solvers._walk import PREDICTIONS, Point, Walk

METHODS = ("dopri5", "dpm_adaptive")
# k-diffusion's defaults for dpm_adaptive; torchdiffeq's are 1e-7 and 1e-9, below float32's ulp
_TOLERANCES = {"dopri5": (1e-4, 1e-4), "dpm_adaptive": (0.05, 0.0078)}


class AdaptiveInfo(NamedTuple):
    """What a run took; (N,) int64 each.

    Attributes:
        nfe: model evaluations of each sample (one with guidance counts once).
        accepted: steps that count.
        rejected: steps that were tried again with a smaller size.
    """

    nfe: Tensor
    accepted: Tensor
    rejected: Tensor


@dataclass(frozen=True)
class AdaptiveStep:
    """What a callback sees after each round of attempts.

    Attributes:
        index: number of the round.
        samples: (n,) indices of those that tried a step.
        sigma: (N,) noise scale sigma of each state.
        x: (N, *S) states alpha*x0 + sigma*noise.
    """

    index: int
    samples: Tensor
    sigma: Tensor
    x: Tensor


class AdaptiveSampler:
    """Samples with steps as large as a tolerance allows.

    dopri5 (Dormand and Prince 1980, order 5) integrates the slope noise - x0 in the coordinates of
    a flow, x/(alpha + sigma) over s = sigma/(alpha + sigma): bounded on every schedule, an infinite
    noise level and zero terminal signal included. dpm_adaptive (DPM-Solver-12 or -23: Lu et al.
    2022, arXiv:2206.00927) integrates the noise prediction over log(alpha/sigma) in x/alpha, as
    k-diffusion does. The error of a step is the root mean square over the sample's elements of the
    difference of two orders, each divided by its tolerance. dpm_adaptive takes its relative
    tolerance of the larger of x/alpha before and after the step, as k-diffusion does, and so keeps
    it badly where a schedule begins at nearly no signal: dopri5 does not have this.

    Args:
        model: as for `Sampler`; called with the samples that are not done yet, each at its time.
        schedule: from `fastdiff.schedules`.
        method: "dopri5" or "dpm_adaptive".
        prediction: epsilon, sample, v_prediction, flow or edm.
        rtol, atol: relative and absolute tolerance of a step; None: 1e-4 and 1e-4 for dopri5, 0.05
            and 0.0078 for dpm_adaptive, of data in [-1, 1].
        guidance: as for `Sampler`, a number.
        order: 2 or 3, of dpm_adaptive.
        eta, s_noise: share and scale of ancestral noise, of dpm_adaptive.
        h_init, pcoeff, icoeff, dcoeff, accept_safety: step control of dpm_adaptive; h_init is the
            first step in log(alpha/sigma).
        final: "zero" ends with x0 at the least noisy time, one evaluation more; "sigma_min" with
            the state there, as k-diffusion does.
        max_nfe: evaluations of a sample after which the run is given up.
        dtype: of the model input; None: of the model's first floating-point parameter, else of the
            state.
        device: of the state; None: of the model's first parameter, or of the noise.

    Raises:
        TypeError, ValueError: an argument breaks its rule.
    """

    def __init__(
        self,
        model: Callable[..., Tensor],
        schedule: Schedule,
        *,
        method: str = "dopri5",
        prediction: str = "epsilon",
        rtol: float | None = None,
        atol: float | None = None,
        guidance: float | None = None,
        order: int = 3,
        eta: float = 0.0,
        s_noise: float = 1.0,
        h_init: float = 0.05,
        pcoeff: float = 0.0,
        icoeff: float = 1.0,
        dcoeff: float = 0.0,
        accept_safety: float = 0.81,
        final: str = "zero",
        max_nfe: int = 10_000,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if not callable(model):
            raise TypeError(f"AdaptiveSampler: model must be callable, got {type(model).__name__}")
        for name, value, allowed in (
            ("method", method, METHODS),
            ("prediction", prediction, PREDICTIONS),
            ("order", order, (2, 3)),
            ("final", final, ("zero", "sigma_min")),
        ):
            if value not in allowed:
                raise ValueError(f"AdaptiveSampler: {name} must be one of {allowed}, got {value!r}")
        tolerances = _TOLERANCES[method]
        self.rtol = _positive("rtol", tolerances[0] if rtol is None else rtol)
        self.atol = _positive("atol", tolerances[1] if atol is None else atol)
        if method == "dopri5" and eta != 0:
            raise ValueError(f"AdaptiveSampler: eta must be 0 for dopri5, got {eta}")
        if not (0 <= eta < math.inf and 0 <= s_noise < math.inf):
            raise ValueError(
                f"AdaptiveSampler: eta and s_noise must be finite and not negative, got "
                f"{eta} and {s_noise}"
            )
        build("ddim", schedule, 1, prediction=prediction)  # refuses what does not fit the schedule
        self._walk = Walk(schedule, schedule.points(1, final="sigma_min"), prediction)
        if method == "dpm_adaptive" and self._walk.points[0].alpha == 0:
            raise ValueError(
                "AdaptiveSampler: schedule must have signal at its noisiest time for dpm_adaptive, "
                "got alpha 0"
            )
        first = None
        if isinstance(model, torch.nn.Module):
            first = next((p for p in model.parameters() if p.is_floating_point()), None)
        self.model, self.schedule = model, schedule
        self.method, self.prediction = method, prediction
        self.guidance, self.order, self.eta, self.s_noise = guidance, order, eta, s_noise
        self.pid = PID(_positive("h_init", h_init), pcoeff, icoeff, dcoeff, accept_safety)
        self.final, self.max_nfe = final, max_nfe
        self.dtype = dtype if first is None or dtype is not None else first.dtype
        self.device = device if first is None or device is not None else first.device

    def __call__(
        self,
        shape: Sequence[int] | None = None,
        *,
        noise: Tensor | None = None,
        seeds: Any = 0,
        cond: Mapping[str, Any] | None = None,
        uncond: Mapping[str, Any] | None = None,
        callback: Callable[[AdaptiveStep], None] | None = None,
        progress: bool = False,
        return_info: bool = False,
    ) -> Any:
        """Samples of the model.

        Args:
            shape, noise, seeds, cond, uncond, progress: as for `Sampler`; noise of float64 makes a
                float64 state.
            callback: called with an `AdaptiveStep` after every round.
            return_info: return an `AdaptiveInfo` too.

        Returns:
            (N, *S) float32 (float64 for noise of that type), or that and the info.

        Raises:
            TypeError, ValueError: an argument breaks its rule.
            RuntimeError: a sample needs more than ``max_nfe`` evaluations, or its step has shrunk
                to nothing.
        """
        run = _Run(self, shape, noise, seeds, dict(cond or {}), dict(uncond or {}))
        rounds: Any = run.rounds()
        if progress:
            from tqdm import tqdm

            rounds = tqdm(rounds, desc=self.method, unit="round")
        for step in rounds:
            if callback is not None:
                callback(step)
        x = run.result()
        return (x, run.info()) if return_info else x


def _positive(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"AdaptiveSampler: {name} must be a number, got {type(value).__name__}")
    if not 0 < value < math.inf:
        raise ValueError(f"AdaptiveSampler: {name} must be above 0 and finite, got {value}")
    return float(value)


class _Run:
    """One call: its states, its counts, and the model as the integrators see it."""

    def __init__(
        self,
        sampler: AdaptiveSampler,
        shape: Sequence[int] | None,
        noise: Tensor | None,
        seeds: Any,
        cond: dict[str, Any],
        uncond: dict[str, Any],
    ) -> None:
        if (shape is None) == (noise is None):
            raise ValueError("AdaptiveSampler: shape or noise must be given, and not both")
        self._sampler, self._walk = sampler, sampler._walk
        guided = sampler.guidance is not None and sampler.guidance != 1.0
        if guided and not uncond:
            raise ValueError(
                f"AdaptiveSampler: uncond must be given for guidance {sampler.guidance}, got "
                "nothing"
            )
        count = None
        if noise is not None:
            if not isinstance(noise, Tensor) or not noise.is_floating_point() or noise.dim() < 1:
                raise TypeError(
                    f"AdaptiveSampler: noise must be a floating-point tensor, got {noise!r}"
                )
            count = len(noise)
        elif isinstance(seeds, int):
            sizes = [len(v) for v in cond.values() if isinstance(v, Tensor) and v.dim() > 0]
            count = sizes[0] if sizes else 1
        self._seeds = as_seeds(seeds, count, where="AdaptiveSampler")
        device = sampler.device or (noise.device if noise is not None else torch.device("cpu"))
        if noise is None:
            assert shape is not None  # the first check
            noise = randn(self._seeds, shape, stream=Stream.INITIAL, device=device)
        kind = torch.float64 if noise.dtype == torch.float64 else torch.float32
        self._cond, self._uncond = cond, uncond if guided else {}
        self._nfe = np.zeros(len(noise), np.int64)
        start, end = self._walk.points
        x = noise.to(device, kind) * sampler.schedule.init_sigma
        self._integrator = self._begin(x, start, end)
        self._state = self._integrator.progress

    def _begin(self, x: Tensor, start: Point, end: Point) -> Dopri5 | DpmAdaptive:
        sampler = self._sampler
        if sampler.method == "dopri5":
            level, last = (p.sigma / (p.alpha + p.sigma) for p in (start, end))
            scaled = x / (start.alpha + start.sigma)
        else:
            level, last = (math.log(p.alpha / p.sigma) for p in (start, end))
            scaled = x / start.alpha
        progress = Progress(np.full(len(x), level), last, scaled)
        if sampler.method == "dopri5":
            return Dopri5(progress, self._slope, sampler.rtol, sampler.atol)
        return DpmAdaptive(
            progress,
            self._slope,
            sampler.rtol,
            sampler.atol,
            sampler.order,
            sampler.eta,
            sampler.s_noise,
            sampler.pid,
            self._noise,
        )

    # --- the model ---

    def _point(self, level: float) -> Point:
        start = self._walk.points[0]
        if self._sampler.method == "dopri5":
            if level >= start.sigma / (start.alpha + start.sigma):
                return start
            return self._walk.at_ratio(level / (1 - level))
        return self._walk.at_ratio(math.exp(-level))

    def _evaluate(self, samples: Array, points: list[Point], x: Tensor) -> Tensor:
        """The model output, after guidance, for states x = alpha*x0 + sigma*noise."""
        self._nfe[samples] += 1
        if (self._nfe > self._sampler.max_nfe).any():
            raise RuntimeError(
                f"AdaptiveSampler: max_nfe is spent, {self._sampler.max_nfe} evaluations of sample "
                f"{int(self._nfe.argmax())}"
            )
        times, c_in = np.array([p.time for p in points]), None
        if self._sampler.prediction == "edm":
            sigma = np.array([p.sigma for p in points])
            times = np.log(sigma) / 4
            c_in = 1 / np.hypot(sigma, self._sampler.schedule.sigma_data)
        kind = self._sampler.dtype or x.dtype
        given = (x if c_in is None else x * column(c_in, x)).to(kind)
        t = torch.from_numpy(times).to(x.device, kind if kind == torch.float64 else torch.float32)
        index = torch.from_numpy(samples)
        with torch.no_grad():
            output = self._call(given, t, self._cond, index).to(x.dtype)
            if self._uncond:
                other = self._call(given, t, self._uncond, index).to(x.dtype)
                assert self._sampler.guidance is not None  # what made it guided
                output = guide(output, other, self._sampler.guidance)
        return output

    def _call(self, x: Tensor, t: Tensor, given: dict[str, Any], index: Tensor) -> Tensor:
        arguments = {
            k: v.to(x.device)[index.to(x.device)] if isinstance(v, Tensor) and v.dim() > 0 else v
            for k, v in given.items()
        }
        return self._sampler.model(x, t, **arguments)

    def _slope(self, samples: Array, level: Array, scaled: Tensor) -> Tensor:
        """noise - x0 in the coordinates of a flow, or the noise prediction: e*x + f*m."""
        if not len(samples):
            return scaled
        points = [self._point(float(v)) for v in level]
        a = np.array([p.alpha for p in points])
        s = np.array([p.sigma for p in points])
        flow = self._sampler.method == "dopri5"
        x = scaled * column(a + s if flow else a, scaled)
        m = self._evaluate(samples, points, x)
        p, q = np.array([self._walk.conversion(point) for point in points]).T
        gain = (a + s if flow else a) / s  # of x0
        e, f = 1 / s - gain * p, -gain * q
        if self._sampler.prediction == "epsilon":  # what cancels is left out
            e, f = (-1 / a, (a + s) / a) if flow else (0 * a, 0 * a + 1)
        elif self._sampler.prediction == "flow" and flow:
            e, f = 0 * a, 0 * a + 1
        return column(e, x) * x + column(f, x) * m

    def _noise(self, sample: int, step: int) -> Tensor:
        x = self._state.x
        seed = self._seeds[sample : sample + 1]
        return randn(seed, x.shape[1:], step=step, stream=Stream.STEP, device=x.device)[0]

    # --- the loop ---

    def rounds(self) -> Any:
        """Attempts of all samples that are not done, round by round."""
        index = 0
        while len(samples := self._integrator.active()):
            self._integrator.attempt(samples)
            points = [self._point(float(v)) for v in self._state.level]
            x = self._state.x * column(self._scale(points), self._state.x)
            sigma = torch.from_numpy(np.array([p.sigma for p in points], np.float64))
            yield AdaptiveStep(index, torch.from_numpy(samples), sigma, x)
            index += 1

    def _scale(self, points: list[Point]) -> Array:
        flow = self._sampler.method == "dopri5"
        return np.array([p.alpha + (p.sigma if flow else 0.0) for p in points])

    def result(self) -> Tensor:
        end = self._walk.points[1]
        everyone = np.arange(len(self._nfe))
        points = [end] * len(everyone)
        x = self._state.x * column(self._scale(points), self._state.x)
        if self._sampler.final == "sigma_min" or not len(everyone):
            return x
        p, q = self._walk.conversion(end)
        return p * x + q * self._evaluate(everyone, points, x)

    def info(self) -> AdaptiveInfo:
        state = self._state
        counts = (self._nfe, state.accepted, state.rejected)
        return AdaptiveInfo(*(torch.from_numpy(c) for c in counts))
