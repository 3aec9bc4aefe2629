"""Gradients of reparameterized sampling, what autograd keeps, and the dispatcher around it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from budget import assert_within_budget
from torch._dynamo.testing import CompileCounter

import fastdiff
from fastdiff.ops import as_seeds, randn, reparameterize
from fastdiff.reference import reparameterize as reference

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def inputs(
    *shape: int, dtype: torch.dtype = torch.float32, spread: float = 2.0
) -> tuple[torch.Tensor, torch.Tensor]:
    both = randn([11, 12], shape, stream=9)
    return both[0].to(dtype), (spread * both[1]).to(dtype)


Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _weights(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    drawn = randn([21], (math.prod(shape) + shape[0],))[0]
    return drawn[shape[0] :].view(shape), drawn[: shape[0]]


def _losses(shape: tuple[int, ...]) -> dict[str, Loss]:
    wz, wk = _weights(shape)
    return {
        "z": lambda z, kl: (wz.to(z.dtype) * z).sum(),
        "kl": lambda z, kl: (wk.to(kl.dtype) * kl).sum(),
        "both": lambda z, kl: (wz.to(z.dtype) * z).sum() + (wk.to(kl.dtype) * kl).sum(),
    }


def _gradients(mu: torch.Tensor, logvar: torch.Tensor, loss: Loss, seeds: int = 6) -> Any:
    leaves = [t.detach().clone().requires_grad_() for t in (mu, logvar)]
    loss(*reparameterize(*leaves, seeds)).backward()
    return [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("used", ("z", "kl", "both"))
def test_gradients_against_autograd_through_the_formula(
    isa: str, used: str, dtype: torch.dtype
) -> None:
    shape = (3, 5, 83)
    mu, logvar = inputs(*shape, dtype=dtype)
    loss = _losses(shape)[used]
    with fastdiff.use_backend("cpu"):
        got = _gradients(mu, logvar, loss)
    with fastdiff.use_backend("reference"):
        plain = _gradients(mu, logvar, loss)
    exact_leaves = [t.double().requires_grad_() for t in (mu, logvar)]
    eps = randn(as_seeds(6, 3), shape[1:], stream=3)
    # autograd differentiates the formula itself here; the weights in the rounding of the dtype
    z, kl = reference.reparameterize(*exact_leaves, eps)
    wz = _weights(shape)[0].to(dtype).double()
    wk = _weights(shape)[1].double()
    total = (wz * z).sum() if used != "kl" else torch.zeros((), dtype=torch.float64)
    total = total + ((wk * kl).sum() if used != "z" else 0.0)
    total.backward()
    for g, p, e in zip(got, plain, exact_leaves, strict=True):
        assert e.grad is not None
        # 1 ulp: the last rounding to the dtype
        assert_within_budget(g, p, e.grad, ulps=1)


def test_gradcheck_and_second_derivatives_in_float64() -> None:
    mu, logvar = (t.double().requires_grad_() for t in inputs(3, 2, 4, spread=0.5))

    def both(m: torch.Tensor, lv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return reparameterize(m, lv, 3)

    assert torch.autograd.gradcheck(both, (mu, logvar))
    assert torch.autograd.gradgradcheck(both, (mu, logvar))
    for i in (0, 1):
        assert torch.autograd.gradcheck(lambda m, lv, i=i: both(m, lv)[i], (mu, logvar))


def test_second_derivative_in_float32_is_not_dropped() -> None:
    mu, logvar = (t.requires_grad_() for t in inputs(2, 50, spread=0.5))
    z, kl = reparameterize(mu, logvar, 3)
    (first,) = torch.autograd.grad((z.sum() + kl.sum()), logvar, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), logvar)
    eps = randn([3, 4], (50,), stream=3).double()
    sd2 = logvar.detach().double().exp()
    exact = 0.25 * eps * sd2.sqrt() + 0.5 * sd2
    # 2 ulp of the larger summand may be left by cancellation: the plain formula is the reference
    plain = 0.25 * eps.float() * (logvar.detach() / 2).exp() + 0.5 * logvar.detach().exp()
    assert_within_budget(second, plain, exact, ulps=1)


def test_only_the_wanted_gradient_arrives() -> None:
    mu, logvar = inputs(2, 9)
    mu.requires_grad_()
    z, kl = reparameterize(mu, logvar, 0)
    (z.sum() + kl.sum()).backward()
    assert mu.grad is not None and logvar.grad is None
    with torch.no_grad():
        assert not reparameterize(mu, logvar, 0)[0].requires_grad


def test_no_noise_is_saved() -> None:
    mu, logvar = (t.requires_grad_() for t in inputs(4, 1000))
    seeds = as_seeds(9, 4)
    saved: list[torch.Tensor] = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        reparameterize(mu, logvar, seeds)
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in (mu, logvar, seeds)}
    assert len(saved) == 3


def test_backward_runs_on_the_backend_of_the_forward_pass(monkeypatch: Any) -> None:
    ran: list[str] = []
    module = reference
    plain = module.reparameterize_backward
    monkeypatch.setattr(
        module, "reparameterize_backward", lambda *a: ran.append("reference") or plain(*a)
    )
    mu, logvar = (t.requires_grad_() for t in inputs(2, 9))
    with fastdiff.use_backend("reference"):
        z, _ = reparameterize(mu, logvar, 0)
    z.sum().backward()
    assert ran == ["reference"]


@pytest.mark.filterwarnings("ignore:`torch.jit.script")  # inside torch.func
def test_func_grad_works_and_forward_mode_is_refused_aloud() -> None:
    mu, logvar = inputs(3, 7)
    got = torch.func.grad(lambda m: reparameterize(m, logvar, 0)[1].sum())(mu)
    assert_same_bits(got, mu)  # dkl/dmu = mu
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="forward mode"),
    ):
        reparameterize(torch.autograd.forward_ad.make_dual(mu, mu), logvar, 0)


# --- the dispatcher -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
def test_opcheck(dtype: torch.dtype) -> None:
    mu, logvar = (t.requires_grad_() for t in inputs(3, 5, 4, dtype=dtype))
    seeds = as_seeds(2, 3)
    torch.library.opcheck(torch.ops.fastdiff.reparameterize.default, (mu, logvar, seeds, 1, 3))
    with torch.no_grad():
        strided = [t.transpose(1, 2) for t in (mu, logvar)]
        torch.library.opcheck(torch.ops.fastdiff.reparameterize.default, (*strided, seeds, 1, 3))
        for grads in ((mu, None), (None, torch.ones(3)), (mu, torch.ones(3))):
            torch.library.opcheck(
                torch.ops.fastdiff.reparameterize_backward.default,
                (*grads, mu, logvar, seeds, 1, 3),
            )


def test_eager_call_and_dispatched_op_give_the_same_bits() -> None:
    mu, logvar = inputs(3, 100)
    got = torch.ops.fastdiff.reparameterize(mu, logvar, as_seeds(2, 3), 1, 3)
    for a, b in zip(got, reparameterize(mu, logvar, 2, step=1), strict=True):
        assert_same_bits(a, b)


def test_compiles_without_a_graph_break_and_once_for_all_seeds() -> None:
    torch._dynamo.reset()
    graphs = CompileCounter()

    def f(m: torch.Tensor, lv: torch.Tensor, seeds: Any) -> torch.Tensor:
        z, kl = reparameterize(2 * m, lv, seeds)
        return (z * z).sum() + kl.sum()

    compiled = torch.compile(f, fullgraph=True, backend=graphs)
    leaves = [t.requires_grad_() for t in inputs(4, 33)]
    for seeds in (1, 5, 9, 13, torch.arange(4), [3, 2**64 - 1, 1, 0]):
        expected = torch.autograd.grad(f(*leaves, seeds), leaves)
        got = torch.autograd.grad(compiled(*leaves, seeds), leaves)
        for a, b in zip(got, expected, strict=True):
            assert_same_bits(a, b, f"compiled gradient, seeds {seeds}")
    # the first int is a constant, the second makes it a symbol; a tensor and a list are new types
    assert graphs.frame_count == 4
    torch._dynamo.reset()


def test_compiles_with_aot_autograd() -> None:
    torch._dynamo.reset()
    leaves = [t.requires_grad_() for t in inputs(4, 33)]

    def f(m: torch.Tensor, lv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return reparameterize(m.sin(), lv, 3)

    z, kl = torch.compile(f, fullgraph=True, backend="aot_eager")(*leaves)
    eager_z, eager_kl = f(*leaves)
    assert_same_bits(z, eager_z)
    assert_same_bits(kl, eager_kl)
    got = torch.autograd.grad(z.sum() + kl.sum(), leaves)
    expected = torch.autograd.grad(eager_z.sum() + eager_kl.sum(), leaves)
    for a, b in zip(got, expected, strict=True):
        assert_same_bits(a, b)
    torch._dynamo.reset()


def test_meta_tensors_have_the_shapes() -> None:
    mu = torch.empty(3, 5, device="meta", dtype=torch.bfloat16)
    z, kl = reparameterize(mu, mu, 0)
    assert z.shape == (3, 5) and z.dtype == torch.bfloat16 and z.is_meta
    assert kl.shape == (3,) and kl.dtype == torch.float32
