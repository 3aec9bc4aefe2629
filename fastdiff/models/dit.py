"""The diffusion transformer DiT with adaLN-Zero blocks.

Peebles and Xie 2023, "Scalable Diffusion Models with Transformers" (arXiv:2212.09748). What stands
between two matrix products of a block is one call of `fastdiff.ops.modulate`: the gated residual of
one branch, and the normalised and modulated input of the next, over the block's end too. All
modulations of a forward pass come from one matrix product, since they depend on time and condition
alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.models import _dit_keys
from fastdiff.models._attention import attention
from fastdiff.models._inputs import Config, require_batch, require_labels
from fastdiff.models._keys import fill
from fastdiff.models.unet import timestep_embedding
from fastdiff.ops import modulate

__all__ = ["CONFIGS", "DiT", "DiTBlock", "DiTConfig"]

_FREQUENCIES = 256  # width of the time embedding before its first layer
_EACH = 6  # shift, scale and gate of attention, then of the MLP


@dataclass(frozen=True)
class DiTConfig(Config):
    """The architecture of a `DiT`; every field is JSON-able.

    Args:
        in_channels: channels of the (latent) images.
        image_size: height and width of the images.
        patch_size: side of a patch, which becomes one token.
        width: channels of a token; a multiple of 4 and of heads.
        depth: number of blocks.
        heads: attention heads of a block.
        mlp_ratio: width of the MLP's hidden layer over that of a token.
        num_classes: number of labels, 0 for none. One more embedding, the null class, is kept for
            classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598).
        vector_dim: width of a condition vector such as a pooled text embedding, 0 for none.
        learn_sigma: whether as many channels again are predicted, for the variance.
        positions: "sincos" for fixed sinusoids, "learned" for a parameter that starts as those.
        time_scale: factor on `t` before the sinusoids: 1 for a discrete schedule (t up to 999),
            1000 for a flow (t up to 1).
        time_shift: of `timestep_embedding`: 0 in the code of the paper, 1 in diffusers.
        mlp_eps: epsilon of the norm before the MLP; the other norms have 1e-6.
    """

    in_channels: int = 4
    image_size: int = 32
    patch_size: int = 2
    width: int = 384
    depth: int = 12
    heads: int = 6
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    vector_dim: int = 0
    learn_sigma: bool = True
    positions: str = "sincos"
    time_scale: float = 1.0
    time_shift: int = 0
    mlp_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("in_channels", "image_size", "patch_size", "width", "depth", "heads"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"DiTConfig: {name} must be an int >= 1, got {value!r}")
        for name in ("num_classes", "vector_dim"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"DiTConfig: {name} must be an int >= 0, got {value!r}")
        if self.width % self.heads or self.width % 4:
            raise ValueError(
                f"DiTConfig: width must be a multiple of heads={self.heads} and of 4, "
                f"got {self.width}"
            )
        if self.image_size % self.patch_size:
            raise ValueError(
                f"DiTConfig: image_size must be a multiple of patch_size={self.patch_size}, "
                f"got {self.image_size}"
            )
        if self.mlp_ratio <= 0:
            raise ValueError(f"DiTConfig: mlp_ratio must be > 0, got {self.mlp_ratio}")
        if self.positions not in ("sincos", "learned"):
            raise ValueError(
                f"DiTConfig: positions must be 'sincos' or 'learned', got {self.positions!r}"
            )
        if self.time_shift not in (0, 1):
            raise ValueError(f"DiTConfig: time_shift must be 0 or 1, got {self.time_shift!r}")

    @property
    def out_channels(self) -> int:
        """Channels of the prediction."""
        return self.in_channels * (2 if self.learn_sigma else 1)


# Table 1 of the paper, with patches of 2
CONFIGS = {
    "S/2": DiTConfig(width=384, depth=12, heads=6),
    "B/2": DiTConfig(width=768, depth=12, heads=12),
    "L/2": DiTConfig(width=1024, depth=24, heads=16),
    "XL/2": DiTConfig(width=1152, depth=28, heads=16),
}


def sincos_positions(width: int, side: int) -> Tensor:
    """Sinusoids of the columns, then of the rows, of a square grid.

    Returns:
        (side * side, width) float32: sines, then cosines of each (the paper's code, as in
        He et al. 2022, arXiv:2111.06377).
    """
    if torch.get_default_device().type == "meta":  # to compute there torch imports its compiler
        return torch.empty(side * side, width)
    frequency = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(side, dtype=torch.float64)[:, None] * frequency
    line = torch.cat([angle.sin(), angle.cos()], dim=1)
    columns, rows = line.repeat(side, 1), line.repeat_interleave(side, dim=0)
    return torch.cat([columns, rows], dim=1).float()


class DiTBlock(nn.Module):
    """The attention and the MLP of one block; what joins them is between the blocks of `DiT`."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width, hidden = config.width, int(config.width * config.mlp_ratio)
        self.heads = config.heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def attention(self, x: Tensor) -> Tensor:
        """`(N, L, width)` to the same shape."""
        n, tokens, width = x.shape
        q, k, v = self.qkv(x).view(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        h = attention(q, k, v)
        out: Tensor = self.proj(h.transpose(1, 2).reshape(n, tokens, width))
        return out

    def mlp(self, x: Tensor) -> Tensor:
        """`(N, L, width)` to the same shape."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return out


class DiT(nn.Module):
    """Predicts noise, data, velocity or flow (a checkpoint's card says which) from `x` and `t`."""

    def __init__(self, config: DiTConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or DiTConfig()
        width, side = config.width, config.image_size // config.patch_size
        self.patches = nn.Conv2d(config.in_channels, width, config.patch_size, config.patch_size)
        self.time = nn.Sequential(
            nn.Linear(_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width)
        )
        # the last row is the null class
        self.label = nn.Embedding(config.num_classes + 1, width) if config.num_classes else None
        self.vector = nn.Linear(config.vector_dim, width) if config.vector_dim else None
        positions = sincos_positions(width, side)
        if config.positions == "learned":
            self.positions: Tensor = nn.Parameter(positions)
        else:
            self.register_buffer("positions", positions, persistent=False)
        self.blocks: Any = nn.ModuleList([DiTBlock(config) for _ in range(config.depth)])
        # six of every block, then shift and scale of the last norm
        self.modulation = nn.Linear(width, (_EACH * config.depth + 2) * width)
        self.out = nn.Linear(width, config.patch_size**2 * config.out_channels)
        self._initialize()

    def _initialize(self) -> None:
        """As in the paper's code: every block starts as the identity, the prediction as zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patches.weight.view(self.config.width, -1))
        if self.patches.bias is not None:
            nn.init.zeros_(self.patches.bias)
        for name, weight in self.time.named_parameters():
            if name.endswith("weight"):
                nn.init.normal_(weight, std=0.02)
        if self.label is not None:
            nn.init.normal_(self.label.weight, std=0.02)
        for last in (self.modulation, self.out):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    @property
    def null_label(self) -> int:
        """The label that means "no class"; -1 is read as the same."""
        return self.config.num_classes

    @classmethod
    def from_diffusers(cls, model: nn.Module) -> DiT:
        """The same model from diffusers' `DiTTransformer2DModel`, in its dtype and on its device.

        Raises:
            ValueError: the model has what this one lacks; the message names it.
        """
        options: Any = model.config
        config = DiTConfig(**_dit_keys.diffusers_config(options))
        return cls._with_diffusers(config, model.state_dict())

    @classmethod
    def _with_diffusers(cls, config: DiTConfig, state: Mapping[str, Tensor]) -> DiT:
        copies = _dit_keys.copies(config)
        return cls._with(config, state, _dit_keys.DIFFUSERS, copies=copies)

    @classmethod
    def from_original(cls, state: Mapping[str, Tensor], config: DiTConfig) -> DiT:
        """A model with the weights of the paper's code (facebookresearch/DiT).

        Args:
            state: its state dict, such as that of DiT-XL-2-256x256.pt.
            config: its architecture, such as `CONFIGS["XL/2"]`. With learned positions they are
                read; fixed ones are computed.

        Raises:
            ValueError: keys or shapes do not fit the config.
        """
        state = dict(state)
        if "pos_embed" in state:  # a parameter there even where it is fixed
            positions = state.pop("pos_embed")
            if config.positions == "learned":
                state["pos_embed"] = positions.flatten(0, 1)
        return cls._with(config, state, _dit_keys.ORIGINAL)

    @classmethod
    def _with(
        cls, config: DiTConfig, state: Mapping[str, Tensor], names: _dit_keys.Names, **how: Any
    ) -> DiT:
        with torch.device("meta"):
            model = cls(config)
        each = [_EACH * config.width] * config.depth + [2 * config.width]
        rows = {f"modulation.{kind}": each for kind in ("weight", "bias")}
        fill("DiT", model, state, _dit_keys.sources(names, config), rows=rows, **how)
        if config.positions == "sincos":
            like = model.out.weight
            side = config.image_size // config.patch_size
            model.positions = sincos_positions(config.width, side).to(like.device, like.dtype)
        return model

    def forward(
        self, x: Tensor, t: Tensor, label: Tensor | None = None, vector: Tensor | None = None
    ) -> Tensor:
        """The prediction for a noisy batch.

        Args:
            x: `(N, in_channels, image_size, image_size)`, any floating dtype; computed in the
                dtype of the weights.
            t: `(N,)`, the time as the schedule counts it, may be fractional.
            label: `(N,)`, int64, in `[0, num_classes)`; -1 or `num_classes` is the null class;
                None is the null class for the whole batch.
            vector: `(N, vector_dim)`, the condition of a model that takes one.

        Returns:
            `(N, out_channels, image_size, image_size)`, dtype of `x`: with `learn_sigma` the
            prediction, then as many channels for the variance.

        Raises:
            TypeError: a dtype is wrong.
            ValueError: a shape is wrong or, on the CPU, a label is out of range.
        """
        c = self.config
        films = self._modulations(self._embed(x, t, label, vector))
        h = self.patches(x.to(self.patches.weight.dtype)).flatten(2).transpose(1, 2)
        h = h + self.positions
        shift, scale, *rest = films
        normed = modulate(h, scale, shift)
        for block in self.blocks:
            gate, shift, scale, mlp_gate, next_shift, next_scale, *rest = rest
            # a branch may come in another dtype under autocast
            branch = block.attention(normed).to(h.dtype)
            normed, h = modulate(h, scale, shift, residual=branch, gate=gate, eps=c.mlp_eps)
            branch = block.mlp(normed).to(h.dtype)
            normed, h = modulate(h, next_scale, next_shift, residual=branch, gate=mlp_gate)
        prediction: Tensor = self.out(normed)
        return self._images(prediction).to(x.dtype)

    def _modulations(self, embedding: Tensor) -> tuple[Tensor, ...]:
        """All modulations `(N, width)` in the order of their use, from one matrix product."""
        films: Tensor = self.modulation(F.silu(embedding))
        return films.view(len(films), -1, self.config.width).unbind(dim=1)

    def _images(self, tokens: Tensor) -> Tensor:
        c = self.config
        side = c.image_size // c.patch_size
        grid = tokens.view(len(tokens), side, side, c.patch_size, c.patch_size, c.out_channels)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(
            len(tokens), c.out_channels, c.image_size, c.image_size
        )

    def _embed(self, x: Tensor, t: Tensor, label: Tensor | None, vector: Tensor | None) -> Tensor:
        """What the blocks are conditioned on, `(N, width)`."""
        c = self.config
        require_batch("DiT", x, t, (c.in_channels, c.image_size, c.image_size))
        dtype = self.patches.weight.dtype
        sinusoids = timestep_embedding(t * c.time_scale, _FREQUENCIES, freq_shift=c.time_shift)
        embedding: Tensor = self.time(sinusoids.to(dtype))
        if self.label is not None:
            embedding = embedding + self.label(self._labels(label, t))
        elif label is not None:
            raise ValueError("DiT: label must be None for a model without classes, got a tensor")
        if self.vector is None:
            if vector is not None:
                raise ValueError("DiT: vector must be None for a model without one, got a tensor")
            return embedding
        if vector is None or tuple(vector.shape) != (x.shape[0], c.vector_dim):
            got = None if vector is None else tuple(vector.shape)
            raise ValueError(
                f"DiT: vector must have shape ({x.shape[0]}, {c.vector_dim}), got {got}"
            )
        conditioned: Tensor = embedding + self.vector(vector.to(dtype))
        return conditioned

    def _labels(self, label: Tensor | None, t: Tensor) -> Tensor:
        """Checked labels, the null class by its number."""
        if label is None:
            return torch.full(t.shape, self.null_label, dtype=torch.int64, device=t.device)
        require_labels("DiT", label, t, -1, self.null_label)
        return torch.where(label == -1, self.null_label, label)
