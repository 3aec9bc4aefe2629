"""Functions that ComfyUI's KSAMPLER calls, each the walk of a table on the levels it is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from fastdiff.integrations._walk_denoiser import (
    BrownianPath,
    Denoiser,
    NoiseSource,
    joined_noise,
    scaled_noise,
    walk,
)
from fastdiff.integrations.comfyui._names import NOISES, OFFERS, PREFIX
from fastdiff.integrations.comfyui._noise import comfyui_noise, seeds_of
from fastdiff.schedules import Grid, Schedule, edm, flow
from fastdiff.solvers import build_on
from fastdiff.table import StepTable

# Without noise a flow's dx/dt = (x - x0)/t is k-diffusion's dx/dsigma with t for sigma, and ComfyUI
# runs these so. Those that draw, and the others, count in a flow's own alpha = 1 - t.
_T_FOR_SIGMA = ("dpmpp_2m", "dpmpp_2m_cfg_pp", "dpm_fast", "res_multistep", "unipc")
# ComfyUI starts these at the level of 0.01 % of the way where a flow starts at sigma 1
_OFFSET = (
    "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde", "er_sde", "seeds_2", "seeds_3", "sa_solver",
)  # fmt: skip


class Plan(NamedTuple):
    """A table, and the levels of its steps."""

    table: StepTable
    sigmas: list[float]


def model_sampling_of(model: Any) -> Any:
    """The model_sampling of the model that KSAMPLER hands to a sampler function."""
    guider = model.inner_model
    patcher = getattr(guider, "model_patcher", None)
    if patcher is not None:
        return patcher.get_model_object("model_sampling")
    return guider.inner_model.model_sampling


def is_flow(model_sampling: Any) -> bool:
    """Whether x is (1 - sigma)*x0 + sigma*noise."""
    import comfy.model_sampling  # type: ignore[import-not-found]

    return isinstance(model_sampling, comfy.model_sampling.CONST)


def _place(
    solver: str, sigmas: np.ndarray, model_sampling: Any, options: dict[str, Any]
) -> tuple[Schedule, Grid]:
    """The schedule and the grid on which the solver is built."""
    with_t = solver in _T_FOR_SIGMA or (
        solver == "res_multistep_cfg_pp" and not options.get("eta", 0.0)
    )
    if is_flow(model_sampling) and not with_t:
        if sigmas[0] > 1:
            raise ValueError(f"fastdiff: sigmas of a flow must be at most 1, got {sigmas[0]}")
        return flow(), Grid(sigmas, 1 - sigmas, sigmas)
    schedule = edm()
    if solver == "consistency":  # the one that counts from the least level
        schedule = edm(float(model_sampling.sigma_min), float(model_sampling.sigma_max))
    return schedule, Grid(sigmas, np.ones_like(sigmas), sigmas)


def _levels(solver: str, sigmas: Tensor, model_sampling: Any) -> np.ndarray:
    """The levels on which ComfyUI runs the solver of this name."""
    levels = sigmas.detach().cpu().double().numpy().copy()
    if solver in _OFFSET and levels[0] >= 1 and is_flow(model_sampling):
        levels[0] = np.float32(model_sampling.percent_to_sigma(1e-4))
    if solver == "dpm_fast":
        # it has a grid of its own between the ends, and stops at the last level above 0
        ends = levels[levels > 0]
        levels = np.geomspace(ends[0], ends[-1], len(levels)) if len(ends) > 1 else levels
    rule = "fastdiff: sigmas must fall from step to step and be finite and not negative"
    usable = np.isfinite(levels).all() and levels[-1] >= 0 and (np.diff(levels) < 0).all()
    if not usable:
        raise ValueError(f"{rule}, got {[float(f'{s:.6g}') for s in levels]}")
    return levels


def _tau(levels: np.ndarray, model_sampling: Any) -> dict[str, float]:
    """SA-Solver's stochastic steps: those that end between 20 % and 80 % of the way, as ComfyUI
    has it; the solver is told where they begin."""
    high, low = (float(model_sampling.percent_to_sigma(p)) for p in (0.2, 0.8))
    inside = np.flatnonzero((levels[1:] >= low) & (levels[1:] <= high))
    if not len(inside):
        return {"tau": 0.0}
    return {"tau_start": float(levels[inside[0]]), "tau_end": float(levels[inside[-1]])}


def plan(name: str, sigmas: Tensor, model_sampling: Any, options: dict[str, Any]) -> Plan:
    """The table of an offer on ComfyUI's levels, predicting x0.

    Args:
        name: key of `OFFERS`.
        sigmas: (steps + 1,) falling levels; t for a flow.
        model_sampling: ComfyUI's.
        options: of the solver.

    Raises:
        TypeError, ValueError: an option breaks its rule, the levels do not fall, or the solver has
            no meaning in this space.
    """
    solver, fixed = OFFERS[name]
    options = {**fixed, **options}
    levels = _levels(solver, sigmas, model_sampling)
    schedule, grid = _place(solver, levels, model_sampling, options)
    if solver == "euler_ancestral":
        options["rf"] = schedule.kind == "flow"
    if solver == "sa_solver":
        options |= _tau(levels, model_sampling)
    if solver == "lms":
        # ComfyUI's ends in the x0 prediction, k-diffusion's does not: ipndm_v has that end
        solver, options = "ipndm_v", {"max_order": options.get("order", 4)}
    table = build_on(solver, schedule, grid, prediction="sample", **options)
    table = scaled_noise(table, float(getattr(model_sampling, "noise_scale", 1.0)))
    if solver == "dpm_fast":
        # of its own steps, three evaluations each or fewer
        count = (len(levels) - 1) // 3 + 1
        levels = np.geomspace(levels[0], levels[-1], count + 1) if levels[-1] else levels
    return Plan(table, levels.tolist())


class _Guided:
    """ComfyUI's model as a denoiser that also tells the unconditional prediction."""

    def __init__(self, model: Any, extra_args: dict[str, Any]) -> None:
        from comfy.model_patcher import (  # type: ignore[import-not-found]
            set_model_options_post_cfg_function,
        )

        self._model, self._uncond = model, None
        options = set_model_options_post_cfg_function(
            dict(extra_args.get("model_options", {})), self._keep, disable_cfg1_optimization=True
        )
        self._extra_args = {**extra_args, "model_options": options}

    def _keep(self, args: dict[str, Any]) -> Tensor:
        self._uncond = args["uncond_denoised"]
        denoised: Tensor = args["denoised"]
        return denoised

    def __call__(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        denoised = self._model(x, sigma, **self._extra_args)
        if self._uncond is None:
            raise ValueError("fastdiff: model must have a negative prompt for CFG++, got none")
        return denoised, self._uncond


def _noise(
    kind: str, solver: str, x: Tensor, sigmas: Tensor, seed: int | None
) -> Tensor | BrownianPath | NoiseSource:
    if kind not in NOISES:
        raise ValueError(f"fastdiff: noise must be one of {', '.join(NOISES)}, got {kind!r}")
    if kind == "comfyui":
        return comfyui_noise(solver, x, sigmas, seed)
    seeds = seeds_of(seed, len(x))
    return seeds if kind == "counter" else BrownianPath(seeds)


def sample(
    name: str,
    model: Any,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], object] | None = None,
    disable: bool | None = None,
    *,
    noise: str = "comfyui",
    **options: Any,
) -> Tensor:
    """What KSAMPLER calls, k-diffusion's signature with the name of an offer in front.

    Args:
        name: key of `OFFERS`.
        model: ``model(x, sigma, **extra_args)`` returns the x0 prediction.
        x: (N, *S) noised latents, as `noise_scaling` of the model's sampling made them.
        sigmas: (steps + 1,) falling levels, on any device; with fewer than two x comes back.
        noise: "comfyui" as its own samplers draw, "counter" by seed and image, "brownian" from one
            path an image (`fastdiff.path_noise`).
        options: of the solver.

    Returns:
        (N, *S) the state at the last level.

    Raises:
        TypeError, ValueError: as `plan`; nothing has been written.
    """
    extra_args = {} if extra_args is None else extra_args
    if len(sigmas) < 2:
        return x
    made = plan(name, sigmas, model_sampling_of(model), options)
    source = _noise(noise, OFFERS[name].solver, x, sigmas, extra_args.get("seed"))
    table = joined_noise(made.table) if noise == "comfyui" else made.table
    denoiser: Denoiser = lambda z, sigma: model(z, sigma, **extra_args)  # noqa: E731
    if any(need.uncond for need in table.needs):
        denoiser = _Guided(model, extra_args)
    return walk(
        table, denoiser, x, made.sigmas,
        noise=source, callback=callback, disable=disable,
    )  # fmt: skip


def sampler_function(name: str) -> Callable[..., Tensor]:
    """`sample` of one name, as ``comfy.k_diffusion.sampling`` has its functions."""

    def function(
        model: Any,
        x: Tensor,
        sigmas: Tensor,
        extra_args: dict[str, Any] | None = None,
        callback: Callable[[dict[str, Any]], object] | None = None,
        disable: bool | None = None,
        **options: Any,
    ) -> Tensor:
        return sample(name, model, x, sigmas, extra_args, callback, disable, **options)

    function.__name__ = f"sample_{PREFIX}{name}"
    return function


__all__ = ["Plan", "is_flow", "plan", "sample", "sampler_function"]
