"""The CUDA C++ kernels on the host: the files of csrc/cuda themselves, compiled over a shim.

Every statement of a kernel but the conversions to 16 bits runs here, with the grid, the block and
the arguments of a launch on a device; what is promised as bits is compared with the CPU backend.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from bits import assert_same_bits
from budget import assert_within_budget
from on_host import COMPILER, Host
from tables import MIXED_ROWS, mixed, random_inputs, random_table, walk

from fastdiff import randn, use_backend
from fastdiff.backends import Implementation
from fastdiff.ops import (
    OPS,
    _launches,
    _native,
    add_noise,
    brownian,
    reparameterize,
    reverse_step,
)
from fastdiff.reference.diffusion import PREDICTIONS
from fastdiff.reference.reparameterize import UNBOUNDED
from fastdiff.reference.reparameterize import reparameterize as exact_reparameterize
from fastdiff.table import Row, StepTable

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"),
    pytest.mark.skipif(_native.missing is not None, reason=str(_native.missing)),
]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
PLAIN, LAST = torch.contiguous_format, torch.channels_last
SEEDS = [1, 2**63 + 5, 2**64 - 1]
BLOCKS = 7  # few, so that blocks stride over the rest
Swap = Callable[[], None]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    return Host(tmp_path_factory.mktemp("cuda_on_host"))


@pytest.fixture
def on_host(host: Host, monkeypatch: pytest.MonkeyPatch) -> Iterator[Swap]:
    """Call it to put the CUDA launches, run on the host, in the place of the "cpu" backend."""
    backward = importlib.import_module("fastdiff.ops.reparameterize")._BACKWARD

    def runs(op: str) -> Implementation:
        def run(call: Any) -> None:
            made = getattr(_launches, op)(call, BLOCKS)
            launches, _memory = made if isinstance(made, tuple) else (made, None)
            host.run(launches)

        return Implementation(lambda: run, lambda call: None)

    def swap() -> None:
        # else the C++ checks take the call and run their own kernel
        monkeypatch.setattr(_native, "reads_tensors", False)
        for name in ("noise", "add_noise", "brownian", "reverse_step", "reparameterize"):
            monkeypatch.setitem(OPS[name].backends, "cpu", runs(name))
        monkeypatch.setitem(backward.backends, "cpu", runs("reparameterize_backward"))

    with use_backend("cpu"):
        yield swap


# sizes around a pack and a block; 1 to 3 samples a block where they are small
NOISE = {
    "f32 3": ((3,), F32, PLAIN),
    "f32 129": ((129,), F32, PLAIN),
    "f32 4096": ((4096,), F32, PLAIN),
    "bf16 1024": ((1024,), BF16, PLAIN),
    "f16 1025": ((1025,), F16, PLAIN),
    "f32 odd pixels": ((3, 5, 7), F32, LAST),
    "bf16 whole quads": ((8, 6, 6), BF16, LAST),
    "f32 odd channels": ((5, 6, 6), F32, LAST),
}


@pytest.mark.parametrize(("size", "dtype", "fmt"), NOISE.values(), ids=NOISE)
def test_noise(on_host: Swap, size: tuple[int, ...], dtype: torch.dtype, fmt: Any) -> None:
    outs = [torch.empty(3, *size, dtype=dtype).contiguous(memory_format=fmt) for _ in range(2)]
    randn(SEEDS, size, step=2**32 - 1, stream=3, out=outs[0])
    on_host()
    randn(SEEDS, size, step=2**32 - 1, stream=3, out=outs[1])
    assert_same_bits(outs[1], outs[0])


@pytest.mark.parametrize(("size", "dtype", "fmt"), NOISE.values(), ids=NOISE)
def test_brownian(on_host: Swap, size: tuple[int, ...], dtype: torch.dtype, fmt: Any) -> None:
    outs = [torch.empty(3, *size, dtype=dtype).contiguous(memory_format=fmt) for _ in range(2)]
    x = torch.linspace(-1, 1, outs[0].numel()).view(outs[0].shape).contiguous(memory_format=fmt)
    given: dict[str, Any] = {"depth": 5, "stream": 2**32 - 1}
    brownian(SEEDS, size, 0.3, 0.4, out=outs[0], **given)
    added = brownian(SEEDS, size, 0.3, 0.4, add_to=x, scale=0.7, **given)
    on_host()
    brownian(SEEDS, size, 0.3, 0.4, out=outs[1], **given)
    assert_same_bits(outs[1], outs[0])
    assert_same_bits(brownian(SEEDS, size, 0.3, 0.4, add_to=x, scale=0.7, **given), added)


@pytest.mark.parametrize(("size", "dtype", "fmt"), NOISE.values(), ids=NOISE)
def test_add_noise(on_host: Swap, size: tuple[int, ...], dtype: torch.dtype, fmt: Any) -> None:
    x0 = randn([8, 9, 10], size).to(dtype).contiguous(memory_format=fmt)
    given = (x0, SEEDS, torch.tensor([0.9, 0.0, 0.3]), torch.tensor([0.1, 1.0, 0.7]))
    expected = {t: add_noise(*given, target=t, step=2**32 - 1) for t in PREDICTIONS}
    on_host()
    for target, results in expected.items():
        got = add_noise(*given, target=target, step=2**32 - 1)
        for a, b in zip(got, results, strict=True):
            assert_same_bits(a, b, target)


WEIGHTS = torch.tensor([1.0, 3.0, 0.0])
BOUNDS = torch.tensor([0.5, -1.0, 2.0])
STEPS = {
    "bf16": ((3, 1025), BF16, PLAIN, 2.5, 1.5),
    "f16 channels_last": ((3, 8, 6, 6), F16, LAST, 1.0, None),
    "f32 odd channels_last": ((3, 5, 9, 7), F32, LAST, WEIGHTS, BOUNDS),
}


@pytest.mark.parametrize(("shape", "dtype", "fmt", "guidance", "clip"), STEPS.values(), ids=STEPS)
def test_reverse_step(
    on_host: Swap, shape: Any, dtype: torch.dtype, fmt: Any, guidance: Any, clip: Any
) -> None:
    rng = np.random.default_rng(0)
    table, inputs = random_table(rng), random_inputs(rng, shape, dtype, fmt, guidance, clip)
    expected = walk(table, inputs)
    on_host()
    for in_place in (False, True):
        got = walk(table, inputs, in_place=in_place)
        for name in expected:
            assert_same_bits(got[name], expected[name], name)


def test_sum_starts_at_zero(on_host: Swap) -> None:
    """Of terms that are all -0 the sum is +0: it does not start with the first of them."""
    table = StepTable("zeros", (Row(x={"x": 0.5, "m": 0.5}, time=0.0),))
    zeros = torch.full((2, 5), -0.0)
    on_host()
    assert_same_bits(reverse_step(zeros, zeros, table, 0), torch.zeros(2, 5))


@pytest.mark.parametrize(("dtype", "fmt"), ((F32, PLAIN), (BF16, LAST)), ids=("f32", "bf16 last"))
def test_per_sample_rows(on_host: Swap, dtype: torch.dtype, fmt: torch.memory_format) -> None:
    rng = np.random.default_rng(0)
    shape = (3, 4, 4, 8)  # aligned: the walk's guarded memory never is
    table = random_table(rng)
    inputs = random_inputs(rng, shape, dtype, fmt, WEIGHTS, BOUNDS)
    expected = [mixed(table, inputs, rows) for rows in MIXED_ROWS]
    on_host()
    for rows, before in zip(MIXED_ROWS, expected, strict=True):
        got = mixed(table, inputs, rows)
        for name in before:
            assert_same_bits(got[name], before[name], f"{rows} {name}")


VAES = {
    "f32 1": ((1,), F32),  # one thread a sample
    "f32 5": ((5,), F32),  # samples share a block
    "bf16 2048": ((2048,), BF16),
    "f16 129": ((129,), F16),
    "f32 10001": ((10001,), F32),  # three chunks a sample
}


@pytest.mark.parametrize("how", ({}, {"samples": 3, "clamp": (-0.5, 0.25)}), ids=("one", "three"))
@pytest.mark.parametrize(("size", "dtype"), VAES.values(), ids=VAES)
def test_reparameterize(
    on_host: Swap, size: tuple[int, ...], dtype: torch.dtype, how: dict[str, Any]
) -> None:
    rng = np.random.default_rng(0)
    shape = (len(SEEDS), *size)
    mu, logvar = (torch.from_numpy(rng.standard_normal(shape)).to(dtype) for _ in range(2))
    grad_z = torch.from_numpy(rng.standard_normal((len(SEEDS), how.get("samples", 1), *size)))
    grad_z = (grad_z if how else grad_z[:, 0]).to(dtype)
    grad_kl = torch.from_numpy(rng.standard_normal(len(SEEDS))).float()

    def run() -> tuple[torch.Tensor, list[torch.Tensor]]:
        found = []
        for through in ("zk", "z", "k"):
            m, lv = mu.clone().requires_grad_(), logvar.clone().requires_grad_()
            z, kl = reparameterize(m, lv, SEEDS, step=7, **how)
            outputs = [z] * ("z" in through) + [kl] * ("k" in through)
            given = [grad_z] * ("z" in through) + [grad_kl] * ("k" in through)
            found += [z.detach(), *torch.autograd.grad(outputs, (m, lv), given)]
        return kl.detach(), found

    _, expected = run()
    with use_backend("reference"):
        reference = reparameterize(mu, logvar, SEEDS, step=7, **how)[1]
    on_host()
    kl, got = run()
    for g, e in zip(got, expected, strict=True):
        assert_same_bits(g, e)
    bounds = how.get("clamp", UNBOUNDED)
    wide = (mu.double(), logvar.double(), torch.zeros(shape).double())
    _, exact = exact_reparameterize(*wide, bounds)
    # a thread adds up 16 terms and a block 256 threads; the terms are positive, each addition
    # rounds by half a ulp: 16 + 8 of them, and some more in the terms
    assert_within_budget(kl, reference, exact, ulps=16)
