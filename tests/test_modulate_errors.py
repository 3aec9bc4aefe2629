"""What `modulate` and `gated_residual` refuse, in which words."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import fastdiff
from fastdiff.backends import BackendError, unavailable
from fastdiff.ops import describe, gated_residual, modulate, randn

X = randn([1, 2], (3, 4))
FILM = X[:, 0].contiguous()
INTEGERS = torch.zeros(2, 4, dtype=torch.int64)

TYPES: dict[str, tuple[dict[str, Any], str]] = {
    "x is no tensor": ({"x": 1.5}, "x must be a float32, bfloat16, float16 or float64 tensor, got"),
    "integers": ({"x": INTEGERS}, "x must be a float32, bfloat16, float16 or float64 tensor, got "
                 "torch.int64"),
    "scale is a number": ({"scale": 1.0}, "scale must be a floating-point tensor, got float"),
    "integer shift": ({"shift": INTEGERS}, "shift must be a floating-point tensor, got torch.int"),
    "weight is a list": ({"weight": [1.0]}, "weight must be a floating-point tensor, got list"),
    "two dtypes": ({"residual": X.double()}, "residual must have the dtype of x torch.float32, got "
                   "torch.float64"),
    "eps": ({"eps": "small"}, "eps must be a number, got str"),
    "boolean eps": ({"eps": True}, "eps must be a number, got bool"),
}  # fmt: skip
VALUES: dict[str, tuple[dict[str, Any], str]] = {
    "one axis": ({"x": X[0, 0]}, "x must have shape (N, L, C) or (N, C), got (4,)"),
    "four axes": ({"x": X[None]}, "x must have shape (N, L, C) or (N, C), got (1, 2, 3, 4)"),
    "no channels": ({"x": X[..., :0]}, "x must have at least one channel, got (2, 3, 0)"),
    "norm": ({"norm": "group"}, "norm must be one of None, 'layer', 'rms', got 'group'"),
    "eps below zero": ({"eps": -1e-6}, "eps must be finite and not negative, got -1e-06"),
    "infinite eps": ({"eps": float("inf")}, "eps must be finite and not negative, got inf"),
    "scale": ({"scale": FILM[:1]}, "scale must have shape (2, 4) or (2, 3, 4), got (1, 4)"),
    "shift": ({"shift": X[:, :2]}, "shift must have shape (2, 4) or (2, 3, 4), got (2, 2, 4)"),
    "gate": ({"gate": FILM.T, "residual": X}, "gate must have shape (2, 4) or (2, 3, 4), got"),
    "flat x": ({"x": FILM, "scale": X}, "scale must have shape (2, 4), got (2, 3, 4)"),
    "weight": ({"weight": FILM}, "weight must have shape (4,), got (2, 4)"),
    "bias": ({"bias": FILM[0, :3]}, "bias must have shape (4,), got (3,)"),
    "residual": ({"residual": FILM}, "residual must have shape (2, 3, 4), got (2, 4)"),
    "gate alone": ({"gate": FILM}, "gate must be None without a residual, got torch.float32"),
    "affine alone": ({"norm": None, "bias": FILM[0]}, "bias must be None without a norm, got "),
    "device": ({"scale": FILM.to("meta")}, "scale must be on the device of x cpu, got meta"),
}  # fmt: skip


@pytest.mark.parametrize("grad", (False, True), ids=("quick", "autograd"))
@pytest.mark.parametrize(
    ("error", "change", "message"),
    [(TypeError, *v) for v in TYPES.values()] + [(ValueError, *v) for v in VALUES.values()],
    ids=[*TYPES, *VALUES],
)
def test_refusals(error: type[Exception], change: dict[str, Any], message: str, grad: bool) -> None:
    given: dict[str, Any] = {"x": X.clone(), **change}
    if grad:
        given["weight"] = given.get("weight", torch.ones(4, requires_grad=True))
        if given.get("norm", "layer") is None:
            del given["weight"]
    with pytest.raises(error, match="^" + re.escape(f"modulate: {message}")):
        modulate(**given)


def test_the_gated_residual_names_itself() -> None:
    with pytest.raises(TypeError, match=r"^gated_residual: residual must be a floating-point"):
        gated_residual(X, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^gated_residual: gate must have shape \(2, 4\) or"):
        gated_residual(X, X, X[0])


def test_float64_is_for_the_reference_alone() -> None:
    for given in ({"x": X.double()}, {"x": X, "scale": FILM.double()}):
        modulate(**given)
        with (
            fastdiff.use_backend("cpu"),
            pytest.raises(BackendError, match="cpu refused: tensors must be float32, bfloat16 or"),
        ):
            modulate(**given)


@pytest.mark.parametrize("name", ("triton", "cuda"))
def test_a_forced_gpu_backend_refuses_with_its_reason(name: str) -> None:
    if unavailable(name) is None:
        pytest.skip(f"{name} runs here")
    with fastdiff.use_backend(name), pytest.raises(BackendError, match=f"{name} refused: .+"):
        modulate(X)


def test_describe_names_the_choice() -> None:
    answers = describe("modulate", X, FILM, residual=X)
    assert answers["cpu"] == "chosen" and answers["reference"] == "able"
    assert describe("modulate", X.double())["reference"] == "chosen"
