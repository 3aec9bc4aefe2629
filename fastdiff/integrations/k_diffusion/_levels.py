"""Lists of sigmas and the small functions around them, as k-diffusion has them, to the bit."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

Device = torch.device | str


def append_zero(x: Tensor) -> Tensor:
    """(n,) -> (n + 1,), a zero at the end."""
    return torch.cat([x, torch.zeros(1, dtype=x.dtype, device=x.device)])


def append_dims(x: Tensor, target_dims: int) -> Tensor:
    """`x` with axes of length 1 added at its end, until it has `target_dims` of them."""
    missing = target_dims - x.dim()
    if missing < 0:
        raise ValueError(f"append_dims: target_dims must be at least {x.dim()}, got {target_dims}")
    return x.reshape(*x.shape, *[1] * missing)


def get_sigmas_karras(
    n: int, sigma_min: float, sigma_max: float, rho: float = 7.0, device: Device = "cpu"
) -> Tensor:
    """n levels uniform in sigma^(1/rho), then 0: Karras et al. 2022 (arXiv:2206.00364), eq. 5.

    Returns:
        (n + 1,) float32 on `device`.
    """
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    between = torch.linspace(0, 1, n) * (low - high)
    return append_zero((high + between) ** rho).to(device)


def get_sigmas_exponential(
    n: int, sigma_min: float, sigma_max: float, device: Device = "cpu"
) -> Tensor:
    """n levels uniform in log(sigma), then 0: (n + 1,) float32 on `device`."""
    ends = math.log(sigma_max), math.log(sigma_min)
    return append_zero(torch.linspace(*ends, n, device=device).exp())


def get_sigmas_polyexponential(
    n: int, sigma_min: float, sigma_max: float, rho: float = 1.0, device: Device = "cpu"
) -> Tensor:
    """n levels whose log(sigma) falls as the power `rho` of a line, then 0: (n + 1,) float32."""
    low = math.log(sigma_min)
    ramp = torch.linspace(1, 0, n, device=device) ** rho
    return append_zero((ramp * (math.log(sigma_max) - low) + low).exp())


def get_sigmas_vp(
    n: int,
    beta_d: float = 19.9,
    beta_min: float = 0.1,
    eps_s: float = 1e-3,
    device: Device = "cpu",
) -> Tensor:
    """n levels of the linear variance-preserving SDE, uniform in its time, then 0.

    sigma(t)^2 = exp(beta_d t^2/2 + beta_min t) - 1 with t from 1 to `eps_s`: Song et al. 2021
    (arXiv:2011.13456), as Karras et al. 2022, table 1, write it.

    Returns:
        (n + 1,) float32 on `device`.
    """
    t = torch.linspace(1, eps_s, n, device=device)
    grown = torch.exp(beta_d * t**2 / 2 + beta_min * t)
    return append_zero((grown - 1).sqrt())


def to_d(x: Tensor, sigma: Tensor, denoised: Tensor) -> Tensor:
    """The slope dx/dsigma = (x - denoised)/sigma, also the predicted noise; sigma () or (N,)."""
    return (x - denoised) / append_dims(sigma, x.dim())


def get_ancestral_step(sigma_from: Any, sigma_to: Any, eta: float = 1.0) -> tuple[Any, Any]:
    """(sigma_down, sigma_up): the level that a step goes down to, and the noise that it then adds.

    up^2 + down^2 = sigma_to^2 with up = eta times the DDPM noise, at most sigma_to; see
    `solvers.euler_ancestral`. Numbers or tensors.
    """
    if not eta:
        return sigma_to, 0.0
    spread = sigma_to**2 * (sigma_from**2 - sigma_to**2) / sigma_from**2
    sigma_up = min(sigma_to, eta * spread**0.5)
    return (sigma_to**2 - sigma_up**2) ** 0.5, sigma_up
