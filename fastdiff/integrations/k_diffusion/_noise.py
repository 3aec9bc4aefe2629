"""Where the noise of a run comes from: k-diffusion's own samplers, or this library's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from fastdiff.integrations._torch_noise import randn_like
from fastdiff.ops.brownian import brownian
from fastdiff.ops.noise import as_seeds

NoiseSampler = Callable[[Any, Any], Tensor]

# 64 octaves of sigma around 1, a cell each, in leaves of 1/1024 octave (0.07 %)
_PATH: dict[str, Any] = {
    "low": 2.0**-32, "high": 2.0**32, "geometric": True, "cells": 64, "depth": 16,
}  # fmt: skip


class Source(NamedTuple):
    """What a run takes its noise from.

    Attributes:
        sample: called with (sigma, sigma_next); None: the kernel draws by `seeds`.
        seeds: (N,) int64 on the device of the state.
        on_host: whether `sample` reads the numbers that it is called with.
    """

    sample: NoiseSampler | None
    seeds: Tensor | None = None
    on_host: bool = False


def default_noise_sampler(x: Tensor) -> NoiseSampler:
    """Independent unit normals like x at every call, from torch's generator."""
    return lambda sigma, sigma_next: randn_like(x)


class BrownianPathNoiseSampler:
    """Increments of this library's Brownian path over sigma: `ops.brownian`.

    Another path than torchsde's, so other pictures than `BrownianTreeNoiseSampler`; the law is the
    same, it needs no torchsde, stores nothing, and sample i depends on seed i alone, on any device
    and in any batch. Works with k-diffusion's own functions too.

    Args:
        x: (N, *S) tensor whose shape, dtype and device the noise has.
        seeds: int s for s, s+1, ..., a sequence of ints, or an (N,) int64 tensor.
    """

    def __init__(self, x: Tensor, seeds: Any = 0) -> None:
        self._shape, self._dtype, self._device = x.shape[1:], x.dtype, x.device
        self._seeds = as_seeds(seeds, len(x), where="BrownianPathNoiseSampler").to(x.device)

    def __call__(self, sigma: Any, sigma_next: Any) -> Tensor:
        """The increment from sigma to sigma_next over the root of its length.

        Both lie in [2**-32, 2**32], at least 1/1024 of an octave apart.
        """
        return brownian(
            self._seeds,
            self._shape,
            float(sigma),
            float(sigma_next),
            dtype=self._dtype,
            device=self._device,
            **_PATH,
        )


def source_of(
    where: str,
    x: Tensor,
    noise: str | None,
    seeds: Any,
    default: Callable[[], NoiseSampler],
    noise_sampler: NoiseSampler | None = None,
    kinds: tuple[str, ...] = ("counter", "brownian"),
) -> Source:
    """The source that the arguments of a function ask for."""
    if noise is None:
        if seeds is not None:
            rule = f"seeds must come with noise={' or '.join(map(repr, kinds))}"
            raise ValueError(f"{where}: {rule}, got {seeds!r} without")
        if noise_sampler is None:
            return Source(default())
        if not callable(noise_sampler):
            got = type(noise_sampler).__name__
            raise TypeError(f"{where}: noise_sampler must be callable, got {got}")
        return Source(noise_sampler)
    if noise not in kinds:
        rule = f"noise must be None or {' or '.join(map(repr, kinds))}"
        raise ValueError(f"{where}: {rule}, got {noise!r}")
    if noise_sampler is not None:
        raise ValueError(f"{where}: noise must be None with a noise_sampler, got {noise!r}")
    values = as_seeds(0 if seeds is None else seeds, len(x), where=where)
    if noise == "counter":
        return Source(None, values.to(x.device))
    return Source(BrownianPathNoiseSampler(x, values), on_host=True)
