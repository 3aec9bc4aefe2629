"""DPM-Solver-fast and DPM-Solver with adaptive steps, between two levels sigma."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from fastdiff._adaptive_methods import PID, Array, DpmAdaptive, Progress
from fastdiff.integrations.k_diffusion._noise import (
    NoiseSampler,
    Source,
    default_noise_sampler,
    source_of,
)
from fastdiff.integrations.k_diffusion._run import (
    answer_of,
    check_model,
    noise_of,
    run,
    state_dtype,
)
from fastdiff.integrations.k_diffusion._tables import ends_of, number, plan_of
from fastdiff.ops.noise import Stream, randn

Model = Callable[..., Tensor]
Args = Mapping[str, Any] | None
Callback = Callable[[dict[str, Any]], Any] | None


def _time(sigma: Any) -> Tensor:
    """-log(sigma), a tensor of torch's default dtype for a number: k-diffusion's own."""
    level = sigma.detach().clone() if isinstance(sigma, Tensor) else torch.tensor(float(sigma))
    return -level.log()


def sample_dpm_fast(
    model: Model, x: Tensor, sigma_min: Any, sigma_max: Any, n: int, extra_args: Args = None,
    callback: Callback = None, disable: bool | None = None, eta: float = 0.0,
    s_noise: float = 1.0, noise_sampler: NoiseSampler | None = None,
    *, noise: str | None = None, seeds: Any = None,
) -> Tensor:  # fmt: skip
    """`solvers.dpm_fast` from sigma_max to sigma_min; other arguments as in the module `sampling`.

    The callback's dict also has t = -log(sigma), and t_up, which is the same. The noise sampler is
    called at every step, also where eta is 0.

    Args:
        sigma_min, sigma_max: levels above 0; without eta, sigma_min may be the larger.
        n: number of model evaluations, at least 1.
    """
    where = "sample_dpm_fast"
    check_model(where, model, x, callback)
    low, high = ends_of(where, sigma_min, sigma_max)
    if isinstance(n, bool) or not hasattr(type(n), "__index__"):
        raise TypeError(f"{where}: n must be an integer, got {type(n).__name__}")
    if n < 1:
        raise ValueError(f"{where}: n must be at least 1, got {n}")
    options = {"eta": number(where, "eta", eta), "s_noise": number(where, "s_noise", s_noise)}
    # the solver takes the ends and the count
    plan = plan_of(where, "dpm_fast", np.geomspace(high, low, n + 1), options)
    source = source_of(where, x, noise, seeds, lambda: default_noise_sampler(x), noise_sampler)
    device = torch.device("cpu") if source.on_host else x.device
    start, end = _time(sigma_max), _time(sigma_min)
    times = torch.linspace(start, end, len(plan.steps) + 1, device=device)
    ends = {rows[-1]: i for i, rows in enumerate(plan.steps)}

    def span(row: int) -> tuple[Tensor, Tensor]:
        return (-times[ends[row]]).exp(), (-times[ends[row] + 1]).exp()

    def info(i: int, x: Tensor, denoised: Tensor) -> dict[str, Any]:
        t, sigma = times[i], (-times[i]).exp()
        return {
            "x": x, "i": i, "t": t, "t_up": t, "sigma": sigma, "sigma_hat": sigma,
            "denoised": denoised,
        }  # fmt: skip

    return run(
        where, model, x, plan, source, span, info,
        extra_args=extra_args, callback=callback, disable=disable, per_call=True,
    )  # fmt: skip


class _WholeBatch(DpmAdaptive):
    """One error norm and one step size for the batch, as k-diffusion has it.

    The batch is the one sample that the integrator sees.
    """

    error = math.nan
    span: tuple[float, float]  # times of the step that was tried last

    def _aim(self, level: Array, then: Array) -> tuple[Array, Array]:
        self.span = float(level[0]), float(then[0])
        return super()._aim(level, then)

    def _accept(self, i: int, error: float) -> bool:
        self.error = error
        return super()._accept(i, error)

    @property
    def next_step(self) -> float:
        return float(self._h[0])

    def denoised(self, before: Tensor) -> Tensor:
        """x0 at the state `before` the step that was tried last."""
        return before - math.exp(-self.span[0]) * self._eps[0]


@torch.no_grad()
def sample_dpm_adaptive(
    model: Model, x: Tensor, sigma_min: Any, sigma_max: Any, extra_args: Args = None,
    callback: Callback = None, disable: bool | None = None, order: int = 3, rtol: float = 0.05,
    atol: float = 0.0078, h_init: float = 0.05, pcoeff: float = 0.0, icoeff: float = 1.0,
    dcoeff: float = 0.0, accept_safety: float = 0.81, eta: float = 0.0, s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None, return_info: bool = False,
    *, noise: str | None = None, seeds: Any = None,
) -> Any:  # fmt: skip
    """DPM-Solver-12 or -23 with steps as large as a tolerance allows, the same for the whole batch.

    Lu et al. 2022 (arXiv:2206.00927), appendix C, with k-diffusion's step control. A step that is
    tried again does not evaluate its start again. `AdaptiveSampler` steps each sample on its own,
    which is what to use where a picture must not depend on its batch. Other arguments as in the
    module `sampling`.

    Args:
        sigma_min, sigma_max: levels above 0, sigma_max the larger.
        order: 2 or 3.
        rtol, atol: relative and absolute tolerance of a step.
        h_init: first step in log(sigma).
        pcoeff, icoeff, dcoeff, accept_safety: the step control.
        return_info: return (x, info) with info's counts steps, nfe, n_accept, n_reject.

    Raises:
        TypeError, ValueError: an argument breaks its rule.
        RuntimeError: the step has shrunk to nothing.
    """
    where = "sample_dpm_adaptive"
    check_model(where, model, x, callback)
    low, high = ends_of(where, sigma_min, sigma_max)
    if low >= high:
        raise ValueError(f"{where}: sigma_min must be below sigma_max, got {low} and {high}")
    if order not in (2, 3):
        raise ValueError(f"{where}: order must be 2 or 3, got {order}")
    given = {
        "rtol": rtol, "atol": atol, "h_init": h_init, "pcoeff": pcoeff, "icoeff": icoeff,
        "dcoeff": dcoeff, "accept_safety": accept_safety, "eta": eta, "s_noise": s_noise,
    }  # fmt: skip
    v = {name: number(where, name, value) for name, value in given.items()}
    for name in ("rtol", "atol", "eta", "s_noise"):
        if not 0 <= v[name] < math.inf:
            raise ValueError(f"{where}: {name} must be finite and at least 0, got {v[name]}")
    source = source_of(where, x, noise, seeds, lambda: default_noise_sampler(x), noise_sampler)
    extra = {} if extra_args is None else extra_args
    with tqdm(disable=disable) as bar:
        calls = 0

        def slope(samples: Array, times: Array, states: Tensor) -> Tensor:
            nonlocal calls
            if not len(samples):
                return states
            calls += 1
            bar.update()
            sigma = math.exp(-float(times[0]))
            level = torch.full((len(x),), sigma, dtype=x.dtype, device=x.device)
            denoised = answer_of(where, model(states[0].to(x.dtype), level, **extra), x)
            return (states - denoised.to(states.dtype)) / sigma

        def draw(index: int, accepted: int) -> Tensor:
            return _step_noise(where, source, batch.span, x, accepted)

        progress = Progress(
            np.array([-math.log(high)]), -math.log(low), x[None].to(state_dtype(x), copy=True)
        )
        pid = PID(abs(v["h_init"]), v["pcoeff"], v["icoeff"], v["dcoeff"], v["accept_safety"])
        batch = _WholeBatch(
            progress, slope, v["rtol"], v["atol"], order, v["eta"], v["s_noise"], pid, draw
        )
        info = {"steps": 0, "nfe": 0, "n_accept": 0, "n_reject": 0}
        while len(active := batch.active()):
            before = progress.x[0].clone() if callback is not None else None
            batch.attempt(active)
            accepted, rejected = int(progress.accepted[0]), int(progress.rejected[0])
            if accepted > info["n_accept"] and not v["eta"] and source.sample is not None:
                source.sample(*_levels(batch.span, source))  # of weight 0, but the sampler moves on
            info = {
                "steps": accepted + rejected, "nfe": calls,
                "n_accept": accepted, "n_reject": rejected,
            }  # fmt: skip
            if callback is not None and before is not None:
                t = torch.tensor(float(progress.level[0]), device=x.device)
                sigma = (-t).exp()
                callback({
                    "x": progress.x[0].to(x.dtype, copy=True), "i": info["steps"] - 1,
                    "t": t, "t_up": t, "sigma": sigma, "sigma_hat": sigma,
                    "denoised": batch.denoised(before).to(x.dtype),
                    "error": torch.tensor(batch.error, device=x.device),
                    "h": batch.next_step, **info,
                })  # fmt: skip
    result = progress.x[0].to(x.dtype)
    return (result, info) if return_info else result


def _levels(span: tuple[float, float], source: Source) -> tuple[Any, Any]:
    """sigma and sigma_next of times, tensors for a sampler of the user's."""
    start, end = (math.exp(-time) for time in span)
    return (start, end) if source.on_host else (torch.tensor(start), torch.tensor(end))


def _step_noise(
    where: str, source: Source, span: tuple[float, float], x: Tensor, accepted: int
) -> Tensor:
    """Noise of an accepted step, (N, *S)."""
    if source.sample is None:
        assert source.seeds is not None  # of "counter"
        return randn(source.seeds, x.shape[1:], step=accepted, stream=Stream.STEP, device=x.device)
    return noise_of(where, source, _levels(span, source), x)
