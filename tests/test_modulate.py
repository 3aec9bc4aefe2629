"""Norm, modulation and gated residual of tokens: values, memory, independence, special values."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bits import assert_same_bits
from budget import assert_within_budget
from tables import Guard, needs_extension

import fastdiff
from fastdiff.ops import gated_residual, modulate, randn
from fastdiff.ops._modulate_checks import Modulate
from fastdiff.reference import modulate as reference

pytestmark = needs_extension
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# one channel, a part of a vector, around four vectors, several tokens in scratch (64, 1152), one
# (3001), and a token that is longer than the scratch (4096)
CHANNELS = (1, 3, 15, 16, 17, 63, 64, 65, 1152, 3001, 4097)
NORMS = ("layer", "rms", None)
Tensors = dict[str, Any]


def inputs(
    n: int, tokens: int, channels: int, dtype: torch.dtype = torch.float32, *, each: bool = False
) -> Tensors:
    """Every tensor of a call; scale, shift and gate as chunks of a wider one, as a DiT has them."""
    x, residual = randn([1, 2], (n, tokens, channels)).to(dtype)
    rows = (n, tokens) if each else (n,)
    film = (0.5 * randn([3], (*rows, 4 * channels))[0]).to(dtype)
    scale, shift, gate, _ = film.chunk(4, dim=-1)
    weight, bias = randn([4, 5], (channels,))
    return {"x": x, "residual": residual, "scale": scale, "shift": shift, "gate": gate,
            "weight": weight, "bias": bias}  # fmt: skip


def exact(t: Tensors, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition in float64."""
    return chain({k: None if v is None else v.double() for k, v in t.items()}, **options)


def chain(f: Tensors, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, spelled out with torch's own norms where it has them."""
    x = f["x"]

    def spread(s: torch.Tensor | None) -> Any:
        return 0.0 if s is None else s if s.dim() == x.dim() else s[:, None]

    total = x
    if f.get("residual") is not None:
        gate = f.get("gate")
        total = x + (1.0 if gate is None else spread(gate)) * f["residual"]
    norm, eps = options.get("norm", "layer"), options.get("eps", 1e-6)
    y, width = total, x.shape[-1:]
    if norm == "layer":
        y = F.layer_norm(total, width, f.get("weight"), f.get("bias"), eps)
    elif norm == "rms":
        y = F.rms_norm(total, width, f.get("weight"), eps)
        y = y if f.get("bias") is None else y + f["bias"]
    return y * (1 + spread(f.get("scale"))) + spread(f.get("shift")), total


def results(t: Tensors, **options: Any) -> tuple[torch.Tensor, ...]:
    found = modulate(**t, **options)
    return found if isinstance(found, tuple) else (found,)


def assert_right(t: Tensors, **options: Any) -> None:
    with fastdiff.use_backend("cpu"):
        got = results(t, **options)
    # not by its backend: what goes wrong on the way there would widen the budget
    plain = reference.modulate(**t, **options)
    assert len(got) == (1 if t.get("residual") is None else 2)
    for g, p, e in zip(got, plain, exact(t, **options), strict=False):
        assert g.dtype == t["x"].dtype and g.is_contiguous()
        # 0.5: the last rounding. 1: weight and bias meet the scale before they meet x, where the
        # two may cancel; the reference rounds as often
        assert_within_budget(g, p, e, ulps=1.5)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("channels", CHANNELS)
def test_within_the_budget_of_the_reference(isa: str, channels: int, dtype: torch.dtype) -> None:
    for norm in NORMS:
        t = inputs(2, 5, channels, dtype)
        if norm is None:
            t["weight"] = t["bias"] = None
        assert_right(t, norm=norm)
        assert_right({**t, "residual": None, "gate": None}, norm=norm)


# every part alone and left out, since a kernel has a branch for each
@pytest.mark.parametrize("part", ("scale", "shift", "gate", "weight", "bias", "residual"))
@pytest.mark.parametrize("norm", ("layer", "rms"))
def test_every_part_is_optional(isa: str, norm: str, part: str) -> None:
    t = inputs(3, 4, 70)
    without = {**t, part: None}
    if part == "residual":
        without["gate"] = None
    assert_right(without, norm=norm)
    alone = {"x": t["x"], part: t[part]}
    if part == "gate":
        alone["residual"] = t["residual"]
    assert_right(alone, norm=norm)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("channels", (5, 1024, 5000))
def test_modulation_of_every_token(isa: str, channels: int, dtype: torch.dtype) -> None:
    t = inputs(2, 3, channels, dtype, each=True)
    assert_right(t)
    # some by sample, some by token, in one call
    assert_right({**t, "gate": t["gate"][:, 0]})
    assert_right({**t, "scale": t["scale"][:, 1], "shift": t["shift"][:, 1]})


def test_tokens_without_a_token_axis(isa: str) -> None:
    t = inputs(5, 1, 33)
    flat = {**t, "x": t["x"][:, 0], "residual": t["residual"][:, 0]}
    for got, expected in zip(results(flat), results(t), strict=True):
        assert_same_bits(got, expected[:, 0])
    assert_right(flat)


@pytest.mark.parametrize("norm", ("layer", "rms"))
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_mean_far_above_the_deviation(isa: str, dtype: torch.dtype, norm: str) -> None:
    x = randn([1], (2, 3, 1152)) + 1000.0
    assert_right({"x": x[0].to(dtype)[:1]}, norm=norm)
    x = torch.cat([x[0], 3e4 + x[0], 1e6 * x[0]])
    got = modulate(x)
    # the mean is off by an ulp or so of itself, and still the variance has its digits: an error of
    # 1 part in 2**20 here, where the reference in float32 loses all but three digits
    assert (got.double() - exact({"x": x})[0]).abs().max() < 2**-20


def test_constant_token_becomes_the_shift(isa: str) -> None:
    # 0.1 has no exact mean: what is left over is divided by sqrt(eps) = 1e-3
    x = torch.full((1, 2, 1152), 0.1)
    shift = randn([3], (1, 1152))[0]
    assert_same_bits(modulate(x, None, shift), shift[:, None].expand_as(x).contiguous())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_writes_nothing_outside_and_reads_misaligned_views(isa: str, dtype: torch.dtype) -> None:
    from fastdiff.ops.modulate import OP

    kernel = OP.backends["cpu"].load()
    for channels in (1, 17, 257, 1025):
        shape = (2, 3, channels)
        t = inputs(*shape, dtype)
        odd = {name: Guard(tuple(v.shape), dtype=v.dtype) for name, v in t.items()}
        for name, guard in odd.items():
            guard.tensor.copy_(t[name])
        out, total = Guard(shape, dtype=dtype), Guard(shape, dtype=dtype)
        given = {name: guard.tensor for name, guard in odd.items()}
        kernel(Modulate(**given, norm="layer", eps=1e-6, out=out.tensor, total=total.tensor))
        expected = results(t)
        assert_same_bits(out.tensor, expected[0], "out")
        assert_same_bits(total.tensor, expected[1], "total")
        for name, guard in {**odd, "out": out, "total": total}.items():
            guard.check(f"{name} of {channels} channels")
        for name, guard in odd.items():
            assert_same_bits(guard.tensor, t[name], f"{name} after the call")


def test_any_strides_give_the_bits_of_the_contiguous_copy() -> None:
    t = inputs(3, 4, 40)
    expected = results({k: v.contiguous() for k, v in t.items()})

    def strided(v: torch.Tensor) -> torch.Tensor:
        return torch.stack([v, v], -1)[..., 0]

    for change in (
        {},
        {"x": strided},
        {"residual": strided},
        {"scale": strided},
        {"bias": strided},
    ):
        changed = {k: change.get(k, lambda v: v)(v) for k, v in t.items()}
        assert change or not changed["scale"].is_contiguous()
        for got, want in zip(results(changed), expected, strict=True):
            assert_same_bits(got, want, str(list(change)))
    cut = {**t, "x": t["x"][:, 1:], "residual": t["residual"][:, 1:]}
    for got, want in zip(results(cut), expected, strict=True):
        assert_same_bits(got, want[:, 1:])
    # one modulation for all tokens, as an expanded tensor of every token
    wide = t["scale"][:, None].expand(3, 4, 40)
    assert_same_bits(results({**t, "scale": wide})[0], expected[0])


def test_parameters_are_read_in_place(isa: str) -> None:
    t = inputs(2, 3, 16)
    held = {k: torch.nn.Parameter(v.contiguous()) for k, v in t.items()}
    with torch.no_grad():
        for got, want in zip(results(held), results(t), strict=True):
            assert_same_bits(got, want)
            assert not got.requires_grad


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_parts_of_other_dtypes(isa: str, dtype: torch.dtype) -> None:
    t = inputs(2, 3, 33, torch.float32)
    t = {**t, "x": t["x"].to(dtype), "residual": t["residual"].to(dtype)}
    assert_right(t)  # a float32 modulation
    for other in FLOATS:
        assert_right({**t, "weight": t["weight"].to(other)})  # one of a pair
        assert_right({**t, "gate": t["gate"].to(other)})


def test_a_token_is_the_same_in_any_batch_and_for_any_number_of_threads(isa: str) -> None:
    # 80 tokens of 1,152 channels are worth two threads; groups of tokens start at other places
    t = inputs(8, 10, 1152)
    torch.set_num_threads(1)
    expected = results(t)
    torch.set_num_threads(2)
    for got, want in zip(results(t), expected, strict=True):
        assert_same_bits(got, want, "2 threads")
    for i in (0, 3, 7):
        part = {k: v if v.dim() == 1 else v[i : i + 1] for k, v in t.items()}
        for got, want in zip(results(part), expected, strict=True):
            assert_same_bits(got, want[i : i + 1], f"sample {i} alone")
        one = {**part, "x": part["x"][:, 2:5], "residual": part["residual"][:, 2:5]}
        for got, want in zip(results(one), expected, strict=True):
            assert_same_bits(got, want[i : i + 1, 2:5], f"tokens of sample {i} alone")


@pytest.mark.parametrize("channels", (7, 40, 5000))
@pytest.mark.parametrize("bad", (math.nan, math.inf), ids=("nan", "inf"))
def test_a_value_that_is_not_finite_stays_in_its_token(isa: str, bad: float, channels: int) -> None:
    t = inputs(2, 6, channels)
    expected = results(t)
    for where in (0, channels - 1):
        x = t["x"].clone()
        x[1, 2, where] = bad
        got = results({**t, "x": x})
        for g, want in zip(got, expected, strict=True):
            changed = g != want
            assert not changed[0].any() and not changed[1, [0, 1, 3, 4, 5]].any()
        assert got[0][1, 2].isnan().all()
        assert got[1][1, 2].isfinite().sum() == channels - 1


@pytest.mark.parametrize("shape", ((0, 4, 8), (3, 0, 8), (0, 8)), ids=str)
def test_empty_batches(shape: tuple[int, ...]) -> None:
    x = torch.empty(shape, requires_grad=True)
    film = torch.ones(shape[0], 8, requires_grad=True)
    out, total = modulate(x, film, residual=x, gate=film)
    assert out.shape == total.shape == shape
    (out.sum() + total.sum()).backward()
    assert film.grad is not None and not film.grad.any()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gated_residual_is_the_second_result(isa: str, dtype: torch.dtype) -> None:
    for channels in (1, 50, 1152, 5000):
        t = inputs(3, 5, channels, dtype)
        for gate in (t["gate"], None):
            both = {"x": t["x"], "residual": t["residual"], "gate": gate}
            got = gated_residual(**both)
            assert_same_bits(got, results(both)[1])
            with fastdiff.use_backend("reference"):
                plain = gated_residual(**both)
            # half an ulp: the last rounding
            assert_within_budget(got, plain, exact(both)[1], ulps=0.5)


def test_without_anything_to_do_it_is_a_copy(isa: str) -> None:
    x = inputs(2, 3, 50)["x"]
    got = modulate(x, norm=None)
    assert_same_bits(got, x)
    assert got.data_ptr() != x.data_ptr()


def test_float64_runs_on_the_reference() -> None:
    t = {k: v.double() for k, v in inputs(2, 3, 9).items()}
    for got, want in zip(results(t), reference.modulate(**t), strict=True):
        assert_same_bits(got, want)


def test_eps_is_inside_the_root() -> None:
    x = inputs(1, 1, 4)["x"] * 1e-3
    for norm in ("layer", "rms"):
        for eps in (0.0, 1e-6, 1, 1e3):
            assert_right({"x": x}, norm=norm, eps=eps)
            # by the checks in Python too, which a strided x needs
            assert_right({"x": torch.stack([x, x], -1)[..., 0]}, norm=norm, eps=eps)


def test_reference_is_the_norm_of_torch() -> None:
    """The reference itself against functions of torch."""
    t = inputs(2, 3, 20)
    for norm in NORMS:
        given = t if norm is not None else {**t, "weight": None, "bias": None}
        options = {"norm": norm, "eps": 1e-3}
        want = exact(given, **options)
        plain = chain(given, **options)
        double = {k: None if v is None else v.double() for k, v in given.items()}
        single, wide = (reference.modulate(**v, **options) for v in (given, double))
        for g, g64, p, w in zip(single, wide, plain, want, strict=True):
            assert_within_budget(g, p, w, ulps=1)  # the last rounding, both times
            # in float64 what is left must not show in float32
            assert_within_budget(g64.float(), w.float(), w, ulps=0.5)
