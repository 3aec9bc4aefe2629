"""Variational autoencoders: the loss is the negative evidence lower bound, in nats an image."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastdiff import data
from fastdiff.models.vae import VAE, VAEConfig
from fastdiff.training.objective import Objective, generator

__all__ = ["VAETraining"]


class VAETraining(Objective):
    """-E_q[log p(x|z)] + beta KL of "vae-mlp" and "vae-conv"."""

    memory_format = torch.contiguous_format

    def build(self) -> nn.Module:
        c = self.config
        # the MLP has none
        channels = c.channels if c.model == "vae-conv" else VAEConfig.channels
        return VAE(VAEConfig(
            kind=c.model.removeprefix("vae-"), in_channels=self.images.shape[1],
            image_size=self.images.shape[2], latent=c.latent, hidden=c.hidden, channels=channels,
            likelihood=c.likelihood, scale=c.scale,
        ))  # fmt: skip

    def loss(self, model: nn.Module, index: Tensor, step: int) -> Tensor:
        c, vae = self.config, cast(VAE, model)
        x = vae.observe(self.images[index], generator(c.seed, step, 0)).to(c.device)
        with self.autocast():
            return vae.loss(x, self.first_seed, step=step, beta=c.beta).mean()

    @torch.no_grad()
    def show(self, model: nn.Module, path: Path, rows: int = 8) -> None:
        """Means of p(x|z) at draws of the prior."""
        data.save_grid(cast(VAE, model).images(range(10 * rows)), path, 10)

    def card(self, model: nn.Module) -> dict[str, Any]:
        c = self.config
        seen = "binarized anew at each step" if c.likelihood == "bernoulli" else "as they are"
        return {
            "objective": f"-E_q[log p(x|z)] + {c.beta:g} KL, nats; images {seen}",
            "sampling": {"shape": list(self.images.shape[1:])},
        }
