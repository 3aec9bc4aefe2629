"""The functions that go from sigma_max to sigma_min: dpm_fast, dpm_adaptive, log_likelihood."""

from __future__ import annotations

import math

import pytest
import torch
from budget import assert_within_budget
from k_functions import MODELS, Answers, Sampler, both, by_mixture, by_network, start
from peers import k_sampling, stable_step
from scopes import default_dtype

from fastdiff.integrations import k_diffusion as K

ENDS = (0.03, 14.6)
TOP = torch.tensor([14.6])
EXACT = 1e-12
NOISE = {"eta": 0.6, "s_noise": 1.01}


@pytest.fixture
def float64():
    """k-diffusion makes tensors of the two levels itself, of the default dtype."""
    with default_dtype(torch.float64):
        yield


def pair(function, *args, dtype=torch.float64, model=by_mixture, **options):
    """(result, callbacks, spans) of k-diffusion's and of ours."""
    for f in both(function):
        sampler, seen = Sampler(dtype), []
        x = start(TOP, dtype)
        result = f(
            model, x, *ENDS, *args, callback=seen.append, disable=True, noise_sampler=sampler,
            **options,
        )  # fmt: skip
        yield result, seen, sampler.spans


def check_callbacks(ours, theirs, allowed):
    assert len(ours) == len(theirs) > 0
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for key, want in other.items():
            if key == "nfe":
                continue
            got = torch.as_tensor(mine[key], dtype=torch.float64)
            assert float((got - torch.as_tensor(want, dtype=torch.float64)).abs().max()) <= allowed


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("options", [{}, {"eta": 1.0}, NOISE], ids=["ode", "eta", "both"])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 10, 50])  # every pattern of orders, and many
def test_dpm_fast(n, options, model, float64, monkeypatch):
    monkeypatch.setattr(k_sampling(), "get_ancestral_step", stable_step)
    theirs, ours = pair("dpm_fast", n, model=MODELS[model], **options)
    size = max(float(s["x"].abs().max()) for s in theirs[1])
    steepest = max(
        float(((s["x"] - s["denoised"]) / s["sigma"]).abs().max()) * ENDS[1] for s in theirs[1]
    )
    allowed = EXACT * max(size, steepest)
    assert float((ours[0] - theirs[0]).abs().max()) <= allowed
    assert ours[2] == theirs[2]  # the sampler is called at every step, without eta too
    check_callbacks(ours[1], theirs[1], allowed)


def test_dpm_fast_turns_data_into_noise(float64):
    runs = []
    for f in both("dpm_fast"):
        runs.append(f(by_mixture, start(torch.ones(1)), *reversed(ENDS), 10, disable=True))
    assert float((runs[0] - runs[1]).abs().max()) <= EXACT * float(runs[0].abs().max())


@pytest.mark.parametrize("n", [5, 10, 30])
def test_dpm_fast_in_float32(n):
    """Without eta, whose k-diffusion loses digits that float32 has not; with answers by call."""
    theirs, ours = both("dpm_fast")
    wide = (128, 1, 2, 3)
    with default_dtype(torch.float64):
        exact = theirs(Answers(), start(TOP, torch.float64, wide), *ENDS, n, disable=True)
    reference, got = (
        f(Answers(), start(TOP, torch.float32, wide), *ENDS, n, disable=True)
        for f in (theirs, ours)
    )
    assert_within_budget(got, reference, exact, ulps=4)  # the sum of a row and its products


def test_dpm_fast_leaves_the_generator_where_k_diffusion_does():
    states = []
    for f in both("dpm_fast"):
        torch.manual_seed(3)
        f(by_mixture, start(TOP, torch.float32), *ENDS, 7, disable=True)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


# --- adaptive -------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        NOISE,
        {"rtol": 1e-3, "atol": 1e-4},  # some thirty steps
        {"h_init": 5.0},  # rejections
        {"pcoeff": 0.2, "icoeff": 0.7, "dcoeff": 0.05, "accept_safety": 0.9},  # the whole control
    ],
    ids=["default", "noise", "tight", "rejections", "control"],
)
def test_dpm_adaptive(options, order, model, float64, monkeypatch):
    """The same steps for the batch, and so the same result, counts and callbacks."""
    monkeypatch.setattr(k_sampling(), "get_ancestral_step", stable_step)
    theirs, ours = pair(
        "dpm_adaptive", model=MODELS[model], order=order, return_info=True, **options
    )
    (want, their_info), (got, our_info) = theirs[0], ours[0]
    # what a step may differ by is carried on through the sizes of those that follow
    allowed = 1e3 * EXACT * ENDS[1]
    assert float((got - want).abs().max()) <= allowed
    for key in ("steps", "n_accept", "n_reject"):
        assert our_info[key] == their_info[key]
    # a step that is tried again starts with the evaluation that it has
    assert our_info["nfe"] == their_info["nfe"] - their_info["n_reject"]
    assert len(ours[2]) == len(theirs[2]) == our_info["n_accept"]
    spans = zip(sum(ours[2], ()), sum(theirs[2], ()), strict=True)
    assert max(abs(float(a) - float(b)) for a, b in spans) <= allowed
    check_callbacks(ours[1], theirs[1], allowed)
    if "h_init" in options:
        assert our_info["n_reject"] > 0


def test_dpm_adaptive_counts_its_calls():
    model = Answers()
    _, info = K.sample_dpm_adaptive(
        model, start(TOP, torch.float32), *ENDS, h_init=5.0, disable=True, return_info=True
    )
    assert info["nfe"] == model.calls


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_dpm_adaptive_in_float32_under_one_seed(eta):
    results = []
    for f in both("dpm_adaptive"):
        torch.manual_seed(3)
        end = f(by_network, start(TOP, torch.float32), *ENDS, eta=eta, disable=True)
        results.append((end, torch.get_rng_state()))
    assert torch.equal(results[0][1], results[1][1])
    # other bits would give another step size: this is a hundred roundings of the first state
    assert float((results[0][0] - results[1][0]).abs().max()) <= 100 * 2.0**-24 * ENDS[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dpm_adaptive_keeps_the_dtype(dtype):
    seen = []

    def model(x, sigma):
        assert x.dtype == sigma.dtype == dtype
        return by_network(x, sigma)

    x = K.sample_dpm_adaptive(
        model, start(TOP, dtype), *ENDS, disable=True, callback=seen.append, rtol=0.5, atol=0.5
    )
    assert x.dtype == seen[0]["x"].dtype == seen[0]["denoised"].dtype == dtype


# --- likelihood -----------------------------------------------------------------------------

STD = 0.7


def gaussian(x, sigma):
    """The denoiser of data N(0, STD^2)."""
    level = sigma.view(-1, *[1] * (x.dim() - 1)) ** 2
    return x * STD**2 / (STD**2 + level)


@pytest.mark.parametrize("tolerance", [1e-4, 1e-6, 1e-8])
def test_likelihood_of_a_gaussian(tolerance):
    """Its path is known: x grows as the standard deviation of x does."""
    x = start(torch.tensor([STD]))
    low, high = 0.01, 20.0
    grown = (STD**2 + high**2) / (STD**2 + low**2)
    prior = torch.distributions.Normal(0.0, high)
    exact = prior.log_prob(x * grown**0.5).flatten(1).sum(1) + x[0].numel() / 2 * math.log(grown)
    got, info = K.log_likelihood(gaussian, x, low, high, atol=tolerance, rtol=tolerance)
    assert got.shape == (len(x),) and got.dtype == torch.float64
    # some fifty to two hundred steps, each within the tolerance
    assert float((got - exact).abs().max()) <= info["fevals"] / 6 * tolerance * exact.abs().max()


@pytest.mark.parametrize("model", MODELS)
def test_likelihood_is_that_of_k_diffusion(model):
    """The same probe under one seed; the steps differ, so within what both tolerances allow."""
    x, tolerance = start(torch.tensor([STD])), 1e-8
    runs = []
    for f in (k_sampling().log_likelihood, K.log_likelihood):
        torch.manual_seed(2)
        found, info = f(MODELS[model], x, 0.1, 20.0, atol=tolerance, rtol=tolerance)
        runs.append((found, info["fevals"], torch.get_rng_state()))
    (want, n, state), (got, m, our_state) = runs
    assert torch.equal(state, our_state)
    assert float((got - want).abs().max()) <= (n + m) / 6 * tolerance * float(want.abs().max())
