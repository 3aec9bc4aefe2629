"""A model for ComfyUI's samplers, the same one for their transcriptions, and how to run both."""

from __future__ import annotations

import math
import sys

import fake_comfy
import numpy as np
import oracles
import torch

import fastdiff
from fastdiff.integrations.comfyui import sampler_function

SHAPE = (2, 3, 4, 4)
MIX = torch.from_numpy(np.random.default_rng(3).normal(size=(4, 4)) / 4)
CFG = 1.7
SEED = 7

# name of the space: (model's sampling, reason)
SPACES = {
    "ve": (lambda: fake_comfy.sampling_of("eps"), "x0 + sigma*noise, SD's table"),
    "edm": (lambda: fake_comfy.sampling_of("edm"), "the same over five decades"),
    "flow": (lambda: fake_comfy.sampling_of("flow", 3.0), "(1-t)*x0 + t*noise, from t = 1"),
}


def denoise(x, sigma, cond):
    """A bounded, nonlinear guess of x0, in the dtype of x."""
    level = sigma.reshape(-1, *[1] * (x.ndim - 1)).to(x)
    phase = torch.log1p(level) + (0.7 if cond == "negative" else 0.0)
    return torch.tanh(x / (1 + level) @ MIX.to(x) + torch.cos(phase)) + 0.3 * torch.sin(phase)


def levels(space, steps):
    """Float32 levels of ComfyUI's "simple" on the model, the last 0."""
    return fake_comfy.simple_scheduler(SPACES[space][0](), steps)


def guider_of(sampling, cfg=CFG, denoiser=denoise):
    return fake_comfy.CFGGuider(fake_comfy.ModelPatcher(fake_comfy.Model(sampling, denoiser)), cfg)


def start(space, sigmas, dtype=torch.float64):
    noise = torch.from_numpy(np.random.default_rng(11).normal(size=SHAPE)).to(dtype)
    scale = float(sigmas[0])
    return noise * (math.hypot(1, scale) if space != "flow" else scale)


def run(name, space, sigmas, *, x=None, callback=None, seed=SEED, **options):
    """A sampler function called as KSAMPLER does, in float64 unless x says otherwise."""
    sampling = SPACES[space][0]()
    model = fake_comfy.Inpaint(guider_of(sampling), sigmas, None, None)
    extra = {"model_options": {}, "seed": seed, "denoise_mask": None}
    x = start(space, sigmas) if x is None else x
    return sampler_function(name)(
        model, x, sigmas, extra_args=extra, callback=callback, disable=True, **options
    )


def network(cond):
    """The model in NumPy: the guided prediction for None."""

    def call(x, t):
        given = (
            torch.from_numpy(np.ascontiguousarray(x)),
            torch.full((len(x),), t, dtype=torch.float64),
        )
        if cond is None:
            u, c = denoise(*given, "negative"), denoise(*given, "positive")
            return (u + (c - u) * CFG).numpy()
        return denoise(*given, cond).numpy()

    return call


def problem(kind, sigmas, noise):
    """What a transcription works on: "flow" with alpha = 1 - t, "edm" with alpha = 1."""
    t = sigmas.double().numpy() if isinstance(sigmas, torch.Tensor) else np.array(sigmas)
    alphas = 1 - t if kind == "flow" else np.ones_like(t)
    return oracles.Problem(
        times=t, alphas=alphas, sigmas=t, network=network(None), prediction="sample", noise=noise,
        kind=kind, uncond=network("negative"),
        time_of=(lambda level: level / (1 + level)) if kind == "flow" else (lambda level: level),
        scales_at=lambda s: (1 - s if kind == "flow" else 1.0, s),
    )  # fmt: skip


class Drawn:
    """Normals in the order in which they are asked for: the same to both sides."""

    def __init__(self):
        self.rows, self.count = {}, 0

    def number(self, k):
        return np.random.default_rng((5, k)).normal(size=SHAPE)

    def oracle(self, kind, row):
        """A transcription's, whose rows ask in order but name the row."""
        return self.number(self.rows.setdefault((kind, row), len(self.rows)))

    def next(self, *_):
        self.count += 1
        return torch.from_numpy(self.number(self.count - 1))

    def put_in(self, monkeypatch):
        """In the place of ComfyUI's generator, of its tree and of torch's."""
        sampling = sys.modules["comfy.k_diffusion.sampling"]
        monkeypatch.setattr(sampling, "default_noise_sampler", lambda x, seed=None: self.next)
        monkeypatch.setattr(
            sampling, "BrownianTreeNoiseSampler", lambda *_, seed=None, cpu=False: self.next
        )
        monkeypatch.setattr(torch, "randn_like", self.next)


def same_bits(run_once):
    """What the kernel and the readable reference give, which must be the same bits."""
    got = run_once()
    with fastdiff.use_backend("reference"):
        want = run_once()
    assert torch.equal(got, want)
    return got
