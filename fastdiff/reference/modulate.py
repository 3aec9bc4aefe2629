"""Normalisation, modulation and gated residual of tokens in plain PyTorch: `modulate`'s definition.

What a diffusion transformer does between its matrix products: Peebles and Xie 2023
(arXiv:2212.09748, section 3.2 and figure 3, adaLN-Zero). Layer normalisation is Ba et al. 2016
(arXiv:1607.06450), equation 3; RMS normalisation is Zhang and Sennrich 2019 (arXiv:1910.07467),
equation 4, with the epsilon inside the root.

Means and variances are sums, so a kernel may take them in another order: no bits are promised.
"""

from __future__ import annotations

import torch

# what every kernel knows, in the order of their codes
NORMS = (None, "layer", "rms")


def computed(t: torch.Tensor) -> torch.Tensor:
    """16-bit types are computed in float32; float32 and float64 in their own."""
    return t if t.dtype in (torch.float32, torch.float64) else t.float()


def per_token(t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(N, C), (N, L, C) or (C,) to what broadcasts over ``like`` (N, L, C) or (N, C), its dtype."""
    t = t.to(like.dtype)
    return t.unsqueeze(1) if 1 < t.dim() < like.dim() else t


def gated_residual(
    x: torch.Tensor, residual: torch.Tensor, gate: torch.Tensor | None
) -> torch.Tensor:
    """``x + gate * residual``, in the dtype it is computed in.

    Args:
        x, residual: (N, L, C) or (N, C).
        gate: (N, C), (N, L, C) or None for 1.
    """
    h = residual.to(computed(x).dtype)
    return computed(x) + (h if gate is None else per_token(gate, h) * h)


def normalized(
    h: torch.Tensor, norm: str | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Every token normalised, and 1 / its deviation (or root mean square); None without a norm.

    Args:
        h: (..., C).
        norm: a name in `NORMS`.
        eps: added to the (biased) variance or mean square.
    """
    if norm is None:
        return h, None
    if norm == "layer":
        h = h - h.mean(dim=-1, keepdim=True)
    rstd = (h.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    return h * rstd, rstd


def modulate(
    x: torch.Tensor,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    norm: str | None = "layer",
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(weight * norm(x') + bias) * (1 + scale) + shift`` and ``x' = x + gate * residual``.

    Args:
        x: (N, L, C) or (N, C).
        scale, shift, gate: (N, C) or (N, L, C), or None.
        norm: a name in `NORMS`.
        weight, bias: (C,) or None.
        residual: shape of x, or None: x' is x.
        eps: added to the variance or the mean square.

    Returns:
        Two tensors of the shape and dtype of x; x' is rounded for the second alone.
    """
    total = computed(x) if residual is None else gated_residual(x, residual, gate)
    h, _ = normalized(total, norm, eps)
    if weight is not None:
        h = h * per_token(weight, h)
    if bias is not None:
        h = h + per_token(bias, h)
    if scale is not None:
        h = h * (1 + per_token(scale, h))
    if shift is not None:
        h = h + per_token(shift, h)
    return h.to(x.dtype), total.to(x.dtype)


def _like(grad: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The gradient of a tensor that was broadcast over the tokens, by its own shape and dtype."""
    if t.dim() == 1:
        grad = grad.flatten(0, -2).sum(dim=0)
    elif t.dim() < grad.dim():
        grad = grad.sum(dim=1)
    return grad.to(t.dtype)


def modulate_backward(
    grad: torch.Tensor | None,
    grad_total: torch.Tensor | None,
    x: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    norm: str | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    gate: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of x, scale, shift, weight, bias, residual and gate; None for what is absent.

    With n the normalised x', s = 1 + scale and g = grad: dshift = sum g,
    dscale = sum g (weight n + bias), dbias = sum g s, dweight = sum g s n, and with
    u = g s weight, dx' = rstd (u - mean(u) - n mean(u n)) (Ba et al. 2016; without mean(u) for RMS)
    plus the gradient that x' itself gets; then dx = dx', dresidual = gate dx' and
    dgate = sum residual dx'.

    Args:
        grad, grad_total: gradients of the two results of `modulate`; None where one was not used.
        the rest: as in `modulate`.
    """
    d_scale = d_shift = d_weight = d_bias = d_gate = d_residual = None
    if grad is None:
        d_total = torch.zeros_like(computed(x))
    else:
        total = computed(x) if residual is None else gated_residual(x, residual, gate)
        n, rstd = normalized(total, norm, eps)
        g = grad.to(n.dtype)
        affine = n if weight is None else n * per_token(weight, n)
        affine = affine if bias is None else affine + per_token(bias, n)
        d_shift = None if shift is None else _like(g, shift)
        d_scale = None if scale is None else _like(g * affine, scale)
        u = g if scale is None else g * (1 + per_token(scale, n))
        d_bias = None if bias is None else _like(u, bias)
        d_weight = None if weight is None else _like(u * n, weight)
        u = u if weight is None else u * per_token(weight, n)
        if rstd is not None:
            inner = u - u.mean(dim=-1, keepdim=True) if norm == "layer" else u
            u = rstd * (inner - n * (u * n).mean(dim=-1, keepdim=True))
        d_total = u
    if grad_total is not None:
        d_total = d_total + grad_total.to(d_total.dtype)
    if residual is not None:
        h = residual.to(d_total.dtype)
        d_gate = None if gate is None else _like(d_total * h, gate)
        through = d_total if gate is None else d_total * per_token(gate, d_total)
        d_residual = through.to(residual.dtype)
    return d_total.to(x.dtype), d_scale, d_shift, d_weight, d_bias, d_residual, d_gate
