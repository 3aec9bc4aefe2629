"""The drop-in schedulers of diffusers inside `torch.compile(fullgraph=True)`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from budget import assert_within_budget

from fastdiff.integrations import diffusers as drop_in

STEPS = 4
DETERMINISTIC = (
    # one stage, no state: coefficients by the timestep's value
    ("DDIMScheduler", {}),
    ("DDIMScheduler", {"clip_sample": False, "prediction_type": "v_prediction"}),
    ("DDIMScheduler", {"thresholding": True}),  # limited by a quantile
    # by the index
    ("EulerDiscreteScheduler", {}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    # two stages: the state changes its pattern from step to step
    ("HeunDiscreteScheduler", {}),
    ("KDPM2DiscreteScheduler", {}),
    # lists of earlier outputs, of fixed length and growing
    ("DPMSolverMultistepScheduler", {}),
    ("DPMSolverMultistepScheduler", {"solver_order": 3, "thresholding": True}),
    ("DPMSolverSinglestepScheduler", {}),
    ("UniPCMultistepScheduler", {}),
    ("DEISMultistepScheduler", {}),
    ("LMSDiscreteScheduler", {}),
    ("IPNDMScheduler", {}),
    # counts calls instead of steps
    ("PNDMScheduler", {"skip_prk_steps": True}),
)
NOISY = (
    # the value of the timestep says which counter is drawn; the last step draws none
    ("DDPMScheduler", {}),
    # the index says it
    ("EulerAncestralDiscreteScheduler", {}),
    # the index and the value
    ("LCMScheduler", {}),
    # kept for the next step
    ("SASolverScheduler", {}),
)


def _ids(cases: Any) -> list[str]:
    return ["-".join((name, *options)) for name, options in cases]


def model(x: torch.Tensor, t: Any) -> torch.Tensor:
    return torch.sin(0.5 * x) + 0.1 * x


def one(scheduler: Any, x: torch.Tensor, t: Any, **options: Any) -> torch.Tensor:
    scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
    return scheduler.step(model(scaled, t), t, x, return_dict=False, **options)[0]


def loop(scheduler: Any, x: torch.Tensor, skip: int = 0) -> torch.Tensor:
    for t in scheduler.timesteps[skip:]:
        x = one(scheduler, x, t)
    return x


def made(name: str, options: dict[str, Any], steps: int = STEPS) -> Any:
    scheduler = getattr(drop_in, name)(**options)
    scheduler.set_timesteps(steps)
    return scheduler


def sample() -> torch.Tensor:
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


class Counter:
    """A backend that runs graphs as they are, and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, _: Any) -> Any:
        self.graphs += 1
        return graph.forward


def compiled(function: Any, backend: Any = "eager") -> Any:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=backend)


def check(got: torch.Tensor, name: str, options: dict[str, Any], ulps: float = 4) -> None:
    """Within the budget of the eager drop-in; the ulps are of a sum in another order."""
    x = sample()
    assert_within_budget(
        got, loop(made(name, options), x), loop(made(name, options), x.double()), ulps
    )


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # of KDPM2's set_timesteps
@pytest.mark.parametrize(("name", "options"), DETERMINISTIC, ids=_ids(DETERMINISTIC))
def test_a_whole_loop_is_one_graph(name: str, options: dict[str, Any]) -> None:
    counter, scheduler = Counter(), made(name, options)
    got = compiled(loop, counter)(scheduler, sample())
    assert counter.graphs == 1
    check(got, name, options)
    reference = made(name, options)
    loop(reference, sample())
    for attribute in ("_step_index", "counter", "lower_order_nums", "this_order"):
        assert getattr(scheduler, attribute, None) == getattr(reference, attribute, None)


@pytest.mark.parametrize(("name", "options"), NOISY, ids=_ids(NOISY))
def test_counter_noise_has_the_bits_that_the_kernel_draws(
    name: str, options: dict[str, Any]
) -> None:
    options = {**options, "noise": "counter"}
    torch.manual_seed(1)
    expected = loop(made(name, options), sample())
    exact = loop(_seeded(name, options), sample().double())
    got = compiled(loop)(_seeded(name, options), sample())
    assert_within_budget(got, expected, exact, 4)


def _seeded(name: str, options: dict[str, Any]) -> Any:
    torch.manual_seed(1)
    return made(name, options)


@pytest.mark.filterwarnings("ignore:`torch.jit.script")  # inside inductor
def test_inductor_makes_one_graph_of_four_loops() -> None:
    cases = [DETERMINISTIC[i] for i in (0, 3, 7)] + [("DDPMScheduler", {"noise": "counter"})]
    schedulers = [made(*case) for case in cases]
    torch.manual_seed(1)
    begun = one(schedulers[3], sample(), schedulers[3].timesteps[0])  # which draws the seeds

    def all_of_them(schedulers: Any, x: torch.Tensor, begun: torch.Tensor) -> Any:
        return [loop(s, x) for s in schedulers[:3]] + [loop(schedulers[3], begun, 1)]

    got = compiled(all_of_them, "inductor")(schedulers, sample(), begun)
    for case, result in zip(cases[:3], got[:3], strict=True):
        check(result, *case)
    expected = loop(_seeded(*cases[3]), sample())
    assert_within_budget(got[3], expected, loop(_seeded(*cases[3]), sample().double()), 4)


@pytest.mark.parametrize(
    ("name", "graphs"),
    [
        ("DDIMScheduler", 1),  # the timestep is a tensor
        ("EulerDiscreteScheduler", 3),  # no index yet, index 1, any index
        ("HeunDiscreteScheduler", 4),  # two patterns of the state
        ("DPMSolverMultistepScheduler", 4),  # the list fills; the last step is of lower order
    ],
)
def test_a_step_is_compiled_a_few_times_and_serves_the_next_scheduler(
    name: str, graphs: int
) -> None:
    counter = Counter()
    step = compiled(one, counter)
    for steps in (6, 6):
        scheduler, reference = made(name, {}, steps), made(name, {}, steps)
        x = y = sample()
        for t in scheduler.timesteps:
            x, y = step(scheduler, x, t), one(reference, y, t)
        exact = loop(made(name, {}, steps), sample().double())
        assert_within_budget(x, y, exact, 4)
        assert counter.graphs <= graphs


def test_a_new_grid_is_followed() -> None:
    step, scheduler = compiled(one), made("EulerDiscreteScheduler", {})
    for steps in (4, 6, 5):
        scheduler.set_timesteps(steps)
        x = sample()
        for t in scheduler.timesteps:
            x = step(scheduler, x, t)
        others = [made("EulerDiscreteScheduler", {}, steps) for _ in range(2)]
        assert_within_budget(x, loop(others[0], sample()), loop(others[1], sample().double()), 4)


def test_sigmas_that_were_replaced_are_followed() -> None:
    run = compiled(loop)
    results = []
    for function, factor in ((run, 1.0), (run, 1.25), (loop, 1.25)):
        scheduler = made("EulerDiscreteScheduler", {})
        scheduler.sigmas = scheduler.sigmas * factor
        results.append(function(scheduler, sample()))
    assert not torch.allclose(results[0], results[1])
    exact = made("EulerDiscreteScheduler", {})
    exact.sigmas = exact.sigmas * 1.25
    assert_within_budget(results[1], results[2], loop(exact, sample().double()), 4)


def test_a_run_that_starts_in_the_middle() -> None:
    got = made("EulerDiscreteScheduler", {})
    got.set_begin_index(2)
    expected = [made("EulerDiscreteScheduler", {}) for _ in range(2)]
    for scheduler in expected:
        scheduler.set_begin_index(2)
    assert_within_budget(
        compiled(loop)(got, sample(), 2),
        loop(expected[0], sample(), 2),
        loop(expected[1], sample().double(), 2),
        4,
    )
    without = made("EulerDiscreteScheduler", {})
    with pytest.raises(RuntimeError, match="set_begin_index"):
        compiled(loop)(without, sample(), 2)


def test_a_timestep_that_is_not_in_the_run_is_not_taken_for_another() -> None:
    step, scheduler = compiled(one), made("DDIMScheduler", {})
    listed = [int(t) for t in scheduler.timesteps]
    for t in (listed[1] + 1, -5, 10**6):
        assert t not in listed
        assert bool(step(scheduler, sample(), torch.tensor(t)).isnan().all())
    lcm = made("LCMScheduler", {"noise": "counter"})
    one(lcm, sample(), lcm.timesteps[0])
    assert bool(compiled(one)(lcm, sample(), lcm.timesteps[2]).isnan().all())


def test_step_itself_with_options_and_half_precision() -> None:
    x = sample().bfloat16()
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    options = {"eta": 0.5, "variance_noise": noise}
    schedulers = [made("DDIMScheduler", {}) for _ in range(3)]
    t = schedulers[0].timesteps[1]
    got = compiled(schedulers[0].step)(x, t, x, **options)
    expected = schedulers[1].step(x, t, x, **options)
    exact = schedulers[2].step(
        x.double(), t, x.double(), eta=0.5, variance_noise=noise.double(), return_dict=False
    )
    for k, field in enumerate(("prev_sample", "pred_original_sample")):
        assert_within_budget(getattr(got, field), getattr(expected, field), exact[k], 1)


def test_the_learned_variance_of_a_model() -> None:
    cases = [made("DDPMScheduler", _LEARNED) for _ in range(3)]
    x, t = sample(), cases[0].timesteps[1]
    output = torch.cat([model(x, t), torch.tanh(x)], dim=1)
    results = []
    for scheduler, function, dtype in zip(
        cases, (compiled(_step), _step, _step), (torch.float32, torch.float32, torch.float64),
        strict=True,
    ):  # fmt: skip
        torch.manual_seed(1)
        results.append(function(scheduler, output.to(dtype), t, x.to(dtype)))
    assert_within_budget(*results, 4)


_LEARNED = {"variance_type": "learned_range", "noise": "counter"}


def _step(scheduler: Any, output: torch.Tensor, t: Any, x: torch.Tensor) -> torch.Tensor:
    return scheduler.step(output, t, x, return_dict=False)[0]
