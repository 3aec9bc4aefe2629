"""The Gaussian diffusion process in plain PyTorch, as a text to read and to test against.

Notation, of Ho et al. 2020 (DDPM, arXiv:2006.11239), with times 0 ... T-1 and clean data at -1:
beta_t is the variance added by step t, a_t = 1 - beta_t, and alphabar_t = a_0 a_1 ... a_t, with
alphabar_{-1} = 1. Every function takes the coefficients it needs rather than a schedule, so that a
formula can be read alone. Coefficients are floats, or tensors that broadcast against x; results
have the dtype of x, and float64 is what the tests use.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "PREDICTIONS", "ancestral_step", "forward_chain", "forward_step", "from_prediction", "marginal",
    "min_snr_weight", "posterior", "simple_loss", "to_prediction",
]  # fmt: skip

Coefficient = float | Tensor

PREDICTIONS = ("epsilon", "sample", "v_prediction", "flow")


def _sqrt(value: Coefficient) -> Coefficient:
    return value.sqrt() if isinstance(value, Tensor) else math.sqrt(value)


def forward_step(x_prev: Tensor, beta: Coefficient, noise: Tensor) -> Tensor:
    """Draw x_t from q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I): DDPM, equation 2.

    Notes that write N(x_{t-1}, I), or leave out the factor sqrt(1 - beta_t), are wrong about this
    process: without the factor every step adds to the variance, which grows without bound, and the
    data are drowned but never become N(0, I). With it, variance v becomes (1 - beta_t) v + beta_t,
    which draws v towards 1 and leaves 1 as it is. (Processes that only add noise exist, as that of
    Song and Ermon 2019, arXiv:1907.05600; their last image is N(0, sigma^2 I), sigma large.)

    Args:
        x_prev: x_{t-1}, any shape.
        beta: beta_t, in (0, 1).
        noise: unit normal, the shape of `x_prev`.
    """
    return _sqrt(1 - beta) * x_prev + _sqrt(beta) * noise


def marginal(x0: Tensor, alphabar: Coefficient, noise: Tensor) -> Tensor:
    """Draw x_t from q(x_t | x_0) = N(sqrt(alphabar_t) x_0, (1 - alphabar_t) I): DDPM, equation 4.

    It is `forward_step` iterated, because a sum of independent Gaussians is Gaussian. By induction:
    if x_{t-1} has mean sqrt(alphabar_{t-1}) x_0 and variance 1 - alphabar_{t-1}, then x_t has mean
    sqrt(a_t alphabar_{t-1}) x_0 and variance a_t (1 - alphabar_{t-1}) + beta_t = 1 - alphabar_t.
    `forward_chain` follows that induction number by number.
    """
    return _sqrt(alphabar) * x0 + _sqrt(1 - alphabar) * noise


def forward_chain(betas: Tensor) -> tuple[Tensor, Tensor]:
    """Scale of x_0 and variance in x_t after steps 0 ... t, by iterating `forward_step`.

    Args:
        betas: `(T,)`.

    Returns:
        scale `(T,)`, equal to sqrt(alphabar_t), and variance `(T,)`, equal to 1 - alphabar_t.
    """
    scale, variance = betas.new_ones(()), betas.new_zeros(())
    scales, variances = [], []
    for beta in betas:
        scale = torch.sqrt(1 - beta) * scale
        variance = (1 - beta) * variance + beta
        scales.append(scale)
        variances.append(variance)
    return torch.stack(scales), torch.stack(variances)


def posterior(
    x0: Tensor, x: Tensor, alphabar: Coefficient, alphabar_prev: Coefficient
) -> tuple[Tensor, Coefficient]:
    """Mean and variance of q(x_{t-1} | x_t, x_0): DDPM, equations 6 and 7.

    By Bayes' rule it is proportional to q(x_t | x_{t-1}) q(x_{t-1} | x_0), a product of two
    Gaussians in x_{t-1}. Precisions add, a_t / beta_t + 1 / (1 - alphabar_{t-1}), whose inverse is

        variance = (1 - alphabar_{t-1}) / (1 - alphabar_t) * beta_t

    Notes that write (1 - alphabar_{t-1}) / (1 - alphabar_t) without beta_t are wrong: that ratio
    tends to 1 for late t, whereas the variance may never exceed beta_t, that of the forward step.
    The mean is the precision-weighted average of x_t / sqrt(a_t) and sqrt(alphabar_{t-1}) x_0.

    Args:
        x0: clean data. x: x_t, the same shape.
        alphabar: alphabar_t, below 1.
        alphabar_prev: alphabar_{t-1}; 1 at t = 0, where mean = x0 and variance = 0.

    Returns:
        the mean, shape of `x`, and the variance.
    """
    a = alphabar / alphabar_prev
    beta = 1 - a
    mean_x0 = _sqrt(alphabar_prev) * beta / (1 - alphabar)
    mean_x = _sqrt(a) * (1 - alphabar_prev) / (1 - alphabar)
    variance = (1 - alphabar_prev) / (1 - alphabar) * beta
    return mean_x0 * x0 + mean_x * x, variance


def to_prediction(
    kind: str, x0: Tensor, noise: Tensor, alpha: Coefficient, sigma: Coefficient
) -> Tensor:
    """What a network of the given kind should output for x = alpha * x0 + sigma * noise.

    Args:
        kind: "epsilon": noise. "sample": x0. "v_prediction": alpha * noise - sigma * x0 (Salimans &
            Ho 2022, arXiv:2202.00512, appendix D; for alpha^2 + sigma^2 = 1 the derivative of x by
            the angle). "flow": noise - x0 (Liu et al. 2022, arXiv:2209.03003; for alpha = 1 - t,
            sigma = t the derivative of x by t).
    """
    if kind == "epsilon":
        return noise
    if kind == "sample":
        return x0
    if kind == "v_prediction":
        return alpha * noise - sigma * x0
    if kind == "flow":
        return noise - x0
    raise ValueError(f"reference: kind must be one of {PREDICTIONS}, got {kind!r}")


def from_prediction(
    kind: str, x: Tensor, output: Tensor, alpha: Coefficient, sigma: Coefficient
) -> tuple[Tensor, Tensor]:
    """x0 and noise, given x = alpha * x0 + sigma * noise and the network's output.

    Each kind is a second linear equation; the pair has determinant sigma (sample), -alpha
    (epsilon), alpha^2 + sigma^2 (v_prediction), alpha + sigma (flow). Only "epsilon" cannot tell x0
    at alpha = 0, and only "sample" cannot tell the noise at sigma = 0.
    """
    if kind == "epsilon":
        return (x - sigma * output) / alpha, output
    if kind == "sample":
        return output, (x - alpha * output) / sigma
    if kind == "v_prediction":
        # alpha^2 + sigma^2 = 1 is not assumed, so that it holds for rounded coefficients too
        norm = alpha * alpha + sigma * sigma
        return (alpha * x - sigma * output) / norm, (sigma * x + alpha * output) / norm
    if kind == "flow":
        total = alpha + sigma
        return (x - sigma * output) / total, (x + alpha * output) / total
    raise ValueError(f"reference: kind must be one of {PREDICTIONS}, got {kind!r}")


def simple_loss(output: Tensor, target: Tensor, weight: Coefficient = 1.0) -> Tensor:
    """Mean squared error of each sample times its weight, averaged over the batch.

    DDPM's L_simple (equation 14) for noise and weight 1. `weight` is a float or `(N,)`; the result
    is a scalar.
    """
    error = (output - target).square().flatten(1).mean(dim=1)
    return (weight * error).mean()


def min_snr_weight(kind: str, alpha: Tensor, sigma: Tensor, gamma: float = 5.0) -> Tensor:
    """Min-SNR weight of the loss on a network's output: Hang et al. 2023 (arXiv:2303.09556).

    min(SNR, gamma) weighs the loss on x0, with SNR = alpha^2 / sigma^2. An error e in x0 is, at
    fixed x, an error alpha/sigma e in the noise, (alpha^2 + sigma^2)/sigma e in v and
    (alpha + sigma)/sigma e in the flow; the weight is divided by the square of that factor. With
    alpha^2 + sigma^2 = 1, that is min(SNR, gamma) / SNR and min(SNR, gamma) / (SNR + 1).

    Returns:
        The weight, shape and dtype of `alpha`.
    """
    factors = {
        "epsilon": alpha / sigma,
        "sample": torch.ones_like(alpha),
        "v_prediction": (alpha * alpha + sigma * sigma) / sigma,
        "flow": (alpha + sigma) / sigma,
    }
    if kind not in factors:
        raise ValueError(f"reference: kind must be one of {PREDICTIONS}, got {kind!r}")
    return ((alpha / sigma).square()).clamp(max=gamma) / factors[kind].square()


def ancestral_step(
    x: Tensor,
    x0: Tensor,
    alphabar: Coefficient,
    alphabar_prev: Coefficient,
    noise: Tensor,
    variance: str = "small",
) -> Tensor:
    """Draw x_{t-1} from p(x_{t-1} | x_t): DDPM, algorithm 2, with x0 the network's estimate.

    The mean is the posterior's. The variance is beta~_t, the posterior's own ("small", right for
    data at a point), or beta_t ("large", right for unit normal data); DDPM, section 3.2, finds
    them alike. With either, the step to clean data (`alphabar_prev` = 1) draws no noise.

    Args:
        x: x_t. x0: estimate of the data. noise: unit normal. All of one shape.
        alphabar, alphabar_prev: as in `posterior`.
        variance: "small" or "large".
    """
    mean, small = posterior(x0, x, alphabar, alphabar_prev)
    if variance not in ("small", "large"):
        raise ValueError(f"reference: variance must be 'small' or 'large', got {variance!r}")
    if not isinstance(alphabar_prev, Tensor) and alphabar_prev == 1:
        return mean
    large = 1 - alphabar / alphabar_prev
    if isinstance(large, Tensor):
        large = torch.where(torch.as_tensor(alphabar_prev) == 1, 0.0, large)
    return mean + _sqrt(small if variance == "small" else large) * noise
