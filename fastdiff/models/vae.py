"""Variational autoencoders of small images that the library trains.

"mlp" is the VAE that priors of VAEs are compared on (Tomczak and Welling 2018, arXiv:1705.07120,
section 5; Norouzi et al. 2020, arXiv:2004.04795, section 5.1): two hidden layers of 300 gated units
on each side and a latent of 40 numbers. "conv" halves the image by strided convolutions first.
The bound and its estimators are those of `fastdiff.reference.vae`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from fastdiff.models._inputs import Config
from fastdiff.reference import vae as reference

__all__ = ["VAE", "VAEConfig"]

KINDS = ("mlp", "conv")


@dataclass(frozen=True)
class VAEConfig(Config):
    """The architecture of a `VAE`; every field is JSON-able.

    Args:
        kind: "mlp" or "conv".
        in_channels: channels of the images.
        image_size: their height and width.
        latent: numbers of a latent.
        hidden: width of the hidden layers: two of "mlp", one of "conv", on each side.
        channels: of "conv": widths of the convolutions, each of which halves the image.
        likelihood: of the pixels, see `fastdiff.reference.vae.VAE`.
        scale: of the Gaussian or the logistic distribution.
        bins: levels of a pixel, for the discretized logistic distribution.
    """

    kind: str = "mlp"
    in_channels: int = 1
    image_size: int = 28
    latent: int = 40
    hidden: int = 300
    channels: tuple[int, ...] = (32, 64)
    likelihood: str = "bernoulli"
    scale: float = 1.0
    bins: int = 256

    def __post_init__(self) -> None:
        object.__setattr__(self, "channels", tuple(self.channels))
        if self.kind not in KINDS:
            raise ValueError(f"VAEConfig: kind must be one of {KINDS}, got {self.kind!r}")
        names = ("in_channels", "image_size", "latent", "hidden")
        counts = [(name, getattr(self, name)) for name in names]
        for name, value in (*counts, *(("channels", c) for c in self.channels)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"VAEConfig: {name} must be an int >= 1, got {value!r}")
        factor = 1 << len(self.channels)
        if self.kind == "conv" and (not self.channels or self.image_size % factor):
            raise ValueError(
                f"VAEConfig: image_size must be a multiple of {factor} for {len(self.channels)} "
                f"convolutions, at least one, got {self.image_size}"
            )


def _gated(*widths: int) -> list[nn.Module]:
    """Layers ``(W x + b) * sigmoid(V x + c)``."""
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, 2 * after), nn.GLU()]
    return layers


class Encoder(nn.Module):
    """q(z|x): `(N, in_channels, image_size, image_size)` to mu and logvar, `(N, latent)` each."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width, size = config.in_channels, config.image_size
        if config.kind == "conv":
            for c in config.channels:
                layers += [nn.Conv2d(width, c, 4, stride=2, padding=1), nn.SiLU()]
                width, size = c, size // 2
        hidden = [config.hidden] * (2 if config.kind == "mlp" else 1)
        layers += [nn.Flatten(), *_gated(width * size * size, *hidden)]
        self.body = nn.Sequential(*layers, nn.Linear(config.hidden, 2 * config.latent))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # in float32 under autocast too, as the divergence should be
        mu, logvar = self.body(x).to(x.dtype).chunk(2, dim=1)
        return mu, logvar


class Decoder(nn.Module):
    """p(x|z): `(N, latent)` to the parameters of x, `(N, in_channels, image_size, image_size)`."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        shape = [config.in_channels, config.image_size, config.image_size]
        hidden = [config.hidden] * (2 if config.kind == "mlp" else 1)
        layers, tail = _gated(config.latent, *hidden), []
        if config.kind == "conv":
            widths = [*reversed(config.channels), config.in_channels]
            side = config.image_size >> len(config.channels)
            shape = [widths[0], side, side]
            for before, after in pairwise(widths):
                tail += [nn.SiLU(), nn.ConvTranspose2d(before, after, 4, stride=2, padding=1)]
        size = shape[0] * shape[1] * shape[2]
        layers += [nn.Linear(config.hidden, size), nn.Unflatten(1, shape)]
        self.body = nn.Sequential(*layers, *tail)

    def forward(self, z: Tensor) -> Tensor:
        x: Tensor = self.body(z)
        return x.to(z.dtype)


class VAE(reference.VAE):
    """A `fastdiff.reference.vae.VAE` that its config rebuilds."""

    def __init__(self, config: VAEConfig | None = None) -> None:
        given = config or VAEConfig()
        super().__init__(
            Encoder(given), Decoder(given),
            given.likelihood, given.scale, given.bins,
        )  # fmt: skip
        self.config = given

    def observe(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """What `elbo` and the others take, of images in [-1, 1].

        For the Bernoulli likelihood each pixel is drawn as 0 or 1, with its grey value as the
        probability of 1 (Salakhutdinov and Murray 2008); drawn anew at each step of training, that
        is "dynamic binarization". For the other likelihoods the images themselves.

        Args:
            images: `(N, in_channels, image_size, image_size)`, on the generator's device.
            generator: of the draws.
        """
        if self.likelihood != "bernoulli":
            return images
        return torch.bernoulli((images + 1) / 2, generator=generator)

    def images(self, seeds: Sequence[int]) -> Tensor:
        """The mean of p(x|z) at z ~ N(0, I), one a seed as in `fastdiff.randn`, in [-1, 1]."""
        x = self.sample(seeds, [self.config.latent])
        return 2 * x - 1 if self.likelihood == "bernoulli" else x
