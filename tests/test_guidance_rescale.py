"""`guidance_rescale` against the formula in float64, on every backend, and by itself in a batch."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable
from typing import Any

import gpu_compile
import numpy as np
import pytest
import torch
from bits import assert_same_bits
from budget import assert_within_budget
from interpreted import interpreted
from on_host import COMPILER, Host
from tables import needs_extension

from fastdiff import BackendError, use_backend
from fastdiff.ops import _launches, guidance_rescale
from fastdiff.ops.guidance_rescale import prepare
from fastdiff.reference.guidance_rescale import guidance_rescale as plain

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# one element; around a run of 1,024 and a piece of 4,096; an image; a scalar a sample
SIZES = {
    "1": (1,),
    "2": (2,),
    "1023": (1023,),
    "4096": (4096,),
    "9001": (9001,),
    "image": (4, 33, 31),
    "scalar": (),
}


def _inputs(size: tuple[int, ...], dtype: torch.dtype, mean: float = 0.0) -> list[torch.Tensor]:
    rng = np.random.default_rng(len(size) + math.prod(size))
    shape = (3, *size)
    c, u = (torch.from_numpy(rng.normal(mean, 1.0, shape)).to(dtype) for _ in "cu")
    return [c, u, torch.tensor([1.0, 7.5, -2.0]), torch.tensor([0.7, 1.0, 0.0])]


def _check(got: torch.Tensor, inputs: list[torch.Tensor], ulps: float) -> None:
    c, u, w, phi = inputs
    assert_within_budget(got, plain(*inputs), plain(c.double(), u.double(), w, phi), ulps)


@pytest.mark.parametrize("mean", (0.0, 100.0), ids=("centred", "far"))
@pytest.mark.parametrize("dtype", (F32, BF16, F16), ids=str)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_within_the_budget(
    isa: str, size: tuple[int, ...], dtype: torch.dtype, mean: float
) -> None:
    inputs = _inputs(size, dtype, mean)
    with use_backend("cpu"):
        got = guidance_rescale(*inputs)
    # the guided output is rounded in float32, 3 roundings an element of which a deviation keeps
    # less than one ulp of the largest element; one more for the result
    _check(got, inputs, ulps=4)


def test_reference_is_the_formula() -> None:
    c, u, w, phi = _inputs((500,), torch.float64)
    got = guidance_rescale(c, u, w, phi).numpy()
    for i in range(3):
        guided = u[i].numpy() + float(w[i]) * (c[i].numpy() - u[i].numpy())
        share = float(phi[i])
        expected = share * c[i].numpy().std(ddof=1) / guided.std(ddof=1) + 1 - share
        assert abs(got[i] - expected) <= 500 * 2.0**-53


def test_weight_one_and_no_share_change_nothing(isa: str) -> None:
    """Exactly 1: a request without rescaling keeps its bits in a batch with others."""
    c, u, w, phi = _inputs((3000,), F32)
    got = guidance_rescale(c, u, w, phi)
    assert got[0] == 1 and got[2] == 1 and got[1] != 1


@pytest.mark.parametrize("backend", ("cpu", "reference"))
def test_constant_and_not_finite_samples(isa: str, backend: str) -> None:
    c, u, w, _ = _inputs((300,), F32)
    c[0], u[0] = 2.0, 2.0  # a guided output without contrast
    u[1, 7] = float("nan")
    with use_backend(backend):
        got = guidance_rescale(c, u, w, 0.5)
    assert got[0] == 1 and got[1].isnan() and got[2].isfinite()


@needs_extension
def test_a_sample_depends_on_itself_alone() -> None:
    c, u, w, phi = _inputs((4, 70, 50), F32)
    both = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        both.append(guidance_rescale(c, u, w, phi))
        for i in range(3):
            part = slice(i, i + 1)
            alone = guidance_rescale(c[part], u[part], float(w[i]), float(phi[i]))
            assert_same_bits(alone, both[-1][part])
    assert_same_bits(*both)


# half of a model's output with a variance, another memory order on either side, one for all
VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "split": lambda t: torch.cat([t, t + 1], 1).chunk(2, 1)[0],
    "channels-last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "every-other": lambda t: torch.stack([t, t], -1).flatten(-2)[..., ::2],
    "one-for-all": lambda t: t[:1].expand_as(t),
}


@pytest.mark.parametrize("change", VIEWS.values(), ids=VIEWS)
@needs_extension
def test_inputs_of_any_strides(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    c, u, w, phi = _inputs((4, 9, 7), F32)
    for first, second in ((change(c), u), (c, change(u)), (change(c), change(u))):
        _check(guidance_rescale(first, second, w, phi), [first, second, w, phi], ulps=4)


def test_gradients_by_the_reference_alone() -> None:
    c, u, w, phi = _inputs((20,), torch.float64)
    for t in (c, u):
        t.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: guidance_rescale(a, b, w, phi), (c, u))
    wanted = c.detach().float().requires_grad_()
    with use_backend("cpu"), pytest.raises(BackendError, match=r"no backward pass|extension"):
        guidance_rescale(wanted, u.detach().float(), w, phi)


@pytest.mark.filterwarnings("ignore:`torch.jit.script")  # inside forward mode
def test_tangents_by_the_reference_alone() -> None:
    c, u, w, phi = _inputs((20,), torch.float64)
    _, expected = torch.autograd.functional.jvp(
        lambda a, b: guidance_rescale(a, b, w, phi), (c, u), (u, c)
    )
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual
        got = guidance_rescale(dual(c, u), dual(u, c), w, phi)
        tangent = torch.autograd.forward_ad.unpack_dual(got).tangent
        single = dual(c.float(), u.float())
        with use_backend("cpu"), pytest.raises(BackendError, match=r"or tangents|extension"):
            guidance_rescale(single, u.float(), w, phi)
    assert tangent is not None
    # sums over 20 elements, twice
    assert_within_budget(tangent, expected, expected, ulps=40)


# --- the GPU sources without a GPU ------------------------------------------------------------


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize(
    ("size", "dtype"), (((5,), F32), ((129,), F16), ((10001,), F32), ((2048,), BF16)), ids=str
)
def test_cuda_source_on_the_host(size: tuple[int, ...], dtype: torch.dtype, tmp_path: Any) -> None:
    inputs = _inputs(size, dtype, mean=3.0)
    call = prepare(*inputs)
    launches, _memory = _launches.guidance_rescale(call, 7)
    Host(tmp_path).run(launches)
    # float32 sums of 16 elements in a thread and of 256 threads in a block, all terms positive
    _check(call.out, inputs, ulps=16)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_triton_in_the_interpreter() -> None:
    assert interpreted("triton_rescale.py") == {"rescale": ""}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels cannot be compiled")
@pytest.mark.parametrize("arch", gpu_compile.TRITON_ARCHS)
@pytest.mark.parametrize("dtype", ("f32", "bf16"))
def test_triton_compiles_without_spills(dtype: str, arch: str) -> None:
    found = gpu_compile.compile_triton(f"guidance_rescale {dtype}", arch)
    assert [k.kernel for k in found] == ["guidance_rescale_kernel", "sum_kernel"]
    assert all(k.spills == 0 for k in found)


# --- errors -----------------------------------------------------------------------------------

T = torch.ones(2, 3)
WRONG: dict[str, tuple[tuple[Any, ...], type[Exception], str]] = {
    "list": (([1.0], T, 2.0, 0.7), TypeError, "output must be a tensor, got list"),
    "uncond-none": ((T, None, 2.0, 0.7), TypeError, "uncond must be a tensor, got NoneType"),
    "integer": ((T.int(), T.int(), 2.0, 0.7), TypeError, "output must be float32, bfloat16"),
    "scalar": ((torch.tensor(1.0),) * 2 + (2.0, 0.7), ValueError, r"have shape \(N, \*S\), got"),
    "dtype": ((T, T.half(), 2.0, 0.7), TypeError, "uncond must be torch.float32, got"),
    "shape": ((T, T[:, :2], 2.0, 0.7), ValueError, "uncond must have the shape of output"),
    "device": ((T, T.to("meta"), 2.0, 0.7), ValueError, "uncond must have the device of output"),
    "weights": ((T, T, torch.ones(3), 0.7), ValueError, r"guidance must be a number or one a"),
    "weight": ((T, T, "2", 0.7), TypeError, "guidance must be a number, got str"),
    "phi": ((T, T, 2.0, float("nan")), ValueError, "phi must be finite in float32, got nan"),
}


@pytest.mark.parametrize(("args", "error", "message"), WRONG.values(), ids=WRONG)
def test_refusals(args: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"guidance_rescale: .*{message}"):
        guidance_rescale(*args)


@pytest.mark.parametrize("shape", ((0, 4), (2, 0)), ids=str)
def test_empty(isa: str, shape: tuple[int, ...]) -> None:
    with use_backend("cpu"):
        got = guidance_rescale(torch.empty(shape), torch.empty(shape), 2.0, 0.7)
    assert_same_bits(got, torch.ones(shape[0]))
