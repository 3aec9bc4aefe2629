"""k-diffusion's preconditioner of Karras et al. 2022; of ``k_diffusion.layers`` only this."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.integrations.k_diffusion._levels import append_dims, to_d

__all__ = ["Denoiser", "SimpleLossDenoiser"]


class Denoiser(nn.Module):
    """D = c_skip*x + c_out*F(c_in*x, sigma): Karras et al. 2022 (arXiv:2206.00364), eq. 7, table 1.

    Args:
        inner_model: F, ``inner_model(x, sigma, **kwargs)``; it is given sigma itself.
        sigma_data: standard deviation of the data.
        weighting: of the loss over sigma: "karras" (the paper's; 1 in units of F's target),
            "soft-min-snr", "snr", or a function of sigma (N,).
        scales: of the frequency-weighted loss; `loss` takes 1 only, sampling any.

    Raises:
        ValueError: the weighting is not known.
    """

    def __init__(
        self,
        inner_model: Callable[..., Tensor],
        sigma_data: float = 1.0,
        weighting: str | Callable[[Tensor], Tensor] = "karras",
        scales: int = 1,
    ) -> None:
        super().__init__()
        self.inner_model = inner_model
        self.sigma_data, self.scales = sigma_data, scales
        known: dict[str, Callable[[Tensor], Tensor]] = {
            "karras": torch.ones_like,
            "soft-min-snr": lambda sigma: (sigma * sigma_data) ** 2 / self._total(sigma) ** 2,
            "snr": lambda sigma: sigma_data**2 / self._total(sigma),
        }
        if not callable(weighting) and weighting not in known:
            rule = f"weighting must be a function or one of {', '.join(known)}"
            raise ValueError(f"Denoiser: {rule}, got {weighting!r}")
        self.weighting = weighting if callable(weighting) else known[weighting]

    def _total(self, sigma: Tensor) -> Tensor:
        """Variance of x where that of the data is sigma_data^2."""
        return sigma**2 + self.sigma_data**2

    def get_scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(c_skip, c_out, c_in) at sigma (N,)."""
        total = self._total(sigma)
        root = total**0.5
        return self.sigma_data**2 / total, sigma * self.sigma_data / root, 1 / root

    def loss(self, input: Tensor, noise: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        """(N,) weighted mean squared error of F on data (N, *S) with noise (N, *S), sigma (N,).

        Raises:
            ValueError: scales is not 1.
        """
        if self.scales != 1:
            raise ValueError(f"Denoiser: scales must be 1 for the loss, got {self.scales}")
        skip, out, scale = (append_dims(c, input.dim()) for c in self.get_scalings(sigma))
        noised = input + append_dims(sigma, input.dim()) * noise
        output = self.inner_model(noised * scale, sigma, **kwargs)
        error = (output - (input - skip * noised) / out) ** 2
        return error.flatten(1).mean(1) * self.weighting(sigma)

    def forward(self, input: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        """D(x, sigma), (N, *S), for x (N, *S) and sigma (N,)."""
        skip, out, scale = (append_dims(c, input.dim()) for c in self.get_scalings(sigma))
        return self.inner_model(input * scale, sigma, **kwargs) * out + input * skip


class SimpleLossDenoiser(Denoiser):
    """`Denoiser` whose loss is the mean squared error of the noise that it implies, unweighted."""

    def loss(self, input: Tensor, noise: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        """(N,), see the class."""
        noised = input + append_dims(sigma, input.dim()) * noise
        eps = to_d(noised, sigma, self(noised, sigma, **kwargs))
        return ((eps - noise) ** 2).flatten(1).mean(1)
