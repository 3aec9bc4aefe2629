"""The factor of rescaled guidance in plain PyTorch."""

from __future__ import annotations

import torch

from fastdiff.reference.reverse_step import guide


def guidance_rescale(
    output: torch.Tensor,
    uncond: torch.Tensor,
    guidance: torch.Tensor | float,
    phi: torch.Tensor | float,
) -> torch.Tensor:
    """``phi std(output) / std(guided) + 1 - phi`` of each sample: Lin et al. 2023, equation 16.

    Args:
        output, uncond: (N, *S), any floating dtype; 16-bit types are computed in float32.
        guidance, phi: numbers or (N,).

    Returns:
        (N,) in the dtype of the computation; 1 where the guided output is constant.
    """
    c, u = (t if t.dtype == torch.float64 else t.float() for t in (output, uncond))

    def column(value: torch.Tensor | float) -> torch.Tensor | float:
        if isinstance(value, torch.Tensor):
            return value.to(c.dtype).view(-1, *[1] * (c.dim() - 1))
        return value

    guided = guide(c, u, column(guidance))
    flat = c.unsqueeze(-1).flatten(1), guided.unsqueeze(-1).flatten(1)  # a sample may be a scalar
    before, after = (t.std(1, correction=0) for t in flat)
    if isinstance(phi, torch.Tensor):
        phi = phi.to(c.dtype)
    factor = phi * (before / after) + (1 - phi)
    return torch.where(after == 0, torch.ones_like(factor), factor)
