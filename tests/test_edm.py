"""EDM's samplers against their transcription, and what stays of EDM's habits."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from bits import assert_same_bits
from budget import assert_within_budget
from edm_oracle import sample
from solver_cases import assert_same

import fastdiff
from fastdiff import Sampler, ops, schedules, solvers
from fastdiff.integrations import _edm_table
from fastdiff.integrations import edm as integration
from fastdiff.integrations.edm import StackedRandomGenerator, ablation_sampler, edm_sampler

SHAPE = (2, 3, 4, 5)
CHURN = {"S_churn": 9.0, "S_min": 0.05, "S_max": 20.0, "S_noise": 1.007}
NO_CHURN = (0.0, 0.0, math.inf, 1.0)
# the ends of the levels that generate.py takes where it is told none
ENDS = {"ve": (0.02, 100.0), "iddpm": (0.002, 81.0), "edm": (0.002, 80.0)}
IDDPM = (0.001, 0.008, 1000)


def net(x, sigma, class_labels=None):
    """A bounded denoiser, elementwise and nonlinear; sigma a scalar as in generate.py."""
    assert sigma.dtype == torch.float64 and sigma.dim() == 0
    level = torch.log1p(sigma).to(x.dtype)
    shift = 0.0 if class_labels is None else class_labels.to(x.dtype).view(-1, 1, 1, 1)
    return torch.tanh(x / (1 + level) + torch.cos(level) + shift) + 0.2 * torch.sin(2 * x)


def latents(dtype=torch.float64):
    return torch.from_numpy(np.random.default_rng(8).normal(size=SHAPE)).to(dtype)


def ends_of(discretization):
    if discretization == "vp":  # beta_d 19.1 and beta_min 0.1 at epsilon_s and at 1
        return tuple(math.sqrt(math.expm1(19.1 / 2 * t * t + 0.1 * t)) for t in (1e-3, 1.0))
    return ENDS[discretization]


def by_oracle(
    n=18, ends=None, rho=7.0, solver="heun", discretization="edm", schedule="linear",
    scaling="none", alpha=1.0, churn=NO_CHURN, draw=torch.randn_like, labels=None, **options,
):  # fmt: skip
    ends = ends or ends_of(discretization)
    x = options.pop("x", latents())
    return sample(
        options.pop("net", net), x, labels, draw, n, *ends, rho, solver, discretization, schedule,
        scaling, options.pop("epsilon_s", 1e-3), options.pop("iddpm", IDDPM), alpha, churn,
        **options,
    )  # fmt: skip


def check(got, states, label):
    largest = max(float(x.abs().max()) for x in states)
    assert_same([got.numpy()], [states[-1].numpy()], label, largest)


# arguments, and why
EDM_CASES = {
    "default": ({}, "18 steps without churn"),
    "churn": (CHURN, "noise at some levels"),
    "capped": ({"S_churn": 80.0, "num_steps": 5}, "gamma at its bound"),
    "levels": ({"num_steps": 7, "sigma_min": 0.01, "sigma_max": 30.0, "rho": 3.0}, "every other"),
}


@pytest.mark.parametrize("case", EDM_CASES)
def test_edm_sampler(case):
    options = EDM_CASES[case][0]
    torch.manual_seed(4)
    labels = torch.tensor([0.5, -0.5])
    got = edm_sampler(net, latents(), labels, dtype=torch.float64, **options)
    after = torch.get_rng_state()
    torch.manual_seed(4)
    states = by_oracle(
        options.get("num_steps", 18),
        (options.get("sigma_min", 0.002), options.get("sigma_max", 80.0)),
        options.get("rho", 7.0),
        churn=tuple(options.get(k, v) for k, v in zip(CHURN, NO_CHURN, strict=True)),
        labels=labels,
    )
    assert torch.equal(after, torch.get_rng_state())  # it draws at every step, as there
    check(got, states, case)


@pytest.mark.parametrize("scaling", _edm_table.SCALINGS)
@pytest.mark.parametrize("schedule", _edm_table.SCHEDULES)
@pytest.mark.parametrize("discretization", _edm_table.DISCRETIZATIONS)
def test_ablation_sampler(discretization, schedule, scaling):
    # Heun, midpoint and Ralston; with churn and without
    for (solver, alpha), churn in product(
        (("euler", 1.0), ("heun", 1.0), ("heun", 0.5), ("heun", 2 / 3)), (False, True)
    ):
        options = {"discretization": discretization, "schedule": schedule, "scaling": scaling}
        options |= {"solver": solver, "alpha": alpha}
        torch.manual_seed(4)
        got = ablation_sampler(
            net, latents(), None, torch.randn_like, 12,
            **options, **(CHURN if churn else {}), dtype=torch.float64,
        )  # fmt: skip
        torch.manual_seed(4)
        churn = tuple(CHURN.values()) if churn else NO_CHURN
        check(got, by_oracle(12, churn=churn, **options), (options, churn))


def test_the_options_of_the_levels():
    options = {"epsilon_s": 0.01, "discretization": "vp", "schedule": "vp"}
    got = ablation_sampler(
        net, latents(), sigma_min=0.03, sigma_max=40.0, **options, dtype=torch.float64
    )
    check(got, by_oracle(ends=(0.03, 40.0), **options), options)
    got = ablation_sampler(
        net, latents(), discretization="iddpm", C_1=0.01, C_2=0.02, M=50, num_steps=6,
        dtype=torch.float64,
    )  # fmt: skip
    check(got, by_oracle(6, discretization="iddpm", iddpm=(0.01, 0.02, 50)), "iddpm")


class Coarse:
    """A network of a few levels, as EDM's iDDPM preconditioning is, in a range of its own."""

    sigma_min, sigma_max = 0.01, 50.0
    levels = torch.tensor([0.0103, 0.05, 0.2, 0.7, 2.0, 5.0, 11.0, 24.0, 48.0], dtype=torch.float64)

    def round_sigma(self, sigma):
        at = (sigma.reshape(-1, 1) - self.levels).abs().argmin(dim=1)
        return self.levels[at].reshape(sigma.shape)

    def __call__(self, x, sigma, class_labels):
        return net(x, sigma, class_labels)


@pytest.mark.parametrize("churn", [None, CHURN], ids=["still", "churn"])
def test_levels_are_the_networks(churn):
    coarse = Coarse()
    torch.manual_seed(4)
    got = edm_sampler(coarse, latents(), num_steps=9, dtype=torch.float64, rho=2.0, **(churn or {}))
    torch.manual_seed(4)
    states = by_oracle(
        9, (0.01, 50.0), 2.0, churn=tuple((churn or {}).values()) or NO_CHURN, net=coarse,
        rounding=lambda sigma: float(coarse.round_sigma(torch.tensor([sigma]))),
    )  # fmt: skip
    check(got, states, churn)


@pytest.mark.parametrize("options", [{}, CHURN, {"scaling": "vp", **CHURN}], ids=str)
def test_float32_is_within_its_rounding(options):
    """The state rounds once a row; the reference backend in float32 is the measure."""
    x = latents(torch.float32)
    results = []
    for dtype, backend in (
        (torch.float32, "auto"),
        (torch.float32, "reference"),
        (torch.float64, "auto"),
    ):
        torch.manual_seed(4)  # the draws are float64 for every state
        with fastdiff.use_backend(backend):
            results.append(ablation_sampler(net, x, dtype=dtype, **options))
    assert results[0].dtype == torch.float32
    assert_within_budget(*results, ulps=0)


def test_it_is_the_heun_table():
    """Without scaling it is the solver "heun": the same levels, draws and states."""
    sigmas = (80 ** (1 / 7) + np.arange(18) / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    churn = {"s_churn": 9.0, "s_tmin": 0.05, "s_tmax": 20.0, "s_noise": 1.007}
    table = solvers.build("heun", schedules.edm(), sigmas=sigmas, prediction="sample", **churn)
    x, seeds = latents(), [3, 11]

    def model(x, t):
        return net(x, t[0].double())

    exact = torch.from_numpy(table.times)
    want = Sampler(model, table)(noise=x.float(), seeds=seeds)
    got = edm_sampler(net, x.float(), seeds=seeds, **CHURN)
    true = edm_sampler(net, x.float(), seeds=seeds, dtype=torch.float64, **CHURN)
    # the sampler gives its model a float32 level, the rows differ in their order of operations
    assert_within_budget(got, want, true, ulps=4)
    assert exact.isnan().sum() > 0  # there was churn


def test_seeds_alone_make_an_image():
    x = ops.randn([3, 11], SHAPE[1:])
    before = torch.get_rng_state()
    both = edm_sampler(net, x, seeds=[3, 11], **CHURN)
    assert torch.equal(before, torch.get_rng_state())
    assert_same_bits(edm_sampler(net, x[1:], seeds=[11], **CHURN), both[1:])
    assert not torch.equal(edm_sampler(net, x, seeds=[3, 12], **CHURN)[1], both[1])
    with pytest.raises(ValueError, match=r"one entry a sample \(2\), got 1"):
        edm_sampler(net, x, seeds=[3])


def test_stacked_generators_draw_as_in_edm():
    seeds = [3, 2**32 + 4, 11]
    stacked = StackedRandomGenerator("cpu", torch.tensor(seeds))
    singles = [torch.Generator().manual_seed(s) for s in (3, 4, 11)]
    for _ in range(2):
        got = stacked.randn([3, 2, 5], device="cpu")
        assert torch.equal(got, torch.stack([torch.randn(2, 5, generator=g) for g in singles]))
        like = stacked.randn_like(torch.zeros(3, 7, dtype=torch.float64))
        want = [torch.randn(7, generator=g, dtype=torch.float64) for g in singles]
        assert torch.equal(like, torch.stack(want))
        got = stacked.randint(10, size=[3])
        assert got.tolist() == [int(torch.randint(10, (), generator=g)) for g in singles]
    for draw in (lambda: stacked.randn([2, 5]), lambda: stacked.randint(10, size=[4])):
        with pytest.raises(ValueError, match="size must begin with 3, got"):
            draw()


def test_an_image_of_stacked_generators_depends_on_its_seed():
    def image(seeds):
        rnd = StackedRandomGenerator("cpu", seeds)
        x = rnd.randn([len(seeds), *SHAPE[1:]])
        return edm_sampler(net, x, randn_like=rnd.randn_like, **CHURN)

    assert_same_bits(image([5, 6])[1:], image([6]))


def test_one_pass_a_row(monkeypatch):
    rows, step = [], integration.reverse_step

    def counting(x, output, table, row, **options):
        rows.append(row)
        return step(x, output, table, row, **options)

    monkeypatch.setattr(integration, "reverse_step", counting)
    edm_sampler(net, latents())
    assert rows == list(range(35))  # the evaluations of 18 steps


def test_no_gradients_are_kept():
    weight = torch.nn.Parameter(torch.ones(()))
    got = edm_sampler(lambda x, s, y: weight * net(x, s), latents(), num_steps=2)
    assert not got.requires_grad


@pytest.mark.parametrize("steps", [1, 2])
def test_few_steps(steps):
    got = edm_sampler(net, latents(), num_steps=steps, dtype=torch.float64)
    if steps == 1:  # from the noisiest level to the data predicted there
        want = [net(80 * latents(), torch.tensor(80.0, dtype=torch.float64))]
    else:
        want = by_oracle(2)
    check(got, want, steps)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"solver": "rk4"}, ValueError, "solver must be one of euler, heun, got 'rk4'"),
        ({"discretization": "x"}, ValueError, "discretization must be one of vp, ve, iddpm, edm"),
        ({"schedule": "x"}, ValueError, "schedule must be one of vp, ve, linear, got 'x'"),
        ({"scaling": "x"}, ValueError, "scaling must be one of vp, none, got 'x'"),
        ({"num_steps": 0}, ValueError, r"num_steps must be an integer in \[1, 1000000\], got 0"),
        ({"num_steps": 2.5}, TypeError, "num_steps must be an integer, got float"),
        ({"alpha": 0.0}, ValueError, "alpha must be finite and at least"),
        ({"alpha": 1.5}, ValueError, "alpha must keep every time above 0, got 1.5"),
        ({"S_churn": -1.0}, ValueError, "S_churn must be finite and at least 0, got -1.0"),
        ({"S_noise": math.nan}, ValueError, "S_noise must be finite and at least 0, got nan"),
        ({"sigma_min": 90.0}, ValueError, "sigma_min < sigma_max, finite, got 90, 80"),
        ({"epsilon_s": 1.0}, ValueError, "epsilon_s must lie in"),
        (
            {"discretization": "iddpm", "sigma_min": 0.5, "sigma_max": 0.5001},
            ValueError,
            "must hold a level of the iDDPM steps, got 0.5, 0.5001",
        ),
        ({"dtype": torch.float16}, TypeError, "x must be a float32 or float64 tensor"),
    ],
)
def test_refusals(options, error, message):
    with pytest.raises(error, match=message):
        ablation_sampler(net, latents(), **options)
