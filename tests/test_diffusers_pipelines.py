"""Pipelines of diffusers give the same pictures with the drop-in schedulers."""

from __future__ import annotations

import warnings
from typing import Any

import diffusers
import pytest
import torch
from budget import assert_within_budget
from diffusers_pipelines import ARGUMENTS, Float32Draws, pipe_in_float64, run

from fastdiff.integrations import diffusers as drop_ins

# in units in the last place of an element: the last operation of a pipeline rounds once, and the
# few before it that are not the scheduler's do in either run
ULPS = 4

_VP = (
    "DDPMScheduler", "DDIMScheduler", "DDPMParallelScheduler", "DDIMParallelScheduler",
    "PNDMScheduler", "LMSDiscreteScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler",
    "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler",
    "DEISMultistepScheduler", "UniPCMultistepScheduler", "SASolverScheduler", "LCMScheduler",
    "TCDScheduler", "IPNDMScheduler", "DPMSolverSDEScheduler",
)  # fmt: skip
_FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
_STABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
           "clip_sample": False, "steps_offset": 1, "set_alpha_to_one": False}  # fmt: skip

# (pipeline, class of the scheduler, config)
CASES: list[tuple[str, str, dict[str, Any]]] = [
    # unconditional: clipped data; the U-Net of DDIM modulates by scale and shift
    ("ddpm", "DDPMScheduler", {}),
    ("ddpm", "DDPMScheduler", {"thresholding": True}),
    ("ddim", "DDIMScheduler", {}),
    ("consistency", "CMStochasticIterativeScheduler", {}),
    # eta is passed on to the classes that take it
    ("super_resolution", "DDIMScheduler", {"clip_sample": False}),
    ("super_resolution", "LMSDiscreteScheduler", {}),
    ("dit", "DDIMScheduler", {}),
    ("dit", "DPMSolverMultistepScheduler", {}),
    # every scheduler of variance-preserving processes swaps into Stable Diffusion
    *(("stable_diffusion", name, _STABLE) for name in _VP),
    ("stable_diffusion", "EulerDiscreteScheduler", {**_STABLE, "use_karras_sigmas": True}),
    ("stable_diffusion", "DPMSolverMultistepScheduler",
     {**_STABLE, "algorithm_type": "sde-dpmsolver++"}),
    # these enter in the middle of the grid and add noise to a picture; multistep ones start there
    *(("image_to_image", name, _STABLE) for name in
      ("DDIMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler", "PNDMScheduler",
       "DPMSolverMultistepScheduler", "UniPCMultistepScheduler")),
    # noise is added at every step
    *(("inpaint", name, _STABLE) for name in
      ("DDIMScheduler", "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler")),
    ("latent_consistency", "LCMScheduler", _STABLE),
    # its pipeline sets the first index
    *(("stable_diffusion_xl", name, _STABLE) for name in
      ("EulerDiscreteScheduler", "UniPCMultistepScheduler", "TCDScheduler")),
    ("stable_diffusion_3", "FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    ("stable_diffusion_3", "FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
    # its pipeline hands in sigmas and a shift by the size of the picture
    ("flux", "FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}),
    # video: five axes
    ("wan", "UniPCMultistepScheduler", {**_FLOW, "flow_shift": 3.0}),
    ("wan", "FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    ("stable_video", "EulerDiscreteScheduler",
     {"prediction_type": "v_prediction", "use_karras_sigmas": True, "sigma_min": 0.002,
      "sigma_max": 700.0, "timestep_type": "continuous"}),
]  # fmt: skip
IDS = [f"{pipe}-{cls.removesuffix('Scheduler')}-{len(config)}" for pipe, cls, config in CASES]


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        # diffusers warns of configs that it then changes, and of numpy's and torch's
        warnings.simplefilter("ignore")
        yield


def _scheduler(module: Any, cls: str, config: dict[str, Any]) -> Any:
    made = getattr(module, cls)
    known = set(getattr(diffusers, cls)._get_init_keys(getattr(diffusers, cls)))
    return made(**{k: v for k, v in config.items() if k in known})


def _pipe(name: str, cls: str, config: dict[str, Any]) -> Any:
    """A pipeline with diffusers' own scheduler."""
    if cls == "DPMSolverSDEScheduler":
        pytest.importorskip("torchsde", reason="diffusers' class needs it")
    return ARGUMENTS[name][0](_scheduler(diffusers, cls, config))


def _swapped(name: str, cls: str, config: dict[str, Any], **more: Any) -> Any:
    """The same with ours."""
    pipe = _pipe(name, cls, config)
    pipe.scheduler = getattr(drop_ins, cls).from_config(pipe.scheduler.config, **more)
    return pipe


def _compared(
    name: str, cls: str, config: dict[str, Any], dtype: torch.dtype, **change: Any
) -> list[Any]:
    """Pictures with our scheduler, with diffusers' own, and with that in float64."""
    ours, theirs = _swapped(name, cls, config).to(dtype), _pipe(name, cls, config).to(dtype)
    got, want = (run(pipe, name, **change) for pipe in (ours, theirs))
    assert type(ours.scheduler) is getattr(drop_ins, cls)
    assert torch.isfinite(got).all()
    exact = pipe_in_float64(_pipe(name, cls, config).to(dtype))
    with Float32Draws():
        whole = run(exact, name, **change)
    return [got, want, whole.double()]


@pytest.mark.parametrize(("name", "cls", "config"), CASES, ids=IDS)
def test_same_pictures(name: str, cls: str, config: dict[str, Any]) -> None:
    assert_within_budget(*_compared(name, cls, config, torch.float32), ulps=ULPS)


# first order, ancestral, multistep with a corrector, and a flow: what is rounded differs
@pytest.mark.parametrize(
    ("name", "cls", "config"),
    [
        ("stable_diffusion", "DDIMScheduler", _STABLE),
        ("stable_diffusion", "EulerAncestralDiscreteScheduler", _STABLE),
        ("stable_diffusion_xl", "DPMSolverMultistepScheduler", _STABLE),
        ("stable_diffusion_xl", "UniPCMultistepScheduler", _STABLE),
        ("stable_diffusion_3", "FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        ("wan", "UniPCMultistepScheduler", {**_FLOW, "flow_shift": 3.0}),
    ],
)
def test_same_pictures_in_bfloat16(name: str, cls: str, config: dict[str, Any]) -> None:
    got, want, exact = _compared(name, cls, config, torch.bfloat16, output_type="pt")
    assert_within_budget(got, want, exact, ulps=ULPS)
