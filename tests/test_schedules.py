"""Schedules against diffusers, against extended precision and against their own inverses."""

import json
import math

import diffusers
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff import schedules
from fastdiff.schedules import SPACINGS, Schedule

EPS = float(np.finfo(np.float64).eps)
EPS32 = float(np.finfo(np.float32).eps)

# one of each formula; the last has sigma/alpha infinite at its end
DISCRETE = {
    "linear": schedules.linear(),
    "scaled_linear": schedules.scaled_linear(),
    "cosine": schedules.cosine(),
    "sigmoid": schedules.sigmoid(),
    "short": schedules.linear(T=17, beta_start=0.01, beta_end=0.3),
    "zero_snr": schedules.rescale_zero_terminal_snr(schedules.scaled_linear()),
}
FINITE = {k: v for k, v in DISCRETE.items() if k != "zero_snr"}
ALL = {
    **DISCRETE,
    "edm": schedules.edm(),
    "flow": schedules.flow(),
    "shifted": schedules.flow(shift=3.0),
    "from_betas": schedules.from_betas([0.1, 0.2, 1.0]),
}


def abar(schedule: Schedule) -> np.ndarray:
    assert schedule.alphas_cumprod is not None
    return schedule.alphas_cumprod


def product_bound(betas: np.ndarray, eps: float) -> np.ndarray:
    """Relative error of alphabar when betas and products are rounded at `eps`.

    A beta that is off by 16 eps (a square or a logistic of a rounded ramp) moves 1 - beta by
    16 eps beta, that is by 16 eps beta / (1 - beta) relatively; rounding 1 - beta and the product
    add one eps each.
    """
    return np.cumsum(eps * (16 * betas / (1 - betas) + 2))


@pytest.mark.parametrize(
    ("ours", "beta_schedule", "start", "end"),
    [
        (schedules.linear(), "linear", 1e-4, 0.02),
        (schedules.scaled_linear(), "scaled_linear", 0.00085, 0.012),
        (schedules.cosine(), "squaredcos_cap_v2", 1e-4, 0.02),
        (schedules.sigmoid(), "sigmoid", 1e-4, 0.02),
    ],
    ids=["linear", "scaled_linear", "cosine", "sigmoid"],
)
def test_alphabar_is_that_of_diffusers(ours, beta_schedule, start, end):
    peer = diffusers.DDPMScheduler(beta_schedule=beta_schedule, beta_start=start, beta_end=end)
    theirs = peer.alphas_cumprod.double().numpy()
    # diffusers works in float32
    assert (
        np.abs(theirs - abar(ours))
        <= abar(ours) * product_bound(peer.betas.double().numpy(), EPS32)
    ).all()


def test_alphabar_in_extended_precision():
    betas = np.linspace(np.longdouble("1e-4"), np.longdouble("0.02"), 1000)
    exact = np.cumprod(1 - betas)
    ours = schedules.linear()
    assert (
        np.abs(abar(ours) - exact) <= abar(ours) * product_bound(betas.astype(float), EPS)
    ).all()


def test_zero_terminal_snr_is_that_of_diffusers():
    base, ours = schedules.scaled_linear(), DISCRETE["zero_snr"]
    peer = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
        rescale_betas_zero_snr=True,
    )  # fmt: skip
    theirs = peer.alphas_cumprod.double().numpy()
    # the subtracted root carries its own float32 error into every entry, and diffusers multiplies
    # the rescaled alphas up again
    root = np.sqrt(abar(base)) * product_bound(base.betas, EPS32)
    again = product_bound(base.betas, EPS32)
    bound = 2 * np.sqrt(abar(ours)) * (root + root[-1]) + abar(ours) * 2 * again
    assert (np.abs(theirs - abar(ours)) <= bound).all()
    assert abar(ours)[-1] == 0
    assert ours.alpha(999) == 0
    assert ours.sigma(999) == 1
    assert ours.ratio(999) == math.inf
    # the first entry is kept
    assert abs(abar(ours)[0] - abar(base)[0]) <= 8 * EPS


@pytest.mark.parametrize("schedule", DISCRETE.values(), ids=DISCRETE)
def test_integer_times_are_exact(schedule):
    t = np.arange(len(abar(schedule)))
    assert np.array_equal(schedule.alpha(t), np.sqrt(abar(schedule)))
    assert np.array_equal(schedule.sigma(t), np.sqrt(1 - abar(schedule)))


@pytest.mark.parametrize("schedule", ALL.values(), ids=ALL)
def test_clean_data_is_exact(schedule):
    assert schedule.alpha(schedule.t_clean) == 1
    assert schedule.sigma(schedule.t_clean) == 0


@given(name=st.sampled_from(sorted(DISCRETE)), share=st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_fractional_times_preserve_variance(name, share):
    schedule = DISCRETE[name]
    t = share * schedule.t_max
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    assert abs(alpha**2 + sigma**2 - 1) <= 8 * EPS


@given(name=st.sampled_from(sorted(FINITE)), share=st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_fractional_times_interpolate_the_log_ratio(name, share):
    schedule = FINITE[name]
    t = share * schedule.t_max
    logs = 0.5 * np.log((1 - abar(schedule)) / abar(schedule))
    want = np.interp(t, np.arange(len(logs)), logs)
    got = np.log(schedule.ratio(t))
    # a logarithm and its exponential are each off by eps times the size of the logarithm; at whole
    # t, 1 - alphabar is off by eps / (1 - alphabar)
    size = 1 + np.abs(logs).max() + 1 / (1 - abar(schedule)[0])
    assert abs(got - want) <= 8 * EPS * size


@given(name=st.sampled_from(sorted(FINITE)), share=st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_time_inverts_ratio(name, share):
    schedule = FINITE[name]
    t = share * schedule.t_max
    logs = 0.5 * np.log((1 - abar(schedule)) / abar(schedule))
    low = min(int(t), len(logs) - 2)
    # near a whole t the neighbour's slope may be the one that counts
    slope = np.diff(logs)[max(low - 1, 0) : low + 2].min()
    size = 1 + np.abs(logs).max() + 1 / (1 - abar(schedule)[0])
    assert abs(float(schedule.time(schedule.ratio(t))) - t) <= 16 * EPS * size / slope + EPS * t


def test_time_is_clipped_at_the_ends():
    for schedule in DISCRETE.values():
        assert schedule.time(0.0) == 0
        assert schedule.time(math.inf) == schedule.t_max
    zero = DISCRETE["zero_snr"]
    # no finite ratio lies between the last two points of a zero terminal SNR
    assert zero.time(1e300) == 998
    assert zero.alpha(998.5) == 0
    assert zero.sigma(998.5) == 1


@given(t=st.floats(0, 1))
def test_flow_time_inverts_ratio(t):
    schedule = schedules.flow()
    # the ratio of a t near 1 knows 1 - t only to eps
    assert abs(float(schedule.time(schedule.ratio(t))) - t) <= 4 * EPS


def test_edm_time_is_sigma():
    schedule = schedules.edm()
    sigmas = np.array([0.002, 0.5, 80.0, 1e4])
    assert np.array_equal(schedule.time(sigmas), sigmas)
    assert np.array_equal(schedule.sigma(sigmas), sigmas)
    assert np.array_equal(schedule.alpha(sigmas), np.ones(4))
    assert (schedule.t_min, schedule.t_max, schedule.init_sigma) == (0.002, 80.0, 80.0)


# every residue of 1000 mod steps up to 50, both sides of 1000/3 and of T, and T itself
STEPS = [*range(1, 51), 63, 100, 250, 333, 334, 500, 501, 999, 1000]


@pytest.mark.parametrize("offset", [0, 1], ids=["offset0", "offset1"])
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_integer_spacings_are_those_of_diffusers(spacing, offset):
    if offset and spacing != "leading":
        return  # steps_offset is of "leading" alone: see test_errors
    peer = diffusers.DDIMScheduler(timestep_spacing=spacing, steps_offset=offset)
    for steps in STEPS:
        if (spacing, steps) == ("linspace", 1):
            continue  # theirs is [0], a model call on noise said to be clean data
        if offset and steps > 500:
            continue  # diffusers then gives times beyond its own table
        peer.set_timesteps(steps)
        grid = schedules.linear().points(steps, spacing, steps_offset=offset)
        assert grid.times[:-1].tolist() == peer.timesteps.tolist(), (spacing, steps)
        assert grid.times[-1] == -1


def test_one_step_starts_from_noise():
    for spacing in ("linspace", "trailing"):
        assert schedules.linear().points(1, spacing).times.tolist() == [999, -1]


def test_karras_in_extended_precision():
    for schedule in (schedules.edm(), schedules.linear(), schedules.cosine()):
        grid = schedule.points(20, "karras")
        high, low = (
            np.longdouble(float(schedule.ratio(t))) for t in (schedule.t_max, schedule.t_min)
        )
        top, bottom = high ** (1 / np.longdouble(7)), low ** (1 / np.longdouble(7))
        want = (top + np.arange(20) / np.longdouble(19) * (bottom - top)) ** 7
        got = grid.sigmas[:-1] / grid.alphas[:-1]
        # the seventh power multiplies a relative error by 7; a discrete schedule goes through
        # log, time and exp, whose errors are eps times log(ratio), t and log(ratio)
        hops = 0.0
        if schedule.alphas_cumprod is not None:
            logs = np.log(schedule.ratio(np.arange(1000)))
            hops = 8 * EPS * (1 + np.abs(logs).max() + 1000 * np.diff(logs).max())
        assert (np.abs(got - want) <= want * (64 * EPS + hops)).all()


def test_exponential_is_geometric():
    for schedule in (schedules.edm(), schedules.flow()):
        levels = schedule.points(10, "exponential").sigmas[:-1]
        ratios = levels[1:] / levels[:-1]
        size = abs(math.log(schedule.t_min)) + abs(math.log(schedule.t_max))
        assert np.ptp(ratios) <= 8 * EPS * size


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 17.0], ids=str)
def test_flow_shift(shift):
    u = np.linspace(1, 0, 9)
    grid = schedules.flow(shift).points(8)
    want = shift * u / (1 + (shift - 1) * u)
    assert (np.abs(grid.times - want) <= 4 * EPS).all()
    assert (grid.times[0], grid.times[-1]) == (1, 0)
    # the warp multiplies sigma/alpha by the shift
    ratio = schedules.flow(shift).ratio(grid.times[1:])
    want_ratio = shift * (u / np.where(u < 1, 1 - u, 1))[1:]
    assert (np.abs(ratio - want_ratio) <= want_ratio * 16 * EPS / (1 - grid.times[1])).all()
    assert schedules.flow(shift).points(8, final="sigma_min").times[-1] == 1e-3


@given(
    name=st.sampled_from(sorted(ALL)),
    steps=st.integers(1, 1000),
    choice=st.integers(0, 71),  # each spacing of 18, 8 and 12
    final=st.sampled_from(["zero", "sigma_min"]),
)
@settings(max_examples=400, deadline=None)
def test_grids_are_well_formed_or_refused(name, steps, choice, final):
    schedule = ALL[name]
    spacings = SPACINGS[schedule.kind]
    try:
        spacing = spacings[choice % len(spacings)]
        grid = schedule.points(steps, spacing, final)
    except ValueError as error:
        assert str(error).startswith("schedules.points: ")
        return
    assert len(grid.times) == steps + 1
    assert (np.diff(grid.times) < 0).all()
    of_its_own = spacing in ("vp", "laplace")  # which need not reach the schedule's ends
    if final == "zero" or not of_its_own:
        assert grid.times[-1] == (schedule.t_clean if final == "zero" else schedule.t_min)
    assert np.array_equal(grid.alphas, schedule.alpha(grid.times))
    assert np.array_equal(grid.sigmas, schedule.sigma(grid.times))
    for array in (grid.times, grid.alphas, grid.sigmas):
        assert array.dtype == np.float64
        assert not array.flags.writeable
    if schedule.kind == "edm" and not of_its_own:
        assert grid.sigmas[0] == schedule.init_sigma


@pytest.mark.parametrize("schedule", ALL.values(), ids=ALL)
def test_defaults_and_ends(schedule):
    grid = schedule.points(3)
    assert np.array_equal(grid.times, schedule.points(3, SPACINGS[schedule.kind][0]).times)
    assert grid.times[0] == schedule.t_max


@pytest.mark.parametrize("schedule", ALL.values(), ids=ALL)
def test_config_survives_json(schedule):
    again = schedules.from_config(json.loads(json.dumps(schedule.to_config())))
    assert again == schedule
    assert hash(again) == hash(schedule)
    if schedule.alphas_cumprod is not None:
        assert np.array_equal(again.alphas_cumprod, schedule.alphas_cumprod)
        assert not again.alphas_cumprod.flags.writeable


def test_every_builder_is_registered():
    builders = {n for n in schedules.__all__ if n.islower()} - {"from_config", "dynamic_shift"}
    assert builders == set(schedules.NAMES)


def test_betas_rebuild_the_schedule():
    for schedule in DISCRETE.values():
        again = schedules.from_betas(schedule.betas)
        # betas come from a quotient of alphabars, whose rounding 1 - beta inherits
        bound = np.cumsum(4 * EPS / np.maximum(1 - schedule.betas, EPS))
        assert (np.abs(abar(again) - abar(schedule)) <= abar(schedule) * bound).all()


LINEAR = schedules.linear()
ZERO = DISCRETE["zero_snr"]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: LINEAR.points(0), ValueError, "steps must be >= 1, got 0"),
        (lambda: LINEAR.points(2.0), TypeError, "steps must be an int, got 2.0"),
        (lambda: LINEAR.points(True), TypeError, "steps must be an int, got True"),
        (lambda: LINEAR.points(1001), ValueError, "steps must be at most 1000"),
        (lambda: LINEAR.points(1000, "linspace", "sigma_min"), ValueError, "at most 999"),
        (lambda: LINEAR.points(1000, "trailing", "sigma_min"), ValueError, "strictly decrease"),
        (lambda: LINEAR.points(5, "log"), ValueError, "spacing must be one of"),
        (lambda: LINEAR.points(5, final="one"), ValueError, "final must be"),
        (lambda: LINEAR.points(5, steps_offset=1), ValueError, "steps_offset must be 0 unless"),
        (lambda: LINEAR.points(1000, "leading", steps_offset=1), ValueError, "below 1000"),
        (lambda: LINEAR.points(5, "leading", "sigma_min", steps_offset=1), ValueError, "sigma_min"),
        (lambda: LINEAR.points(5, "karras", rho=0.0), ValueError, "rho must be > 0"),
        (lambda: ZERO.points(5, "karras"), ValueError, "infinite at t_max, got 'karras'"),
        (lambda: ZERO.points(5, "exponential"), ValueError, "infinite at t_max"),
        (lambda: schedules.edm().points(5, "linspace"), ValueError, "for kind 'edm'"),
        (lambda: schedules.flow(2.0).points(5, "karras"), ValueError, "with shift=2.0"),
        (lambda: LINEAR.alpha(1000), ValueError, r"t must be -1 or in \[0, 999\], got 1000"),
        (lambda: LINEAR.sigma([-0.5, 3]), ValueError, "t must be"),
        (lambda: LINEAR.sigma(math.nan), ValueError, "t must be"),
        (lambda: schedules.flow().alpha(1.5), ValueError, r"in \[0, 1\]"),
        (lambda: LINEAR.time(-1.0), ValueError, "ratio must be >= 0"),
        (lambda: schedules.edm().betas, ValueError, "kind must be 'discrete'"),
        (lambda: schedules.linear(T=1), ValueError, "linear: T must be >= 2"),
        (lambda: schedules.linear(T=10.0), TypeError, "linear: T must be an int"),
        (lambda: schedules.linear(beta_end=1.0), ValueError, "0 < beta_start <= beta_end < 1"),
        (lambda: schedules.cosine(max_beta=1.0), ValueError, "max_beta must"),
        (lambda: schedules.from_betas([[0.1]]), ValueError, "betas must have shape"),
        (lambda: schedules.from_betas([0.1, 1.0, 0.1]), ValueError, r"betas must lie in \(0, 1\)"),
        (lambda: schedules.edm(sigma_min=0.0), ValueError, "sigma_min"),
        (lambda: schedules.flow(shift=0.0), ValueError, "shift"),
        (lambda: schedules.rescale_zero_terminal_snr(schedules.edm()), ValueError, "discrete"),
        (lambda: schedules.from_config({"name": "x"}), ValueError, "name must be one of"),
        (lambda: schedules.from_config({"name": "edm", "T": 3}), ValueError, "config must fit edm"),
    ],
    # one row for each rule a user can break
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    assert str(caught.value).startswith("schedules.")
