"""Gaussian mixtures in plain PyTorch: data whose denoiser is known, as a text to read.

A mixture has density p(x0) = sum_k w_k N(x0; mu_k, Sigma_k). A sum of independent Gaussians is
Gaussian, so x = alpha x0 + sigma n with unit normal n is a mixture again,

    p(x) = sum_k w_k N(x; alpha mu_k, C_k),      C_k = alpha^2 Sigma_k + sigma^2 I,

and everything that a diffusion model has to learn has a formula: the score, E[x0 | x] and E[n | x].
With Sigma_k = U_k diag(l_k) U_k^T one decomposition serves every noise level, because
C_k = U_k diag(alpha^2 l_k + sigma^2) U_k^T.

Results have the dtype of the mixture; float64 is what the tests use. Sources: Bishop 2006, "Pattern
Recognition and Machine Learning", sections 2.3 and 9.2 to 9.4; for the score of a noised mixture,
Karras et al. 2022 (arXiv:2206.00364), appendix B.3, of which points are the case Sigma = 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastdiff.reference.diffusion import to_prediction
from fastdiff.schedules import Schedule

__all__ = ["COVARIANCES", "GaussianMixture", "elbo", "fit"]

COVARIANCES = ("full", "diagonal", "isotropic")

Scale = float | Tensor


class GaussianMixture:
    """sum_k w_k N(mu_k, Sigma_k) in D dimensions.

    Args:
        weights: `(K,)`, positive, of sum 1.
        means: `(K, D)`.
        covariances: `(K, D, D)` full, `(K, D)` variances of each coordinate, or `(K,)` one variance
            for all coordinates; positive (definite).

    Raises:
        ValueError: shapes do not fit, or a rule above is broken.
    """

    def __init__(self, weights: Tensor, means: Tensor, covariances: Tensor) -> None:
        k, d = means.shape if means.dim() == 2 else (0, 0)
        if means.dim() != 2 or weights.shape != (k,):
            got = f"{tuple(weights.shape)} and {tuple(means.shape)}"
            raise ValueError(
                f"GaussianMixture: weights and means must be (K,) and (K, D), got {got}"
            )
        if tuple(covariances.shape) not in ((k, d, d), (k, d), (k,)):
            raise ValueError(
                f"GaussianMixture: covariances must be {(k, d, d)}, {(k, d)} or {(k,)}, "
                f"got {tuple(covariances.shape)}"
            )
        if not bool((weights > 0).all()) or abs(float(weights.sum()) - 1) > 1e-6:
            raise ValueError(f"GaussianMixture: weights must be positive, of sum 1, got {weights}")
        self.weights, self.means, self.covariances = weights, means, covariances
        self._basis: Tensor | None = None  # (K, D, D), columns the axes; None for the coordinates'
        if covariances.dim() == 3:
            self._spectrum, self._basis = torch.linalg.eigh(covariances)
        else:
            self._spectrum = covariances.view(k, -1).expand(k, d)
        if not bool((self._spectrum > 0).all()):
            raise ValueError("GaussianMixture: covariances must be positive definite")

    @property
    def dim(self) -> int:
        """D."""
        return self.means.shape[1]

    def log_prob(self, x: Tensor, alpha: Scale = 1.0, sigma: Scale = 0.0) -> Tensor:
        """log p(x) in nats, summed in the log domain.

        Args:
            x: `(..., D)`, a draw of alpha x0 + sigma n.
            alpha, sigma: numbers, or tensors that broadcast against `(...)`.

        Returns:
            `(...)`.
        """
        return self._log_joint(*self._whitened(x, alpha, sigma)).logsumexp(-1)

    def responsibilities(self, x: Tensor, alpha: Scale = 1.0, sigma: Scale = 0.0) -> Tensor:
        """p(k | x), `(..., K)`, by Bayes' rule: w_k N(x; alpha mu_k, C_k) / p(x)."""
        return self._log_joint(*self._whitened(x, alpha, sigma)).softmax(-1)

    def score(self, x: Tensor, alpha: Scale = 1.0, sigma: Scale = 0.0) -> Tensor:
        """grad log p(x), `(..., D)`.

        grad p / p = sum_k p(k | x) grad log N(x; alpha mu_k, C_k)
                   = -sum_k p(k | x) C_k^-1 (x - alpha mu_k).
        """
        away, total = self._whitened(x, alpha, sigma)
        return -self._average(away, total, 1 / total)

    def epsilon(self, x: Tensor, alpha: Scale = 1.0, sigma: Scale = 0.0) -> Tensor:
        """E[n | x], `(..., D)`: what a network that predicts the noise learns.

        It is -sigma score(x) (Tweedie's formula): n and x are jointly Gaussian given k, with
        covariance sigma I, so E[n | x, k] = sigma C_k^-1 (x - alpha mu_k).
        """
        away, total = self._whitened(x, alpha, sigma)
        return self._average(away, total, _column(sigma, x, 2) / total)

    def denoise(self, x: Tensor, alpha: Scale = 1.0, sigma: Scale = 0.0) -> Tensor:
        """E[x0 | x], `(..., D)`: what a network that predicts clean data learns.

        x0 and x are jointly Gaussian given k, with covariance alpha Sigma_k, so
        E[x0 | x, k] = mu_k + alpha Sigma_k C_k^-1 (x - alpha mu_k), and the mean over k has the
        weights p(k | x). Nothing is divided by alpha or sigma: at alpha = 0 it is the mean of the
        data, at sigma = 0 x / alpha.
        """
        away, total = self._whitened(x, alpha, sigma)
        gain = _column(alpha, x, 2) * self._spectrum / total
        weights = self._log_joint(away, total).softmax(-1)
        return self._average(away, total, gain) + weights @ self.means

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """`(n, D)`: a component by its weight, then mu_k + U_k sqrt(l_k) z with unit normal z."""
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        z = torch.randn(n, self.dim, dtype=self.means.dtype, generator=generator)
        z = z * self._spectrum[k].sqrt()
        if self._basis is not None:
            z = (self._basis[k] @ z.unsqueeze(-1)).squeeze(-1)
        points: Tensor = self.means[k] + z
        return points

    def network(
        self, schedule: Schedule, prediction: str = "epsilon"
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """A perfectly trained network, for `fastdiff.Sampler`.

        Args:
            schedule: gives alpha and sigma of the time t.
            prediction: "epsilon", "sample", "v_prediction", "flow", or "edm": the raw F of Karras
                et al. 2022, equation 7, F = (D - c_skip x) / c_out, of c_in x and ln(sigma)/4.

        Returns:
            ``model(x, t)`` with x `(N, *S)`, D elements a sample, and t `(N,)`; computes in the
            dtype of the mixture and returns that of x.
        """

        def model(x_in: Tensor, t: Tensor) -> Tensor:
            x = x_in.flatten(1).to(self.means.dtype)
            times = t.to(torch.float64).cpu().numpy()
            if prediction == "edm":
                sigma = torch.exp(4 * t.to(x.dtype)).view(-1, 1)
                total, data = (
                    torch.hypot(sigma, sigma.new_tensor(schedule.sigma_data)),
                    schedule.sigma_data,
                )
                x0 = self.denoise(total * x, 1.0, sigma[:, 0])
                out = (x0 - data**2 / total * x) * total / (sigma * data)
            else:
                alpha = torch.from_numpy(schedule.alpha(times)).to(x)
                sigma = torch.from_numpy(schedule.sigma(times)).to(x)
                out = to_prediction(
                    prediction,
                    self.denoise(x, alpha, sigma),
                    self.epsilon(x, alpha, sigma),
                    alpha.view(-1, 1),
                    sigma.view(-1, 1),
                )
            return out.view_as(x_in).to(x_in.dtype)

        return model

    def _whitened(self, x: Tensor, alpha: Scale, sigma: Scale) -> tuple[Tensor, Tensor]:
        """x - alpha mu_k along the axes of component k, and C_k there; both `(..., K, D)`."""
        alpha, sigma = _column(alpha, x, 2), _column(sigma, x, 2)
        away = x.to(self.means.dtype).unsqueeze(-2) - alpha * self.means
        if self._basis is not None:
            away = (away.unsqueeze(-2) @ self._basis).squeeze(-2)
        return away, alpha * alpha * self._spectrum + sigma * sigma

    def _log_joint(self, away: Tensor, total: Tensor) -> Tensor:
        """log w_k N(x; alpha mu_k, C_k), `(..., K)`."""
        each = away.square() / total + (2 * math.pi * total).log()
        return self.weights.log() - each.sum(-1) / 2

    def _average(self, away: Tensor, total: Tensor, gain: Tensor) -> Tensor:
        """sum_k p(k | x) U_k diag(gain) U_k^T (x - alpha mu_k), `(..., D)`."""
        each = gain * away
        if self._basis is not None:
            each = (self._basis @ each.unsqueeze(-1)).squeeze(-1)
        weights = self._log_joint(away, total).softmax(-1)
        average: Tensor = (weights.unsqueeze(-1) * each).sum(-2)
        return average


def _column(scale: Scale, x: Tensor, extra: int) -> Tensor:
    """A scale of one number or one a point, with `extra` dimensions to broadcast over."""
    tensor = torch.as_tensor(scale, dtype=x.dtype, device=x.device)
    return tensor.reshape(*tensor.shape, *[1] * extra)


def elbo(mixture: GaussianMixture, x: Tensor, q: Tensor) -> Tensor:
    """Evidence lower bound of a mixture, the mean over points, in nats.

    For any distribution q over the components, Jensen's inequality gives

        log p(x) >= sum_k q_k log(w_k N(x; mu_k, Sigma_k) / q_k) = log p(x) - KL(q || p(k | x)),

    with equality at q = p(k | x) (Neal and Hinton 1998, "A view of the EM algorithm").

    Args:
        x: `(N, D)`. q: `(N, K)`, rows of sum 1.
    """
    joint = mixture._log_joint(*mixture._whitened(x, 1.0, 0.0))
    bound: Tensor = (q * joint - torch.special.xlogy(q, q)).sum(-1).mean()
    return bound


def fit(
    x: Tensor,
    k: int,
    *,
    steps: int = 100,
    covariance: str = "full",
    min_variance: float = 1e-6,
    generator: torch.Generator | None = None,
) -> tuple[GaussianMixture, Tensor]:
    """Fit a mixture by EM (Dempster, Laird and Rubin 1977), read as ascent of the ELBO.

    The E step sets q to the responsibilities, which lifts the ELBO to log p(x); the M step keeps q
    and maximises over the mixture. Neither can lower it. The maximum has w_k = N_k / N,
    mu_k = sum_n q_nk x_n / N_k and Sigma_k = S_k, the scatter of the points about mu_k weighted
    with q_nk / N_k, for N_k = sum_n q_nk. Under the bound Sigma >= min_variance I, which keeps a
    component from collapsing on a point, it has the eigenvalues of S_k raised to the bound: for
    fixed axes log l + s/l falls until l = s and rises after. The start is k-means++ (Arthur and
    Vassilvitskii 2007): points far from those chosen already.

    Args:
        x: `(N, D)` points, N >= k >= 1.
        steps: number of E and M steps.
        covariance: one of `COVARIANCES`.
        min_variance: bound above, positive, in units of x squared.
        generator: of the start.

    Returns:
        the mixture and the ELBO after every half step, `(2 * steps,)`.
    """
    if covariance not in COVARIANCES:
        raise ValueError(f"fit: covariance must be one of {COVARIANCES}, got {covariance!r}")
    if x.dim() != 2 or not 1 <= k <= len(x):
        raise ValueError(f"fit: x must be (N, D) with N >= k >= 1, got {tuple(x.shape)}, k={k}")
    if not min_variance > 0 or steps < 1:
        raise ValueError(
            f"fit: min_variance and steps must be positive, got {min_variance}, {steps}"
        )
    mixture, bounds = _start(x, k, covariance, min_variance, generator), []
    for _ in range(steps):
        q = mixture.responsibilities(x)
        bounds.append(elbo(mixture, x, q))
        mixture = _maximise(x, q, mixture, covariance, min_variance)
        bounds.append(elbo(mixture, x, q))
    return mixture, torch.stack(bounds)


def _start(
    x: Tensor, k: int, covariance: str, least: float, generator: torch.Generator | None
) -> GaussianMixture:
    chosen = x[torch.randint(len(x), (1,), generator=generator)]
    while len(chosen) < k:
        distance = torch.cdist(x, chosen).min(dim=1).values.square()
        if not bool(distance.any()):  # fewer distinct points than components
            distance = torch.ones_like(distance)
        chosen = torch.cat([chosen, x[torch.multinomial(distance, 1, generator=generator)]])
    away = x - x.mean(dim=0)
    scatter = _shape((away.T @ away / len(x)).expand(k, -1, -1), covariance, least)
    return GaussianMixture(x.new_full((k,), 1 / k), chosen, scatter)


def _maximise(
    x: Tensor, q: Tensor, old: GaussianMixture, covariance: str, least: float
) -> GaussianMixture:
    """The M step. A component that no point belongs to stays: any value is a maximum there."""
    counts = q.sum(dim=0)
    alive = counts > torch.finfo(x.dtype).tiny * len(x)
    safe = torch.where(alive, counts, torch.ones_like(counts))
    means = torch.where(alive[:, None], q.T @ x / safe[:, None], old.means)
    away = x[:, None] - means  # (N, K, D)
    scatter = torch.einsum("nk,nkd,nke->kde", q / safe, away, away)
    covariances = _shape(scatter, covariance, least)
    keep = alive.view(-1, *[1] * (covariances.dim() - 1))
    weights = counts.clamp_min(torch.finfo(x.dtype).tiny)
    return GaussianMixture(
        weights / weights.sum(), means, torch.where(keep, covariances, old.covariances)
    )


def _shape(scatter: Tensor, covariance: str, least: float) -> Tensor:
    """The best covariance of the asked form for a scatter `(K, D, D)`, at least `least`."""
    if covariance == "full":
        spectrum, basis = torch.linalg.eigh(scatter)
        raised: Tensor = basis * spectrum.clamp_min(least).unsqueeze(-2) @ basis.mT
        return raised
    variances = scatter.diagonal(dim1=-2, dim2=-1)
    if covariance == "isotropic":
        variances = variances.mean(dim=-1)
    return variances.clamp_min(least)
