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
    """Mean and 1 / sqrt(variance + eps) of the group of every channel.

    Args:
        h: (N, C, *S).
        groups: divides C.
        eps: added to the (biased) variance.

    Returns:
        Two (N, C) tensors, dtype of h; the channels of a group have one value.
    """
    n, c = h.shape[:2]
    slabs = h.view(n, groups, c // groups, *h.shape[2:])  # of any memory order
    axes = tuple(range(2, slabs.dim()))
    variance, mean = torch.var_mean(slabs, dim=axes, correction=0)
    return tuple(  # type: ignore[return-value]
        t[..., None].expand(n, groups, c // groups).reshape(n, c)
        for t in (mean, (variance + eps).rsqrt())
    )


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
        h = (h - per_channel(mean, h)) * per_channel(rstd, h)
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

    With z the argument of the activation, n = (x - mean) rstd, s = 1 + scale (or scale) and
    g = grad * act'(z), everything but dx comes from two sums over space, D0 = sum g and
    D1 = sum g n: dshift = D0, dscale = weight D1 + bias D0, dbias = s D0 and dweight = s D1 summed
    over the batch. With u = s weight, dx = rstd (u g - mean(u g) - n mean(u g n)), means over the
    group (Ioffe and Szegedy 2015, arXiv:1502.03167, section 3, which has it for a batch), and those
    means are sums of u D0 and u D1 over the channels of a group.

    Args:
        grad: (N, C, *S), the gradient of the result.
        x, groups, weight, bias, scale, shift, act, eps, plus_one: as in `film_norm`.
    """
    h, g = computed(x), computed(grad).to(computed(x).dtype)
    n, c = h.shape[:2]
    space = tuple(range(2, h.dim()))
    rstd: torch.Tensor | None = None
    if groups:
        mean, rstd = statistics(h, groups, eps)
        h = h - per_channel(mean, h)

    def over_space(t: torch.Tensor) -> torch.Tensor:
        return t.sum(dim=space) if space else t

    def channels(t: torch.Tensor | None, otherwise: float) -> torch.Tensor:
        return h.new_full((1, c), otherwise) if t is None else t.to(h.dtype).reshape(-1, c)

    w, b = channels(weight, 1.0), channels(bias, 0.0)
    s = channels(scale, 0.0 if plus_one else 1.0) + (1.0 if plus_one else 0.0)
    deviation = h.new_ones(1, c) if rstd is None else rstd
    slope = (s * w * deviation).expand(n, c)
    if act == "silu":
        offset = (s * b + channels(shift, 0.0)).expand(n, c)
        z = torch.addcmul(per_channel(offset, h), h, per_channel(slope, h))
        if torch.is_grad_enabled():  # torch has no derivative of its one-pass form
            sigmoid = z.sigmoid()
            g = g * (sigmoid * (1 + z * (1 - sigmoid)))
        else:
            g = torch.ops.aten.silu_backward(g, z)
    d0 = over_space(g)
    d1 = over_space(g * h) * deviation
    d_shift = None if shift is None else d0.to(shift.dtype)
    d_scale = None if scale is None else (w * d1 + b * d0).to(scale.dtype)
    d_bias = None if bias is None else (s * d0).sum(0).to(bias.dtype)
    d_weight = None if weight is None else (s * d1).sum(0).to(weight.dtype)
    d_x = g * per_channel(slope, h)
    if rstd is not None:
        count = h[0].numel() // groups

        def group_mean(t: torch.Tensor) -> torch.Tensor:
            total = (s * w * t).reshape(n, groups, -1).sum(2, keepdim=True) / count
            return total.expand(n, groups, c // groups).reshape(n, c)

        # dx = g slope - h rstd^2 mean(u g n) - rstd mean(u g)
        d_x = torch.addcmul(d_x, h, per_channel(-rstd * rstd * group_mean(d1), h))
        d_x = d_x - per_channel(rstd * group_mean(d0), h)
    return d_x.to(x.dtype), d_weight, d_bias, d_scale, d_shift
