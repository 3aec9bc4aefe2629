"""The modulated convolution of a residual block: one fused pass, then the vendor's convolution.

No kernel of its own: the convolution is oneDNN's or cuDNN's, which no hand-written one has to beat,
and what stands before and after it are passes of `film_norm`. Folding the residual into oneDNN's
epilogue was measured and gained nothing over adding in place (10.4 ms for 10.4 at (16, 256, 16,
16), 11.2 for 11.1 at (16, 128, 32, 32), bf16), nor did weights packed ahead on grids above 8x8.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastdiff.ops._checks import check_tensor
from fastdiff.ops.film_norm import film, film_norm


def film_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    num_groups: int | None = None,
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
    """``residual + gate * conv2d(act(group_norm(x) * (1 + scale) + shift))``, parts optional.

    The block of Dhariwal and Nichol 2021 (arXiv:2105.05233, section 4) with the gate of adaLN-Zero
    (Peebles and Xie 2023, arXiv:2212.09748). Differentiable in every tensor.

    Args:
        x: (N, C, H, W), any dtype that the convolution takes; channels_last is the fast order.
        weight: (D, C / groups, kH, kW), dtype of x.
        bias: (D,), dtype of x.
        num_groups: of the normalisation, divides C; None: no normalisation.
        norm_weight, norm_bias: (C,), of the normalisation.
        scale, shift: (N, C); scale is applied as ``1 + scale``.
        act: None or "silu".
        residual: shape and dtype of the result.
        gate: (N, D), multiplies the convolution's result.
        stride, padding, dilation, groups: as in torch.nn.functional.conv2d.
        eps: added to the variance.

    Returns:
        (N, D, H', W'), dtype of x.

    Raises:
        TypeError, ValueError: an argument breaks its rule.
        RuntimeError: of torch's own convolution: sizes that do not go together.
        BackendError: the forced backend cannot do the passes around the convolution.
    """
    # autocast casts what goes into the convolution, so their dtypes need not agree
    autocast = torch.is_autocast_enabled(x.device.type) if isinstance(x, torch.Tensor) else False
    _check(x, weight, num_groups, norm_weight, norm_bias, gate, autocast)
    h = x
    if num_groups is not None:
        h = film_norm(x, num_groups, norm_weight, norm_bias, scale, shift, act, None, eps)
    elif scale is not None or shift is not None or act is not None:
        h = film(x, scale, shift, plus_one=True, act=act)
    y = F.conv2d(h, weight, bias, stride, padding, dilation, groups)
    if residual is not None:
        check_tensor("film_conv2d", "residual", residual, x, tuple(y.shape))
        if autocast:
            residual = residual.to(y.dtype)
        if residual.dtype != y.dtype:
            raise TypeError(
                f"film_conv2d: residual must have the dtype of x {y.dtype}, got {residual.dtype}"
            )
    if gate is not None:
        return film(y, gate, None, residual=residual)
    if residual is None:
        return y
    # the result of the convolution is nobody else's yet
    return y + residual if torch.is_grad_enabled() else y.add_(residual)


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    num_groups: int | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    gate: torch.Tensor | None,
    autocast: bool,
) -> None:
    """What neither the convolution nor the passes around it say in their own words."""
    images: tuple[tuple[str, object], ...] = (("x", x), ("weight", weight))
    for name, t in images:
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"film_conv2d: {name} must be a tensor, got {type(t).__name__}")
        if t.dim() != 4:
            raise ValueError(f"film_conv2d: {name} must have 4 axes, got {tuple(t.shape)}")
    if weight.dtype != x.dtype and not autocast:
        raise TypeError(
            f"film_conv2d: weight must have the dtype of x {x.dtype}, got {weight.dtype}"
        )
    if num_groups is None:
        for name, affine in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
            if affine is not None:
                raise ValueError(
                    f"film_conv2d: {name} must come with num_groups, got None of those"
                )
    check_tensor("film_conv2d", "gate", gate, x, (x.shape[0], weight.shape[0]))
