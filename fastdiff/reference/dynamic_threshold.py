"""Dynamic thresholding in plain PyTorch: Saharia et al. 2022 (arXiv:2205.11487), section 2.3."""

from __future__ import annotations

import torch


def position(size: int, ratio: float) -> tuple[int, float]:
    """Rank below the quantile, from 0, and the weight of the rank above: linear interpolation."""
    exact = ratio * (size - 1)
    rank = int(exact)
    return rank, exact - rank


def quantile_abs(x: torch.Tensor, ratio: float) -> torch.Tensor:
    """(N,) quantile of the absolute values of each sample of (N, *S), as `torch.quantile` has it
    in float64, rounded once. By order statistics: no limit on the number of elements."""
    size = x[0].numel()
    rank, weight = position(size, ratio)
    values = x.reshape(len(x), size).abs()
    low = values.kthvalue(rank + 1, dim=1).values.double()
    high = values.kthvalue(min(rank + 2, size), dim=1).values.double()
    rise = torch.where(low == high, 0.0, high - low)  # two infinities
    s = low + weight * rise if weight < 0.5 else high - rise * (1.0 - weight)
    return torch.where(values.isnan().any(dim=1), torch.nan, s).to(x.dtype)


def dynamic_threshold(
    x: torch.Tensor, ratio: float, max_value: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x limited to [-s, s] and divided by s, and s: the quantile of abs(x), in [1, max_value]."""
    s = quantile_abs(x, ratio).clamp(1.0, max_value)
    each = s.view(-1, *[1] * (x.dim() - 1))
    return torch.clamp(x, -each, each) / each, s
