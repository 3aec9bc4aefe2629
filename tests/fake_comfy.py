"""ComfyUI's interface objects as its documentation and its callers describe them, in small.

Installed as ``comfy`` for a test: the model's sampling classes, a guider with classifier-free
guidance and its hooks, KSAMPLER with the inpainting model around the guider, the KSampler node's
class and the lists of names. Latents live in model space, and there is one condition a side.
"""

from __future__ import annotations

import math
import sys
import types
from typing import NamedTuple

import torch


def reshaped(sigma, like):
    return sigma.view(()) if sigma.nelement() == 1 else sigma.view(-1, *[1] * (like.ndim - 1))


# --- comfy.model_sampling -------------------------------------------------------------------


class EPS:
    def calculate_denoised(self, sigma, output, x):
        return x - output * reshaped(sigma, x)

    def noise_scaling(self, sigma, noise, latent_image, max_denoise=False):
        sigma = reshaped(sigma, noise)
        return noise * (torch.sqrt(1 + sigma**2) if max_denoise else sigma) + latent_image

    def inverse_noise_scaling(self, sigma, latent):
        return latent


class CONST:
    def calculate_denoised(self, sigma, output, x):
        return x - output * reshaped(sigma, x)

    def noise_scaling(self, sigma, noise, latent_image, max_denoise=False):
        sigma = reshaped(sigma, noise)
        scale = getattr(self, "noise_scale", 1.0)
        return sigma * (scale * noise) + (1 - sigma) * latent_image

    def inverse_noise_scaling(self, sigma, latent):
        return latent / (1 - reshaped(sigma, latent))


class _Table(torch.nn.Module):
    def set_sigmas(self, sigmas):
        self.register_buffer("sigmas", sigmas.float())
        self.register_buffer("log_sigmas", sigmas.log().float())

    @property
    def sigma_min(self):
        return self.sigmas[0]

    @property
    def sigma_max(self):
        return self.sigmas[-1]


class ModelSamplingDiscrete(_Table):
    """Stable Diffusion's betas."""

    def __init__(self):
        super().__init__()
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        abar = torch.cumprod(1 - betas, 0)
        self.set_sigmas(((1 - abar) / abar) ** 0.5)

    def timestep(self, sigma):
        away = sigma.log() - self.log_sigmas[:, None]
        return away.abs().argmin(dim=0).view(sigma.shape)

    def sigma(self, timestep):
        t = torch.clamp(timestep.float(), 0, len(self.sigmas) - 1)
        low, high, w = t.floor().long(), t.ceil().long(), t.frac()
        return ((1 - w) * self.log_sigmas[low] + w * self.log_sigmas[high]).exp()

    def percent_to_sigma(self, percent):
        if percent <= 0:
            return 999999999.9
        return 0.0 if percent >= 1 else self.sigma(torch.tensor((1 - percent) * 999)).item()


class ModelSamplingContinuousEDM(_Table):
    def __init__(self, low=0.002, high=120.0):
        super().__init__()
        self.set_sigmas(torch.linspace(math.log(low), math.log(high), 1000).exp())

    def percent_to_sigma(self, percent):
        if percent <= 0:
            return 999999999.9
        low, high = math.log(self.sigma_min), math.log(self.sigma_max)
        return 0.0 if percent >= 1 else math.exp(low + (high - low) * (1 - percent))


class ModelSamplingDiscreteFlow(_Table):
    def __init__(self, shift=1.0, noise_scale=1.0):
        super().__init__()
        self.shift, self.noise_scale = shift, noise_scale
        self.set_sigmas(self.sigma(torch.arange(1, 1001) / 1000 * 1000))

    def timestep(self, sigma):
        return sigma * 1000

    def sigma(self, timestep):
        t = timestep / 1000
        return self.shift * t / (1 + (self.shift - 1) * t)

    def percent_to_sigma(self, percent):
        if percent <= 0:
            return 1.0
        return 0.0 if percent >= 1 else self.sigma((1 - percent) * 1000)


class ModelSamplingFlux(_Table):
    def __init__(self, mu=1.15):
        super().__init__()
        self.mu = mu
        self.set_sigmas(self.sigma(torch.arange(1, 10001) / 10000))

    def timestep(self, sigma):
        return sigma

    def sigma(self, t):
        return math.exp(self.mu) / (math.exp(self.mu) + (1 / t - 1))

    def percent_to_sigma(self, percent):
        if percent <= 0:
            return 1.0
        return 0.0 if percent >= 1 else self.sigma(1 - percent)


def sampling_of(kind, *args):
    """An object of a prediction class and a schedule class, as ComfyUI makes them."""
    mixed = {
        "eps": (ModelSamplingDiscrete, EPS),
        "edm": (ModelSamplingContinuousEDM, EPS),
        "flow": (ModelSamplingDiscreteFlow, CONST),
        "flux": (ModelSamplingFlux, CONST),
    }[kind]
    return type("ModelSampling", mixed, {})(*args)


# --- the model, its patcher and the guider ---------------------------------------------------


class Model:
    """What KSAMPLER sees as the innermost model: it denoises a condition."""

    def __init__(self, model_sampling, denoise):
        self.model_sampling, self.denoise = model_sampling, denoise

    def scale_latent_inpaint(self, sigma, noise, latent_image, **_):
        return self.model_sampling.noise_scaling(reshaped(sigma, noise), noise, latent_image)


class ModelPatcher:
    def __init__(self, model):
        self.model, self.model_options = model, {"transformer_options": {}}

    def get_model_object(self, name):
        return getattr(self.model, name)


def sampling_function(model, x, sigma, uncond, cond, scale, model_options, seed):
    """Classifier-free guidance with the hooks that run after it."""
    alone = math.isclose(scale, 1.0) and not model_options.get("disable_cfg1_optimization", False)
    denoised = model.denoise(x, sigma, cond)
    other = torch.zeros_like(x) if alone else model.denoise(x, sigma, uncond)
    guided = other + (denoised - other) * scale if not alone else denoised
    for hook in model_options.get("sampler_post_cfg_function", []):
        guided = hook({
            "denoised": guided, "cond_denoised": denoised, "uncond_denoised": other,
            "sigma": sigma, "input": x, "model": model, "model_options": model_options,
            "cond_scale": scale,
        })  # fmt: skip
    return guided


class CFGGuider:
    def __init__(self, model_patcher, cfg=1.0):
        self.model_patcher, self.cfg = model_patcher, cfg
        self.inner_model = model_patcher.model

    def __call__(self, x, sigma, model_options, seed=None):
        return sampling_function(
            self.inner_model, x, sigma, "negative", "positive", self.cfg, model_options, seed
        )

    def sample(
        self, noise, latent_image, sampler, sigmas, denoise_mask=None, callback=None, seed=None
    ):
        if sigmas.shape[-1] == 0:
            return latent_image
        extra_args = {"model_options": dict(self.model_patcher.model_options), "seed": seed}
        return sampler.sample(
            self, sigmas, extra_args, callback, noise.float(), latent_image, denoise_mask, True
        )


# --- comfy.samplers --------------------------------------------------------------------------


class Inpaint:
    """The guider with what lies outside the mask put in before and after."""

    def __init__(self, guider, sigmas, noise, latent_image):
        self.inner_model, self.sigmas = guider, sigmas
        self.noise, self.latent_image = noise, latent_image

    def __call__(self, x, sigma, denoise_mask, model_options=None, seed=None):
        if denoise_mask is not None:
            kept = self.inner_model.inner_model.scale_latent_inpaint(
                x=x, sigma=sigma, noise=self.noise, latent_image=self.latent_image
            )
            x = x * denoise_mask + kept * (1 - denoise_mask)
        out = self.inner_model(x, sigma, model_options=model_options, seed=seed)
        if denoise_mask is not None:
            out = out * denoise_mask + self.latent_image * (1 - denoise_mask)
        return out


class KSAMPLER:
    def __init__(self, sampler_function, extra_options={}, inpaint_options={}):  # noqa: B006
        self.sampler_function = sampler_function
        self.extra_options, self.inpaint_options = extra_options, inpaint_options

    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image, denoise_mask,
        disable_pbar,
    ):  # fmt: skip
        extra_args["denoise_mask"] = denoise_mask
        model_k = Inpaint(model_wrap, sigmas, noise, latent_image)
        sampling = model_wrap.inner_model.model_sampling
        highest = float(sampling.sigma_max)
        full = math.isclose(highest, float(sigmas[0]), rel_tol=1e-5) or sigmas[0] > highest
        x = sampling.noise_scaling(sigmas[0], noise, latent_image, full)
        total = len(sigmas) - 1

        def k_callback(seen):
            if callback is not None:
                callback(seen["i"], seen["denoised"], seen["x"], total)

        x = self.sampler_function(
            model_k, x, sigmas, extra_args=extra_args, callback=k_callback, disable=disable_pbar,
            **self.extra_options,
        )  # fmt: skip
        return sampling.inverse_noise_scaling(sigmas[-1], x)


class SchedulerHandler(NamedTuple):
    handler: object
    use_ms: bool = True


def simple_scheduler(model_sampling, steps):
    stride = len(model_sampling.sigmas) / steps
    picked = [float(model_sampling.sigmas[-(1 + int(i * stride))]) for i in range(steps)]
    return torch.FloatTensor([*picked, 0.0])


def default_noise_sampler(x, seed=None):
    generator = torch.Generator(x.device).manual_seed(seed + (x.device.type == "cpu"))
    return lambda sigma, sigma_next: torch.randn(
        x.size(), dtype=x.dtype, device=x.device, generator=generator
    )


class BrownianTreeNoiseSampler:
    """One path a seed, kept at the levels that were asked for; halves as they are needed."""

    def __init__(self, x, sigma_min, sigma_max, seed=None, transform=lambda t: t, cpu=False):
        self.generator = torch.Generator().manual_seed(seed)
        self.x, self.levels = x, {float(sigma_min): torch.zeros_like(x)}
        self.levels[float(sigma_max)] = float(sigma_max - sigma_min) ** 0.5 * self._normal()

    def _normal(self):
        return torch.randn(self.x.shape, generator=self.generator, dtype=self.x.dtype)

    def at(self, level):
        if level not in self.levels:
            low = max(known for known in self.levels if known < level)
            high = min(known for known in self.levels if known > level)
            part = (level - low) / (high - low)
            mean = (1 - part) * self.levels[low] + part * self.levels[high]
            self.levels[level] = mean + math.sqrt(part * (high - level)) * self._normal()
        return self.levels[level]

    def __call__(self, sigma, sigma_next):
        a, b = float(sigma), float(sigma_next)
        return (self.at(a) - self.at(b)) / abs(a - b) ** 0.5


def set_model_options_post_cfg_function(options, function, disable_cfg1_optimization=False):
    hooks = [*options.get("sampler_post_cfg_function", []), function]
    options["sampler_post_cfg_function"] = hooks
    if disable_cfg1_optimization:
        options["disable_cfg1_optimization"] = True
    return options


def modules():
    """The package's modules by name, each with lists of its own."""
    names = (
        "comfy", "comfy.samplers", "comfy.model_sampling", "comfy.model_patcher",
        "comfy.k_diffusion", "comfy.k_diffusion.sampling",
    )  # fmt: skip
    made = {name: types.ModuleType(name) for name in names}
    for name, module in made.items():
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(made[parent], child, module)
    for cls in (EPS, CONST, ModelSamplingDiscrete, ModelSamplingContinuousEDM):
        setattr(made["comfy.model_sampling"], cls.__name__, cls)
    patcher = made["comfy.model_patcher"]
    patcher.set_model_options_post_cfg_function = set_model_options_post_cfg_function
    k = made["comfy.k_diffusion.sampling"]
    k.default_noise_sampler = default_noise_sampler
    k.BrownianTreeNoiseSampler = BrownianTreeNoiseSampler
    k.sample_euler = lambda model, x, sigmas, **_: x
    s = made["comfy.samplers"]
    s.KSAMPLER, s.CFGGuider, s.SchedulerHandler = KSAMPLER, CFGGuider, SchedulerHandler
    s.KSAMPLER_NAMES = ["euler", "dpm_2"]
    s.SAMPLER_NAMES = [*s.KSAMPLER_NAMES, "ddim"]
    s.SCHEDULER_HANDLERS = {"simple": SchedulerHandler(simple_scheduler)}
    s.SCHEDULER_NAMES = list(s.SCHEDULER_HANDLERS)
    s.KSampler = type("KSampler", (), {
        "SAMPLERS": s.SAMPLER_NAMES, "SCHEDULERS": s.SCHEDULER_NAMES,
        "DISCARD_PENULTIMATE_SIGMA_SAMPLERS": {"dpm_2"},
    })  # fmt: skip
    s.ksampler = lambda name: KSAMPLER(getattr(k, f"sample_{name}"))
    return made


def install(monkeypatch):
    """``comfy`` for one test; returns comfy.samplers."""
    for name, module in modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    return sys.modules["comfy.samplers"]
