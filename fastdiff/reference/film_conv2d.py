"""The modulated convolution of a residual block in plain PyTorch: the definition of `film_conv2d`.

The block is that of Dhariwal and Nichol 2021 (arXiv:2105.05233, section 4): normalise, modulate,
activate, convolve, add to the residual; the gate on the branch is adaLN-Zero's (Peebles and Xie
2023, arXiv:2212.09748, section 3.2).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastdiff.reference.film_norm import computed, film_norm, per_channel


def film_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    num_groups: int = 0,
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    act: str | None = None,
    residual: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    eps: float = 1e-5,
) -> torch.Tensor:
    """``residual + gate * conv2d(act(group_norm(x) * (1 + scale) + shift))``.

    Rounded to the dtype of x before the convolution, as the vendor's convolution wants it, and
    after it.

    Args:
        x: (N, C, H, W).
        weight: (D, C / groups, kH, kW); bias: (D,).
        num_groups, norm_weight, norm_bias, scale, shift, act, eps: as in `film_norm`; 0 groups: no
            normalisation.
        residual: shape of the result.
        gate: (N, D).
        stride, padding, dilation, groups: as in torch.nn.functional.conv2d.
    """
    h = film_norm(x, num_groups, norm_weight, norm_bias, scale, shift, act, None, eps)
    y = F.conv2d(h, weight, bias, stride, padding, dilation, groups)
    out = computed(y)
    if gate is not None:
        out = out * per_channel(gate, out)
    if residual is not None:
        out = out + residual.to(out.dtype)
    return out.to(x.dtype)
