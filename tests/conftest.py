"""Fixtures that every test file shares; helpers to import live in budget.py, bits.py, tables.py."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # before torch reads it; workers share the cores
    workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

# a shell starts what it leaves in the background deaf to Ctrl-C, and so would be the processes that
# the tests interrupt
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import torch

import fastdiff
from fastdiff import checkpoints, schedules
from fastdiff.integrations import _chains, _torch_noise, _transformer
from fastdiff.models.unet import UNet, UNetConfig
from fastdiff.ops import _native

# transformers looks for a package of that name, and the root of a checkout has such a folder
sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]

# instruction sets of this machine, best first; none where the extension is missing
ISAS: list[str] = _native.extension.isas() if _native.extension is not None else []


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """What `-n auto` takes: a worker loads torch and diffusers, 1.5 GB."""
    return min(4, os.cpu_count() or 1)


@pytest.fixture(
    params=ISAS or [pytest.param("none", marks=pytest.mark.skip(reason=str(_native.missing)))]
)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set in turn; the one in force before comes back afterwards."""
    before = _native.extension.isa()
    _native.extension.set_isa(request.param)
    yield request.param
    _native.extension.set_isa(before)


@pytest.fixture(params=[i for i in ISAS if i != "portable"])
def vector_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The instruction sets that have the kernel, where torch has its own vector path."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("torch draws from the standard library's functions on this machine")
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


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A small untrained checkpoint on disk."""
    torch.manual_seed(0)
    config = UNetConfig(image_size=16, channels=(8, 8), num_classes=3, embed_dim=16, head_dim=8)
    card = {
        "prediction": "v_prediction",
        "classes": ["Coat", "Bag", "Boot"],
        "sampling": {"guidance": 1.5, "shape": [1, 16, 16]},
    }
    return checkpoints.save(tmp_path / "tiny", UNet(config), schedules.cosine(), card)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes that our kernel drew, in every size that it can."""
    sizes: list[int] = []
    draw = _torch_noise._draw

    def counting(x: torch.Tensor, generator: torch.Generator) -> bool:
        done = draw(x, generator)
        if done:
            sizes.append(x.numel())
        return done

    before = _native.extension.isa()
    for isa in ISAS:  # the checks of a process, which are not to be counted
        _native.extension.set_isa(isa)
        for dtype in _native.DTYPES:
            _torch_noise._agrees(dtype, isa)
    _native.extension.set_isa(before)
    monkeypatch.setattr(_torch_noise, "_draw", counting)
    monkeypatch.setattr(_torch_noise, "_LEAST", 16)
    return sizes
