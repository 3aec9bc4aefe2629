"""What reparameterize refuses, in which words, and that a failed call changes nothing."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import fastdiff
from fastdiff.backends import BackendError, unavailable
from fastdiff.ops import describe, randn, reparameterize

MU = randn([1, 2], (3,))

TYPES: list[tuple[str, dict[str, Any], str]] = [
    ("mu is no tensor", {"mu": 1.5}, "mu must be a tensor, got float"),
    ("logvar is no tensor", {"logvar": [0.0]}, "logvar must be a tensor, got list"),
    (
        "integers",
        {"mu": torch.zeros(2, 3, dtype=torch.int64)},
        "mu must be float32, bfloat16, float16 or float64, got torch.int64",
    ),
    (
        "two dtypes",
        {"logvar": MU.double()},
        "logvar must have the dtype of mu torch.float32, got torch.float64",
    ),
    ("fractional seed", {"seeds": 1.5}, "seeds must be integers, got float"),
    ("seed tensor of 32 bits", {"seeds": torch.zeros(2, dtype=torch.int32)}, "seeds must be a 1-D"),
    ("fractional step", {"step": 1.0}, "step must be an integer, got float"),
    ("boolean stream", {"stream": True}, "stream must be an integer, got bool"),
]
VALUES: list[tuple[str, dict[str, Any], str]] = [
    ("shapes", {"logvar": MU[:, :2]}, "logvar must have the shape of mu (2, 3), got (2, 2)"),
    ("scalar", {"mu": MU[0, 0], "logvar": MU[0, 0]}, "mu must have a batch axis, got a tensor of"),
    ("device", {"logvar": MU.to("meta")}, "logvar must be on the device of mu cpu, got meta"),
    ("negative seed", {"seeds": -1}, "seeds must lie in [0, 2**64), got -1"),
    ("seed count", {"seeds": [1, 2, 3]}, "seeds must have one entry a sample (2), got 3"),
    ("last seed too large", {"seeds": 2**64 - 1}, f"seeds must lie in [0, 2**64), got {2**64}"),
    ("negative step", {"step": -1}, "step must lie in [0, 2**32), got -1"),
    ("large stream", {"stream": 2**32}, f"stream must lie in [0, 2**32), got {2**32}"),
]


@pytest.mark.parametrize(
    ("error", "change", "message"),
    [(TypeError, c, m) for _, c, m in TYPES] + [(ValueError, c, m) for _, c, m in VALUES],
    ids=[name for name, _, _ in (*TYPES, *VALUES)],
)
def test_refusals(error: type[Exception], change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"mu": MU.clone(), "logvar": MU.clone(), "seeds": 0, **change}
    positional = [arguments.pop(name) for name in ("mu", "logvar", "seeds")]
    before = [t.clone() for t in positional[:2] if isinstance(t, torch.Tensor) and not t.is_meta]
    with pytest.raises(error, match=re.escape(f"reparameterize: {message}")):
        reparameterize(*positional, **arguments)
    after = [t for t in positional[:2] if isinstance(t, torch.Tensor) and not t.is_meta]
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b)


def test_float64_is_for_the_reference_alone() -> None:
    mu = MU.double()
    z, kl = reparameterize(mu, mu, 0)
    assert z.dtype == kl.dtype == torch.float64
    with (
        fastdiff.use_backend("cpu"),
        pytest.raises(BackendError, match=r"backend cpu refused: dtype must be float32, bfloat16"),
    ):
        reparameterize(mu, mu, 0)


@pytest.mark.parametrize("name", ("triton", "cuda"))
def test_a_forced_gpu_backend_refuses_with_its_reason(name: str) -> None:
    if unavailable(name) is None:
        pytest.skip(f"{name} runs here")
    with (
        fastdiff.use_backend(name),
        pytest.raises(BackendError, match=f"backend {name} refused: .+"),
    ):
        reparameterize(MU, MU, 0)


def test_describe_names_the_choice() -> None:
    answers = describe("reparameterize", MU, MU, 0)
    assert answers["cpu"] == "chosen" and answers["reference"] == "able"
    assert describe("reparameterize", MU.double(), MU.double(), 0)["reference"] == "chosen"
