"""Steps that diffusers takes wrongly, or not at all, taken as they are meant.

A step is read off diffusers' own code (`_trace`). Here that code is run on a copy of the scheduler
that is changed where the code is wrong, so that the rest of it still counts:

- Where diffusers gives NaN, infinity or an exception there is no picture to keep, and the copy is
  changed always: a lower order where a step of length 0 or the step to sigma 0 divides by nothing,
  a variance that is no logarithm, a scale that is looked up by None.
- Where it gives a picture that departs from the method, the copy is changed if the configuration
  says ``corrected=True``: the time that a step of DDIM or PNDM ends at, the learned variance, noise
  on clean data, the sign in the third order of the SDEs.

Which ones there are, and the test of each: docs/diffusers_defects.md.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from torch import Tensor

from fastdiff.integrations.diffusers._trace import (
    NOISE,
    OUTPUT,
    SAMPLE,
    Form,
    NotAffine,
    NotFinite,
    Trace,
    is_state,
    trace,
)

Step = Callable[..., Any]

_DDPM = frozenset(("DDPMScheduler", "DDPMParallelScheduler"))
_DDIM = frozenset(("DDIMScheduler", "DDIMParallelScheduler", "CogVideoXDDIMScheduler"))
_EDM, _COSINE = "EDMDPMSolverMultistepScheduler", "CosineDPMSolverMultistepScheduler"
_INVERSE = "DDIMInverseScheduler"
_THIRD = "multistep_dpm_solver_third_order_update"
_TINY = 1e-40  # a sigma whose terms are 0 in float32 and whose logarithm is finite
_NO_TERM = 1e-30  # of a step of order 1: what is left of a term that goes to 0 with sigma
_SAME_LEVEL = 8 * torch.finfo(torch.float32).eps  # of itself, by which one sigma comes out twice
LinAlgError: type[Exception] = torch.linalg.LinAlgError  # type: ignore[attr-defined]
# what diffusers' code runs into at such a step
_FAILURES = (NotFinite, UnboundLocalError, LinAlgError)


class _Stride(int):
    """A number of steps n for which T // n is the length of this very step."""

    stride: int

    def __rfloordiv__(self, total: Any) -> int:
        return self.stride


def _reconfigured(twin: Any, **changes: Any) -> None:
    twin.__dict__["_internal_dict"] = FrozenDict({**twin.config, **changes})


def _stride(scheduler: Any, t: int) -> int | None:
    """Timesteps between the ends of the step at t on the scheduler's own grid."""
    name, times = scheduler._fd_peer.__name__, scheduler._fastdiff.host
    if name == "PNDMScheduler":
        counter = scheduler.counter
        if counter < len(scheduler.prk_timesteps) and not scheduler.config.skip_prk_steps:
            # half a step: to the time that the network is told next; odd ones end at t itself
            after = int(scheduler.prk_timesteps[counter + 1 - counter % 2])
            return 2 * (t - after) if counter % 2 == 0 else 0
        times = list(dict.fromkeys(times))
        if counter == 1:  # the second evaluation of the first step, told where that ends
            return times[times.index(t) - 1] - t if t in times[1:] else None
    if t not in times:
        return None
    i = times.index(t)
    if name == _INVERSE:
        return t - times[i - 1] if i else t + 1
    return t - times[i + 1] if i + 1 < len(times) else t + 1


def _noise_prediction(step: Step, alphas_cumprod: Tensor) -> Step:
    """`step` of a scheduler for epsilon, on the output of a network for v."""
    abar = alphas_cumprod.double()

    def run(twin: Any, model_output: Tensor, timestep: Any, sample: Tensor, **named: Any) -> Any:
        a = abar[int(timestep)]
        epsilon = a.sqrt() * model_output + (1 - a).sqrt() * sample
        return step(twin, epsilon, timestep, sample, **named)

    return run


def _third_order(twin: Any, single: bool) -> Step:
    """Third order of the SDEs: the exact integral of the parabola through three predictions.

    With s in [0, 1] along the step it is D0 + D1 s + D2 s^2/2, and it is weighed with
    2h exp(-2h(1 - s)) in terms of the data, with h exp(h(1 - s)) twice in terms of the noise (Lu et
    al. 2022, arXiv:2211.01095, and the SDE of appendix A of it). The multistep form takes half of
    D2, as the authors' own code does for the ODE.
    """
    bend = 2.0 if single else 1.0

    def update(outputs: Any, *, sample: Tensor, noise: Tensor | None = None) -> Tensor:
        if noise is None:  # EDM's class draws it and does not hand it on
            noise = torch.randn(sample.shape, dtype=sample.dtype, generator=torch.Generator())
        i = twin.step_index
        levels = [twin.sigmas[i + k].double() for k in (1, 0, -1, -2)]
        scales = [twin._sigma_to_alpha_sigma_t(level) for level in levels]
        lam = [torch.log(torch.as_tensor(a)) - torch.log(s) for a, s in scales]
        base = 3 if single else 1
        (alpha, sigma), (alpha_s, sigma_s) = scales[0], scales[base]
        h = lam[0] - lam[base]
        near, mid, far = (outputs[-k] for k in ((3, 2, 1) if single else (1, 2, 3)))
        u, v = ((at - lam[base]) / h for at in ((lam[2], lam[1]) if single else (lam[2], lam[3])))
        first, second = (mid - near) / u, (far - near) / v
        d1 = (v * first - u * second) / (v - u)
        d2 = bend * (second - first) / (v - u)
        if twin.config.algorithm_type == "sde-dpmsolver":
            e = torch.expm1(h)
            weighed = e * near + (e / h - 1) * d1 + ((e - h) / h**2 - 0.5) * d2
            spread = sigma * torch.sqrt(torch.expm1(2 * h))
            stepped: Tensor = alpha / alpha_s * sample - 2 * sigma * weighed + spread * noise
            return stepped
        e = -torch.expm1(-2 * h)
        weighed = e * near + (1 - e / (2 * h)) * d1 + ((e - 2 * h) / (2 * h) ** 2 + 0.5) * d2
        decay = sigma / sigma_s * torch.exp(-h)
        stepped = decay * sample + alpha * weighed + sigma * torch.sqrt(e) * noise
        return stepped

    return update


def prepared(scheduler: Any, step: Step, timestep: Any) -> tuple[Any, Step]:
    """A copy of a scheduler, and the `step` to run on it, without what is known to be wrong.

    Args:
        scheduler: a drop-in, in the state before the call; it is left as it is.
        step: the function of diffusers' class.
        timestep: of the call, a number or on the CPU.
    """
    config, name = scheduler.config, scheduler._fd_peer.__name__
    corrected = config.get("corrected", False)
    twin = copy.copy(scheduler)
    own = twin.__dict__
    variance = config.get("variance_type")
    if name in _DDPM and variance == "fixed_large_log":
        own["variance_type"] = "fixed_large"
        _reconfigured(twin, variance_type="fixed_large")
    if name in _DDPM and variance == "learned" and corrected:
        own["variance_type"] = "learned_range"  # the branch that takes the exponential
        own["_get_variance"] = lambda *_, predicted_variance=None, **__: predicted_variance
    if name in ("DPMSolverSinglestepScheduler", "SASolverScheduler") and config.thresholding:
        alpha, sigma = twin._sigma_to_alpha_sigma_t(scheduler.sigmas[scheduler.step_index])
        own["alpha_t"], own["sigma_t"] = (torch.as_tensor(a).double().cpu() for a in (alpha, sigma))
    algorithm, order = config.get("algorithm_type", ""), config.get("solver_order")
    third = algorithm.startswith("sde") and order == 3
    if third:
        single = name == "DPMSolverSinglestepScheduler"
        missing = algorithm == "sde-dpmsolver" or name == _EDM
        if not single and (corrected or missing):
            own[_THIRD] = _third_order(twin, single)
        elif single and corrected and config.solver_type == "heun":
            own["singlestep_dpm_solver_third_order_update"] = _third_order(twin, single)
    if name == _COSINE or (name == _EDM and third):
        sigmas, i = scheduler.sigmas.clone(), scheduler.step_index
        rise = float(sigmas[i + 1] / sigmas[i]) - 1
        # one level that rounding made two: there is no noise between them, nor a step backwards
        if abs(rise) <= _SAME_LEVEL:
            sigmas[i + 1] = sigmas[i]
            own["sigmas"] = sigmas
    if not corrected:
        return twin, step
    if name in _DDIM or name in ("PNDMScheduler", _INVERSE):
        length = _stride(scheduler, int(timestep))
        if length is not None:
            own["num_inference_steps"] = steps = _Stride(scheduler.num_inference_steps)
            steps.stride = length
    if name == "PNDMScheduler" and config.prediction_type == "v_prediction":
        _reconfigured(twin, prediction_type="epsilon")
        step = _noise_prediction(step, scheduler.alphas_cumprod.cpu())
    return twin, step


def _lower(twin: Any) -> Iterator[Any]:
    """Copies that take the step with a lower order, or without correcting the one before.

    To sigma 0 a step of order 1 has a limit, the predicted clean data, and no other has; over a
    step of length 0 nothing changes, and differences across one have no slope.
    """
    own = vars(twin)
    if "lower_order_nums" not in own:
        return
    i = twin.step_index
    ends = i + 1 < len(twin.sigmas) and float(twin.sigmas[i + 1]) == 0
    highest = min(len(own["model_outputs"]), own["lower_order_nums"] + 1)
    for corrects in (True, False) if "disable_corrector" in own else (True,):
        for order in (1,) if ends else range(highest, 0, -1):
            less = copy.copy(twin)
            less.__dict__["lower_order_nums"] = order - 1
            if not corrects:
                less.__dict__["disable_corrector"] = [i - 1]
            if ends:
                sigmas = twin.sigmas.detach().cpu().double()
                sigmas[i + 1] = _TINY
                less.__dict__["sigmas"] = sigmas
            yield less


def _pruned(form: Form) -> Form:
    return {name: weight for name, weight in form.items() if abs(weight) > _NO_TERM}


def _no_noise(found: Trace) -> None:
    found.outputs[0] = {n: w for n, w in found.outputs[0].items() if n not in NOISE}
    found.draws, found.spans, found.log_variance = 0, [], None


def _no_picture(scheduler: Any) -> bool:
    """Whether a DDPM has no picture of diffusers' to keep: it gives NaN, or the user wants ours."""
    config = scheduler.config
    return bool(config.get("corrected", False) or config.get("variance_type") == "fixed_large_log")


def _after(scheduler: Any, found: Trace, timestep: Any) -> Trace:
    """A trace without what no change of the scheduler could take out of it."""
    config, name = scheduler.config, scheduler._fd_peer.__name__
    spare = found.draws == 2 and not any(NOISE[0] in form for form in found.outputs)
    if spare and name != "CogVideoXDPMScheduler":  # which draws and drops noise itself
        # drawn by diffusers' step, and again by what it is mended with
        found.outputs = [
            {NOISE[0] if n == NOISE[1] else n: w for n, w in form.items()} for form in found.outputs
        ]
        found.draws = 1
        del found.spans[0]
    if any(found.spans) and not any(set(form) & set(NOISE) for form in found.outputs):
        _no_noise(found)  # a noise sampler is a function, nobody misses a query of weight 0
    ends = name in _DDPM and int(scheduler.previous_timestep(timestep)) < 0
    if ends and _no_picture(scheduler):
        _no_noise(found)
    if name == "IPNDMScheduler" and config.get("corrected", False):
        i = scheduler.step_index
        if float(scheduler.alphas[i]) == 0 and len(scheduler.ets) == 0:
            alpha, sigma = (float(a[i + 1]) for a in (scheduler.alphas, scheduler.betas))
            found.outputs[0] = {SAMPLE: sigma, OUTPUT: -alpha}
    return found


def _refuse_without_information(scheduler: Any, error: NotAffine, timestep: Any) -> None:
    """Raise where the network's output says nothing of what the step needs."""
    config, name = scheduler.config, scheduler._fd_peer.__name__
    picture = str(error).startswith("what is clipped") and not config.get("thresholding")
    if picture and not config.get("corrected", False):
        return
    table = vars(scheduler).get("alphas_cumprod")
    if table is None or "sigmas" in vars(scheduler):
        return
    if name == _INVERSE:
        if config.prediction_type == "sample":
            raise ValueError(
                f"{name}.step: prediction_type must be 'epsilon' or 'v_prediction' to leave clean "
                "data, where the noise can not be told from a predicted sample, got 'sample' "
                "(set_alpha_to_one=False begins with the noise of the first timestep)"
            ) from error
    elif config.prediction_type == "epsilon" and float(table[int(timestep)]) == 0:
        raise ValueError(
            f"{name}.step: prediction_type must be 'v_prediction' or 'sample' at timestep "
            f"{int(timestep)}, where rescale_betas_zero_snr leaves noise alone, got 'epsilon' "
            "(arXiv:2305.08891, section 3.2)"
        ) from error


def mended_trace(
    scheduler: Any,
    step: Step,
    state: Sequence[str],
    timestep: Any,
    options: Mapping[str, Any],
    *,
    learned: bool,
) -> Trace:
    """`trace` of a call as it is meant; the same arguments, the scheduler a drop-in.

    Raises:
        ValueError: the network's output says nothing of what the step needs: noise predicted where
            there is nothing but noise, or data where there is nothing but data.
        NotAffine: diffusers has to take the step itself.
        Exception: what diffusers raises on such arguments.
    """
    name = scheduler._fd_peer.__name__
    # 1 - alphas_cumprod[t] / alphas_cumprod[t - 1] of a table in float32 has lost its digits in
    # float64 as well: where there is a picture to keep, it is kept to the last of diffusers' own
    wide = name not in _DDPM or _no_picture(scheduler)
    one = name == "UnCLIPScheduler" and scheduler.num_inference_steps == 1
    if one and options.get("prev_timestep") is None:
        options = {**options, "prev_timestep": -1}  # the one step is the last as well
    twin, run = prepared(scheduler, step, timestep)
    try:
        found = trace(twin, run, state, timestep, options, learned=learned, wide=wide)
    except _FAILURES as error:
        for less in _lower(twin):
            try:
                found = trace(less, run, state, timestep, options, learned=learned)
            except _FAILURES:
                continue
            found.outputs = [_pruned(form) for form in found.outputs]
            found.kept["lower_order_nums"] = min(
                scheduler.lower_order_nums + 1, len(scheduler.model_outputs)
            )
            break
        else:
            if isinstance(error, NotFinite):
                _refuse_without_information(scheduler, error, timestep)
            raise
    return _after(scheduler, found, timestep)


def _singular(twin: Any) -> bool:
    """Whether a multistep rule divides by nothing here."""
    if "lower_order_nums" not in vars(twin):
        return False
    i = twin.step_index
    levels = [float(s) for s in twin.sigmas[max(i - 2, 0) : i + 2]]
    return levels[-1] == 0 or any(a == b for a, b in pairwise(levels))


def _narrow(values: dict[str, Any], state: Sequence[str], dtype: torch.dtype) -> None:
    """The kept tensors in the sample's dtype: diffusers' own code takes the widest of all."""
    for name in state:
        value = values.get(name)
        if type(value) is list:
            value[:] = [v.to(dtype) if is_state(v) else v for v in value]
        elif isinstance(value, Tensor) and is_state(value):
            values[name] = value.to(dtype)


def taken(
    scheduler: Any,
    step: Step,
    at: Any,
    call: tuple[Tensor, Any, Tensor],
    named: dict[str, Any],
) -> Any:
    """The outputs of `step` where it is no row of a table, taken by diffusers' code.

    Args:
        at: the timestep as a number.
        call: model output, timestep and sample; ``named``: the further arguments.
    """
    _narrow(scheduler.__dict__, scheduler._fd_state, call[2].dtype)
    twin, run = prepared(scheduler, step, at)
    if _singular(twin):
        options = {k: v for k, v in named.items() if k not in ("generator", "return_dict")}
        for less in (twin, *_lower(twin)):
            try:
                trace(less, run, scheduler._fd_state, call[1], options)
            except _FAILURES:
                continue
            except NotAffine:
                break
            twin = less
            break
    before = dict(vars(twin))
    output, timestep, sample = call
    result = run(twin, output, timestep=timestep, sample=sample, **named)
    for name, value in vars(twin).items():
        # a list is the twin's own, and diffusers writes into it
        if name not in before or before[name] is not value or type(value) is list:
            scheduler.__dict__[name] = value
    return result
