"""The samplers of EDM's generate.py, on tables and the fused step (Karras et al. 2022,
arXiv:2206.00364).

`edm_sampler` and `ablation_sampler` have the arguments of theirs, and `StackedRandomGenerator` its
draws, so that a picture stays, up to the rounding of the state: float32 here, as in EDM2, or
``dtype=torch.float64`` as there (on the reference backend). The noise of ``randn_like`` is drawn in
float64 at every step, of use or not, as there. With ``seeds`` churn draws `fastdiff.randn`'s noise
inside the kernel instead, and only where there is churn; `fastdiff.randn(seeds, shape)` gives the
latents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.integrations import _edm_table
from fastdiff.integrations._edm_table import VP, Path
from fastdiff.ops.noise import as_seeds
from fastdiff.ops.reverse_step import reverse_step
from fastdiff.solvers._checks import choice, number, whole

__all__ = ["StackedRandomGenerator", "ablation_sampler", "edm_sampler"]

Net = Callable[..., Tensor]
Like = Callable[[Tensor], Tensor]


def edm_sampler(
    net: Net,
    latents: Tensor,
    class_labels: Tensor | None = None,
    randn_like: Like = torch.randn_like,
    num_steps: int = 18,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    S_churn: float = 0.0,
    S_min: float = 0.0,
    S_max: float = math.inf,
    S_noise: float = 1.0,
    *,
    seeds: Any = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Heun's method with churn: Karras et al. 2022, algorithm 2 on the steps of equation 5.

    Args:
        net: ``net(x, sigma, class_labels)`` with sigma a float64 scalar tensor, giving the denoised
            data; its ``sigma_min``, ``sigma_max`` and ``round_sigma`` hold where it has them.
        latents: (N, C, H, W) unit-variance initial noise.
        class_labels: handed to ``net``.
        randn_like: gives the noise of the churn, once a step; not called with ``seeds``.
        num_steps: at least 1; 2 num_steps - 1 evaluations.
        sigma_min, sigma_max, rho: the levels.
        S_churn, S_min, S_max, S_noise: algorithm 2.
        seeds: None, or of the churn's own noise, as in `Sampler`.
        dtype: of the state: float32, or float64 on the reference backend.

    Returns:
        (N, C, H, W) in ``dtype``, without gradients.

    Raises:
        TypeError, ValueError: an argument breaks its rule.
    """
    return ablation_sampler(
        net, latents, class_labels, randn_like, num_steps, sigma_min, sigma_max, rho,
        S_churn=S_churn, S_min=S_min, S_max=S_max, S_noise=S_noise, seeds=seeds, dtype=dtype,
    )  # fmt: skip


def ablation_sampler(
    net: Net,
    latents: Tensor,
    class_labels: Tensor | None = None,
    randn_like: Like = torch.randn_like,
    num_steps: int = 18,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    rho: float = 7.0,
    solver: str = "heun",
    discretization: str = "edm",
    schedule: str = "linear",
    scaling: str = "none",
    epsilon_s: float = 1e-3,
    C_1: float = 0.001,
    C_2: float = 0.008,
    M: int = 1000,
    alpha: float = 1.0,
    S_churn: float = 0.0,
    S_min: float = 0.0,
    S_max: float = math.inf,
    S_noise: float = 1.0,
    *,
    seeds: Any = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Any of the samplers compared by Karras et al. 2022, table 1 and appendix C.

    Args:
        sigma_min, sigma_max: None: those of ``discretization``.
        solver: "euler" or "heun".
        discretization: of the levels: "vp", "ve", "iddpm" or "edm".
        schedule: sigma(t): "vp", "ve" or "linear".
        scaling: s(t): "vp" or "none".
        epsilon_s: least time of "vp".
        C_1, C_2, M: of "iddpm".
        alpha: place of the second evaluation in a step: 1 Heun, 1/2 midpoint, 2/3 Ralston.
        others: as `edm_sampler`.
    """
    where = "edm"
    num_steps = whole("num_steps", num_steps, 1, 1_000_000, where)
    for name, value, allowed in (
        ("solver", solver, _edm_table.SOLVERS),
        ("discretization", discretization, _edm_table.DISCRETIZATIONS),
        ("schedule", schedule, _edm_table.SCHEDULES),
        ("scaling", scaling, _edm_table.SCALINGS),
    ):
        choice(name, value, allowed, where)
    tiny = math.ulp(0.0)  # the least number above 0
    rho, alpha = number("rho", rho, tiny, where=where), number("alpha", alpha, tiny, where=where)
    epsilon_s = number("epsilon_s", epsilon_s, tiny, math.nextafter(1.0, 0.0), where=where)
    low, high = _levels_of(net, discretization, sigma_min, sigma_max, epsilon_s)
    vp = VP.between(low, high, epsilon_s)
    sigmas = _edm_table.levels(
        discretization, num_steps, low, high, rho, epsilon_s, vp, (C_1, C_2, M)
    )
    sigmas = _rounded(net, sigmas, latents.device)
    most = min(number("S_churn", S_churn, 0.0, where=where) / num_steps, math.sqrt(2) - 1)
    gamma = np.where((sigmas >= S_min) & (sigmas <= S_max), most, 0.0)
    hats = _rounded(net, sigmas * (1 + gamma), latents.device)
    table, starts = _edm_table.build(
        where,
        Path(schedule, scaling, vp),
        sigmas,
        hats,
        heun=solver == "heun",
        alpha=alpha,
        s_noise=number("S_noise", S_noise, 0.0, where=where),
        given_noise=seeds is None,
    )
    if seeds is not None:
        seeds = as_seeds(seeds, len(latents), where=where).to(latents.device)
    levels = torch.tensor(table.times, dtype=torch.float64, device=latents.device)
    drawn = torch.empty_like(latents, dtype=torch.float64)  # what randn_like is asked for
    with torch.no_grad():
        x = latents.to(dtype) * table.init_sigma
        y = torch.empty_like(x) if table.anchored else None
        scaled = torch.empty_like(x) if scaling == "vp" else None
        given = x if scaled is None else torch.mul(x, table.rows[0].c_in, out=scaled)
        noise = None
        for i, row in enumerate(table.rows):
            if i in starts and seeds is None:
                noise = randn_like(drawn)
            # a churn row takes its noise as an output; None where the kernel draws it
            output = net(given, levels[i], class_labels) if "d" in row.x else noise
            if output is not None and output.dtype == torch.float64:
                output = output.to(dtype)
            x = reverse_step(x, output, table, i, y=y, seeds=seeds, model_input=scaled)
            given = x if scaled is None else scaled
    return x


def _levels_of(
    net: Net,
    discretization: str,
    sigma_min: float | None,
    sigma_max: float | None,
    epsilon_s: float,
) -> tuple[float, float]:
    """The ends of the levels: table 1, within what the network takes."""
    usual = VP(19.1, 0.1)
    defaults = {
        "vp": (usual.sigma(epsilon_s), usual.sigma(1.0)),
        "ve": (0.02, 100.0),
        "iddpm": (0.002, 81.0),
        "edm": (0.002, 80.0),
    }[discretization]
    low = defaults[0] if sigma_min is None else float(sigma_min)
    high = defaults[1] if sigma_max is None else float(sigma_max)
    low = max(low, float(getattr(net, "sigma_min", 0.0)))
    high = min(high, float(getattr(net, "sigma_max", math.inf)))
    if not 0 < low < high < math.inf:
        raise ValueError(
            "edm: sigma_min, sigma_max must obey 0 < sigma_min < sigma_max, finite, "
            f"got {low:g}, {high:g}"
        )
    return low, high


def _rounded(net: Net, sigmas: np.ndarray, device: torch.device) -> np.ndarray:
    """The levels of the network nearest to these."""
    if not hasattr(net, "round_sigma"):
        return sigmas
    rounded = net.round_sigma(torch.tensor(sigmas, dtype=torch.float64, device=device))
    return np.asarray(rounded.cpu().double().numpy())


class StackedRandomGenerator:
    """One `torch.Generator` a sample, so that a sample's draws are those of its own seed.

    Args:
        device: of the generators; streams of torch differ between devices.
        seeds: one int a sample; taken modulo 2**32.
    """

    def __init__(self, device: torch.device | str, seeds: Sequence[int] | Tensor) -> None:
        self.generators = [
            torch.Generator(device).manual_seed(int(seed) % (1 << 32)) for seed in seeds
        ]

    def randn(self, size: Sequence[int], **kwargs: Any) -> Tensor:
        """Unit normals, ``size`` (N, ...); keyword arguments of `torch.randn`."""
        return self._stack(torch.randn, (), size, kwargs)

    def randn_like(self, input: Tensor) -> Tensor:
        """Unit normals in the shape, dtype, layout and device of ``input``."""
        return self.randn(input.shape, dtype=input.dtype, layout=input.layout, device=input.device)

    def randint(self, *args: Any, size: Sequence[int], **kwargs: Any) -> Tensor:
        """Integers, ``size`` (N, ...); arguments of `torch.randint`."""
        return self._stack(torch.randint, args, size, kwargs)

    def _stack(
        self,
        draw: Callable[..., Tensor],
        args: Sequence[Any],
        size: Sequence[int],
        kwargs: dict[str, Any],
    ) -> Tensor:
        if size[0] != len(self.generators):
            raise ValueError(
                f"StackedRandomGenerator: size must begin with {len(self.generators)}, "
                f"got {tuple(size)}"
            )
        each = (draw(*args, size=tuple(size[1:]), generator=g, **kwargs) for g in self.generators)
        return torch.stack(list(each))
