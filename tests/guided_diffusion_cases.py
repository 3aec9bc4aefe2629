"""The diffusions that guided-diffusion's users make, each with its transcription."""

from __future__ import annotations

import numpy as np
import torch
from guided_diffusion_oracle import Oracle

from fastdiff.integrations.guided_diffusion import create_gaussian_diffusion, space_timesteps

SHAPE = (2, 3, 4, 5)
STEPS = 60

# arguments of create_gaussian_diffusion, and why
CASES = {
    "default": ({}, "noise prediction, the large fixed variance"),
    "small": ({"sigma_small": True}, "the other fixed variance"),
    "learned": ({"learn_sigma": True}, "a variance by element"),
    "x0": ({"predict_xstart": True}, "the other prediction"),
    "cosine": ({"noise_schedule": "cosine", "learn_sigma": True}, "the other betas, clipped"),
    "rescaled": ({"rescale_timesteps": True}, "float timesteps"),
    "sections": ({"timestep_respacing": "5,10,7", "learn_sigma": True}, "uneven steps"),
    "stride": ({"timestep_respacing": "ddim12", "rescale_timesteps": True}, "DDIM's steps"),
    "listed": ({"timestep_respacing": [9], "sigma_small": True}, "counts as numbers"),
    "losses": ({"use_kl": True, "rescale_learned_sigmas": True}, "what only training reads"),
}


def make(case):
    options = CASES[case][0]
    kept = space_timesteps(STEPS, options.get("timestep_respacing") or [STEPS])
    fixed = "fixed_small" if options.get("sigma_small") else "fixed_large"
    oracle = Oracle(
        options.get("noise_schedule", "linear"),
        STEPS,
        kept,
        options.get("predict_xstart", False),
        "learned_range" if options.get("learn_sigma") else fixed,
        options.get("rescale_timesteps", False),
    )
    return create_gaussian_diffusion(steps=STEPS, **options), oracle


def model_of(diffusion):
    """Bounded, elementwise and nonlinear; its variance output runs beyond [-1, 1]."""

    def model(x, t, shift=0.0):
        h = torch.tanh(0.8 * x + torch.cos(t.to(x.dtype)).view(-1, 1, 1, 1) + shift)
        if diffusion.variance == "learned_range":
            return torch.cat([h, 1.2 * torch.sin(3 * x)], dim=1)
        return h

    return model


def start(dtype=torch.float64):
    return torch.from_numpy(np.random.default_rng(5).normal(size=SHAPE)).to(dtype)


def numpy_of(tensors):
    return [t.numpy() for t in tensors]
