"""Gradients of `modulate`, and the dispatcher, the compiler and the transforms around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from budget import assert_within_budget
from tables import needs_extension

import fastdiff
from fastdiff.ops import gated_residual, modulate, randn

pytestmark = needs_extension
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("x", "scale", "shift", "weight", "bias", "residual", "gate")


def leaves(
    dtype: torch.dtype, *, each: bool = False, tokens: int = 4, without: tuple[str, ...] = ()
) -> dict[str, torch.Tensor]:
    n, channels = 2, 6
    film = (n, tokens, channels) if each else (n, channels)
    shapes = {"x": (n, tokens, channels), "residual": (n, tokens, channels), "scale": film,
              "shift": film, "gate": film, "weight": (channels,), "bias": (channels,)}  # fmt: skip
    return {
        name: randn([NAMES.index(name)], shapes[name])[0].to(dtype).requires_grad_()
        for name in NAMES
        if name not in without
    }


def plain(t: dict[str, torch.Tensor], norm: str | None = "layer") -> tuple[torch.Tensor, ...]:
    """The formula by operations that autograd knows, in the dtype of the arguments."""

    def spread(name: str) -> torch.Tensor:
        return t[name] if t[name].dim() == 3 else t[name][:, None]

    total = t["x"]
    if "residual" in t:
        total = total + (spread("gate") if "gate" in t else 1) * t["residual"]
    y = total
    if norm == "layer":
        y = y - y.mean(-1, keepdim=True)
    if norm is not None:
        y = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        y = y * t.get("weight", 1) + t.get("bias", 0)
    y = y * (1 + (spread("scale") if "scale" in t else 0))
    y = y + (spread("shift") if "shift" in t else 0)
    return (y, total) if "residual" in t else (y,)


def ours(t: dict[str, torch.Tensor], norm: str | None = "layer") -> tuple[torch.Tensor, ...]:
    found = modulate(**t, norm=norm)
    return found if isinstance(found, tuple) else (found,)


def gradients(
    run: Callable[..., tuple[torch.Tensor, ...]],
    t: dict[str, torch.Tensor],
    norm: str | None,
    rounded: torch.dtype,
) -> tuple[torch.Tensor, ...]:
    results = run(t, norm)
    weights = [randn([30 + i], r.shape)[0].to(rounded).to(r.dtype) for i, r in enumerate(results)]
    return torch.autograd.grad(results, list(t.values()), weights)


# with a branch of the backward pass each
CASES: dict[str, tuple[str | None, tuple[str, ...], bool]] = {
    "layer": ("layer", (), False),
    "rms": ("rms", (), False),
    "no norm": (None, ("weight", "bias"), False),
    "by token": ("layer", (), True),
    "no residual": ("layer", ("residual", "gate"), False),
    "no gate": ("layer", ("gate",), False),
    "no scale": ("rms", ("scale",), False),
    "no affine": ("layer", ("weight", "bias"), True),
}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("norm", "without", "each"), CASES.values(), ids=CASES)
def test_gradients_against_autograd_through_the_formula(
    norm: str | None, without: tuple[str, ...], each: bool, dtype: torch.dtype
) -> None:
    t = leaves(dtype, each=each, without=without)
    with fastdiff.use_backend("cpu"):
        got = gradients(ours, t, norm, dtype)
    wide = {k: v.detach().float().requires_grad_() for k, v in t.items()}
    rounded = [g.to(dtype) for g in gradients(plain, wide, norm, dtype)]
    double = {k: v.detach().double().requires_grad_() for k, v in t.items()}
    exact = gradients(plain, double, norm, dtype)
    for name, g, r, e in zip(t, got, rounded, exact, strict=True):
        assert g.dtype == dtype and g.shape == t[name].shape, name
        assert_within_budget(g, r, e, ulps=1)  # the last rounding


@pytest.mark.parametrize(("norm", "without", "each"), CASES.values(), ids=CASES)
def test_gradcheck_and_second_derivatives(
    norm: str | None, without: tuple[str, ...], each: bool
) -> None:
    t = leaves(torch.float64, each=each, tokens=2, without=without)

    def run(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return ours(dict(zip(t, values, strict=True)), norm)

    assert torch.autograd.gradcheck(run, tuple(t.values()))
    assert torch.autograd.gradgradcheck(run, tuple(t.values()))


def test_gradients_of_the_gated_residual() -> None:
    t = leaves(torch.float64, without=("scale", "shift", "weight", "bias"))
    assert torch.autograd.gradcheck(gated_residual, tuple(t.values()))
    assert torch.autograd.gradgradcheck(gated_residual, tuple(t.values()))
    x, residual, _ = t.values()
    assert torch.autograd.gradcheck(gated_residual, (x, residual))


@pytest.mark.parametrize("used", (0, 1))
def test_one_of_the_two_results_may_go_unused(used: int) -> None:
    def each(run: Callable[..., Any], dtype: torch.dtype) -> list[torch.Tensor]:
        t = {k: v.detach().to(dtype).requires_grad_() for k, v in leaves(torch.float32).items()}
        got = torch.autograd.grad(run(t)[used].sum(), list(t.values()), allow_unused=True)
        zeros = map(torch.zeros_like, t.values())
        return [z if g is None else g for g, z in zip(got, zeros, strict=True)]

    runs = ((ours, torch.float32), (plain, torch.float32), (plain, torch.float64))
    for g, p, e in zip(*(each(*run) for run in runs), strict=True):
        assert_within_budget(g, p, e, ulps=1)  # the last rounding


def test_only_the_wanted_gradients_arrive() -> None:
    t = {k: v.detach() for k, v in leaves(torch.float32).items()}
    t["gate"].requires_grad_()
    out, total = modulate(**t)
    (out.sum() + total.sum()).backward()
    assert t["gate"].grad is not None
    assert all(v.grad is None for k, v in t.items() if k != "gate")
    with torch.no_grad():
        assert not modulate(**t)[0].requires_grad


def test_only_inputs_are_saved() -> None:
    t = leaves(torch.float32)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda s: saved.append(s) or s, lambda s: s):
        modulate(**t)
    assert {s.data_ptr() for s in saved} == {s.data_ptr() for s in t.values()}
    assert len(saved) == len(t)


@pytest.mark.filterwarnings("ignore:`torch.jit.script")  # inside torch.func
def test_transforms_work_and_forward_mode_is_refused_aloud() -> None:
    t = leaves(torch.float32)
    x = t["x"].detach()
    rest = {k: v.detach() for k, v in t.items() if k != "x"}

    def loss(v: torch.Tensor) -> torch.Tensor:
        out, total = modulate(v, **rest)
        return out.square().sum() + total.sum()

    wanted = x.clone().requires_grad_()
    loss(wanted).backward()
    assert wanted.grad is not None
    assert_same_bits(torch.func.grad(loss)(x), wanted.grad)
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises((NotImplementedError, RuntimeError), match="forward"),
    ):
        modulate(torch.autograd.forward_ad.make_dual(x, x), **rest)


def test_vmap_is_one_call_after_the_other() -> None:
    t = {k: torch.stack([v.detach(), 2 * v.detach()]) for k, v in leaves(torch.float32).items()}
    got = torch.vmap(lambda t: modulate(**t))(t)
    each = [modulate(**{k: v[i] for k, v in t.items()}) for i in range(2)]
    for g, *alone in zip(got, *each, strict=True):
        assert_same_bits(g, torch.stack(alone))
    one = torch.vmap(gated_residual, in_dims=(0, 0, None))(t["x"], t["residual"], t["gate"][0])
    for i in range(2):
        assert_same_bits(one[i], gated_residual(t["x"][i], t["residual"][i], t["gate"][0]))


# --- the dispatcher -------------------------------------------------------------------------

ORDER = ("x", "scale", "shift", "norm", "weight", "bias", "residual", "gate", "eps", "modulated")


def raw(t: dict[str, torch.Tensor], norm: str | None = "layer", modulated: bool = True) -> tuple:
    given: dict[str, Any] = {**t, "norm": norm, "eps": 1e-6, "modulated": modulated}
    return tuple(given.get(name) for name in ORDER)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
@pytest.mark.parametrize(("norm", "without", "each"), CASES.values(), ids=CASES)
def test_opcheck(
    norm: str | None, without: tuple[str, ...], each: bool, dtype: torch.dtype
) -> None:
    t = leaves(dtype, each=each, without=without)
    torch.library.opcheck(torch.ops.fastdiff.modulate.default, raw(t, norm))
    if "residual" in t:
        torch.library.opcheck(torch.ops.fastdiff.modulate.default, raw(t, norm, False))


def test_direct_call_and_dispatched_op_give_the_same_bits() -> None:
    t = {k: v.detach() for k, v in leaves(torch.float32).items()}
    for got, want in zip(torch.ops.fastdiff.modulate(*raw(t)), modulate(**t), strict=True):
        assert_same_bits(got, want)
    for name in ("scale", "weight"):
        t[name].requires_grad_()  # another way through Python, the same kernel
    for got, want in zip(torch.ops.fastdiff.modulate(*raw(t)), modulate(**t), strict=True):
        assert_same_bits(got, want)


def test_small_calls_do_not_reach_the_checks_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    t = {k: v.detach() for k, v in leaves(torch.float32).items()}
    want = modulate(**t)
    module = __import__("sys").modules["fastdiff.ops.modulate"]

    def fail(*_: Any) -> None:
        raise AssertionError("checked in Python")

    monkeypatch.setattr(module, "check", fail)
    for got, expected in zip(modulate(**t), want, strict=True):
        assert_same_bits(got, expected)
    with (
        pytest.raises(AssertionError, match="checked in Python"),
        fastdiff.use_backend("reference"),
    ):
        modulate(**t)


@pytest.mark.parametrize("backend", ("eager", "aot_eager"))
def test_compiles_without_a_graph_break(backend: str) -> None:
    torch._dynamo.reset()
    t = leaves(torch.float32)

    def f(values: dict[str, torch.Tensor]) -> torch.Tensor:
        out, total = modulate(**{**values, "x": 2 * values["x"]})
        one = modulate(total, values["scale"], norm="rms")
        return (out * out).sum() + gated_residual(one, total, values["gate"]).sin().sum()

    want = torch.autograd.grad(f(t), list(t.values()))
    got = torch.autograd.grad(
        torch.compile(f, fullgraph=True, backend=backend)(t), list(t.values())
    )
    for g, w in zip(got, want, strict=True):
        assert_same_bits(g, w)
    torch._dynamo.reset()


def test_fake_tensors_and_meta_have_the_shapes() -> None:
    t = {k: v.detach().to("meta").bfloat16() for k, v in leaves(torch.float32).items()}
    for got in modulate(**t):
        assert got.is_meta and got.shape == t["x"].shape and got.dtype == torch.bfloat16
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(2, 5, 4).transpose(1, 2)
        assert modulate(x).is_contiguous() and modulate(x).shape == (2, 4, 5)
