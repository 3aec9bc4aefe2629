"""What the drop-in functions for k-diffusion are tested on, beside k-diffusion's own."""

from __future__ import annotations

import inspect

import pytest
import torch
from peers import k_sampling

from fastdiff.integrations import k_diffusion as K
from fastdiff.integrations.k_diffusion import _noise as k_noise
from fastdiff.reference.gmm import GaussianMixture

SHAPE = (2, 1, 2, 3)
CHURN = {"s_churn": 3.0, "s_noise": 1.003}
OPTIONS = {"eta": 0.6, "s_noise": 1.01}

# function, options, why
CASES = {
    "euler": ("euler", {}, "default"),
    "euler-churn": ("euler", CHURN, "noise at every level"),
    "euler-window": ("euler", {"s_churn": 3.0, "s_tmin": 0.3, "s_tmax": 5.0}, "at some levels"),
    "heun": ("heun", {}, "default"),
    "heun-churn": ("heun", CHURN, "two stages from a churned state"),
    "dpm_2": ("dpm_2", {}, "default"),
    "dpm_2-churn": ("dpm_2", CHURN, "a stage between levels, from a churned state"),
    "euler_ancestral": ("euler_ancestral", {}, "default"),
    "euler_ancestral-options": ("euler_ancestral", OPTIONS, "options"),
    "euler_ancestral-ode": ("euler_ancestral", {"eta": 0.0}, "noise of weight 0 is asked for"),
    "dpm_2_ancestral": ("dpm_2_ancestral", {}, "default"),
    "dpm_2_ancestral-options": ("dpm_2_ancestral", OPTIONS, "options"),
    "dpm_2_ancestral-capped": ("dpm_2_ancestral", {"eta": 2.7}, "steps to 0, without noise"),
    "dpmpp_2s_ancestral": ("dpmpp_2s_ancestral", {}, "default"),
    "dpmpp_2s_ancestral-options": ("dpmpp_2s_ancestral", OPTIONS, "options"),
    "dpmpp_2s_ancestral-capped": ("dpmpp_2s_ancestral", {"eta": 2.7}, "steps to 0, with noise"),
    "lms": ("lms", {}, "default: three slopes of before"),
    "lms-2": ("lms", {"order": 2}, "one slope of before"),
    "dpmpp_sde": ("dpmpp_sde", {}, "two overlapping draws a step"),
    "dpmpp_sde-options": ("dpmpp_sde", {**OPTIONS, "r": 0.3}, "another stage"),
    "dpmpp_sde-ode": ("dpmpp_sde", {"eta": 0.0}, "noise of weight 0 is asked for"),
    "dpmpp_2m": ("dpmpp_2m", {}, "default"),
    "dpmpp_2m_sde": ("dpmpp_2m_sde", {}, "default"),
    "dpmpp_2m_sde-heun": ("dpmpp_2m_sde", {**OPTIONS, "solver_type": "heun"}, "options"),
    "dpmpp_2m_sde-ode": ("dpmpp_2m_sde", {"eta": 0.0}, "no noise is asked for"),
    "dpmpp_3m_sde": ("dpmpp_3m_sde", {}, "default"),
    "dpmpp_3m_sde-options": ("dpmpp_3m_sde", OPTIONS, "options"),
    "dpmpp_3m_sde-ode": ("dpmpp_3m_sde", {"eta": 0.0}, "no noise is asked for"),
}

# levels, why
SIGMAS = {
    "karras-10": (K.get_sigmas_karras(10, 0.03, 14.6), "what most people use, 0 at its end"),
    "exponential-10": (K.get_sigmas_exponential(10, 0.03, 14.6)[:-1], "no 0 at the end"),
    "karras-50": (K.get_sigmas_karras(50, 0.03, 14.6), "many steps"),
    "karras-2": (K.get_sigmas_karras(2, 0.03, 14.6), "one step from end to end, then 0"),
    "karras-1": (K.get_sigmas_karras(1, 0.5, 14.6), "one step to clean data"),
}


def lone_step(function, sigmas):
    """k-diffusion 0.1.1 raises UnboundLocalError: the h of a lone last step."""
    return function in ("dpmpp_2m_sde", "dpmpp_3m_sde") and len(sigmas) == 2 and sigmas[-1] == 0


def _mixture(dtype):
    generator = torch.Generator().manual_seed(3)
    means = torch.randn(4, 6, dtype=torch.float64, generator=generator)
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    return GaussianMixture(weights.to(dtype), means.to(dtype), torch.full((4,), 0.05, dtype=dtype))


def by_mixture(x, sigma, **_):
    """The exact denoiser of a mixture of Gaussians, in the dtype of x."""
    flat = _mixture(x.dtype).denoise(x.flatten(1), 1.0, sigma)
    return flat.view_as(x)


_WEIGHT = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def by_network(x, sigma, shift=0.0, **_):
    """A smooth function of x and sigma, in the dtype of x, that is no denoiser of anything."""
    level = sigma.view(-1, *[1] * (x.dim() - 1))
    mixed = (x / (1 + level)).flatten(1) @ (_WEIGHT.to(x.dtype) / 3)
    return torch.tanh(mixed.view_as(x) + torch.cos(level) + shift)


def by_exact_network(x, sigma, **_):
    """`by_network`, its answer rounded once: what is lost is lost by the sampler."""
    return by_network(x.double(), sigma.double()).to(x.dtype)


class Answers:
    """Answers by the number of the call, whatever is asked: an error of the state meets no slope of
    a model that would make it larger or smaller."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x, sigma, **_):
        self.calls += 1
        generator = torch.Generator().manual_seed(900 + self.calls)
        return torch.randn(x.shape, generator=generator).to(x.dtype)


MODELS = {"mixture": by_mixture, "network": by_network}


def start(sigmas, dtype=torch.float64, shape=SHAPE):
    """float32 numbers of the first level's size."""
    generator = torch.Generator().manual_seed(5)
    return (torch.randn(shape, generator=generator) * float(sigmas[0])).to(dtype)


class Sampler:
    """A noise sampler: float32 numbers by count of calls, rounded to `rounded` if given, then in
    `dtype`; it keeps its spans."""

    def __init__(self, dtype, shape=SHAPE, rounded=torch.float32):
        self.spans, self._dtype, self._shape, self._rounded = [], dtype, shape, rounded

    def __call__(self, sigma=None, sigma_next=None):
        generator = torch.Generator().manual_seed(100 + len(self.spans))
        self.spans.append((sigma, sigma_next))
        made = torch.randn(self._shape, generator=generator)
        return made.to(self._rounded).to(self._dtype)


def takes_sampler(function):
    return "noise_sampler" in inspect.signature(getattr(K, f"sample_{function}")).parameters


def both(function):
    """k-diffusion's function and ours."""
    return getattr(k_sampling(), f"sample_{function}"), getattr(K, f"sample_{function}")


def ran(f, function, model, x, sigmas, options, rounded=torch.float32):
    """A function's result on noise that `Sampler` makes, whoever asks for it."""
    sampler = Sampler(x.dtype, x.shape, rounded)
    more = {"noise_sampler": sampler} if takes_sampler(function) else {}
    with pytest.MonkeyPatch.context() as patch:
        for module in (torch, k_noise):  # theirs and ours
            patch.setattr(module, "randn_like", lambda _: sampler())
        return f(model, x, sigmas, disable=True, **options, **more)
