"""A small class-conditional U-Net whose residual blocks are modulated by FiLM.

The backbone follows DDPM (Ho et al. 2020, arXiv:2006.11239, appendix B) with the adaptive
group normalisation of Dhariwal & Nichol 2021 (arXiv:2105.05233, section 4), which is FiLM
(Perez et al. 2018, arXiv:1709.07871): the time and class embedding gives a scale and a shift for
every channel after the second normalisation of a block.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Attention", "FilmNorm", "ResBlock", "UNet", "UNetConfig", "timestep_embedding"]


@dataclass(frozen=True)
class UNetConfig:
    """The architecture of a `UNet`; every field is JSON-able.

    Args:
        in_channels: channels of the images, in and out.
        image_size: height and width of the images, in pixels.
        channels: width of each resolution level, finest first; each level halves the grid.
        blocks: residual blocks a level on the way down (one more on the way up).
        attention: grid sizes (after `patch_size`) at which blocks are followed by self-attention,
            besides the middle of the network, which always is.
        num_classes: number of labels, 0 for an unconditional model. One more embedding, the null
            class, is kept for classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598).
        patch_size: space-to-depth factor before the first convolution. 2 turns 1x32x32 into
            4x16x16, which costs a quarter at the same width.
        embed_dim: width of the time and class embedding.
        groups: groups of every normalisation; must divide each width.
        head_dim: channels of one attention head.
        time_scale: factor on `t` before the sinusoids, so that their periods fit the schedule:
            1 for a discrete schedule (t up to 999), 1000 for a flow (t up to 1).
    """

    in_channels: int = 1
    image_size: int = 32
    channels: tuple[int, ...] = (64, 128)
    blocks: int = 1
    attention: tuple[int, ...] = ()
    num_classes: int = 10
    patch_size: int = 2
    embed_dim: int = 256
    groups: int = 8
    head_dim: int = 32
    time_scale: float = 1.0

    def __post_init__(self) -> None:
        # JSON has no tuples: a card gives lists
        object.__setattr__(self, "channels", tuple(self.channels))
        object.__setattr__(self, "attention", tuple(self.attention))
        for name in ("in_channels", "image_size", "blocks", "patch_size", "embed_dim", "groups"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"UNetConfig: {name} must be an int >= 1, got {value!r}")
        if not self.channels:
            raise ValueError("UNetConfig: channels must name at least one level, got ()")
        for width in self.channels:
            if width % self.groups or width % self.head_dim:
                raise ValueError(
                    f"UNetConfig: channels must be multiples of groups={self.groups} and "
                    f"head_dim={self.head_dim}, got {self.channels}"
                )
        if self.embed_dim % 4:
            raise ValueError(f"UNetConfig: embed_dim must be a multiple of 4, got {self.embed_dim}")
        if self.num_classes < 0:
            raise ValueError(f"UNetConfig: num_classes must be >= 0, got {self.num_classes}")
        step = self.patch_size * 2 ** (len(self.channels) - 1)
        if self.image_size % step:
            raise ValueError(
                f"UNetConfig: image_size must be a multiple of {step} (patch_size times 2 for "
                f"each level but one), got {self.image_size}"
            )
        grids = [self.image_size // self.patch_size >> i for i in range(len(self.channels))]
        if not set(self.attention) <= set(grids):
            raise ValueError(
                f"UNetConfig: attention must name grid sizes among {grids}, got {self.attention}"
            )

    def to_config(self) -> dict[str, Any]:
        """The fields as a JSON-able dict; `UNetConfig.from_config` inverts it."""
        config = asdict(self)
        config["channels"], config["attention"] = list(self.channels), list(self.attention)
        return config

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> UNetConfig:
        """Build from a dict as `to_config` gives; ValueError names any unknown key."""
        unknown = sorted(set(config) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"UNetConfig: config must hold known keys only, got {unknown}")
        return cls(**config)


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10000.0, shift: int = 0) -> Tensor:
    """Sinusoidal embedding of time (Vaswani et al. 2017, section 3.5; as used by DDPM).

    Args:
        t: `(N,)`, floating point, may be fractional.
        dim: width of the embedding, even.
        max_period: the longest period, in units of `t`, divided by 2 pi.
        shift: 0 leaves the longest period itself out, 1 has it as the last of the dim / 2.

    Returns:
        `(N, dim)` in float32 at least (float64 for a float64 `t`): cosines, then sines.
    """
    # bfloat16 holds no integer above 256 exactly, so neighbouring times would collide
    t = t if t.dtype == torch.float64 else t.float()
    half = dim // 2
    powers = torch.arange(half, dtype=t.dtype, device=t.device) / (half - shift)
    angles = t[:, None] * torch.exp(-math.log(max_period) * powers)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class FilmNorm(nn.GroupNorm):
    """GroupNorm, then FiLM `(1 + scale) * h + shift`, then SiLU.

    The three are one module because they are one memory pass in a fused kernel
    (`fastdiff.ops.film_norm`), which may stand in for this forward.
    """

    def forward(
        self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
    ) -> Tensor:
        """`x` is `(N, C, H, W)`; `scale` and `shift` are `(N, C)`, both or neither."""
        h: Tensor = super().forward(x)
        if scale is not None and shift is not None:
            h = torch.addcmul(shift[:, :, None, None], h, 1 + scale[:, :, None, None])
        return F.silu(h)


class ResBlock(nn.Module):
    """norm, SiLU, conv, norm, FiLM, SiLU, conv; added to the input.

    The last convolution starts at zero, so that the block starts as the identity (or as its 1x1
    skip where the width changes).
    """

    def __init__(self, c_in: int, c_out: int, embed_dim: int, groups: int) -> None:
        super().__init__()
        self.norm1 = FilmNorm(groups, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.film = nn.Linear(embed_dim, 2 * c_out)
        self.norm2 = FilmNorm(groups, c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(_bias(self.conv2))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """`x` is `(N, c_in, H, W)`, `embedding` `(N, embed_dim)`; returns `(N, c_out, H, W)`."""
        scale, shift = self.film(embedding).chunk(2, dim=1)
        h = self.conv1(self.norm1(x))
        h = self.conv2(self.norm2(h, scale, shift))
        out: Tensor = self.skip(x) + h
        return out


class Attention(nn.Module):
    """Self-attention over the pixels of the grid, added to the input; starts as the identity."""

    def __init__(self, channels: int, head_dim: int, groups: int) -> None:
        super().__init__()
        self.heads = channels // head_dim
        self.norm = nn.GroupNorm(groups, channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        """`(N, C, H, W)` to the same shape."""
        n, c, height, width = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).view(n, height * width, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, height * width, c)
        out: Tensor = self.out(h)
        return x + out.transpose(1, 2).view(n, c, height, width)


class _Level(nn.Module):
    """One residual block and, where the grid asks for it, attention."""

    def __init__(self, c_in: int, c_out: int, config: UNetConfig, attend: bool) -> None:
        super().__init__()
        self.res = ResBlock(c_in, c_out, config.embed_dim, config.groups)
        self.attention = (
            Attention(c_out, config.head_dim, config.groups) if attend else nn.Identity()
        )

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        out: Tensor = self.attention(self.res(x, embedding))
        return out


class UNet(nn.Module):
    """Predicts noise, data, velocity or flow (a checkpoint's card says which) from `x` and `t`."""

    def __init__(self, config: UNetConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or UNetConfig()
        dim, widths, last = config.embed_dim, config.channels, len(config.channels) - 1
        grid = config.image_size // config.patch_size
        pixels = config.in_channels * config.patch_size**2

        self.time = nn.Sequential(nn.Linear(dim // 2, dim), nn.SiLU(), nn.Linear(dim, dim))
        # the last row is the null class
        self.label = nn.Embedding(config.num_classes + 1, dim) if config.num_classes else None
        self.stem = nn.Conv2d(pixels, widths[0], 3, padding=1)

        self.down, self.shrink = nn.ModuleList(), nn.ModuleList()
        skips, width = [widths[0]], widths[0]
        for i, c in enumerate(widths):
            for _ in range(config.blocks):
                self.down.append(_Level(width, c, config, grid >> i in config.attention))
                width = c
                skips.append(c)
            if i < last:
                self.shrink.append(nn.Conv2d(c, c, 3, stride=2, padding=1))
                skips.append(c)
        self.middle = nn.ModuleList(
            [_Level(width, width, config, True), _Level(width, width, config, False)]
        )
        self.up, self.grow = nn.ModuleList(), nn.ModuleList()
        for i, c in reversed(list(enumerate(widths))):
            for _ in range(config.blocks + 1):
                attend = grid >> i in config.attention
                self.up.append(_Level(width + skips.pop(), c, config, attend))
                width = c
            if i > 0:
                # 1x1 before the upsampling: a 3x3 after it costs 36 times as much, and the next
                # block convolves at that size anyway
                width = widths[i - 1]
                self.grow.append(nn.Conv2d(c, width, 1))
        self.norm_out = FilmNorm(config.groups, width)
        self.conv_out = nn.Conv2d(width, pixels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(_bias(self.conv_out))

    @property
    def null_label(self) -> int:
        """The label that means "no class"; -1 is read as the same."""
        return self.config.num_classes

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """The prediction for a noisy batch.

        Args:
            x: `(N, in_channels, image_size, image_size)`, any floating dtype; computed in the
                dtype of the weights.
            t: `(N,)`, the time as the schedule counts it, may be fractional.
            label: `(N,)`, int64, in `[0, num_classes)`; -1 or `num_classes` is the null class;
                None is the null class for the whole batch.

        Returns:
            The prediction, shape and dtype of `x`.

        Raises:
            TypeError: a dtype is wrong.
            ValueError: a shape is wrong or, on the CPU, a label is out of range.
        """
        embedding = self._embed(x, t, label)
        h = F.pixel_unshuffle(x.to(self.stem.weight.dtype), self.config.patch_size)
        h = self.stem(h)
        skips, blocks = [h], self.config.blocks
        for i, block in enumerate(self.down):
            h = block(h, embedding)
            skips.append(h)
            if (i + 1) % blocks == 0 and i + 1 < len(self.down):
                h = self.shrink[i // blocks](h)
                skips.append(h)
        for block in self.middle:
            h = block(h, embedding)
        for i, block in enumerate(self.up):
            h = block(torch.cat([h, skips.pop()], dim=1), embedding)
            if (i + 1) % (blocks + 1) == 0 and i + 1 < len(self.up):
                h = F.interpolate(self.grow[i // (blocks + 1)](h), scale_factor=2.0)
        h = self.conv_out(self.norm_out(h))
        return F.pixel_shuffle(h, self.config.patch_size).to(x.dtype)

    def _embed(self, x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        """The activated embedding `(N, embed_dim)` that every block modulates by."""
        c = self.config
        want = (c.in_channels, c.image_size, c.image_size)
        if not x.is_floating_point():
            raise TypeError(f"UNet: x must be floating point, got {x.dtype}")
        if x.ndim != 4 or tuple(x.shape[1:]) != want:
            rule = f"(N, {', '.join(map(str, want))})"
            raise ValueError(f"UNet: x must have shape {rule}, got {tuple(x.shape)}")
        if tuple(t.shape) != (x.shape[0],):
            raise ValueError(f"UNet: t must have shape ({x.shape[0]},), got {tuple(t.shape)}")
        dtype = self.stem.weight.dtype
        sinusoids = timestep_embedding(t * c.time_scale, c.embed_dim // 2)
        embedding: Tensor = self.time(sinusoids.to(dtype))
        if self.label is None:
            if label is not None:
                raise ValueError(
                    "UNet: label must be None for an unconditional model, got a tensor"
                )
            return F.silu(embedding)
        if label is None:
            return F.silu(embedding + self.label.weight[self.null_label])
        if label.dtype != torch.int64:
            raise TypeError(f"UNet: label must be int64, got {label.dtype}")
        if label.shape != t.shape:
            raise ValueError(
                f"UNet: label must have shape {tuple(t.shape)}, got {tuple(label.shape)}"
            )
        # elsewhere the check would wait for the device at every step
        if label.device.type == "cpu" and not torch.compiler.is_compiling():
            wrong = label[(label < -1) | (label > self.null_label)]
            if len(wrong):
                rule = f"lie in [-1, {self.null_label}]"
                raise ValueError(f"UNet: label must {rule}, got {wrong.tolist()}")
        label = torch.where(label == -1, self.null_label, label)
        return F.silu(embedding + self.label(label))


def _bias(conv: nn.Conv2d) -> Tensor:
    if conv.bias is None:
        raise TypeError("UNet: conv.bias must be a tensor, got None")
    return conv.bias
