"""Several samples of each distribution, and bounds of logvar."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from bits import assert_same_bits
from tables import Guard

import fastdiff
from fastdiff.ops import as_seeds, randn, reparameterize
from fastdiff.ops.reparameterize import (
    Reparameterize,
    ReparameterizeBackward,
    _cpu,
    _cpu_backward,
)
from fastdiff.reference.noise import normals

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
CLAMP = (-1.5, 0.75)
# around a Philox block, the noise batch, both pieces and the partial sum of the kernel
SIZES = (0, 1, 3, 4, 63, 65, 127, 129, 255, 257, 1024, 2501)


def _inputs(*shape: int, dtype: torch.dtype = F32) -> tuple[torch.Tensor, torch.Tensor]:
    both = randn([11, 12], shape, stream=9)
    logvar = 2 * both[1]
    if logvar.numel() > 60:  # at both bounds exactly, where the slope is still 1
        logvar.view(-1)[50], logvar.view(-1)[51] = CLAMP
    return both[0].to(dtype), logvar.to(dtype)


def _results(
    mu: torch.Tensor, logvar: torch.Tensor, through: str, **how: Any
) -> tuple[torch.Tensor, ...]:
    """z, and the gradients through z, through kl or through both."""
    leaves = [t.clone().requires_grad_() for t in (mu, logvar)]
    z, kl = reparameterize(*leaves, 5, step=2, **how)
    grad_z = randn([21], tuple(z.shape))[0].to(z.dtype)
    grad_kl = randn([22], tuple(kl.shape))[0]
    outputs = [z] * ("z" in through) + [kl] * ("k" in through)
    given = [grad_z] * ("z" in through) + [grad_kl] * ("k" in through)
    return (z.detach(), *torch.autograd.grad(outputs, leaves, given))


@pytest.mark.parametrize("dtype", (F32, BF16, F16), ids=str)
@pytest.mark.parametrize(
    "how",
    ({"samples": 1}, {"samples": 2}, {"samples": 5, "clamp": CLAMP}, {"clamp": CLAMP}),
    ids=("1", "2", "5 bounded", "bounded"),
)
def test_bits_of_the_reference(isa: str, dtype: torch.dtype, how: dict[str, Any]) -> None:
    for size in SIZES:
        mu, logvar = _inputs(3, size, dtype=dtype)
        for through in ("zk", "z", "k"):
            found = []
            for backend in ("cpu", "reference"):
                with fastdiff.use_backend(backend):
                    found.append(_results(mu, logvar, through, **how))
            for name, got, expected in zip(("z", "mu", "logvar"), *found, strict=True):
                assert_same_bits(got, expected, f"{name}, size {size}, through {through}")


@pytest.mark.parametrize("size", (1, 63, 64, 1025))
def test_samples_are_the_runs_of_the_sequence_that_are_documented(size: int) -> None:
    mu, logvar = _inputs(3, size)
    z, kl = reparameterize(mu, logvar, [4, 5, 6], samples=4, step=9)
    assert z.shape == (3, 4, size) and z.is_contiguous()
    first, once = reparameterize(mu, logvar, [4, 5, 6], step=9)
    assert_same_bits(z[:, 0], first)
    assert_same_bits(kl, once)
    sd, _ = reparameterize(torch.zeros(1, size), logvar[:1], 0)
    zero = torch.zeros(3, size)
    eps, _ = reparameterize(zero, zero, [4, 5, 6], samples=4, step=9)
    for k in range(4):
        start = k * math.ceil(size / 4) * 4
        run = normals(np.array([4, 5, 6], np.uint64), size, 9, 3, start)
        assert_same_bits(eps[:, k], torch.from_numpy(run))
    assert sd.shape == (1, size)


def test_whole_blocks_are_one_draw_of_all_samples() -> None:
    zero = torch.zeros(2, 4, 8)
    eps, _ = reparameterize(zero, zero, 3, samples=5)
    assert_same_bits(eps, randn([3, 4], (5, 4, 8), stream=3))


def test_samples_of_one_distribution_are_independent() -> None:
    """Correlations of unit normals, within five standard errors."""
    n = 1 << 16
    zero = torch.zeros(1, n)
    eps = reparameterize(zero, zero, 8, samples=6)[0][0].double()
    found = eps @ eps.T / n - torch.eye(6, dtype=torch.float64)
    bound = 5 * torch.sqrt((1 + torch.eye(6, dtype=torch.float64)) / n)
    assert bool((found.abs() < bound).all())


@pytest.mark.parametrize("samples", (None, 3))
@pytest.mark.parametrize("dtype", (F32, torch.float64), ids=str)
def test_bounds_are_those_of_clamp(samples: int | None, dtype: torch.dtype) -> None:
    """A logvar on a bound has its gradient, as torch's clamp gave it until 2.14, and not since."""
    mu, logvar = _inputs(3, 4, 83, dtype=dtype)
    assert int((logvar == CLAMP[0]).sum()) == int((logvar == CLAMP[1]).sum()) == 1
    leaves = [[t.clone().requires_grad_() for t in (mu, logvar)] for _ in range(2)]
    z, kl = reparameterize(*leaves[0], 5, clamp=CLAMP, samples=samples)
    m, lv = leaves[1]
    within = (lv >= CLAMP[0]) & (lv <= CLAMP[1])
    bounded = torch.where(within, lv, lv.detach().clamp(*CLAMP))
    plain_z, plain_kl = reparameterize(m, bounded, 5, samples=samples)
    assert_same_bits(z, plain_z)
    assert_same_bits(kl, plain_kl)
    grad = randn([21], tuple(z.shape))[0].to(dtype)
    got = torch.autograd.grad([z, kl], leaves[0], [grad, kl.detach()])
    expected = torch.autograd.grad([plain_z, plain_kl], leaves[1], [grad, kl.detach()])
    for a, b in zip(got, expected, strict=True):
        assert_same_bits(a, b)
    assert bool((got[1] == 0).any()) and bool((got[1] != 0).any())


def test_not_a_number_is_not_moved_to_a_bound() -> None:
    for backend in ("cpu", "reference"):
        mu, logvar = _inputs(2, 70)
        logvar[1, 3] = math.nan
        with fastdiff.use_backend(backend):
            z, _, grad = _results(mu, logvar, "z", clamp=CLAMP, samples=2)
        assert z.isnan().nonzero().tolist() == [[1, 0, 3], [1, 1, 3]]
        assert grad.isnan().nonzero().tolist() == [[1, 3]]


def test_infinite_logvar_is_moved_to_a_bound() -> None:
    logvar = torch.tensor([[math.inf, -math.inf, 1000.0, -1000.0]])
    z, kl = reparameterize(torch.zeros(1, 4), logvar, 0, clamp=(-30.0, 20.0))
    expected = reparameterize(torch.zeros(1, 4), torch.tensor([[20.0, -30.0, 20.0, -30.0]]), 0)
    assert_same_bits(z, expected[0])
    assert_same_bits(kl, expected[1])


def test_nothing_is_written_outside_the_results(isa: str) -> None:
    for size in (1, 17, 257):
        mu, logvar = _inputs(2, size)
        seeds, how = as_seeds(3, 2), (0, 3, *CLAMP, 3)
        z, g = Guard((2, 3, size)), Guard((2, 3, size))
        kl, grads = Guard((2,)), [Guard((2, size)) for _ in range(2)]
        _cpu(Reparameterize(mu, logvar, seeds, *how, z.tensor, kl.tensor))
        expected = reparameterize(mu, logvar, 3, clamp=CLAMP, samples=3)
        assert_same_bits(z.tensor, expected[0])
        g.tensor.copy_(z.tensor)
        given = (g.tensor, kl.tensor, mu, logvar, seeds, *how)
        _cpu_backward(ReparameterizeBackward(*given, *(guard.tensor for guard in grads)))
        for guard in (z, g, kl, *grads):
            guard.check(f"size {size}")
            assert not bool(guard.tensor.isnan().any())


def test_threads_change_no_bit() -> None:
    mu, logvar = _inputs(8, 3001)
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(_results(mu, logvar, "zk", samples=4, clamp=CLAMP))
    for a, b in zip(*found, strict=True):
        assert_same_bits(a, b)


def test_gradcheck_and_second_derivatives_in_float64() -> None:
    mu, logvar = (t.double().requires_grad_() for t in _inputs(3, 2, 4))

    def both(m: torch.Tensor, lv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return reparameterize(m, lv, 3, samples=2, clamp=CLAMP)

    assert torch.autograd.gradcheck(both, (mu, logvar))
    assert torch.autograd.gradgradcheck(both, (mu, logvar))


def test_autograd_keeps_no_more_for_more_samples() -> None:
    mu, logvar = (t.requires_grad_() for t in _inputs(4, 1000))
    saved: list[torch.Tensor] = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        reparameterize(mu, logvar, 9, samples=50, clamp=CLAMP)
    assert sum(t.numel() for t in saved) == 2 * mu.numel() + 4


@pytest.mark.parametrize("how", ((None, 3), (list(CLAMP), None), (list(CLAMP), 2)), ids=str)
def test_opcheck(how: tuple[Any, Any]) -> None:
    mu, logvar = (t.requires_grad_() for t in _inputs(3, 5, 4))
    given = (as_seeds(2, 3), 1, 3, *how)
    torch.library.opcheck(torch.ops.fastdiff.reparameterize.default, (mu, logvar, *given))
    with torch.no_grad():
        z, kl = reparameterize(mu, logvar, 2, samples=how[1])
        for grads in ((z, None), (None, kl), (z, kl)):
            torch.library.opcheck(
                torch.ops.fastdiff.reparameterize_backward.default, (*grads, mu, logvar, *given)
            )


def test_compiles_without_a_graph_break() -> None:
    torch._dynamo.reset()

    def f(m: torch.Tensor, lv: torch.Tensor) -> torch.Tensor:
        z, kl = reparameterize(m, lv, 7, samples=3, clamp=CLAMP)
        return (z * z).logsumexp(1).sum() + kl.sum()

    leaves = [t.requires_grad_() for t in _inputs(4, 33)]
    expected = torch.autograd.grad(f(*leaves), leaves)
    got = torch.autograd.grad(
        torch.compile(f, fullgraph=True, backend="aot_eager")(*leaves), leaves
    )
    for a, b in zip(got, expected, strict=True):
        assert_same_bits(a, b)
    torch._dynamo.reset()


REFUSED: dict[str, tuple[type[Exception], dict[str, Any], str]] = {
    "no samples": (ValueError, {"samples": 0}, "samples must be >= 1, got 0"),
    "a fraction": (TypeError, {"samples": 2.0}, "samples must be an integer, got float"),
    "a flag": (TypeError, {"samples": True}, "samples must be an integer, got bool"),
    "one bound": (TypeError, {"clamp": 3.0}, "clamp must be two numbers, got 3.0"),
    "three": (TypeError, {"clamp": (1, 2, 3)}, "clamp must be two numbers, got (1, 2, 3)"),
    "open": (TypeError, {"clamp": (None, 2.0)}, "clamp must be two numbers, got (None, 2.0)"),
    "reversed": (ValueError, {"clamp": (2.0, 1.0)}, "clamp must be low <= high, got (2.0, 1.0)"),
    "not a number": (ValueError, {"clamp": (math.nan, 1.0)}, "clamp must be low <= high, got (nan"),
}


@pytest.mark.parametrize(("error", "change", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals(error: type[Exception], change: dict[str, Any], message: str) -> None:
    with pytest.raises(error, match=re.escape(f"reparameterize: {message}")):
        reparameterize(*_inputs(2, 3), 0, **change)
