"""Weights of other implementations of DiT under the names that `DiT` has for them.

The paper's code and diffusers keep one linear layer a block for the modulation, each with the six
parts in the order shift, scale, gate of attention, then of the MLP. Here all of them stand in one
matrix in the order of their use; that of the last norm, shift and scale, follows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_KINDS = ("weight", "bias")

# ours -> theirs, beside the blocks
_ORIGINAL = {
    "patches": "x_embedder.proj",
    "time.0": "t_embedder.mlp.0",
    "time.2": "t_embedder.mlp.2",
    "out": "final_layer.linear",
}
_ORIGINAL_BLOCK = {"qkv": "attn.qkv", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
_EMBEDDERS = "transformer_blocks.{}.norm1.emb."
_DIFFUSERS = {
    "patches": "pos_embed.proj",
    "time.0": _EMBEDDERS.format(0) + "timestep_embedder.linear_1",
    "time.2": _EMBEDDERS.format(0) + "timestep_embedder.linear_2",
    "out": "proj_out_2",
}
_DIFFUSERS_BLOCK = {"proj": "attn1.to_out.0", "fc1": "ff.net.0.proj", "fc2": "ff.net.2"}
_QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")


class _Taken:
    """A state dict that notes what was read, so that nothing is left out in silence."""

    def __init__(self, source: str, state: Mapping[str, Tensor]) -> None:
        self._source, self._left = source, dict(state)

    def __call__(self, name: str) -> Tensor:
        if name not in self._left:
            raise ValueError(f"DiT: {self._source} must have the weight {name}, got none")
        return self._left.pop(name)

    def done(self) -> None:
        if self._left:
            raise ValueError(
                f"DiT: {self._source} must have no other weights, got {sorted(self._left)}"
            )


def from_original(state: Mapping[str, Tensor], depth: int, learned: bool) -> dict[str, Tensor]:
    """State dict of `DiT` from that of facebookresearch/DiT (models.py)."""
    take, found = _Taken("state", state), {}
    for kind in _KINDS:
        for ours, theirs in _ORIGINAL.items():
            found[f"{ours}.{kind}"] = take(f"{theirs}.{kind}")
        parts = [take(f"blocks.{i}.adaLN_modulation.1.{kind}") for i in range(depth)]
        parts.append(take(f"final_layer.adaLN_modulation.1.{kind}"))
        found[f"modulation.{kind}"] = torch.cat(parts)
        for i in range(depth):
            for ours, theirs in _ORIGINAL_BLOCK.items():
                found[f"blocks.{i}.{ours}.{kind}"] = take(f"blocks.{i}.{theirs}.{kind}")
    if "y_embedder.embedding_table.weight" in state:
        found["label.weight"] = take("y_embedder.embedding_table.weight")
    if "pos_embed" in state:  # a parameter there even where it is fixed
        positions = take("pos_embed")[0]
        if learned:
            found["positions"] = positions
    take.done()
    return found


def from_diffusers(state: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """State dict of `DiT` from that of diffusers' `DiTTransformer2DModel`."""
    take, found = _Taken("model", state), {}
    shared = {k for k in state if k.startswith(_EMBEDDERS.format(0))}
    for i in range(1, depth):
        for name in shared:
            other = _EMBEDDERS.format(i) + name[len(_EMBEDDERS.format(0)) :]
            # a copy a block there; here, as in the paper, there is one
            if not torch.equal(take(other), state[name]):
                raise ValueError(
                    f"DiT: model must have the same embedders in every block, got another {other}"
                )
    for kind in _KINDS:
        for ours, theirs in _DIFFUSERS.items():
            found[f"{ours}.{kind}"] = take(f"{theirs}.{kind}")
        parts = [take(f"transformer_blocks.{i}.norm1.linear.{kind}") for i in range(depth)]
        found[f"modulation.{kind}"] = torch.cat([*parts, take(f"proj_out_1.{kind}")])
        for i in range(depth):
            qkv = [take(f"transformer_blocks.{i}.{name}.{kind}") for name in _QKV]
            found[f"blocks.{i}.qkv.{kind}"] = torch.cat(qkv)
            for ours, theirs in _DIFFUSERS_BLOCK.items():
                theirs = f"transformer_blocks.{i}.{theirs}.{kind}"
                found[f"blocks.{i}.{ours}.{kind}"] = take(theirs)
    table = _EMBEDDERS.format(0) + "class_embedder.embedding_table.weight"
    found["label.weight"] = take(table)
    take.done()
    return found


def diffusers_config(model: nn.Module) -> dict[str, Any]:
    """Fields of `DiTConfig` for a `DiTTransformer2DModel`; ValueError for what `DiT` lacks."""
    config: Any = model.config
    for name, only in (
        ("norm_type", "ada_norm_zero"),
        ("activation_fn", "gelu-approximate"),
        ("attention_bias", True),
        ("norm_elementwise_affine", False),
        ("upcast_attention", False),
    ):
        if config[name] != only:
            raise ValueError(f"DiT: {name} of the model must be {only!r}, got {config[name]!r}")
    channels, out = config["in_channels"], config["out_channels"] or config["in_channels"]
    if out not in (channels, 2 * channels):
        raise ValueError(
            f"DiT: out_channels of the model must be {channels} or {2 * channels}, got {out}"
        )
    return {
        "in_channels": channels,
        "image_size": config["sample_size"],
        "patch_size": config["patch_size"],
        "width": config["num_attention_heads"] * config["attention_head_dim"],
        "depth": config["num_layers"],
        "heads": config["num_attention_heads"],
        "num_classes": config["num_embeds_ada_norm"],
        "learn_sigma": out != channels,
        "time_shift": 1,
        "mlp_eps": config["norm_eps"],
    }
