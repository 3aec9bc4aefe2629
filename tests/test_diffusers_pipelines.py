"""Pipelines of diffusers give the same pictures with the drop-in schedulers."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from budget import assert_within_budget
from diffusers_float64 import Float32Draws, pipe_in_float64
from diffusers_pipelines import ARGUMENTS, run
from torch import Tensor

import fastdiff
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


# --- what else is done with a pipeline -------------------------------------------------------


def test_accelerated_pipeline_gives_the_same_pictures_and_saves_as_diffusers_own(
    tmp_path: Path,
) -> None:
    build, _ = ARGUMENTS["stable_diffusion_xl"]
    config = {"clip_sample": False, "steps_offset": 1}
    theirs, ours = (build(diffusers.DDIMScheduler(**config)) for _ in range(2))
    report = fastdiff.accelerate(ours)
    assert "scheduler" in report.fused and len(report.fused) > 10
    got, want = run(ours, "stable_diffusion_xl"), run(theirs, "stable_diffusion_xl")
    exact = pipe_in_float64(build(diffusers.DDIMScheduler(**config)))
    with Float32Draws():
        whole = run(exact, "stable_diffusion_xl")
    # the modules are fused as well: their sums are ordered otherwise
    assert_within_budget(got, want, whole.double(), ulps=16)
    ours.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"]
    plain = diffusers.StableDiffusionXLPipeline.from_pretrained(tmp_path)
    assert type(plain.scheduler) is diffusers.DDIMScheduler
    assert torch.equal(run(plain, "stable_diffusion_xl"), want)
    fastdiff.restore(ours)
    assert type(ours.scheduler) is diffusers.DDIMScheduler
    assert torch.equal(run(ours, "stable_diffusion_xl"), want)


def test_a_pipeline_with_a_drop_in_is_saved_and_loaded(tmp_path: Path) -> None:
    build, _ = ARGUMENTS["stable_diffusion_xl"]
    config = {"clip_sample": False, "steps_offset": 1, "noise": "counter"}
    pipe = build(drop_ins.DDIMScheduler(**config))
    want = run(pipe, "stable_diffusion_xl", eta=1.0)
    pipe.save_pretrained(tmp_path / "ours")
    again = diffusers.StableDiffusionXLPipeline.from_pretrained(tmp_path / "ours")
    assert type(again.scheduler) is drop_ins.DDIMScheduler
    assert again.scheduler.config.noise == "counter"
    assert torch.equal(run(again, "stable_diffusion_xl", eta=1.0), want)
    # for those who do not have fastdiff
    pipe.scheduler = drop_ins.to_diffusers(pipe.scheduler)
    pipe.save_pretrained(tmp_path / "theirs")
    index = json.loads((tmp_path / "theirs" / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"]
    plain = diffusers.DDIMScheduler.from_pretrained(tmp_path / "theirs", subfolder="scheduler")
    hidden = {"noise", "_use_default_values"}
    assert dict(plain.config) == {k: v for k, v in pipe.scheduler.config.items() if k not in hidden}


@pytest.mark.parametrize(("name", "cls"), [("ddim", "DDIMPipeline"), ("pndm", "PNDMPipeline")])
def test_pipelines_that_make_a_scheduler_of_their_own(name: str, cls: str) -> None:
    """Their constructors give back diffusers' class: ours is assigned behind them."""
    made = {"ddim": drop_ins.DDIMScheduler, "pndm": drop_ins.PNDMScheduler}[name]
    pipe = getattr(diffusers, cls)(ARGUMENTS["ddpm"][0](made()).unet, made())
    assert type(pipe.scheduler).__module__.startswith("diffusers.")
    pipe.scheduler = made.from_config(pipe.scheduler.config)
    assert run(pipe, "ddpm").shape == (2, 8, 8, 3) and type(pipe.scheduler) is made


def test_a_callback_sees_and_changes_the_latents() -> None:
    """The state that a scheduler keeps must not be the tensor that a callback writes to."""
    build, _ = ARGUMENTS["stable_diffusion"]
    seen: list[list[Tensor]] = []

    def halved(pipe: Any, i: int, t: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
        seen[-1].append(given["latents"].clone())
        if i == 1:
            given["latents"].mul_(0.5)
        return {"latents": given["latents"] + 0.25} if i == 2 else given

    for module in (drop_ins, diffusers):
        seen.append([])
        pipe = build(module.UniPCMultistepScheduler(solver_order=3))
        run(pipe, "stable_diffusion", callback_on_step_end=halved)
    assert len(seen[0]) == len(seen[1]) == 4
    pipe = pipe_in_float64(build(diffusers.UniPCMultistepScheduler(solver_order=3)))
    seen.append([])
    with Float32Draws():
        run(pipe, "stable_diffusion", callback_on_step_end=halved)
    for got, want, exact in zip(*seen, strict=True):
        assert_within_budget(got, want, exact, ulps=4)  # as in test_diffusers_pipelines
