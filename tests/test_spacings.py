"""Spacings against k-diffusion, diffusers and scipy; points of one's own; errors."""

from __future__ import annotations

import math

import diffusers
import numpy as np
import pytest
import scipy.stats
import torch
from diffusers.schedulers.scheduling_utils import AysSchedules
from peers import k_sampling, schedule_of
from scopes import default_dtype
from spacing_cases import EDM, EPS, EPS32, FLOW, LINEAR, SD, STEPS, assert_levels, ends, levels_of
from test_spacings_comfy import COMFY

from fastdiff import schedules, solvers, spacings
from fastdiff.spacings._beta import beta_cdf, beta_ppf

# --- the inverse incomplete beta function -----------------------------------------------------

SHAPES = {
    (0.6, 0.6): "the paper's",
    (0.5, 0.7): "beta57 of ComfyUI's users",
    (1.0, 1.0): "uniform",
    (0.3, 4.0): "far from symmetric",
    (5.0, 0.7): "the other way",
    (40.0, 60.0): "narrow: Newton's first step is far off",
    (1000.0, 800.0): "the largest allowed",
    (0.1, 0.1): "the smallest",
}


@pytest.mark.parametrize("shape", SHAPES)
def test_inverse_beta_is_that_of_scipy(shape):
    p = np.concatenate([np.linspace(0, 1, 401), [1e-12, 1e-6, 1 - 1e-9]])
    got, want = np.array([beta_ppf(q, *shape) for q in p]), scipy.stats.beta.ppf(p, *shape)
    # the cdf is a product of powers: its rounding, a + b + 2 times, over the slope of its logarithm
    density = scipy.stats.beta.pdf(want[1:400], *shape)
    bound = 8 * EPS * (sum(shape) + 2) * (p[1:400] / density + want[1:400])
    assert (np.abs(got - want)[1:400] <= bound).all()
    assert got[0] == 0 and got[400] == 1 and (np.diff(got[:401]) >= 0).all()
    # a tail keeps its digits: the cdf is the exponential of a sum of terms of these sizes, each
    # rounded in Newton's last step and here; x ends within a rounding, of weight a, and the
    # fraction takes a few
    (a, b), x = shape, got[401:403]
    sizes = a * np.abs(np.log(x)) + b * np.abs(np.log1p(-x)) + a + 8
    small = np.array([beta_cdf(v, *shape) for v in x])
    assert (np.abs(small - p[401:403]) <= 2 * EPS * sizes * p[401:403]).all()


def test_inverse_beta_below_the_smallest_number():
    assert beta_ppf(1e-40, 0.1, 1.0) == 0.0


# --- k-diffusion, in float64 ------------------------------------------------------------------


@pytest.fixture
def sampling():
    module = k_sampling()
    with default_dtype(torch.float64):
        yield module


K = {
    "karras": ({"rho": 5.0}, "a ramp with an option"),
    "exponential": ({}, "no option"),
    "polyexponential": ({"rho": 0.7}, "another exponent"),
}


@pytest.mark.parametrize("name", K)
@pytest.mark.parametrize("schedule", [SD, LINEAR, EDM], ids=["sd", "linear", "edm"])
def test_ramps_are_those_of_k_diffusion(schedule, name, sampling):
    low, high = ends(schedule)
    for options in ({}, K[name][0]):
        for steps in STEPS:
            want = getattr(sampling, f"get_sigmas_{name}")(steps, low, high, **options).numpy()
            # powers and logarithms: rho, and the size of the logarithm, times a rounding
            bound = 16 * EPS * (1 + 7 + abs(math.log(high)) + abs(math.log(low)))
            grid = schedule.points(steps, name, **options)
            assert_levels(schedule, grid, want, bound, (name, steps))


@pytest.mark.parametrize("schedule", [LINEAR, schedules.edm(sigma_max=160.0)], ids=["vp", "ve"])
def test_vp_is_that_of_k_diffusion(schedule, sampling):
    for options in ({}, {"beta_d": 15.0, "beta_min": 0.2, "eps_s": 2e-3}):
        for steps in STEPS:
            want = sampling.get_sigmas_vp(steps, **options).numpy()
            # exp(b) - 1 loses digits in k-diffusion where b, at least 1e-4, is small
            bound = 16 * EPS * (10 + 1 / 1e-4)
            grid = schedule.points(steps, "vp", **options)
            assert_levels(schedule, grid, want, bound, steps)
    table = solvers.build("euler", schedule, 10, spacing="vp", prediction="sample")
    first = float(schedule.points(10, "vp").sigmas[0])
    assert table.init_sigma == (first if schedule.kind == "edm" else 1.0)


# --- diffusers: float32 -----------------------------------------------------------------------

CONVERTED = {
    "use_karras_sigmas": ("karras", "a seventh power"),
    "use_exponential_sigmas": ("exponential", "a logarithm"),
    "use_beta_sigmas": ("beta@diffusers", "scipy's quantiles"),
    "use_lu_lambdas": ("exponential", "uniform in log SNR is uniform in the logarithm"),
}


@pytest.mark.parametrize("option", CONVERTED)
@pytest.mark.parametrize("steps", STEPS[1:])  # of one step diffusers' first level is its last
def test_levels_are_those_of_diffusers(option, steps):
    name, which = CONVERTED[option][0], "DPMSolverMultistepScheduler"
    scheduler = getattr(diffusers, which)(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        final_sigmas_type="zero", **{option: True},
    )  # fmt: skip
    schedule = schedule_of(scheduler)
    scheduler.set_timesteps(steps)
    want = scheduler.sigmas.double().numpy()
    # their levels start from float32 and end in float32, a lu lambda in float32 logarithms
    low, high = ends(schedule)
    bound = EPS32 * (4 + 7 + abs(math.log(low)) + abs(math.log(high)) + 1 / (low**2))
    assert_levels(schedule, schedule.points(steps, name), want, bound, steps)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_sigmas_are_those_of_diffusers(shift):
    schedule = schedules.flow(shift=shift)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    for steps in STEPS:
        scheduler.set_timesteps(steps)
        got = schedule.points(steps, "normal").sigmas
        assert np.abs(got - scheduler.sigmas.double().numpy()).max() <= 8 * EPS32, steps
        # the lists that the pipelines of Flux and Stable Diffusion 3.5 hand over
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps))
        got = schedule.points(steps, "linspace").sigmas
        assert np.abs(got - scheduler.sigmas.double().numpy()).max() <= 8 * EPS32, steps


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("seq_len", [256, 1024, 4096, 9216])  # both ends, between, beyond
def test_dynamic_shift_is_that_of_diffusers(kind, seq_len):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, time_shift_type=kind
    )
    c = scheduler.config
    # pipelines.flux.pipeline_flux.calculate_shift
    m = (c.max_shift - c.base_shift) / (c.max_image_seq_len - c.base_image_seq_len)
    mu = seq_len * m + (c.base_shift - m * c.base_image_seq_len)
    shift = schedules.dynamic_shift(seq_len, time_shift_type=kind)
    assert abs(shift - (math.exp(mu) if kind == "exponential" else mu)) <= 16 * EPS * shift
    for steps in STEPS:
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
        got = schedules.flow(shift=shift).points(steps).sigmas
        assert np.abs(got - scheduler.sigmas.double().numpy()).max() <= 8 * EPS32


def test_shift_terminal_is_that_of_diffusers():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, shift_terminal=0.1)
    for steps in STEPS[1:]:  # of one step theirs divides by 0
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps))
        got = schedules.flow(shift=3.0).points(steps, shift_terminal=0.1).sigmas
        assert np.abs(got - scheduler.sigmas.double().numpy()).max() <= 8 * EPS32


@pytest.mark.parametrize("option", list(CONVERTED)[:3])
def test_flow_ramps_are_those_of_diffusers(option):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**{option: True})
    for steps in STEPS[1:]:
        scheduler.set_timesteps(steps)
        got = FLOW.points(steps, CONVERTED[option][0]).sigmas
        want = scheduler.sigmas.double().numpy()
        assert (np.abs(got - want) <= want * EPS32 * (8 + 7 + math.log(1000))).all()


# --- points of one's own ----------------------------------------------------------------------


def test_custom_sigmas():
    want = SD.points(10, "karras")
    given = levels_of(SD, want)
    for sigmas in (given, given[:-1], given.astype(np.float32)):  # with 0, without, rounded
        got = SD.custom(sigmas=sigmas)
        assert len(got.times) == 11
        assert_levels(SD, got, given, EPS32, len(sigmas))
        assert (got.times[0], got.times[-2], got.times[-1]) == (999, 0, -1)
    part = SD.custom(sigmas=given[3:7], final="sigma_min")
    assert_levels(SD, part, given[3:7], 0.0)
    for schedule, sigmas in ((EDM, [100.0, 3.0, 0.001]), (FLOW, [0.9, 0.5, 0.1])):
        got = schedule.custom(sigmas=sigmas)
        assert got.times.tolist() == [*sigmas, 0.0]  # an EDM takes any level
    table = solvers.build("heun", EDM, sigmas=[40.0, 3.0, 0.5])
    assert (table.init_sigma, len(table)) == (40.0, 5)


def test_custom_timesteps_are_those_of_diffusers():
    times = AysSchedules["StableDiffusionTimesteps"]
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )
    schedule = schedule_of(scheduler)
    scheduler.set_timesteps(timesteps=times)
    got = schedule.custom(timesteps=times)
    assert got.times.tolist() == [*times, -1]
    low = ends(schedule)[0]
    assert_levels(schedule, got, scheduler.sigmas.double().numpy(), EPS32 * (4 + 1 / low**2))
    table = solvers.build("euler", schedule, 10, timesteps=times)
    assert table.times.tolist() == times
    assert schedule.custom(timesteps=[*times, -1]).times.tolist() == got.times.tolist()
    assert schedule.custom(timesteps=times, final="sigma_min").times.tolist() == times


ERRORS = {
    "ddim_uniform": (lambda: SD.points(7, "ddim_uniform"), "got 7, which gives 8 steps"),
    "beta": (lambda: SD.points(900, "beta@comfy"), "coincide or rise for steps=900, sp"),
    "simple": (lambda: SD.points(1001, "simple"), "steps must be at most 1000"),
    "vp": (lambda: SD.points(5, "vp"), r"sigma/alpha in \[0.0291672, 14.6146\].*got 152"),
    "ays": (lambda: LINEAR.points(5, "ays@sd1"), "from 14.615 to 0.029 for 'ays@sd1', got 157"),
    "eps_s": (lambda: LINEAR.points(5, "vp", eps_s=2.0), "eps_s must obey"),
    "beta_d": (lambda: LINEAR.points(5, "vp", beta_d=-2.0), "beta_d must be > 0"),
    "alpha": (lambda: SD.points(5, "beta@comfy", alpha=2e3), r"alpha must lie in \[0.1, 1000\]"),
    "not falling": (
        lambda: FLOW.points(50, "linear_quadratic", threshold_noise=0.1, linear_steps=1),
        "strictly decrease",
    ),
    "unknown": (
        lambda: SD.points(5, "vp", mu=1.0), r"mu must be left out unless .* \['laplace'\], got 1",
    ),
    "T": (lambda: FLOW.points(5, "simple", T=1), "T must be >= 2"),
    "threshold": (
        lambda: FLOW.points(5, "linear_quadratic", threshold_noise=1.0), "threshold_noise must lie",
    ),
    "linear_steps": (
        lambda: FLOW.points(5, "linear_quadratic", linear_steps=5), "must be below steps=5",
    ),
    "shifted": (
        lambda: schedules.flow(3.0).points(5, "linear_quadratic"), "'linspace' for a shifted flow",
    ),
    "terminal": (lambda: FLOW.points(1, shift_terminal=0.1), "at least two steps, got 0.1"),
    "terminal of a flow": (
        lambda: SD.points(5, "linspace", shift_terminal=0.1), "unless the schedule is a flow",
    ),
    "two lists": (lambda: SD.custom(sigmas=[1.0], timesteps=[1.0]), "be one list"),
    "no list": (lambda: SD.custom(), "be one list"),
    "empty": (lambda: SD.custom(sigmas=[]), "list must be flat"),
    "NaN": (lambda: EDM.custom(sigmas=[math.nan]), "list must be finite"),
    "one point": (lambda: SD.custom(sigmas=[1.0], final="sigma_min"), "be at least two, got one"),
    "rising": (lambda: SD.custom(sigmas=[1.0, 2.0]), "coincide or rise for the given list"),
    "too noisy": (lambda: SD.custom(sigmas=[20.0, 2.0]), r"sigma/alpha in \[0.029.*got 20"),
    "below 0": (lambda: SD.custom(sigmas=[2.0, -1.0]), "sigmas must be >= 0"),
    "after the end": (lambda: SD.custom(timesteps=[1000, 3]), "t must be -1 or in"),
    "seq_len": (lambda: schedules.dynamic_shift(0), "seq_len must be >= 1"),
    "lengths": (lambda: schedules.dynamic_shift(9, max_seq_len=256), "below max_seq_len"),
    "shift type": (lambda: schedules.dynamic_shift(9, time_shift_type="x"), "must be one of"),
    "negative": (
        lambda: schedules.dynamic_shift(1, base_shift=-1.0, time_shift_type="linear"), "mu must be",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    call, message = ERRORS[case]
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert str(caught.value).startswith("schedules.")


def test_build_takes_points_or_a_spacing():
    given = {"sigmas": [10.0, 1.0]}
    for more, error, message in (
        ({"spacing": "karras"}, ValueError, "spacing must be left out .*, got karras"),
        ({"rho": 3.0}, ValueError, "spacing must be left out .*, got rho"),
        ({"steps": 3}, ValueError, "steps must be the 2 of the given list, got 3"),
        ({"steps": 2.0}, TypeError, "steps must be an integer"),
        ({"final": "x"}, ValueError, "final must be one of"),
    ):
        with pytest.raises(error, match=message):
            solvers.build("euler", EDM, **given, **more)
    with pytest.raises(TypeError, match="steps must be an integer of at least 1, got None"):
        solvers.build("euler", EDM)
    a = solvers.build("euler", EDM, 4, spacing="laplace", mu=0.2, prediction="sample")
    assert a.sigmas.tolist() == EDM.points(4, "laplace", mu=0.2).sigmas[:-1].tolist()


def test_no_solver_option_is_a_spacing_option():
    import inspect

    for name, builder in solvers.SOLVERS.items():
        options = [p.name for p in inspect.signature(builder).parameters.values()][1:]
        assert not set(options) & set(spacings.OPTIONS), name


def test_every_spacing_is_held_against_a_peer():
    tested = {"trailing", "linspace", "leading"}  # test_schedules.py
    tested |= {"lcm"}  # test_peers_distilled.py
    tested |= set(K) | set(COMFY) | set(spacings.AYS) | {v[0] for v in CONVERTED.values()}
    tested |= {"vp", "laplace", "kl_optimal", "linear_quadratic"}
    assert tested == {name for names in schedules.SPACINGS.values() for name in names}
