"""Node classes, made from the signatures of the solvers and of the spacings."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import Tensor

from fastdiff import spacings
from fastdiff.integrations.comfyui import _schedules
from fastdiff.integrations.comfyui._names import NOISES, OFFERS, defaults, draws, widget
from fastdiff.integrations.comfyui._noise import CounterNoise
from fastdiff.integrations.comfyui._samplers import sampler_function
from fastdiff.solvers import SOLVERS

_ROOT = "fastdiff"
_STEPS = ("INT", {"default": 20, "min": 1, "max": 10000})
_DENOISE = ("FLOAT", {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.01})
_SEED = {"default": 0, "min": 0, "max": 2**64 - 1, "control_after_generate": True}

# ranges of the options of spacings; `None` stays with the spacing
_OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "rho": ("FLOAT", {"min": 0.01, "max": 100.0, "step": 0.01, "round": False}),
    "mu": ("FLOAT", {"min": -10.0, "max": 10.0, "step": 0.1, "round": False}),
    "beta": ("FLOAT", {"min": 0.1, "max": 50.0, "step": 0.01, "round": False}),
    "alpha": ("FLOAT", {"min": 0.1, "max": 50.0, "step": 0.01, "round": False}),
    "beta_d": ("FLOAT", {"min": 0.01, "max": 1000.0, "step": 0.01, "round": False}),
    "beta_min": ("FLOAT", {"min": 0.001, "max": 1000.0, "step": 0.01, "round": False}),
    "eps_s": ("FLOAT", {"min": 0.0001, "max": 0.999, "step": 0.0001, "round": False}),
    "threshold_noise": ("FLOAT", {"min": 0.001, "max": 0.999, "step": 0.005, "round": False}),
    "original_inference_steps": ("INT", {"min": 1, "max": 10000}),
    "steps_offset": ("INT", {"min": 0, "max": 10000}),
}


class SamplerNode:
    """A node that returns a SAMPLER; `name` is the offer of its subclass."""

    name = ""
    CATEGORY = f"{_ROOT}/samplers"
    RETURN_TYPES = ("SAMPLER",)
    FUNCTION = "get_sampler"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        shown = {option: widget(cls.name, option) for option in defaults(cls.name)}
        if draws(cls.name):
            shown["noise"] = (list(NOISES), {"default": NOISES[0]})
        return {"required": shown}

    def get_sampler(self, **options: Any) -> tuple[Any]:
        """A KSAMPLER with the options."""
        from comfy.samplers import KSAMPLER  # type: ignore[import-not-found]

        return (KSAMPLER(sampler_function(self.name), options, {}),)


class SchedulerNode:
    """A node that returns the SIGMAS of any spacing, with the options that it has by itself."""

    spacing: str | None = None
    CATEGORY = f"{_ROOT}/schedulers"
    RETURN_TYPES = ("SIGMAS",)
    FUNCTION = "get_sigmas"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        inputs: dict[str, Any] = {"model": ("MODEL",)}
        if cls.spacing is None:
            inputs["spacing"] = (list(_schedules.NAMES), {"default": "karras"})
        inputs |= {"steps": _STEPS, "denoise": _DENOISE}
        for option, default in spacing_defaults(cls.spacing or "").items():
            kind, settings = _OPTIONS[option]
            inputs[option] = (kind, {"default": default, **settings})
        return {"required": inputs}

    def get_sigmas(
        self, model: Any, steps: int, denoise: float, spacing: str | None = None, **options: Any
    ) -> tuple[Tensor]:
        """The levels, float32 on the CPU."""
        chosen = self.spacing or spacing or ""
        sampling = model.get_model_object("model_sampling")
        return (_schedules.denoise_tail(sampling, chosen, steps, denoise, **options),)


class NoiseNode:
    """A node that returns the NOISE of a seed, image by image."""

    CATEGORY = f"{_ROOT}/noise"
    RETURN_TYPES = ("NOISE",)
    FUNCTION = "get_noise"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"noise_seed": ("INT", dict(_SEED))}}

    def get_noise(self, noise_seed: int) -> tuple[CounterNoise]:
        return (CounterNoise(noise_seed),)


@functools.cache
def spacing_defaults(name: str) -> dict[str, Any]:
    """The options of a spacing that a node shows, with their defaults."""
    rule = spacings.rule_of(name)
    if rule is None:
        return {}
    named = inspect.signature(rule).parameters
    return {k: named[k].default for k in spacings.options_of(name) if k in _OPTIONS}


def _title(name: str) -> str:
    return name.replace("_", " ").replace("@", " of ")


def _classes() -> tuple[dict[str, type], dict[str, str]]:
    """Node classes by id, and their titles."""
    found: dict[str, type] = {"FastdiffNoise": NoiseNode, "FastdiffScheduler": SchedulerNode}
    titles = {"FastdiffNoise": "Noise by image (fastdiff)",
              "FastdiffScheduler": "Scheduler (fastdiff)"}  # fmt: skip
    for name in OFFERS:
        key, doc = f"FastdiffSampler_{name}", inspect.getdoc(SOLVERS[OFFERS[name].solver]) or ""
        about = doc.split("\n\n")[0].replace("\n", " ")
        found[key] = type(key, (SamplerNode,), {"name": name, "DESCRIPTION": about})
        titles[key] = f"Sampler {_title(name)} (fastdiff)"
    for name in _schedules.NAMES:
        if spacing_defaults(name):
            key = "FastdiffScheduler_" + name.replace("@", "_")
            found[key] = type(key, (SchedulerNode,), {"spacing": name})
            titles[key] = f"Scheduler {_title(name)} (fastdiff)"
    return found, titles


NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = _classes()

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
