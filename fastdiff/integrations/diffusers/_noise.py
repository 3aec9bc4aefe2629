"""Noise of the drop-in schedulers: diffusers' own, or counter-based by seed."""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fastdiff.integrations._brownian_tree import BrownianTreeNoiseSampler
from fastdiff.integrations._torch_noise import fill_, randn
from fastdiff.ops.brownian import brownian
from fastdiff.ops.noise import as_seeds
from fastdiff.path_noise import PATH

_FAST = (torch.float32, torch.bfloat16, torch.float16)
SOURCES = ("generator", "counter")


def initial_seeds(generator: Any) -> int | tuple[int, ...] | None:
    """The seed of a generator, those of several, or None without."""
    several = isinstance(generator, (list, tuple))
    for one in generator if several else (generator,):
        if not isinstance(one, torch.Generator) and (several or one is not None):
            raise TypeError(
                "step: generator must be a torch.Generator or a list of them, "
                f"got {'one of ' if several else ''}{type(one).__name__}"
            )
    if several:
        return tuple([one.initial_seed() % 2**64 for one in generator])
    return None if generator is None else generator.initial_seed() % 2**64


def seeds_of(initial: int | tuple[int, ...] | None, samples: int) -> Tensor:
    """(N,) seeds: of several generators their own, of one the seed s and s+1, s+2, ... behind it.

    Without a generator torch's global one draws a seed.

    Args:
        initial: from `initial_seeds`.
        samples: N.
    """
    if isinstance(initial, tuple):
        return as_seeds(initial, samples)
    if initial is None:
        return as_seeds(int(torch.randint(2**62, ())), samples)
    return as_seeds([(initial + i) % 2**64 for i in range(samples)], samples)


class CounterPath:
    """A noise sampler like diffusers' Brownian tree, on the library's own path.

    Args:
        seeds: (N,) int64, one path each.
        like: (N, *S), shape and device of the noise.
    """

    def __init__(self, seeds: Tensor, like: Tensor) -> None:
        self.seeds, self.shape, self.device = seeds, like.shape[1:], like.device

    def __call__(self, sigma: Any, sigma_next: Any) -> Tensor:
        ends = (PATH["low"], PATH["high"])
        at = [
            min(max(-2 * math.log2(s), ends[0]), ends[1]) if s > 0 else ends[1]
            for s in (float(sigma), float(sigma_next))
        ]
        return brownian(self.seeds, self.shape, *at, **PATH, device=self.device)


def brownian_tree(scheduler: Any, generator: Any, sample: Tensor, model_output: Tensor) -> Any:
    """Draws like the noise sampler that diffusers' step would make at its first call."""
    from diffusers.schedulers import CosineDPMSolverMultistepScheduler

    if isinstance(scheduler, CosineDPMSolverMultistepScheduler):
        seed = None
        if generator is not None:
            several = isinstance(generator, list)
            seed = [g.initial_seed() for g in generator] if several else generator.initial_seed()
        config = scheduler.config
        # of the predicted clean data, which both go into
        like = model_output.to(torch.promote_types(sample.dtype, model_output.dtype))
        return BrownianTreeNoiseSampler(like, config.sigma_min, config.sigma_max, seed)
    sigmas = scheduler.sigmas
    ends = float(sigmas[sigmas > 0].min()), float(sigmas.max())
    return BrownianTreeNoiseSampler(sample, *ends, scheduler.noise_sampler_seed)


def drawn(like: Tensor, generator: Any, dtype: torch.dtype) -> Tensor:
    """(N, *S) noise on the device of ``like``, the bits that diffusers' `randn_tensor` draws."""
    if like.is_cpu and dtype in _FAST and like.dim():
        if not isinstance(generator, list):
            return randn(like.shape, generator, dtype)
        if len(generator) == len(like):
            noise = torch.empty(like.shape, dtype=dtype)
            for sample, own in zip(noise, generator, strict=True):
                fill_(sample, own)
            return noise
    theirs: Tensor = randn_tensor(like.shape, generator=generator, device=like.device, dtype=dtype)
    return theirs
