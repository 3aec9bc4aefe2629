"""The variational autoencoder in plain PyTorch, as a text to read and to test against.

Kingma and Welling, "Auto-Encoding Variational Bayes", ICLR 2014 (arXiv:1312.6114); Rezende, Mohamed
and Wierstra, ICML 2014. A latent z ~ p(z) = N(0, I) gives data x ~ p(x|z); the evidence
p(x) = integral p(x|z) p(z) dz is out of reach, so an encoder proposes q(z|x), which is
N(mu(x), exp(logvar(x))) with a diagonal covariance. For any such q

    log p(x) = E_q[log p(x)]                                              (x depends on no z)
             = E_q[log p(x, z) / p(z|x)]                                             (Bayes' rule)
             = E_q[log p(x, z) / q(z|x)] + E_q[log q(z|x) / p(z|x)]     (times q / q, split)
             = ELBO(x) + KL(q(z|x) || p(z|x)).

The last term is at least 0, and 0 only where q is the true posterior: the ELBO is a lower bound of
log p(x), and raising it in q's parameters alone brings q to the posterior. With p(x, z) = p(x|z)
p(z) it splits once more into what is computed here (their equation 3, estimator B of section 2.3):

    ELBO(x) = E_q[log p(x|z)] - KL(q(z|x) || p(z)).

The second term has a closed form (their appendix B). The first is estimated by one draw a data
point, z = mu + exp(logvar / 2) eps, through which gradients flow (their section 2.4); draw and
divergence are one op, `fastdiff.ops.reparameterize`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastdiff.ops import randn, reparameterize

__all__ = ["VAE", "ConvDecoder", "ConvEncoder", "Decoder", "Encoder"]

LIKELIHOODS = ("bernoulli", "gaussian")


class Encoder(nn.Module):
    """q(z|x): a multilayer perceptron from (N, *shape) to mu and logvar, (N, latent) each."""

    def __init__(self, shape: Sequence[int], latent: int, hidden: int = 256) -> None:
        super().__init__()
        size = math.prod(shape)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(size, hidden), nn.SiLU())
        self.mu, self.logvar = nn.Linear(hidden, latent), nn.Linear(hidden, latent)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x)
        return self.mu(h), self.logvar(h)


class Decoder(nn.Module):
    """p(x|z): a multilayer perceptron from (N, latent) to the parameters of x, (N, *shape)."""

    def __init__(self, shape: Sequence[int], latent: int, hidden: int = 256) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(latent, hidden), nn.SiLU(), nn.Linear(hidden, math.prod(shape))
        )
        self.shape = tuple(shape)

    def forward(self, z: Tensor) -> Tensor:
        x: Tensor = self.body(z)
        return x.view(-1, *self.shape)


class ConvEncoder(nn.Module):
    """q(z|x) for (N, C, H, W) images: halves H and W twice; z is (N, latent, H / 4, W / 4)."""

    def __init__(self, channels: int, latent: int, hidden: int = 32) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, hidden, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(hidden, 2 * latent, 3, stride=2, padding=1),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = self.body(x).chunk(2, dim=1)
        return mu, logvar


class ConvDecoder(nn.Module):
    """p(x|z) for images: `ConvEncoder` backwards, from (N, latent, H, W) to (N, C, 4 H, 4 W)."""

    def __init__(self, channels: int, latent: int, hidden: int = 32) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.ConvTranspose2d(latent, hidden, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.ConvTranspose2d(hidden, channels, 4, stride=2, padding=1),
        )

    def forward(self, z: Tensor) -> Tensor:
        x: Tensor = self.body(z)
        return x


class VAE(nn.Module):
    """A variational autoencoder with prior N(0, I).

    Args:
        encoder: x -> (mu, logvar) of q(z|x), both (N, *Z).
        decoder: z of shape (N, *Z) -> (N, *S), the parameters of p(x|z).
        likelihood: "bernoulli", x in [0, 1] with the decoder giving logits; or "gaussian", the
            decoder giving the means.
        scale: standard deviation of the Gaussian likelihood.

    Raises:
        ValueError: an unknown likelihood, or a scale that is not positive.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        likelihood: str = "bernoulli",
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        if likelihood not in LIKELIHOODS:
            raise ValueError(
                f"VAE: likelihood must be one of {', '.join(LIKELIHOODS)}, got {likelihood!r}"
            )
        if not scale > 0:
            raise ValueError(f"VAE: scale must be positive, got {scale}")
        self.encoder, self.decoder = encoder, decoder
        self.likelihood, self.scale = likelihood, float(scale)

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x|z) of each sample, (N,), in nats."""
        y = self.decoder(z)
        if y.shape != x.shape:
            raise ValueError(
                f"VAE: x must have the shape of the decoder's output {tuple(y.shape)}, "
                f"got {tuple(x.shape)}"
            )
        if self.likelihood == "bernoulli":
            # log of p^x (1 - p)^(1 - x) with p the logistic function of the logits
            each = -functional.binary_cross_entropy_with_logits(y, x, reduction="none")
        else:
            constant = math.log(self.scale) + 0.5 * math.log(2 * math.pi)
            each = -0.5 * ((x - y) / self.scale) ** 2 - constant
        return each.flatten(1).sum(1)

    def terms(self, x: Tensor, seeds: Any, *, step: int = 0) -> tuple[Tensor, Tensor]:
        """The two terms of the ELBO: a one-draw estimate of E_q[log p(x|z)], and the exact KL.

        Args:
            x: (N, *S).
            seeds: of the N draws, as in `fastdiff.ops.reparameterize`.
            step: counter of the draw; the number of the training step gives fresh noise to each.

        Returns:
            Two (N,) tensors, in nats.
        """
        mu, logvar = self.encoder(x)
        z, kl = reparameterize(mu, logvar, seeds, step=step)
        return self.log_likelihood(x, z), kl

    def elbo(self, x: Tensor, seeds: Any, *, step: int = 0) -> Tensor:
        """Unbiased estimate of the lower bound of log p(x) of each sample, (N,), in nats.

        Args: as `terms`. The mean over data of its negative is the loss of training.
        """
        log_likelihood, kl = self.terms(x, seeds, step=step)
        return log_likelihood - kl

    def decode(self, z: Tensor) -> Tensor:
        """The mean of p(x|z), (N, *S)."""
        y: Tensor = self.decoder(z)
        return y.sigmoid() if self.likelihood == "bernoulli" else y

    def sample(self, seeds: Any, shape: Sequence[int]) -> Tensor:
        """Means of p(x|z) at z ~ N(0, I), one a seed.

        Args:
            seeds: as in `fastdiff.randn`.
            shape: of one latent, Z.

        Returns:
            (len(seeds), *S) on the device and in the dtype of the parameters.
        """
        like = next(self.decoder.parameters(), torch.empty(0))
        return self.decode(randn(seeds, shape, dtype=like.dtype, device=like.device))
