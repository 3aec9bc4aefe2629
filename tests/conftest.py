"""Fixtures that every test file shares; helpers to import live in budget.py, bits.py, tables.py."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import fastdiff
from fastdiff.integrations import _chains, _transformer
from fastdiff.ops import _native

# transformers looks for a package of that name, and the root of a checkout has such a folder
sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]

# instruction sets of this machine, best first; none where the extension is missing
ISAS: list[str] = _native.extension.isas() if _native.extension is not None else []


@pytest.fixture(
    params=ISAS or [pytest.param("none", marks=pytest.mark.skip(reason=str(_native.missing)))]
)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set in turn; the one in force before comes back afterwards."""
    before = _native.extension.isa()
    _native.extension.set_isa(request.param)
    yield request.param
    _native.extension.set_isa(before)


@pytest.fixture(autouse=True)
def same_threads_after() -> Iterator[None]:
    """A test that sets the number of threads must not slow down or break the next one."""
    before = torch.get_num_threads()
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)


@pytest.fixture
def film_norms(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """The activation of every call of the fused op."""
    calls: list[str | None] = []

    def counting(*args: Any, **kw: Any) -> torch.Tensor:
        calls.append(args[6])
        return fastdiff.ops.film_norm(*args, **kw)

    monkeypatch.setattr(_chains, "film_norm", counting)
    return calls


@pytest.fixture
def modulations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The name of every call of the fused ops of transformers."""
    calls: list[str] = []

    def counting(name: str) -> Any:
        def call(*args: Any, **kw: Any) -> Any:
            calls.append(name)
            return getattr(fastdiff.ops, name)(*args, **kw)

        return call

    for name in ("modulate", "gated_residual"):
        monkeypatch.setattr(_transformer, name, counting(name))
    return calls
