"""Our U-Net with weights of guided-diffusion's names computes the published architecture.

No package of that project is installed, so the network is written out here, from Dhariwal &
Nichol 2021 (arXiv:2105.05233) and the names of its released weights: a table of what each place
of the state dict holds, and plain PyTorch that walks it. Nothing here is fastdiff's.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from budget import assert_within_budget

from fastdiff.models import UNet, UNetConfig, _unet_keys

# every place of a small network: input_blocks[n][m], middle_block[m], output_blocks[n][m].
# Widths 8 and 16, two levels, one block a level, attention on the coarse grid and in the middle.
SMALL = {
    "input_blocks": [
        [("stem", 3, 8)],
        [("res", 8, 8)],
        [("down", 8, 8)],
        [("res", 8, 16), ("attention", 16, 16)],
    ],
    "middle_block": [[("res", 16, 16), ("attention", 16, 16), ("res", 16, 16)]],
    "output_blocks": [
        [("res", 32, 16), ("attention", 16, 16)],
        [("res", 24, 16), ("attention", 16, 16), ("up", 16, 16)],
        [("res", 24, 8)],
        [("res", 16, 8)],
    ],
}

# three levels, no attention on the middle one, the finest narrower than the embedding says
DEEP = {
    "input_blocks": [
        [("stem", 3, 4)],
        [("res", 4, 4), ("attention", 4, 4)],
        [("res", 4, 4), ("attention", 4, 4)],
        [("down", 4, 4)],
        [("res", 4, 8)],
        [("res", 8, 8)],
        [("down", 8, 8)],
        [("res", 8, 16), ("attention", 16, 16)],
        [("res", 16, 16), ("attention", 16, 16)],
    ],
    "middle_block": [[("res", 16, 16), ("attention", 16, 16), ("res", 16, 16)]],
    "output_blocks": [
        [("res", 32, 16), ("attention", 16, 16)],
        [("res", 32, 16), ("attention", 16, 16)],
        [("res", 24, 16), ("attention", 16, 16), ("up", 16, 16)],
        [("res", 24, 8)],
        [("res", 16, 8)],
        [("res", 12, 8), ("up", 8, 8)],
        [("res", 12, 4), ("attention", 4, 4)],
        [("res", 8, 4), ("attention", 4, 4)],
        [("res", 8, 4), ("attention", 4, 4)],
    ],
}

BASE = {
    "image_size": 8, "num_channels": 8, "num_res_blocks": 1, "channel_mult": "1,2",
    "attention_resolutions": "4", "num_head_channels": 4, "groups": 4,
}  # fmt: skip

# the network, and the flags that make it
CASES = {
    "adm": (SMALL, {"resblock_updown": True, "learn_sigma": True, "class_cond": True}),
    "new_attention": (SMALL, {"use_new_attention_order": True}),
    "conv_samplers": (SMALL, {"num_head_channels": -1, "num_heads": 2}),
    "no_resampling_weights": (SMALL, {"conv_resample": False}),
    "additive": (SMALL, {"use_scale_shift_norm": False, "learn_sigma": True}),
    "deep": (
        DEEP,
        {"image_size": 16, "num_res_blocks": 2, "channel_mult": (0.5, 1, 2), "num_head_channels": 2,
         "attention_resolutions": "16,4,1", "resblock_updown": True},
    ),
}  # fmt: skip


def layers(case: dict, kind: str, c_in: int, c_out: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights of one place."""
    embed, film = 32, 2 * c_out if case["use_scale_shift_norm"] else c_out
    resblock = {
        "in_layers.0": (c_in,),
        "in_layers.2": (c_out, c_in, 3, 3),
        "emb_layers.1": (film, embed),
        "out_layers.0": (c_out,),
        "out_layers.3": (c_out, c_out, 3, 3),
    }
    if c_in != c_out:
        resblock["skip_connection"] = (c_out, c_in, 1, 1)
    if kind == "res" or (kind in ("down", "up") and case["resblock_updown"]):
        return resblock
    if kind == "attention":
        return {"norm": (c_in,), "qkv": (3 * c_in, c_in, 1), "proj_out": (c_in, c_in, 1)}
    if kind == "stem":
        return {"": (c_out, c_in, 3, 3)}
    if not case["conv_resample"]:
        return {}
    return {"op" if kind == "down" else "conv": (c_out, c_in, 3, 3)}


def weights(table: dict, case: dict) -> dict[str, torch.Tensor]:
    """A random state dict with the names of the released ones."""
    first = table["input_blocks"][0][0][2]
    shapes = {
        "time_embed.0": (32, 8), "time_embed.2": (32, 32), "out.0": (first,),
        "out.2": (6 if case["learn_sigma"] else 3, first, 3, 3),
    }  # fmt: skip
    for part, blocks in table.items():
        for n, block in enumerate(blocks):
            for m, place in enumerate(block):
                at = f"{part}.{m}" if part == "middle_block" else f"{part}.{n}.{m}"
                for name, shape in layers(case, *place).items():
                    shapes[f"{at}.{name}".rstrip(".")] = shape
    draw, state = torch.Generator().manual_seed(0), {}
    for name, shape in shapes.items():
        fan_in = math.prod(shape[1:])
        random = torch.randn(shape, generator=draw)
        state[f"{name}.weight"] = random / fan_in**0.5 if len(shape) > 1 else 1 + 0.2 * random
        state[f"{name}.bias"] = 0.2 * torch.randn(shape[0], generator=draw)
    if case["class_cond"]:
        state["label_emb.weight"] = torch.randn(5, 32, generator=draw)
    return state


class Oracle:
    """The network of `table`, from the equations, in the dtype of the weights."""

    def __init__(self, table: dict, case: dict, state: dict[str, torch.Tensor]) -> None:
        self.table, self.case, self.state = table, case, state

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, self.state[f"{name}.weight"].flatten(1), self.state[f"{name}.bias"])

    def conv(self, x: torch.Tensor, name: str, **how: int) -> torch.Tensor:
        return F.conv2d(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"], **how)

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        return F.group_norm(x, self.case["groups"], weight, bias)

    def resample(self, x: torch.Tensor, kind: str) -> torch.Tensor:
        return F.avg_pool2d(x, 2) if kind == "down" else F.interpolate(x, scale_factor=2)

    def res(self, x: torch.Tensor, emb: torch.Tensor, at: str, kind: str) -> torch.Tensor:
        h = F.silu(self.norm(x, f"{at}.in_layers.0"))
        if kind != "res":
            h, x = self.resample(h, kind), self.resample(x, kind)
        h = self.conv(h, f"{at}.in_layers.2", padding=1)
        film = self.linear(F.silu(emb), f"{at}.emb_layers.1")[:, :, None, None]
        if self.case["use_scale_shift_norm"]:
            scale, shift = film.chunk(2, dim=1)
            h = self.norm(h, f"{at}.out_layers.0") * (1 + scale) + shift
        else:
            h = self.norm(h + film, f"{at}.out_layers.0")
        h = self.conv(F.silu(h), f"{at}.out_layers.3", padding=1)
        if f"{at}.skip_connection.weight" in self.state:
            x = self.conv(x, f"{at}.skip_connection")
        return x + h

    def attention(self, x: torch.Tensor, at: str) -> torch.Tensor:
        c, height, width = x.shape[1:]
        tokens = self.norm(x, f"{at}.norm").flatten(2).mT
        qkv = self.linear(tokens, f"{at}.qkv")
        per_head = self.case["num_head_channels"]
        heads = self.case["num_heads"] if per_head == -1 else c // per_head
        if self.case["use_new_attention_order"]:
            q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        else:
            q, k, v = qkv.unflatten(2, (heads, 3, -1)).permute(3, 0, 2, 1, 4)
        mixed = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1) @ v
        out = self.linear(mixed.transpose(1, 2).flatten(2), f"{at}.proj_out")
        return x + out.mT.unflatten(2, (height, width))

    def place(self, x: torch.Tensor, emb: torch.Tensor, at: str, kind: str) -> torch.Tensor:
        if kind == "stem":
            return self.conv(x, at, padding=1)
        if kind == "attention":
            return self.attention(x, at)
        if kind == "res" or self.case["resblock_updown"]:
            return self.res(x, emb, at, kind)
        if not self.case["conv_resample"]:
            return self.resample(x, kind)
        if kind == "down":
            return self.conv(x, f"{at}.op", stride=2, padding=1)
        return self.conv(self.resample(x, kind), f"{at}.conv", padding=1)

    def __call__(
        self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None = None
    ) -> torch.Tensor:
        angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(4, dtype=t.dtype) / 4)
        emb = torch.cat([angles.cos(), angles.sin()], dim=1).to(x.dtype)
        emb = self.linear(F.silu(self.linear(emb, "time_embed.0")), "time_embed.2")
        if y is not None:
            emb = emb + self.state["label_emb.weight"][y]
        skips = []
        for n, block in enumerate(self.table["input_blocks"]):
            for m, (kind, *_) in enumerate(block):
                x = self.place(x, emb, f"input_blocks.{n}.{m}", kind)
            skips.append(x)
        for m, (kind, *_) in enumerate(self.table["middle_block"][0]):
            x = self.place(x, emb, f"middle_block.{m}", kind)
        for n, block in enumerate(self.table["output_blocks"]):
            x = torch.cat([x, skips.pop()], dim=1)
            for m, (kind, *_) in enumerate(block):
                x = self.place(x, emb, f"output_blocks.{n}.{m}", kind)
        return self.conv(F.silu(self.norm(x, "out.0")), "out.2", padding=1)


DEFAULTS = {
    "use_scale_shift_norm": True, "resblock_updown": False, "learn_sigma": False,
    "class_cond": False, "conv_resample": True, "use_new_attention_order": False, "num_heads": 4,
}  # fmt: skip


def made(name: str) -> tuple[dict, dict, dict[str, torch.Tensor]]:
    table, flags = CASES[name]
    case = {**DEFAULTS, **BASE, **flags}
    return table, case, weights(table, case)


def inputs(case: dict) -> tuple[torch.Tensor, ...]:
    draw, size = torch.Generator().manual_seed(1), case["image_size"]
    x = torch.randn(3, 3, size, size, generator=draw)
    t = torch.tensor([999.0, 3.0, 250.5])
    return (x, t, torch.tensor([0, 4, 2])) if case["class_cond"] else (x, t)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_same_output(name, dtype):
    table, case, state = made(name)
    state = {key: value.to(dtype) for key, value in state.items()}
    x, t, *label = inputs(case)
    x = x.to(dtype)
    got = UNet.from_guided_diffusion(state, **case)(x, t, *label)
    reference = Oracle(table, case, state)(x, t, *label)
    double = {key: value.double() for key, value in state.items()}
    exact = Oracle(table, case, double)(x.double(), t.double(), *label)
    assert got.shape[1] == (6 if case["learn_sigma"] else 3)
    # the rounding of the result itself, in a few elements twice
    assert_within_budget(got, reference, exact, ulps=2)


@pytest.mark.parametrize("name", CASES)
def test_every_key_is_used_once(name):
    _, case, state = made(name)
    ours = UNet.from_guided_diffusion(state, **case)
    found = _unet_keys.sources(ours, _unet_keys.GUIDED, _unet_keys.guided_places(ours.config))
    assert sorted(key for keys in found.values() for key in keys) == sorted(state)
    assert set(found) == set(ours.state_dict())
    assert UNetConfig.from_config(ours.config.to_config()) == ours.config


def test_errors_name_the_weights_that_do_not_fit():
    _, case, state = made("adm")
    bad = {k: v for k, v in state.items() if k != "output_blocks.1.2.in_layers.2.bias"}
    bad["input_blocks.3.1.qkv.weight"] = torch.zeros(48, 16, 3)
    with pytest.raises(ValueError, match="weights must fit the model, got") as caught:
        UNet.from_guided_diffusion(bad, **{**case, "class_cond": False})
    assert str(caught.value).splitlines()[1:] == [
        "  missing    output_blocks.1.2.in_layers.2.bias (16,)",
        "  unexpected label_emb.weight (5, 32)",
        "  misshapen  input_blocks.3.1.qkv.weight (48, 16), got (48, 16, 3)",
    ]
    with pytest.raises(ValueError, match=r"hold 'label_emb.weight', got no such key"):
        UNet.from_guided_diffusion(made("additive")[2], **{**case, "class_cond": True})
    with pytest.raises(ValueError, match="channel_mult must be given for an image_size other than"):
        UNet.from_guided_diffusion(state, **{**case, "channel_mult": ""})


def test_labels_must_be_given_and_in_range():
    _, case, state = made("adm")
    model, (x, t, _) = UNet.from_guided_diffusion(state, **case), inputs(case)
    with pytest.raises(ValueError, match="label must be a tensor for a model without a null class"):
        model(x, t)
    for wrong in (-1, 5):
        with pytest.raises(ValueError, match=rf"label must lie in \[0, 4\], got \[{wrong}\]"):
            model(x, t, torch.tensor([0, wrong, 1]))
