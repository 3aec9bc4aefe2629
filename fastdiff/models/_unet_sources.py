"""A `UNet` from the options and weights of diffusers and of guided-diffusion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastdiff.models._keys import fill, read_options, rename_attention
from fastdiff.models._unet_config import UNetConfig
from fastdiff.models._unet_keys import (
    DIFFUSERS,
    GUIDED,
    Names,
    diffusers_places,
    guided_places,
    sources,
)

if TYPE_CHECKING:
    from fastdiff.models.unet import UNet

# block type of diffusers: whether it attends, and how it changes the grid (None: as configured)
DOWN_BLOCKS = {
    "DownBlock2D": (False, "conv"),
    "AttnDownBlock2D": (True, None),
    "ResnetDownsampleBlock2D": (False, "resnet"),
}
UP_BLOCKS = {
    "UpBlock2D": (False, "conv"),
    "AttnUpBlock2D": (True, None),
    "ResnetUpsampleBlock2D": (False, "resnet"),
}
OP = "from_diffusers"
RESAMPLING = {"conv": "conv", "resnet": "resblock"}

# of UNet2DModel in diffusers 0.42
DIFFUSERS_DEFAULTS: dict[str, Any] = {
    "sample_size": None, "in_channels": 3, "out_channels": 3, "center_input_sample": False,
    "time_embedding_type": "positional", "time_embedding_dim": None, "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ("DownBlock2D", *("AttnDownBlock2D",) * 3),
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": (*("AttnUpBlock2D",) * 3, "UpBlock2D"),
    "block_out_channels": (224, 448, 672, 896), "layers_per_block": 2,
    "mid_block_scale_factor": 1, "downsample_padding": 1, "downsample_type": "conv",
    "upsample_type": "conv", "dropout": 0.0, "act_fn": "silu", "attention_head_dim": 8,
    "norm_num_groups": 32, "attn_norm_num_groups": None, "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default", "add_attention": True, "class_embed_type": None,
    "num_class_embeds": None, "num_train_timesteps": None,
}  # fmt: skip

# what each option of UNet2DModel must be, where our network has no counterpart of another value
DIFFUSERS_MUST = {
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "mid_block_type": ("UNetMidBlock2D", None),
    "mid_block_scale_factor": (1,),
    "act_fn": ("silu", "swish"),
    "class_embed_type": (None,),
    "resnet_time_scale_shift": ("default", "scale_shift"),
}

# widths of the levels by image size, where guided-diffusion is given no channel_mult
CHANNEL_MULT = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
}


def from_diffusers(kind: type[UNet], model: nn.Module, image_size: int | None) -> UNet:
    """See `UNet.from_diffusers`."""
    # by name: diffusers need not be there for a model that is not from it
    if "UNet2DModel" not in (base.__name__ for base in type(model).__mro__):
        raise TypeError(f"{OP}: model must be a UNet2DModel, got {type(model).__name__}")
    options = dict(getattr(model, "config", {}))
    if image_size is not None:
        options["sample_size"] = image_size
    unet = from_diffusers_weights(kind, diffusers_config(options), model.state_dict())
    return unet.train(model.training)


def from_diffusers_weights(
    kind: type[UNet], config: UNetConfig, state: Mapping[str, Tensor]
) -> UNet:
    """A `UNet` with the weights of a UNet2DModel of that config, in evaluation mode."""
    with torch.device("meta"):
        unet = kind(config)
    _fill(OP, unet, rename_attention(state), DIFFUSERS, diffusers_places(config))
    return unet.eval()


def _fill(
    op: str, unet: UNet, state: Mapping[str, Tensor], names: Names, places: Mapping[str, str],
    **how: Any,
) -> None:  # fmt: skip
    rows = {f"film.{kind}": unet.film_widths for kind in ("weight", "bias")}
    fill(op, unet, state, sources(unet, names, places), rows=rows, **how)


def diffusers_config(options: Mapping[str, Any]) -> UNetConfig:
    """The `UNetConfig` of a UNet2DModel of those options.

    Raises:
        ValueError: an option is unknown or has no counterpart.
    """
    op, c = OP, read_options(OP, options, DIFFUSERS_DEFAULTS, DIFFUSERS_MUST)
    size = c["sample_size"]
    if not isinstance(size, int):
        if not size or len(set(size)) > 1:
            raise ValueError(f"{op}: image_size must be an int where sample_size is none or not "
                             f"square, got {size}")  # fmt: skip
        size = size[0]
    attend: dict[str, list[int]] = {}
    resample: dict[str, list[str]] = {}
    for part, known in (("down", DOWN_BLOCKS), ("up", UP_BLOCKS)):
        types = c[f"{part}_block_types"]
        attend[part], resample[part] = [], []
        # the way up starts at the coarsest level
        for level, block in enumerate(types if part == "down" else reversed(types)):
            block = block.removeprefix("UNetRes")  # as the first releases named them
            if block not in known:
                rule = f"name blocks of {sorted(known)}"
                raise ValueError(f"{op}: {part}_block_types must {rule}, got {block!r}")
            attends, change = known[block]
            change = change or c[f"{part}sample_type"]
            if change not in RESAMPLING:
                rule = f"be one of {sorted(RESAMPLING)}"
                raise ValueError(f"{op}: {part}sample_type must {rule}, got {change!r}")
            attend[part] += [size >> level] if attends else []
            resample[part].append(RESAMPLING[change])
    film = c["resnet_time_scale_shift"] == "scale_shift"
    middle_groups = c["attn_norm_num_groups"]
    if middle_groups is None and film:
        middle_groups = 0
    middle = "attention" if c["add_attention"] else "plain"
    widths = tuple(c["block_out_channels"])
    return UNetConfig(
        in_channels=c["in_channels"],
        out_channels=c["out_channels"],
        image_size=size,
        channels=widths,
        blocks=c["layers_per_block"],
        attention=tuple(attend["down"]),
        up_attention=tuple(attend["up"]),
        num_classes=c["num_class_embeds"] or 0,
        null_class=False,
        patch_size=1,
        embed_dim=c["time_embedding_dim"] or 4 * widths[0],
        time_dim=widths[0],
        flip_sin_to_cos=c["flip_sin_to_cos"],
        freq_shift=c["freq_shift"],
        groups=c["norm_num_groups"],
        eps=c["norm_eps"],
        dropout=c["dropout"],
        head_dim=c["attention_head_dim"] or 1,
        heads=None if c["attention_head_dim"] else 1,
        modulation="film" if film else "add",
        # the last block of either way has nothing to resample
        downsample=tuple(resample["down"][:-1]),
        upsample=tuple(resample["up"][1:]),
        downsample_padding=c["downsample_padding"],
        middle="none" if c["mid_block_type"] is None else middle,
        middle_groups=middle_groups,
    )


def numbers(text: str | Sequence[float]) -> list[float]:
    """The numbers of "1,2,4", as the scripts take them, or of a sequence."""
    return [float(n) for n in text.split(",")] if isinstance(text, str) else list(text)


def from_guided_diffusion(
    kind: type[UNet],
    state: Mapping[str, Tensor],
    *,
    image_size: int = 64,
    num_channels: int = 128,
    num_res_blocks: int = 2,
    channel_mult: str | Sequence[float] = "",
    attention_resolutions: str | Sequence[int] = "16,8",
    num_heads: int = 4,
    num_head_channels: int = -1,
    use_scale_shift_norm: bool = True,
    resblock_updown: bool = False,
    use_new_attention_order: bool = False,
    learn_sigma: bool = False,
    class_cond: bool = False,
    dropout: float = 0.0,
    conv_resample: bool = True,
    groups: int = 32,
    in_channels: int = 3,
) -> UNet:
    """See `UNet.from_guided_diffusion`."""
    op = "from_guided_diffusion"
    if not channel_mult and image_size not in CHANNEL_MULT:
        rule = f"be given for an image_size other than {sorted(CHANNEL_MULT)}"
        raise ValueError(f"{op}: channel_mult must {rule}, got {channel_mult!r} for {image_size}")
    if class_cond and "label_emb.weight" not in state:
        raise ValueError(f"{op}: weights must hold 'label_emb.weight', got no such key")
    multiples = numbers(channel_mult or CHANNEL_MULT[image_size])
    # the scripts take sizes and keep rates; one that no level has is passed over
    rates = {image_size // int(size) for size in numbers(attention_resolutions)}
    attention = [image_size >> i for i in range(len(multiples)) if 1 << i in rates]
    plain = ("conv", "conv") if conv_resample else ("pool", "nearest")
    downsample, upsample = ("resblock", "resblock") if resblock_updown else plain
    config = UNetConfig(
        in_channels=in_channels,
        out_channels=in_channels * (2 if learn_sigma else 1),
        image_size=image_size,
        channels=tuple(int(m * num_channels) for m in multiples),
        blocks=num_res_blocks,
        attention=tuple(attention),
        num_classes=len(state["label_emb.weight"]) if class_cond else 0,
        null_class=False,
        patch_size=1,
        embed_dim=4 * num_channels,
        time_dim=num_channels,
        groups=groups,
        dropout=dropout,
        head_dim=max(num_head_channels, 1),
        heads=num_heads if num_head_channels == -1 else None,
        modulation="film" if use_scale_shift_norm else "add",
        downsample=downsample,
        upsample=upsample,
    )
    with torch.device("meta"):
        unet = kind(config)

    def change(key: str, value: Tensor) -> Tensor:
        """Rows by query, key, value and then head, from rows by head and then those three."""
        if ".qkv." not in key or use_new_attention_order:
            return value
        width = len(value) // 3
        heads = config.heads or width // config.head_dim
        by_head = value.reshape(heads, 3, width // heads, *value.shape[1:])
        return by_head.transpose(0, 1).reshape(value.shape)

    _fill(op, unet, state, GUIDED, guided_places(config), change=change)
    return unet.eval()
