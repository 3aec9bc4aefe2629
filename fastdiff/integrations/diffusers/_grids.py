"""Grids that diffusers makes wrongly, or not at all, made as they are meant.

As with the steps (`_mended`): always where diffusers gives NaN or an exception, and by
``corrected=True`` where it gives a picture.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import FrozenDict
from torch import Tensor

_EDM = frozenset(
    ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "CosineDPMSolverMultistepScheduler")
)


def grid_methods(peer: Any) -> dict[str, Any]:
    """Methods of the drop-in for a class of diffusers that stand before its own."""
    found: dict[str, Any] = {"set_timesteps": _set_timesteps(peer)}
    if hasattr(peer, "stretch_shift_to_terminal"):
        found["stretch_shift_to_terminal"] = _stretch(peer)
    if peer.__name__ in _EDM:
        found["init_noise_sigma"] = property(_init_noise_sigma(peer))
    return found


def _stretch(peer: Any) -> Callable[..., Any]:
    @functools.wraps(peer.stretch_shift_to_terminal)
    def stretch_shift_to_terminal(self: Any, t: Any) -> Any:
        # one step begins at 1, and what is to be stretched to the terminal has no length
        return t if float(t[-1]) == 1 else peer.stretch_shift_to_terminal(self, t)

    return stretch_shift_to_terminal


def _init_noise_sigma(peer: Any) -> Callable[[Any], Any]:
    def init_noise_sigma(self: Any) -> Any:
        """Karras et al. 2022 (arXiv:2206.00364), algorithm 1: noise alone, without data in it."""
        if self.config.get("corrected", False):
            return self.config.sigma_max
        return peer.init_noise_sigma.fget(self)

    return init_noise_sigma


def _set_timesteps(peer: Any) -> Callable[..., Any]:
    @functools.wraps(peer.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
        config, name = self._internal_dict, peer.__name__
        one = (args[0] if args else kwargs.get("num_inference_steps")) == 1
        if one and name == "UnCLIPScheduler":
            # its spacing divides by steps - 1
            self.num_inference_steps = 1
            device = args[1] if len(args) > 1 else kwargs.get("device")
            self.timesteps = torch.tensor([config.num_train_timesteps - 1], device=device)
            return None
        if not (
            one and config.get("corrected", False) and config.get("timestep_spacing") == "linspace"
        ):
            result = peer.set_timesteps(self, *args, **kwargs)
        else:
            # both ends are one point, which has to be the noisiest: numpy takes the first
            self._internal_dict = FrozenDict({**config, "timestep_spacing": "trailing"})
            try:
                result = peer.set_timesteps(self, *args, **kwargs)
            finally:
                self._internal_dict = config
        if name == "KDPM2AncestralDiscreteScheduler":
            _ancestral_levels(self)
        return result

    return set_timesteps


def _ancestral_levels(scheduler: Any) -> None:
    """Levels below those of an ancestral step, where float32 has lost them in a difference.

    sigma_down^2 = sigma_next^2 - sigma_up^2 is sigma_next^4 / sigma^2.
    """
    if bool(
        torch.isfinite(scheduler.sigmas_down).all() & torch.isfinite(scheduler.timesteps).all()
    ):
        return
    device = scheduler.sigmas.device
    levels = scheduler.sigmas.detach().cpu().double()
    sigma = torch.cat([levels[:1], levels[1:-1:2]])  # each but the first stands twice
    then = torch.cat([sigma[1:], sigma.new_zeros(1)])
    down = torch.where(sigma > 0, then**2 / sigma, 0.0)
    up = (then**2 - down**2).clamp(min=0).sqrt()
    middle = (sigma.log().lerp(down.log(), 0.5)).exp()
    middle[-2:] = 0.0

    def twice(values: Tensor) -> Tensor:
        laid = torch.cat([values[:1], values[1:].repeat_interleave(2), values[-1:]])
        return laid.float().to(device)

    scheduler.sigmas_down, scheduler.sigmas_up = twice(down), twice(up)
    scheduler.sigmas_interpol = twice(middle)
    known = scheduler.log_sigmas.cpu()
    times = [scheduler._sigma_to_t(s.float(), known) for s in middle[:-2]]
    scheduler.timesteps[1::2] = torch.from_numpy(np.array(times)).to(scheduler.timesteps)
