"""The process of guided-diffusion over the timesteps that are kept: its moments, in PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdiff.integrations._torch_noise import randn_like
from fastdiff.schedules import Schedule
from fastdiff.solvers._checks import choice
from fastdiff.solvers._walk import Point, x0_conversion
from fastdiff.table import StepTable

Model = Callable[..., Tensor]

PREDICTIONS = ("epsilon", "sample", "v_prediction")
VARIANCES = ("fixed_small", "fixed_large", "learned_range")


class Process:
    """See `fastdiff.integrations.guided_diffusion.GaussianDiffusion`."""

    def __init__(
        self,
        schedule: Schedule,
        timesteps: Iterable[int] | None = None,
        *,
        prediction: str = "epsilon",
        variance: str = "fixed_large",
        rescale_timesteps: bool = False,
    ) -> None:
        if schedule.alphas_cumprod is None:
            raise ValueError(
                f"GaussianDiffusion: schedule must be discrete, got kind {schedule.kind!r}"
            )
        choice("prediction", prediction, PREDICTIONS, "GaussianDiffusion")
        choice("variance", variance, VARIANCES, "GaussianDiffusion")
        self.schedule, self.prediction, self.variance = schedule, prediction, variance
        self.rescale_timesteps = rescale_timesteps
        self.original_num_steps = len(schedule.alphas_cumprod)
        kept = range(self.original_num_steps) if timesteps is None else timesteps
        self.timestep_map = sorted(set(kept))
        self.num_timesteps = len(self.timestep_map)
        if self.num_timesteps < 2:
            raise ValueError(
                f"GaussianDiffusion: timesteps must be at least two, got {self.timestep_map}"
            )
        abar = schedule.alphas_cumprod[self.timestep_map]
        prev = np.append(1.0, abar[:-1])
        betas = 1 - abar / prev
        self.betas, self.alphas_cumprod, self.alphas_cumprod_prev = betas, abar, prev
        self.alphas_cumprod_next = np.append(abar[1:], 0.0)
        self.posterior_variance = betas * (1 - prev) / (1 - abar)
        # the first is 0, whose logarithm nothing could be done with
        self.posterior_log_variance_clipped = np.log(
            np.append(self.posterior_variance[1], self.posterior_variance[1:])
        )
        self.posterior_mean_coef1 = betas * np.sqrt(prev) / (1 - abar)
        self.posterior_mean_coef2 = (1 - prev) * np.sqrt(abar / prev) / (1 - abar)
        self._points = [
            Point(float(t), math.sqrt(a), math.sqrt(1 - a))
            for t, a in zip(self.timestep_map, abar.tolist(), strict=True)
        ]
        # algorithm 2 of Dhariwal and Nichol 2021: epsilon - sigma * gradient, seen from x0
        self._score_to_x0 = np.array([at.sigma**2 / at.alpha for at in self._points])
        self._tables: dict[tuple[str, float, str, bool], StepTable] = {}
        self._to_x0 = np.array([x0_conversion(prediction, at, 1.0) for at in self._points])

    # --- the forward process ----------------------------------------------------------------

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log variance of q(x_t | x_0), shape of x_start."""
        variance = self._at(1 - self.alphas_cumprod, t, x_start).expand_as(x_start)
        mean = self._at(np.sqrt(self.alphas_cumprod), t, x_start) * x_start
        return mean, variance, variance.log()

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """A draw from q(x_t | x_0); ``noise`` None: from torch's global generator."""
        noise = randn_like(x_start) if noise is None else noise
        a, s = np.sqrt(self.alphas_cumprod), np.sqrt(1 - self.alphas_cumprod)
        return self._at(a, t, x_start) * x_start + self._at(s, t, x_start) * noise

    def q_posterior_mean_variance(
        self, x_start: Tensor, x_t: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and clipped log variance of q(x_{t-1} | x_t, x_0), shape of x_t."""
        mean = self._at(self.posterior_mean_coef1, t, x_t) * x_start
        mean = mean + self._at(self.posterior_mean_coef2, t, x_t) * x_t
        variance = self._at(self.posterior_variance, t, x_t).expand_as(x_t)
        clipped = self._at(self.posterior_log_variance_clipped, t, x_t).expand_as(x_t)
        return mean, variance, clipped

    # --- one step ---------------------------------------------------------------------------

    def p_mean_variance(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """ "mean", "variance" and "log_variance" of p(x_{t-1} | x_t), and "pred_xstart", the
        predicted x0, changed by ``denoised_fn`` and then clipped to [-1, 1]; in plain PyTorch.

        The fixed large variance is beta, but at t = 0, where it is the posterior's of t = 1.
        """
        output, values = self._evaluate(model, x, t, model_kwargs)
        p, q = self._to_x0.T
        x0 = self._at(p, t, x) * x + self._at(q, t, x) * output.to(x.dtype)
        x0 = x0 if denoised_fn is None else denoised_fn(x0)
        x0 = x0.clamp(-1, 1) if clip_denoised else x0
        mean = self.q_posterior_mean_variance(x0, x, t)[0]
        variance, log_variance = self._variance(values, t, x)
        return {
            "mean": mean, "variance": variance, "log_variance": log_variance, "pred_xstart": x0,
        }  # fmt: skip

    # --- what a step asks of it -------------------------------------------------------------

    def _evaluate(
        self, model: Model, x: Tensor, t: Tensor, model_kwargs: Mapping[str, Any] | None
    ) -> tuple[Tensor, Tensor | None]:
        """The model's prediction and, where it is learned, its variance output."""
        output = model(x, self._timesteps(t), **(model_kwargs or {}))
        if self.variance != "learned_range":
            return output, None
        doubled = (x.shape[0], 2 * x.shape[1], *x.shape[2:])
        if output.shape != doubled:
            raise ValueError(
                f"GaussianDiffusion: model output must have shape {doubled} for a learned "
                f"variance, got {tuple(output.shape)}"
            )
        output, values = output.chunk(2, dim=1)
        return output, values

    def _timesteps(self, t: Tensor) -> Tensor:
        """The original timesteps, as the model is given them."""
        original = torch.tensor(self.timestep_map, device=t.device)[t.long()]
        if self.rescale_timesteps:
            return original.float() * (1000.0 / self.original_num_steps)
        return original

    def _variance(self, values: Tensor | None, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Variance and log variance of the ancestral step, shape of x."""
        small = self._at(self.posterior_log_variance_clipped, t, x)
        if self.variance == "fixed_small":  # 0 at t = 0, where its logarithm is clipped
            variance = self._at(self.posterior_variance, t, x)
            return variance.expand_as(x), small.expand_as(x)
        if values is None:
            large = np.append(self.posterior_variance[1], self.betas[1:])
            variance = self._at(large, t, x).expand_as(x)
            return variance, variance.log()
        share = (values.to(x.dtype) + 1) / 2  # of log beta
        log_variance = share * self._at(np.log(self.betas), t, x) + (1 - share) * small
        return log_variance.exp(), log_variance

    def _at(self, values: NDArray[np.float64], t: Tensor, like: Tensor) -> Tensor:
        """One value a sample, in the dtype of ``like`` and shaped to broadcast over it."""
        column = torch.from_numpy(values).to(like.device)[t.long()].to(like.dtype)
        return column.view(-1, *[1] * (like.dim() - 1))
