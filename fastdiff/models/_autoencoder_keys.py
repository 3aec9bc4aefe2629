"""Where the options and weights of diffusers' `AutoencoderKL` go in an `Autoencoder`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastdiff.models._keys import fill, read_options, rename_attention
from fastdiff.models._unet_keys import DIFFUSERS

if TYPE_CHECKING:
    from fastdiff.models.autoencoder import Autoencoder, AutoencoderConfig

OP = "from_diffusers"

# of AutoencoderKL in diffusers 0.42
_DEFAULTS: dict[str, Any] = {
    "in_channels": 3, "out_channels": 3, "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",), "block_out_channels": (64,), "layers_per_block": 1,
    "act_fn": "silu", "latent_channels": 4, "norm_num_groups": 32, "sample_size": 32,
    "scaling_factor": 0.18215, "shift_factor": None, "latents_mean": None, "latents_std": None,
    "force_upcast": True, "use_quant_conv": True, "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}  # fmt: skip
_MUST = {"act_fn": ("silu", "swish")}
_BLOCKS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}

_TOP = {
    "encoder.stem": "encoder.conv_in",
    "encoder.norm_out": "encoder.conv_norm_out",
    "encoder.conv_out": "encoder.conv_out",
    "encoder.quant": "quant_conv",
    "decoder.quant": "post_quant_conv",
    "decoder.stem": "decoder.conv_in",
    "decoder.norm_out": "decoder.conv_norm_out",
    "decoder.conv_out": "decoder.conv_out",
}


def _places(config: AutoencoderConfig) -> dict[str, str]:
    """Our blocks, attentions and resamplers: where an AutoencoderKL of that config has them."""
    places = {}
    for part in ("encoder", "decoder"):
        for k, name in enumerate(("resnets.0", "attentions.0", "resnets.1")):
            places[f"{part}.middle.{k}"] = f"{part}.mid_block.{name}"
    for level in range(len(config.channels)):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{level}"
        for k in range(config.blocks):
            places[f"encoder.down.{level * config.blocks + k}"] = f"{down}.resnets.{k}"
        for k in range(config.blocks + 1):
            places[f"decoder.up.{level * (config.blocks + 1) + k}"] = f"{up}.resnets.{k}"
        places[f"encoder.shrink.{level}"] = f"{down}.downsamplers.0.conv"
        places[f"decoder.grow.{level}"] = f"{up}.upsamplers.0.conv"
    return places


def sources(model: Autoencoder) -> dict[str, tuple[str, ...]]:
    """Each key of ours: the keys of diffusers whose rows it holds, one after the other."""
    places = {**_TOP, **_places(model.config)}
    found: dict[str, tuple[str, ...]] = {}
    layers: dict[str, tuple[str, ...]] = {
        name: (theirs,) for name, theirs in DIFFUSERS.block.items()
    } | DIFFUSERS.attention
    for key in model.state_dict():
        layer, kind = key.rsplit(".", 1)
        if layer in places:
            found[key] = (f"{places[layer]}.{kind}",)
        else:
            parent, child = layer.rsplit(".", 1)
            found[key] = tuple(f"{places[parent]}.{name}.{kind}" for name in layers[child])
    return found


def diffusers_config(options: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `AutoencoderConfig` for an AutoencoderKL of those options.

    Raises:
        ValueError: an option is unknown or has no counterpart.
    """
    c = read_options(OP, options, _DEFAULTS, _MUST)
    for name, only in _BLOCKS.items():
        want = [only] * len(c["block_out_channels"])
        if list(c[name]) != want:
            raise ValueError(f"{OP}: {name} must be {want}, got {list(c[name])}")
    mean, std, scale = c["latents_mean"], c["latents_std"], c["scaling_factor"]
    if (mean is None) != (std is None) or (mean is not None and c["shift_factor"] is not None):
        rule = "be both given or both None, and shift_factor None beside them"
        got = (mean, std, c["shift_factor"])
        raise ValueError(f"{OP}: latents_mean and latents_std must {rule}, got {got}")
    return {
        "in_channels": c["in_channels"],
        "out_channels": c["out_channels"],
        "channels": tuple(c["block_out_channels"]),
        "blocks": c["layers_per_block"],
        "latent_channels": c["latent_channels"],
        "groups": c["norm_num_groups"],
        "attention": c["mid_block_add_attention"],
        "quant_conv": c["use_quant_conv"],
        "post_quant_conv": c["use_post_quant_conv"],
        "latent_shift": (c["shift_factor"] or 0.0) if mean is None else tuple(mean),
        "latent_scale": scale if std is None else tuple(scale / each for each in std),
    }


def from_diffusers_weights(
    kind: type[Autoencoder], config: AutoencoderConfig, state: Mapping[str, Tensor]
) -> Autoencoder:
    """An `Autoencoder` with the weights of an AutoencoderKL, in evaluation mode."""
    with torch.device("meta"):
        model = kind(config)
    fill(OP, model, rename_attention(state), sources(model))
    return model.eval()
