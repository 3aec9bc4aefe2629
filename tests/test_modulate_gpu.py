"""`modulate` on the GPU backends: in Triton's interpreter, on the host, and on a real device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from interpreted import interpreted
from modulate_cases import (
    BACKEND_CASES,
    Case,
    assert_backend_is_right,
    assert_constant_tokens_become_the_shift,
    tensors,
)
from on_host import COMPILER, Host
from tables import needs_extension

from fastdiff import use_backend
from fastdiff.backends import Implementation, unavailable
from fastdiff.ops import OPS, _modulate_launches, modulate
from fastdiff.ops.modulate import prepare

_INTERPRETED = (*BACKEND_CASES, "longer than a tile", "constant tokens")
CPU = torch.device("cpu")


# --- Triton's interpreter --------------------------------------------------------------------


@pytest.fixture(scope="module")
def errors() -> dict[str, str]:
    """Errors by name of the cases, all run in one process with the interpreter on."""
    pytest.importorskip("triton")
    return interpreted("triton_modulate.py")


@pytest.mark.parametrize("name", _INTERPRETED)
def test_in_the_interpreter(errors: dict[str, str], name: str) -> None:
    assert errors[name] == "", errors[name]


# --- CUDA C++ on the host ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    return Host(tmp_path_factory.mktemp("modulate_on_host"))


@pytest.fixture
def on_host(host: Host, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CUDA launches, run on the host, in the place of the "cuda" backend's."""
    monkeypatch.setattr("fastdiff.backends.unavailable", lambda name: None)

    def run(call: Any) -> None:
        host.run(_modulate_launches.modulate(call, 2))  # few, so that blocks stride over the rest

    monkeypatch.setitem(
        OPS["modulate"].backends, "cuda", Implementation(lambda: run, lambda call: None)
    )
    yield


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@needs_extension
@pytest.mark.parametrize("case", BACKEND_CASES.values(), ids=BACKEND_CASES)
def test_on_the_host(on_host: None, case: Case) -> None:
    assert_backend_is_right("cuda", CPU, *case)


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_constant_tokens_on_the_host(on_host: None) -> None:
    assert_constant_tokens_become_the_shift("cuda", CPU)


def _launch(case: str) -> dict[str, int]:
    t, rest = tensors(BACKEND_CASES[case], CPU)
    launch = _modulate_launches.modulate(prepare(**t, **rest), 100)[0]
    assert launch.block[0] * launch.block[1] <= 256 and launch.block[0] % 32 == 0
    return dict(launch.macros) | {"threads": launch.block[0], "side": launch.block[1]}


def test_launches_take_the_widest_access_and_registers_where_they_can() -> None:
    aligned = _launch("bf16 1152")
    assert (aligned["FD_PACK"], aligned["FD_VECTOR"], aligned["threads"]) == (8, 1, 64)
    assert _launch("f32 100")["FD_PACK"] == 4
    assert _launch("f32 100")["side"] > 1  # tokens share a block
    for odd in ("f32 3", "bf16 100", "f32 misaligned 65", "bf16 misaligned 64"):
        assert _launch(odd)["FD_PACK"] == 1, odd
    assert _launch("f32 9000")["FD_KEEP"] == 0
    assert all(_launch(c)["FD_KEEP"] > 0 for c in BACKEND_CASES if "9000" not in c)


# --- a real device -----------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("backend", ("triton", "cuda"))
@pytest.mark.parametrize("case", BACKEND_CASES.values(), ids=BACKEND_CASES)
def test_on_a_device(backend: str, case: Case) -> None:
    reason = unavailable(backend)
    if reason is not None:
        pytest.skip(reason)
    assert_backend_is_right(backend, torch.device("cuda"), *case)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_graph_replays() -> None:
    t, rest = tensors(BACKEND_CASES["bf16 1152"], torch.device("cuda"))
    with use_backend("cuda"):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):  # compiles
            want = modulate(**t, **rest)[0]
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            got = modulate(**t, **rest)[0]
        graph.replay()
        torch.cuda.synchronize()
    assert torch.equal(got, want)
