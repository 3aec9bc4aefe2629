"""The forward process and its training target in plain PyTorch: the definition of the arithmetic.

The order of the float32 operations is the contract: kernels give the same bits.
"""

from __future__ import annotations

import torch

from fastdiff.reference.diffusion import to_prediction


def add_noise(
    x0: torch.Tensor, eps: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor, target: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """x = alpha x0 + sigma eps, and `diffusion.to_prediction` of the target.

    Args:
        x0: (N, *S) float64, float32, or a 16-bit type, which is computed in float32.
        eps: (N, *S) unit normals.
        alpha, sigma: (N,), float64 where x0 is, else float32.
        target: a name of `diffusion.PREDICTIONS`.

    Returns:
        Two (N, *S) tensors, dtype of x0.
    """
    column = (-1,) + (1,) * (x0.dim() - 1)
    a, s = alpha.view(column), sigma.view(column)
    clean, noise = x0.to(alpha.dtype), eps.to(alpha.dtype)
    wanted = to_prediction(target, clean, noise, a, s)
    return (a * clean + s * noise).to(x0.dtype), wanted.to(x0.dtype)


def add_noise_backward(
    grad_x: torch.Tensor | None,
    grad_target: torch.Tensor | None,
    alpha: torch.Tensor,
    sigma: torch.Tensor,
    target: str,
) -> torch.Tensor | None:
    """Gradient of x0, which is linear in both outputs; None says that an output was not used.

    dx/dx0 = alpha; dtarget/dx0 = 0 (epsilon), -sigma (v_prediction), -1 (flow).

    Args:
        grad_x, grad_target: (N, *S), dtype of x0.
        alpha, sigma, target: as in `add_noise`.

    Returns:
        (N, *S), dtype of x0; None where the gradient is zero.
    """
    given = grad_target if grad_x is None else grad_x
    if given is None:
        return None
    column = (-1,) + (1,) * (given.dim() - 1)
    total = None if grad_x is None else alpha.view(column) * grad_x.to(alpha.dtype)
    if grad_target is not None and target in ("v_prediction", "flow"):
        through = grad_target.to(alpha.dtype)
        if target == "v_prediction":
            through = sigma.view(column) * through
        total = -through if total is None else total - through
    return None if total is None else total.to(given.dtype)
