"""The functions of `integrations.k_diffusion` against k-diffusion's own."""

from __future__ import annotations

import inspect

import pytest
import torch
from budget import assert_within_budget
from k_functions import (
    CASES,
    MODELS,
    SHAPE,
    SIGMAS,
    Answers,
    Sampler,
    both,
    by_exact_network,
    by_mixture,
    lone_step,
    ran,
    start,
    takes_sampler,
)
from peers import k_sampling, stable_step

from fastdiff.integrations import k_diffusion as K

# float64 through some fifty steps: 1e-12 of the largest state, as for the tables
EXACT = 1e-12
WIDE = (128, 1, 2, 3)  # so many elements that two largest errors can be compared

FUNCTIONS = (
    "append_zero", "default_noise_sampler", "get_ancestral_step", "get_sigmas_exponential",
    "get_sigmas_karras", "get_sigmas_polyexponential", "get_sigmas_vp", "log_likelihood", "to_d",
)  # fmt: skip


# torchsde says so where k-diffusion, and ours with it, asks beyond its tree by a rounding
TREE = pytest.mark.filterwarnings("ignore:Should have t:UserWarning")
PAIRS = [
    (case, levels)
    for case in CASES
    for levels in SIGMAS
    if not lone_step(CASES[case][0], SIGMAS[levels][0])  # test_lone_step_of_the_sde_functions
]


def largest_of(*tensors):
    return max(float(t.abs().max()) for t in tensors)


# --- signatures -----------------------------------------------------------------------------


def test_every_function_is_there():
    theirs = {n for n in dir(k_sampling()) if n.startswith(("sample_", "get_sigmas_"))}
    assert len(theirs) > 15
    assert theirs - set(dir(K)) == set()
    assert theirs - set(K.sampling.__all__) == set()


@pytest.mark.parametrize(
    "name", [*(n for n in K.sampling.__all__ if n.startswith("sample_")), *FUNCTIONS]
)
def test_signature(name):
    """Names, order, kinds and defaults; ours may follow, by keyword alone."""
    theirs = inspect.signature(getattr(k_sampling(), name)).parameters
    ours = inspect.signature(getattr(K, name)).parameters

    def facts(parameters):
        return [(p.name, p.kind, p.default) for p in parameters.values()]

    assert facts(ours)[: len(theirs)] == facts(theirs)
    more = list(ours.values())[len(theirs) :]
    assert all(p.kind is p.KEYWORD_ONLY and p.default is None for p in more)
    assert [p.name for p in more] in ([], ["noise", "seeds"])


def test_signature_of_the_tree():
    theirs = inspect.signature(k_sampling().BrownianTreeNoiseSampler).parameters
    ours = inspect.signature(K.BrownianTreeNoiseSampler).parameters
    assert list(ours) == list(theirs)
    assert ours["seed"].default is None
    assert ours["transform"].default(3.0) == theirs["transform"].default(3.0) == 3.0


# --- float64 --------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "levels"), PAIRS)
def test_same_in_float64_with_one_noise_sampler(case, levels, monkeypatch):
    function, options, _ = CASES[case]
    sigmas = SIGMAS[levels][0].double()
    theirs, ours = both(function)
    monkeypatch.setattr(k_sampling(), "get_ancestral_step", stable_step)
    for name, model in MODELS.items():
        x = start(sigmas)
        runs = []
        for f in (theirs, ours):
            sampler, seen = Sampler(x.dtype), []
            more = {"noise_sampler": sampler} if takes_sampler(function) else {}
            torch.manual_seed(0)
            end = f(model, x, sigmas, callback=seen.append, disable=True, **options, **more)
            runs.append((end, seen, sampler.spans))
        (want, theirs_seen, their_spans), (got, ours_seen, our_spans) = runs
        # a second stage has the slope (x - D)/sigma in it, over a step as long as sigmas[0]
        states = [s["x"] for s in theirs_seen] + [s["denoised"] for s in theirs_seen]
        steepest = max(float(((s["x"] - s["denoised"]) / s["sigma"]).abs().max())
                       for s in theirs_seen) * float(sigmas[0])  # fmt: skip
        allowed = EXACT * max(largest_of(x, want, *states), steepest)
        assert largest_of(got - want) <= allowed, name
        # a path is rough: spans that differ in a bit give another noise
        assert our_spans == their_spans
        check_callbacks(ours_seen, theirs_seen, sigmas, allowed)


def check_callbacks(ours, theirs, sigmas, allowed):
    assert len(ours) == len(theirs) == len(sigmas) - 1
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        assert mine["i"] == other["i"]
        for key in ("sigma", "sigma_hat"):
            assert torch.equal(mine[key], other[key])
            assert mine[key].dtype == other[key].dtype
        for key in ("x", "denoised"):
            assert largest_of(mine[key] - other[key]) <= allowed


@TREE
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_same_default_noise_under_one_seed(case, dtype, monkeypatch):
    """The same draws, and torch's generator is left where k-diffusion leaves it, so that what a
    script draws next is the same too."""
    function, options, _ = CASES[case]
    sigmas = SIGMAS["karras-10"][0].to(dtype)
    if dtype == torch.float64:
        monkeypatch.setattr(k_sampling(), "get_ancestral_step", stable_step)
    x = start(sigmas, dtype)
    runs = []
    for f in both(function):
        torch.manual_seed(1)
        end = f(by_mixture, x, sigmas, disable=True, **options)
        runs.append((end.double(), torch.get_rng_state()))
    (want, state), (got, our_state) = runs
    # float32: one other bit of noise would be 1e-3 off, and rounding is some ulp of the largest x
    allowed = {torch.float64: EXACT, torch.float32: 2.0**-20}[dtype] * largest_of(x)
    assert largest_of(got - want) <= allowed
    assert torch.equal(our_state, state)


def test_noise_is_drawn_where_nothing_is_added():
    """As k-diffusion does at every step of its churned functions: the next picture hangs on it."""
    sigmas = SIGMAS["karras-10"][0]
    torch.manual_seed(0)
    K.sample_euler(by_mixture, start(sigmas, torch.float32), sigmas, disable=True)
    after = torch.get_rng_state()
    torch.manual_seed(0)
    for _ in range(10):
        torch.randn(SHAPE)
    assert torch.equal(after, torch.get_rng_state())


# --- float32 and 16 bits --------------------------------------------------------------------


def in_three(case, levels, model):
    """k-diffusion in float64 and in float32, and ours in float32, on the same numbers."""
    function, options, _ = CASES[case]
    sigmas = SIGMAS[levels][0]
    theirs, ours = both(function)
    return [
        ran(f, function, model(), start(sigmas, dtype, WIDE), sigmas.to(dtype), options)
        for f, dtype in ((theirs, torch.float64), (theirs, torch.float32), (ours, torch.float32))
    ]


@pytest.mark.parametrize(("case", "levels"), PAIRS)
def test_float32_is_within_the_budget(case, levels):
    """Beside k-diffusion's own float32, with answers that do not hang on the state."""
    exact, reference, got = in_three(case, levels, Answers)
    # 4 ulp: the conversion, two products and the sum of the last row
    assert_within_budget(got, reference, exact, ulps=4)


@pytest.mark.parametrize(("case", "levels"), PAIRS)
@pytest.mark.parametrize("model", MODELS)
def test_float32_on_a_model_is_as_good(case, levels, model):
    """A model carries every rounding on, the mixture without bound where a path turns to one mean
    or to the other; so not the largest error is compared but the 0.9 quantile."""
    exact, reference, got = in_three(case, levels, lambda: MODELS[model])
    theirs, ours = ((r - exact).abs().flatten().quantile(0.9) for r in (reference, got))
    assert ours <= 2 * theirs + 4 * torch.finfo(torch.float32).eps  # of results of about 1


# NumPy has no bfloat16, and k-diffusion's sample_lms asks it for the sigmas; where every step goes
# down to 0 it begins anew, and no error adds up that could be compared
HALVES = [
    (case, dtype)
    for case in CASES
    for dtype in (torch.float16, torch.bfloat16)
    if not (case.startswith("lms") and dtype == torch.bfloat16) and not case.endswith("capped")
]


@pytest.mark.filterwarnings("ignore:The maximum number of subdivisions")  # lms in float16
@pytest.mark.parametrize("levels", ["karras-10", "exponential-10", "karras-50"])
@pytest.mark.parametrize(("case", "dtype"), HALVES)
def test_half_is_nearer_to_float64_than_k_diffusion(case, dtype, levels):
    """The mean square over 768 elements; sigmas of the dtype of x, as otherwise half of
    k-diffusion's functions go on in float32 after their first step."""
    function, options, _ = CASES[case]
    theirs, ours = both(function)
    sigmas = SIGMAS[levels][0].to(dtype)

    def run(f, kind):
        x = start(sigmas, dtype, WIDE).to(kind)
        return ran(f, function, by_exact_network, x, sigmas.to(kind), options, dtype)

    exact, got = run(theirs, torch.float64), run(ours, dtype)
    assert got.dtype == dtype
    errors = [float((r.double() - exact).square().mean()) for r in (got, run(theirs, dtype))]
    assert errors[0] <= errors[1]
