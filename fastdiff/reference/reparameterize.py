"""Reparameterized sampling in plain PyTorch: the definition of the arithmetic.

Kingma and Welling, "Auto-Encoding Variational Bayes", ICLR 2014: the sample is their equation 10
(section 2.4 is the trick itself), the divergence their appendix B.

The order of the float32 operations of z is the contract: kernels give the same bits. The
divergence is a sum, which a kernel may take in another order.
"""

from __future__ import annotations

import torch

from fastdiff.reference.reverse_step import polynomial_exp


def _computed(t: torch.Tensor) -> torch.Tensor:
    """16-bit types are computed in float32; float32 and float64 in their own."""
    return t if t.dtype in (torch.float32, torch.float64) else t.float()


def reparameterize(
    mu: torch.Tensor, logvar: torch.Tensor, eps: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """z = mu + exp(logvar / 2) eps, and KL(N(mu, exp(logvar)) || N(0, I)) of each sample.

    Differentiable by autograd in float64; in float32 the exponential is a polynomial with integer
    steps that autograd cannot see through, use `reparameterize_backward`.

    Args:
        mu: (N, *S) float64, float32, bfloat16 or float16.
        logvar: same shape and dtype, natural logarithm of the variance.
        eps: (N, *S) unit normals, float32 or float64.

    Returns:
        z: (N, *S), dtype of mu.
        kl: (N,) in nats, float32 (float64 where mu is): half the sum over the elements of
            mu^2 + exp(logvar) - 1 - logvar.
    """
    m, lv = _computed(mu), _computed(logvar)
    sd = polynomial_exp(0.5 * lv)
    z = m + sd * eps.to(m.dtype)
    # sd^2 - 1 is exact where the variance is near 1, so a posterior at the prior costs no digits
    terms = m * m + ((sd * sd - 1) - lv)
    kl = 0.5 * terms.unsqueeze(-1).flatten(1).sum(1)  # a sample may be a scalar
    return z.to(mu.dtype), kl


def reparameterize_backward(
    grad_z: torch.Tensor | None,
    grad_kl: torch.Tensor | None,
    mu: torch.Tensor,
    logvar: torch.Tensor,
    eps: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of mu and logvar; None says that an output was not used.

    dz/dmu = 1, dz/dlogvar = eps sd / 2, dkl/dmu = mu, dkl/dlogvar = (sd^2 - 1) / 2.

    Args:
        grad_z: (N, *S), dtype of mu.
        grad_kl: (N,), dtype of kl.
        mu, logvar, eps: as in `reparameterize`.

    Returns:
        Two (N, *S) tensors, dtype of mu.
    """
    m, lv = _computed(mu), _computed(logvar)
    sd = polynomial_exp(0.5 * lv)
    g = torch.zeros_like(m) if grad_z is None else grad_z.to(m.dtype)
    per_sample = (-1,) + (1,) * (m.dim() - 1)
    k = m.new_zeros(per_sample[1:]) if grad_kl is None else grad_kl.to(m.dtype).view(per_sample)
    grad_mu = g + k * m
    grad_logvar = 0.5 * (g * (sd * eps.to(m.dtype)) + k * (sd * sd - 1))
    return grad_mu.to(mu.dtype), grad_logvar.to(mu.dtype)
