"""Gradients of `film_norm`, and the dispatcher around it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bits import assert_same_bits
from budget import assert_within_budget
from tables import needs_extension

from fastdiff.ops import _native, film, film_norm, randn
from fastdiff.reference import film_norm as reference

NAMES = ("x", "weight", "bias", "scale", "shift", "residual")


def _inputs(*shape: int, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    n, c = shape[:2]
    sizes = {"x": shape, "weight": (c,), "bias": (c,), "scale": (n, c), "shift": (n, c),
             "residual": shape}  # fmt: skip
    return {k: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
            for k, s in sizes.items()}  # fmt: skip


def _call(groups: int, act: str | None, names: tuple[str, ...]) -> Any:
    def call(*tensors: torch.Tensor) -> torch.Tensor:
        given = dict(zip(names, tensors, strict=True))
        x = given.pop("x")
        if groups:
            return film_norm(x, groups, act=act, **given)
        given.pop("weight", None), given.pop("bias", None)
        scale, shift = given.pop("scale", None), given.pop("shift", None)
        return film(x, scale, shift, act=act, **given)

    return call


PARTS = (NAMES, ("x",), ("x", "weight", "scale"), ("x", "bias", "shift"), ("x", "scale"))


@pytest.mark.parametrize("act", (None, "silu"))
@pytest.mark.parametrize("names", PARTS, ids="-".join)
@pytest.mark.parametrize("groups", (2, 4, 0))
def test_gradients_and_second_derivatives(
    groups: int, names: tuple[str, ...], act: str | None
) -> None:
    if groups == 0:
        names = tuple(n for n in names if n not in ("weight", "bias"))
    inputs = _inputs(2, 4, 3)
    tensors = [inputs[n] for n in names]
    call = _call(groups, act, names)
    assert torch.autograd.gradcheck(call, tensors)
    assert torch.autograd.gradgradcheck(call, tensors)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_gradients_through_the_kernel_within_budget(dtype: torch.dtype) -> None:
    inputs = _inputs(2, 64, 6, 6, dtype=dtype)
    weights = _inputs(2, 64, 6, 6)["residual"].detach().to(dtype)
    leaves = list(inputs.values())
    got = torch.autograd.grad((_call(8, "silu", NAMES)(*leaves) * weights).sum(), leaves)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    formula = reference.film_norm(exact[0], 8, *exact[1:5], "silu", exact[5])
    expected = torch.autograd.grad((formula * weights.double()).sum(), exact)
    plain = reference.film_norm_backward(
        weights, *(t.detach() for t in leaves[:1]), 8, *(t.detach() for t in leaves[1:5]),
        "silu", 1e-5, True,
    )  # fmt: skip
    for name, g, p, e in zip(NAMES, got, (*plain, weights), expected, strict=True):
        assert p is not None, name
        assert g.dtype == dtype
        # float32 sums over 72 elements and the products before them
        assert_within_budget(g, p, e, 2.0)


def test_compiles_without_a_graph_break() -> None:
    def block(x: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return film_norm(x * 2, 4, weight, scale=scale, act="silu") + 1

    inputs = _inputs(2, 8, 5, 5, dtype=torch.float32)
    tensors = [inputs[n] for n in ("x", "scale", "weight")]
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    results = [f(*tensors) for f in (block, compiled)]
    assert_same_bits(results[1], results[0])
    gradients = [torch.autograd.grad(r.square().sum(), tensors) for r in results]
    for got, expected in zip(*gradients, strict=True):
        assert_same_bits(got, expected)


@pytest.mark.parametrize("fmt", (torch.contiguous_format, torch.channels_last), ids=str)
def test_operator_registration(fmt: torch.memory_format) -> None:
    inputs = _inputs(2, 8, 5, 5, dtype=torch.float32)
    x, residual = (inputs[k].detach().contiguous(memory_format=fmt) for k in ("x", "residual"))
    rest = [inputs[k] for k in ("weight", "bias", "scale", "shift")]
    arguments = (x.requires_grad_(), 4, *rest, "silu", residual, 1e-5, True)
    torch.library.opcheck(torch.ops.fastdiff.film_norm.default, arguments)


def test_meta_tensors_give_shape_dtype_and_order() -> None:
    x = torch.ones(2, 8, 3, 3, device="meta", dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last)
    y = film_norm(x, 4, act="silu")
    assert (y.is_meta, y.shape, y.dtype) == (True, x.shape, x.dtype)
    assert y.is_contiguous(memory_format=torch.channels_last)


def _chain(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return F.silu(F.group_norm(x, 4) * (1 + scale[..., None])).square().sum()


def _ours(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return film_norm(x, 4, scale=scale, act="silu").square().sum()


def _assert_gradients(got: Sequence[torch.Tensor], x: torch.Tensor, scale: torch.Tensor) -> None:
    found = []
    for dtype in (torch.float32, torch.float64):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, scale)]
        found.append(torch.autograd.grad(_chain(*leaves), leaves))
    for g, plain, exact in zip(got, *found, strict=True):
        assert_within_budget(g, plain, exact, ulps=1)  # the last rounding, both times


def test_functional_gradients() -> None:
    inputs = _inputs(2, 8, 5, dtype=torch.float32)
    x, scale = inputs["x"].detach(), inputs["scale"].detach()
    _assert_gradients(torch.func.grad(_ours, argnums=(0, 1))(x, scale), x, scale)


def test_vmap_is_one_call_after_the_other() -> None:
    draw = torch.Generator().manual_seed(8)
    x, scale = (torch.randn(s, generator=draw) for s in ((3, 2, 8, 5), (3, 2, 8)))
    expected = [film_norm(a, 4, scale=b, act="silu") for a, b in zip(x, scale, strict=True)]
    got = torch.vmap(lambda a, b: film_norm(a, 4, scale=b, act="silu"))(x, scale)
    assert_same_bits(got, torch.stack(expected))
    # along another axis, and with a modulation for all
    got = torch.vmap(lambda a: film_norm(a, 4, scale=scale[0]), in_dims=2)(x.movedim(0, 2))
    assert_same_bits(got, torch.stack([film_norm(a, 4, scale=scale[0]) for a in x]))
    got = torch.vmap(lambda b: film(x[0], b, None))(scale)
    assert_same_bits(got, torch.stack([film(x[0], b, None) for b in scale]))
    each = torch.vmap(torch.func.grad(_ours, argnums=(0, 1)))(x, scale)
    for i in range(3):
        _assert_gradients([g[i] for g in each], x[i], scale[i])


@pytest.mark.filterwarnings("ignore:`torch.jit.script")  # inside torch.func
def test_forward_mode_is_refused_aloud() -> None:
    x = randn([0, 1], (8, 5))
    with pytest.raises((NotImplementedError, RuntimeError), match="forward"):
        torch.func.jvp(lambda t: film_norm(t, 4), (x,), (x,))
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises((NotImplementedError, RuntimeError), match="forward"),
    ):
        film_norm(torch.autograd.forward_ad.make_dual(x, x), 4)


@needs_extension
def test_tensors_of_a_transform_do_not_reach_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have no memory of their own, whatever an exchange of tensors makes of them."""
    kernel, calls = _native.extension.film_norm, []

    def watched(*inputs: Any) -> Any:
        tensors = [t for t in inputs if isinstance(t, torch.Tensor)]
        assert not any(map(torch._C._functorch.is_functorch_wrapped_tensor, tensors))
        calls.append(len(tensors))
        return kernel(*inputs)

    monkeypatch.setattr(_native.extension, "film_norm", watched)
    x, scale = randn([0, 1, 2], (2, 8, 5)), randn([3, 4], (8,))

    def without_grad(t: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return film_norm(t, 4) + t

    torch.vmap(lambda t: film_norm(t, 4, scale=scale))(x)
    torch.func.grad(_ours)(x[0], scale)
    torch.func.grad(lambda t: without_grad(t).sum() + t.sum())(x[0])
    torch.func.vjp(without_grad, x[0])
    assert len(calls) == 6
