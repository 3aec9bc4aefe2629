"""k-diffusion's wrappers: networks that predict noise or v as denoisers D(x, sigma).

x = x0 + sigma*noise throughout; a wrapped network sees c_in*x, of unit scale where the data has it,
and a time. Constructor arguments, methods and buffers are those of ``k_diffusion.external``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.integrations.k_diffusion._levels import append_dims, append_zero

__all__ = [
    "CompVisDenoiser",
    "CompVisVDenoiser",
    "DiscreteEpsDDPMDenoiser",
    "DiscreteSchedule",
    "DiscreteVDDPMDenoiser",
    "OpenAIDenoiser",
    "VDenoiser",
]


def _v_scalings(sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor, Tensor]:
    """(c_skip, c_out, c_in) of D = c_skip*x + c_out*v(c_in*x)."""
    total = sigma**2 + sigma_data**2
    root = total**0.5
    return sigma_data**2 / total, -sigma * sigma_data / root, 1 / root


class _V(nn.Module):
    """D and the training loss of a network that predicts v = alpha*noise - sigma*x0.

    Who inherits sets inner_model and sigma_data and has a sigma_to_t.
    """

    inner_model: Any
    sigma_data: float

    def get_scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(c_skip, c_out, c_in) at sigma (N,)."""
        return _v_scalings(sigma, self.sigma_data)

    def get_v(self, *args: Any, **kwargs: Any) -> Tensor:
        """The network's prediction."""
        return self.inner_model(*args, **kwargs)  # type: ignore[no-any-return]

    def loss(self, input: Tensor, noise: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        """(N,) mean squared error of v on data (N, *S) with noise (N, *S) at sigma (N,)."""
        skip, out, scale = (append_dims(c, input.dim()) for c in self.get_scalings(sigma))
        noised = input + append_dims(sigma, input.dim()) * noise
        v = self.get_v(noised * scale, self.sigma_to_t(sigma), **kwargs)  # type: ignore[operator]
        return ((v - (input - skip * noised) / out) ** 2).flatten(1).mean(1)

    def forward(self, input: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        """D(x, sigma), (N, *S), for x (N, *S) and sigma (N,)."""
        skip, out, scale = (append_dims(c, input.dim()) for c in self.get_scalings(sigma))
        v = self.get_v(input * scale, self.sigma_to_t(sigma), **kwargs)  # type: ignore[operator]
        return v * out + input * skip


class VDenoiser(_V):
    """Around a network v(x, t) of the cosine schedule, t in [0, 1]: v-diffusion-pytorch.

    alpha = cos(pi t/2) and sigma_vp = sin(pi t/2), so that sigma = tan(pi t/2).
    """

    def __init__(self, inner_model: Callable[..., Tensor]) -> None:
        super().__init__()
        self.inner_model = inner_model
        self.sigma_data = 1.0

    def sigma_to_t(self, sigma: Tensor) -> Tensor:
        """t of sigma, of the same shape."""
        return sigma.atan() / math.pi * 2

    def t_to_sigma(self, t: Tensor) -> Tensor:
        """sigma of t, of the same shape."""
        return (t * math.pi / 2).tan()


class DiscreteSchedule(nn.Module):
    """Levels sigma at the integer times 0 ... T-1, log(sigma) linear in between.

    Args:
        sigmas: (T,), rising.
        quantize: whether `sigma_to_t` gives the nearest integer time, as int64.
    """

    sigmas: Tensor
    log_sigmas: Tensor
    inner_model: Any

    def __init__(self, sigmas: Tensor, quantize: bool) -> None:
        super().__init__()
        self.register_buffer("sigmas", sigmas)
        self.register_buffer("log_sigmas", sigmas.log())
        self.quantize = quantize

    @property
    def sigma_min(self) -> Tensor:
        """Level at time 0, ()."""
        return self.sigmas[0]

    @property
    def sigma_max(self) -> Tensor:
        """Level at time T-1, ()."""
        return self.sigmas[-1]

    def get_sigmas(self, n: int | None = None) -> Tensor:
        """(n + 1,): levels at n times uniform in [T-1, 0], then 0; all T of them for None."""
        if n is None:
            return append_zero(self.sigmas.flip(0))
        last = len(self.sigmas) - 1
        return append_zero(self.t_to_sigma(torch.linspace(last, 0, n, device=self.sigmas.device)))

    def sigma_to_t(self, sigma: Tensor, quantize: bool | None = None) -> Tensor:
        """Time of sigma, of the same shape, within [0, T-1]; `quantize` None: as constructed."""
        logs, log = self.log_sigmas, sigma.log()
        below = torch.searchsorted(logs, log.contiguous(), right=True) - 1
        below = below.clamp(0, len(logs) - 2)
        low, high = logs[below], logs[below + 1]
        if self.quantize if quantize is None else quantize:
            return below + ((log - low).abs() > (log - high).abs())
        part = ((low - log) / (low - high)).clamp(0, 1)
        return (1 - part) * below + part * (below + 1)

    def t_to_sigma(self, t: Tensor) -> Tensor:
        """sigma of times in [0, T-1], of the same shape."""
        t = t.float()
        low, part = t.floor().long(), t.frac()
        return ((1 - part) * self.log_sigmas[low] + part * self.log_sigmas[t.ceil().long()]).exp()


def _sigmas(alphas_cumprod: Tensor) -> Tensor:
    return ((1 - alphas_cumprod) / alphas_cumprod) ** 0.5


class DiscreteEpsDDPMDenoiser(DiscreteSchedule):
    """Around a network that predicts the noise at discrete times.

    Args:
        model: ``model(x, t, **kwargs)``.
        alphas_cumprod: (T,), falling.
        quantize: as for `DiscreteSchedule`.
    """

    def __init__(self, model: Callable[..., Any], alphas_cumprod: Tensor, quantize: bool) -> None:
        super().__init__(_sigmas(alphas_cumprod), quantize)
        self.inner_model = model
        self.sigma_data = 1.0

    def get_scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(c_out, c_in) at sigma (N,): D = x + c_out*eps(c_in*x)."""
        return -sigma, 1 / (sigma**2 + self.sigma_data**2) ** 0.5

    def get_eps(self, *args: Any, **kwargs: Any) -> Tensor:
        """The network's prediction."""
        return self.inner_model(*args, **kwargs)  # type: ignore[no-any-return]

    def loss(self, input: Tensor, noise: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        """(N,) mean squared error of the noise on data (N, *S) with noise (N, *S), sigma (N,)."""
        scale = append_dims(self.get_scalings(sigma)[1], input.dim())
        noised = input + append_dims(sigma, input.dim()) * noise
        eps = self.get_eps(noised * scale, self.sigma_to_t(sigma), **kwargs)
        return ((eps - noise) ** 2).flatten(1).mean(1)

    def forward(self, input: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        """D(x, sigma), (N, *S), for x (N, *S) and sigma (N,)."""
        out, scale = (append_dims(c, input.dim()) for c in self.get_scalings(sigma))
        return input + self.get_eps(input * scale, self.sigma_to_t(sigma), **kwargs) * out


class OpenAIDenoiser(DiscreteEpsDDPMDenoiser):
    """Around a network of guided-diffusion.

    Args:
        model: ``model(x, t, **kwargs)``; with learned sigmas its first half of channels is used.
        diffusion: has the array ``alphas_cumprod``.
        quantize: as for `DiscreteSchedule`.
        has_learned_sigmas: whether the network predicts a variance too.
        device: of the buffers.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        diffusion: Any,
        quantize: bool = False,
        has_learned_sigmas: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        abar = torch.tensor(diffusion.alphas_cumprod, dtype=torch.float32, device=device)
        super().__init__(model, abar, quantize)
        self.has_learned_sigmas = has_learned_sigmas

    def get_eps(self, *args: Any, **kwargs: Any) -> Tensor:
        """The network's prediction of the noise."""
        output = super().get_eps(*args, **kwargs)
        return output.chunk(2, dim=1)[0] if self.has_learned_sigmas else output


class CompVisDenoiser(DiscreteEpsDDPMDenoiser):
    """Around a latent diffusion model of CompVis that predicts the noise.

    Args:
        model: has ``apply_model(x, t, ...)`` and the tensor ``alphas_cumprod``.
        quantize: as for `DiscreteSchedule`.
        device: not used, as in k-diffusion; the buffers are where ``alphas_cumprod`` is.
    """

    def __init__(
        self, model: Any, quantize: bool = False, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(model, model.alphas_cumprod, quantize)

    def get_eps(self, *args: Any, **kwargs: Any) -> Tensor:
        """The network's prediction."""
        return self.inner_model.apply_model(*args, **kwargs)  # type: ignore[no-any-return]


class DiscreteVDDPMDenoiser(_V, DiscreteSchedule):
    """Around a network that predicts v at discrete times; else `DiscreteEpsDDPMDenoiser`."""

    def __init__(self, model: Callable[..., Any], alphas_cumprod: Tensor, quantize: bool) -> None:
        super().__init__(_sigmas(alphas_cumprod), quantize)
        self.inner_model = model
        self.sigma_data = 1.0


class CompVisVDenoiser(DiscreteVDDPMDenoiser):
    """Around a latent diffusion model of CompVis that predicts v; arguments as `CompVisDenoiser`.

    The model is called as ``forward(x, sigma, cond=...)``; other keyword arguments are dropped, as
    in k-diffusion.
    """

    def __init__(
        self, model: Any, quantize: bool = False, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(model, model.alphas_cumprod, quantize)

    def get_v(self, x: Tensor, t: Tensor, cond: Any, **kwargs: Any) -> Tensor:
        """The network's prediction."""
        return self.inner_model.apply_model(x, t, cond)  # type: ignore[no-any-return]
