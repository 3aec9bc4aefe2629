"""The distributions of the field in plain PyTorch, with logarithms that stay right in the tails.

Arguments are tensors or numbers that broadcast against each other; results have the dtype of `x`,
and logarithms are natural. A probability far out underflows (in float32 below 1e-45, which a unit
normal reaches at 14 deviations), so its logarithm is never taken of a probability: each logarithm
has a form of its own, differentiable everywhere, derived where it stands.

A pixel is no real number but one of `bins` levels, spaced evenly on [low, high]. Its likelihood is
the mass that a density puts on the bin around the level,

    P(x) = F(x + h) - F(x - h),      h = (high - low) / (bins - 1) / 2,

with the first bin open to -infinity and the last to +infinity, so that the levels have probability
1 in all: Salimans et al. 2017 (PixelCNN++, arXiv:1701.05517, equation 2) for the logistic
distribution, Ho et al. 2020 (DDPM, arXiv:2006.11239, equation 13) for the normal one. A mixture of
binned densities is the binned mixture, as P is linear in the density.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

__all__ = [
    "bernoulli_log_pmf", "bernoulli_mean", "bernoulli_pmf", "bernoulli_variance",
    "discretized_logistic", "discretized_normal", "kl_normal", "log1mexp", "log_ndtr",
    "logistic_cdf", "logistic_log_cdf", "logistic_log_pdf", "logistic_pdf", "logistic_variance",
    "mixture", "normal_cdf", "normal_log_cdf", "normal_log_pdf", "normal_pdf", "uniform_cdf",
    "uniform_mean", "uniform_pdf", "uniform_variance",
]  # fmt: skip

Value = float | Tensor

_LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)

# Gauss-Legendre nodes and weights of 8 points on [-1, 1], the half above 0
_NODES = (0.18343464249564978, 0.525532409916329, 0.7966664774136267, 0.9602898564975362)
_WEIGHTS = (0.3626837833783620, 0.3137066458778873, 0.2223810344533745, 0.1012285362903763)


def _log(value: Value) -> Value:
    return value.log() if isinstance(value, Tensor) else math.log(value)


# --- what the logarithms are built of --------------------------------------------------------


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(-x)) for x > 0.

    For small x, 1 - exp(-x) cancels, and expm1 does not; for large x it is so close to 1 that only
    log1p keeps the difference. The forms change at log 2 (Maechler 2012, "Accurately computing
    log(1 - exp(-|a|))"). Each is given a harmless argument where the other one is used, since its
    infinite slope there would turn gradients into NaN.
    """
    small = x < math.log(2)
    near = torch.where(small, x, 1.0)
    far = torch.where(small, 1.0, x)
    return torch.where(small, (-torch.expm1(-near)).log(), torch.log1p(-torch.exp(-far)))


def log_ndtr(z: Tensor) -> Tensor:
    """log Phi(z), Phi the CDF of the unit normal.

    Phi(z) = erfc(-z / sqrt 2) / 2 underflows for z below -14 in float32. erfc(y) = exp(-y^2)
    erfcx(y), with erfcx falling as 1/y, takes the exponential out: log Phi(z) =
    log(erfcx(-z / sqrt 2) / 2) - z^2 / 2. Above -1 it is log1p(-Phi(-z)), which keeps the tiny
    distance from 0. `torch.special.log_ndtr` has the same values, but its gradient,
    exp(-z^2 / 2 - log Phi(z)), loses z^2 ulp: 4 % at z = -1000 in float32.
    """
    low, high = z.clamp(max=-1.0), z.clamp(min=-1.0)
    tail = (torch.special.erfcx(-low * math.sqrt(0.5)) / 2).log() - low * low / 2
    return torch.where(z < -1, tail, torch.log1p(-torch.erfc(high * math.sqrt(0.5)) / 2))


# --- Normal ----------------------------------------------------------------------------------


def normal_log_pdf(x: Tensor, mean: Value = 0.0, scale: Value = 1.0) -> Tensor:
    """log N(x; mean, scale^2) = -z^2 / 2 - log scale - log sqrt(2 pi), z = (x - mean) / scale.

    The constant is that of the integral of exp(-z^2 / 2), sqrt(2 pi): its square is an integral
    over the plane, 2 pi int r exp(-r^2 / 2) dr = 2 pi. `scale` is the standard deviation.
    """
    z = (x - mean) / scale
    return -0.5 * z * z - _log(scale) - _LOG_SQRT_2PI


def normal_pdf(x: Tensor, mean: Value = 0.0, scale: Value = 1.0) -> Tensor:
    """N(x; mean, scale^2)."""
    return normal_log_pdf(x, mean, scale).exp()


def normal_log_cdf(x: Tensor, mean: Value = 0.0, scale: Value = 1.0) -> Tensor:
    """log of the probability of a value up to x."""
    return log_ndtr((x - mean) / scale)


def normal_cdf(x: Tensor, mean: Value = 0.0, scale: Value = 1.0) -> Tensor:
    """Probability of a value up to x: erfc(-z / sqrt 2) / 2, which unlike (1 + erf) / 2 keeps the
    digits of small probabilities."""
    return torch.erfc((mean - x) / scale * math.sqrt(0.5)) / 2


def kl_normal(mean: Tensor, logvar: Tensor, mean_p: Tensor, logvar_p: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(mean_p, exp(logvar_p))) of each element, in nats.

    E_q[log q - log p] = -1/2 - logvar/2 + logvar_p/2 + E_q[(x - mean_p)^2] / (2 var_p), and that
    expectation is var + (mean - mean_p)^2. With r = logvar - logvar_p it is
    (exp(r) - 1 - r + (mean - mean_p)^2 / var_p) / 2, whose first two terms are taken by expm1, for
    variances that are nearly alike.
    """
    ratio = logvar - logvar_p
    return 0.5 * (torch.expm1(ratio) - ratio + (mean - mean_p).square() * torch.exp(-logvar_p))


# --- Bernoulli -------------------------------------------------------------------------------


def bernoulli_pmf(x: Tensor, p: Value) -> Tensor:
    """p^x (1 - p)^(1 - x) for x in {0, 1}: p where x is 1, else 1 - p."""
    return x * p + (1 - x) * (1 - p)


def bernoulli_log_pmf(x: Tensor, logits: Value) -> Tensor:
    """log of the probability of x under p = logistic(logits), x in {0, 1}.

    x log p + (1 - x) log(1 - p) = x logits - softplus(logits), because p / (1 - p) = exp(logits)
    and 1 - p = 1 / (1 + exp(logits)). That difference cancels where the likely value came true, so
    log p = -softplus(-logits) and log(1 - p) = -softplus(logits) are summed instead. For x between
    0 and 1 (a grey level read as a probability, as the first VAEs did) it is the expectation of the
    logarithm over the bit, no density of x.
    """
    logits = torch.as_tensor(logits, dtype=x.dtype, device=x.device)
    return x * functional.logsigmoid(logits) + (1 - x) * functional.logsigmoid(-logits)


def bernoulli_mean(p: Tensor) -> Tensor:
    """E[x] = 1 p + 0 (1 - p) = p."""
    return p


def bernoulli_variance(p: Tensor) -> Tensor:
    """E[x^2] - E[x]^2 = p - p^2, since x^2 = x; as a product, which does not cancel near 1."""
    return p * (1 - p)


# --- Uniform ---------------------------------------------------------------------------------


def uniform_pdf(x: Tensor, low: Value = 0.0, high: Value = 1.0) -> Tensor:
    """1 / (high - low) on [low, high), 0 elsewhere."""
    return torch.where((x >= low) & (x < high), 1.0, 0.0).to(x.dtype) / (high - low)


def uniform_cdf(x: Tensor, low: Value = 0.0, high: Value = 1.0) -> Tensor:
    """Integral of the density up to x: (x - low) / (high - low) between 0 and 1."""
    return ((x - low) / (high - low)).clamp(0, 1)


def uniform_mean(low: Tensor, high: Tensor) -> Tensor:
    """Integral of x over [low, high] by its length: (high^2 - low^2) / 2 / (high - low)."""
    return (low + high) / 2


def uniform_variance(low: Tensor, high: Tensor) -> Tensor:
    """(high - low)^2 / 12: the integral of u^2 over [-1/2, 1/2] is 1/12."""
    return (high - low).square() / 12


# --- Logistic --------------------------------------------------------------------------------


def logistic_log_pdf(x: Tensor, mean: Value = 0.0, scale: Value = 1.0) -> Tensor:
    """log of the slope of `logistic_cdf`.

    s(z) = 1 / (1 + exp(-z)) has the slope s(z) (1 - s(z)) = s(z) s(-z), by scale for the inner
    derivative: log s(z) + log s(-z) - log scale.
    """
    z = (x - mean) / scale
    return functional.logsigmoid(z) + functional.logsigmoid(-z) - _log(scale)


def logistic_pdf(x: Tensor, mean: Value = 0.0, scale: Value = 1.0) -> Tensor:
    """Density s(z) s(-z) / scale of the logistic distribution."""
    return logistic_log_pdf(x, mean, scale).exp()


def logistic_log_cdf(x: Tensor, mean: Value = 0.0, scale: Value = 1.0) -> Tensor:
    """log s(z) = -softplus(-z)."""
    return functional.logsigmoid((x - mean) / scale)


def logistic_cdf(x: Tensor, mean: Value = 0.0, scale: Value = 1.0) -> Tensor:
    """s(z) = 1 / (1 + exp(-z)), z = (x - mean) / scale."""
    return torch.sigmoid((x - mean) / scale)


def logistic_variance(scale: Tensor) -> Tensor:
    """(pi scale)^2 / 3.

    The characteristic function is int_0^1 (u / (1 - u))^(i w) du = B(1 + i w, 1 - i w) =
    pi w / sinh(pi w) = 1 - (pi w)^2 / 6 + ..., whose quadratic term is -variance w^2 / 2.
    """
    return (math.pi * scale).square() / 3


# --- discretized -----------------------------------------------------------------------------


def _bins(
    x: Tensor, mean: Value, scale: Value, bins: int, low: float, high: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Distance of x from the mean and width of a bin, in scales; the scales; is x first, last."""
    if isinstance(bins, bool) or not isinstance(bins, int):
        raise TypeError(f"discretized: bins must be an int, got {type(bins).__name__}")
    if bins < 2:
        raise ValueError(f"discretized: bins must be at least 2, got {bins}")
    if not low < high:
        raise ValueError(f"discretized: low must be below high, got {low} and {high}")
    width = (high - low) / (bins - 1)
    scales = torch.as_tensor(scale, dtype=x.dtype, device=x.device)
    away = (x - mean) + torch.zeros_like(scales)  # of the broadcast shape
    first, last = x < low + width / 2, x > high - width / 2
    return away, torch.full_like(away, width), scales, first, last


def discretized_logistic(
    x: Tensor,
    mean: Value,
    scale: Value,
    *,
    bins: int = 256,
    low: float = -1.0,
    high: float = 1.0,
) -> Tensor:
    """log of the mass that a logistic distribution puts on the bin of x: PixelCNN++, equation 2.

    With the edges a > b in scales from the mean and s the logistic function,

        s(a) - s(b) = (exp(-b) - exp(-a)) s(a) s(b) = s(a) s(-b) (1 - exp(-(a - b))),

    as s(b) exp(-b) = s(-b). All three factors have exact logarithms, at any distance and for any
    width of the bin, where the difference itself underflows (PixelCNN++'s own code then falls back
    on the density in the middle of the bin). The open bins have s(a) and s(-b) alone.

    Args:
        x: levels on the grid. mean, scale: broadcast against x; scale positive.
        bins: number of levels, at least 2. low, high: the first and the last of them.

    Returns:
        log P(x) in nats, of the broadcast shape.

    Raises:
        TypeError, ValueError: bins or the range break a rule above.
    """
    away, width, scale, first, last = _bins(x, mean, scale, bins, low, high)
    below = functional.logsigmoid((away + width / 2) / scale)
    above = functional.logsigmoid((width / 2 - away) / scale)
    inner = below + above + log1mexp(width / scale)
    return torch.where(first, below, torch.where(last, above, inner))


def discretized_normal(
    x: Tensor,
    mean: Value,
    scale: Value,
    *,
    bins: int = 256,
    low: float = -1.0,
    high: float = 1.0,
) -> Tensor:
    """log of the mass that a normal distribution puts on the bin of x: DDPM, equation 13.

    The normal has no such product as the logistic, so there are two forms. Both take |x - mean|
    with its sign turned, by symmetry, so that the bin lies at or left of the mean.

    Wide bins, or far ones: log Phi(a) + log(1 - exp(log Phi(b) - log Phi(a))). The two logarithms
    differ by at least 0.8 there, so an ulp of them costs about an ulp of the result.

    Narrow bins: that difference would cancel. With m the middle and w the width in scales,
    Phi(a) - Phi(b) = phi(m) int exp(-m u - u^2 / 2) du over [-w/2, w/2], and where w < 1 and
    |m| w < 1 the integrand is so smooth that 8 Gauss-Legendre points leave less than 1e-16 of it.

    Args, Returns, Raises: as `discretized_logistic`; scale is the standard deviation.
    """
    away, width, scale, first, last = _bins(x, mean, scale, bins, low, high)
    middle, w = -away.abs() / scale, width / scale
    narrow = (w < 1) & (middle.abs() * w < 1)

    # each form sees a bin of its own kind where the other is used: no overflow, no NaN gradient
    m1, w1 = torch.where(narrow, middle, 0.0), torch.where(narrow, w, 0.5)
    integrand = torch.zeros_like(m1)
    for node, weight in zip(_NODES, _WEIGHTS, strict=True):
        u = w1 / 2 * node
        integrand = integrand + weight * torch.cosh(m1 * u) * torch.exp(-u * u / 2)
    near = normal_log_pdf(m1) + (w1 * integrand).log()

    a = torch.where(narrow, 0.5, (width / 2 - away.abs()) / scale)
    b = torch.where(narrow, -0.5, (-width / 2 - away.abs()) / scale)
    log_a = log_ndtr(a)
    far = log_a + log1mexp(log_a - log_ndtr(b))

    below, above = log_ndtr((away + width / 2) / scale), log_ndtr((width / 2 - away) / scale)
    inner = torch.where(narrow, near, far)
    return torch.where(first, below, torch.where(last, above, inner))


def mixture(logits: Tensor, log_probs: Tensor, dim: int = -1) -> Tensor:
    """log sum_k w_k p_k(x), with w = softmax(logits), from the logarithms of the components.

    The largest term is taken out of the sum (logsumexp), so a value far from every component keeps
    a finite likelihood. PixelCNN++, equation 2, is
    `mixture(logits, discretized_logistic(x[..., None], means, scales))`.

    Args:
        logits: unnormalised log weights, K along `dim`; broadcasts against log_probs.
        log_probs: log p_k(x), K along `dim`.
        dim: dimension of the components.
    """
    return torch.logsumexp(functional.log_softmax(logits, dim) + log_probs, dim)
