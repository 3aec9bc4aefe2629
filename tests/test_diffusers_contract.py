"""Points of diffusers' own contract at which a step can go wrong, one by one."""

from __future__ import annotations

import warnings
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from budget import assert_within_budget
from diffusers_float64 import Float32Draws, in_float64
from torch import Tensor

from fastdiff.integrations import diffusers as drop_ins
from fastdiff.ops import randn
from fastdiff.ops.noise import Stream

STEPS = 8  # each of which rounds its result once: as many units in the last place
X = torch.linspace(-2, 2, 2 * 3 * 4 * 4).view(2, 3, 4, 4)


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers' own
        yield


def _loop(scheduler: Any, x: Tensor, steps: int = STEPS) -> Tensor:
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = scheduler.step(torch.tanh(2 * x), t, x).prev_sample
    return x


def _three(name: str, dtype: torch.dtype, config: dict[str, Any]) -> list[Tensor]:
    """A run by ours, by diffusers' own, and by that in float64."""
    x = X.to(dtype)
    got, want = (_loop(getattr(m, name)(**config), x) for m in (drop_ins, diffusers))
    with Float32Draws():
        exact = _loop(in_float64(getattr(diffusers, name)(**config)), x.double())
    return [got, want, exact]


_THRESHOLDED = (
    "DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler", "DEISMultistepScheduler",
    "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler",
)  # fmt: skip


# below 1 diffusers' clamp to [1, max] is the bound itself; at 1 the quantile has no say, at 2 some
@pytest.mark.parametrize("largest", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("name", [n for n in _THRESHOLDED if n != "DDPMScheduler"])
def test_thresholding_at_any_bound(name: str, largest: float) -> None:
    config = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": largest}
    assert_within_budget(*_three(name, torch.float32, config), ulps=STEPS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", _THRESHOLDED)
def test_thresholding_keeps_the_dtype(name: str, dtype: torch.dtype) -> None:
    scheduler = getattr(drop_ins, name)(thresholding=True, dynamic_thresholding_ratio=0)
    scheduler.set_timesteps(8)
    x = X.to(dtype)
    for t in scheduler.timesteps:
        x = scheduler.step(torch.tanh(2 * x), t, x).prev_sample
        assert x.dtype == dtype and x.isfinite().all()


def test_diffusers_own_step_goes_on_from_16_bit_state() -> None:
    """A call that is no row runs diffusers' step, on the state as diffusers would have kept it."""
    dtypes = []
    for module in (drop_ins, diffusers):
        scheduler = module.DEISMultistepScheduler(solver_order=3)
        scheduler.set_timesteps(8)
        x = X.bfloat16()
        for i, t in enumerate(scheduler.timesteps):
            if i == 4 and module is drop_ins:
                scheduler._fastdiff.plan.moves.clear()
                scheduler.__dict__["_find"] = lambda *a: "this call is no row"
            x = scheduler.step(torch.tanh(2 * x), t, x).prev_sample
        dtypes.append(x.dtype)
    assert dtypes == [torch.bfloat16] * 2


def test_noise_that_a_later_step_reads_comes_from_the_same_counters() -> None:
    scheduler = drop_ins.SASolverScheduler(noise="counter")
    scheduler.set_timesteps(6)
    generator, x = torch.Generator().manual_seed(5), X
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(torch.tanh(x), t, x, generator=generator).prev_sample
        want = randn([5, 6], X.shape[1:], stream=Stream.STEP, step=2 * i)
        assert torch.equal(scheduler.last_noise, want)
    assert x.isfinite().all()
    # one picture of the batch alone
    alone = drop_ins.SASolverScheduler(noise="counter")
    alone.set_timesteps(6)
    generator, y = torch.Generator().manual_seed(6), X[1:]
    for t in alone.timesteps:
        y = alone.step(torch.tanh(y), t, y, generator=generator).prev_sample
    assert torch.equal(y, x[1:])


# classes that refuse a place in the grid in their step, and others that take any whole number
@pytest.mark.parametrize(
    "name", ["EDMEulerScheduler", "EulerDiscreteScheduler", "CMStochasticIterativeScheduler"]
)
def test_an_index_for_a_timestep_gets_diffusers_own_error(name: str) -> None:
    for module in (diffusers, drop_ins):
        scheduler = getattr(module, name)()
        scheduler.set_timesteps(4)
        with pytest.raises(ValueError, match="Passing integer indices"):
            scheduler.step(torch.tanh(X), 0, X)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "PNDMScheduler"])
def test_a_foreign_attribute_changes_nothing(name: str) -> None:
    """Some code resets `_step_index` of whatever scheduler it is given."""
    scheduler, other = getattr(drop_ins, name)(), getattr(drop_ins, name)()
    scheduler._step_index = None
    results = []
    for each in (scheduler, other):
        torch.manual_seed(0)
        results.append(_loop(each, X))
    assert torch.equal(*results)


# leading axes only, tokens, sequences, video; a transposed sample
@pytest.mark.parametrize(
    "x",
    [
        torch.linspace(-1, 1, 12).view(4, 3),
        torch.linspace(-1, 1, 48).view(2, 6, 4),
        torch.linspace(-1, 1, 96).view(2, 3, 2, 2, 4),
        torch.linspace(-1, 1, 96).view(3, 4, 4, 2).permute(3, 0, 1, 2),
    ],
    ids=["2 axes", "3 axes", "5 axes", "transposed"],
)
@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"]
)
def test_shapes_and_strides(name: str, x: Tensor) -> None:
    config: dict[str, Any] = {"prediction_type": "v_prediction"}
    got, want = (_loop(getattr(m, name)(**config), x) for m in (drop_ins, diffusers))
    exact = _loop(in_float64(getattr(diffusers, name)(**config)), x.double())
    assert_within_budget(got, want, exact, ulps=STEPS)


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDPMParallelScheduler"])
def test_the_last_training_steps_have_the_coefficients_of_diffusers(name: str) -> None:
    """1 - alphas_cumprod[t] / alphas_cumprod[t - 1] has three digits there, and we keep those."""
    results = []
    for module in (drop_ins, diffusers):
        scheduler, x = getattr(module, name)(), 0.5 * X
        generator = torch.Generator().manual_seed(0)
        for t in scheduler.timesteps[-5:]:
            x = scheduler.step(torch.tanh(x), t, x, generator=generator).prev_sample
        results.append(x)
    got, want = results
    # a handful of roundings a step, of numbers up to the largest
    bound = 5 * 4 * torch.finfo(want.dtype).eps * float(want.abs().max())
    assert float((got - want).abs().max()) <= bound


@pytest.mark.parametrize(
    "name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"]
)
def test_a_history_that_the_caller_puts_in(name: str) -> None:
    """diffusers' own tests, and some pipelines, write the kept predictions."""
    past = [0.1 * X + 0.2, 0.1 * X + 0.15, 0.1 * X + 0.1]
    before = [p.clone() for p in past]

    def go(scheduler: Any, x: Tensor) -> Tensor:
        scheduler.set_timesteps(STEPS + 2)
        scheduler.model_outputs = [p.to(x.dtype) for p in past]
        scheduler.lower_order_nums = 3
        if name == "UniPCMultistepScheduler":
            scheduler.last_sample, scheduler.this_order = 0.9 * x, 3
        # a corrector of order 3 reads the levels of three steps before
        for t in scheduler.timesteps[3:]:
            x = scheduler.step(torch.tanh(x), t, x).prev_sample
        return x

    got, want = (go(getattr(m, name)(solver_order=3), X) for m in (drop_ins, diffusers))
    exact = go(in_float64(getattr(diffusers, name)(solver_order=3)), X.double())
    assert_within_budget(got, want, exact, ulps=STEPS)
    assert all(torch.equal(p, b) for p, b in zip(past, before, strict=True))


# what is kept: predictions, the sample, derivatives, the first stage of two
@pytest.mark.parametrize(
    "name",
    [
        "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "LMSDiscreteScheduler",
        "HeunDiscreteScheduler",
    ],
)  # fmt: skip
@pytest.mark.parametrize("change", ["dtype", "memory order"])
def test_samples_that_change_in_the_middle_of_a_run(name: str, change: str) -> None:
    """What was kept lies where tensors like the earlier samples did."""
    results = []
    for module in (drop_ins, diffusers):
        scheduler, x = getattr(module, name)(), X
        scheduler.set_timesteps(STEPS)
        for i, t in enumerate(scheduler.timesteps[:6]):
            scheduler.scale_model_input(x, t)
            x = scheduler.step(torch.tanh(x), t, x).prev_sample
            if change == "dtype":
                x = x.to((torch.float64, torch.float32)[i % 2])
            else:
                orders = (torch.channels_last, torch.contiguous_format)
                x = x.contiguous(memory_format=orders[i % 2])
        results.append(x)
    got, want = results
    assert got.dtype == want.dtype
    # a few roundings a step on either side
    bound = 2 * 4 * STEPS * torch.finfo(torch.float32).eps * float(want.abs().max())
    assert float((got - want).abs().max()) <= bound


def test_a_buffer_that_the_caller_writes_over() -> None:
    """IPNDM's first derivative is the sample itself, in a tensor of its own."""
    results = []
    for module in (drop_ins, diffusers):
        scheduler, x = module.IPNDMScheduler(), X.clone()
        scheduler.set_timesteps(STEPS)
        for t in scheduler.timesteps[:4]:
            x.copy_(scheduler.step(torch.tanh(x), t, x).prev_sample)
        results.append(x)
    got, want = results
    bound = 4 * STEPS * torch.finfo(x.dtype).eps * float(want.abs().max())
    assert float((got - want).abs().max()) <= bound


def test_a_timestep_that_the_step_reads_besides_its_index() -> None:
    """SASolver asks its tau_func: one scheduler's call must not be another's."""
    results = []
    for module in (drop_ins, diffusers):
        for grid in (slice(0, None, 2), slice(0, 3)):  # others than the index says, then those
            scheduler, x = module.SASolverScheduler(), X
            scheduler.set_timesteps(6)
            torch.manual_seed(0)
            for t in scheduler.timesteps[grid]:
                x = scheduler.step(torch.tanh(x), t, x).prev_sample
            results.append(x)
    for got, want in zip(results[:2], results[2:], strict=True):
        bound = 4 * STEPS * torch.finfo(want.dtype).eps * float(want.abs().max())
        assert float((got - want).abs().max()) <= bound


@pytest.mark.parametrize(
    ("name", "form"),
    # one that keeps the timestep and reads it, one that looks it up among whole numbers
    [
        ("SASolverScheduler", lambda t: t.reshape(1)),
        ("DPMSolverMultistepScheduler", lambda t: np.float32(t)),
        ("DPMSolverMultistepScheduler", lambda t: np.int64(t)),
    ],
    ids=["one element", "numpy float", "numpy integer"],
)
def test_forms_of_a_timestep(name: str, form: Any) -> None:
    results = []
    for module in (drop_ins, diffusers):
        scheduler, x = getattr(module, name)(), X
        scheduler.set_timesteps(STEPS)
        torch.manual_seed(0)
        for t in scheduler.timesteps[:3]:
            x = scheduler.step(torch.tanh(x), form(t), x).prev_sample
        results.append(x)
    got, want = results
    bound = 4 * STEPS * torch.finfo(want.dtype).eps * float(want.abs().max())
    assert float((got - want).abs().max()) <= bound


def test_a_brownian_tree_in_the_dtype_of_the_prediction() -> None:
    """Of a wider sample than the model's output: its numbers are others in each dtype."""
    results = []
    for module in (drop_ins, diffusers):
        scheduler, x = module.CosineDPMSolverMultistepScheduler(), X.double()
        scheduler.set_timesteps(STEPS)
        generator = torch.Generator().manual_seed(0)
        for t in scheduler.timesteps:
            x = scheduler.step(torch.tanh(x.float()), t, x, generator=generator).prev_sample
        results.append(x)
    got, want = results
    assert got.dtype == want.dtype
    # diffusers' tables are float32
    bound = 4 * STEPS * torch.finfo(torch.float32).eps * float(want.abs().max())
    assert float((got - want).abs().max()) <= bound
