"""Levels and model wrappers of `integrations.k_diffusion` against k-diffusion's own."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch
from bits import assert_same_bits
from peers import k_module, k_sampling
from torch import nn

from fastdiff import randn, schedules
from fastdiff.integrations import k_diffusion as K

ABAR = torch.from_numpy(schedules.scaled_linear().alphas_cumprod.copy()).float()
SHAPE = (3, 4, 5, 5)
DRAWS = [randn(range(3 * k, 3 * k + 3), SHAPE[1:]) for k in range(2)]


def same_or_rounded(got, want, ulps=4):
    """The same numbers up to the order of a few operations in their own dtype."""
    assert got.dtype == want.dtype and got.shape == want.shape
    if not want.is_floating_point():
        assert torch.equal(got, want)
        return
    eps = torch.finfo(want.dtype).eps
    assert float((got - want).abs().max()) <= ulps * eps * float(want.abs().max())


# --- levels ---------------------------------------------------------------------------------

LEVELS = {
    "get_sigmas_karras": [(10, 0.03, 14.6), (1, 0.1, 1.0), (50, 0.002, 80.0, 5.0)],
    "get_sigmas_exponential": [(10, 0.03, 14.6), (1, 0.1, 1.0)],
    "get_sigmas_polyexponential": [(10, 0.03, 14.6), (7, 0.03, 14.6, 1.5)],
    "get_sigmas_vp": [(10,), (5, 18.0, 0.2, 1e-2)],
}


@pytest.mark.parametrize("name", LEVELS)
def test_levels_are_the_same_bits(name):
    for arguments in LEVELS[name]:
        got = getattr(K, name)(*arguments)
        assert got.shape == (arguments[0] + 1,) and got[-1] == 0
        assert_same_bits(got, getattr(k_sampling(), name)(*arguments))


def test_small_functions_are_the_same_bits():
    x, denoised = randn([0, 1], (3, 4, 4)), randn([2, 3], (3, 4, 4))
    for sigma in (torch.tensor(3.0), torch.tensor([3.0, 0.5])):
        pair = [f(x, sigma, denoised) for f in (K.to_d, k_sampling().to_d)]
        assert_same_bits(*pair)
    assert_same_bits(K.append_zero(x[0, 0, 0]), k_sampling().append_zero(x[0, 0, 0]))
    for levels in ((3.0, 2.0), (3.0, 0.0), (torch.tensor(3.0), torch.tensor(2.0))):
        for eta in (0.0, 0.5, 1.0, 9.0):
            both = [f.get_ancestral_step(*levels, eta=eta) for f in (K, k_sampling())]
            assert both[0] == both[1]


def test_default_noise_is_torchs():
    x = torch.zeros(2, 3, dtype=torch.float64)
    torch.manual_seed(1)
    got = K.default_noise_sampler(x)(3.0, 2.0)
    torch.manual_seed(1)
    assert torch.equal(got, torch.randn(2, 3, dtype=torch.float64))


def test_append_dims_cannot_take_away():
    with pytest.raises(ValueError, match="target_dims must be at least 4, got 2"):
        K.to_d(torch.zeros(2, 3), torch.zeros(2, 1, 1, 1), torch.zeros(2, 3))


# --- wrappers -------------------------------------------------------------------------------


class Inner(nn.Module):
    """A network of every calling convention: it shows what it is given."""

    def __init__(self, out=1):
        super().__init__()
        self.alphas_cumprod, self.out, self.seen = ABAR, out, None

    def forward(self, x, t, cond=0.0):
        self.seen = t
        y = torch.sin(3 * x) + cond + 0.01 * t.to(x.dtype).view(-1, 1, 1, 1)
        return torch.cat([y] * self.out, dim=1)

    apply_model = forward


# wrapper, module of k-diffusion, how it is built around a network
WRAPPERS = {
    "VDenoiser": ("external", lambda cls, net: cls(net)),
    "DiscreteEpsDDPMDenoiser": ("external", lambda cls, net: cls(net, ABAR, False)),
    "DiscreteEpsDDPMDenoiser-quantized": ("external", lambda cls, net: cls(net, ABAR, True)),
    "DiscreteVDDPMDenoiser": ("external", lambda cls, net: cls(net, ABAR, quantize=False)),
    "CompVisDenoiser": ("external", lambda cls, net: cls(net)),
    "CompVisDenoiser-quantized": ("external", lambda cls, net: cls(net, quantize=True)),
    "CompVisVDenoiser": ("external", lambda cls, net: cls(net, False)),
    "OpenAIDenoiser": (
        "external",
        lambda cls, net: cls(
            net, SimpleNamespace(alphas_cumprod=ABAR.double().numpy()), has_learned_sigmas=False
        ),
    ),
    "Denoiser": ("layers", lambda cls, net: cls(net, 0.5)),
    "Denoiser-snr": ("layers", lambda cls, net: cls(net, 0.5, weighting="snr")),
    "Denoiser-soft": ("layers", lambda cls, net: cls(net, 0.7, "soft-min-snr")),
    "SimpleLossDenoiser": ("layers", lambda cls, net: cls(net)),
}  # fmt: skip


def wrapped(case):
    """k-diffusion's wrapper and ours."""
    module, build = WRAPPERS[case]
    name = case.split("-")[0]
    return build(getattr(k_module(module), name), Inner()), build(getattr(K, name), Inner())


@pytest.mark.parametrize("case", WRAPPERS)
def test_wrapper(case):
    """D(x, sigma), the loss, and what the network is given."""
    torch.manual_seed(0)
    theirs, ours = wrapped(case)
    x, noise = DRAWS
    cond = {"cond": 0.25}
    for sigma in (torch.tensor([0.05, 1.0, 14.0]), torch.tensor([0.001, 0.3, 200.0])):
        same_or_rounded(ours(x, sigma, **cond), theirs(x, sigma, **cond))
        same_or_rounded(ours.inner_model.seen, theirs.inner_model.seen)
        for a, b in zip(ours.get_scalings(sigma), theirs.get_scalings(sigma), strict=True):
            same_or_rounded(a, b)
        losses = [w.loss(x, noise, sigma, **cond) for w in (ours, theirs)]
        assert losses[0].shape == (3,)
        same_or_rounded(*losses, ulps=16)  # a mean of squares


@pytest.mark.parametrize("case", [c for c in WRAPPERS if "DDPM" in c or "Comp" in c or "Open" in c])
def test_discrete_schedule(case):
    theirs, ours = wrapped(case)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, buffer in theirs.state_dict().items():
        assert_same_bits(ours.state_dict()[name], buffer)
    assert_same_bits(ours.sigma_min, theirs.sigma_min)
    assert_same_bits(ours.sigma_max, theirs.sigma_max)
    for n in (None, 1, 10, 1000):
        assert_same_bits(ours.get_sigmas(n), theirs.get_sigmas(n))
    # the levels themselves, between and beside them, and beyond both ends
    sigmas = torch.cat([
        ours.sigmas, ours.sigmas * 1.0001, (ours.sigmas[1:] * ours.sigmas[:-1]) ** 0.5,
        torch.tensor([1e-4, 100.0]),
    ])  # fmt: skip
    for quantize in (None, False, True):
        got, want = (w.sigma_to_t(sigmas, quantize) for w in (ours, theirs))
        assert_same_bits(got, want)
    times = torch.linspace(0, 999, 3001)
    assert_same_bits(ours.t_to_sigma(times), theirs.t_to_sigma(times))
    table = ours.sigmas[:4].view(2, 2)  # k-diffusion takes one axis
    assert_same_bits(ours.sigma_to_t(table), theirs.sigma_to_t(table.flatten()).view(2, 2))


def test_v_of_the_cosine_schedule():
    theirs, ours = wrapped("VDenoiser")
    sigma = torch.tensor([0.01, 1.0, 50.0])
    assert_same_bits(ours.sigma_to_t(sigma), theirs.sigma_to_t(sigma))
    assert_same_bits(ours.t_to_sigma(sigma / 100), theirs.t_to_sigma(sigma / 100))


def test_learned_sigmas_are_dropped():
    diffusion = SimpleNamespace(alphas_cumprod=ABAR.double().numpy())
    x, sigma = DRAWS[0], torch.tensor([0.1, 1.0, 10.0])
    for w in (k_module("external"), K):
        one = w.OpenAIDenoiser(Inner(), diffusion, has_learned_sigmas=False)
        assert_same_bits(w.OpenAIDenoiser(Inner(out=2), diffusion)(x, sigma), one(x, sigma))


@pytest.mark.parametrize("case", WRAPPERS)
def test_constructor(case):
    theirs, ours = (
        inspect.signature(getattr(where, case.split("-")[0]).__init__).parameters
        for where in (k_module(WRAPPERS[case][0]), K)
    )
    assert [(p.name, p.default) for p in ours.values()] == [
        (p.name, p.default) for p in theirs.values()
    ]


def test_edm_weighting():
    """A function too, which k-diffusion 0.1.1 takes and then refuses as an unknown name."""
    (x, noise), sigma = DRAWS, torch.tensor([0.1, 1.0, 10.0])
    plain = K.Denoiser(Inner()).loss(x, noise, sigma)
    got = K.Denoiser(Inner(), weighting=lambda sigma: 3 * sigma).loss(x, noise, sigma)
    same_or_rounded(got, plain * 3 * sigma)
    with pytest.raises(ValueError, match="Unknown weighting"):
        k_module("layers").Denoiser(Inner(), weighting=lambda sigma: 3 * sigma)
    with pytest.raises(ValueError, match="weighting must be a function or one of karras, soft-min"):
        K.Denoiser(Inner(), weighting="none")


def test_edm_scales():
    x, sigma = DRAWS[0], torch.tensor([0.1, 1.0, 10.0])
    many = K.Denoiser(Inner(), scales=4)
    assert_same_bits(many(x, sigma), K.Denoiser(Inner())(x, sigma))
    with pytest.raises(ValueError, match="scales must be 1 for the loss, got 4"):
        many.loss(x, x, sigma)


@pytest.mark.parametrize("case", WRAPPERS)
def test_wrapped_network_is_sampled(case):
    """A picture from end to end, through k-diffusion alone and through ours alone."""
    sigmas = K.get_sigmas_karras(8, 0.05, 14.0).double()
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2)).double() * 14
    theirs, ours = (wrapper.double() for wrapper in wrapped(case))
    arguments = {"extra_args": {"cond": 0.1}, "disable": True}
    want = k_sampling().sample_dpmpp_2m(theirs, x, sigmas, **arguments)
    got = K.sample_dpmpp_2m(ours, x, sigmas, **arguments)
    # float64 through eight steps on a network of slope 3
    assert float((got - want).abs().max()) <= 1e-12 * float(torch.maximum(x, want).abs().max())
