"""A class-conditional U-Net whose residual blocks are modulated by FiLM, on the fused ops.

The backbone follows DDPM (Ho et al. 2020, arXiv:2006.11239, appendix B) with the adaptive
group normalisation of Dhariwal & Nichol 2021 (arXiv:2105.05233, section 4), which is FiLM
(Perez et al. 2018, arXiv:1709.07871): the time and class embedding gives a scale and a shift for
every channel after the second normalisation of a block. Its options reach from the small model
that the library trains to the networks of those papers, whose published weights it takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.models import _unet_keys, _unet_sources
from fastdiff.models._inputs import require_batch, require_labels
from fastdiff.models._unet_blocks import (
    Attention,
    Downsample,
    FilmNorm,
    Level,
    ResBlock,
    Upsample,
    timestep_embedding,
    zero,
)
from fastdiff.models._unet_config import UNetConfig

__all__ = ["Attention", "FilmNorm", "ResBlock", "UNet", "UNetConfig", "timestep_embedding"]


class UNet(nn.Module):
    """Predicts noise, data, velocity or flow (a checkpoint's card says which) from `x` and `t`.

    The linear layers that modulate the blocks are one, `film`, whose rows are those of the blocks
    in the order they run: one GEMM a forward instead of one a block, and nothing to stack again
    when the weights change. State dicts with a layer a block (`down.0.res.film.weight`), as they
    were written before, are stacked when they are loaded.
    """

    def __init__(self, config: UNetConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or UNetConfig()
        dim, widths, grids = config.embed_dim, config.channels, config.grids
        pixels = config.in_channels * config.patch_size**2
        shrink, grow = config.resampling("downsample"), config.resampling("upsample")
        up_attention = config.attention if config.up_attention is None else config.up_attention
        # the names of the blocks that `film` modulates and its rows for each, in the order they run
        self.film_blocks: list[str] = []
        self.film_widths: list[int] = []

        self.time = nn.Sequential(nn.Linear(config.sinusoids, dim), nn.SiLU(), nn.Linear(dim, dim))
        labels = config.num_classes + config.null_class
        # the last row is the null class
        self.label = nn.Embedding(labels, dim) if config.num_classes else None
        self.stem = nn.Conv2d(pixels, widths[0], 3, padding=1)

        self.down, self.shrink = nn.ModuleList(), nn.ModuleList()
        skips, width = [widths[0]], widths[0]
        for i, c in enumerate(widths):
            for _ in range(config.blocks):
                self._level("down", width, c, grids[i] in config.attention)
                width = c
                skips.append(c)
            if i < len(widths) - 1:
                self._resample("shrink", shrink[i], c, c)
                skips.append(c)
        self.middle = nn.ModuleList()
        if config.middle != "none":
            groups = config.groups if config.middle_groups is None else config.middle_groups
            self._level("middle", width, width, config.middle == "attention", groups)
            self._level("middle", width, width, False)
        self.up, self.grow = nn.ModuleList(), nn.ModuleList()
        for i, c in reversed(list(enumerate(widths))):
            for _ in range(config.blocks + 1):
                self._level("up", width + skips.pop(), c, grids[i] in up_attention)
                width = c
            if i > 0:
                # a 1x1 before the upsampling may narrow already: a 3x3 after it costs 36 times as
                # much, and the next block convolves at that size anyway
                width = widths[i - 1] if grow[i - 1] == "conv1x1" else c
                self._resample("grow", grow[i - 1], c, width)
        self.film = nn.Linear(dim, sum(self.film_widths))
        self.norm_out = FilmNorm(config.groups, width, config.eps)
        out = config.out_channels or config.in_channels
        self.conv_out = nn.Conv2d(width, out * config.patch_size**2, 3, padding=1)
        zero(self.conv_out)
        self.register_load_state_dict_pre_hook(_stack_on_load)  # type: ignore[no-untyped-call]

    def _res(self, name: str, c_in: int, c_out: int, resample: str | None = None) -> ResBlock:
        c = self.config
        block = ResBlock(
            c_in, c_out, c.groups,
            eps=c.eps, modulation=c.modulation, dropout=c.dropout, resample=resample,
        )  # fmt: skip
        self.film_blocks.append(name)
        self.film_widths.append(block.film_width)
        return block

    def _level(
        self, part: str, c_in: int, c_out: int, attend: bool, groups: int | None = None
    ) -> None:
        """Append a block, and attention where `attend` says so, to `part`."""
        c, modules = self.config, getattr(self, part)
        res, layer = self._res(f"{part}.{len(modules)}.res", c_in, c_out), None
        if attend:
            head_dim = c_out // c.heads if c.heads else c.head_dim
            layer = Attention(c_out, head_dim, c.groups if groups is None else groups, c.eps)
        modules.append(Level(res, layer))

    def _resample(self, part: str, kind: str, c_in: int, c_out: int) -> None:
        """Append what changes the grid between two levels to `shrink` or `grow`."""
        modules, down = getattr(self, part), part == "shrink"
        if kind == "resblock":
            name = f"{part}.{len(modules)}"
            modules.append(self._res(name, c_in, c_out, "down" if down else "up"))
        elif kind == "pool":
            modules.append(nn.AvgPool2d(2))
        elif kind == "nearest":
            modules.append(nn.Upsample(scale_factor=2.0))
        elif down:
            modules.append(Downsample(c_in, self.config.downsample_padding))
        else:
            modules.append(Upsample(c_in, c_out, 1 if kind == "conv1x1" else 3))

    @classmethod
    def from_diffusers(cls, model: nn.Module, *, image_size: int | None = None) -> UNet:
        """The U-Net that computes what a `diffusers.UNet2DModel` does, with a copy of its weights.

        Called as `unet(x, t, label)`, it returns the sample itself.

        Args:
            model: of down blocks `DownBlock2D`, `AttnDownBlock2D`, `ResnetDownsampleBlock2D` and
                their mirrors, positional time embedding, SiLU.
            image_size: height and width of the images where the model's `sample_size` does not
                say.

        Returns:
            The network in the model's dtypes, on its device, in its mode.

        Raises:
            TypeError: `model` is no UNet2DModel. ValueError: an option of it has no counterpart, or
            weights are missing, left over or misshapen; the message names all of them.
        """
        return _unet_sources.from_diffusers(cls, model, image_size)

    @classmethod
    def from_guided_diffusion(cls, state: Mapping[str, Tensor], **flags: Any) -> UNet:
        """The U-Net of a state dict of guided-diffusion (Dhariwal & Nichol 2021), or of
        improved-diffusion, whose keys are the same.

        Args:
            state: names like `input_blocks.0.0.weight`.
            flags: what was given to that project's scripts, by the same names and with the same
                defaults: image_size, num_channels, num_res_blocks, channel_mult,
                attention_resolutions, num_heads, num_head_channels, use_scale_shift_norm,
                resblock_updown, use_new_attention_order, learn_sigma, class_cond, dropout; and
                conv_resample, groups and in_channels, which those scripts leave at True, 32 and 3.

        Returns:
            The network in the dtype of the weights, in evaluation mode. With `learn_sigma` it
            predicts twice the channels.

        Raises:
            TypeError: an unknown flag. ValueError: a flag breaks its rule, or weights are missing,
            left over or misshapen; the message names all of them.
        """
        return _unet_sources.from_guided_diffusion(cls, state, **flags)

    @property
    def null_label(self) -> int:
        """The label that means "no class"; -1 is read as the same."""
        return self.config.num_classes

    def upgrade_state_dict(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`state` with the keys of today: a linear layer for each block becomes rows of `film`."""
        state = dict(state)
        _unet_keys.stack_film(state, self.film_blocks, "")
        return state

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """The prediction for a noisy batch.

        Args:
            x: `(N, in_channels, image_size, image_size)`, any floating dtype; computed in the
                dtype of the weights.
            t: `(N,)`, the time as the schedule counts it, may be fractional.
            label: `(N,)`, int64, in `[0, num_classes)`; -1 or `num_classes` is the null class;
                None is the null class for the whole batch.

        Returns:
            The prediction, `(N, out_channels, image_size, image_size)`, dtype of `x`.

        Raises:
            TypeError: a dtype is wrong.
            ValueError: a shape is wrong, a label is missing where there is no null class, or, on
                the CPU, a label is out of range.
        """
        films = iter(self.film(self._embed(x, t, label)).split(self.film_widths, dim=1))
        h = F.pixel_unshuffle(x.to(self.stem.weight.dtype), self.config.patch_size)
        h = self.stem(h)
        skips, blocks = [h], self.config.blocks
        for i, block in enumerate(self.down):
            h = block(h, next(films))
            skips.append(h)
            if (i + 1) % blocks == 0 and i + 1 < len(self.down):
                h = _resize(self.shrink[i // blocks], h, films)
                skips.append(h)
        for block in self.middle:
            h = block(h, next(films))
        for i, block in enumerate(self.up):
            h = block(torch.cat([h, skips.pop()], dim=1), next(films))
            if (i + 1) % (blocks + 1) == 0 and i + 1 < len(self.up):
                h = _resize(self.grow[i // (blocks + 1)], h, films)
        h = self.conv_out(self.norm_out(h))
        return F.pixel_shuffle(h, self.config.patch_size).to(x.dtype)

    def _embed(self, x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        """The activated embedding `(N, embed_dim)` that every block is modulated by."""
        c = self.config
        require_batch("UNet", x, t, (c.in_channels, c.image_size, c.image_size))
        dtype = self.stem.weight.dtype
        sinusoids = timestep_embedding(
            t * c.time_scale,
            c.sinusoids,
            flip_sin_to_cos=c.flip_sin_to_cos,
            freq_shift=c.freq_shift,
        )
        embedding: Tensor = self.time(sinusoids.to(dtype))
        if self.label is None:
            if label is not None:
                raise ValueError(
                    "UNet: label must be None for an unconditional model, got a tensor"
                )
            return F.silu(embedding)
        if label is None:
            if not c.null_class:
                raise ValueError(
                    "UNet: label must be a tensor for a model without a null class, got None"
                )
            return F.silu(embedding + self.label.weight[self.null_label])
        low, high = (-1, c.num_classes) if c.null_class else (0, c.num_classes - 1)
        require_labels("UNet", label, t, low, high)
        if c.null_class:
            label = torch.where(label == -1, self.null_label, label)
        return F.silu(embedding + self.label(label))


def _resize(module: nn.Module, h: Tensor, films: Iterator[Tensor]) -> Tensor:
    out: Tensor = module(h, next(films)) if isinstance(module, ResBlock) else module(h)
    return out


def _stack_on_load(module: UNet, state: dict[str, Any], prefix: str, *_: Any) -> None:
    _unet_keys.stack_film(state, module.film_blocks, prefix)
