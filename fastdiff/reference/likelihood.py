"""The variational bound of a diffusion model in plain PyTorch: its terms, and losses made of them.

The reverse chain p(x_T) p(x_{T-1} | x_T) ... p(x_0 | x_1) is a latent-variable model whose latents
are the noised images, and q(x_{1:T} | x_0) its encoder, with nothing to learn. So, as for any such
model, -log p(x_0) <= E_q[log q(x_{1:T} | x_0) - log p(x_{0:T})], and with Bayes' rule for q given
x_0, q(x_t | x_{t-1}) = q(x_{t-1} | x_t, x_0) q(x_t | x_0) / q(x_{t-1} | x_0), the quotients
telescope to (Ho et al. 2020, DDPM, arXiv:2006.11239, equation 5 and appendix A)

    L_VLB = L_T + sum_{t=2..T} L_{t-1} + L_0,

    L_T     = KL(q(x_T | x_0) || N(0, I))                          nothing to learn
    L_{t-1} = E_q KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))    two Gaussians: a closed form
    L_0     = E_q[-log p(x_0 | x_1)]                               the decoder

The gap to -log p(x_0) is KL(q(x_{1:T} | x_0) || p(x_{1:T} | x_0)): none where p's chain is q's own,
which needs Gaussian data.

Times in the code are those of `fastdiff.reference.diffusion`: 0 ... T-1 for the noised images,
clean data at -1, alphabar_{-1} = 1. The term of time t is that of the step from x_t to x_{t-1}: the
decoder for t = 0. Likelihoods are in nats; `bits_per_dim` converts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff.reference.diffusion import Coefficient, marginal, posterior
from fastdiff.reference.distributions import discretized_normal, kl_normal, normal_log_pdf

__all__ = [
    "Bound", "TimeSampler", "bits_per_dim", "bound", "data_weight", "hybrid_loss",
    "learned_logvar", "prior_term", "reverse_moments", "snr", "step_term",
]  # fmt: skip

# (x_t, t) -> mean and log-variance of p(x_{t-1} | x_t); t is (N,)
Reverse = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def bits_per_dim(nats: Tensor, dims: int) -> Tensor:
    """Nats of a sample of `dims` elements as bits an element: nats / (dims log 2)."""
    return nats / (dims * math.log(2))


def prior_term(x0: Tensor, alphabar: Coefficient) -> Tensor:
    """L_T = KL(N(sqrt(alphabar) x0, (1 - alphabar) I) || N(0, I)), `(N,)` in nats.

    Args:
        x0: `(N, *S)`. alphabar: that of the last time.
    """
    last = torch.as_tensor(alphabar, dtype=x0.dtype, device=x0.device)
    zero = torch.zeros_like(x0)
    each = kl_normal(last.sqrt() * x0, torch.log1p(-last), zero, zero)
    return each.flatten(1).sum(1)


def learned_logvar(v: Tensor, alphabar: Tensor, alphabar_prev: Tensor, least: Tensor) -> Tensor:
    """log-variance of the reverse step, between beta~_t and beta_t as v goes from -1 to 1.

    Nichol and Dhariwal 2021 (arXiv:2102.09672), equation 15: exp(f log beta_t + (1 - f) log
    beta~_t), with f = (v + 1) / 2 for a network's raw output v. The two ends are right for unit
    normal data and for data at a point; `ancestral_step` has them as "large" and "small".

    Args:
        v: `(N, *S)`. alphabar, alphabar_prev: of x_t and x_{t-1}, broadcast against v.
        least: in place of beta~_t where that is 0, which it is at the first time: the paper takes
            beta~ of the time after.
    """
    beta = 1 - alphabar / alphabar_prev
    small = (1 - alphabar_prev) / (1 - alphabar) * beta
    small = torch.where(small > 0, small, least)
    f = (v + 1) / 2
    return f * beta.log() + (1 - f) * small.log()


def reverse_moments(
    x0: Tensor, x: Tensor, t: Tensor, alphabars: Tensor, variance: str | Tensor = "small"
) -> tuple[Tensor, Tensor]:
    """Mean and log-variance of p(x_{t-1} | x_t): the posterior's at an estimate of the data.

    Args:
        x0: the network's estimate, `(N, *S)`. x: x_t. t: `(N,)`, int64.
        alphabars: `(T,)`, T at least 2.
        variance: "small" (beta~_t), "large" (beta_t), or a network's raw v for `learned_logvar`,
            the shape of x. At t = 0, beta~_0 = 0 is replaced by beta~_1, since a point mass gives
            every other image the likelihood 0.

    Raises:
        ValueError: another name, or fewer than 2 times.
    """
    if len(alphabars) < 2:
        raise ValueError(f"reverse_moments: alphabars must have 2 times, got {len(alphabars)}")
    if isinstance(variance, str):
        if variance not in ("small", "large"):
            raise ValueError(
                f"reverse_moments: variance must be 'small', 'large' or a tensor, got {variance!r}"
            )
        variance = torch.full_like(x, -1.0 if variance == "small" else 1.0)
    now, before = _at(alphabars, t, x)
    mean, _ = posterior(x0, x, now, before)
    first, second = alphabars[0].to(x), alphabars[1].to(x)
    least = (1 - first) / (1 - second) * (1 - second / first)
    return mean, learned_logvar(variance, now, before, least)


def step_term(
    x0: Tensor,
    x: Tensor,
    t: Tensor,
    alphabars: Tensor,
    mean: Tensor,
    logvar: Tensor,
    *,
    bins: int | None = 256,
) -> Tensor:
    """The term of time t of each sample at its x_t, `(N,)` in nats: L_0 where t = 0, else L_{t-1}.

    L_0 is the mass that N(mean, exp(logvar)) puts on the bin of each pixel
    (`distributions.discretized_normal`; DDPM, equation 13), or its density for data that are real
    numbers.

    Args:
        x0: the data, `(N, *S)`; levels in [-1, 1]. x: x_t. t: `(N,)`. alphabars: `(T,)`.
        mean, logvar: of p(x_{t-1} | x_t), broadcast against x.
        bins: number of levels of a pixel; None for a density.
    """
    now, before = _at(alphabars, t, x)
    first = (t == 0).view(now.shape)
    true_mean, true_variance = posterior(x0, x, now, before)
    true_variance = torch.as_tensor(true_variance, device=x.device)
    # beta~_0 = 0: its logarithm is not used, and must not make a NaN of the gradient
    true_logvar = torch.where(first, torch.ones_like(true_variance), true_variance).log()
    kl = kl_normal(true_mean, true_logvar, mean, logvar)
    scale = torch.exp(0.5 * logvar)
    if bins is None:
        decoder = -normal_log_pdf(x0, mean, scale)
    else:
        decoder = -discretized_normal(x0, mean, scale, bins=bins)
    return torch.where(first, decoder, kl).flatten(1).sum(1)


class Bound(NamedTuple):
    """The terms of L_VLB, in nats.

    Attributes:
        prior: `(N,)`, L_T.
        steps: `(N, T)`, the term of each time: L_0 at 0, then L_1 ... L_{T-1}.
    """

    prior: Tensor
    steps: Tensor

    @property
    def total(self) -> Tensor:
        """`(N,)`: at least -log p(x_0), in expectation over the draws of x_t."""
        return self.prior + self.steps.sum(1)


def bound(
    reverse: Reverse, x0: Tensor, alphabars: Tensor, noise: Tensor, *, bins: int | None = 256
) -> Bound:
    """Unbiased estimate of L_VLB: every term, each at one draw of its x_t.

    Args:
        reverse: gives mean and log-variance of p(x_{t-1} | x_t), for instance by `reverse_moments`.
        x0: `(N, *S)`. alphabars: `(T,)`.
        noise: unit normals `(T, N, *S)`, those of time t at t.
        bins: as in `step_term`.
    """
    if noise.shape != (len(alphabars), *x0.shape):
        raise ValueError(
            f"bound: noise must have the shape {(len(alphabars), *x0.shape)}, "
            f"got {tuple(noise.shape)}"
        )
    steps = []
    for time, eps in enumerate(noise):
        t = torch.full((len(x0),), time, dtype=torch.int64, device=x0.device)
        x = marginal(x0, _at(alphabars, t, x0)[0], eps)
        steps.append(step_term(x0, x, t, alphabars, *reverse(x, t), bins=bins))
    return Bound(prior_term(x0, alphabars[-1]), torch.stack(steps, 1))


def hybrid_loss(
    simple: Tensor, term: Tensor, times: int, dims: int, weight: float = 1e-3
) -> Tensor:
    """L_simple + weight L_VLB: Nichol and Dhariwal 2021, equation 16, of each sample.

    L_simple does not see the variance, and L_VLB trains the mean badly, as its terms differ by
    orders of magnitude. So the term must be computed with the mean detached from the graph:
    ``step_term(..., mean.detach(), logvar)`` teaches the variance alone. With t drawn evenly from
    T times, T times the term of t estimates L_VLB (less L_T, which is constant); it is counted in
    bits/dim, as the authors' code does, in whose unit their weight 0.001 is meant.

    Args:
        simple: `(N,)`, mean squared error of the noise. term: `(N,)` nats, of the same t.
        times: T. dims: elements of a sample.
    """
    return simple + weight * times * bits_per_dim(term, dims)


def snr(alphabar: Tensor) -> Tensor:
    """Signal-to-noise ratio alphabar / (1 - alphabar) of x_t, for data of unit variance."""
    return alphabar / (1 - alphabar)


def data_weight(alphabar: Tensor, alphabar_prev: Tensor) -> Tensor:
    """Weight of the squared error of x_0 in L_{t-1}: (SNR(t-1) - SNR(t)) / 2.

    With the posterior's own variance the divergence is |mean - mean_p|^2 / (2 beta~_t), and the
    means differ by sqrt(alphabar_{t-1}) beta_t / (1 - alphabar_t) times the error of x_0. The
    square of that over 2 beta~_t is alphabar_{t-1} beta_t / ((1 - alphabar_t) (1 - alphabar_{t-1}))
    / 2, half the difference of the ratios (Kingma et al. 2021, arXiv:2107.00630, equations 13, 14).
    The weight of the noise is this by 1 / SNR(t), DDPM's equation 12 with sigma_t^2 = beta~_t;
    L_simple replaces it by 1, and `diffusion.min_snr_weight` by min(SNR, gamma) / SNR.
    """
    beta = 1 - alphabar / alphabar_prev
    return alphabar_prev * beta / ((1 - alphabar) * (1 - alphabar_prev)) / 2


class TimeSampler:
    """Draws training times where the terms of L_VLB are large.

    Nichol and Dhariwal 2021 (arXiv:2102.09672), section 3.3 and equation 18:
    sum_t L_t = E_{t ~ p}[L_t / p_t] for any p > 0, and the variance of that estimate is least for
    p_t in proportion to sqrt(E[L_t^2]): with sum p = 1, Lagrange's condition on
    sum_t E[L_t^2] / p_t is E[L_t^2] / p_t^2 = const. The expectation is the mean over the last few
    losses seen at t; until all times have them, p is uniform.

    Args:
        times: T. history: losses kept a time, 10 in the paper.
        uniform: share of uniform draws, so that no time is forgotten.
    """

    def __init__(self, times: int, history: int = 10, uniform: float = 1e-3) -> None:
        if times < 1 or history < 1:
            raise ValueError(
                f"TimeSampler: times and history must be positive, got {times} and {history}"
            )
        if not 0 <= uniform <= 1:
            raise ValueError(f"TimeSampler: uniform must be in [0, 1], got {uniform}")
        self._losses = torch.zeros(times, history, dtype=torch.float64)
        self._seen = torch.zeros(times, dtype=torch.int64)
        self._uniform = uniform

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Remember the losses `(N,)` of the times `(N,)`, the oldest of a time making room."""
        history = self._losses.shape[1]
        for time, loss in zip(t.tolist(), losses.detach().tolist(), strict=True):
            self._losses[time, self._seen[time] % history] = loss
            self._seen[time] += 1

    def probabilities(self) -> Tensor:
        """p, `(T,)` float64 of sum 1."""
        times, history = self._losses.shape
        even = torch.full((times,), 1 / times, dtype=torch.float64)
        size = self._losses.square().mean(1).sqrt()
        if bool((self._seen < history).any()) or not bool(size.sum() > 0):
            return even
        return (1 - self._uniform) * size / size.sum() + self._uniform * even

    def sample(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """n times, int64, and weights 1 / (T p_t), float64: E[weight L_t] is the mean of L."""
        p = self.probabilities()
        t = torch.multinomial(p, n, replacement=True, generator=generator)
        return t, 1 / (len(p) * p[t])


def _at(alphabars: Tensor, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """alphabar_t and alphabar_{t-1} of each sample, shaped to broadcast over x."""
    shape = (-1,) + (1,) * (x.dim() - 1)
    before = torch.cat([torch.ones_like(alphabars[:1]), alphabars[:-1]])
    return alphabars[t].to(x).view(shape), before[t].to(x).view(shape)
