"""The parts of a `UNet`, each computed by the fused ops."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff import ops
from fastdiff.models._attention import attention

__all__ = [
    "Attention", "Downsample", "FilmNorm", "Level", "ResBlock", "Upsample", "timestep_embedding",
]  # fmt: skip


def timestep_embedding(
    t: Tensor,
    dim: int,
    max_period: float = 10000.0,
    *,
    flip_sin_to_cos: bool = True,
    freq_shift: float = 0.0,
) -> Tensor:
    """Sinusoidal embedding of time (Vaswani et al. 2017, section 3.5; as used by DDPM).

    Args:
        t: `(N,)`, floating point, may be fractional.
        dim: width of the embedding, even.
        max_period: the longest period, in units of `t`, divided by 2 pi, which the sinusoid of
            index `dim / 2 - freq_shift` has.
        flip_sin_to_cos: cosines, then sines; otherwise sines, then cosines.
        freq_shift: below `dim / 2`; 1 where the last sinusoid has the longest period itself.

    Returns:
        `(N, dim)` in float32 at least (float64 for a float64 `t`).
    """
    # bfloat16 holds no integer above 256 exactly, so neighbouring times would collide
    t = t if t.dtype == torch.float64 else t.float()
    half = dim // 2
    powers = torch.arange(half, dtype=t.dtype, device=t.device) / (half - freq_shift)
    angles = t[:, None] * torch.exp(-math.log(max_period) * powers)
    waves = (angles.cos(), angles.sin()) if flip_sin_to_cos else (angles.sin(), angles.cos())
    return torch.cat(waves, dim=1)


class FilmNorm(nn.GroupNorm):
    """GroupNorm, then FiLM `(1 + scale) * h + shift`, then SiLU, as one `ops.film_norm`."""

    def forward(
        self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
    ) -> Tensor:
        """`x` is `(N, C, H, W)`; `scale` and `shift` are `(N, C)`, both or neither."""
        return ops.film_norm(
            x, self.num_groups, self.weight, self.bias, scale, shift, "silu", eps=self.eps
        )


def _shrink(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2)


def _grow(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0)


class ResBlock(nn.Module):
    """norm, SiLU, conv, norm, modulation, SiLU, conv; added to the input.

    The last convolution starts at zero, so that the block starts as the identity (or as its 1x1
    skip where the width changes).

    Args:
        c_in, c_out: channels.
        groups, eps: of both normalisations.
        modulation: "film" or "add", see `UNetConfig`; "none": the block takes no embedding.
        dropout: before the second convolution, in training.
        resample: "down" or "up": the grid is halved by means or doubled by nearest neighbours
            between the first normalisation and the first convolution, and so is the input.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        groups: int,
        *,
        eps: float = 1e-5,
        modulation: str = "film",
        dropout: float = 0.0,
        resample: str | None = None,
    ) -> None:
        super().__init__()
        self.resize = {None: None, "down": _shrink, "up": _grow}[resample]
        self.dropout, self.modulation = dropout, modulation
        # what the embedding must give this block
        self.film_width = {"film": 2 * c_out, "add": c_out, "none": 0}[modulation]
        self.norm1 = FilmNorm(groups, c_in, eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = FilmNorm(groups, c_out, eps)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        zero(self.conv2)

    def forward(self, x: Tensor, film: Tensor | None = None) -> Tensor:
        """`x` is `(N, c_in, H, W)`, `film` `(N, film_width)` or None where that is 0; returns
        `(N, c_out, H', W')`."""
        h = self.norm1(x)
        if self.resize is not None:
            h, x = self.resize(h), self.resize(x)
        h = self.conv1(h)
        # under autocast the convolution has chosen the dtype that the rest of the block keeps
        skip = self.skip(x).to(h.dtype)
        scale: Tensor | None = None
        shift: Tensor | None = None
        if film is None:
            if self.film_width:
                raise TypeError(
                    f"ResBlock: film must be a tensor for {self.modulation!r}, got None"
                )
        elif self.modulation == "film":
            scale, shift = film.chunk(2, dim=1)
        else:
            added = film[:, :, None, None].to(h.dtype)
            # what the convolution gave is nobody else's yet
            h = h + added if torch.is_grad_enabled() else h.add_(added)
        if self.training and self.dropout:
            out: Tensor = skip + self.conv2(F.dropout(self.norm2(h, scale, shift), self.dropout))
            return out
        norm, conv = self.norm2, self.conv2
        return ops.film_conv2d(
            h,
            conv.weight.to(h.dtype),
            _bias(conv).to(h.dtype),
            num_groups=norm.num_groups,
            norm_weight=norm.weight,
            norm_bias=norm.bias,
            scale=scale,
            shift=shift,
            act="silu",
            residual=skip,
            padding=1,
            eps=norm.eps,
        )


class Attention(nn.Module):
    """Self-attention over the pixels of the grid, added to the input; starts as the identity.

    Args:
        channels: in and out.
        head_dim: channels of a head.
        groups: of the normalisation, 0 for none.
        eps: of the normalisation.
    """

    def __init__(self, channels: int, head_dim: int, groups: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.heads = channels // head_dim
        self.norm = nn.GroupNorm(groups, channels, eps) if groups else None
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)
        zero(self.out)

    def forward(self, x: Tensor) -> Tensor:
        """`(N, C, H, W)` to the same shape."""
        n, c, height, width = x.shape
        h, norm = x, self.norm
        if norm is not None:
            h = ops.film_norm(x, norm.num_groups, norm.weight, norm.bias, eps=norm.eps)
        tokens = h.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).view(n, height * width, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        h = attention(q, k, v).transpose(1, 2).reshape(n, height * width, c)
        out: Tensor = self.out(h)
        return x + out.transpose(1, 2).view(n, c, height, width)


class Level(nn.Module):
    """One residual block and, where there is one, attention."""

    def __init__(self, res: ResBlock, attend: Attention | None) -> None:
        super().__init__()
        self.res = res
        self.attention = nn.Identity() if attend is None else attend

    def forward(self, x: Tensor, film: Tensor) -> Tensor:
        """As `ResBlock`."""
        out: Tensor = self.attention(self.res(x, film))
        return out


class Downsample(nn.Conv2d):
    """3x3 convolution with stride 2; `padding` 0 pads one row below and one column right."""

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        """`(N, C, H, W)` to `(N, C, H / 2, W / 2)`."""
        return super().forward(x if self.padding != (0, 0) else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Conv2d):
    """Nearest neighbours and a convolution: 1x1 before them or 3x3 after them."""

    def __init__(self, c_in: int, c_out: int, kernel: int) -> None:
        super().__init__(c_in, c_out, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        """`(N, c_in, H, W)` to `(N, c_out, 2 H, 2 W)`."""
        if self.kernel_size == (1, 1):
            return _grow(super().forward(x))
        return super().forward(_grow(x))


def zero(layer: nn.Conv2d | nn.Linear) -> None:
    """Start a layer at zero, so that its branch starts as nothing."""
    for p in layer.parameters():
        nn.init.zeros_(p)


def _bias(conv: nn.Conv2d) -> Tensor:
    if conv.bias is None:
        raise TypeError("UNet: conv.bias must be a tensor, got None")
    return conv.bias
