"""Small pipelines of diffusers with random weights, run by the tests of the drop-in schedulers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import accelerated
import diffusers
import pytest
import torch
from torch import Tensor, nn

STEPS = 4


transformers = pytest.importorskip("transformers", reason="diffusers' pipelines import it")

# --- models ---------------------------------------------------------------------------------


def _unet(**change: Any) -> nn.Module:
    return accelerated.filled(lambda: accelerated.unet(sample_size=8, **change))


def _conditional(**change: Any) -> nn.Module:
    return accelerated.filled(
        lambda: diffusers.UNet2DConditionModel(**{**accelerated.conditional().config, **change})
    )


def _autoencoder(**change: Any) -> nn.Module:
    return accelerated.filled(
        lambda: diffusers.AutoencoderKL(
            **{
                **accelerated.autoencoder().config,
                "scaling_factor": 0.5,
                "shift_factor": 0.1,
                **change,
            }
        )
    )


def _embeds(*shape: int) -> Tensor:
    return torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape)


# --- pipelines: without a scheduler ----------------------------------------------------------

Builder = Callable[[Any], Any]


def ddpm(scheduler: Any) -> Any:
    return diffusers.DDPMPipeline(_unet(), scheduler)


def ddim(scheduler: Any) -> Any:
    pipe = diffusers.DDIMPipeline(_unet(resnet_time_scale_shift="scale_shift"), scheduler)
    pipe.scheduler = scheduler  # its constructor makes one of diffusers' own class
    return pipe


def consistency(scheduler: Any) -> Any:
    return diffusers.ConsistencyModelPipeline(_unet(), scheduler)


def super_resolution(scheduler: Any) -> Any:
    vq = accelerated.filled(
        lambda: diffusers.VQModel(
            block_out_channels=(8,), norm_num_groups=4, num_vq_embeddings=16, latent_channels=3
        )
    )
    return diffusers.LDMSuperResolutionPipeline(
        vqvae=vq, unet=_unet(in_channels=6, out_channels=3), scheduler=scheduler
    )


def dit(scheduler: Any) -> Any:
    model = accelerated.filled(
        lambda: accelerated.transformer(out_channels=8, num_embeds_ada_norm=1000)
    )
    return diffusers.DiTPipeline(model, _autoencoder(), scheduler)


def _stable(cls: Any, scheduler: Any, **change: Any) -> Any:
    parts = {"vae": _autoencoder(), "unet": _conditional(**change), "scheduler": scheduler}
    nothing = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    return cls(**parts, **nothing, requires_safety_checker=False)


def stable_diffusion(scheduler: Any) -> Any:
    return _stable(diffusers.StableDiffusionPipeline, scheduler)


def image_to_image(scheduler: Any) -> Any:
    return _stable(diffusers.StableDiffusionImg2ImgPipeline, scheduler)


def inpaint(scheduler: Any) -> Any:
    return _stable(diffusers.StableDiffusionInpaintPipeline, scheduler)


def latent_consistency(scheduler: Any) -> Any:
    cls = diffusers.LatentConsistencyModelPipeline
    return _stable(cls, scheduler, time_cond_proj_dim=8)


def stable_diffusion_xl(scheduler: Any) -> Any:
    unet = _conditional(
        addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 6,
    )  # fmt: skip
    nothing = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    return diffusers.StableDiffusionXLPipeline(
        vae=_autoencoder(), unet=unet, scheduler=scheduler, **nothing
    )


def stable_diffusion_3(scheduler: Any) -> Any:
    nothing = {
        f"{part}{i}": None for part in ("text_encoder", "tokenizer") for i in ("", "_2", "_3")
    }
    return diffusers.StableDiffusion3Pipeline(
        accelerated.filled(accelerated.stable_diffusion_3), scheduler, _autoencoder(), **nothing
    )


def flux(scheduler: Any) -> Any:
    nothing = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    return diffusers.FluxPipeline(
        scheduler, _autoencoder(latent_channels=1),
        transformer=accelerated.filled(accelerated.flux), **nothing,
    )  # fmt: skip


def wan(scheduler: Any) -> Any:
    model = accelerated.filled(
        lambda: diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4,
            out_channels=4, text_dim=12, freq_dim=8, ffn_dim=16, num_layers=1, rope_max_seq_len=32,
        )
    )  # fmt: skip
    vae = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        latents_mean=[0.1, -0.1, 0.2, 0.0], latents_std=[1.0, 0.8, 1.2, 0.9],
    )  # fmt: skip
    return diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=vae, scheduler=scheduler, transformer=model
    )


def stable_video(scheduler: Any) -> Any:
    unet = accelerated.filled(
        lambda: diffusers.UNetSpatioTemporalConditionModel(
            sample_size=8, in_channels=8, block_out_channels=(32, 32), layers_per_block=1,
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            cross_attention_dim=12, num_attention_heads=2, addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24,
        )
    )  # fmt: skip
    vae = accelerated.filled(
        lambda: diffusers.AutoencoderKLTemporalDecoder(
            block_out_channels=(32, 32), layers_per_block=1, latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 2,
        )
    )  # fmt: skip
    config = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, projection_dim=12, num_hidden_layers=1,
        num_attention_heads=2, image_size=16, patch_size=8,
    )  # fmt: skip
    torch.manual_seed(0)
    encoder = transformers.CLIPVisionModelWithProjection(config).eval()
    extractor = transformers.CLIPImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )
    return diffusers.StableVideoDiffusionPipeline(vae, encoder, unet, scheduler, extractor)


# --- how they are called ---------------------------------------------------------------------


def _text(pipe: Any, width: int = 12) -> dict[str, Tensor]:
    dtype = next(m for m in pipe.components.values() if isinstance(m, nn.Module)).dtype
    words = _embeds(2, 2, 5, width).to(dtype)
    return {"prompt_embeds": words[0], "negative_prompt_embeds": words[1]}


def _pooled(pipe: Any) -> dict[str, Tensor]:
    dtype = next(m for m in pipe.components.values() if isinstance(m, nn.Module)).dtype
    pooled = _embeds(2, 2, 6).to(dtype)
    return {"pooled_prompt_embeds": pooled[0], "negative_pooled_prompt_embeds": pooled[1]}


def _picture(pipe: Any) -> Tensor:
    return _embeds(2, 3, 16, 16).to(pipe.unet.dtype) / 2 + 0.5


def _few(words: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in words.items() if "negative" not in name}


# name -> what else the call of a pipeline takes
ARGUMENTS: dict[str, tuple[Builder, Callable[[Any], dict[str, Any]]]] = {
    "ddpm": (ddpm, lambda p: {"batch_size": 2}),
    "ddim": (ddim, lambda p: {"batch_size": 2, "eta": 0.5}),
    "consistency": (consistency, lambda p: {"batch_size": 2}),
    "super_resolution": (
        super_resolution,
        lambda p: {"image": _embeds(2, 3, 8, 8).to(p.unet.dtype), "eta": 1.0},
    ),
    "dit": (dit, lambda p: {"class_labels": [1, 2]}),
    "stable_diffusion": (stable_diffusion, _text),
    "image_to_image": (
        image_to_image, lambda p: {**_text(p), "image": _picture(p), "strength": 0.6}
    ),
    "inpaint": (
        inpaint,
        lambda p: {**_text(p), "image": _picture(p), "mask_image": _picture(p)[:, :1].round(),
                   "strength": 0.8, "height": 16, "width": 16},
    ),
    "latent_consistency": (latent_consistency, lambda p: _few(_text(p))),
    "stable_diffusion_xl": (stable_diffusion_xl, lambda p: {**_text(p), **_pooled(p)}),
    "stable_diffusion_3": (stable_diffusion_3, lambda p: {**_text(p), **_pooled(p)}),
    "flux": (
        flux, lambda p: {**_few({**_text(p), **_pooled(p)}), "height": 16, "width": 16}
    ),
    "wan": (
        wan, lambda p: {**_text(p), "height": 16, "width": 16, "num_frames": 5}
    ),
    "stable_video": (
        stable_video,
        lambda p: {"image": _picture(p), "height": 16, "width": 16, "num_frames": 2},
    ),
}  # fmt: skip


def run(pipe: Any, name: str, **change: Any) -> Tensor:
    """Two pictures, or what the pipeline would decode to them, from one seed each.

    Both are drawn from generators of their own, as pipelines allow; torch's global one is set too,
    from which LDMSuperResolutionPipeline and noise samplers without a seed draw.
    """
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(3)
    _, more = ARGUMENTS[name]
    seeds = [torch.Generator().manual_seed(seed) for seed in (7, 11)]
    given = {"generator": seeds, "num_inference_steps": STEPS, "output_type": "np", **more(pipe)}
    out = pipe(**{**given, **change})
    value = next(v for v in (getattr(out, k, None) for k in ("images", "frames")) if v is not None)
    return torch.as_tensor(value)
