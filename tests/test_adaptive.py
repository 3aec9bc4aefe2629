"""Adaptive sampling: the closed form at the asked tolerance, the peers, each sample alone."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from bits import assert_same_bits
from peers import k_sampling
from scopes import default_dtype

from fastdiff import AdaptiveSampler, schedules
from fastdiff.adaptive import METHODS, AdaptiveStep
from fastdiff.ops import randn

S = schedules.Schedule
SCHEDULES = {
    "discrete": schedules.scaled_linear(),
    "cosine": schedules.cosine(),
    "edm": schedules.edm(),
    "flow": schedules.flow(),
    "zero": schedules.rescale_zero_terminal_snr(schedules.linear()),
}
# every prediction where it is defined; at zero terminal signal epsilon says nothing
CASES = (
    ("discrete", "epsilon"), ("discrete", "sample"), ("discrete", "v_prediction"),
    ("cosine", "v_prediction"), ("edm", "edm"), ("edm", "epsilon"), ("flow", "flow"),
    ("flow", "sample"), ("zero", "v_prediction"), ("zero", "sample"),
)  # fmt: skip
MEAN, SD = 0.3, 0.5


def _scales(schedule: S, prediction: str, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if prediction == "edm":  # the model is told log(sigma) / 4
        return np.ones_like(t), np.exp(4 * t)
    return schedule.alpha(t), schedule.sigma(t)


class Exact:
    """The model of data whose E[x0 | x] is known: elementwise, in float64, by the prediction."""

    def __init__(self, schedule: S, prediction: str, mixture: bool = False) -> None:
        self.schedule, self.prediction, self.mixture = schedule, prediction, mixture
        self.calls: list[int] = []

    def __call__(self, x: torch.Tensor, t: torch.Tensor, shift: Any = None) -> torch.Tensor:
        self.calls.append(len(x))
        a, s = _scales(self.schedule, self.prediction, t.double().numpy())
        a, s = (torch.from_numpy(v).view(-1, *[1] * (x.dim() - 1)) for v in (a, s))
        given = x.double()
        data = self.schedule.sigma_data
        if self.prediction == "edm":
            given = given * torch.sqrt(s**2 + data**2)
        total = (a * SD) ** 2 + s**2
        if self.mixture:
            side = torch.tanh(a * given / total)  # modes at -1 and 1
            x0 = side + SD**2 * a / total * (given - a * side)
        else:
            mean = MEAN if shift is None else shift.view(a.shape)
            x0 = mean + SD**2 * a / total * (given - a * mean)
        out = {
            "epsilon": lambda: (given - a * x0) / s,
            "sample": lambda: x0,
            "v_prediction": lambda: a * (given - a * x0) / s - s * x0,
            "flow": lambda: (given - x0) / s,
            "edm": lambda: (x0 - data**2 / (s**2 + data**2) * given)
            * torch.sqrt(s**2 + data**2) / (s * data),
        }[self.prediction]()  # fmt: skip
        return out.to(x.dtype)


def _closed_form(schedule: S, noise: torch.Tensor) -> torch.Tensor:
    """The probability-flow ODE of Gaussian data, from the noisiest to the least noisy time: x keeps
    its place in units of its standard deviation."""
    grid = schedule.points(1, final="sigma_min")
    (a0, a1), (s0, s1) = grid.alphas, grid.sigmas
    x = noise.double() * schedule.init_sigma
    spread = math.hypot(a1 * SD, s1) / math.hypot(a0 * SD, s0)
    return a1 * MEAN + (x - a0 * MEAN) * spread


NOISE = randn([1, 2, 3], (4, 5)).double()


def _allowed(tolerance: float, accepted: torch.Tensor, x: torch.Tensor) -> float:
    """Largest error of an element: a step's error is the root mean square over 20 elements of what
    is at most tolerance * (1 + |x|), and the slope may make an error grow threefold."""
    each = math.sqrt(20) * tolerance * (1 + float(x.abs().max()))
    return 3 * int(accepted.max()) * each


@pytest.mark.parametrize(("name", "prediction"), CASES)
def test_closed_form_at_the_asked_tolerance(name: str, prediction: str) -> None:
    """Float64; and a tolerance a hundred times smaller must shrink the error thirty times."""
    schedule = SCHEDULES[name]
    exact = _closed_form(schedule, NOISE)
    errors = []
    for tolerance in (1e-5, 1e-7):
        sampler = AdaptiveSampler(
            Exact(schedule, prediction), schedule, prediction=prediction, rtol=tolerance,
            atol=tolerance, final="sigma_min",
        )  # fmt: skip
        x, info = sampler(noise=NOISE, return_info=True)
        assert x.dtype == torch.float64
        errors.append(float((x - exact).abs().max()))
        assert errors[-1] < _allowed(tolerance, info.accepted, x), (tolerance, info)
    assert errors[1] < errors[0] / 30, errors


@pytest.mark.parametrize(("name", "prediction"), [c for c in CASES if c[0] in ("discrete", "edm")])
@pytest.mark.parametrize("order", (2, 3))
def test_dpm_adaptive_closed_form(name: str, prediction: str, order: int) -> None:
    """Not on schedules that begin at nearly no signal: its tolerance is one of x/alpha there."""
    schedule = SCHEDULES[name]
    exact = _closed_form(schedule, NOISE)
    errors = []
    for tolerance in (1e-2, 1e-4):
        sampler = AdaptiveSampler(
            Exact(schedule, prediction), schedule, method="dpm_adaptive", order=order,
            prediction=prediction, rtol=tolerance, atol=tolerance, final="sigma_min",
        )  # fmt: skip
        x, info = sampler(noise=NOISE, return_info=True)
        errors.append(float((x - exact).abs().max()))
        assert errors[-1] < _allowed(tolerance, info.accepted, x), (tolerance, info)
    assert errors[1] < errors[0] / 10, errors


@pytest.mark.parametrize("method", METHODS)
def test_mixture(method: str) -> None:
    """No closed form: against the same run at a tolerance ten thousand times smaller."""
    schedule = SCHEDULES["discrete"]

    def run(tolerance: float) -> tuple[torch.Tensor, Any]:
        sampler = AdaptiveSampler(
            Exact(schedule, "epsilon", mixture=True), schedule, method=method, rtol=tolerance,
            atol=tolerance, final="sigma_min",
        )  # fmt: skip
        return sampler(noise=NOISE, return_info=True)

    fine, _ = run(1e-8 if method == "dopri5" else 1e-6)
    tolerance = 1e-4 if method == "dopri5" else 1e-2
    coarse, info = run(tolerance)
    assert float((coarse - fine).abs().max()) < _allowed(tolerance, info.accepted, fine)


# --- peers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ("discrete", "edm", "flow"))
def test_torchdiffeq(name: str) -> None:
    """odeint's dopri5 on the same slope, one sample, float64: both keep the tolerance, at a like
    cost."""
    torchdiffeq = pytest.importorskip("torchdiffeq")
    schedule = SCHEDULES[name]
    model = Exact(schedule, "sample", mixture=True)
    noise = NOISE[:1]
    grid = schedule.points(1, final="sigma_min")
    ends = torch.from_numpy(grid.sigmas / (grid.alphas + grid.sigmas))
    sampler = AdaptiveSampler(
        model, schedule, prediction="sample", rtol=1e-6, atol=1e-6, final="sigma_min"
    )
    got, info = sampler(noise=noise, return_info=True)

    def slope(s: torch.Tensor, scaled: torch.Tensor) -> torch.Tensor:
        ratio = float(s) / (1 - float(s)) if s < 1 else math.inf
        t = float(np.clip(schedule.time(ratio), schedule.t_min, schedule.t_max))
        if name == "discrete":
            a, r = 1 / math.hypot(1, ratio), ratio / math.hypot(1, ratio)
        else:
            a, r = float(schedule.alpha(t)), float(schedule.sigma(t))
        x = scaled * (a + r)
        calls.append(1)
        x0 = Exact(schedule, "sample", mixture=True)(x, torch.tensor([t], dtype=torch.float64))
        return (x - a * x0) / r - x0

    def solve(tolerance: float) -> torch.Tensor:
        start = noise * schedule.init_sigma / (grid.alphas[0] + grid.sigmas[0])
        path = torchdiffeq.odeint(
            slope,
            start,
            ends,
            rtol=tolerance,
            atol=tolerance,
            method="dopri5",
            options={"step_t": ends[1:]},
        )
        return path[-1] * (grid.alphas[1] + grid.sigmas[1])

    calls: list[int] = []
    peer = solve(1e-6)
    cost = len(calls)
    truth = solve(1e-10)
    bound = _allowed(1e-6, info.accepted, truth)
    assert float((got - truth).abs().max()) < bound
    assert float((peer - truth).abs().max()) < bound
    assert 0.8 * cost < int(info.nfe[0]) < 1.25 * cost, (cost, info)


@pytest.mark.parametrize("order", (2, 3))
@pytest.mark.parametrize(
    "options",
    ({}, {"rtol": 1e-3, "atol": 1e-3}, {"pcoeff": 0.2, "icoeff": 0.6, "dcoeff": 0.1},
     {"h_init": 2.0, "accept_safety": 0.95}, {"eta": 0.7, "s_noise": 0.9}),
    ids=("default", "tight", "pid", "rejects", "eta"),
)  # fmt: skip
def test_k_diffusion(order: int, options: dict[str, float]) -> None:
    """sample_dpm_adaptive, one sample, float64: the same steps, the same state."""
    sampling = k_sampling()
    schedule = schedules.edm(sigma_min=0.05, sigma_max=20.0)
    noise = NOISE[:1]
    model = Exact(schedule, "sample", mixture=True)
    sampler = AdaptiveSampler(
        model, schedule, method="dpm_adaptive", prediction="sample", order=order,
        final="sigma_min", **options,
    )  # fmt: skip
    got, info = sampler(noise=noise, seeds=[9], return_info=True)
    drawn = iter(range(10**6))

    def draw(sigma: Any, sigma_next: Any) -> torch.Tensor:
        return randn([9], (4, 5), step=next(drawn), stream=1).double()

    seen: list[dict[str, Any]] = []
    # float64 scalars: the peer makes float32 tensors of numbers
    with default_dtype(torch.float64):
        peer, stats = sampling.sample_dpm_adaptive(
            lambda x, sigma: Exact(schedule, "sample", mixture=True)(x, sigma),
            noise * 20.0, 0.05, 20.0, disable=True, order=order, noise_sampler=draw,
            return_info=True, callback=seen.append, **options,
        )  # fmt: skip
    assert int(info.accepted[0]) == stats["n_accept"]
    assert int(info.rejected[0]) == stats["n_reject"]
    if "h_init" in options:
        assert stats["n_reject"] > 0
    # after a rejection the state is where it was: we do not ask again for its noise prediction
    assert int(info.nfe[0]) == stats["nfe"] - stats["n_reject"]
    # with eta, the peer's last step adds sqrt(sigma^2 - sigma^2) of noise: up to sqrt(2^-52) sigma
    assert float((got - peer).abs().max()) < (1e-10 if "eta" not in options else 5e-9)


# --- samples on their own -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options"),
    (("dopri5", {}), ("dpm_adaptive", {"order": 2}), ("dpm_adaptive", {"eta": 1.0})),
    ids=("dopri5", "dpm_adaptive", "eta"),
)
def test_a_sample_does_not_depend_on_its_batch(method: str, options: dict[str, Any]) -> None:
    """Scales of 0.1 to 3 make the samples take different numbers of steps."""
    schedule = SCHEDULES["discrete"]
    model = Exact(schedule, "epsilon", mixture=True)
    sampler = AdaptiveSampler(model, schedule, method=method, **options)
    noise = randn([1, 2, 3, 4], (3, 7)) * torch.tensor([0.1, 1.0, 3.0, 0.5]).view(4, 1, 1)
    many, info = sampler(noise=noise, seeds=[4, 5, 6, 7], return_info=True)
    assert many.dtype == torch.float32
    assert len(set(info.nfe.tolist())) > 1
    for i in range(4):
        one, alone = sampler(noise=noise[i : i + 1], seeds=[4 + i], return_info=True)
        assert_same_bits(one[0], many[i])
        assert [int(v) for v in alone] == [int(v[i]) for v in info]


@pytest.mark.parametrize("method", METHODS)
def test_evaluations_are_those_of_the_samples(method: str) -> None:
    schedule = SCHEDULES["discrete"]
    model = Exact(schedule, "epsilon", mixture=True)
    sampler = AdaptiveSampler(model, schedule, method=method)
    steps: list[AdaptiveStep] = []
    x, info = sampler((6,), seeds=[1, 2, 3], callback=steps.append, return_info=True)
    assert x.shape == (3, 6)
    assert sum(model.calls) == int(info.nfe.sum())
    attempts = info.accepted + info.rejected
    assert int(attempts.sum()) == sum(len(step.samples) for step in steps)
    assert [step.index for step in steps] == list(range(len(steps)))
    end = float(schedule.points(1, final="sigma_min").sigmas[-1])
    assert steps[-1].sigma.tolist() == pytest.approx([end] * 3, rel=1e-4)  # within 1e-5 in its log
    if method == "dopri5":  # two to begin, six an attempt, one for x0 at the end
        assert torch.equal(info.nfe, 6 * attempts + 3)


def test_conditions_and_guidance_go_with_their_samples() -> None:
    schedule = SCHEDULES["flow"]
    shift, null = torch.tensor([0.5, -0.5, 0.25]), torch.zeros(3)
    model = Exact(schedule, "flow")
    sampler = AdaptiveSampler(model, schedule, prediction="flow", guidance=2.0)
    noise = randn([1, 2, 3], (3, 7)) * torch.tensor([0.1, 1.0, 3.0]).view(3, 1, 1)
    many, info = sampler(
        noise=noise, cond={"shift": shift}, uncond={"shift": null}, return_info=True
    )
    for i in range(3):
        given = {"cond": {"shift": shift[i : i + 1]}, "uncond": {"shift": null[i : i + 1]}}
        assert_same_bits(sampler(noise=noise[i : i + 1], **given)[0], many[i])
    # data of mean m moves with m, and guidance 2 doubles it
    plain = AdaptiveSampler(model, schedule, prediction="flow")
    base, at_rest = plain(noise=noise, cond={"shift": null}, return_info=True)
    off = (many - base - 2 * shift.view(3, 1, 1)).abs().max()
    allowed = _allowed(1e-4, info.accepted, many) + _allowed(1e-4, at_rest.accepted, base)
    assert off <= allowed < 0.1


def test_no_samples() -> None:
    schedule = SCHEDULES["discrete"]
    for method in METHODS:
        sampler = AdaptiveSampler(Exact(schedule, "epsilon"), schedule, method=method)
        assert sampler(noise=torch.zeros(0, 4)).shape == (0, 4)


# --- what it refuses ------------------------------------------------------------------------------

WRONG = {
    "method": ({"method": "rk4"}, ValueError, "method must be one of"),
    "prediction": ({"prediction": "x"}, ValueError, "prediction must be one of"),
    "order": ({"order": 4}, ValueError, "order must be one of (2, 3), got 4"),
    "final": ({"final": "x"}, ValueError, "final must be one of"),
    "rtol": ({"rtol": 0.0}, ValueError, "rtol must be above 0 and finite, got 0.0"),
    "atol": ({"atol": "1"}, TypeError, "atol must be a number, got str"),
    "eta": ({"eta": 1.0}, ValueError, "eta must be 0 for dopri5, got 1.0"),
    "noise": ({"method": "dpm_adaptive", "s_noise": -1.0}, ValueError, "eta and s_noise must be"),
    "alpha": (
        {"method": "dpm_adaptive", "schedule": SCHEDULES["zero"], "prediction": "sample"},
        ValueError, "schedule must have signal at its noisiest time for dpm_adaptive, got alpha 0",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "kind", "message"), WRONG.values(), ids=WRONG)
def test_errors(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    given: dict[str, Any] = {"schedule": SCHEDULES["discrete"], **change}
    with pytest.raises(kind, match=re.escape(f"AdaptiveSampler: {message}")):
        AdaptiveSampler(lambda x, t: x, **given)


def test_call_errors() -> None:
    sampler = AdaptiveSampler(lambda x, t: x, SCHEDULES["discrete"], guidance=2.0)
    with pytest.raises(ValueError, match=r"uncond must be given for guidance 2\.0, got"):
        sampler((3,))
    with pytest.raises(ValueError, match="shape or noise must be given, and not both"):
        sampler()
    with pytest.raises(TypeError, match="noise must be a floating-point tensor"):
        sampler(noise=torch.zeros(2, 3, dtype=torch.int32), uncond={"shift": None})


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_cannot_succeed_ends(method: str) -> None:
    schedule = SCHEDULES["discrete"]
    sampler = AdaptiveSampler(lambda x, t: x * math.nan, schedule, method=method)
    with pytest.raises(RuntimeError, match="AdaptiveSampler: "):
        sampler((3,))
    exact = Exact(schedule, "epsilon", mixture=True)
    sampler = AdaptiveSampler(exact, schedule, method=method, max_nfe=7)
    with pytest.raises(RuntimeError, match="max_nfe is spent, 7 evaluations of sample 0"):
        sampler((3,))
