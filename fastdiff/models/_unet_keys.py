"""Where the weights of other U-Nets go in a `UNet`: key maps as data.

A map says for each layer of a residual block, of an attention and of the rest what the source
calls it; a walk over the levels says which block of the source is which of ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

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
