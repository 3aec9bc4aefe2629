"""Sampling in the words of guided-diffusion and improved-diffusion, on tables and the fused step.

`create_gaussian_diffusion` takes the arguments of theirs, and what it returns has their sampling
methods with their argument names and dictionaries (Ho et al. 2020, arXiv:2006.11239; Nichol and
Dhariwal 2021, arXiv:2102.09672; Dhariwal and Nichol 2021, arXiv:2105.05233). Noise comes from
torch's global generator, drawn where and when they draw it, also where it is of no effect, so that
a picture stays and so does what is drawn after it; with ``seeds`` it is `fastdiff.randn`'s, and
image i depends on seed i alone. A step is one pass of `ops.reverse_step`, and one more where
``pred_xstart`` is returned; with a ``denoised_fn`` or a ``cond_fn`` it is plain PyTorch.

Left out: losses and likelihoods (``training_losses``, ``calc_bpd_loop``), and models that predict
x_{t-1} or a variance without bounds, which ``create_gaussian_diffusion`` never made.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate, islice, repeat
from typing import Any

import torch
from torch import Tensor

from fastdiff import schedules
from fastdiff.integrations._guided_process import Model
from fastdiff.integrations._guided_steps import Call, Steps
from fastdiff.solvers._checks import choice

__all__ = ["GaussianDiffusion", "create_gaussian_diffusion", "space_timesteps"]


def space_timesteps(num_timesteps: int, section_counts: str | Sequence[int]) -> set[int]:
    """Timesteps to keep of 0 ... num_timesteps - 1.

    Args:
        section_counts: how many of each of as many equal sections, evenly spaced with both ends:
            numbers, or a string such as "250" or "10,20,30", late sections last. "ddim50": 50 in
            all, by one whole stride from 0 (Song et al. 2021, arXiv:2010.02502).

    Raises:
        ValueError: no such timesteps.
    """
    counts, rule = section_counts, "be like '250', '10,20,30' or 'ddim50'"
    if isinstance(counts, str):
        whole = counts.startswith("ddim")
        try:
            counts = [int(part) for part in counts.removeprefix("ddim").split(",")]
        except ValueError:
            counts = []
        if whole and len(counts) == 1:
            for stride in range(1, num_timesteps):
                if -(-num_timesteps // stride) == counts[0]:
                    return set(range(0, num_timesteps, stride))
        if whole:
            counts, rule = [], f"name after 'ddim' what a whole stride over {num_timesteps} gives"
    if not counts:
        raise ValueError(f"space_timesteps: section_counts must {rule}, got {section_counts!r}")
    size, longer = divmod(num_timesteps, len(counts))
    kept: set[int] = set()
    start = 0
    for i, count in enumerate(counts):
        length = size + (i < longer)
        if not 0 <= count <= length:
            raise ValueError(
                f"space_timesteps: section_counts must be within the {length} steps of their "
                f"section, got {count}"
            )
        gap = (length - 1) / (count - 1) if count > 1 else 1.0
        # summed up, not multiplied: halves are rounded as the sum's last bit has it
        sums = islice(accumulate(repeat(gap), initial=0.0), count)
        kept.update(start + round(at) for at in sums)
        start += length
    return kept


def create_gaussian_diffusion(
    *,
    steps: int = 1000,
    learn_sigma: bool = False,
    sigma_small: bool = False,
    noise_schedule: str = "linear",
    use_kl: bool = False,
    predict_xstart: bool = False,
    rescale_timesteps: bool = False,
    rescale_learned_sigmas: bool = False,
    timestep_respacing: str | Sequence[int] = "",
) -> GaussianDiffusion:
    """The diffusion of ``script_util.create_gaussian_diffusion``.

    Args:
        steps: timesteps that the model was trained with.
        learn_sigma: the model's output has twice the channels, the second half of which places
            the variance between the two fixed ones.
        sigma_small: fixed variance beta~ in place of beta.
        noise_schedule: "linear" (betas scaled by 1000 / steps) or "cosine".
        use_kl, rescale_learned_sigmas: choose a loss; nothing here depends on them.
        predict_xstart: the model predicts x0, not the noise.
        rescale_timesteps: the model is given float timesteps of [0, 1000).
        timestep_respacing: as `space_timesteps`; "" keeps all.

    Raises:
        ValueError: an argument breaks its rule.
    """
    where = "create_gaussian_diffusion"
    choice("noise_schedule", noise_schedule, ("linear", "cosine"), where)
    schedule = (
        schedules.cosine(steps)
        if noise_schedule == "cosine"
        else schedules.linear(steps, 0.1 / steps, 20 / steps)
    )
    fixed = "fixed_small" if sigma_small else "fixed_large"
    return GaussianDiffusion(
        schedule,
        space_timesteps(steps, timestep_respacing or [steps]),
        prediction="sample" if predict_xstart else "epsilon",
        variance="learned_range" if learn_sigma else fixed,
        rescale_timesteps=rescale_timesteps,
    )


class GaussianDiffusion(Steps):
    """Ancestral and implicit sampling over some timesteps of a discrete schedule.

    Methods take x (N, C, ...) float32 (float64 on the reference backend) and t (N,) integers, the
    index among the timesteps that are kept, 0 the least noisy; the model and ``cond_fn`` are called
    with the original timesteps, as ``model(x, timesteps, **model_kwargs)``.

    Args:
        schedule: discrete, with the timesteps that the model was trained on.
        timesteps: those to keep, at least two; None: all.
        prediction: "epsilon", "sample" or "v_prediction".
        variance: of the ancestral step, as in the solver "ddpm": "fixed_small", "fixed_large" or
            "learned_range", for a model with twice the channels.
        rescale_timesteps: the model is given float timesteps of [0, 1000).

    Attributes:
        num_timesteps, timestep_map, original_num_steps: how many are kept, which, of how many.
        betas, alphas_cumprod, alphas_cumprod_prev, alphas_cumprod_next, posterior_variance,
        posterior_log_variance_clipped, posterior_mean_coef1, posterior_mean_coef2: (num_timesteps,)
            float64, of the kept timesteps.

    Raises:
        ValueError: an argument breaks its rule.
    """

    def p_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: Model | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        *,
        seeds: Any = None,
    ) -> dict[str, Tensor]:
        """One ancestral step, from t to t - 1; a sample at t = 0 gets no noise.

        Args:
            x, t: see the class; the samples may stand at different t.
            clip_denoised: clip the predicted x0 to [-1, 1].
            denoised_fn: changes the predicted x0 before that.
            cond_fn: gradient of log p(y | x), called like the model.
            model_kwargs: of the model and of ``cond_fn``.
            seeds: None: noise from torch's global generator; else as in `Sampler`.

        Returns:
            "sample" and "pred_xstart", shape of x.

        Raises:
            TypeError, ValueError: an argument breaks its rule.
        """
        call = Call(model, clip_denoised, denoised_fn, cond_fn, model_kwargs or {})
        return self._step("ddpm", 0.0, call, x, t, seeds)

    def ddim_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: Model | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        eta: float = 0.0,
        *,
        seeds: Any = None,
    ) -> dict[str, Tensor]:
        """One step of DDIM with a share ``eta`` of fresh noise, the noise derived from the clipped
        x0; else as `p_sample`."""
        call = Call(model, clip_denoised, denoised_fn, cond_fn, model_kwargs or {})
        return self._step("ddim", eta, call, x, t, seeds)

    def ddim_reverse_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        eta: float = 0.0,
    ) -> dict[str, Tensor]:
        """One step of DDIM upwards, from t to t + 1, evaluated at t; above the last timestep lies
        pure noise. ``eta`` must be 0."""
        if eta != 0.0:
            raise ValueError(f"ddim_reverse_sample: eta must be 0, got {eta}")
        call = Call(model, clip_denoised, denoised_fn, None, model_kwargs or {})
        return self._step("reverse", 0.0, call, x, t, None)

    # --- whole loops ------------------------------------------------------------------------

    def p_sample_loop(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: Model | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        *,
        seeds: Any = None,
    ) -> Tensor:
        """Samples by ancestral sampling over all kept timesteps, without gradients.

        Args:
            shape: (N, C, ...) of the batch.
            noise: the initial x; None: drawn.
            device: of the samples; None: of ``noise`` or of the model's first parameter.
            progress: show a progress bar.
            seeds: None: every draw from torch's global generator; else as in `Sampler`.
            others: as `p_sample`.

        Returns:
            The last "sample", of the given shape.
        """
        call = Call(model, clip_denoised, denoised_fn, cond_fn, model_kwargs or {})
        steps = self._loop("ddpm", 0.0, call, shape, noise, device, progress, seeds, False)
        return deque(steps, maxlen=1)[0]["sample"]

    def p_sample_loop_progressive(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: Model | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        *,
        seeds: Any = None,
    ) -> Iterator[dict[str, Tensor]]:
        """Yields what `p_sample` returns at each timestep; arguments as `p_sample_loop`."""
        call = Call(model, clip_denoised, denoised_fn, cond_fn, model_kwargs or {})
        return self._loop("ddpm", 0.0, call, shape, noise, device, progress, seeds, True)

    def ddim_sample_loop(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: Model | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
        *,
        seeds: Any = None,
    ) -> Tensor:
        """Samples by DDIM; ``eta`` as `ddim_sample`, the rest as `p_sample_loop`."""
        call = Call(model, clip_denoised, denoised_fn, cond_fn, model_kwargs or {})
        steps = self._loop("ddim", eta, call, shape, noise, device, progress, seeds, False)
        return deque(steps, maxlen=1)[0]["sample"]

    def ddim_sample_loop_progressive(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: Model | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
        *,
        seeds: Any = None,
    ) -> Iterator[dict[str, Tensor]]:
        """Yields what `ddim_sample` returns at each timestep; arguments as `ddim_sample_loop`."""
        call = Call(model, clip_denoised, denoised_fn, cond_fn, model_kwargs or {})
        return self._loop("ddim", eta, call, shape, noise, device, progress, seeds, True)
