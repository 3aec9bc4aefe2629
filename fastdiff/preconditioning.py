"""Networks as denoisers, and denoisers as networks.

A denoiser is D(x, sigma), the estimate of clean data, as EDM and k-diffusion call it; a network is
model(x, t), as `Sampler` calls it, with a prediction of any kind. Karras et al. 2022
(arXiv:2206.00364), equation 7, writes one by the other,

    D(x, sigma) = c_skip x + c_out F(c_in x, c_noise),

and table 1 and appendix C.3 have these scales for EDM's own network and for the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdiff.schedules import Schedule
from fastdiff.solvers import check_prediction
from fastdiff.solvers._walk import Point, x0_conversion

__all__ = ["Scalings", "denoiser", "network", "scalings"]

Model = Callable[..., Tensor]


class Scalings(NamedTuple):
    """The scales of D(x, sigma) = c_skip x + c_out F(c_in x, c_noise) at one sigma."""

    c_skip: float
    c_out: float
    c_in: float
    c_noise: float


def scalings(schedule: Schedule, prediction: str, sigma: float) -> Scalings:
    """What a network's prediction and time are at one noise level, in float64.

    Args:
        schedule: of the network. Discrete: x = x0 + sigma * noise, the network sees
            x / sqrt(1 + sigma^2) and the fractional time of sigma, the nearest one beyond the ends
            (as k-diffusion's wrappers without `quantize`). EDM: x = x0 + sigma * noise. Flow:
            sigma is t and x = (1 - t) x0 + t noise, which the network sees as it is.
        prediction: of the network, as in `solvers.build`.
        sigma: > 0.

    Raises:
        ValueError: a rule is broken, or the prediction has no meaning on the schedule.
    """
    if not 0 < sigma < math.inf:
        raise ValueError(f"scalings: sigma must be finite and > 0, got {sigma}")
    seen = 1.0
    if schedule.kind == "discrete":
        seen = 1 / math.hypot(1, sigma)
        at = Point(float(schedule.time(sigma)), seen, sigma * seen)
    elif schedule.kind == "edm":
        at = Point(sigma, 1.0, sigma)
    else:
        at = Point(sigma, float(schedule.alpha(sigma)), sigma)
    check_prediction(prediction, schedule, at.time, at.alpha, "scalings")
    p, q = x0_conversion(prediction, at, schedule.sigma_data)
    time = at.time
    if prediction == "edm":
        time, seen = math.log(sigma) / 4, 1 / math.hypot(sigma, schedule.sigma_data)
        return Scalings(p, q, seen, time)
    return Scalings(p * seen, q, seen, time)


def denoiser(model: Model, schedule: Schedule, prediction: str = "epsilon") -> Model:
    """A network as a denoiser.

    Args:
        model: `model(x, t, **cond)`, with x (N, *S) and t (N,) as the schedule counts time (EDM's
            own network: c_noise = ln(sigma) / 4); returns (N, *S), or (N, 2C, ...) whose second
            half, a variance, is dropped.
        schedule, prediction: as in `scalings`.

    Returns:
        `D(x, sigma, **cond)`: x (N, *S) floating point; sigma a number, a tensor of one element or
        (N,), > 0, read on the host. The network runs in the dtype of its first parameter (of x for
        a plain function); the rest in float32, or float64 for an x of it; the result has the dtype
        of x.

    Raises:
        TypeError: `model` is not callable. ValueError: as `scalings`.
    """
    _check("denoiser", model, schedule, prediction)

    def denoise(x: Tensor, sigma: float | Tensor, **cond: Any) -> Tensor:
        levels = _levels("denoiser", "sigma", sigma, x)
        scales = [scalings(schedule, prediction, level) for level in levels]
        c_skip, c_out, c_in, c_noise = _columns(scales, x)
        parameters = model.parameters() if isinstance(model, torch.nn.Module) else iter(())
        given = (c_in * x).to(next((p.dtype for p in parameters), x.dtype))
        output = model(given, c_noise.flatten(), **cond)
        if output.shape != x.shape and output.shape[1] == 2 * x.shape[1]:
            output = output.chunk(2, dim=1)[0]
        return (c_skip * x + c_out * output.to(c_skip.dtype)).to(x.dtype)

    return denoise


def network(denoise: Model, schedule: Schedule, prediction: str = "sample") -> Model:
    """A denoiser as a network, which `Sampler` and every table of that prediction take.

    Its prediction is (D - c_skip x) / c_out. "sample", where this is D itself, loses nothing; for
    the others c_out falls with sigma, and what is left of D's roundings grows.

    Args:
        denoise: `D(x, sigma, **cond)` with x (N, *S) and sigma (N,) float32, such as EDM's
            `EDMPrecond` or a wrapper of k-diffusion.
        schedule, prediction: as in `scalings`; they say how the network will be called.

    Returns:
        `model(x, t, **cond)`: x (N, *S) as the network of such a schedule sees it; t (N,).

    Raises:
        TypeError: `denoise` is not callable. ValueError: as `scalings`; and when called, a time at
        which sigma is 0 or infinite.
    """
    _check("network", denoise, schedule, prediction)

    def model(x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        times = np.array(_levels("network", "t", t, x))
        if prediction == "edm":
            levels = np.exp(4 * times)
        else:
            levels = times if schedule.kind != "discrete" else schedule.ratio(times)
        scales = [scalings(schedule, prediction, float(level)) for level in levels]
        c_skip, c_out, c_in, _ = _columns(scales, x)
        state = x / c_in
        sigma = torch.tensor(levels, dtype=torch.float32, device=x.device)
        return ((denoise(state, sigma, **cond) - c_skip * state) / c_out).to(x.dtype)

    return model


def _check(where: str, model: Model, schedule: Schedule, prediction: str) -> None:
    if not callable(model):
        raise TypeError(f"{where}: model must be callable, got {type(model).__name__}")
    check_prediction(prediction, schedule, schedule.t_min, 1.0, where)


def _levels(where: str, name: str, value: float | Tensor, x: Tensor) -> list[float]:
    """One number a sample."""
    if not x.is_floating_point():
        raise TypeError(f"{where}: x must be floating point, got {x.dtype}")
    found = [float(v) for v in value.flatten()] if isinstance(value, Tensor) else [float(value)]
    if len(found) not in (1, len(x)):
        raise ValueError(f"{where}: {name} must be one number or ({len(x)},), got {len(found)}")
    return found * len(x) if len(found) == 1 else found


def _columns(scales: list[Scalings], x: Tensor) -> list[Tensor]:
    """Each scale as a column over the samples of x."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    table = torch.tensor(scales, dtype=torch.float64).view(len(scales), 4).to(x.device, dtype)
    return [column.view(-1, *[1] * (x.dim() - 1)) for column in table.unbind(1)]
