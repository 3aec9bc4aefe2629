"""The autoencoder of latent diffusion, on the fused ops.

Rombach et al. 2022 (arXiv:2112.10752, appendix G) after Esser et al. 2021 (arXiv:2012.09841): a
convolutional encoder to the mean and log-variance of a Gaussian posterior (Kingma and Welling 2014,
arXiv:1312.6114) and its mirror image. It computes what diffusers' `AutoencoderKL` does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff import ops
from fastdiff.models import _autoencoder_keys
from fastdiff.models._inputs import Config
from fastdiff.models._unet_blocks import Attention, Downsample, FilmNorm, ResBlock, Upsample

__all__ = ["Autoencoder", "AutoencoderConfig", "Decoder", "Encoder"]

LOGVAR = (-30.0, 20.0)  # as in the code of the paper: exp(logvar) stays finite in float32

Each = float | tuple[float, ...]


@dataclass(frozen=True)
class AutoencoderConfig(Config):
    """The architecture of an `Autoencoder`; every field is JSON-able.

    Args:
        in_channels: channels of the images that go in.
        out_channels: channels of the decoded images; None: `in_channels`.
        channels: width of each resolution level, finest first; each level halves the grid.
        blocks: residual blocks a level of the encoder (one more in the decoder).
        latent_channels: channels of the latent.
        groups: groups of every normalisation; must divide each width.
        eps: added to the variance by every normalisation.
        attention: whether self-attention of one head stands between the two blocks of the middle.
        quant_conv: a 1x1 convolution behind the encoder.
        post_quant_conv: a 1x1 convolution before the decoder.
        latent_shift, latent_scale: a diffusion model of the latents works on
            ``(z - latent_shift) * latent_scale``; numbers, or one a channel.
    """

    in_channels: int = 3
    out_channels: int | None = None
    channels: tuple[int, ...] = (32, 64)
    blocks: int = 1
    latent_channels: int = 4
    groups: int = 8
    eps: float = 1e-6
    attention: bool = True
    quant_conv: bool = True
    post_quant_conv: bool = True
    latent_shift: Each = 0.0
    latent_scale: Each = 1.0

    def __post_init__(self) -> None:
        # JSON has no tuples: a card gives lists
        for name in ("channels", "latent_shift", "latent_scale"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        counts = [(n, getattr(self, n)) for n in ("in_channels", "blocks", "latent_channels")]
        counts += [("groups", self.groups), ("out_channels", self.out_channels or 1)]
        for name, value in (*counts, *(("channels", c) for c in self.channels)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"AutoencoderConfig: {name} must be an int >= 1, got {value!r}")
        if not self.channels or any(width % self.groups for width in self.channels):
            raise ValueError(
                f"AutoencoderConfig: channels must be multiples of groups={self.groups}, at least "
                f"one, got {self.channels}"
            )
        if not self.eps >= 0:
            raise ValueError(f"AutoencoderConfig: eps must be >= 0, got {self.eps}")
        for name in ("latent_shift", "latent_scale"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != self.latent_channels:
                raise ValueError(
                    f"AutoencoderConfig: {name} must be a number or {self.latent_channels} of "
                    f"them, got {value}"
                )

    @property
    def factor(self) -> int:
        """How many pixels a side one place of the latent stands for."""
        return 1 << (len(self.channels) - 1)


def _block(config: AutoencoderConfig, c_in: int, c_out: int) -> ResBlock:
    return ResBlock(c_in, c_out, config.groups, eps=config.eps, modulation="none")


def _middle(config: AutoencoderConfig) -> nn.Sequential:
    c = config.channels[-1]
    attend = Attention(c, c, config.groups, config.eps) if config.attention else nn.Identity()
    return nn.Sequential(_block(config, c, c), attend, _block(config, c, c))


class Encoder(nn.Module):
    """q(z|x): images to the mean and log-variance of their latents."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, moments = config.channels, 2 * config.latent_channels
        self.config = config
        self.stem = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down, self.shrink = nn.ModuleList(), nn.ModuleList()
        width = widths[0]
        for i, c in enumerate(widths):
            for _ in range(config.blocks):
                self.down.append(_block(config, width, c))
                width = c
            if i < len(widths) - 1:
                self.shrink.append(Downsample(c, 0))
        self.middle = _middle(config)
        self.norm_out = FilmNorm(config.groups, width, config.eps)
        self.conv_out = nn.Conv2d(width, moments, 3, padding=1)
        self.quant = nn.Conv2d(moments, moments, 1) if config.quant_conv else nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`x` is `(N, in_channels, H, W)` in any floating dtype, computed in that of the weights.

        Returns:
            mu and logvar, each `(N, latent_channels, H / factor, W / factor)`, rounded down, dtype
            of `x`; logvar within [-30, 20].

        Raises:
            TypeError: `x` is not floating point. ValueError: its shape is wrong.
        """
        c = self.config
        _check("x", x, c.in_channels, c.factor)
        h: Tensor = self.stem(x.to(self.stem.weight.dtype))
        for i, block in enumerate(self.down):
            h = block(h)
            if (i + 1) % c.blocks == 0 and i + 1 < len(self.down):
                h = self.shrink[i // c.blocks](h)
        h = self.quant(self.conv_out(self.norm_out(self.middle(h)))).to(x.dtype)
        mu, logvar = h.chunk(2, dim=1)
        return mu, logvar.clamp(*LOGVAR)


class Decoder(nn.Module):
    """The mean of p(x|z): latents to images."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, latent = config.channels, config.latent_channels
        self.config = config
        self.quant = nn.Conv2d(latent, latent, 1) if config.post_quant_conv else nn.Identity()
        self.stem = nn.Conv2d(latent, widths[-1], 3, padding=1)
        self.middle = _middle(config)
        self.up, self.grow = nn.ModuleList(), nn.ModuleList()
        width = widths[-1]
        for i, c in reversed(list(enumerate(widths))):
            for _ in range(config.blocks + 1):
                self.up.append(_block(config, width, c))
                width = c
            if i > 0:
                self.grow.append(Upsample(c, c, 3))
        self.norm_out = FilmNorm(config.groups, width, config.eps)
        self.conv_out = nn.Conv2d(width, config.out_channels or config.in_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """`z` is `(N, latent_channels, h, w)` in any floating dtype, computed in that of the
        weights; returns `(N, out_channels, factor h, factor w)`, dtype of `z`.

        Raises:
            TypeError: `z` is not floating point. ValueError: its shape is wrong.
        """
        _check("z", z, self.config.latent_channels, 1)
        each = self.config.blocks + 1
        h: Tensor = self.middle(self.stem(self.quant(z.to(self.stem.weight.dtype))))
        for i, block in enumerate(self.up):
            h = block(h)
            if (i + 1) % each == 0 and i + 1 < len(self.up):
                h = self.grow[i // each](h)
        out: Tensor = self.conv_out(self.norm_out(h))
        return out.to(z.dtype)


class Autoencoder(nn.Module):
    """Images to latents and back. `fastdiff.reference.vae.VAE(model.encoder, model.decoder,
    "gaussian")` is its bound of the likelihood.
    """

    def __init__(self, config: AutoencoderConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or AutoencoderConfig()
        self.encoder, self.decoder = Encoder(config), Decoder(config)

    @classmethod
    def from_diffusers(cls, model: nn.Module) -> Autoencoder:
        """The autoencoder that computes what a `diffusers.AutoencoderKL` does, with a copy of its
        weights, in its dtypes, on its device, in its mode.

        Raises:
            TypeError: `model` is no AutoencoderKL. ValueError: an option of it has no counterpart,
            or weights are missing, left over or misshapen; the message names all of them.
        """
        # by name: diffusers need not be there for a model that is not from it
        if "AutoencoderKL" not in (base.__name__ for base in type(model).__mro__):
            raise TypeError(
                f"from_diffusers: model must be an AutoencoderKL, got {type(model).__name__}"
            )
        options: Any = model.config
        config = AutoencoderConfig(**_autoencoder_keys.diffusers_config(options))
        made = _autoencoder_keys.from_diffusers_weights(cls, config, model.state_dict())
        return made.train(model.training)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """mu and logvar of q(z|x), see `Encoder`; mu is the latent without noise."""
        mu, logvar = self.encoder(x)
        return mu, logvar

    def sample(self, x: Tensor, seeds: Any, *, step: int = 0) -> tuple[Tensor, Tensor]:
        """A draw of q(z|x) and its KL divergence from N(0, I).

        Args:
            x: `(N, in_channels, H, W)`.
            seeds: of the N draws, as in `fastdiff.ops.reparameterize`.
            step: counter of the draw; the number of the training step gives fresh noise to each.

        Returns:
            z, shape and dtype of mu, and `(N,)` nats in float32.
        """
        return ops.reparameterize(*self.encode(x), seeds, step=step)

    def decode(self, z: Tensor) -> Tensor:
        """Images of latents, see `Decoder`."""
        out: Tensor = self.decoder(z)
        return out

    def forward(self, x: Tensor, seeds: Any, *, step: int = 0) -> tuple[Tensor, Tensor]:
        """The decoded draw of q(z|x), `(N, out_channels, H, W)`, and the KL divergence, `(N,)`."""
        z, kl = self.sample(x, seeds, step=step)
        return self.decode(z), kl

    def scale(self, z: Tensor) -> Tensor:
        """Latents as a diffusion model takes them: ``(z - latent_shift) * latent_scale``."""
        return (z - self._each("latent_shift", z)) * self._each("latent_scale", z)

    def unscale(self, z: Tensor) -> Tensor:
        """Latents as `decode` takes them; inverts `scale`."""
        return z / self._each("latent_scale", z) + self._each("latent_shift", z)

    def _each(self, name: str, like: Tensor) -> Tensor | float:
        value: Each = getattr(self.config, name)
        if not isinstance(value, tuple):
            return value
        return torch.tensor(value, dtype=like.dtype, device=like.device).view(-1, 1, 1)


def _check(name: str, x: Tensor, channels: int, least: int) -> None:
    if not x.is_floating_point():
        raise TypeError(f"Autoencoder: {name} must be floating point, got {x.dtype}")
    if x.ndim != 4 or x.shape[1] != channels or min(x.shape[2:]) < least:
        raise ValueError(
            f"Autoencoder: {name} must have shape (N, {channels}, H, W) with H and W at least "
            f"{least}, got {tuple(x.shape)}"
        )
