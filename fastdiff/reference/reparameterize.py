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


Bounds = tuple[float, float]
UNBOUNDED: Bounds = (-float("inf"), float("inf"))


def reparameterize(
    mu: torch.Tensor, logvar: torch.Tensor, eps: torch.Tensor, clamp: Bounds = UNBOUNDED
) -> tuple[torch.Tensor, torch.Tensor]:
    """z = mu + exp(logvar / 2) eps, and KL(N(mu, exp(logvar)) || N(0, I)) of each sample.

    Differentiable by autograd in float64; in float32 the exponential is a polynomial with integer
    steps that autograd cannot see through, use `reparameterize_backward`.

    Args:
        mu: (N, *S) float64, float32, bfloat16 or float16.
        logvar: same shape and dtype, natural logarithm of the variance.
        eps: (N, *S) unit normals, or (N, K, *S) for K samples of each; float32 or float64.
        clamp: least and greatest logvar, what is beyond is moved there.

    Returns:
        z: shape of eps, dtype of mu.
        kl: (N,) in nats, float32 (float64 where mu is): half the sum over the elements of
            mu^2 + exp(logvar) - 1 - logvar.
    """
    m, lv = _computed(mu), _computed(logvar).clamp(*clamp)
    sd = polynomial_exp(0.5 * lv)
    several = eps.dim() > m.dim()
    mean, spread = (m.unsqueeze(1), sd.unsqueeze(1)) if several else (m, sd)
    z = mean + spread * eps.to(m.dtype)
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
    clamp: Bounds = UNBOUNDED,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of mu and logvar; None says that an output was not used.

    dz/dmu = 1, dz/dlogvar = eps sd / 2, dkl/dmu = mu, dkl/dlogvar = (sd^2 - 1) / 2; that of a
    logvar beyond its bounds is 0. Over several samples the gradients add up in their order.

    Args:
        grad_z: shape of eps, dtype of mu.
        grad_kl: (N,), dtype of kl.
        mu, logvar, eps, clamp: as in `reparameterize`.

    Returns:
        Two (N, *S) tensors, dtype of mu.
    """
    m, given = _computed(mu), _computed(logvar)
    sd = polynomial_exp(0.5 * given.clamp(*clamp))
    sums = torch.zeros_like(m), torch.zeros_like(m)
    if grad_z is not None:
        g, noise = (t if t.dim() > m.dim() else t.unsqueeze(1) for t in (grad_z, eps))
        for k in range(g.shape[1]):
            one = g[:, k].to(m.dtype)
            terms = one, one * (sd * noise[:, k].to(m.dtype))
            sums = terms if k == 0 else (sums[0] + terms[0], sums[1] + terms[1])
    per_sample = (-1,) + (1,) * (m.dim() - 1)
    w = m.new_zeros(per_sample[1:]) if grad_kl is None else grad_kl.to(m.dtype).view(per_sample)
    grad_mu = sums[0] + w * m
    grad_logvar = 0.5 * (sums[1] + w * (sd * sd - 1))
    # a NaN is not beyond a bound: it comes through
    beyond = (given < clamp[0]) | (given > clamp[1])
    grad_logvar = torch.where(beyond, torch.zeros_like(grad_logvar), grad_logvar)
    return grad_mu.to(mu.dtype), grad_logvar.to(mu.dtype)
