"""Latent diffusion: a diffusion transformer of an autoencoder's latents, both in one model.

Rombach et al. 2022 (arXiv:2112.10752): the autoencoder is trained first and kept, the diffusion
model learns the distribution of its scaled latents, and what it samples is decoded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.models.autoencoder import Autoencoder, AutoencoderConfig
from fastdiff.models.dit import DiT, DiTConfig

__all__ = ["LatentDiffusion", "LatentDiffusionConfig"]


@dataclass(frozen=True)
class LatentDiffusionConfig:
    """The architecture of a `LatentDiffusion`.

    Args:
        denoiser: of the model of the latents; takes as many channels as the latents have.
        autoencoder: of the model between latents and images.
    """

    denoiser: DiTConfig = field(default_factory=DiTConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)

    def __post_init__(self) -> None:
        taken, given = self.denoiser.in_channels, self.autoencoder.latent_channels
        if taken != given:
            raise ValueError(
                "LatentDiffusionConfig: denoiser must take the autoencoder's "
                f"{given} latent channels, got in_channels={taken}"
            )

    def to_config(self) -> dict[str, Any]:
        """The fields as a JSON-able dict; `LatentDiffusionConfig.from_config` inverts it."""
        return {
            "denoiser": self.denoiser.to_config(),
            "autoencoder": self.autoencoder.to_config(),
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> LatentDiffusionConfig:
        """Build from a dict as `to_config` gives; ValueError names what is unknown or missing."""
        if set(config) != {"denoiser", "autoencoder"}:
            raise ValueError(
                "LatentDiffusionConfig: config must hold denoiser and autoencoder, "
                f"got {sorted(config)}"
            )
        return cls(
            DiTConfig.from_config(config["denoiser"]),
            AutoencoderConfig.from_config(config["autoencoder"]),
        )


class LatentDiffusion(nn.Module):
    """A `DiT` that predicts in the latents of its `autoencoder`.

    Called, it is the denoiser, as a sampler wants it; `decode` makes images of what was sampled:

        model, schedule, card = fastdiff.load("latent")
        images = model.decode(fastdiff.Sampler(model, table)(card["sampling"]["shape"], ...))
    """

    def __init__(self, config: LatentDiffusionConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or LatentDiffusionConfig()
        self.denoiser = DiT(config.denoiser)
        self.autoencoder = Autoencoder(config.autoencoder)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one latent."""
        c = self.config.denoiser
        return c.in_channels, c.image_size, c.image_size

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """The prediction for noisy scaled latents, see `DiT.forward`."""
        out: Tensor = self.denoiser(x, t, label)
        return out

    def encode(self, images: Tensor) -> Tensor:
        """Scaled latents, `(N, *latent_shape)`, of `(N, C, H, W)` images in [-1, 1]: the means of
        q(z|x)."""
        return self.autoencoder.scale(self.autoencoder.encode(images)[0])

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Images `(N, C, H, W)`, clamped to [-1, 1], of scaled latents `(N, *latent_shape)`, in
        the dtype of `z`; no gradients."""
        return self.autoencoder.decode(self.autoencoder.unscale(z)).clamp(-1, 1)
