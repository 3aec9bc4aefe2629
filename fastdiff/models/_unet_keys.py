"""Where the weights of other U-Nets go in a `UNet`: key maps as data, and one function for both.

A map says for each layer of a residual block, of an attention and of the rest what the source
calls it; a walk over the levels says which block of the source is which of ours. Every key of the
source is used once and every key of ours is filled, or the first that is not is named.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdiff.models._unet_config import UNetConfig

if TYPE_CHECKING:
    from fastdiff.models.unet import UNet


class Names(NamedTuple):
    """Our name of a layer: theirs, or theirs to be stacked; `film` is the modulating layer."""

    film: str
    block: dict[str, str]
    attention: dict[str, tuple[str, ...]]
    shrink: str
    grow: str
    top: dict[str, str]


DIFFUSERS = Names(
    film="time_emb_proj",
    block={
        "norm1": "norm1",
        "conv1": "conv1",
        "norm2": "norm2",
        "conv2": "conv2",
        "skip": "conv_shortcut",
    },
    attention={"norm": ("group_norm",), "qkv": ("to_q", "to_k", "to_v"), "out": ("to_out.0",)},
    shrink="conv",
    grow="conv",
    top={
        "stem": "conv_in",
        "time.0": "time_embedding.linear_1",
        "time.2": "time_embedding.linear_2",
        "label": "class_embedding",
        "norm_out": "conv_norm_out",
        "conv_out": "conv_out",
    },
)

GUIDED = Names(
    film="emb_layers.1",
    block={
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "skip": "skip_connection",
    },
    attention={"norm": ("norm",), "qkv": ("qkv",), "out": ("proj_out",)},
    shrink="op",
    grow="conv",
    top={
        "stem": "input_blocks.0.0",
        "time.0": "time_embed.0",
        "time.2": "time_embed.2",
        "label": "label_emb",
        "norm_out": "out.0",
        "conv_out": "out.2",
    },
)

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
RESAMPLING = {"conv": "conv", "resnet": "resblock"}

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


def stack_film(state: dict[str, Any], blocks: Sequence[str], prefix: str) -> None:
    """Join the modulating layers of `blocks` into the rows of one, in place, if all are there."""
    for kind in ("weight", "bias"):
        keys = [f"{prefix}{block}.film.{kind}" for block in blocks]
        # a dict that lacks some is left as it is, for the loader to name them
        if all(key in state for key in keys):
            state[f"{prefix}film.{kind}"] = torch.cat([state.pop(key) for key in keys])


def diffusers_places(c: UNetConfig) -> dict[str, str]:
    """Our blocks, attentions and resamplers: where a UNet2DModel of that config has them."""
    places, steps = {}, len(c.channels) - 1
    for part, ours, count, resizers in (
        ("down", "shrink", c.blocks, "downsamplers"),
        ("up", "grow", c.blocks + 1, "upsamplers"),
    ):
        for level in range(steps + 1):
            for k in range(count):
                there, here = f"{part}_blocks.{level}", f"{part}.{level * count + k}"
                places[f"{here}.res"] = f"{there}.resnets.{k}"
                places[f"{here}.attention"] = f"{there}.attentions.{k}"
            places[f"{ours}.{level}"] = f"{part}_blocks.{level}.{resizers}.0"
    for k in range(2):
        places[f"middle.{k}.res"] = f"mid_block.resnets.{k}"
        places[f"middle.{k}.attention"] = f"mid_block.attentions.{k}"
    return places


def guided_places(c: UNetConfig) -> dict[str, str]:
    """Our blocks, attentions and resamplers: where guided-diffusion of that config has them."""
    places = {
        "middle.0.res": "middle_block.0",
        "middle.0.attention": "middle_block.1",
        "middle.1.res": "middle_block.2",
    }
    # input_blocks.0 is the stem
    place, up = 1, c.attention if c.up_attention is None else c.up_attention
    for level in range(len(c.channels)):
        for k in range(c.blocks):
            here = f"down.{level * c.blocks + k}"
            places[f"{here}.res"] = f"input_blocks.{place}.0"
            places[f"{here}.attention"] = f"input_blocks.{place}.1"
            place += 1
        places[f"shrink.{level}"] = f"input_blocks.{place}.0"
        place += 1
    place = 0
    for level, grid in enumerate(reversed(c.grids)):
        for k in range(c.blocks + 1):
            here = f"up.{level * (c.blocks + 1) + k}"
            places[f"{here}.res"] = f"output_blocks.{place}.0"
            places[f"{here}.attention"] = f"output_blocks.{place}.1"
            place += 1
        # it is in the list of the level's last block, after its attention
        places[f"grow.{level}"] = f"output_blocks.{place - 1}.{2 if grid in up else 1}"
    return places


def sources(unet: UNet, names: Names, places: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Each key of ours: the keys of the source whose rows it holds, one after the other."""
    found: dict[str, tuple[str, ...]] = {}
    for key in unet.state_dict():
        layer, kind = key.rsplit(".", 1)
        parent, _, child = layer.rpartition(".")
        if layer == "film":
            theirs: tuple[str, ...] = tuple(f"{places[b]}.{names.film}" for b in unet.film_blocks)
        elif layer in names.top:
            theirs = (names.top[layer],)
        elif layer in places:
            end = names.shrink if layer.startswith("shrink") else names.grow
            theirs = (f"{places[layer]}.{end}",)
        elif parent.endswith(".attention"):
            theirs = tuple(f"{places[parent]}.{name}" for name in names.attention[child])
        else:
            theirs = (f"{places[parent]}.{names.block[child]}",)
        found[key] = tuple(f"{name}.{kind}" for name in theirs)
    return found


def fill(
    op: str,
    unet: UNet,
    state: Mapping[str, Tensor],
    names: Names,
    places: Mapping[str, str],
    change: Callable[[str, Tensor], Tensor] = lambda key, value: value,
) -> None:
    """Put a copy of the source's weights into `unet`, which may be on the meta device.

    Raises:
        ValueError: a key is missing, left over or misshapen; the message names the first.
    """
    wanted, used = sources(unet, names, places), set()
    for ours, theirs in wanted.items():
        for name in theirs:
            if name not in state:
                raise ValueError(f"{op}: weights must hold {name!r} for {ours!r}, got no such key")
            used.add(name)
    for name in state:
        if name not in used:
            raise ValueError(f"{op}: weights must all have a place, got {name!r} that has none")
    filled = {}
    for ours, value in unet.state_dict().items():
        theirs = wanted[ours]
        rows = unet.film_widths if ours.startswith("film.") else [len(value) // len(theirs)]
        parts = []
        for name, count in zip(theirs, rows if len(rows) > 1 else rows * len(theirs), strict=True):
            part, shape = state[name].detach(), (count, *value.shape[1:])
            # a 1x1 convolution over the tokens is a linear layer
            if value.ndim == 2 and part.shape == (*shape, *(1,) * (part.ndim - 2)):
                part = part.reshape(shape)
            if part.shape != shape:
                raise ValueError(
                    f"{op}: {name!r} must have shape {shape} for {ours!r}, got {tuple(part.shape)}"
                )
            parts.append(part)
        filled[ours] = change(ours, torch.cat(parts) if len(parts) > 1 else parts[0].clone())
    unet.load_state_dict(filled, assign=True)


def from_diffusers(kind: type[UNet], model: nn.Module, image_size: int | None) -> UNet:
    """See `UNet.from_diffusers`."""
    op, c = "from_diffusers", dict(getattr(model, "config", {}))
    # by name: diffusers need not be there for a model that is not from it
    if "UNet2DModel" not in (base.__name__ for base in type(model).__mro__):
        raise TypeError(f"{op}: model must be a UNet2DModel, got {type(model).__name__}")
    for option, allowed in DIFFUSERS_MUST.items():
        if c[option] not in allowed:
            rule = f"be one of {allowed}" if len(allowed) > 1 else f"be {allowed[0]!r}"
            raise ValueError(f"{op}: {option} must {rule}, got {c[option]!r}")
    size = c["sample_size"] if image_size is None else image_size
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
    config = UNetConfig(
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
    with torch.device("meta"):
        unet = kind(config)
    fill(op, unet, model.state_dict(), DIFFUSERS, diffusers_places(config))
    return unet.train(model.training)


def _numbers(text: str | Sequence[float]) -> list[float]:
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
    multiples = _numbers(channel_mult or CHANNEL_MULT[image_size])
    # the scripts take sizes and keep rates; one that no level has is passed over
    rates = {image_size // int(size) for size in _numbers(attention_resolutions)}
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

    fill(op, unet, state, GUIDED, guided_places(config), change)
    return unet.eval()
