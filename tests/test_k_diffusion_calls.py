"""What the functions of `integrations.k_diffusion` take, refuse, keep and leave alone."""

from __future__ import annotations

import re

import pytest
import torch
from bits import assert_same_bits
from k_functions import SIGMAS, Sampler, both, by_network, start, takes_sampler
from peers import k_sampling

from fastdiff.integrations import k_diffusion as K
from fastdiff.integrations.k_diffusion import _tables

ALL = [n for n in K.sampling.__all__ if n.startswith("sample_")]
ON_SIGMAS = [n for n in ALL if n not in ("sample_dpm_fast", "sample_dpm_adaptive")]
WITHOUT_NOISE = [n for n in ON_SIGMAS if not takes_sampler(n[7:])]
KARRAS = SIGMAS["karras-10"][0]


def call(name, x, model=by_network, sigmas=KARRAS, **options):
    """The function between 0.03 and 14.6, its noise from a `Sampler` where it takes one."""
    ends = {"sample_dpm_fast": (0.03, 14.6, 7), "sample_dpm_adaptive": (0.03, 14.6)}
    if takes_sampler(name[7:]):
        options.setdefault("noise_sampler", Sampler(x.dtype, x.shape))
    return getattr(K, name)(model, x, *ends.get(name, (sigmas,)), disable=True, **options)


def begin(dtype=torch.float32, shape=(2, 4, 3, 3)):
    return start(KARRAS, dtype, shape)


def network(x, sigma, **_):
    """`by_network` for any shape."""
    return torch.tanh(x / (1 + sigma.view(-1, *[1] * (x.dim() - 1))))


# --- the state ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_x_is_left_alone_and_its_dtype_is_kept(name, dtype):
    x = begin(dtype)
    before = x.clone()

    def model(x, sigma):
        assert x.dtype == sigma.dtype == dtype
        assert sigma.shape == (2,) and sigma.is_contiguous()
        return network(x, sigma)

    got = call(name, x, model)
    assert got.dtype == dtype and got.shape == x.shape
    assert torch.equal(x, before)
    assert not got.requires_grad


ORDERS = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "permuted": lambda x: x.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3),
    "a slice": lambda x: torch.cat([x, x], dim=-1)[..., :3],
    "expanded": lambda x: x[:1].expand(2, -1, -1, -1),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ALL)
def test_memory_order_does_not_change_a_bit(name, order):
    x = ORDERS[order](begin())
    assert not x.is_contiguous()
    got = call(name, x, network)
    assert_same_bits(got, call(name, x.contiguous(), network))
    if order == "channels_last":
        assert got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(3,), (0, 4, 3, 3), (2, 5), (1, 2, 3, 4, 5)])
@pytest.mark.parametrize("name", ALL)
def test_shapes(name, shape):
    assert call(name, begin(shape=shape), network).shape == shape


@pytest.mark.parametrize("name", ALL)
def test_a_callback_may_keep_what_it_sees(name):
    kept, copies = [], []

    def callback(info):
        kept.append((info["x"], info["denoised"]))
        copies.append((info["x"].clone(), info["denoised"].clone()))

    got = call(name, begin(), network, callback=callback)
    for pair, copied in zip(kept, copies, strict=True):
        for a, b in zip(pair, copied, strict=True):
            assert torch.equal(a, b)
    assert_same_bits(call(name, begin(), network), got)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_may_keep_what_it_sees(name, dtype):
    """A wrapper that records the trajectory, or compares an input with earlier ones."""
    kept = []

    def model(x, sigma):
        kept.append((x, x.clone()))
        return network(x, sigma)

    call(name, begin(dtype), model)
    assert all(torch.equal(x, before) for x, before in kept)


@pytest.mark.parametrize("answer", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", ALL)
def test_a_model_may_answer_in_another_dtype(name, answer):
    """As under autocast; the state stays float32 and takes the answer as it is."""

    def model(x, sigma):
        return network(x, sigma).to(answer)

    def widened(x, sigma):
        return model(x, sigma).to(torch.float32)

    got = call(name, begin(), model)
    assert got.dtype == torch.float32
    assert_same_bits(got, call(name, begin(), widened))


@pytest.mark.parametrize("name", ALL)
def test_extra_args_reach_the_model(name):
    shifted = call(name, begin(), lambda x, s, shift: network(x, s) + shift,
                   extra_args={"shift": 0.5})  # fmt: skip
    assert_same_bits(shifted, call(name, begin(), lambda x, s: network(x, s) + 0.5))


@pytest.mark.parametrize("name", ALL)
def test_a_model_that_answers_with_its_input(name):
    """Its answer lies in the memory of the state."""
    x = begin()
    assert_same_bits(call(name, x, lambda x, s: x), call(name, x, lambda x, s: x.clone()))


@pytest.mark.parametrize("name", ALL)
def test_a_model_may_answer_with_one_image(name):
    image = torch.randn(4, 3, 3, generator=torch.Generator().manual_seed(1))
    got = call(name, begin(), lambda x, sigma: image)
    assert_same_bits(got, call(name, begin(), lambda x, sigma: image.expand(x.shape).clone()))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    ("answer", "error", "got"),
    [
        (lambda x: (x,), TypeError, "a floating-point tensor, got tuple"),
        (lambda x: x.long(), TypeError, "a floating-point tensor, got torch.int64"),
        (lambda x: x[..., :2], ValueError, "the shape of x (2, 4, 3, 3), got (2, 4, 3, 2)"),
    ],
)
def test_answers_of_a_model_are_checked(name, answer, error, got):
    with pytest.raises(error, match=re.escape(f"{name}: model must return {got}")):
        call(name, begin(), lambda x, sigma: answer(x))


@pytest.mark.parametrize("name", ALL)
def test_no_gradient_is_recorded(name):
    weight = torch.ones((), requires_grad=True)
    assert not call(name, begin(), lambda x, s: weight * network(x, s)).requires_grad


# --- sigmas ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ON_SIGMAS)
def test_rising_sigmas_turn_data_into_noise(name):
    """Without noise k-diffusion's functions run either way."""
    sigmas = SIGMAS["exponential-10"][0].double().flip(0)
    x = start(torch.ones(1), torch.float64)
    options = {}
    if takes_sampler(name[7:]):
        options = {"eta": 0.0, "noise_sampler": Sampler(x.dtype, x.shape)}
    want, got = (f(by_network, x, sigmas, disable=True, **options) for f in both(name[7:]))
    # LMS extrapolates over steps that grow, with weights of about a hundred
    assert float((got - want).abs().max()) <= 1e-13 * float(want.abs().max())


@pytest.mark.parametrize("name", ON_SIGMAS)
@pytest.mark.parametrize(
    "sigmas",
    [[10.0, 3.0, 3.0, 0.0], [10.0, 3.0, 5.0, 0.0], [0.0, 1.0, 2.0], [10.0, 0.0, 0.0]],
    ids=["twice", "up and down", "rising from 0", "two zeros"],
)
def test_sigmas_that_do_not_fall_are_refused(name, sigmas):
    with pytest.raises(ValueError, match=f"{name}: sigmas must fall, or rise from above 0"):
        call(name, begin(), network, sigmas=torch.tensor(sigmas))


@pytest.mark.parametrize("name", [n for n in ON_SIGMAS if takes_sampler(n[7:])])
def test_rising_sigmas_with_noise_are_refused(name):
    with pytest.raises(ValueError, match=f"{name}: sigmas must fall"):
        call(name, begin(), network, sigmas=torch.tensor([1.0, 2.0, 3.0]))


@pytest.mark.parametrize("name", ON_SIGMAS)
def test_no_step_is_no_change(name):
    x = begin()
    for sigmas in (KARRAS[:1], KARRAS[:0]):
        assert torch.equal(call(name, x, network, sigmas=sigmas), x)


@pytest.mark.parametrize("name", ["sample_dpmpp_2m_sde", "sample_dpmpp_3m_sde"])
def test_lone_step_of_the_sde_functions(name):
    """k-diffusion 0.1.1 raises UnboundLocalError where the first step is to clean data."""
    sigmas = torch.tensor([14.6, 0.0])
    with pytest.raises(UnboundLocalError):
        getattr(k_sampling(), name)(network, begin(), sigmas, disable=True)
    want = network(begin(), torch.full((2,), 14.6))
    assert_same_bits(call(name, begin(), network, sigmas=sigmas), want)


@pytest.mark.parametrize("name", ON_SIGMAS)
@pytest.mark.parametrize(
    ("sigmas", "error", "rule"),
    [
        ([3.0, 1.0], TypeError, "sigmas must be a 1-D floating-point tensor, got <class 'list'>"),
        (torch.ones(2, 2), TypeError, "sigmas must be a 1-D floating-point tensor, got 2-D"),
        (torch.tensor([3, 1]), TypeError, "sigmas must be a 1-D floating-point tensor, got 1-D"),
        (torch.tensor([torch.inf, 1.0]), ValueError, "sigmas must be finite and not negative"),
        (torch.tensor([1.0, -1.0]), ValueError, "sigmas must be finite and not negative"),
    ],
    ids=["list", "two axes", "integers", "infinite", "negative"],
)
def test_sigmas_are_checked(name, sigmas, error, rule):
    with pytest.raises(error, match=re.escape(f"{name}: {rule}")):
        call(name, begin(), network, sigmas=sigmas)


# --- the other arguments --------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_shared_arguments_are_checked(name):
    x = begin()
    for given, rule in (
        ({"x": x.long()}, "x must be a floating-point tensor (N, *S), got 4-D torch.int64"),
        ({"x": torch.tensor(1.0)}, "x must be a floating-point tensor (N, *S), got 0-D"),
        ({"model": None}, "model must be callable, got NoneType"),
        ({"callback": 3}, "callback must be callable, got int"),
    ):
        with pytest.raises(TypeError, match=re.escape(f"{name}: {rule}")):
            call(name, **{"x": x, "model": network, **given})


@pytest.mark.parametrize("name", [n for n in ALL if takes_sampler(n[7:])])
def test_eta_and_s_noise_are_checked(name):
    for option in ("eta", "s_noise"):
        with pytest.raises(TypeError, match=f"{name}: {option} must be a number, got str"):
            call(name, begin(), network, **{option: "1"})
        with pytest.raises(ValueError, match=f"{option} must be finite and at least 0, got -1"):
            call(name, begin(), network, **{option: -1.0})
    tensors = {"eta": torch.tensor(0.5), "s_noise": torch.tensor([1.5])}
    numbers = {"eta": 0.5, "s_noise": 1.5}
    assert_same_bits(*(call(name, begin(), network, **o) for o in (tensors, numbers)))


@pytest.mark.parametrize("name", ["sample_euler", "sample_heun", "sample_dpm_2"])
def test_churn_is_checked(name):
    with pytest.raises(TypeError, match=f"{name}: s_churn must be a number, got list"):
        call(name, begin(), network, s_churn=[1.0])
    with pytest.raises(ValueError, match="s_tmax must be at least 2, got 1"):
        call(name, begin(), network, s_tmin=2.0, s_tmax=1.0)


def test_options_of_one_function_are_checked():
    with pytest.raises(ValueError, match="solver_type must be one of midpoint, heun, got 'x'"):
        call("sample_dpmpp_2m_sde", begin(), network, solver_type="x")
    with pytest.raises(ValueError, match=r"order must be an integer in \[1, 4\], got 5"):
        call("sample_lms", begin(), network, order=5)
    call("sample_lms", begin(), network, order=4)
    with pytest.raises(TypeError, match="order must be an integer, got float"):
        call("sample_lms", begin(), network, order=4.0)
    with pytest.raises(ValueError, match=r"r must lie in \[0.001, 1\], got 2"):
        call("sample_dpmpp_sde", begin(), network, r=2.0)


def test_ends_are_checked():
    x = begin()
    for f in (K.sample_dpm_adaptive, lambda *a: K.sample_dpm_fast(*a, 5), K.log_likelihood):
        with pytest.raises(ValueError, match="sigma_min and sigma_max must be above 0 and finite"):
            f(network, x, 0.0, 10.0)
    for f in (K.sample_dpm_adaptive, K.log_likelihood):
        with pytest.raises(ValueError, match="sigma_min must be below sigma_max, got 10"):
            f(network, x, 10.0, 1.0)
        with pytest.raises(ValueError, match="tol"):
            f(network, x, 1.0, 10.0, rtol=-1.0)
    with pytest.raises(ValueError, match="order must be 2 or 3, got 1"):
        K.sample_dpm_adaptive(network, x, 0.1, 10.0, order=1)
    with pytest.raises(TypeError, match="n must be an integer, got float"):
        K.sample_dpm_fast(network, x, 0.1, 10.0, 5.0)
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        K.sample_dpm_fast(network, x, 0.1, 10.0, 0)
    with pytest.raises(ValueError, match="sigmas must fall, or rise from above 0"):
        K.sample_dpm_fast(network, x, 10.0, 0.1, 5, eta=1.0)


def test_nothing_is_drawn_before_an_error():
    state = torch.get_rng_state()
    for name in ON_SIGMAS:
        with pytest.raises(ValueError, match="sigmas must fall"):
            getattr(K, name)(network, begin(), KARRAS[[0, 0, 1]], disable=True)
    assert torch.equal(torch.get_rng_state(), state)


# --- speed ----------------------------------------------------------------------------------


def test_a_table_is_built_once():
    _tables._plan.cache_clear()
    for _ in range(3):
        call("sample_dpmpp_2m", begin(), network)
        call("sample_dpmpp_2m", begin(), network, sigmas=KARRAS.double())
        call("sample_euler_ancestral", begin(), network, eta=0.5)
    assert _tables._plan.cache_info().misses == 2
