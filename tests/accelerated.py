"""Small models of diffusers, and parts of them, that the tests of `accelerate` run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

DRAW = torch.Generator()


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=DRAW)


def unet(**change: Any) -> nn.Module:
    config: dict[str, Any] = {
        "sample_size": 16, "block_out_channels": (16, 32), "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "norm_num_groups": 4,
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 16,
    }  # fmt: skip
    return diffusers.UNet2DModel(**{**config, **change})


def scale_shift() -> nn.Module:
    return unet(
        resnet_time_scale_shift="scale_shift", attn_norm_num_groups=4, mid_block_scale_factor=2.0,
        downsample_type="resnet", upsample_type="resnet",
        down_block_types=("AttnDownBlock2D", "DownBlock2D"),
    )  # fmt: skip


def conditional() -> nn.Module:
    return diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), cross_attention_dim=12,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=8,
    )  # fmt: skip


def autoencoder() -> nn.Module:
    return diffusers.AutoencoderKL(
        block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip


def transformer(**change: Any) -> nn.Module:
    config: dict[str, Any] = {
        "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4,
        "num_layers": 2, "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 10,
    }  # fmt: skip
    return diffusers.DiTTransformer2DModel(**{**config, **change})


def pixart() -> nn.Module:
    return diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
        sample_size=8, patch_size=2, cross_attention_dim=16, caption_channels=12,
    )  # fmt: skip


def stable_diffusion_3() -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=3,
        attention_head_dim=8, num_attention_heads=2, joint_attention_dim=12, pos_embed_max_size=8,
        caption_projection_dim=16, pooled_projection_dim=6, dual_attention_layers=(0,),
    )  # fmt: skip


def flux() -> nn.Module:
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=12, pooled_projection_dim=6,
        axes_dims_rope=(2, 2, 4),
    )  # fmt: skip


def chain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 16, 3),
        nn.GroupNorm(8, 16), nn.ReLU(), nn.SiLU(),
    )  # fmt: skip


def with_time(model: nn.Module, x: Tensor) -> Tensor:
    return model(x, torch.tensor([3, 700])).sample


def with_text(model: nn.Module, x: Tensor) -> Tensor:
    text = torch.linspace(-1, 1, 120, dtype=x.dtype).view(2, 5, 12)
    times = torch.tensor([3, 700])
    return model(x, encoder_hidden_states=text, timestep=times, added_cond_kwargs={}).sample


def with_pooled_text(model: nn.Module, x: Tensor, **more: Any) -> Tensor:
    text = torch.linspace(-1, 1, 120, dtype=x.dtype).view(2, 5, 12)
    pooled = torch.linspace(-2, 1, 12, dtype=x.dtype).view(2, 6)
    given = {"encoder_hidden_states": text, "pooled_projections": pooled, **more}
    return model(x, timestep=torch.tensor([0.25, 0.75], dtype=x.dtype), **given).sample


def with_positions(model: nn.Module, x: Tensor) -> Tensor:
    places = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
    return with_pooled_text(model, x, img_ids=places, txt_ids=torch.zeros(5, 3))


# build, shape of the input, call, modules that report.fused must count, calls of the fused ops
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Callable[..., Tensor], int, int]]
CASES = {
    # 2 + 2 + 4 residual blocks, 1 + 1 + 2 attentions, the head; two norms a block
    "unet": (unet, (2, 3, 16, 16), with_time, 13, 21),
    # and one residual block more to go down and one to go up
    "scale_shift": (scale_shift, (2, 3, 16, 16), with_time, 15, 25),
    # 8 residual blocks, the norms of 4 transformers, the head
    "conditional": (
        conditional,
        (2, 4, 8, 8),
        lambda m, x: m(x, 5, torch.linspace(-1, 1, 120, dtype=x.dtype).view(2, 5, 12)).sample,
        13,
        21,
    ),
    # 4 residual blocks and one attention to encode, 6 and one to decode, two heads
    "autoencoder": (autoencoder, (2, 3, 16, 16), lambda m, x: m(x).sample, 14, 24),
    # 2 blocks of a norm, a sum with norm and a sum; the norm at the end
    "transformer": (
        transformer,
        (2, 4, 8, 8),
        lambda m, x: m(x, torch.tensor([1, 9]), class_labels=torch.tensor([1, 2])).sample,
        3,
        7,
    ),
    # 2 blocks, each with the sum before its attention to the text apart
    "pixart": (pixart, (2, 4, 8, 8), with_text, 2, 8),
    # 3 blocks and the norm at the end. 3 norms and 5 sums and norms in the first, whose image
    # attends to itself too; 2 and 4 in the second; 2 and 2 in the last, which drops the text
    "sd3": (stable_diffusion_3, (2, 4, 8, 8), with_pooled_text, 4, 19),
    # the norms of one block with text apart, of one with both joined, and at the end
    "flux": (flux, (2, 16, 4), with_positions, 4, 4),
    # the second pair has a ReLU between: its norm is fused alone
    "chain": (chain, (2, 3, 9, 9), lambda m, x: m(x), 2, 2),
}
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
# memory order, frozen: packed weights take channels_last only
LAYOUTS = {
    "nchw": (torch.contiguous_format, False),
    "nhwc": (torch.channels_last, False),
    "frozen": (torch.channels_last, True),
}


def filled(build: Callable[[], nn.Module]) -> nn.Module:
    """Weights drawn so that nothing is zero or one: every layer counts."""
    DRAW.manual_seed(0)
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        for p in model.parameters():
            scale = max(p[0].numel(), 4) ** -0.5 if p.ndim > 1 else 0.2
            p.copy_(randn(*p.shape) * scale + (p if p.ndim == 1 else 0))
    return model


def case(name: str) -> tuple[nn.Module, Tensor, Callable[..., Tensor]]:
    build, shape, call, *_ = CASES[name]
    return filled(build), randn(*shape), call


def block(**change: Any) -> ResnetBlock2D:
    config = {"in_channels": 16, "out_channels": 32, "temb_channels": 8, "groups": 4}
    return filled(lambda: ResnetBlock2D(**{**config, **change}))


X, TEMB = randn(2, 16, 8, 8), randn(2, 8)


def attention(**change: Any) -> Attention:
    config = {"heads": 2, "dim_head": 8, "norm_num_groups": 4, "residual_connection": True}
    return Attention(16, **{**config, **change})


def forward_of_its_own(module: nn.Module) -> nn.Module:
    """As offloading hooks are put on modules."""
    module.forward = module.forward
    return module
