"""Weights of other implementations of DiT under the names that `DiT` has for them.

The paper's code and diffusers keep one linear layer a block for the modulation, each with the six
parts in the order shift, scale, gate of attention, then of the MLP. Here all of them stand in one
matrix in the order of their use; that of the last norm, shift and scale, follows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from fastdiff.models._keys import read_options

if TYPE_CHECKING:
    from fastdiff.models.dit import DiTConfig


class Names(NamedTuple):
    """Our name of a layer: theirs, or theirs to be stacked; {} is the number of the block."""

    top: dict[str, str]
    block: dict[str, tuple[str, ...]]
    film: str
    last_film: str
    label: str
    positions: str | None = None


ORIGINAL = Names(
    top={
        "patches": "x_embedder.proj",
        "time.0": "t_embedder.mlp.0",
        "time.2": "t_embedder.mlp.2",
        "out": "final_layer.linear",
    },
    block={
        "qkv": ("blocks.{}.attn.qkv",),
        "proj": ("blocks.{}.attn.proj",),
        "fc1": ("blocks.{}.mlp.fc1",),
        "fc2": ("blocks.{}.mlp.fc2",),
    },
    film="blocks.{}.adaLN_modulation.1",
    last_film="final_layer.adaLN_modulation.1",
    label="y_embedder.embedding_table",
    positions="pos_embed",
)

_EMBEDDER = "transformer_blocks.{}.norm1.emb."
_TIME = "timestep_embedder.linear_"
_LABEL = "class_embedder.embedding_table"
DIFFUSERS = Names(
    top={
        "patches": "pos_embed.proj",
        "time.0": _EMBEDDER.format(0) + _TIME + "1",
        "time.2": _EMBEDDER.format(0) + _TIME + "2",
        "out": "proj_out_2",
    },
    block={
        "qkv": tuple("transformer_blocks.{}.attn1.to_" + name for name in "qkv"),
        "proj": ("transformer_blocks.{}.attn1.to_out.0",),
        "fc1": ("transformer_blocks.{}.ff.net.0.proj",),
        "fc2": ("transformer_blocks.{}.ff.net.2",),
    },
    film="transformer_blocks.{}.norm1.linear",
    last_film="proj_out_1",
    label=_EMBEDDER.format(0) + _LABEL,
)

# of DiTTransformer2DModel in diffusers 0.42; `_OLD` are the options beside them of the
# Transformer2DModel that it once was
_DEFAULTS: dict[str, Any] = {
    "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": None,
    "num_layers": 28, "dropout": 0.0, "norm_num_groups": 32, "attention_bias": True,
    "sample_size": 32, "patch_size": 2, "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000, "upcast_attention": False, "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False, "norm_eps": 1e-5,
}  # fmt: skip
_OLD = {
    "cross_attention_dim": None, "num_vector_embeds": None, "use_linear_projection": False,
    "only_cross_attention": False, "double_self_attention": False, "attention_type": "default",
    "caption_channels": None, "interpolation_scale": None, "use_additional_conditions": None,
}  # fmt: skip
_MUST = {
    "norm_type": ("ada_norm_zero",),
    "activation_fn": ("gelu-approximate",),
    "attention_bias": (True,),
    "norm_elementwise_affine": (False,),
    "upcast_attention": (False,),
    **{name: (value,) for name, value in _OLD.items()},
}


def sources(names: Names, config: DiTConfig) -> dict[str, tuple[str, ...]]:
    """Each key of ours: the keys of the source whose rows it holds, one after the other."""
    layers: dict[str, tuple[str, ...]] = {ours: (name,) for ours, name in names.top.items()}
    films = [names.film.format(i) for i in range(config.depth)]
    layers["modulation"] = (*films, names.last_film)
    for i in range(config.depth):
        for ours, theirs in names.block.items():
            layers[f"blocks.{i}.{ours}"] = tuple(name.format(i) for name in theirs)
    found = {
        f"{ours}.{kind}": tuple(f"{name}.{kind}" for name in theirs)
        for ours, theirs in layers.items()
        for kind in ("weight", "bias")
    }
    if config.num_classes:
        found["label.weight"] = (f"{names.label}.weight",)
    if names.positions and config.positions == "learned":
        found["positions"] = (names.positions,)
    return found


def copies(config: DiTConfig) -> dict[str, str]:
    """Keys of diffusers' model, which has the embedders once a block, and those of its first."""
    layers = [_TIME + f"{layer}.{kind}" for layer in (1, 2) for kind in ("weight", "bias")]
    return {
        _EMBEDDER.format(i) + name: _EMBEDDER.format(0) + name
        for i in range(1, config.depth)
        for name in (*layers, f"{_LABEL}.weight")
    }


def diffusers_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `DiTConfig` for a `DiTTransformer2DModel`; ValueError for what `DiT` lacks."""
    c = read_options("DiT", config, {**_DEFAULTS, **_OLD}, _MUST)
    channels, out = c["in_channels"], c["out_channels"] or c["in_channels"]
    if out not in (channels, 2 * channels):
        raise ValueError(f"DiT: out_channels must be {channels} or {2 * channels}, got {out}")
    return {
        "in_channels": channels,
        "image_size": c["sample_size"],
        "patch_size": c["patch_size"],
        "width": c["num_attention_heads"] * c["attention_head_dim"],
        "depth": c["num_layers"],
        "heads": c["num_attention_heads"],
        "num_classes": c["num_embeds_ada_norm"],
        "learn_sigma": out != channels,
        "time_shift": 1,
        "mlp_eps": c["norm_eps"],
    }
