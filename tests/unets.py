"""U-Nets that tests share."""

from __future__ import annotations

import torch

from fastdiff.models.unet import UNet, UNetConfig


def filled(config: UNetConfig) -> UNet:
    """A model without the zero weights it starts with, so that every layer counts."""
    torch.manual_seed(0)
    model = UNet(config)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) / max(p[0].numel(), 4) ** 0.5 if p.ndim > 1 else p + 0.1)
    return model.eval()
