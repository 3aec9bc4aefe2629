"""What a `UNet` is made of: one frozen record, which a checkpoint's card holds as JSON."""

from __future__ import annotations

from dataclasses import dataclass, fields

from fastdiff.models._inputs import Config

__all__ = ["UNetConfig"]

CHOICES = {
    "modulation": ("film", "add"),
    "downsample": ("conv", "resblock", "pool"),
    "upsample": ("conv1x1", "conv", "resblock", "nearest"),
    "middle": ("attention", "plain", "none"),
    "downsample_padding": (0, 1),
}


@dataclass(frozen=True)
class UNetConfig(Config):
    """The architecture of a `UNet`; every field is JSON-able.

    The defaults are the small model that the library trains. `UNet.from_diffusers` and
    `UNet.from_guided_diffusion` show which fields give the networks of DDPM (Ho et al. 2020,
    arXiv:2006.11239) and ADM (Dhariwal & Nichol 2021, arXiv:2105.05233).

    Args:
        in_channels: channels of the images that go in.
        image_size: height and width of the images, in pixels.
        channels: width of each resolution level, finest first; each level halves the grid.
        blocks: residual blocks a level on the way down (one more on the way up).
        attention: grid sizes (after `patch_size`) at which blocks are followed by self-attention,
            besides the middle of the network.
        num_classes: number of labels, 0 for an unconditional model.
        patch_size: space-to-depth factor before the first convolution. 2 turns 1x32x32 into
            4x16x16, which costs a quarter at the same width.
        embed_dim: width of the time and class embedding.
        groups: groups of every normalisation; must divide each width.
        head_dim: channels of one attention head.
        time_scale: factor on `t` before the sinusoids, so that their periods fit the schedule:
            1 for a discrete schedule (t up to 999), 1000 for a flow (t up to 1).
        out_channels: channels of the prediction; None: `in_channels`. Twice `in_channels` where
            the variance is learned too (Nichol & Dhariwal 2021, arXiv:2102.09672).
        eps: added to the variance by every normalisation.
        dropout: share of activations dropped before a block's second convolution, in training.
        modulation: "film": the embedding scales and shifts a block after its second
            normalisation; "add": it is added before it, as in DDPM.
        downsample: between levels: "conv": 3x3 with stride 2; "resblock": a residual block around
            a 2x2 mean, as in ADM; "pool": that mean alone. One name, or one for each step between
            levels, finest first.
        upsample: "conv1x1": 1x1 convolution, then nearest neighbours; "conv": nearest neighbours,
            then 3x3; "resblock": a residual block around nearest neighbours; "nearest": these
            alone. One name, or one for each step between levels, finest first.
        downsample_padding: of the strided convolution: 1 on every side, or 0: one row below and
            one column to the right.
        middle: "attention": block, self-attention, block; "plain": two blocks; "none": nothing.
        middle_groups: groups of the normalisation before the middle's attention; None: `groups`;
            0: no normalisation.
        up_attention: `attention` on the way up; None: the same.
        heads: attention heads at every width; None: width / `head_dim`.
        time_dim: width of the sinusoids, even; None: `embed_dim` / 2.
        flip_sin_to_cos: cosines before sines.
        freq_shift: the slowest sinusoid has the period of index `time_dim` / 2 - `freq_shift`.
        null_class: one more label, "no class", for classifier-free guidance (Ho & Salimans 2022,
            arXiv:2207.12598); without it a conditional model must be given labels.
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
    out_channels: int | None = None
    eps: float = 1e-5
    dropout: float = 0.0
    modulation: str = "film"
    downsample: str | tuple[str, ...] = "conv"
    upsample: str | tuple[str, ...] = "conv1x1"
    downsample_padding: int = 1
    middle: str = "attention"
    middle_groups: int | None = None
    up_attention: tuple[int, ...] | None = None
    heads: int | None = None
    time_dim: int | None = None
    flip_sin_to_cos: bool = True
    freq_shift: float = 0.0
    null_class: bool = True

    def __post_init__(self) -> None:
        # JSON has no tuples: a card gives lists
        for f in fields(self):
            if isinstance(getattr(self, f.name), list):
                object.__setattr__(self, f.name, tuple(getattr(self, f.name)))
        object.__setattr__(self, "channels", tuple(self.channels))
        object.__setattr__(self, "attention", tuple(self.attention))
        self._check_numbers()
        self._check_choices()
        self._check_grids()
        self._check_widths()

    def _check_numbers(self) -> None:
        for name in ("in_channels", "image_size", "blocks", "patch_size", "embed_dim", "groups"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"UNetConfig: {name} must be an int >= 1, got {value!r}")
        for name in ("time_scale", "eps", "dropout", "freq_shift"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ValueError(f"UNetConfig: {name} must be a number, got {value!r}")
        for name in ("out_channels", "heads", "time_dim"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"UNetConfig: {name} must be None or an int >= 1, got {value!r}")
        widths = self.channels
        if not widths or not all(type(c) is int and c >= 1 for c in widths):
            raise ValueError(f"UNetConfig: channels must be ints >= 1, at least one, got {widths}")
        if self.num_classes < 0:
            raise ValueError(f"UNetConfig: num_classes must be >= 0, got {self.num_classes}")
        if not self.eps >= 0:
            raise ValueError(f"UNetConfig: eps must be >= 0, got {self.eps}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"UNetConfig: dropout must lie in [0, 1), got {self.dropout}")
        if self.time_dim is None and self.embed_dim % 4:
            raise ValueError(f"UNetConfig: embed_dim must be a multiple of 4, got {self.embed_dim}")
        if self.sinusoids % 2:
            raise ValueError(f"UNetConfig: time_dim must be even, got {self.time_dim}")
        if not self.freq_shift < self.sinusoids // 2:
            raise ValueError(
                f"UNetConfig: freq_shift must be below {self.sinusoids // 2}, half the sinusoids, "
                f"got {self.freq_shift}"
            )

    def _check_choices(self) -> None:
        steps = len(self.channels) - 1
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            listed = name in ("downsample", "upsample") and isinstance(value, tuple)
            if listed and len(value) != steps:
                raise ValueError(f"UNetConfig: {name} must hold {steps} names, got {value}")
            for choice in value if listed else (value,):
                if choice not in choices:
                    raise ValueError(f"UNetConfig: {name} must be one of {choices}, got {choice!r}")

    def _check_grids(self) -> None:
        step = self.patch_size * 2 ** (len(self.channels) - 1)
        if self.image_size % step:
            raise ValueError(
                f"UNetConfig: image_size must be a multiple of {step} (patch_size times 2 for "
                f"each level but one), got {self.image_size}"
            )
        for name in ("attention", "up_attention"):
            if not set(getattr(self, name) or ()) <= set(self.grids):
                raise ValueError(
                    f"UNetConfig: {name} must name grid sizes among {self.grids}, got "
                    f"{getattr(self, name)}"
                )

    def _check_widths(self) -> None:
        attended = {*self.attention, *(self.up_attention or ())}
        if self.middle == "attention":
            attended.add(self.grids[-1])
        for grid, width in zip(self.grids, self.channels, strict=True):
            # heads are cut only where there is attention
            cut = (self.heads or self.head_dim) if grid in attended else 1
            if width % self.groups or width % cut:
                heads = f"heads={self.heads}" if self.heads else f"head_dim={self.head_dim}"
                raise ValueError(
                    f"UNetConfig: channels must be multiples of groups={self.groups} and {heads}, "
                    f"got {self.channels}"
                )
        if self.middle_groups and self.channels[-1] % self.middle_groups:
            raise ValueError(
                f"UNetConfig: middle_groups must divide {self.channels[-1]}, got "
                f"{self.middle_groups}"
            )

    @property
    def grids(self) -> list[int]:
        """Grid size of each level, finest first."""
        return [self.image_size // self.patch_size >> i for i in range(len(self.channels))]

    @property
    def sinusoids(self) -> int:
        """Width of the sinusoidal embedding of time."""
        return self.embed_dim // 2 if self.time_dim is None else self.time_dim

    def resampling(self, name: str) -> tuple[str, ...]:
        """`downsample` or `upsample` as one name a step between levels, finest first."""
        value = getattr(self, name)
        return (value,) * (len(self.channels) - 1) if isinstance(value, str) else value
