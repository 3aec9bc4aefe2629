"""Bayes' rule where it has closed forms, and the identity that variational methods rest on.

    p(z | x) = p(x | z) p(z) / p(x),      p(x) = int p(x | z) p(z) dz   (the evidence)

A prior is conjugate to a likelihood if the posterior is of the prior's family. Then the integral
need not be done: the ratio p(x | z) p(z) / p(z | x) is p(x) at every z, and reading the normalising
constants off it gives the evidence. Where nothing is conjugate and z is one number, `log_evidence`
integrates.

For any distribution q(z), multiplying and dividing by it inside log p(x) = E_q[log p(x)] gives

    log p(x) = E_q[log p(x | z) + log p(z) - log q(z)] + KL(q || p(z | x)) = ELBO(q) + KL,

so the ELBO is at most log p(x), by a gap that is the error of q (`fastdiff.reference.vae` uses it
with a network for q, `gmm` with the E step, `likelihood` with the noising chain).

Data are given by their sufficient statistics, parameters as tensors of any dtype that broadcast.
Logarithms are natural. Sources: Bishop 2006, "Pattern Recognition and Machine Learning", sections
2.1 to 2.3 and 10.1; Gelman et al. 2013, "Bayesian Data Analysis", chapter 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff.reference import distributions
from fastdiff.reference.distributions import normal_log_pdf

__all__ = [
    "Beta", "Dirichlet", "Gamma", "Normal", "elbo", "kl", "kl_beta", "kl_dirichlet", "kl_gamma",
    "kl_normal", "log_evidence", "quadrature", "update_bernoulli", "update_categorical",
    "update_normal", "update_poisson",
]  # fmt: skip

LogDensity = Callable[[Tensor], Tensor]


class Normal(NamedTuple):
    """N(mean, variance), of a mean that is not known."""

    mean: Tensor
    variance: Tensor


class Beta(NamedTuple):
    """Density z^(a - 1) (1 - z)^(b - 1) / B(a, b) on (0, 1), of a probability."""

    a: Tensor
    b: Tensor


class Gamma(NamedTuple):
    """Density rate^shape z^(shape - 1) exp(-rate z) / Gamma(shape) on (0, inf), of a rate."""

    shape: Tensor
    rate: Tensor


class Dirichlet(NamedTuple):
    """Density prod_k z_k^(a_k - 1) / B(a) on the simplex; a is `(..., K)`."""

    a: Tensor


def _log_beta(a: Tensor, b: Tensor) -> Tensor:
    return torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)


def _log_beta_of(a: Tensor) -> Tensor:
    """log B(a) = sum_k log Gamma(a_k) - log Gamma(sum_k a_k), over the last dimension."""
    return torch.lgamma(a).sum(-1) - torch.lgamma(a.sum(-1))


# --- conjugate pairs: the posterior, and the log evidence --------------------------------------


def update_normal(prior: Normal, x: Tensor, noise: Tensor | float) -> tuple[Normal, Tensor]:
    """x_i ~ N(z, noise) with z ~ N(mean, variance).

    The exponents add: precision 1/variance + n/noise, and the posterior's mean is the average of
    the prior's and the data's, weighted with their precisions. The denoiser of a diffusion model is
    this with one x: the posterior of clean data given a noised image.

    The evidence is that of jointly Gaussian x_i, with covariance noise I + variance 1 1^T. Its
    determinant is noise^n (1 + n variance / noise), and its inverse splits the quadratic form into
    the scatter about the data's mean and the distance of that mean from the prior's:

        log p(x) = sum_i log N(x_i; xbar, noise) + log N(xbar; mean, variance + noise / n)
                   - log N(xbar; xbar, noise / n).

    Args:
        x: `(..., n)`, n at least 1. noise: variance of each x_i.

    Returns:
        the posterior, and log p(x) `(...)`.
    """
    noise = torch.as_tensor(noise, dtype=x.dtype, device=x.device)
    n, average = x.shape[-1], x.mean(-1)
    variance = 1 / (1 / prior.variance + n / noise)
    mean = variance * (prior.mean / prior.variance + n * average / noise)
    each = normal_log_pdf(x, average[..., None], noise.sqrt()[..., None]).sum(-1)
    of_average = normal_log_pdf(average, prior.mean, (prior.variance + noise / n).sqrt())
    own = normal_log_pdf(average, average, (noise / n).sqrt())
    return Normal(mean, variance), each + of_average - own


def update_bernoulli(prior: Beta, ones: Tensor, zeros: Tensor) -> tuple[Beta, Tensor]:
    """x_i in {0, 1} with P(x_i = 1) = z and z ~ Beta(a, b): Beta(a + ones, b + zeros).

    The likelihood z^ones (1 - z)^zeros multiplies the prior's powers; the quotient of the two
    normalising constants is left: p(x) = B(a + ones, b + zeros) / B(a, b), for the sequence x in
    its order. The prior counts like a - 1 ones and b - 1 zeros seen before.
    """
    posterior = Beta(prior.a + ones, prior.b + zeros)
    return posterior, _log_beta(*posterior) - _log_beta(*prior)


def update_categorical(prior: Dirichlet, counts: Tensor) -> tuple[Dirichlet, Tensor]:
    """x_i one of K with P(x_i = k) = z_k and z ~ Dirichlet(a): `update_bernoulli` for K values.

    Args:
        counts: `(..., K)`, how often each value was seen.

    Returns:
        Dirichlet(a + counts), and log p(x) = log B(a + counts) - log B(a), `(...)`.
    """
    posterior = Dirichlet(prior.a + counts)
    return posterior, _log_beta_of(posterior.a) - _log_beta_of(prior.a)


def update_poisson(prior: Gamma, x: Tensor) -> tuple[Gamma, Tensor]:
    """Counts x_i ~ Poisson(z) with z ~ Gamma(shape, rate): Gamma(shape + sum x, rate + n).

    The likelihood is z^(sum x) exp(-n z) / prod x_i!, so

        p(x) = Gamma(shape') rate^shape / (Gamma(shape) rate'^shape' prod x_i!).

    Args:
        x: `(..., n)`.

    Returns:
        the posterior, and log p(x) `(...)`.
    """
    posterior = Gamma(prior.shape + x.sum(-1), prior.rate + x.shape[-1])

    def log_norm(gamma: Gamma) -> Tensor:
        return torch.lgamma(gamma.shape) - gamma.shape * gamma.rate.log()

    factorials = torch.lgamma(x + 1).sum(-1)
    return posterior, log_norm(posterior) - log_norm(prior) - factorials


# --- divergences -----------------------------------------------------------------------------


def kl_normal(q: Normal, p: Normal) -> Tensor:
    """KL(q || p), derived in `distributions.kl_normal`, which takes logarithms of the variances."""
    return distributions.kl_normal(q.mean, q.variance.log(), p.mean, p.variance.log())


def kl_beta(q: Beta, p: Beta) -> Tensor:
    """KL(q || p): a Beta is a Dirichlet of two values, z and 1 - z."""
    return kl_dirichlet(Dirichlet(torch.stack(q, -1)), Dirichlet(torch.stack(p, -1)))


def kl_dirichlet(q: Dirichlet, p: Dirichlet) -> Tensor:
    """KL(q || p) = log B(p) - log B(q) + sum_k (q_k - p_k) (psi(q_k) - psi(sum q)).

    E_q[log z_k] is the derivative of log B(q) by q_k, as of any exponential family, where
    log B is the log-normaliser: psi(q_k) - psi(sum_k q_k), psi = (log Gamma)'.
    """
    mean_log = torch.digamma(q.a) - torch.digamma(q.a.sum(-1, keepdim=True))
    return _log_beta_of(p.a) - _log_beta_of(q.a) + ((q.a - p.a) * mean_log).sum(-1)


def kl_gamma(q: Gamma, p: Gamma) -> Tensor:
    """KL(q || p), from E_q[z] = shape / rate and E_q[log z] = psi(shape) - log rate.

    log q - log p = s log r - s' log r' - log Gamma(s) + log Gamma(s') + (s - s') log z - (r - r') z
    for q = (s, r) and p = (s', r'); its mean, with log r taken out of E[log z], is below.
    """
    return (
        (q.shape - p.shape) * torch.digamma(q.shape)
        - torch.lgamma(q.shape)
        + torch.lgamma(p.shape)
        + p.shape * (q.rate.log() - p.rate.log())
        + q.shape * (p.rate / q.rate - 1)
    )


# --- by integration --------------------------------------------------------------------------


def quadrature(low: float, high: float, n: int = 2000) -> tuple[Tensor, Tensor]:
    """Nodes and weights `(n,)`, float64, of an integral over (low, high); either may be infinite.

    Double exponential substitution (Takahasi and Mori 1974): a change of variables under which
    every smooth integrand, and one with a root at an end, decays doubly exponentially, so that the
    trapezoidal rule with equal steps converges exponentially. z = tanh(pi/2 sinh u) for a finite
    range, exp(pi/2 sinh u) for a half line, sinh(pi/2 sinh u) for the whole one. The nodes crowd at
    the ends, and on a line at 0, where the bulk of the integrand should be; those nearest to an end
    other than 0 may round to it.

    Raises:
        ValueError: the range is empty, or n is below 2.
    """
    if not low < high or n < 2:
        raise ValueError(
            f"quadrature: low must be below high and n at least 2, got {low}, {high} and {n}"
        )
    if math.isinf(low) and not math.isinf(high):
        z, weights = quadrature(-high, math.inf, n)
        return -z, weights
    finite = not math.isinf(high)
    reach = 3.0 if finite else 4.0  # 2e-14 of a finite range from its ends; e^43 out otherwise
    u = torch.linspace(-reach, reach, n, dtype=torch.float64)
    step = float(u[1] - u[0])
    inner, slope = math.pi / 2 * torch.sinh(u), math.pi / 2 * torch.cosh(u) * step
    if finite:
        # distances from the nearer end, not from the middle, keep their digits
        side = (high - low) / (1 + torch.exp(2 * inner.abs()))
        z = torch.where(u < 0, low + side, high - side)
        return z, (high - low) / 2 * slope / torch.cosh(inner).square()
    if math.isinf(low):
        return torch.sinh(inner), slope * torch.cosh(inner)
    return low + torch.exp(inner), slope * torch.exp(inner)


def log_evidence(log_joint: LogDensity, low: float, high: float, n: int = 2000) -> Tensor:
    """log int exp(log_joint(z)) dz over (low, high), the largest value taken out.

    Args:
        log_joint: z `(n,)` float64 -> log p(x | z) + log p(z).
    """
    z, weights = quadrature(low, high, n)
    return torch.logsumexp(log_joint(z) + weights.log(), 0)


def elbo(
    log_joint: LogDensity, log_q: LogDensity, low: float, high: float, n: int = 2000
) -> Tensor:
    """E_q[log p(x, z) - log q(z)], at most log p(x).

    Args:
        log_joint: as in `log_evidence`. log_q: log q(z), normalised on (low, high).
    """
    z, weights = quadrature(low, high, n)
    log_density = log_q(z)
    density = log_density.exp()
    inside = density > 0  # 0 log 0 = 0
    return (weights * density)[inside] @ (log_joint(z) - log_density)[inside]


def kl(log_q: LogDensity, log_p: LogDensity, low: float, high: float, n: int = 2000) -> Tensor:
    """KL(q || p) = E_q[log q - log p]: at least 0, by Jensen's inequality for the logarithm.

    Not a distance: KL(q || p) asks that p be wide where q has mass, KL(p || q) the opposite.
    """
    return -elbo(log_p, log_q, low, high, n)
