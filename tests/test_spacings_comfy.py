"""Spacings against transcriptions of ComfyUI and A1111, and against the published tables."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from diffusers.schedulers.scheduling_utils import AysSchedules
from spacing_cases import EDM, EPS, FLOW, SD, STEPS, assert_levels, ends, levels_of

from fastdiff import schedules, spacings


class ModelSampling:
    """What ComfyUI's ModelSamplingDiscrete and ModelSamplingDiscreteFlow say of a model."""

    def __init__(self, schedule, T=1000):
        self.shift, self.T = schedule.shift, T
        self.is_flow = schedule.kind == "flow"
        if self.is_flow:
            self.sigmas = np.array([self.sigma(t) for t in np.arange(1, T + 1)])
        else:
            abar = schedule.alphas_cumprod
            self.sigmas = ((1 - abar) / abar) ** 0.5

    def timestep(self, sigma):
        if self.is_flow:
            return sigma * self.T
        return int(np.abs(np.log(sigma) - np.log(self.sigmas)).argmin())

    def sigma(self, t):
        if self.is_flow:
            return self.shift * (t / self.T) / (1 + (self.shift - 1) * (t / self.T))
        t = min(max(t, 0), len(self.sigmas) - 1)
        low, high, w = math.floor(t), math.ceil(t), t - math.floor(t)
        return math.exp((1 - w) * math.log(self.sigmas[low]) + w * math.log(self.sigmas[high]))


def comfy_simple(s, steps):
    stride = len(s.sigmas) / steps
    return [s.sigmas[-(1 + int(x * stride))] for x in range(steps)] + [0.0]


def comfy_ddim_uniform(s, steps):
    sigmas, stride, x = [0.0], max(len(s.sigmas) // steps, 1), 1
    while x < len(s.sigmas):
        sigmas.append(s.sigmas[x])
        x += stride
    return sigmas[::-1]


def comfy_normal(s, steps, sgm=False):
    start, end = s.timestep(s.sigmas[-1]), s.timestep(s.sigmas[0])
    times = np.linspace(start, end, steps + 1)[:-1] if sgm else np.linspace(start, end, steps)
    return [s.sigma(t) for t in times] + [0.0]


def comfy_beta(s, steps):
    times = 1 - np.linspace(0, 1, steps, endpoint=False)
    times = np.rint(scipy.stats.beta.ppf(times, 0.6, 0.6) * (len(s.sigmas) - 1))
    sigmas, last = [], -1
    for t in times:
        if t != last:
            sigmas.append(s.sigmas[int(t)])
        last = t
    return [*sigmas, 0.0]


COMFY = {
    "simple": comfy_simple,
    "ddim_uniform": comfy_ddim_uniform,
    "normal": comfy_normal,
    "sgm_uniform": lambda s, steps: comfy_normal(s, steps, sgm=True),
    "beta@comfy": comfy_beta,
}
MODELS = {
    "sd": (SD, "Stable Diffusion"),
    "short": (schedules.linear(T=17, beta_start=0.01, beta_end=0.3), "few levels"),
    "flow": (FLOW, "no shift"),
    "shifted": (schedules.flow(shift=3.0), "Stable Diffusion 3"),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", COMFY)
def test_comfy_on_a_table(name, model):
    schedule = MODELS[model][0]
    refused = 0
    for steps in range(1, 61):
        want = COMFY[name](ModelSampling(schedule), steps)
        repeats = (np.diff(want) >= 0).any()
        if len(want) != steps + 1 or repeats:
            refused += 1
            with pytest.raises(ValueError, match=r"steps must|strictly decrease"):
                schedule.points(steps, name)
            continue
        # a ratio, a warp or a logarithm and its exponential: a few roundings of at most 8 in size
        assert_levels(schedule, schedule.points(steps, name), np.array(want), 64 * EPS, steps)
    assert refused < 60 and (refused > 0) == (
        name == "ddim_uniform" or (model == "short" and name in ("simple", "beta@comfy"))
    )


def comfy_laplace(n, low, high, mu=0.0, beta=0.5):
    x = np.linspace(0, 1, n)
    logs = mu - beta * np.sign(0.5 - x) * np.log(1 - 2 * np.abs(0.5 - x) + 1e-5)
    return np.clip(np.exp(logs), low, high)


def test_laplace():
    """ComfyUI's list has n levels and no 0: n - 1 steps, or n with the 0 that others append."""
    for schedule in (SD, EDM):
        low, high = ends(schedule)
        for steps in (1, 2, 3, 10):
            for options in ({}, {"mu": 0.3, "beta": 0.4}):
                want = comfy_laplace(steps, low, high, **options)
                grid = schedule.points(steps, "laplace", **options)
                assert_levels(schedule, grid, np.append(want, 0.0), 64 * EPS, steps)
                if steps > 1:
                    grid = schedule.points(steps - 1, "laplace", "sigma_min", **options)
                    assert_levels(schedule, grid, want, 64 * EPS, steps)
    with pytest.raises(ValueError, match="coincide or rise for steps=500, spacing='laplace'"):
        SD.points(500, "laplace")  # several levels are clamped to the noisiest


@pytest.mark.parametrize("schedule", [SD, EDM, FLOW], ids=["sd", "edm", "flow"])
def test_kl_optimal(schedule):
    low, high = (schedule.t_min, 1.0) if schedule.kind == "flow" else ends(schedule)
    for n in STEPS:
        a, b = math.atan(low), math.atan(high)
        # tan near pi/2 multiplies a rounding by its own size
        bound = 16 * EPS * (1 + high)
        if n > 1:
            u = np.arange(n) / (n - 1)
            comfy = np.append(np.tan(u * a + (1 - u) * b), 0.0)
            assert_levels(schedule, schedule.points(n, "kl_optimal"), comfy, bound, n)
        u = np.arange(n + 1)
        a1111 = np.tan(u / n * a + (1.0 - u / n) * b)
        got = schedule.points(n, "kl_optimal", "sigma_min")
        assert_levels(schedule, got, a1111, bound, n)


def comfy_linear_quadratic(steps, threshold=0.025, linear_steps=None):
    if steps == 1:
        return [1.0, 0.0]
    k = steps // 2 if linear_steps is None else linear_steps
    first = [i * threshold / k for i in range(k)]
    diff, rest = k - threshold * steps, steps - k
    a = diff / (k * rest**2)
    b = threshold / k - 2 * diff / (rest**2)
    last = [a * i**2 + b * i + a * k**2 for i in range(k, steps)]
    return [1.0 - x for x in first + last + [1.0]]


def test_linear_quadratic():
    for options in ({}, {"threshold_noise": 0.1}, {"threshold_noise": 0.1, "linear_steps": 1}):
        for steps in STEPS if len(options) < 2 else (2, 3, 7, 10):  # beyond, 1/10 is no slope down
            want = np.array(comfy_linear_quadratic(steps, *options.values()))
            got = FLOW.points(steps, "linear_quadratic", **options).sigmas
            # differences of numbers of the size of the number of steps
            assert len(got) == len(want) and np.abs(got - want).max() <= 8 * EPS * steps
    last = FLOW.points(9, "linear_quadratic", "sigma_min").times
    assert len(last) == 10 and last[-1] == FLOW.t_min
    assert FLOW.points(1, "linear_quadratic", "sigma_min").times.tolist() == [1.0, FLOW.t_min]


SVD = schedules.edm(sigma_min=0.002, sigma_max=700.0)


@pytest.mark.parametrize("name", spacings.AYS)
def test_align_your_steps(name):
    schedule = SVD if name == "ays@svd" else SD
    key = {"sd1": "StableDiffusion", "sdxl": "StableDiffusionXL", "svd": "StableDiffusionVideo"}
    published = AysSchedules[key[name[4:]] + "Sigmas"]  # ten levels and 0
    low, high = ends(schedule)
    got = levels_of(schedule, schedule.points(10, name))
    assert np.abs(got[1:] - published[1:]).max() <= 1e-12
    assert abs(got[0] - published[0]) < 5e-4  # three decimals

    # ComfyUI's log-linear interpolation, from the quiet end
    table = np.array([*published[:-1], spacings.AYS[name][-1]])
    for steps in STEPS:
        x = np.linspace(0, 1, 11), np.linspace(0, 1, steps + 1)
        want = np.exp(np.interp(x[1], x[0], np.log(table[::-1])))[::-1].copy()
        want[0], want[-1] = high, 0.0
        assert_levels(schedule, schedule.points(steps, name), want, 64 * EPS, steps)
        want[-1] = low
        assert_levels(schedule, schedule.points(steps, name, "sigma_min"), want, 64 * EPS, steps)
