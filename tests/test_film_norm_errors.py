"""What `film_norm` and `film` refuse, and in which words."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from fastdiff import BackendError, use_backend
from fastdiff.ops import describe, film, film_norm

X = torch.ones(2, 6, 4, 4)
ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "x-type": ({"x": [1.0]}, TypeError,
               "x must be a float32, bfloat16, float16 or float64 tensor, got list"),
    "x-integer": ({"x": X.long()}, TypeError,
                  "x must be a float32, bfloat16, float16 or float64 tensor, got torch.int64"),
    "x-vector": ({"x": X[0, 0, 0]}, ValueError, "x must have shape (N, C, *S), got (4,)"),
    "groups-type": ({"num_groups": 2.0}, TypeError, "num_groups must be an int, got float"),
    "groups-bool": ({"num_groups": True}, TypeError, "num_groups must be an int, got bool"),
    "groups-0": ({"num_groups": 0}, ValueError, "num_groups must divide the 6 channels of x, got"),
    "groups-4": ({"num_groups": 4}, ValueError, "num_groups must divide the 6 channels of x, got"),
    "weight-shape": ({"weight": X[0, 0]}, ValueError, "weight must have shape (6,), got (4, 4)"),
    "bias-type": ({"bias": 1.0}, TypeError, "bias must be a floating-point tensor, got float"),
    "bias-device": ({"bias": torch.ones(6, device="meta")}, ValueError,
                    "bias must be on the device of x cpu, got meta"),
    "scale-shape": ({"scale": torch.ones(6)}, ValueError, "scale must have shape (2, 6), got (6,)"),
    "shift-integer": ({"shift": torch.ones(2, 6).int()}, TypeError,
                      "shift must be a floating-point tensor, got torch.int32"),
    "act": ({"act": "relu"}, ValueError, "act must be one of None, 'silu', got 'relu'"),
    "residual-shape": ({"residual": X[:, :, :2]}, ValueError,
                       "residual must have shape (2, 6, 4, 4), got (2, 6, 2, 4)"),
    "residual-dtype": ({"residual": X.half()}, TypeError,
                       "residual must have the dtype of x torch.float32, got torch.float16"),
    "eps-type": ({"eps": "1"}, TypeError, "eps must be a number, got str"),
    "eps-negative": ({"eps": -1e-5}, ValueError, "eps must be finite and not negative, got -1e-05"),
    "eps-nan": ({"eps": float("nan")}, ValueError, "eps must be finite and not negative, got nan"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize("backend", ("auto", "reference"))
def test_refusals(
    change: dict[str, Any], error: type[Exception], message: str, backend: str
) -> None:
    arguments: dict[str, Any] = {"x": X, "num_groups": 2, **change}
    with use_backend(backend), pytest.raises(error, match=re.escape(f"film_norm: {message}")):
        film_norm(**arguments)


def test_film_names_itself() -> None:
    with pytest.raises(ValueError, match=re.escape("film: scale must have shape (2, 6), got (6,)")):
        film(X, torch.ones(6), None)


def test_a_forced_backend_never_falls_back() -> None:
    with use_backend("cpu"), pytest.raises(BackendError, match=r"film_norm: backend cpu refused"):
        film_norm(X.double(), 2)
    with use_backend("cuda"), pytest.raises(BackendError, match="film_norm: backend cuda refused"):
        film_norm(X, 2)


def test_every_backend_gives_its_answer() -> None:
    answers = describe("film_norm", X, 2)
    assert set(answers) == {"cpu", "triton", "cuda", "reference"}
    assert "chosen" in answers.values()
