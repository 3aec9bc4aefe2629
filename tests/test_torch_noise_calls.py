"""What is left to torch, and how a draw of ours behaves as a function of torch."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bits import assert_same_bits
from tables import needs_extension
from torch import Tensor
from torch_twins import assert_same_draw, twins

from fastdiff.integrations import _torch_noise
from fastdiff.integrations._torch_noise import fill_, randn
from fastdiff.ops import _native

pytestmark = needs_extension

Randn = Callable[..., Tensor]
PAIRS: tuple[tuple[Randn, Randn], tuple[Randn, Randn]] = (
    (randn, fill_),
    (
        lambda shape, g, dtype=None: torch.randn(shape, generator=g, dtype=dtype),
        lambda x, g: x.normal_(generator=g),
    ),
)

# by reason: another stream, too small, another order in memory, a class of its own, a sign beside
# the memory, one draw for several results
LEFT: dict[str, Callable[[Randn, Randn, torch.Generator], Tensor]] = {
    "float64": lambda randn, fill, g: randn((4096,), g, torch.float64),
    "small": lambda randn, fill, g: randn((15,), g),
    "strided": lambda randn, fill, g: fill(torch.empty(64, 65).t(), g),
    "channels last": lambda randn, fill, g: fill(
        torch.empty(2, 8, 16, 16).to(memory_format=torch.channels_last), g
    ),
    "parameter": lambda randn, fill, g: fill(torch.nn.Parameter(torch.empty(99), False), g),
    "negated view": lambda randn, fill, g: fill(torch._neg_view(torch.empty(4096)), g).clone(),
    "vmap": lambda randn, fill, g: torch.vmap(lambda _: randn((4096,), g), randomness="different")(
        torch.empty(3)
    ),
}


@pytest.mark.parametrize("case", LEFT)
def test_the_rest_is_torchs_own(case: str, drawn: list[int]) -> None:
    generators = twins(6)
    got, expected = (LEFT[case](*pair, g) for pair, g in zip(PAIRS, generators, strict=True))
    assert_same_bits(got, expected, case)
    assert torch.equal(*(g.get_state() for g in generators))
    assert drawn == []


def test_small_sizes_are_left_to_torch() -> None:
    """With the size from which we draw as it is."""
    for size in (0, 1, 15, 16, _torch_noise._LEAST - 1, _torch_noise._LEAST):
        assert_same_draw(size, *twins(size))


def test_without_the_kernel(drawn: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The portable instruction set has none, and there may be no extension."""
    before = _native.extension.isa()
    _native.extension.set_isa("portable")
    try:
        assert_same_draw(5000, *twins(1))
    finally:
        _native.extension.set_isa(before)
    monkeypatch.setattr(_native, "extension", None)
    assert_same_draw(5000, *twins(1))
    assert drawn == []


# one value off by an ulp; a state that is a word further; and, so that the two show, no fault
@pytest.mark.parametrize("fault", ("value", "state", "none"))
def test_a_stream_that_differs_is_found_out(
    fault: str, monkeypatch: pytest.MonkeyPatch, vector_isa: str
) -> None:
    right = _native.extension.torch_noise

    def faulty(state: int, out: int, dtype: int, size: int) -> bool:
        done = right(state, out, dtype, size)
        if fault == "value":
            ctypes.c_int32.from_address(out + 4 * 77).value ^= 1
        elif fault == "state":
            ctypes.c_int32.from_address(state + 8).value -= 1
            ctypes.c_int64.from_address(state + 16).value += 1
        return bool(done)

    name = f"{vector_isa}, torch_noise with {fault}"
    with monkeypatch.context() as patched:
        stand_in = SimpleNamespace(isa=lambda: name, torch_noise=faulty)
        patched.setattr(_native, "extension", stand_in)
        assert _torch_noise._agrees(torch.float32, name) is (fault == "none")
        assert_same_draw(5000, *twins(2))


def test_a_graph_has_torchs_draw() -> None:
    """A compiled function draws as torch does, by one node of its graph."""
    compiled = torch.compile(lambda: randn((4096,)), backend="eager", fullgraph=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        got = compiled()
        torch.manual_seed(1)
        assert_same_bits(got, torch.randn(4096))


# what torch takes for a CPU without vectors, and for one with AVX2
@pytest.mark.parametrize("capability", ("default", "avx2"))
def test_torch_on_another_path(capability: str) -> None:
    """torch's own choice of kernel changes its stream; ours follows or steps back."""
    code = (
        "import torch\n"
        "from fastdiff.integrations import _torch_noise as n\n"
        "a, b = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)\n"
        "for dtype in (torch.float32, torch.bfloat16, torch.float16):\n"
        "    x, y = n.randn((5003,), a, dtype), torch.randn(5003, generator=b, dtype=dtype)\n"
        "    assert torch.equal(x.view(torch.int8), y.view(torch.int8)), dtype\n"
        "    assert torch.equal(a.get_state(), b.get_state()), dtype\n"
        "print(torch.backends.cpu.get_cpu_capability())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        cwd=Path(__file__).resolve().parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().lower() == capability


# --- as a function of torch ------------------------------------------------------------------


def test_autograd_sees_the_write(vector_isa: str, drawn: list[int]) -> None:
    x = torch.ones(4096)
    weight = torch.ones(4096, requires_grad=True)
    loss = (weight * x).sum()
    fill_(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        fill_(weight)
    assert drawn == [4096]
    with torch.no_grad():
        fill_(weight)
    assert (weight != 1).any()


def test_inference_mode(vector_isa: str, drawn: list[int]) -> None:
    ours, theirs = twins(9)
    with torch.inference_mode():
        assert_same_draw(4096, ours, theirs)
        x = randn((4096,), ours)
    assert drawn == [4096, 4096]
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
        fill_(x, ours)


def test_out_is_written_and_returned(vector_isa: str, drawn: list[int]) -> None:
    """A slot of a ring, as a sampler keeps one."""
    ring = torch.zeros(3, 2, 40, 40)
    ours, theirs = twins(10)
    slot = ring[1]
    assert randn(slot.shape, ours, torch.float32, out=slot) is slot
    assert_same_bits(ring[1], torch.randn(2, 40, 40, generator=theirs))
    assert not ring[0].any()
    assert not ring[2].any()
    assert drawn == [3200]


def test_errors_leave_everything_as_it_was() -> None:
    x, generator = torch.zeros(4096), torch.Generator().manual_seed(0)
    before = generator.get_state()
    with pytest.raises(TypeError, match="randn: out must be a tensor, got list"):
        randn((4,), generator, out=[0.0] * 4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"randn: out must have shape \(4, 4\), got \(4096,\)"):
        randn((4, 4), generator, out=x)
    with pytest.raises(ValueError, match=r"out must have dtype torch.float16, got torch.float32"):
        randn((4096,), generator, torch.float16, out=x)
    with pytest.raises(TypeError, match="generator"):
        fill_(x, 5)  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError, match="not implemented for 'Long'"):
        randn((4096,), generator, torch.int64)
    assert not x.any()
    assert torch.equal(generator.get_state(), before)
