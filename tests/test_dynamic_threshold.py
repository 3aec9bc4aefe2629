"""Dynamic thresholding: the quantile against torch's, diffusers' step, and the sampler's loop."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from bits import assert_same_bits
from budget import assert_within_budget
from tables import Guard, needs_extension

from fastdiff import Sampler, schedules, solvers, use_backend
from fastdiff.ops import dynamic_threshold, quantile_abs, randn

RATIOS = (0.0, 0.3, 0.5, 0.995, 1.0)


def _data(kind: str, n: int) -> torch.Tensor:
    """Two samples of n elements."""
    z = randn([1, 2], (n,))
    return {
        "normal": z * 1.5,
        "ties": (z * 2).round(),
        "equal": torch.full((2, n), -0.75),
        "zeros": z * 0 * z.sign(),  # of both signs
        # one bucket of the first digit, and of the second, holds everything
        "narrow": 1 + z.abs() * 1e-3,
        "narrowest": 1 + z.abs() * 1e-6,
        "subnormal": z * 1e-42,
        "wide": z.sign() * torch.exp(20 * z.clamp(-4, 4)),
        "infinite": torch.where(z.abs() > 1, z.sign() * math.inf, z),
    }[kind]


KINDS = ("normal", "ties", "equal", "zeros", "narrow", "narrowest", "subnormal", "wide", "infinite")


def _exact(x: torch.Tensor, ratio: float) -> torch.Tensor:
    """The order statistics by a sort, interpolated in float64."""
    values = x.flatten(1).abs().double().numpy()
    values.sort(axis=1)
    place = ratio * (values.shape[1] - 1)
    low, w = int(place), place - int(place)
    a, b = values[:, low], values[:, min(low + 1, values.shape[1] - 1)]
    with np.errstate(invalid="ignore"):
        rise = np.where(a == b, 0.0, b - a)
        s = a + w * rise if w < 0.5 else b - rise * (1 - w)
    return torch.from_numpy(s).to(x.dtype)


# one element, two, an odd number, and slices for two threads
@pytest.mark.parametrize("n", (1, 2, 3, 10, 257, 200_003))
@pytest.mark.parametrize("kind", KINDS)
def test_quantile(isa: str, kind: str, n: int) -> None:
    x = _data(kind, n)
    for ratio in RATIOS:
        expected = _exact(x, ratio)
        assert_same_bits(quantile_abs(x, ratio), expected, f"{ratio}")
        if kind != "infinite":  # torch has NaN between two infinities
            peer = torch.quantile(x.double().abs(), ratio, dim=1).float()
            assert_same_bits(quantile_abs(x, ratio), peer, f"torch {ratio}")


@pytest.mark.parametrize("kind", KINDS)
def test_reference_quantile(kind: str) -> None:
    x = _data(kind, 257)
    with use_backend("reference"):
        for ratio in RATIOS:
            assert_same_bits(quantile_abs(x, ratio), _exact(x, ratio))
            assert_same_bits(quantile_abs(x.double(), ratio), _exact(x.double(), ratio))


@needs_extension
def test_next_value_in_another_bucket() -> None:
    """The quantile lies between the last of one bucket and the first of a later one."""
    x = torch.cat([torch.full((90,), 0.1), torch.full((10,), 900.0)])[None]
    assert_same_bits(quantile_abs(x, 0.9), _exact(x, 0.9))
    assert 0.1 < float(quantile_abs(x, 0.9)) < 900


def test_nan_stays_in_its_sample(isa: str) -> None:
    x = _data("normal", 1000)
    x[0, 5] = math.nan
    got, s = dynamic_threshold(x, 0.5)
    assert bool(s[0].isnan()) and bool(got[0].isnan().all())
    alone, s1 = dynamic_threshold(x[1:], 0.5)
    assert_same_bits(got[1:], alone)
    assert_same_bits(s[1:], s1)
    with use_backend("reference"):
        assert_same_bits(dynamic_threshold(x, 0.5)[0], got)


@pytest.mark.parametrize("threads", (1, 2, 3))
def test_threads_and_batch_change_nothing(threads: int) -> None:
    x = _data("normal", 300_000)
    expected, s = dynamic_threshold(x, 0.9)
    torch.set_num_threads(threads)
    for i in (0, 1):
        got, one = dynamic_threshold(x[i : i + 1], 0.9)
        assert_same_bits(got, expected[i : i + 1])
        assert_same_bits(one, s[i : i + 1])


def _diffusers(ratio: float, most: float) -> Any:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(
        thresholding=True, dynamic_thresholding_ratio=ratio, sample_max_value=most,
        clip_sample=False, prediction_type="epsilon", timestep_spacing="trailing",
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
    )  # fmt: skip
    return scheduler


# diffusers' default bound, which is plain clipping; a bound that is reached; none
@pytest.mark.parametrize("most", (1.0, 1.7, 100.0))
@pytest.mark.parametrize("ratio", (0.5, 0.9, 0.995))
def test_diffusers_threshold_sample(isa: str, ratio: float, most: float) -> None:
    """Where ratio * (size - 1) is exact in float32 the peer's rank is too, and the bits agree but
    for its float32 interpolation: one ulp of s, two of the quotient."""
    x = (randn([1, 2, 3], (3, 20, 20)) * 1.2).contiguous()
    got, s = dynamic_threshold(x, ratio, max_value=most)
    peer = _diffusers(ratio, most)._threshold_sample(x)
    exact = _exact(x.double(), ratio).clamp(1.0, most).view(-1, 1, 1, 1)
    truth = torch.clamp(x.double(), -exact, exact) / exact
    assert_within_budget(got, peer, truth, ulps=1)
    assert_same_bits(s, _exact(x, ratio).clamp(1.0, most))


@pytest.mark.parametrize("fmt", (torch.contiguous_format, torch.channels_last), ids=str)
def test_memory(isa: str, fmt: torch.memory_format) -> None:
    x = (randn([1, 2, 3], (5, 7, 9)) * 2).contiguous(memory_format=fmt)
    before = x.clone()
    with use_backend("reference"):
        expected, s = dynamic_threshold(x, 0.8)
    out = Guard((3, 5, 7, 9), fmt)
    got, mine = dynamic_threshold(x, 0.8, out=out.tensor)
    out.check("out")
    assert got is out.tensor
    assert_same_bits(got, expected)
    assert_same_bits(mine, s)
    assert_same_bits(x, before)
    dynamic_threshold(x, 0.8, out=x)
    assert_same_bits(x, expected)


def test_other_strides_and_no_samples() -> None:
    x = randn([1, 2], (8, 6)) * 2
    expected = dynamic_threshold(x[:, :, ::2].contiguous(), 0.8)[0]
    assert_same_bits(dynamic_threshold(x[:, :, ::2], 0.8)[0], expected)
    empty, s = dynamic_threshold(x[:0], 0.8)
    assert empty.shape == (0, 8, 6) and s.shape == (0,)


X = torch.zeros(2, 3)
WRONG = {
    "type": ((X.half(),), {}, TypeError, "x must be a float32 or float64 tensor, got torch.float"),
    "no tensor": ((1.0,), {}, TypeError, "x must be a float32 or float64 tensor, got float"),
    "empty": ((X[:, :0],), {}, ValueError, "x must have samples with elements, got shape (2, 0)"),
    "ratio": ((X, 1.5), {}, ValueError, "ratio must lie in [0, 1], got 1.5"),
    "nan": ((X, math.nan), {}, ValueError, "ratio must lie in [0, 1], got nan"),
    "no number": ((X, "a"), {}, TypeError, "ratio must be a number, got str"),
    "bound": ((X,), {"max_value": 0.5}, ValueError, "max_value must be at least 1, got 0.5"),
    "out": ((X,), {"out": X[:1]}, ValueError, "out must have shape, dtype and device of x"),
}  # fmt: skip


@pytest.mark.parametrize(("args", "more", "kind", "message"), WRONG.values(), ids=WRONG)
def test_errors(args: Any, more: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=re.escape(f"dynamic_threshold: {message}")):
        dynamic_threshold(*args, **more)


# --- in the sampler -----------------------------------------------------------------------------


def _model(x: torch.Tensor, t: torch.Tensor, shift: Any = 0.0) -> torch.Tensor:
    by_sample = shift.view(-1, 1, 1, 1) if isinstance(shift, torch.Tensor) else shift
    return torch.sin(3 * x) + 0.01 * t.view(-1, 1, 1, 1) / 1000 + by_sample


# the default of the paper and a bound
@pytest.mark.parametrize("thresholding", (0.9, (0.95, 1.5)), ids=str)
@pytest.mark.parametrize("guidance", (None, 4.0))
def test_ddim_of_diffusers(thresholding: Any, guidance: float | None) -> None:
    """Every step of diffusers' DDIM with thresholding, from our state: in float64 by its formula,
    so that no error of earlier steps comes along."""
    ratio, most = thresholding if isinstance(thresholding, tuple) else (thresholding, 1e9)
    table = solvers.build("ddim", schedules.scaled_linear(), 5)
    sampler = Sampler(_model, table, guidance=guidance, thresholding=thresholding)
    shift = torch.full((2,), 0.1)
    given = {"cond": {"shift": shift}, "uncond": {"shift": -shift}} if guidance else {}
    noise = randn([1, 2], (3, 10, 10))
    scheduler = _diffusers(ratio, most)
    scheduler.set_timesteps(5)
    x, limited = noise, 0
    steps = sampler.iter(noise=noise, seeds=[1, 2], **given)
    for step, t in zip(steps, scheduler.timesteps, strict=True):
        time = torch.full((2,), float(t))
        if guidance:
            cond, uncond = (_model(x, time, s) for s in (shift, -shift))
            output = uncond + guidance * (cond - uncond)
        else:
            output = _model(x, time)
        # epsilon from the thresholded x0, as every solver here has it
        peer = scheduler.step(output, int(t), x, use_clipped_model_output=True)
        row = table.rows[step.index]
        p, q = row.convert
        x0 = p * x.double() + q * output.double()
        s = _exact(x0, ratio).clamp(1.0, most).view(-1, 1, 1, 1)
        limited += int((s > 1).sum())
        x0 = torch.clamp(x0, -s, s) / s
        exact = row.x["x"] * x.double() + row.x["d"] * x0
        assert step.denoised is not None
        assert_within_budget(step.denoised, peer.pred_original_sample, x0, ulps=4)
        assert_within_budget(step.x, peer.prev_sample, exact, ulps=4)
        x = step.x
    assert limited > 0


def test_denoised_is_what_the_row_used() -> None:
    table = solvers.build("dpmpp_2m", schedules.scaled_linear(), 4)
    for step in Sampler(_model, table, thresholding=0.9).iter((3, 4, 4), seeds=[1]):
        assert step.denoised is not None and float(step.denoised.abs().max()) <= 1.0


@pytest.mark.parametrize("name", ("ddim", "dpmpp_2m", "euler_ancestral"))
def test_a_bound_of_one_is_clipping(name: str) -> None:
    table = solvers.build(name, schedules.scaled_linear(), 4)
    clipped = Sampler(_model, table, clip=1.0)((3, 4, 4), seeds=[1])
    got = Sampler(_model, table, thresholding=(0.995, 1.0))((3, 4, 4), seeds=[1])
    # the same arithmetic: clipping converts first as well
    assert_same_bits(got, clipped)


def test_image_depends_on_its_seed_alone() -> None:
    table = solvers.build("dpmpp_2m_sde", schedules.scaled_linear(), 4)
    sampler = Sampler(_model, table, thresholding=0.9, noise="brownian")
    assert_same_bits(sampler((3, 4, 4), seeds=[5]), sampler((3, 4, 4), seeds=[4, 5, 6])[1:2])


def test_learned_variance_of_a_16_bit_model() -> None:
    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.sin(3 * x), 0.1 * x], dim=1)

    table = solvers.build("ddpm", schedules.linear(), 4, variance="learned_range")
    results = [
        Sampler(model, table, dtype=torch.bfloat16, **how)((3, 4, 4), seeds=[1])
        for how in ({"clip": 1.0}, {"thresholding": (0.9, 1.0)})
    ]
    assert_same_bits(results[1], results[0])


def test_sampler_errors() -> None:
    table = solvers.build("ddim", schedules.scaled_linear(), 2)
    with pytest.raises(ValueError, match="clip must be None with thresholding, got 1"):
        Sampler(_model, table, thresholding=0.9, clip=1.0)
    with pytest.raises(ValueError, match=re.escape("ratio must lie in [0, 1], got 2.0")):
        Sampler(_model, table, thresholding=2.0)
