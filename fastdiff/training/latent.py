"""The two halves of latent diffusion: the autoencoder, then the transformer of its latents."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastdiff import checkpoints, data
from fastdiff.data import Dataset
from fastdiff.models import (
    Autoencoder,
    AutoencoderConfig,
    DiTConfig,
    LatentDiffusion,
    LatentDiffusionConfig,
)
from fastdiff.ops import reparameterize
from fastdiff.reference.vae import VAE
from fastdiff.training.config import TrainConfig
from fastdiff.training.diffusion import Diffusion
from fastdiff.training.objective import Objective

__all__ = ["AutoencoderTraining", "LatentDiffusionTraining"]

_MEASURED = 10000  # images that the scale of the latents is taken from
_BATCH = 250


class AutoencoderTraining(Objective):
    """-log p(x|z) + beta KL with a small beta: the latents are to be few, not to be the prior's.

    The diffusion model takes care of their distribution (arXiv:2112.10752, section 3.1); the KL
    keeps them from growing without bound and their neighbourhoods decodable.
    """

    def __init__(self, config: TrainConfig, dataset: Dataset) -> None:
        super().__init__(config, dataset)
        if config.likelihood == "bernoulli":
            rule = "be gaussian or discretized_logistic for an autoencoder, whose decoder gives"
            raise ValueError(f"train: likelihood must {rule} images, got 'bernoulli'")

    def build(self) -> nn.Module:
        c = self.config
        return Autoencoder(AutoencoderConfig(
            in_channels=self.images.shape[1], channels=c.channels, blocks=c.blocks,
            latent_channels=c.latent,
        ))  # fmt: skip

    def loss(self, model: nn.Module, index: Tensor, step: int) -> Tensor:
        c, own = self.config, cast(Autoencoder, model)
        x = self.images[index].to(c.device).contiguous(memory_format=torch.channels_last)
        vae = VAE(own.encoder, own.decoder, c.likelihood, c.scale)
        with self.autocast():
            return vae.loss(x, self.first_seed, step=step, beta=c.beta).mean()

    @torch.no_grad()
    def show(self, model: nn.Module, path: Path, rows: int = 8) -> None:
        """Images in one row, and below each what its latent decodes to."""
        own, columns = cast(Autoencoder, model), min(10, len(self.images))
        pairs_of_rows = min((rows + 1) // 2, len(self.images) // columns)
        x = self.images[: columns * pairs_of_rows].to(self.config.device)
        y = own.decode(own.encode(x)[0])
        pairs = torch.stack([a.view(-1, columns, *x.shape[1:]) for a in (x, y)], dim=1)
        data.save_grid(pairs.flatten(0, 2), path, columns)

    def finish(self, model: nn.Module) -> None:
        """Take the shift and the scale that bring each channel of the latents to mean 0 and
        variance 1, from draws of q(z|x)."""
        own = cast(Autoencoder, model)
        mu, logvar = moments(own, self.images[:_MEASURED])
        # a draw has the spread of the means and, on average, the variance of q
        each = mu.double().transpose(0, 1).flatten(1)
        variance = each.var(dim=1, correction=0) + logvar.double().exp().mean(dim=(0, 2, 3))
        own.config = replace(
            own.config,
            latent_shift=tuple(each.mean(dim=1).tolist()),
            latent_scale=tuple(variance.rsqrt().tolist()),
        )

    def card(self, model: nn.Module) -> dict[str, Any]:
        c = self.config
        what = f"-E_q[log p(x|z)] + {c.beta:g} KL, nats"
        return {
            "objective": f"{what}; {c.likelihood} likelihood of scale {c.scale:g}",
            "sampling": {"shape": list(self.images.shape[1:])},  # by which `fastdiff eval` goes
        }


@torch.no_grad()
def moments(model: Autoencoder, images: Tensor) -> tuple[Tensor, Tensor]:
    """mu and logvar of q(z|x) of many images, on the CPU."""
    device = next(model.parameters()).device
    parts = [model.encode(part.to(device)) for part in torch.split(images, _BATCH)]
    mu, logvar = (torch.cat([pair[i].cpu() for pair in parts]) for i in range(2))
    return mu, logvar


class LatentDiffusionTraining(Diffusion):
    """As the U-Net's, on the scaled latents of a trained autoencoder, drawn anew at each step."""

    memory_format = torch.contiguous_format

    def __init__(self, config: TrainConfig, dataset: Dataset) -> None:
        super().__init__(config, dataset)
        loaded, _, self.source = checkpoints.load(config.autoencoder)
        model = loaded.autoencoder if isinstance(loaded, LatentDiffusion) else loaded
        if not isinstance(model, Autoencoder):
            rule = "name a checkpoint of an Autoencoder or of a LatentDiffusion"
            raise ValueError(f"train: autoencoder must {rule}, got {type(model).__name__}")
        channels = self.images.shape[1]
        if model.config.in_channels != channels:
            rule = f"take images of {channels} channels"
            raise ValueError(f"train: autoencoder must {rule}, got {model.config.in_channels}")
        self.autoencoder = model.to(device=config.device)
        self.mu, self.logvar = moments(self.autoencoder, self.images)

    def build(self) -> nn.Module:
        c = self.config
        denoiser = DiTConfig(
            in_channels=self.mu.shape[1], image_size=self.mu.shape[2], patch_size=c.patch_size,
            width=c.width, depth=c.depth, heads=c.heads, num_classes=len(self.classes),
            learn_sigma=False,
        )  # fmt: skip
        model = LatentDiffusion(LatentDiffusionConfig(denoiser, self.autoencoder.config))
        model.autoencoder.load_state_dict(self.autoencoder.state_dict())
        model.autoencoder.requires_grad_(False)
        return model

    def loss(self, model: nn.Module, index: Tensor, step: int) -> Tensor:
        # the backward pass of torch's fused attention takes longer than the products on so few
        # tokens: a step of 64 latents 0.16 s and 0.12 s on one thread of an AMD EPYC
        with sdpa_kernel(SDPBackend.MATH):
            return super().loss(model, index, step)

    def clean(self, index: Tensor, step: int) -> Tensor:
        z, _ = reparameterize(self.mu[index], self.logvar[index], self.first_seed, step=step)
        return self.autoencoder.scale(z)

    def samples(self, model: nn.Module, rows: int) -> Tensor:
        return cast(LatentDiffusion, model).decode(super().samples(model, rows))

    def sampling(self, model: nn.Module) -> dict[str, Any]:
        """The latents have no bounds to clip to."""
        shape = list(cast(LatentDiffusion, model).latent_shape)
        return {
            "solver": "dpmpp_2m", "steps": 20, "guidance": self.config.guidance, "clip": None,
            "shape": shape,
        }  # fmt: skip

    def card(self, model: nn.Module) -> dict[str, Any]:
        # of an autoencoder, or of a model that says it of its own
        of = self.source.get("autoencoder", self.source)
        facts = {key: of[key] for key in ("objective", "data", "training") if key in of}
        return {**super().card(model), "autoencoder": facts}
