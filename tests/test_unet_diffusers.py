"""Our U-Net with the weights of diffusers' UNet2DModel computes what that model computes."""

from __future__ import annotations

import copy

import pytest
import torch
from budget import assert_within_budget
from diffusers import UNet2DConditionModel, UNet2DModel

from fastdiff.models import UNet, UNetConfig, _unet_keys

TINY = {
    "sample_size": 16, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 4,
}  # fmt: skip

# each adds what the ones before it lack
CONFIGS = {
    "additive": {},
    "scale_shift": {"resnet_time_scale_shift": "scale_shift"},
    "scale_shift_middle_norm": {
        "resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 2, "norm_eps": 1e-3,
    },
    "one_head_two_blocks": {"attention_head_dim": None, "layers_per_block": 2, "out_channels": 6},
    "ddpm_time": {
        "flip_sin_to_cos": False, "freq_shift": 1, "downsample_padding": 0,
        "time_embedding_dim": 24,
    },
    "resnet_samplers": {
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "block_out_channels": (8, 16, 24), "downsample_type": "resnet", "upsample_type": "resnet",
    },
    "conv_and_resnet_samplers": {
        "down_block_types": ("DownBlock2D", "ResnetDownsampleBlock2D", "DownBlock2D"),
        "up_block_types": ("ResnetUpsampleBlock2D", "UpBlock2D", "UpBlock2D"),
        "block_out_channels": (8, 16, 8),
    },
    "attention_on_one_way": {
        "down_block_types": ("AttnDownBlock2D", "DownBlock2D"), "add_attention": False,
    },
    "no_middle": {"mid_block_type": None, "sample_size": (16, 16)},
    "classes": {"num_class_embeds": 5},
}  # fmt: skip

CIFAR10 = {
    "sample_size": 32, "block_out_channels": (128, 256, 256, 256), "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None, "downsample_padding": 0, "flip_sin_to_cos": False,
    "freq_shift": 1, "norm_eps": 1e-6,
}  # fmt: skip


def peer(**options: object) -> UNet2DModel:
    """A random model in which no two weights are alike, those of the normalisations included."""
    torch.manual_seed(0)
    model = UNet2DModel(**options).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(0.2 * torch.randn_like(p))
    return model


class Sinusoids(torch.nn.Module):
    """The embedding of time in float64, which diffusers computes in float32 in any model."""

    def __init__(self, dim: int, flip: bool, shift: float) -> None:
        super().__init__()
        self.half, self.flip, self.shift = dim // 2, flip, shift

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        index = torch.arange(self.half, dtype=torch.float64)
        angles = t.double()[:, None] * 10000.0 ** (-index / (self.half - self.shift))
        pair = [angles.sin(), angles.cos()]
        return torch.cat(pair[::-1] if self.flip else pair, dim=1)


def exact(model: UNet2DModel) -> UNet2DModel:
    double, c = copy.deepcopy(model).double(), model.config
    double.time_proj = Sinusoids(c.block_out_channels[0], c.flip_sin_to_cos, c.freq_shift)
    return double


def batch(model: UNet2DModel, n: int = 3) -> tuple[torch.Tensor, ...]:
    draw, c = torch.Generator().manual_seed(1), model.config
    size = c.sample_size if isinstance(c.sample_size, int) else c.sample_size[0]
    x = torch.randn(n, c.in_channels, size, size, generator=draw)
    t = torch.tensor([999.0, 3.0, 250.5])[:n]
    return (x, t, *([torch.tensor([0, 4, 2])[:n]] if c.num_class_embeds else []))


@torch.no_grad()
def compare(model: UNet2DModel, dtype: torch.dtype, layout: torch.memory_format, n: int) -> None:
    model = model.to(dtype=dtype, memory_format=layout)
    x, *rest = batch(model, n)
    x = x.to(dtype).contiguous(memory_format=layout)
    ours = UNet.from_diffusers(model)
    got = ours(x, *rest)
    # the rounding of the result itself, in a few elements twice
    assert_within_budget(
        got, model(x, *rest).sample, exact(model)(x.double(), *rest).sample, ulps=2
    )


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_same_output(options):
    compare(peer(**{**TINY, **options}), torch.float32, torch.contiguous_format, 3)


# one of either modulation: the rest differs in the layers that float32 tells apart
@pytest.mark.parametrize("name", ["additive", "scale_shift", "resnet_samplers"])
def test_same_output_in_bfloat16_channels_last(name):
    compare(peer(**{**TINY, **CONFIGS[name]}), torch.bfloat16, torch.channels_last, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_ddpm_cifar10(dtype):
    model = peer(**CIFAR10)
    assert sum(p.numel() for p in model.parameters()) == 35_746_307
    compare(model, dtype, torch.channels_last, 1)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_key_is_used_once(name):
    model = peer(**{**TINY, **CONFIGS[name]})
    ours = UNet.from_diffusers(model)
    found = _unet_keys.sources(ours, _unet_keys.DIFFUSERS, _unet_keys.diffusers_places(ours.config))
    used = [key for keys in found.values() for key in keys]
    assert sorted(used) == sorted(model.state_dict())
    assert set(found) == set(ours.state_dict())
    assert UNetConfig.from_config(ours.config.to_config()) == ours.config


def test_weights_are_copies_in_the_models_dtype_and_mode():
    model = peer(**TINY).half().train()
    ours = UNet.from_diffusers(model)
    assert not UNet.from_diffusers(peer(**TINY)).training
    assert ours.training and {p.dtype for p in ours.parameters()} == {torch.float16}
    assert all(p.requires_grad for p in ours.parameters())
    before = model.conv_in.weight.clone()
    with torch.no_grad():
        for p in ours.parameters():
            p.zero_()
    assert torch.equal(model.conv_in.weight, before)


def test_image_size():
    model = peer(**{**TINY, "sample_size": None})
    assert UNet.from_diffusers(model, image_size=24).config.image_size == 24
    with pytest.raises(ValueError, match="from_diffusers: image_size must be an int"):
        UNet.from_diffusers(model)
    with pytest.raises(ValueError, match=r"not square, got \(16, 32\)"):
        UNet.from_diffusers(peer(**{**TINY, "sample_size": (16, 32)}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"center_input_sample": True}, "center_input_sample must be False, got True"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type must be 'positional', got"),
        ({"mid_block_scale_factor": 1.5}, "mid_block_scale_factor must be 1, got 1.5"),
        ({"act_fn": "gelu"}, r"act_fn must be one of \('silu', 'swish'\), got 'gelu'"),
        ({"class_embed_type": "timestep"}, "class_embed_type must be None, got 'timestep'"),
        (
            {"down_block_types": ("SkipDownBlock2D", "DownBlock2D")},
            "down_block_types must name blocks of .* got 'SkipDownBlock2D'",
        ),
        ({"downsample_type": "fir"}, r"downsample_type must be one of .* got 'fir'"),
        ({"attention_head_dim": 5}, "channels must be multiples of groups=4 and head_dim=5"),
    ],
    # one row for each rule
)
def test_options_without_a_counterpart(options, message):
    base = {**TINY, "down_block_types": ("AttnDownBlock2D", "AttnDownBlock2D")}
    with pytest.raises(ValueError, match=message):
        UNet.from_diffusers(peer(**{**base, **options}))


def test_other_models():
    with pytest.raises(TypeError, match="model must be a UNet2DModel, got Linear"):
        UNet.from_diffusers(torch.nn.Linear(1, 1))
    other = UNet2DConditionModel(
        block_out_channels=(4,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        norm_num_groups=1, cross_attention_dim=4, attention_head_dim=1,
    )  # fmt: skip
    with pytest.raises(TypeError, match="got UNet2DConditionModel"):
        UNet.from_diffusers(other)


def test_every_weight_that_does_not_fit_is_named():
    model = peer(**TINY)
    model.conv_out.weight = torch.nn.Parameter(torch.zeros(3, 8, 1, 1))
    # the rows of two blocks that together are as many as they should be
    first = model.down_blocks[0].resnets[0].time_emb_proj
    second = model.down_blocks[1].resnets[0].time_emb_proj
    first.weight, second.weight = second.weight, first.weight
    model.extra = torch.nn.Linear(1, 1, bias=False)
    model.mid_block.resnets[1].norm2.bias = None
    del model.conv_in.bias
    model.conv_in.register_buffer("bias", torch.zeros(8, dtype=torch.int8))
    with pytest.raises(ValueError, match=r"^from_diffusers: weights must fit the model") as caught:
        UNet.from_diffusers(model)
    assert sorted(str(caught.value).splitlines()[1:]) == [
        "  misshapen  conv_out.weight (3, 8, 3, 3), got (3, 8, 1, 1)",
        "  misshapen  down_blocks.0.resnets.0.time_emb_proj.weight (8, 32), got (16, 32)",
        "  misshapen  down_blocks.1.resnets.0.time_emb_proj.weight (16, 32), got (8, 32)",
        "  missing    mid_block.resnets.1.norm2.bias (16,)",
        "  mistyped   conv_in.bias floating point, got torch.int8",
        "  unexpected extra.weight (1, 1)",
    ]


def test_an_option_of_another_version_is_refused():
    model = peer(**TINY)
    model.register_to_config(skip_scale=2.0)
    with pytest.raises(
        ValueError, match=r"config must hold known options only, got \['skip_scale'"
    ):
        UNet.from_diffusers(model)
