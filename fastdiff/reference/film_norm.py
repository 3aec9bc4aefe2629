"""Normalisation, FiLM, activation and residual in plain PyTorch: the definition of `film_norm`.

Group normalisation is Wu and He 2018 (arXiv:1803.08494), equations 1 to 7; FiLM is Perez et al.
2018 (arXiv:1709.07871), equation 2, in the form with 1 + scale that Dhariwal and Nichol 2021
(arXiv:2105.05233, section 4) use after a normalisation.

Means and variances are sums, so a kernel may take them in another order: no bits are promised.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

# act -> its function; every kernel knows these
ACTIVATIONS: dict[str | None, Callable[[torch.Tensor], torch.Tensor]] = {
    None: lambda h: h,
    "silu": F.silu,
}


def computed(t: torch.Tensor) -> torch.Tensor:
    """16-bit types are computed in float32; float32 and float64 in their own."""
    return t if t.dtype in (torch.float32, torch.float64) else t.float()


def statistics(h: torch.Tensor, groups: int, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and 1 / sqrt(variance + eps) of every group.

    Args:
        h: (N, C, *S).
        groups: divides C.
        eps: added to the (biased) variance.

    Returns:
        Two (N, groups, 1) tensors, dtype of h.
    """
    slabs = h.reshape(h.shape[0], groups, -1)
    mean = slabs.mean(dim=2, keepdim=True)
    variance = (slabs - mean).square().mean(dim=2, keepdim=True)
    return mean, (variance + eps).rsqrt()


def per_channel(t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(C,) or (N, C) to the shape that broadcasts over ``like`` (N, C, *S), in its dtype."""
    t = t.to(like.dtype)
    return t.view(*((1,) if t.dim() == 1 else ()), *t.shape, *(1,) * (like.dim() - 2))


def film_norm(
    x: torch.Tensor,
    groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    act: str | None = None,
    residual: torch.Tensor | None = None,
    eps: float = 1e-5,
    plus_one: bool = True,
) -> torch.Tensor:
    """``act((weight * (x - mean) * rstd + bias) * (1 + scale) + shift) + residual``.

    Args:
        x: (N, C, *S).
        groups: groups of the normalisation; 0: none, and neither weight nor bias.
        weight, bias: (C,) or None.
        scale, shift: (N, C) or None.
        act: a name in `ACTIVATIONS`.
        residual: (N, C, *S) or None.
        eps: added to the variance.
        plus_one: whether FiLM multiplies by 1 + scale, or by scale.

    Returns:
        (N, C, *S), dtype of x.
    """
    h = computed(x)
    if groups:
        mean, rstd = statistics(h, groups, eps)
        h = ((h.reshape(h.shape[0], groups, -1) - mean) * rstd).reshape(h.shape)
        if weight is not None:
            h = h * per_channel(weight, h)
        if bias is not None:
            h = h + per_channel(bias, h)
    if scale is not None:
        h = h * (1 + per_channel(scale, h) if plus_one else per_channel(scale, h))
    if shift is not None:
        h = h + per_channel(shift, h)
    h = ACTIVATIONS[act](h)
    if residual is not None:
        h = h + residual.to(h.dtype)
    return h.to(x.dtype)


def film_norm_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    act: str | None,
    eps: float,
    plus_one: bool,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of x, weight, bias, scale and shift; None for what is absent.

    With z the argument of the activation, n the normalised x, s = 1 + scale (or scale) and
    g = grad * act'(z): dshift = sum g, dscale = sum g (weight n + bias), dbias = sum g s,
    dweight = sum g s n, and with u = g s weight, dx = rstd (u - mean(u) - n mean(u n)), means over
    the group (Ioffe and Szegedy 2015, arXiv:1502.03167, section 3, which has it for a batch).

    Args:
        grad: (N, C, *S), the gradient of the result.
        x, groups, weight, bias, scale, shift, act, eps, plus_one: as in `film_norm`.
    """
    h, g = computed(x), computed(grad).to(computed(x).dtype)
    space = tuple(range(2, h.dim()))

    def over_space(t: torch.Tensor) -> torch.Tensor:
        return t.sum(dim=space) if space else t

    n, rstd = h, None
    if groups:
        mean, rstd = statistics(h, groups, eps)
        n = ((h.reshape(h.shape[0], groups, -1) - mean) * rstd).reshape(h.shape)
    affine = n if weight is None else n * per_channel(weight, h)
    affine = affine if bias is None else affine + per_channel(bias, h)
    s = None
    if scale is not None:
        s = 1 + per_channel(scale, h) if plus_one else per_channel(scale, h)
    if act == "silu":
        z = affine if s is None else affine * s
        z = z if shift is None else z + per_channel(shift, h)
        sigmoid = z.sigmoid()
        g = g * (sigmoid * (1 + z * (1 - sigmoid)))
    d_shift = None if shift is None else over_space(g).to(shift.dtype)
    d_scale = None if scale is None else over_space(g * affine).to(scale.dtype)
    u = g if s is None else g * s
    d_bias = None if bias is None else over_space(u).sum(dim=0).to(bias.dtype)
    d_weight = None if weight is None else over_space(u * n).sum(dim=0).to(weight.dtype)
    if weight is not None:
        u = u * per_channel(weight, h)
    if rstd is not None:
        slabs, normal = (t.reshape(h.shape[0], groups, -1) for t in (u, n))
        inner = slabs - slabs.mean(2, keepdim=True)
        inner = inner - normal * (slabs * normal).mean(2, keepdim=True)
        u = (rstd * inner).reshape(h.shape)
    return u.to(x.dtype), d_weight, d_bias, d_scale, d_shift
