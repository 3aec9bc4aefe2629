"""`film_conv2d`: the passes around the vendor's convolution."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bits import assert_same_bits
from budget import assert_within_budget

from fastdiff import use_backend
from fastdiff.ops import film_conv2d
from fastdiff.reference import film_conv2d as reference

NORM = ("num_groups", "norm_weight", "norm_bias")
PARTS = {
    "all": (),
    "convolution": (*NORM, "scale", "shift", "act", "residual", "gate", "bias"),
    "no-norm": NORM,
    "no-film": ("scale", "shift"),
    "no-residual": ("residual",),
    "no-gate": ("gate",),
    "norm": ("scale", "shift", "residual", "gate"),
    "act": (*NORM, "scale", "shift", "residual", "gate"),
}


def _arguments(
    without: tuple[str, ...] = (),
    dtype: torch.dtype = torch.float64,
    fmt: torch.memory_format = torch.contiguous_format,
    channels: int = 32,
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        t = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        return t.contiguous(memory_format=fmt) if len(shape) == 4 else t

    c, d = channels, channels + 8
    given = {
        "x": normal(2, c, 7, 9), "weight": normal(d, c, 3, 3) / (3 * c**0.5), "bias": normal(d),
        "num_groups": 4, "norm_weight": normal(c), "norm_bias": normal(c), "scale": normal(2, c),
        "shift": normal(2, c), "act": "silu", "residual": normal(2, d, 7, 9), "gate": normal(2, d),
        "padding": 1,
    }  # fmt: skip
    return {k: v for k, v in given.items() if k not in without}


def _to(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}


@pytest.mark.parametrize("backend", ("auto", "reference"))
@pytest.mark.parametrize("fmt", (torch.contiguous_format, torch.channels_last), ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("without", PARTS.values(), ids=PARTS)
def test_within_budget(
    without: tuple[str, ...], dtype: torch.dtype, fmt: torch.memory_format, backend: str
) -> None:
    arguments = _arguments(without, dtype, fmt)
    residual = arguments["residual"].clone() if "residual" in arguments else None
    with use_backend(backend), torch.no_grad():
        got = film_conv2d(**arguments)
    exact = reference.film_conv2d(**_to(arguments, torch.float64))
    # the vendor sums 288 products in an order of its own
    assert_within_budget(got, reference.film_conv2d(**arguments), exact, 4.0)
    assert got.is_contiguous(memory_format=fmt)
    if residual is not None:
        assert_same_bits(arguments["residual"], residual, "residual")


def test_reference_is_the_chain_of_torchs_own() -> None:
    def chain(a: dict[str, Any]) -> torch.Tensor:
        wide = (..., None, None)
        h = F.group_norm(a["x"], 4, a["norm_weight"], a["norm_bias"])
        h = F.silu(h * (1 + a["scale"][wide]) + a["shift"][wide])
        return a["residual"] + a["gate"][wide] * F.conv2d(h, a["weight"], a["bias"], padding=1)

    a, exact = _arguments((), torch.float32), _to(_arguments((), torch.float32), torch.float64)
    assert_within_budget(reference.film_conv2d(**a), chain(a), chain(exact), 4.0)


GEOMETRY = ({"stride": 2, "padding": 1}, {"padding": "same"}, {"dilation": 2}, {"groups": 4})


@pytest.mark.parametrize(
    "how",
    ({"stride": 2, "padding": 1}, {"padding": "same"}, {"dilation": 2}, {"groups": 4}),
    ids=str,
)
def test_geometry_is_the_convolutions(how: dict[str, Any]) -> None:
    a = _arguments(("residual", "gate", "padding"), torch.float32)
    if "groups" in how:
        a["weight"] = a["weight"][:, :8].contiguous()
    got = film_conv2d(**a, **how)
    exact = reference.film_conv2d(**_to(a, torch.float64), **how)
    assert_within_budget(got, reference.film_conv2d(**a, **how), exact, 4.0)


@pytest.mark.parametrize("without", (PARTS["all"], PARTS["no-gate"], PARTS["no-norm"]), ids=str)
def test_gradients(without: tuple[str, ...]) -> None:
    a = _arguments(without, channels=4)
    a["x"], a["weight"] = a["x"][..., :2, :2], a["weight"][..., 1:2, 1:2]
    a["padding"] = 0
    if "residual" in a:
        a["residual"] = a["residual"][..., :2, :2]
    names = [k for k, v in a.items() if isinstance(v, torch.Tensor)]
    rest = {k: v for k, v in a.items() if k not in names}
    leaves = [a[k].contiguous().requires_grad_() for k in names]

    def call(*tensors: torch.Tensor) -> torch.Tensor:
        return film_conv2d(**dict(zip(names, tensors, strict=True)), **rest)

    assert torch.autograd.gradcheck(call, leaves)


def test_compiles_without_a_graph_break() -> None:
    a = _arguments((), torch.float32)
    rest = {k: v for k, v in a.items() if not isinstance(v, torch.Tensor)}
    tensors = {k: v for k, v in a.items() if isinstance(v, torch.Tensor)}

    def block(**given: torch.Tensor) -> torch.Tensor:
        return film_conv2d(**given, **rest)

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_same_bits(compiled(**tensors), block(**tensors))


def test_autocast_runs_the_convolution_in_its_own_dtype() -> None:
    a = _arguments(("gate",), torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got = film_conv2d(**a)
    low = {k: v.bfloat16() if isinstance(v, torch.Tensor) else v for k, v in a.items()}
    exact = reference.film_conv2d(**_to(a, torch.float64))
    assert_within_budget(got, reference.film_conv2d(**low), exact, 4.0)


ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "x-type": ({"x": 1.0}, TypeError, "film_conv2d: x must be a tensor, got float"),
    "x-axes": ({"x": torch.ones(2, 32, 7)}, ValueError, "film_conv2d: x must have 4 axes, got (2"),
    "weight-type": ({"weight": None}, TypeError, "film_conv2d: weight must be a tensor, got None"),
    "weight-dtype": ({"weight": torch.ones(40, 32, 3, 3).half()}, TypeError,
                     "film_conv2d: weight must have the dtype of x torch.float32, got"),
    "groups": ({"num_groups": 5}, ValueError, "film_norm: num_groups must divide the 32 channels"),
    "norm-alone": ({"num_groups": None}, ValueError,
                   "film_conv2d: norm_weight must come with num_groups"),
    "gate-shape": ({"gate": torch.ones(2, 32)}, ValueError,
                   "film_conv2d: gate must have shape (2, 40), got (2, 32)"),
    "residual-shape": ({"residual": torch.ones(2, 40, 7, 8)}, ValueError,
                       "film_conv2d: residual must have shape (2, 40, 7, 9), got (2, 40, 7, 8)"),
    "residual-dtype": ({"residual": torch.ones(2, 40, 7, 9).half()}, TypeError,
                       "film_conv2d: residual must have the dtype of x torch.float32, got"),
    "act": ({"act": "gelu"}, ValueError, "film_norm: act must be one of None, 'silu', got 'gelu'"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_refusals(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        film_conv2d(**{**_arguments((), torch.float32), **change})
