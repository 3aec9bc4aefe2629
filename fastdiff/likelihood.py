"""How probable a diffusion model finds images: its variational bound, and its ODE's likelihood.

Two models share one network. The chain steps back through the schedule's times with Gaussian noise;
its likelihood is out of reach, and L_VLB = L_T + sum L_{t-1} + L_0 bounds -log p from above
(`fastdiff.reference.likelihood` has the terms). The probability-flow ODE carries data to noise and
back by a curve, so its density is exact (`fastdiff.reference.flow`: change of variables), but for
the error of the integration, which is controlled here.

Images are levels, not real numbers, and a density of levels must be made a probability first. Two
ways, each an upper bound of -log P by Jensen's inequality:

- "decoder": x_0 ~ q(x_0 | x), the noised image of the first time, as the chain's own first latent.
  -log P(x) <= E_q[-log p(x_0) + log q(x_0 | x) - log p(x | x_0)], with the chain's own decoder
  p(x | x_0), so the last term is L_0 of L_VLB at the same draw. What is compared is then the
  density of x_0 alone: exact under the ODE, bounded under the chain.
- "uniform": x + u, u uniform over the bin, with P(x) the integral of the density over the bin
  (Theis et al. 2016, arXiv:1511.01844; as Song et al. 2021, arXiv:2011.13456, report it). Another P
  than the chain's: its bins at black and white are closed, and a density that is as narrow as the
  bin, as that of a pixel that is always black, spills over: L_0 does not charge for that.

With the exact score the ODE has the density of the noised data itself, and averaged over the data

    L_VLB - "decoder" = KL(q(x_{0:T}) || chain(x_{0:T})) - KL(q(x_0) || ODE(x_0)) >= 0,

where q without an image is the noised data's: the first divergence is at least that of the ends
x_T, which is all that the second one has, as both start at N(0, I). So the bound must lie above. A
network that is not exact may break this: its chain and its ODE are then two different densities.

Times are those of `fastdiff.reference.diffusion`; nats throughout. What is random is a function of
the seeds: the image noised to a time is the same in every batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdiff._adaptive_methods import Array, column
from fastdiff._probability_flow import transport
from fastdiff.ops import Stream, as_seeds, randn
from fastdiff.reference import likelihood as terms
from fastdiff.reference.diffusion import marginal
from fastdiff.reference.distributions import normal_cdf, normal_log_pdf
from fastdiff.schedules import Schedule
from fastdiff.solvers import check_prediction
from fastdiff.solvers._walk import Point, Walk

__all__ = ["STARTS", "DiffusionLikelihood", "FlowBound", "SampledBound"]

STARTS = ("decoder", "uniform")
VARIANCES = ("auto", "small", "large")

_HOST = "cpu"  # where times and weights are, whatever torch's default device
# counters of the stream of noised images; those below are draws of times
_TIMES, _UNIFORM, _PROBE = 1 << 31, (1 << 31) + 1, (1 << 31) + 2


class SampledBound(NamedTuple):
    """Terms of L_VLB at some times of each image, in nats.

    Attributes:
        prior: `(N,)`, L_T.
        times: `(N, S)` int64. terms: `(N, S)`, the term of that time at one draw of x_t.
        weights: `(N, S)`: the weighted sum of the terms has the expectation of the sum over all.
    """

    prior: Tensor
    times: Tensor
    terms: Tensor
    weights: Tensor

    @property
    def total(self) -> Tensor:
        """`(N,)`, unbiased estimate of L_VLB."""
        return self.prior + (self.weights * self.terms).sum(1)


class FlowBound(NamedTuple):
    """-log P of each image under the ODE, at one draw of its dequantisation.

    Attributes:
        nats: `(N,)`. decoder: `(N,)`, the part that is L_0; 0 for "uniform".
        nfe: `(N,)` int64, evaluations of the network.
    """

    nats: Tensor
    decoder: Tensor
    nfe: Tensor


class DiffusionLikelihood:
    """A network with its schedule, as a distribution of images.

    Args:
        model: ``model(x, t, **cond)``, x `(N, *S)` and t `(N,)` as for `Sampler`; an output of
            twice the channels holds a learned variance in its second half (Nichol and Dhariwal
            2021).
        schedule: from `fastdiff.schedules`; the bound and "decoder" need a discrete one.
        prediction: epsilon, sample, v_prediction, flow or edm.
        clip: bound of the predicted data, None for none. It is a part of the model, chain and ODE.
        variance: of the reverse steps: "small", "large", or "auto": learned where the network has
            one (`learned` then says so), else small.
        bins: levels of a pixel on [-1, 1]; None for data that are real numbers.

    Raises:
        TypeError, ValueError: an argument breaks its rule.
    """

    def __init__(
        self,
        model: Callable[..., Tensor],
        schedule: Schedule,
        *,
        prediction: str = "epsilon",
        clip: float | None = None,
        variance: str = "auto",
        bins: int | None = 256,
    ) -> None:
        if not callable(model):
            raise TypeError(f"likelihood: model must be callable, got {type(model).__name__}")
        if variance not in VARIANCES:
            raise ValueError(f"likelihood: variance must be one of {VARIANCES}, got {variance!r}")
        if clip is not None and not 0 < clip < math.inf:
            raise ValueError(f"likelihood: clip must be above 0 and finite, got {clip}")
        if bins is not None and bins < 2:
            raise ValueError(f"likelihood: bins must be at least 2, got {bins}")
        grid = schedule.points(1, final="sigma_min")
        noisiest = float(grid.times[0])
        check_prediction(prediction, schedule, noisiest, float(grid.alphas[0]), "likelihood")
        self.model, self.schedule, self.prediction = model, schedule, prediction
        self.clip, self.variance, self.bins = clip, variance, bins
        self.learned = False  # until the network is seen to give a variance
        self._walk = Walk(schedule, grid, prediction)
        abar = schedule.alphas_cumprod
        self._abars = None if abar is None else torch.tensor(abar, device=_HOST)
        parameters = model.parameters() if isinstance(model, torch.nn.Module) else iter(())
        self._dtype = next((p.dtype for p in parameters if p.is_floating_point()), None)

    @property
    def alphabars(self) -> Tensor:
        """`(T,)` float64.

        Raises:
            ValueError: the schedule has no steps.
        """
        if self._abars is None:
            raise ValueError(
                "likelihood: schedule must be discrete for a bound of its steps, got kind "
                f"{self.schedule.kind!r}"
            )
        return self._abars

    # --- the variational bound ---

    def term(
        self, x0: Tensor, t: Tensor, noise: Tensor, cond: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """The term of time t of each image, `(N,)` float64: L_0 where t = 0, else L_{t-1}.

        Args:
            x0: `(N, *S)`. t: `(N,)` int64. noise: unit normals of the shape of x0, of x_t.
        """
        x0, abars = x0.double(), self.alphabars.to(x0.device)
        x = marginal(x0, abars[t].view(-1, *[1] * (x0.dim() - 1)), noise.double())
        times = t.cpu().numpy()
        scales = zip(times, self.schedule.alpha(times), self.schedule.sigma(times), strict=True)
        points = [Point(*map(float, each)) for each in scales]
        with torch.no_grad():
            estimate, v = self._predict(x, points, cond or {})
            how = self.variance if v is None or self.variance != "auto" else v
            how = "small" if isinstance(how, str) and how == "auto" else how
            moments = terms.reverse_moments(estimate, x, t, abars, how)
            return terms.step_term(x0, x, t, abars, *moments, bins=self.bins)

    def bound(
        self,
        x0: Tensor,
        seeds: Any,
        cond: Mapping[str, Tensor] | None = None,
        *,
        probabilities: Tensor | None = None,
        draws: int = 64,
        progress: Callable[[int], object] | None = None,
    ) -> SampledBound:
        """Unbiased estimate of L_VLB of each image.

        Without probabilities, every time at one draw of its x_t. With them, the first time, and
        `draws` - 1 of the others by systematic sampling: with F the cumulative probabilities, u of
        the image and k = 0, 1, ..., the time where F passes (k + u) / (draws - 1). Every
        time is drawn (draws - 1) p_t times on average, and is weighted by the inverse of that.

        Args:
            x0: `(N, *S)`. seeds: of the N images, as in `fastdiff.randn`. cond: tensors of N rows.
            probabilities: `(T - 1,)` of times 1 ... T - 1, positive, of sum 1.
            draws: times of an image, at least 2.
            progress: called with N after each evaluation.

        Raises:
            ValueError: a rule is broken.
        """
        seeds = as_seeds(seeds, len(x0), where="likelihood")
        total = len(self.alphabars)
        if probabilities is None:
            times = torch.arange(total, device=_HOST).expand(len(x0), -1)
            weights = torch.ones(times.shape, dtype=torch.float64, device=_HOST)
        else:
            p = probabilities.double().cpu()
            if p.shape != (total - 1,) or not bool((p > 0).all()) or abs(float(p.sum()) - 1) > 1e-6:
                raise ValueError(
                    f"likelihood: probabilities must be ({total - 1},), positive, of sum 1, got "
                    f"{tuple(p.shape)} of sum {float(p.sum())}"
                )
            if draws < 2:
                raise ValueError(f"likelihood: draws must be at least 2, got {draws}")
            p = p / p.sum()
            offset = normal_cdf(randn(seeds, (1,), step=_TIMES, stream=Stream.FORWARD).double())
            places = (torch.arange(draws - 1, device=_HOST) + offset) / (draws - 1)
            picked = torch.searchsorted(p.cumsum(0), places).clamp(max=total - 2)
            times = torch.cat([picked.new_zeros(len(x0), 1), picked + 1], 1)
            ones = p.new_ones(len(x0), 1)
            weights = torch.cat([ones, 1 / ((draws - 1) * p[picked])], 1)
        each = []
        for k, t in enumerate(times.T):
            noise = self._noise(seeds, x0, k)
            each.append(self.term(x0, t.to(x0.device), noise, cond).cpu())
            if progress is not None:
                progress(len(x0))
        prior = terms.prior_term(x0.double(), self.alphabars[-1]).cpu()
        return SampledBound(prior, times, torch.stack(each, 1), weights)

    # --- the probability-flow ODE ---

    def flow(
        self,
        x0: Tensor,
        seeds: Any,
        cond: Mapping[str, Tensor] | None = None,
        *,
        start: str = "decoder",
        exact: bool = False,
        rtol: float = 1e-4,
        atol: float = 1e-4,
        progress: Callable[[int], object] | None = None,
    ) -> FlowBound:
        """-log P of each image under the ODE, an upper bound in the mean over the draws.

        Args:
            x0, seeds, cond: as `bound`. The draw of "decoder" is that of the first time there.
            start: one of `STARTS`, the module says what they are. Without bins, "decoder" bounds
                the density of x0, and "uniform" has no bin to fill.
            exact, rtol, atol, progress: as `log_prob`.

        Raises:
            ValueError: a rule is broken. RuntimeError: the tolerance cannot be met.
        """
        if start not in STARTS:
            raise ValueError(f"likelihood: start must be one of {STARTS}, got {start!r}")
        seeds = as_seeds(seeds, len(x0), where="likelihood")
        first, x0 = self._walk.points[1], x0.double()
        how: dict[str, Any] = {"exact": exact, "rtol": rtol, "atol": atol, "progress": progress}
        dims = x0[0].numel()
        if start == "uniform":
            if self.bins is None:
                raise ValueError("likelihood: bins must be a number to dequantise, got None")
            width = 2 / (self.bins - 1)
            u = normal_cdf(self._noise(seeds, x0, _UNIFORM)) - 0.5
            log_p, nfe = self.log_prob(first.alpha * (x0 + width * u), seeds, cond, **how)
            # as a density of x + u, then times the width of the bin
            nats = -log_p - dims * (math.log(first.alpha) + math.log(width))
            nats = nats.cpu()
            return FlowBound(nats, torch.zeros_like(nats), nfe)
        noise = self._noise(seeds, x0, 0)
        zero = torch.zeros(len(x0), dtype=torch.int64, device=x0.device)
        decoder = self.term(x0, zero, noise, cond)
        log_p, nfe = self.log_prob(first.alpha * x0 + first.sigma * noise, seeds, cond, **how)
        log_q = normal_log_pdf(noise).flatten(1).sum(1) - dims * math.log(first.sigma)
        return FlowBound((decoder - log_p + log_q).cpu(), decoder.cpu(), nfe)

    def log_prob(
        self,
        x: Tensor,
        seeds: Any,
        cond: Mapping[str, Tensor] | None = None,
        *,
        exact: bool = False,
        rtol: float = 1e-4,
        atol: float = 1e-4,
        progress: Callable[[int], object] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """log-density under the ODE of states of the schedule's least noisy time.

        In the coordinates of a flow, y = x / (alpha + sigma) over s = sigma / (alpha + sigma), the
        ODE is dy/ds = noise - x0 on every schedule. Dormand and Prince's method takes y and the
        integral of the divergence, each image with steps of its own; the error of either may be no
        more than atol + rtol |value| a step, the root mean square over y.

        Args:
            x: `(N, *S)`, states alpha x0 + sigma noise. seeds, cond: as `bound`.
            exact: the divergence by one derivative an element, in place of one estimate with
                random signs (`reference.flow.hutchinson`), the same ones along the curve.
            rtol, atol: tolerances of a step.
            progress: called with the number of images at every evaluation.

        Returns:
            `(N,)` float64 in nats, and the evaluations of each, `(N,)` int64.

        Raises:
            ValueError: a tolerance is not positive. RuntimeError: the tolerance cannot be met.
        """
        if not (0 < rtol < math.inf and 0 < atol < math.inf):
            raise ValueError(
                f"likelihood: rtol and atol must be above 0 and finite, got {rtol} and {atol}"
            )
        seeds = as_seeds(seeds, len(x), where="likelihood")
        probe = torch.where(self._noise(seeds, x, _PROBE) < 0, -1.0, 1.0).double()

        def velocity(y: Tensor, levels: Array, index: Tensor) -> Tensor:
            given = {name: value[index] for name, value in (cond or {}).items()}
            return self._velocity(y, [self._point(float(v)) for v in levels], given)

        last, first = self._walk.points
        ends = [p.sigma / (p.alpha + p.sigma) for p in (first, last)]
        start = x.double() / (first.alpha + first.sigma)
        y, integral, nfe = transport(
            velocity, start, ends, None if exact else probe, rtol, atol, progress
        )
        scale = last.alpha + last.sigma
        log_p = normal_log_pdf(scale * y, 0.0, self.schedule.init_sigma).flatten(1).sum(1)
        stretch = x[0].numel() * math.log(scale / (first.alpha + first.sigma))
        return log_p + integral + stretch, torch.from_numpy(nfe)

    # --- the network ---

    def _noise(self, seeds: Tensor, x: Tensor, step: int) -> Tensor:
        noise = randn(seeds, x.shape[1:], step=step, stream=Stream.FORWARD, device=x.device)
        return noise.double()

    def _point(self, level: float) -> Point:
        last, first = self._walk.points
        for p in (last, first):  # as they are: their quotient may be infinite, or rounded
            if level == p.sigma / (p.alpha + p.sigma):
                return p
        return self._walk.at_ratio(level / (1 - level))

    def _predict(
        self, x: Tensor, points: list[Point], cond: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """The data that the network predicts, clipped, and its raw variance if it has one."""
        times = np.array([p.time for p in points])
        given = x
        if self.prediction == "edm":
            sigma = np.array([p.sigma for p in points])
            times = np.log(sigma) / 4
            given = x * column(1 / np.hypot(sigma, self.schedule.sigma_data), x)
        kind = self._dtype or x.dtype
        t = torch.from_numpy(times).to(x.device, kind if kind == torch.float64 else torch.float32)
        m, v = self.model(given.to(kind), t, **cond).to(x.dtype), None
        if m.shape != x.shape and m.shape[1] == 2 * x.shape[1]:
            m, v = m.chunk(2, dim=1)
            self.learned = True
        p, q = np.array([self._walk.conversion(point) for point in points]).T
        x0 = column(p, x) * x + column(q, x) * m
        return x0 if self.clip is None else x0.clamp(-self.clip, self.clip), v

    def _velocity(self, y: Tensor, points: list[Point], cond: Mapping[str, Tensor]) -> Tensor:
        """dy/ds = noise - x0 = x / sigma - (alpha + sigma) / sigma x0."""
        alpha = np.array([p.alpha for p in points])
        sigma = np.array([p.sigma for p in points])
        x = y * column(alpha + sigma, y)
        x0, _ = self._predict(x, points, cond)
        return column(1 / sigma, x) * x - column((alpha + sigma) / sigma, x) * x0
