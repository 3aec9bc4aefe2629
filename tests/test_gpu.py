"""The GPU backends on a real device against the CPU backend: the promise of equal bits."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import film_cases
import numpy as np
import pytest
import torch
from bits import assert_same_bits
from budget import assert_within_budget
from tables import MIXED_ROWS, mixed, random_inputs, random_table, walk

from fastdiff import randn, use_backend
from fastdiff.backends import Implementation, unavailable
from fastdiff.ops import (
    OPS,
    _native,
    add_noise,
    brownian,
    guidance_rescale,
    reparameterize,
    reverse_step,
)
from fastdiff.reference.diffusion import PREDICTIONS
from fastdiff.reference.guidance_rescale import guidance_rescale as exact_rescale
from fastdiff.reference.reparameterize import UNBOUNDED
from fastdiff.reference.reparameterize import reparameterize as exact_reparameterize

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(_native.missing is not None, reason=str(_native.missing)),
]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
PLAIN, LAST = torch.contiguous_format, torch.channels_last
WEIGHTS = torch.tensor([1.0, 3.0, 0.0])
BOUNDS = torch.tensor([0.5, -1.0, 2.0])


@pytest.fixture(params=("triton", "cuda"))
def backend(request: pytest.FixtureRequest) -> str:
    reason = unavailable(request.param)
    if reason is not None:
        pytest.skip(reason)
    return request.param


def _moved(value: Any, copies: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> Any:
    """A copy on the device for each tensor, once for each; tuples are walked."""
    if isinstance(value, torch.Tensor):
        if id(value) not in copies:
            copies[id(value)] = (value, value.cuda())
        return copies[id(value)][1]
    if isinstance(value, tuple):
        parts = [_moved(v, copies) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


@pytest.fixture
def through_device(backend: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Call it to let the "cpu" backend move its arguments to the device, run there, and back."""
    backward = importlib.import_module("fastdiff.ops.reparameterize")._BACKWARD

    def moved(kernel: Callable[[], Callable[[Any], None]]) -> Implementation:
        def run(call: Any) -> None:
            copies: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
            kernel()(_moved(call, copies))
            for original, copy in copies.values():
                original.copy_(copy)

        return Implementation(lambda: run, lambda call: None)

    def swap() -> None:
        # else the C++ checks take the call and run their own kernel
        monkeypatch.setattr(_native, "reads_tensors", False)
        for op in (*OPS.values(), backward):
            if backend in op.backends:
                monkeypatch.setitem(op.backends, "cpu", moved(op.backends[backend].load))

    with use_backend("cpu"):
        yield swap


@pytest.mark.parametrize("dtype", (F32, BF16, F16), ids=str)
@pytest.mark.parametrize("n", (0, 1, 3, 4, 5, 127, 128, 129, 1025, 2**22), ids=lambda n: f"n{n}")
def test_noise(backend: str, dtype: torch.dtype, n: int) -> None:
    seeds = [1, 2**63 + 5, 2**64 - 1]
    expected = randn(seeds, (n,), step=2**32 - 1, stream=3, dtype=dtype)
    with use_backend(backend):
        got = randn(seeds, (n,), step=2**32 - 1, stream=3, dtype=dtype, device="cuda")
    assert_same_bits(got, expected)


@pytest.mark.parametrize("size", ((3, 5, 7), (4, 8, 8), (64, 32, 32), (130, 2, 2)), ids=str)
def test_noise_channels_last(backend: str, size: tuple[int, ...]) -> None:
    out = torch.empty(3, *size, device="cuda").contiguous(memory_format=LAST)
    with use_backend(backend):
        randn([1, 2, 3], size, out=out)
    assert_same_bits(out, randn([1, 2, 3], size))


@pytest.mark.parametrize("dtype", (F32, BF16), ids=str)
@pytest.mark.parametrize("size", ((1,), (5,), (1025,), (3, 5, 7), (8, 64, 64)), ids=str)
def test_brownian(backend: str, size: tuple[int, ...], dtype: torch.dtype) -> None:
    for fmt in (PLAIN, LAST) if len(size) == 3 else (PLAIN,):
        out = torch.empty(3, *size, device="cuda", dtype=dtype).contiguous(memory_format=fmt)
        x = torch.linspace(-1, 1, out.numel()).view(out.shape)
        with use_backend(backend):
            brownian([1, 2, 2**64 - 1], size, 0.3, 0.4, out=out)
            added = brownian([1, 2, 3], size, 0.3, 0.4, add_to=x.cuda(), scale=0.7)
        assert_same_bits(out, brownian([1, 2, 2**64 - 1], size, 0.3, 0.4, dtype=dtype))
        assert_same_bits(added, brownian([1, 2, 3], size, 0.3, 0.4, add_to=x, scale=0.7))


@pytest.mark.parametrize("dtype", (F32, BF16), ids=str)
@pytest.mark.parametrize("size", ((1,), (5,), (1025,), (3, 5, 7), (8, 64, 64)), ids=str)
def test_add_noise(backend: str, size: tuple[int, ...], dtype: torch.dtype) -> None:
    alpha, sigma = torch.tensor([0.9, 0.0, 0.3]), torch.tensor([0.1, 1.0, 0.7])
    for fmt in (PLAIN, LAST) if len(size) == 3 else (PLAIN,):
        x0 = randn([8, 9, 10], size).to(dtype).contiguous(memory_format=fmt)
        for target in PREDICTIONS:
            given: Any = {"alpha": alpha, "sigma": sigma, "target": target}
            with use_backend(backend):
                got = add_noise(x0.cuda(), [1, 2, 2**64 - 1], **given)
            for a, b in zip(got, add_noise(x0, [1, 2, 2**64 - 1], **given), strict=True):
                assert_same_bits(a, b, target)


def test_noise_of_more_than_2_31_elements(backend: str) -> None:
    size = 2**31 + 2**12 + 3
    if torch.cuda.mem_get_info()[0] < 2.5 * size:
        pytest.skip("the device has not enough memory free")
    with use_backend(backend):
        got = randn([5], (size,), dtype=BF16, device="cuda")
    from fastdiff.reference.noise import normals

    for first in (0, 2**31 - 64, size - 64):
        expected = torch.from_numpy(normals(np.array([5], np.uint64), 64, 0, 0, first=first))
        assert_same_bits(got[0, first : first + 64].cpu(), expected[0].to(BF16))


STEPS = {
    "plain": ((3, 1025), F32, PLAIN, 1.0, None),
    "aligned": ((3, 4096), BF16, PLAIN, 2.5, 1.5),
    "per sample": ((3, 129), F16, PLAIN, WEIGHTS, BOUNDS),
    "channels_last": ((3, 8, 6, 6), BF16, LAST, 2.5, 1.5),
    "odd channels_last": ((3, 5, 9, 7), F32, LAST, WEIGHTS, BOUNDS),
}


@pytest.mark.parametrize(("shape", "dtype", "fmt", "guidance", "clip"), STEPS.values(), ids=STEPS)
def test_reverse_step(
    through_device: Callable[[], None],
    shape: Any,
    dtype: torch.dtype,
    fmt: Any,
    guidance: Any,
    clip: Any,
) -> None:
    rng = np.random.default_rng(0)
    table, inputs = random_table(rng), random_inputs(rng, shape, dtype, fmt, guidance, clip)
    expected = walk(table, inputs)
    through_device()
    for in_place in (False, True):
        got = walk(table, inputs, in_place=in_place)
        for name in expected:
            assert_same_bits(got[name], expected[name], name)


@pytest.mark.parametrize("n", (1, 1025, 2**20 + 3), ids=lambda n: f"n{n}")
@pytest.mark.parametrize("dtype", (F32, BF16, F16), ids=str)
def test_guidance_rescale(backend: str, dtype: torch.dtype, n: int) -> None:
    rng = np.random.default_rng(n)
    c, u = (torch.from_numpy(rng.normal(3.0, 1.0, (3, n))).to(dtype) for _ in "cu")
    with use_backend("reference"):
        expected = guidance_rescale(c, u, WEIGHTS, 0.7)
    with use_backend(backend):
        got = guidance_rescale(c.cuda(), u.cuda(), WEIGHTS.cuda(), 0.7)
    exact = exact_rescale(c.double(), u.double(), WEIGHTS, 0.7)
    # float32 sums of 16 elements in a thread and of 256 threads in a block, all terms positive
    assert_within_budget(got, expected, exact, ulps=16)


@pytest.mark.parametrize("dtype", (F32, BF16), ids=str)
def test_per_sample_rows(through_device: Callable[[], None], dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    shape = (3, 4, 4, 8)
    table = random_table(rng)
    inputs = random_inputs(rng, shape, dtype, PLAIN, WEIGHTS, BOUNDS)
    expected = [mixed(table, inputs, rows) for rows in MIXED_ROWS]
    through_device()
    for rows, before in zip(MIXED_ROWS, expected, strict=True):
        got = mixed(table, inputs, rows)
        for name in before:
            assert_same_bits(got[name], before[name], f"{rows} {name}")


@pytest.mark.parametrize("dtype", (F32, BF16, F16), ids=str)
@pytest.mark.parametrize("n", (1, 5, 4096, 100_001), ids=lambda n: f"n{n}")
@pytest.mark.parametrize("how", ({}, {"samples": 3, "clamp": (-0.5, 0.25)}), ids=("one", "three"))
def test_reparameterize(backend: str, dtype: torch.dtype, n: int, how: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    mu, logvar = (torch.from_numpy(rng.standard_normal((3, n))).to(dtype) for _ in range(2))
    shape = (3, 3, n) if how else (3, n)
    grad = torch.from_numpy(rng.standard_normal(shape)).to(dtype)
    results = {}
    for name, device in (("cpu", "cpu"), ("reference", "cpu"), (backend, "cuda")):
        m, lv = (t.clone().to(device).requires_grad_() for t in (mu, logvar))
        with use_backend(name):
            z, kl = reparameterize(m, lv, [1, 2, 3], **how)
            grads = torch.autograd.grad([z, kl], (m, lv), [grad.to(device), torch.ones_like(kl)])
            again = reparameterize(m, lv, [1, 2, 3], **how)[1]
        results[name] = (z.detach(), *grads), kl.detach()
        assert_same_bits(again.detach(), kl.detach(), "a second run")
    for got, expected in zip(results[backend][0], results["cpu"][0], strict=True):
        assert_same_bits(got, expected)
    bounds = how.get("clamp", UNBOUNDED)
    wide = (mu.double(), logvar.double(), torch.zeros(3, n).double())
    _, exact = exact_reparameterize(*wide, bounds)
    # positive terms, added in float32 in a tree or in runs of 16
    assert_within_budget(results[backend][1].cpu(), results["reference"][1], exact, ulps=16)


def _film_kernel(backend: str) -> Callable[[Any], None]:
    return film_cases.film_op.OP.backends[backend].load()


def _same_twice(kernel: Callable[[Any], None], call: Any) -> None:
    first = call.out.clone()
    call.out.fill_(float("nan"))
    kernel(call)
    assert_same_bits(call.out, first, "a second run")


@pytest.mark.parametrize("name", (*film_cases.CASES, *film_cases.CHUNKS))
def test_film_norm(backend: str, name: str) -> None:
    case = (film_cases.CASES | film_cases.CHUNKS)[name]
    call = film_cases.on_device(film_cases.make(case))
    kernel = _film_kernel(backend)
    kernel(call)
    film_cases.check(call, case.mean)
    _same_twice(kernel, call)


def test_film_norm_at_the_ends_of_a_type(backend: str) -> None:
    kernel = _film_kernel(backend)
    call = film_cases.on_device(film_cases.not_finite())
    kernel(call)
    film_cases.check_not_finite(call)
    for dtype in (F32, BF16, F16):
        call = film_cases.on_device(film_cases.silu_at_its_ends(dtype))
        kernel(call)
        film_cases.check(call)
    for fmt in (PLAIN, LAST):
        call = film_cases.on_device(film_cases.outlier(fmt))
        kernel(call)
        film_cases.check(call)


# alone in shared memory, in a cluster of two and of four, and in two reads; by groups and by pixels
FILM_SHAPES = {
    "640 bf16 channels_last": film_cases.Case((4, 640, 32, 32), 32, LAST, BF16, BF16, BF16),
    "320 bf16 channels_last": film_cases.Case((4, 320, 64, 64), 32, LAST, BF16, BF16, BF16),
    "320 bf16 channels_last, one sample": film_cases.Case((1, 320, 64, 64), 32, LAST, BF16),
    "320 f32 channels_last": film_cases.Case((2, 320, 64, 64), 32, LAST, mean=1000.0),
    "320 bf16": film_cases.Case((4, 320, 64, 64), 32, PLAIN, BF16, BF16, BF16),
    "320 f32, one sample": film_cases.Case((1, 320, 64, 64), 32, PLAIN, mean=1000.0),
    "128 bf16 channels_last, two reads": film_cases.Case((1, 128, 256, 256), 32, LAST, BF16),
    "128 f32, two reads": film_cases.Case((1, 128, 256, 256), 4, PLAIN),
    "odd, two reads": film_cases.Case((1, 66, 251, 241), 6, LAST, F16),
}


@pytest.mark.parametrize("name", FILM_SHAPES)
def test_film_norm_of_real_shapes(backend: str, name: str) -> None:
    call = film_cases.on_device(film_cases.make(FILM_SHAPES[name]))
    kernel = _film_kernel(backend)
    kernel(call)
    film_cases.check(call, FILM_SHAPES[name].mean)
    _same_twice(kernel, call)


def test_film_norm_of_more_than_2_31_elements(backend: str) -> None:
    pixels = 2**25 + 2**12
    shape = (1, 64, 2**12, pixels // 2**12)
    if torch.cuda.mem_get_info()[0] < 8 * 64 * pixels:
        pytest.skip("the device has not enough memory free")
    for fmt in (LAST, PLAIN):
        x = torch.zeros(shape, dtype=BF16, device="cuda").contiguous(memory_format=fmt)
        x[0, :, -1] = torch.arange(64.0, device="cuda")[:, None].to(BF16)
        call = film_cases.film_op.prepare(x, 2)
        _film_kernel(backend)(call)
        # of a group, the last row alone is not zero: mean and variance follow from its numbers
        row = torch.arange(64.0, dtype=torch.float64).view(2, 32)
        mean = row.mean(1) / shape[2]
        rstd = ((row**2).mean(1) / shape[2] - mean**2 + 1e-5).rsqrt()
        for at, values in ((-1, row), (0, 0 * row)):
            exact = ((values - mean[:, None]) * rstd[:, None]).flatten()
            same = exact.to(BF16)
            got = call.out[0, :, at, -1].cpu()
            # float32 inside, so the rounding to bfloat16 decides: half a ulp, or the next number
            assert_within_budget(got, same, exact, ulps=1)


def test_step_in_a_graph(backend: str) -> None:
    """Coefficients are read on the device, so a captured step replays."""
    rng = np.random.default_rng(0)
    table, inputs = random_table(rng), random_inputs(rng, (3, 4, 4, 8))
    x, output = inputs.x.cuda(), inputs.outputs[0].cuda()
    out, y = torch.empty_like(x), torch.empty_like(x)
    history = torch.zeros(table.depth, *x.shape, device="cuda")
    seeds = inputs.seeds.cuda()

    def step() -> None:
        reverse_step(x, output, table, 0, y=y, history=history, seeds=seeds, out=out)

    with use_backend(backend):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):  # compiles, and copies the table's flags to the host
            step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            step()
        expected = out.clone()
        out.zero_()
        graph.replay()
        torch.cuda.synchronize()
    assert_same_bits(out, expected)
