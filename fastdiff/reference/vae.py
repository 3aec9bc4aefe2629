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

The same bound has two views. The network's, above: an autoencoder whose loss is a reconstruction
error, -log p(x|z), and a penalty, KL, that keeps its code near the prior (`terms`, `elbo`). The
error is the cross-entropy of the pixels for the Bernoulli likelihood and, for the Gaussian,
|x - y|^2 / (2 scale^2) + const: a squared error summed, not averaged, over the pixels, whose weight
against the KL is set by the scale, so code that adds a mean squared error and a KL has chosen some
other scale. The probability model's: the mean over q of

    log w = log p(x|z) + log p(z) - log q(z|x)          (their estimator A; `log_weights`)

where w is the weight of an importance sample of p(x) = E_q[w]. With more draws the logarithm of
their average is a tighter bound (`iwae`), which the network's view does not show.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.ops import Stream, as_seeds, randn, reparameterize
from fastdiff.reference import distributions

__all__ = ["VAE", "ConvDecoder", "ConvEncoder", "Decoder", "Encoder"]

LIKELIHOODS = ("bernoulli", "gaussian", "discretized_logistic")


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
        likelihood: "bernoulli", x in [0, 1] with the decoder giving logits; "gaussian", the decoder
            giving the means; or "discretized_logistic", x on `bins` levels in [-1, 1], the decoder
            giving the means. Only the last, and the first for x of 0 and 1, are probabilities of
            images; a density, as the Gaussian is, may exceed 1 and its ELBO 0.
        scale: standard deviation of the Gaussian, or scale of the logistic distribution.
        bins: levels of a pixel, at least 2.

    Raises:
        ValueError: an unknown likelihood, a scale that is not positive, or too few bins.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        likelihood: str = "bernoulli",
        scale: float = 1.0,
        bins: int = 256,
    ) -> None:
        super().__init__()
        if likelihood not in LIKELIHOODS:
            raise ValueError(
                f"VAE: likelihood must be one of {', '.join(LIKELIHOODS)}, got {likelihood!r}"
            )
        if not scale > 0:
            raise ValueError(f"VAE: scale must be positive, got {scale}")
        if bins < 2:
            raise ValueError(f"VAE: bins must be at least 2, got {bins}")
        self.encoder, self.decoder = encoder, decoder
        self.likelihood, self.scale, self.bins = likelihood, float(scale), bins

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x|z) of each sample, (N,), in nats."""
        y = self.decoder(z)
        if y.shape != x.shape:
            raise ValueError(
                f"VAE: x must have the shape of the decoder's output {tuple(y.shape)}, "
                f"got {tuple(x.shape)}"
            )
        if self.likelihood == "bernoulli":
            each = distributions.bernoulli_log_pmf(x, y)
        elif self.likelihood == "gaussian":
            each = distributions.normal_log_pdf(x, y, self.scale)
        else:
            each = distributions.discretized_logistic(x, y, self.scale, bins=self.bins)
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

    def loss(self, x: Tensor, seeds: Any, *, step: int = 0, beta: float = 1.0) -> Tensor:
        """-E_q[log p(x|z)] + beta KL of each sample, (N,), in nats.

        beta = 1 is -ELBO. Larger (beta-VAE: Higgins et al., ICLR 2017, equation 4) holds q nearer
        to the prior: the multiplier of a constraint KL < const on what the code may carry. As the
        KL is at least 0, its negative is still a lower bound of log p(x), only looser; below 1 it
        is none.

        Args: as `terms`.
        """
        log_likelihood, kl = self.terms(x, seeds, step=step)
        return beta * kl - log_likelihood

    def log_weights(self, x: Tensor, seeds: Any, draws: int, *, step: int = 0) -> Tensor:
        """log p(x, z) - log q(z|x) at `draws` draws z of q, (N, draws), in nats.

        With z = mu + exp(logvar/2) eps, log q(z|x) = log N(eps; 0, I) - sum logvar / 2, so the
        constants of p(z) and q cancel: the difference is the sum of (eps^2 + logvar - z^2) / 2.

        Args: as `terms`. The first draw's noise is that of `terms`.

        Raises:
            ValueError: `draws` is below 1.
        """
        if draws < 1:
            raise ValueError(f"VAE: draws must be positive, got {draws}")
        mu, logvar = self.encoder(x)
        eps = randn(
            as_seeds(seeds, len(x), where="VAE"),
            (draws, *mu.shape[1:]),
            step=step,
            stream=Stream.REPARAMETERIZE,
            dtype=mu.dtype,
            device=mu.device,
        )
        mu, logvar = mu.unsqueeze(1), logvar.unsqueeze(1)
        z = mu + torch.exp(0.5 * logvar) * eps
        ratio: Tensor = 0.5 * (eps.square() + logvar - z.square()).flatten(2).sum(2)
        log_p = self.log_likelihood(x.repeat_interleave(draws, 0), z.flatten(0, 1))
        return log_p.view(len(x), draws) + ratio

    def iwae(self, x: Tensor, seeds: Any, draws: int, *, step: int = 0) -> Tensor:
        """log of the mean of `draws` importance weights of each sample, (N,), in nats.

        Burda, Grosse and Salakhutdinov 2016 (arXiv:1509.00519), equation 8. E[mean w] = p(x), so
        by Jensen's inequality E[log mean w] <= log p(x), for any number of draws. More draws never
        lower it: the mean of K + 1 weights is the mean, over the one left out, of means of K, and
        Jensen's inequality applies to that mean too (their theorem 1). It tends to log p(x), with a
        gap of about Var(w) / (2 K p(x)^2). One draw gives the ELBO.

        Args, Raises: as `log_weights`.
        """
        weights = self.log_weights(x, seeds, draws, step=step)
        bound: Tensor = weights.logsumexp(1) - math.log(draws)
        return bound

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
