"""k-diffusion's sampling functions on this library's tables and kernel.

Every function has the parameters of its namesake in ``k_diffusion.sampling``, in the same order and
with the same defaults, the same callback keys, and draws the same noise from torch's generators, so
that a changed import keeps the picture up to rounding. The arguments that they share:

    model: ``model(x, sigma, **extra_args)`` with x (N, *S) and sigma (N,) of the dtype of x;
        predicts clean data (N, *S) from x = x0 + sigma*noise.
    x: (N, *S) of any floating dtype, the initial state: sigmas[0] times unit noise. It is not
        written to. float32 and float64 are kept as they are, other dtypes between steps as float32.
    sigmas: (steps + 1,) falling levels on any device, the last one often 0. Without noise they may
        rise from above 0, which turns data into noise.
    extra_args: keyword arguments of the model.
    callback: called at every step after its first model call with a dict: x, i, sigma (before
        churn), sigma_hat, denoised.
    disable: no progress bar; None: a bar on a terminal.
    eta, s_noise: share and scale of fresh noise, at least 0.
    s_churn, s_tmin, s_tmax: Karras et al. 2022 (arXiv:2206.00364), algorithm 2.
    noise_sampler: ``noise_sampler(sigma, sigma_next)`` returns unit noise like x; None: what
        k-diffusion takes, `default_noise_sampler` or `BrownianTreeNoiseSampler`.
    noise: not in k-diffusion. None: as above; "counter": sample i is a function of its own seed,
        drawn in the kernel; "brownian": the same along a path, `BrownianPathNoiseSampler`.
    seeds: for `noise`: int s for s, s+1, ..., a sequence of ints, or (N,) int64; None: 0.

They return (N, *S) of the dtype of x, and raise TypeError or ValueError where an argument breaks
its rule. The step itself, its source and its order stand in the docstring of the solver in
`fastdiff.solvers` that bears the same name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.integrations._brownian_tree import BrownianTreeNoiseSampler
from fastdiff.integrations.k_diffusion._dpm_solver import sample_dpm_adaptive, sample_dpm_fast
from fastdiff.integrations.k_diffusion._levels import (
    append_zero,
    get_ancestral_step,
    get_sigmas_exponential,
    get_sigmas_karras,
    get_sigmas_polyexponential,
    get_sigmas_vp,
    to_d,
)
from fastdiff.integrations.k_diffusion._likelihood import log_likelihood
from fastdiff.integrations.k_diffusion._noise import (
    BrownianPathNoiseSampler,
    NoiseSampler,
    Source,
    default_noise_sampler,
    source_of,
)
from fastdiff.integrations.k_diffusion._run import check_model, run
from fastdiff.integrations.k_diffusion._tables import Plan, levels_of, number, plan_of

__all__ = [
    "BrownianPathNoiseSampler",
    "BrownianTreeNoiseSampler",
    "append_zero",
    "default_noise_sampler",
    "get_ancestral_step",
    "get_sigmas_exponential",
    "get_sigmas_karras",
    "get_sigmas_polyexponential",
    "get_sigmas_vp",
    "log_likelihood",
    "sample_dpm_2",
    "sample_dpm_2_ancestral",
    "sample_dpm_adaptive",
    "sample_dpm_fast",
    "sample_dpmpp_2m",
    "sample_dpmpp_2m_sde",
    "sample_dpmpp_2s_ancestral",
    "sample_dpmpp_3m_sde",
    "sample_dpmpp_sde",
    "sample_euler",
    "sample_euler_ancestral",
    "sample_heun",
    "sample_lms",
    "to_d",
]

Model = Callable[..., Tensor]
Args = Mapping[str, Any] | None
Callback = Callable[[dict[str, Any]], Any] | None
_SILENT = Source(lambda sigma, sigma_next: torch.empty(0))  # of functions that draw nothing


class _Call:
    """What every function does with its shared arguments."""

    def __init__(
        self, name: str, model: Model, x: Tensor, sigmas: Tensor, callback: Callback
    ) -> None:
        self.name, self.where = name, f"sample_{name}"
        check_model(self.where, model, x, callback)
        self.model, self.x, self.sigmas, self.callback = model, x, sigmas, callback
        self.levels = levels_of(self.where, sigmas)

    def numbers(self, **options: Any) -> dict[str, float]:
        return {k: number(self.where, k, v) for k, v in options.items()}

    def run(
        self,
        options: dict[str, Any],
        source: Callable[[], Source],
        extra_args: Args,
        disable: bool | None,
        *,
        spans: Callable[[Tensor, Plan], Callable[[int], tuple[Any, Any]]] | None = None,
        gammas: np.ndarray | None = None,
    ) -> Tensor:
        if len(self.levels) < 2:
            return self.x
        sigmas, plan = self.sigmas, plan_of(self.where, self.name, self.levels, options)
        made = source()
        asked = sigmas.cpu() if made.on_host else sigmas

        def info(i: int, x: Tensor, denoised: Tensor) -> dict[str, Any]:
            sigma = hat = sigmas[i]
            if gammas is not None:
                hat = sigma * (float(gammas[i]) + 1)
            return {"x": x, "i": i, "sigma": sigma, "sigma_hat": hat, "denoised": denoised}

        return run(
            self.where, self.model, self.x, plan, made,
            (spans or _of_steps)(asked, plan), info,
            extra_args=extra_args, callback=self.callback, disable=disable,
            churns=gammas is not None,
        )  # fmt: skip

    def churned(
        self,
        s_churn: float,
        s_tmin: float,
        s_tmax: float,
        s_noise: float,
        noise: str | None,
        seeds: Any,
        extra_args: Args,
        disable: bool | None,
    ) -> Tensor:
        """A function with the churn of Karras et al., which draws at every step."""
        options = self.numbers(s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise)
        inside = (self.levels >= options["s_tmin"]) & (self.levels <= options["s_tmax"])
        most = min(options["s_churn"] / max(len(self.levels) - 1, 1), 2**0.5 - 1)
        source = self.source(noise, seeds, kinds=("counter",))
        return self.run(options, source, extra_args, disable, gammas=np.where(inside, most, 0.0))

    def source(
        self,
        noise: str | None,
        seeds: Any,
        noise_sampler: NoiseSampler | None = None,
        *,
        tree: bool = False,
        kinds: tuple[str, ...] = ("counter", "brownian"),
    ) -> Callable[[], Source]:
        """Makes the source, after all else has been checked: it may draw a seed."""

        def default() -> NoiseSampler:
            if not tree:
                return default_noise_sampler(self.x)
            sigmas = self.sigmas
            return BrownianTreeNoiseSampler(self.x, sigmas[sigmas > 0].min(), sigmas.max())

        return lambda: source_of(self.where, self.x, noise, seeds, default, noise_sampler, kinds)


def _of_steps(sigmas: Tensor, plan: Plan) -> Callable[[int], tuple[Any, Any]]:
    """The ends of the step that a row belongs to."""
    step_of = {row: i for i, rows in enumerate(plan.steps) for row in rows}

    def span(row: int) -> tuple[Tensor, Tensor]:
        i = step_of[row]
        return sigmas[i], sigmas[i + 1]

    return span


def sample_euler(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Args = None, callback: Callback = None,
    disable: bool | None = None, s_churn: float = 0.0, s_tmin: float = 0.0,
    s_tmax: float = math.inf, s_noise: float = 1.0, *, noise: str | None = None, seeds: Any = None,
) -> Tensor:  # fmt: skip
    """`solvers.euler`; the arguments are those of the module."""
    call = _Call("euler", model, x, sigmas, callback)
    return call.churned(s_churn, s_tmin, s_tmax, s_noise, noise, seeds, extra_args, disable)


def sample_heun(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Args = None, callback: Callback = None,
    disable: bool | None = None, s_churn: float = 0.0, s_tmin: float = 0.0,
    s_tmax: float = math.inf, s_noise: float = 1.0, *, noise: str | None = None, seeds: Any = None,
) -> Tensor:  # fmt: skip
    """`solvers.heun`; the arguments are those of the module."""
    call = _Call("heun", model, x, sigmas, callback)
    return call.churned(s_churn, s_tmin, s_tmax, s_noise, noise, seeds, extra_args, disable)


def sample_dpm_2(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Args = None, callback: Callback = None,
    disable: bool | None = None, s_churn: float = 0.0, s_tmin: float = 0.0,
    s_tmax: float = math.inf, s_noise: float = 1.0, *, noise: str | None = None, seeds: Any = None,
) -> Tensor:  # fmt: skip
    """`solvers.dpm_2`; the arguments are those of the module."""
    call = _Call("dpm_2", model, x, sigmas, callback)
    return call.churned(s_churn, s_tmin, s_tmax, s_noise, noise, seeds, extra_args, disable)


def sample_euler_ancestral(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Args = None, callback: Callback = None,
    disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None, *, noise: str | None = None, seeds: Any = None,
) -> Tensor:  # fmt: skip
    """`solvers.euler_ancestral`; the arguments are those of the module."""
    call = _Call("euler_ancestral", model, x, sigmas, callback)
    options = call.numbers(eta=eta, s_noise=s_noise)
    return call.run(options, call.source(noise, seeds, noise_sampler), extra_args, disable)


def sample_dpm_2_ancestral(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Args = None, callback: Callback = None,
    disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None, *, noise: str | None = None, seeds: Any = None,
) -> Tensor:  # fmt: skip
    """`solvers.dpm_2_ancestral`; the arguments are those of the module.

    Where eta is so large that a step goes down to 0, noise that is given is left out, as in
    k-diffusion; with ``noise="counter"`` it is added.
    """
    call = _Call("dpm_2_ancestral", model, x, sigmas, callback)
    options = call.numbers(eta=eta, s_noise=s_noise)
    return call.run(options, call.source(noise, seeds, noise_sampler), extra_args, disable)


def sample_dpmpp_2s_ancestral(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Args = None, callback: Callback = None,
    disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None, *, noise: str | None = None, seeds: Any = None,
) -> Tensor:  # fmt: skip
    """`solvers.dpmpp_2s_ancestral`; the arguments are those of the module."""
    call = _Call("dpmpp_2s_ancestral", model, x, sigmas, callback)
    options = call.numbers(eta=eta, s_noise=s_noise)
    return call.run(options, call.source(noise, seeds, noise_sampler), extra_args, disable)


def sample_lms(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Args = None, callback: Callback = None,
    disable: bool | None = None, order: int = 4,
) -> Tensor:  # fmt: skip
    """`solvers.lms`, order 1 to 4; the other arguments are those of the module."""
    call = _Call("lms", model, x, sigmas, callback)
    return call.run({"order": order}, lambda: _SILENT, extra_args, disable)


def sample_dpmpp_sde(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Args = None, callback: Callback = None,
    disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None, r: float = 1 / 2,
    *, noise: str | None = None, seeds: Any = None,
) -> Tensor:  # fmt: skip
    """`solvers.dpmpp_sde`; the arguments are those of the module.

    The noise sampler is called twice a step, over spans that begin at the same level.

    Args:
        r: where the stage is, in (0, 1], as a share of the step in log(sigma).
    """
    call = _Call("dpmpp_sde", model, x, sigmas, callback)
    options = call.numbers(eta=eta, s_noise=s_noise, r=r)
    source = call.source(noise, seeds, noise_sampler, tree=True)

    def spans(sigmas: Tensor, plan: Plan) -> Callable[[int], tuple[Any, Any]]:
        place = {row: (i, k) for i, rows in enumerate(plan.steps) for k, row in enumerate(rows)}

        def span(row: int) -> tuple[Tensor, Tensor]:
            # a Brownian path is rough: the times must be k-diffusion's own to the last bit
            i, k = place[row]
            t, t_next = -sigmas[i].log(), -sigmas[i + 1].log()
            end = t_next if k else t + (t_next - t) * options["r"]
            return (-t).exp(), (-end).exp()

        return span

    return call.run(options, source, extra_args, disable, spans=spans)


def sample_dpmpp_2m(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Args = None, callback: Callback = None,
    disable: bool | None = None,
) -> Tensor:  # fmt: skip
    """`solvers.dpmpp_2m`; the arguments are those of the module."""
    call = _Call("dpmpp_2m", model, x, sigmas, callback)
    return call.run({}, lambda: _SILENT, extra_args, disable)


def sample_dpmpp_2m_sde(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Args = None, callback: Callback = None,
    disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None, solver_type: str = "midpoint",
    *, noise: str | None = None, seeds: Any = None,
) -> Tensor:  # fmt: skip
    """`solvers.dpmpp_2m_sde`; the arguments are those of the module.

    Args:
        solver_type: "midpoint" or "heun".
    """
    call = _Call("dpmpp_2m_sde", model, x, sigmas, callback)
    options = {**call.numbers(eta=eta, s_noise=s_noise), "solver_type": solver_type}
    source = call.source(noise, seeds, noise_sampler, tree=True)
    return call.run(options, source, extra_args, disable)


def sample_dpmpp_3m_sde(
    model: Model, x: Tensor, sigmas: Tensor, extra_args: Args = None, callback: Callback = None,
    disable: bool | None = None, eta: float = 1.0, s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None, *, noise: str | None = None, seeds: Any = None,
) -> Tensor:  # fmt: skip
    """`solvers.dpmpp_3m_sde`; the arguments are those of the module."""
    call = _Call("dpmpp_3m_sde", model, x, sigmas, callback)
    options = call.numbers(eta=eta, s_noise=s_noise)
    source = call.source(noise, seeds, noise_sampler, tree=True)
    return call.run(options, source, extra_args, disable)
