"""The part of ``fastdiff eval`` that scores autoencoders and the latents that they make."""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
from torch import Tensor

from fastdiff._eval_data import Scored
from fastdiff._eval_diffusion import summary
from fastdiff.models import Autoencoder
from fastdiff.ops import as_seeds

SPACE = (
    "scaled latents, each a draw of q(z|x): a density of these numbers, not of pixels, below 0 "
    "where it exceeds 1; to be compared among diffusion models of one autoencoder only"
)


def image_shape(model: Autoencoder, side: int) -> list[int]:
    """Of the images whose latents have this side."""
    return [model.config.in_channels, side * model.config.factor, side * model.config.factor]


@torch.no_grad()
def reconstruction(
    args: argparse.Namespace, model: Autoencoder, scored: Scored
) -> tuple[dict[str, Any], Tensor]:
    """How near the decoded mean of q(z|x) is to x, and a scaled draw of q(z|x) of each image.

    PSNR is 10 log10(2^2 / mean squared error) in dB, of images in [-1, 1], the decoded clamped to
    it; both figures are means over the images.
    """
    seeds = as_seeds(args.seed, len(scored.images), where="eval")
    errors, divergences, latents = [], [], []
    for at in range(0, len(scored.images), args.batch):
        part = slice(at, at + args.batch)
        x = scored.images[part].to(args.device)
        again = model.decode(model.encode(x)[0]).clamp(-1, 1)
        errors.append((again - x).double().square().flatten(1).mean(1).cpu())
        z, kl = model.sample(x, seeds[part])
        divergences.append(kl.double().cpu())
        latents.append(model.scale(z).cpu())
    error = torch.cat(errors)
    found: dict[str, Any] = {"images": len(error), "kl": summary(torch.cat(divergences), {})}
    decibels = 10 * (4 / error.clamp_min(torch.finfo(torch.float32).tiny)).log10()
    for name, each in (("rmse", error.sqrt()), ("psnr", decibels)):
        found[name] = float(each.mean())
        found[f"{name}_standard_error"] = float(each.std()) / math.sqrt(len(each))
    print(
        f"reconstruction from the mean of q(z|x): PSNR {found['psnr']:.2f} +- "
        f"{found['psnr_standard_error']:.2f} dB, RMSE {found['rmse']:.4f} of images in [-1, 1]; "
        f"KL from N(0, I) {found['kl']['nats']:.1f} nats; {len(error)} images"
    )
    return found, torch.cat(latents)


def of_latents(latents: Tensor, scored: Scored) -> Scored:
    """The latents in place of the images."""
    facts = {**scored.facts, "levels": None, "space": SPACE}
    return Scored(latents, scored.labels, facts, {"latent_dim": latents[0].numel()})
