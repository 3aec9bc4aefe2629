"""The noise of `integrations.k_diffusion`: k-diffusion's tree, and this library's own."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from bits import assert_same_bits
from k_functions import SIGMAS, Answers, by_exact_network, by_network, start, takes_sampler
from peers import k_sampling

import fastdiff
from fastdiff import schedules, solvers
from fastdiff.integrations import k_diffusion as K

DRAWING = [n for n in K.sampling.__all__ if n.startswith("sample_") and takes_sampler(n[7:])]
CHURNED = ["sample_euler", "sample_heun", "sample_dpm_2"]
LEVELS = torch.tensor([16.0, 7.0, 3.0, 1.0, 0.2, 0.0])
SEEDS = [3, 8, 2**64 - 1]


def call(name, x, **options):
    """The function on `by_network`, whatever it asks for its levels."""
    ends = (0.2, 16.0) if "dpm_fast" in name or "adaptive" in name else (LEVELS,)
    more = (7,) if "dpm_fast" in name else ()
    if "fast" in name or "adaptive" in name:
        options = {"eta": 0.7, **options}
    if name in CHURNED:
        options = {"s_churn": 2.0, **options}
    return getattr(K, name)(by_network, x, *ends, *more, disable=True, **options)


def begin(dtype=torch.float32):
    return start(LEVELS, dtype, (3, 1, 2, 3))


# --- k-diffusion's tree ---------------------------------------------------------------------

TRANSFORMS = {
    "identity": lambda sigma: sigma,
    "falling": lambda sigma: sigma.log().neg(),  # as DPM-Solver's time: the ends change places
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("seed", [None, 5, [5, 6, 7]], ids=["drawn", "one", "each"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tree_is_that_of_k_diffusion(seed, transform, dtype):
    x = begin(dtype)
    trees = []
    for theirs_or_ours in (k_sampling(), K):
        torch.manual_seed(4)
        made = theirs_or_ours.BrownianTreeNoiseSampler(
            x, 0.2, torch.tensor(16.0), seed, TRANSFORMS[transform]
        )
        trees.append(made)
    for span in ((16.0, 7.0), (7.0, torch.tensor(3.0)), (7.0, 0.2), (3.0, 16.0)):
        want, got = (tree(*span) for tree in trees)
        assert_same_bits(got, want)


def test_tree_needs_no_torchsde(monkeypatch):
    """The same picture where it cannot be imported."""
    pictures = []
    for _ in range(2):
        torch.manual_seed(4)
        pictures.append(
            [call(f"sample_dpmpp_{name}", begin()) for name in ("sde", "2m_sde", "3m_sde")]
        )
        monkeypatch.setitem(sys.modules, "torchsde", None)
    for with_it, without in zip(*pictures, strict=True):
        assert_same_bits(without, with_it)


def test_tree_refuses_another_number_of_seeds():
    with pytest.raises(ValueError, match=r"seed must be an int or one a sample \(3\), got 2"):
        K.BrownianTreeNoiseSampler(begin(), 0.2, 16.0, [1, 2])


def test_nothing_of_k_diffusion_is_needed():
    """In a process where neither it nor what it needs can be imported."""
    code = (
        "import sys\n"
        "for name in ('k_diffusion', 'torchsde', 'torchdiffeq', 'scipy', 'einops', 'dctorch'):\n"
        "    sys.modules[name] = None\n"
        "import torch\n"
        "from fastdiff.integrations import k_diffusion as K\n"
        "s = K.get_sigmas_karras(5, 0.1, 10.0)\n"
        "for f in (K.sample_euler, K.sampling.sample_lms, K.sample_dpmpp_2m_sde):\n"
        "    assert f(lambda x, sigma: 0 * x, torch.ones(1, 2), s, disable=True).isfinite().all()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- counters -------------------------------------------------------------------------------

# solvers whose function runs the table as it stands; their options, why
TABLES = {
    "euler": ({"s_churn": 2.0}, "churn"),
    "euler_ancestral": ({}, "a draw a step"),
    "dpm_2_ancestral": ({"eta": 0.6}, "after the second stage"),
    "dpmpp_sde": ({}, "two draws, one of them again"),
    "dpmpp_2m_sde": ({}, "history"),
    "dpmpp_3m_sde": ({}, "more history"),
}


@pytest.mark.parametrize("solver", TABLES)
def test_counter_noise_is_that_of_the_sampler(solver):
    """The same bits as `fastdiff.Sampler` gives on the solver's table."""
    options, _ = TABLES[solver]
    x = begin()
    got = getattr(K, f"sample_{solver}")(
        by_network, x, LEVELS, disable=True, noise="counter", seeds=SEEDS, **options
    )
    table = solvers.build(
        solver, schedules.edm(), prediction="sample", sigmas=LEVELS.tolist(), **options
    )
    unit = x / 16  # a power of two: exact
    assert_same_bits(got, fastdiff.Sampler(by_network, table)(noise=unit, seeds=SEEDS))


@pytest.mark.parametrize("noise", ["counter", "brownian"])
@pytest.mark.parametrize("name", [*DRAWING, *CHURNED])
def test_a_sample_depends_on_its_seed_alone(name, noise):
    """Bits of one sample, in the batch and alone. dpm_adaptive steps the batch as one, so there the
    noise alone can be compared: with answers of 0 the error is 0 and the steps are the same."""
    if name in CHURNED and noise == "brownian":
        with pytest.raises(ValueError, match="noise must be None or 'counter', got 'brownian'"):
            call(name, begin(), noise=noise)
        return
    x = begin()
    if "adaptive" in name:
        x = x[:1].repeat(3, 1, 1, 1)

        def run(x, seeds):
            return K.sample_dpm_adaptive(
                lambda x, sigma: 0 * x, x, 0.2, 16.0, eta=0.7, atol=1e9, disable=True,
                noise=noise, seeds=seeds,
            )  # fmt: skip
    else:

        def run(x, seeds):
            return call(name, x, noise=noise, seeds=seeds)

    together = run(x, SEEDS)
    assert len({tuple(one.flatten().tolist()) for one in together}) == 3
    for i, seed in enumerate(SEEDS):
        assert_same_bits(run(x[i : i + 1], [seed]), together[i : i + 1])
    assert_same_bits(run(x, torch.tensor([3, 8, -1])), together)


@pytest.mark.parametrize("noise", ["counter", "brownian"])
@pytest.mark.parametrize("name", DRAWING)
def test_own_noise_leaves_the_generator_alone(name, noise):
    before = torch.get_rng_state()
    call(name, begin(), noise=noise)
    assert torch.equal(torch.get_rng_state(), before)


def test_seeds_count_up_from_a_number():
    one, each = (
        call("sample_euler_ancestral", begin(), noise="counter", seeds=s) for s in (5, [5, 6, 7])
    )
    assert_same_bits(one, each)
    default = call("sample_euler_ancestral", begin(), noise="counter")
    assert_same_bits(default, call("sample_euler_ancestral", begin(), noise="counter", seeds=0))


# --- the Brownian path ----------------------------------------------------------------------


def path(n=1, shape=(200, 100), dtype=torch.float32):
    return K.BrownianPathNoiseSampler(torch.empty((n, *shape), dtype=dtype), seeds=11)


def test_path_is_brownian_motion_over_sigma():
    """Unit increments, independent where spans are apart, and sums where they meet."""
    noise = path()
    first, second, whole = noise(16.0, 3.0), noise(3.0, 0.03), noise(16.0, 0.03)
    n = first.numel()
    for increment in (first, second, whole):
        assert abs(float(increment.mean())) < 5 / math.sqrt(n)
        assert abs(float(increment.var()) - 1) < 5 * math.sqrt(2 / n)
    assert abs(float((first * second).mean())) < 5 / math.sqrt(n)
    joined = (first * math.sqrt(13.0) + second * math.sqrt(2.97)) / math.sqrt(15.97)
    # weights below 2**-25 of an increment are left out, some sixty of them at most
    assert float((joined - whole).abs().max()) < 60 * 5 * 2.0**-25 * 4
    assert_same_bits(noise(0.03, 16.0), -whole)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_path_in_another_dtype_is_the_path_rounded(dtype):
    assert_same_bits(path(dtype=dtype)(16.0, 3.0), path()(16.0, 3.0).to(dtype))


@pytest.mark.parametrize("name", [n for n in DRAWING if n != "sample_dpm_adaptive"])
def test_brownian_noise_is_the_path(name):
    x = begin()
    sampler = K.BrownianPathNoiseSampler(x, 11)
    given = call(name, x, noise_sampler=lambda a, b: sampler(float(a), float(b)))
    assert_same_bits(call(name, x, noise="brownian", seeds=11), given)


def test_path_works_in_k_diffusion_itself():
    x = begin(torch.float64)
    for name in ("sample_dpmpp_2m_sde", "sample_dpmpp_sde"):
        ends = [
            getattr(theirs_or_ours, name)(
                by_network, x, LEVELS.double(), disable=True,
                noise_sampler=K.BrownianPathNoiseSampler(x, 11),
            )
            for theirs_or_ours in (k_sampling(), K)
        ]  # fmt: skip
        assert float((ends[0] - ends[1]).abs().max()) < 1e-12 * 16


def test_path_joins_pictures_of_different_step_counts():
    """40 and 80 steps of one seed end nearer to each other than with independent draws."""
    x = start(torch.tensor([14.6]), torch.float32, (64, 1, 2, 3))
    apart = {}
    for noise in ("brownian", "counter"):
        few, many = (
            K.sample_dpmpp_2m_sde(
                by_exact_network, x, K.get_sigmas_exponential(n, 0.1, 14.6), disable=True,
                noise=noise, seeds=1,
            )
            for n in (40, 80)
        )  # fmt: skip
        apart[noise] = float((few - many).square().mean())
    assert apart["brownian"] < apart["counter"] / 4


# --- what is given --------------------------------------------------------------------------


def test_seeds_without_noise_are_refused():
    with pytest.raises(ValueError, match="seeds must come with noise='counter' or 'brownian'"):
        call("sample_euler_ancestral", begin(), seeds=3)


def test_noise_beside_a_sampler_is_refused():
    with pytest.raises(ValueError, match="noise must be None with a noise_sampler"):
        call("sample_euler_ancestral", begin(), noise="counter", noise_sampler=Answers())


def test_unknown_noise_is_refused():
    for name in DRAWING:
        with pytest.raises(ValueError, match=f"{name}: noise must be None or 'counter' or 'brow"):
            call(name, begin(), noise="white")


def test_number_of_seeds_is_checked():
    with pytest.raises(ValueError, match=r"seeds must have one entry a sample \(3\), got 2"):
        call("sample_dpmpp_sde", begin(), noise="counter", seeds=[1, 2])


@pytest.mark.parametrize("name", DRAWING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_noise_is_broadcast_and_converted(name, dtype):
    """One draw for the batch, as k-diffusion's sum would take it, in any dtype."""
    x = begin(dtype)

    def one(sigma, sigma_next):
        return torch.full((1, 1, 1, 3), 0.5, dtype=torch.float64)

    def full(sigma, sigma_next):
        return torch.full(x.shape, 0.5, dtype=dtype)

    assert_same_bits(call(name, x, noise_sampler=one), call(name, x, noise_sampler=full))


@pytest.mark.parametrize("name", DRAWING)
def test_noise_of_another_shape_is_refused(name):
    with pytest.raises(ValueError, match=r"noise_sampler must return the shape of x \(3, 1, 2, 3"):
        call(name, begin(), noise_sampler=lambda *_: torch.zeros(3, 1, 2, 2))
    with pytest.raises(TypeError, match="noise_sampler must return a tensor, got float"):
        call(name, begin(), noise_sampler=lambda *_: 0.0)
    with pytest.raises(TypeError, match="noise_sampler must be callable, got int"):
        call(name, begin(), noise_sampler=3)


def test_a_sampler_is_called_where_k_diffusion_calls_it():
    """In turn with the model: between its calls, as a sampler with a state of its own may need."""
    orders = []
    for theirs_or_ours in (k_sampling(), K):
        order = []

        def model(x, sigma, order=order):
            order.append(("model", float(sigma[0])))
            return 0 * x

        def noise(sigma, sigma_next, order=order):
            order.append(("noise", float(sigma), float(sigma_next)))
            return torch.zeros(3, 1, 2, 3)

        sigmas = SIGMAS["karras-10"][0].double()
        theirs_or_ours.sample_dpmpp_sde(
            model, begin(torch.float64), sigmas, disable=True, noise_sampler=noise,
            callback=lambda info, order=order: order.append(("callback", info["i"])),
        )  # fmt: skip
        orders.append(order)
    assert [o[0] for o in orders[0]] == [o[0] for o in orders[1]]
    # the level of the stage is the exponential of a logarithm there
    assert all(
        a == pytest.approx(b, rel=1e-14) for x, y in zip(*orders, strict=True)
        for a, b in zip(x[1:], y[1:], strict=True)
    )  # fmt: skip
