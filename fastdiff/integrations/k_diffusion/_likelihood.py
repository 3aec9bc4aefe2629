"""Log-likelihood by the probability-flow ODE."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff._adaptive_methods import Array, Dopri5, Progress
from fastdiff.integrations.k_diffusion._levels import to_d
from fastdiff.integrations.k_diffusion._run import check_model, state_dtype
from fastdiff.integrations.k_diffusion._tables import ends_of, number


@torch.no_grad()
def log_likelihood(
    model: Callable[..., Tensor],
    x: Tensor,
    sigma_min: Any,
    sigma_max: Any,
    extra_args: Mapping[str, Any] | None = None,
    atol: float = 1e-4,
    rtol: float = 1e-4,
) -> tuple[Tensor, dict[str, int]]:
    """log p(x) of a denoiser's probability-flow ODE, an estimate with one random probe.

    Song et al. 2021 (arXiv:2011.13456), section 4.3: the instantaneous change of variables from
    sigma_min to sigma_max, where the state is taken for N(0, sigma_max^2), with Hutchinson's
    estimate of the divergence by signs that are drawn from torch's generator as k-diffusion draws
    them. Dormand and Prince's method of order 5 with one step size for the batch; its steps are not
    torchdiffeq's, so that results agree within the tolerances and the number of evaluations
    differs.

    Args:
        model: ``model(x, sigma, **extra_args)``, a denoiser through which autograd can pass.
        x: (N, *S) data.
        sigma_min, sigma_max: levels above 0, sigma_max the larger.
        extra_args: keyword arguments of the model.
        atol, rtol: absolute and relative tolerance of a step.

    Returns:
        (N,) nats, float64 for float64 x, else float32; and {"fevals": evaluations of the model}.

    Raises:
        TypeError, ValueError: an argument breaks its rule.
        RuntimeError: the step has shrunk to nothing.
    """
    where = "log_likelihood"
    check_model(where, model, x, None)
    low, high = ends_of(where, sigma_min, sigma_max)
    if low >= high:
        raise ValueError(f"{where}: sigma_min must be below sigma_max, got {low} and {high}")
    tolerances = [number(where, name, t) for name, t in (("rtol", rtol), ("atol", atol))]
    if not all(0 < t < math.inf for t in tolerances):
        raise ValueError(f"{where}: rtol and atol must be above 0, got {rtol} and {atol}")
    extra = {} if extra_args is None else extra_args
    probe = torch.randint_like(x, 2) * 2 - 1
    size, calls = x.numel(), 0

    def slope(samples: Array, levels: Array, states: Tensor) -> Tensor:
        nonlocal calls
        if not len(samples):
            return states
        calls += 1
        sigma = torch.full((len(x),), -float(levels[0]), dtype=x.dtype, device=x.device)
        with torch.enable_grad():
            at = states[0, :size].view(x.shape).to(x.dtype).detach().requires_grad_()
            d = to_d(at, sigma, model(at, sigma, **extra))
            (grad,) = torch.autograd.grad((d * probe).sum(), at)
        divergence = (probe * grad).flatten(1).sum(1)
        # the level falls as sigma rises
        return -torch.cat([d.detach().flatten(), divergence]).to(states.dtype)[None]

    # the batch with what it has gained in log p is the one sample that the integrator sees
    start = torch.cat([x.flatten(), x.new_zeros(len(x))]).to(state_dtype(x))[None]
    progress = Progress(np.array([-low]), -high, start)
    run = Dopri5(progress, slope, *tolerances)
    while len(active := run.active()):
        run.attempt(active)
    latent, gained = progress.x[0, :size].view(x.shape), progress.x[0, size:]
    of_each = math.log(high) + math.log(2 * math.pi) / 2
    prior = -(0.5 * (latent / high) ** 2 + of_each).flatten(1).sum(1)
    return prior + gained, {"fevals": calls}
