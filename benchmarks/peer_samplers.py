"""The loops of diffusers and k-diffusion, as a user of them writes them."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastdiff.reference.diffusion import from_prediction
from fastdiff.reference.gmm import GaussianMixture
from fastdiff.schedules import Schedule


def run_diffusers(
    scheduler: str,
    config: dict[str, Any],
    steps: int,
    mixture: GaussianMixture,
    schedule: Schedule,
    noise: Tensor,
) -> Tensor:
    """The last sample of a scheduler of diffusers on the mixture's noise prediction.

    The prediction is in float64 at the time that the scheduler names, the scheduler's own
    arithmetic in float32.
    """
    import diffusers

    s = getattr(diffusers, scheduler)(**config)
    s.set_timesteps(steps)
    x = noise.float() * float(s.init_noise_sigma)
    for t in s.timesteps:
        alpha, sigma = (float(f(float(t))) for f in (schedule.alpha, schedule.sigma))
        model_input = s.scale_model_input(x, t)
        epsilon = mixture.epsilon(model_input.double(), alpha, sigma).float()
        x = s.step(epsilon, t, x).prev_sample
    return x


def k_sampling() -> Any:
    """k_diffusion.sampling alone, or None: the package imports torchvision, wandb and CLIP."""
    if "k_diffusion.sampling" in sys.modules:
        return sys.modules["k_diffusion.sampling"]
    found = importlib.util.find_spec("k_diffusion")
    if found is None:
        return None
    package, utils = types.ModuleType("k_diffusion"), types.ModuleType("k_diffusion.utils")
    package.__path__ = list(found.submodule_search_locations or ())
    utils.append_dims = lambda x, n: x[(...,) + (None,) * (n - x.ndim)]  # type: ignore[attr-defined]
    package.utils = utils  # type: ignore[attr-defined]
    sys.modules |= {"k_diffusion": package, "k_diffusion.utils": utils}
    try:
        return importlib.import_module("k_diffusion.sampling")
    except ImportError:  # torchdiffeq, torchsde
        return None
    finally:  # leave no half of a package behind
        for name in ("k_diffusion", "k_diffusion.utils"):
            del sys.modules[name]


@dataclass(frozen=True)
class Timed:
    """A solver that the libraries share.

    Args:
        scheduler, config: of diffusers.
        sampler: of k-diffusion, or None.
        spacing: of ours, that of the peers.
    """

    scheduler: str
    config: dict[str, Any] = field(default_factory=dict)
    sampler: str | None = None
    spacing: str = "trailing"


TIMED = {
    "ddim": Timed("DDIMScheduler", {"clip_sample": False}, "sample_euler"),
    "dpmpp_2m": Timed(
        "DPMSolverMultistepScheduler",
        {"solver_order": 2, "lower_order_final": False},
        "sample_dpmpp_2m",
    ),
}


@dataclass(frozen=True)
class Task:
    """What is sampled."""

    model: Callable[..., Tensor]
    schedule: Schedule
    prediction: str
    steps: int
    noise: Tensor
    label: Tensor


def functions(case: Timed, task: Task) -> dict[str, Callable[[], Tensor]]:
    """The loop of each library that is installed, by its name."""
    found: dict[str, Callable[[], Tensor]] = {"diffusers": lambda: diffusers_loop(case, task)}
    if k_sampling() is not None and case.sampler is not None:
        found["k-diffusion"] = lambda: k_loop(case, task)
    return found


def diffusers_loop(case: Timed, task: Task) -> Tensor:
    """set_timesteps, then model and step in turn."""
    import diffusers

    s = getattr(diffusers, case.scheduler)(
        trained_betas=task.schedule.betas.astype("float32"),
        prediction_type=task.prediction,
        timestep_spacing=case.spacing,
        **case.config,
    )
    s.set_timesteps(task.steps)
    x = task.noise * s.init_noise_sigma
    with torch.no_grad():
        for t in s.timesteps:
            model_input = s.scale_model_input(x, t)
            output = task.model(model_input, t.expand(len(x)).float(), label=task.label)
            x = s.step(output, t, x).prev_sample
    return x


def k_loop(case: Timed, task: Task) -> Tensor:
    """A denoiser around the model, and the sampler."""
    grid = task.schedule.points(task.steps, case.spacing)
    sigmas = torch.from_numpy(grid.sigmas / grid.alphas).float()
    times = dict(zip(sigmas.tolist(), grid.times.tolist(), strict=True))

    def denoise(z: Tensor, sigma: Tensor) -> Tensor:
        level = float(sigma[0])
        t = times[level]
        alpha, std = float(task.schedule.alpha(t)), float(task.schedule.sigma(t))
        x = alpha * z
        output = task.model(x, torch.full((len(x),), t), label=task.label)
        return from_prediction(task.prediction, x, output, alpha, std)[0]

    start = task.noise / float(grid.alphas[0])
    sampler = getattr(k_sampling(), str(case.sampler))
    result: Tensor = sampler(denoise, start, sigmas, disable=True)
    return result
