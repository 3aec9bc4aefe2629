"""Reparameterized sampling: bits of z, the divergence, the gradients, and what autograd keeps.

Noise is deterministic, so the statistical tests cannot flake; their confidence is stated per test.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from budget import assert_within_budget
from tables import Guard

import fastdiff
from fastdiff.ops import Stream, as_seeds, randn, reparameterize
from fastdiff.ops.reparameterize import (
    Reparameterize,
    ReparameterizeBackward,
    _cpu,
    _cpu_backward,
)
from fastdiff.reference import reparameterize as reference
from fastdiff.reference.reparameterize import UNBOUNDED

# around the noise batch (64), the piece (256) and the partial sum (1,024) of the kernel, and one
# vector of AVX-512 and AVX2 either way
SIZES = (0, 1, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 255, 257, 1023, 1024, 1025, 2500)
HALVES = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, *HALVES)


def _inputs(
    *shape: int, dtype: torch.dtype = torch.float32, spread: float = 2.0
) -> tuple[torch.Tensor, torch.Tensor]:
    both = randn([11, 12], shape, stream=9)
    return both[0].to(dtype), (spread * both[1]).to(dtype)


def _reference(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    with fastdiff.use_backend("reference"):
        return reparameterize(*args, **kwargs)


def _exact(mu: torch.Tensor, logvar: torch.Tensor, seeds: Any = 0) -> Any:
    """z and kl in float64 by torch's own exponential on the same eps."""
    m, lv = mu.double(), logvar.double()
    eps = randn(as_seeds(seeds, len(mu)), mu.shape[1:], stream=3).double()
    kl = 0.5 * (m * m + torch.expm1(lv) - lv).flatten(1).sum(1)
    return m + (lv / 2).exp() * eps, kl


# --- values ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", SIZES)
def test_z_has_the_bits_of_the_reference(isa: str, size: int, dtype: torch.dtype) -> None:
    mu, logvar = _inputs(3, size, dtype=dtype)
    with fastdiff.use_backend("cpu"):
        z, kl = reparameterize(mu, logvar, 5, step=2)
    expected, expected_kl = _reference(mu, logvar, 5, step=2)
    assert_same_bits(z, expected, "z")
    assert z.dtype == dtype and kl.dtype == torch.float32 and kl.shape == (3,)
    exact = _exact(mu, logvar)[1]
    # half an ulp: the last rounding; the rest: the 16 running sums, whose up to 63 roundings each,
    # 1/16 of an ulp of the total, add up like a random walk to less than 1 ulp
    assert_within_budget(kl, expected_kl, exact, ulps=1.5)


def test_z_is_the_formula_on_the_counter_noise() -> None:
    mu, logvar = _inputs(4, 1000)
    z, _ = reparameterize(mu, logvar, 7, step=3, stream=8)
    eps = randn([7, 8, 9, 10], (1000,), step=3, stream=8)
    exact = mu.double() + (logvar.double() / 2).exp() * eps.double()
    # two roundings of z, 2 ulp of the exponential and one of the product: at most 4 ulp of the
    # larger summand, which cancellation leaves in z; torch's own exponential is the reference
    plain = mu + torch.exp(0.5 * logvar) * eps
    assert_within_budget(z, plain, exact, ulps=2)


@pytest.mark.parametrize("dtype", FLOATS)
def test_writes_nothing_outside_its_outputs_and_reads_misaligned_views(
    isa: str, dtype: torch.dtype
) -> None:
    for size in (1, 17, 257, 1025):
        mu, logvar = _inputs(2, size, dtype=dtype)
        odd = [Guard((2, size), dtype=dtype) for _ in range(6)]
        for guard, value in zip(odd, (mu, logvar, mu + 1), strict=False):
            guard.tensor.copy_(value)
        m, lv, g, z, grad_mu, grad_logvar = (guard.tensor for guard in odd)
        kl = Guard((2,))
        seeds = as_seeds(3, 2)
        _cpu(Reparameterize(m, lv, seeds, 0, 3, *UNBOUNDED, 1, z, kl.tensor))
        expected, expected_kl = reparameterize(mu, logvar, 3)
        assert_same_bits(z, expected, "z")
        assert_same_bits(kl.tensor, expected_kl, "kl")
        grad_kl = torch.tensor([0.5, -2.0])
        given = (g, grad_kl, m, lv, seeds, 0, 3, *UNBOUNDED, 1)
        _cpu_backward(ReparameterizeBackward(*given, grad_mu, grad_logvar))
        eps = randn(seeds, (size,), stream=3)
        wanted = reference.reparameterize_backward(mu + 1, grad_kl, mu, logvar, eps)
        assert_same_bits(grad_mu, wanted[0], "grad_mu")
        assert_same_bits(grad_logvar, wanted[1], "grad_logvar")
        for guard in (*odd, kl):
            guard.check(f"size {size}")
        assert_same_bits(m, mu, "mu after the calls")
        assert_same_bits(lv, logvar, "logvar after the calls")


def test_any_strides_give_the_bits_of_the_contiguous_copy() -> None:
    mu, logvar = _inputs(3, 4, 6, 5)
    expected = reparameterize(mu, logvar, 0)
    for change in (
        lambda t: t.to(memory_format=torch.channels_last),
        lambda t: t.transpose(1, 3).contiguous().transpose(1, 3),
        lambda t: torch.stack([t, t], -1)[..., 0],
    ):
        m, lv = change(mu), change(logvar)
        assert not m.is_contiguous()
        for got, wanted in zip(reparameterize(m, lv, 0), expected, strict=True):
            assert_same_bits(got, wanted)
        a, b = mu.clone().requires_grad_(), change(mu).requires_grad_()
        for leaf, other in ((a, logvar), (b, lv)):
            z, kl = reparameterize(leaf, other, 0)
            (z.sum() + kl.sum()).backward()
        assert a.grad is not None and b.grad is not None
        assert_same_bits(b.grad, a.grad, "gradient of a strided input")


def test_a_sample_is_the_same_in_any_batch_and_for_any_number_of_threads(isa: str) -> None:
    mu, logvar = _inputs(80, 3001)
    seeds = torch.arange(80) * 977
    torch.set_num_threads(1)
    z, kl = reparameterize(mu, logvar, seeds)
    torch.set_num_threads(2)
    z2, kl2 = reparameterize(mu, logvar, seeds)
    assert_same_bits(z2, z, "z of 2 threads")
    assert_same_bits(kl2, kl, "kl of 2 threads")
    for i in (0, 41, 79):
        one_z, one_kl = reparameterize(mu[i : i + 1], logvar[i : i + 1], [977 * i])
        assert_same_bits(one_z, z[i : i + 1], "z of a batch of one")
        assert_same_bits(one_kl, kl[i : i + 1], "kl of a batch of one")


@pytest.mark.parametrize("spread", (1e-4, 1.0, 20.0), ids=("collapsed", "usual", "wide"))
@pytest.mark.parametrize("dtype", FLOATS)
def test_kl_is_the_closed_form(isa: str, spread: float, dtype: torch.dtype) -> None:
    mu, logvar = _inputs(5, 4099, dtype=dtype, spread=spread)
    mu = mu * (spread if spread < 1 else 1)
    with fastdiff.use_backend("cpu"):
        _, kl = reparameterize(mu, logvar, 0)
    # the same allowance as above; what cancels in a collapsed posterior's terms, it does in the
    # reference's as well
    assert_within_budget(kl, _reference(mu, logvar, 0)[1], _exact(mu, logvar)[1], ulps=1.5)


def test_kl_of_a_large_sample_keeps_its_digits(isa: str) -> None:
    """A thousand partial sums: a float32 total of them would be off by some 10 ulp."""
    mu, logvar = _inputs(2, 1 << 20)
    _, kl = reparameterize(mu, logvar, 0)
    exact = _exact(mu, logvar)[1]
    # nothing but the last rounding and what 32,768 running sums of 64 terms average to
    assert_within_budget(kl, exact.float(), exact, ulps=0.5)


def test_kl_is_that_of_torch_distributions() -> None:
    mu, logvar = (t.double() for t in _inputs(4, 3, 5))
    one = torch.distributions.Normal(mu, (logvar / 2).exp())
    prior = torch.distributions.Normal(torch.zeros(()).double(), torch.ones(()).double())
    expected = torch.distributions.kl_divergence(one, prior).flatten(1).sum(1)
    # 16 ulp: 15 additions and a term's own roundings, both sides in float64
    assert_within_budget(reparameterize(mu, logvar, 0)[1], expected, expected, ulps=16)


def test_kl_of_the_prior_is_zero() -> None:
    _, kl = reparameterize(torch.zeros(3, 1000), torch.zeros(3, 1000), 0)
    assert kl.tolist() == [0.0, 0.0, 0.0]


def test_exponential_saturates_and_nan_passes(isa: str) -> None:
    logvar = torch.tensor([[-1e30, -200.0, 200.0, 300.0, math.nan, 0.0, -math.inf, math.inf]])
    mu = torch.zeros_like(logvar)
    z, kl = reparameterize(mu, logvar, 0)
    assert_same_bits(z, _reference(mu, logvar, 0)[0])
    eps = randn([0], (8,), stream=3)
    low, high = math.exp(-86), math.exp(88)
    assert z[0, 4].isnan() and z[0, 5] == eps[0, 5] and kl.isnan().all()
    ratio = (z / eps)[0].double()
    exact = torch.tensor([low, low, high, high, math.nan, 1, low, high], dtype=torch.float64)
    keep = ~exact.isnan()
    # 2 ulp of the exponential, product and quotient
    assert_within_budget(ratio[keep].float(), exact[keep].float(), exact[keep], ulps=3)
    _, overflown = reparameterize(torch.zeros(2, 3), torch.tensor([[0, 89.0, 0], [0, 88.0, 0]]), 0)
    assert overflown[0] == math.inf and overflown[1].isfinite()


@pytest.mark.parametrize("shape", ((0,), (3,), (0, 5), (5, 0), (2, 0, 4), (0, 3, 4, 4)))
def test_empty_and_scalar_samples(shape: tuple[int, ...]) -> None:
    mu, logvar = _inputs(*shape)
    mu.requires_grad_()
    z, kl = reparameterize(mu, logvar, 4)
    assert z.shape == shape and kl.shape == shape[:1]
    assert_same_bits(z, _reference(mu, logvar, 4)[0])
    (z.sum() + kl.sum()).backward()
    assert mu.grad is not None and mu.grad.shape == shape
    if 0 in shape[1:]:
        assert not kl.any()


def test_step_and_stream_draw_other_noise_and_the_default_is_stream_three() -> None:
    mu, logvar = torch.zeros(2, 100), torch.zeros(2, 100)
    z, _ = reparameterize(mu, logvar, 1)
    assert_same_bits(z, randn([1, 2], (100,), stream=Stream.REPARAMETERIZE))
    for other in ({"step": 1}, {"stream": 4}):
        assert not (reparameterize(mu, logvar, 1, **other)[0] == z).any()


def test_seeds_may_be_an_int_a_list_or_a_tensor() -> None:
    mu, logvar = _inputs(3, 9)
    z, _ = reparameterize(mu, logvar, 2**64 - 3)
    for seeds in ([2**64 - 3, 2**64 - 2, 2**64 - 1], torch.tensor([-3, -2, -1])):
        assert_same_bits(reparameterize(mu, logvar, seeds)[0], z)
    strided = torch.tensor([[-3, 0], [-2, 0], [-1, 0]])[:, 0]
    assert_same_bits(reparameterize(mu, logvar, strided)[0], z)


def test_sample_has_the_mean_and_the_deviation_that_it_was_given() -> None:
    """Two-sided 5 sigma: a right implementation on random noise would fail once in 1.7 million."""
    n = 1 << 18
    for mu, logvar in ((0.0, 0.0), (3.0, -2.0), (-1.0, 1.5)):
        sd = math.exp(logvar / 2)
        z, _ = reparameterize(torch.full((4, n), mu), torch.full((4, n), logvar), 100)
        z = z.double().flatten()
        assert abs(z.mean().item() - mu) < 5 * sd / math.sqrt(4 * n)
        assert abs(z.var().item() - sd**2) < 5 * sd**2 * math.sqrt(2 / (4 * n))
