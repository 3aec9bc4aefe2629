"""SIGMAS by fastdiff's spacings, from the model_sampling of a ComfyUI model."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.integrations.comfyui._samplers import is_flow
from fastdiff.schedules import SPACINGS, Schedule, edm, flow, from_betas
from fastdiff.spacings import options_of

NAMES = tuple(dict.fromkeys(name for names in SPACINGS.values() for name in names))
# whose points are laid between the least and the greatest level, whatever lies between
_ENDS_ALONE = ("karras", "exponential", "polyexponential", "kl_optimal", "beta@diffusers",
               "linear_quadratic")  # fmt: skip
_FITS = 1e-5  # a float32 table


def schedule_of(model_sampling: Any) -> tuple[Schedule, int]:
    """The schedule of a model, and the number of levels in ComfyUI's table of it.

    A flow's shift is read off its table, whichever formula made it; a table that no shift fits is
    refused, but for `ends_of`.

    Raises:
        ValueError: the levels are no known schedule.
    """
    levels = model_sampling.sigmas.detach().cpu().double().numpy()
    count = len(levels)
    if is_flow(model_sampling):
        u = np.arange(1, count + 1) / count
        half = count // 2
        shift = float(levels[half - 1] / (1 - levels[half - 1]) * (1 - u[half - 1]) / u[half - 1])
        want = shift * u / (1 + (shift - 1) * u)
        if not np.abs(want - levels).max() <= _FITS:
            rule = "sigmas of a flow must be a shifted ramp for a spacing of its times"
            raise ValueError(f"fastdiff: {rule}, got {levels[0]:g} ... {levels[-1]:g}")
        # sigma_min as the table has it
        return flow(shift, sigma_min=float(levels[0])), count
    if _is_continuous(model_sampling):
        return ends_of(model_sampling), count
    abar = 1 / (1 + levels**2)
    return from_betas(1 - abar / np.concatenate([[1.0], abar[:-1]])), count


def ends_of(model_sampling: Any) -> Schedule:
    """A schedule with the model's least and greatest level."""
    low, high = float(model_sampling.sigma_min), float(model_sampling.sigma_max)
    return flow(sigma_min=low) if is_flow(model_sampling) else edm(low, high)


def _is_continuous(model_sampling: Any) -> bool:
    import comfy.model_sampling as known  # type: ignore[import-not-found]

    return isinstance(model_sampling, known.ModelSamplingContinuousEDM)


def sigmas(model_sampling: Any, spacing: str, steps: int, **options: Any) -> Tensor:
    """(steps + 1,) float32 levels that end at 0; t for a flow.

    Args:
        model_sampling: ComfyUI's.
        spacing: one of `NAMES`; ``Schedule.points`` says which of them each kind has.
        steps: at least 1.
        options: of the spacing.

    Raises:
        TypeError, ValueError: as ``Schedule.points``, or the model's levels are no known schedule.
    """
    if spacing in _ENDS_ALONE and is_flow(model_sampling):
        schedule = ends_of(model_sampling)
    else:
        schedule, count = schedule_of(model_sampling)
        if schedule.kind == "flow" and "T" in options_of(spacing):
            options = {"T": count} | options
    grid = schedule.points(steps, spacing, **options)
    levels = grid.sigmas if schedule.kind == "flow" else grid.sigmas / grid.alphas
    return torch.tensor(levels, dtype=torch.float32)


def denoise_tail(
    model_sampling: Any, spacing: str, steps: int, denoise: float, **options: Any
) -> Tensor:
    """The last `steps` steps of a schedule of steps/denoise, as ComfyUI's BasicScheduler takes
    them; none where denoise is 0."""
    if denoise <= 0:
        return torch.zeros(0)
    total = steps if denoise >= 1 else int(steps / denoise)
    return sigmas(model_sampling, spacing, total, **options)[-(steps + 1) :]
