"""The forward process: its bits on every backend, its gradient, its law, and what it refuses."""

from __future__ import annotations

import importlib
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from bits import assert_same_bits
from tables import Guard
from torch._dynamo.testing import CompileCounter

import fastdiff
from fastdiff import schedules, use_backend
from fastdiff.backends import BackendError
from fastdiff.ops import Stream, add_noise, as_seeds, describe, randn
from fastdiff.reference.diffusion import PREDICTIONS, from_prediction, to_prediction

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
PLAIN, LAST, LAST_3D = torch.contiguous_format, torch.channels_last, torch.channels_last_3d
SEEDS = [1, 2**63 + 5, 2**64 - 1]
# clean data, pure noise, a time between: the ends are where a product may hide a term
ALPHA, SIGMA = torch.tensor([1.0, 0.0, 0.3]), torch.tensor([0.0, 1.0, 0.95])


def clean(
    *size: int, dtype: torch.dtype = F32, fmt: torch.memory_format = PLAIN, samples: int = 3
) -> torch.Tensor:
    x0 = randn(range(40, 40 + samples), size, stream=Stream.INITIAL)
    return x0.to(dtype).contiguous(memory_format=fmt)


def formula(x0: torch.Tensor, target: str, **how: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The two lines that training code has, with the op's own noise."""
    column = (-1,) + (1,) * (x0.dim() - 1)
    a, s = ALPHA.view(column), SIGMA.view(column)
    wide = x0.float()
    noise = randn(SEEDS, x0.shape[1:], **{"stream": Stream.FORWARD, **how})
    x = a * wide + s * noise
    return x.to(x0.dtype), to_prediction(target, wide, noise, a, s).to(x0.dtype)


# --- bits -------------------------------------------------------------------------------------

# around a Philox block, a batch of 16 of them, a piece of the kernel, two pieces
SIZES: tuple[tuple[int, ...], ...] = (
    (0,),
    (1,),
    (3,),
    (5,),
    (63,),
    (65,),
    (1023,),
    (1025,),
    (9001,),
)
# odd and even numbers of pixels and channels; more than a piece; channels alone; three axes
IMAGES = (
    ((3, 5, 7), LAST),
    ((8, 6, 6), LAST),
    ((5, 64, 33), LAST),
    ((130, 1, 1), LAST),
    ((3, 3, 5, 7), LAST_3D),
)


@pytest.mark.parametrize("target", PREDICTIONS)
@pytest.mark.parametrize("dtype", (F32, BF16, F16), ids=str)
def test_bits_are_those_of_the_formula(isa: str, target: str, dtype: torch.dtype) -> None:
    for size, fmt in [*((s, PLAIN) for s in SIZES), *IMAGES]:
        x0 = clean(*size, dtype=dtype, fmt=fmt)
        before = x0.clone()
        how = {"step": 2**32 - 1, "stream": 2**32 - 2}
        with use_backend("cpu"):
            got = add_noise(x0, SEEDS, ALPHA, SIGMA, target=target, **how)
        for g, e in zip(got, formula(x0, target, **how), strict=True):
            assert_same_bits(g, e, f"{size} {fmt}")
            assert g.is_contiguous(memory_format=fmt) and g.dtype == dtype
        assert_same_bits(x0, before)


@pytest.mark.parametrize("target", PREDICTIONS)
def test_reference_gives_the_same_bits(target: str) -> None:
    for dtype in (F32, BF16, F16):
        for size, fmt in (((1025,), PLAIN), *IMAGES):
            x0 = clean(*size, dtype=dtype, fmt=fmt)
            with use_backend("reference"):
                got = add_noise(x0, SEEDS, ALPHA, SIGMA, target=target)
            for g, e in zip(got, formula(x0, target), strict=True):
                assert_same_bits(g, e, f"{size} {dtype}")
                assert g.is_contiguous(memory_format=fmt)


def test_defaults_are_those_that_are_documented() -> None:
    x0 = clean(100)
    x, target = add_noise(x0, SEEDS, ALPHA, SIGMA)
    assert_same_bits(target, randn(SEEDS, (100,), stream=Stream.FORWARD))
    assert_same_bits(x, formula(x0, "epsilon")[0])


def test_a_sample_depends_on_its_own_seed_and_time_alone() -> None:
    x0 = clean(3, 5, 7)
    whole = add_noise(x0, SEEDS, ALPHA, SIGMA, target="v_prediction")
    for i in range(3):
        one = slice(i, i + 1)
        alone = add_noise(x0[one], SEEDS[one], ALPHA[one], SIGMA[one], target="v_prediction")
        for a, b in zip(alone, whole, strict=True):
            assert_same_bits(a, b[one])


def test_threads_change_no_bit() -> None:
    x0 = clean(4, 96, 96, samples=8)
    alpha = torch.linspace(0, 1, 8)
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(add_noise(x0, 5, alpha, 1 - alpha, target="flow"))
    for a, b in zip(*results, strict=True):
        assert_same_bits(a, b)


def test_any_strides_are_taken() -> None:
    x0 = clean(6, 4, 5).transpose(1, 3)
    assert not x0.is_contiguous() and not x0.is_contiguous(memory_format=LAST)
    seeds, both = torch.tensor([[1, 0], [5, 0], [-1, 0]])[:, 0], torch.stack([ALPHA, SIGMA], dim=1)
    got = add_noise(x0, seeds, both[:, 0], both[:, 1])
    expected = add_noise(x0.contiguous(), [1, 5, 2**64 - 1], ALPHA, SIGMA)
    for g, e in zip(got, expected, strict=True):
        assert_same_bits(g, e)


def test_unaligned_memory_with_a_border(isa: str) -> None:
    """Nothing is written beyond the results, wherever they start."""
    for dtype, fmt in ((F32, PLAIN), (BF16, PLAIN), (F32, LAST)):
        shape = (3, 3, 17, 23)
        guards = [Guard(shape, fmt, dtype) for _ in range(2)]
        x0 = Guard(shape, fmt, dtype)
        x0.tensor.copy_(clean(*shape[1:], dtype=dtype, fmt=fmt))
        call = fastdiff.ops.OPS["add_noise"].backends["cpu"].load()
        prepared = _prepare(x0.tensor, target="flow")
        call(prepared._replace(x=guards[0].tensor, wanted=guards[1].tensor))
        for guard, expected in zip(guards, formula(x0.tensor, "flow"), strict=True):
            assert_same_bits(guard.tensor, expected)
            guard.check(f"{dtype} {fmt}")


def _prepare(x0: torch.Tensor, **how: Any) -> Any:
    # importlib: the function of the same name hides the module
    module = importlib.import_module("fastdiff.ops.add_noise")
    return module.prepare(x0, SEEDS, ALPHA, SIGMA, **how)


@pytest.mark.parametrize(
    "make",
    (
        lambda v: v,
        lambda v: np.float32(v),
        lambda v: np.array(v),
        lambda v: torch.tensor(v, dtype=torch.float64),
        lambda v: np.full(3, v),
        lambda v: np.full(3, v, dtype=np.float32),
        lambda v: torch.full((3,), v),
        lambda v: torch.full((3,), v, dtype=torch.float64),
    ),
    ids=("number", "scalar", "array ()", "tensor ()", "array", "float32", "tensor", "double"),
)
def test_coefficients_in_every_form(make: Any) -> None:
    """All are rounded once to float32, from whatever holds them."""
    x0 = clean(50)
    column = torch.full((3, 1), 0.7)
    noise = randn(SEEDS, (50,), stream=Stream.FORWARD)
    got, _ = add_noise(x0, SEEDS, make(0.7), make(0.7))
    assert_same_bits(got, column * x0 + column * noise)


def test_float64_is_computed_in_float64() -> None:
    x0 = clean(50).double()
    alpha = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    x, v = add_noise(x0, SEEDS, alpha, 1 - alpha, target="v_prediction")
    noise = randn(SEEDS, (50,), stream=Stream.FORWARD).double()
    a = alpha.view(3, 1)
    assert_same_bits(x, a * x0 + (1 - a) * noise)
    assert_same_bits(v, a * noise - (1 - a) * x0)


def test_not_a_number_stays_in_its_element() -> None:
    x0 = clean(70)
    x0[1, 5] = math.nan
    x0[2, 6] = math.inf
    x, target = add_noise(x0, SEEDS, 0.5, 0.5, target="flow")
    for t in (x, target):
        assert (~t.isfinite()).nonzero().tolist() == [[1, 5], [2, 6]]


# --- what it means ----------------------------------------------------------------------------


@pytest.mark.parametrize("target", PREDICTIONS)
def test_the_target_leads_back_to_the_data(target: str) -> None:
    """A model that gives the target is right: the data and the noise come out of x and it."""
    schedule = schedules.cosine()
    t = np.array([100, 500, 900])
    x0 = clean(200).double()
    a, s = schedule.alpha(t), schedule.sigma(t)
    x, wanted = add_noise(x0, SEEDS, a, s, target=target)
    column = [torch.from_numpy(np.array(v)).view(3, 1) for v in (a, s)]
    data, noise = from_prediction(target, x, wanted, *column)
    # float64; the smallest divisor is alpha at t = 900, some 0.15
    assert (data - x0).abs().max() < 1e-13
    assert (noise - randn(SEEDS, (200,), stream=Stream.FORWARD)).abs().max() < 1e-13


def test_variance_is_that_of_the_marginal() -> None:
    """DDPM, equation 4; two-sided 5 sigma: right code on random noise fails once in 1.7 million."""
    n = 1 << 18
    x, _ = add_noise(torch.full((3, n), 2.0), SEEDS, ALPHA, SIGMA)
    for i in range(3):
        a, s = ALPHA[i].item(), SIGMA[i].item()
        assert abs(x[i].double().mean().item() - 2 * a) <= 5 * s / math.sqrt(n)
        assert abs(x[i].double().var().item() - s**2) <= 5 * s**2 * math.sqrt(2 / n)


def test_agrees_with_diffusers_on_the_same_noise() -> None:
    diffusers = pytest.importorskip("diffusers")
    peer = diffusers.DDPMScheduler(beta_schedule="linear")
    t = torch.tensor([3, 400, 999])
    schedule = schedules.linear()
    x0 = clean(3, 8, 8)
    noise = randn(SEEDS, (3, 8, 8), stream=Stream.FORWARD)
    a, s = schedule.alpha(t.numpy()), schedule.sigma(t.numpy())
    x, v = add_noise(x0, SEEDS, a, s, target="v_prediction")
    # the peer takes a cumulative product of 1000 float32 factors: half a ulp each
    bound = 1000 * 2.0**-24 * 8
    assert (x - peer.add_noise(x0, noise, t)).abs().max() < bound
    assert (v - peer.get_velocity(x0, noise, t)).abs().max() < bound


# --- gradients and the dispatcher -------------------------------------------------------------


@pytest.mark.parametrize("target", PREDICTIONS)
def test_gradcheck_and_second_derivatives_in_float64(target: str) -> None:
    x0 = clean(2, 4).double().requires_grad_()

    def both(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = add_noise(x, SEEDS, ALPHA, SIGMA, target=target)
        return found if target != "epsilon" else found[:1]

    assert torch.autograd.gradcheck(both, x0)
    assert torch.autograd.gradgradcheck(both, x0)


@pytest.mark.parametrize("dtype", (F32, BF16), ids=str)
@pytest.mark.parametrize("target", PREDICTIONS)
def test_gradient_of_each_output(target: str, dtype: torch.dtype) -> None:
    shape = (3, 4, 6)
    through_x, through_target = (randn([7 + i], shape)[0].to(dtype) for i in range(2))
    a, s = ALPHA.view(3, 1, 1), SIGMA.view(3, 1, 1)
    slope = {"epsilon": 0 * s, "sample": 1 + 0 * s, "v_prediction": -s, "flow": -1 + 0 * s}[target]
    for used in ("x", "target", "both"):
        x0 = clean(*shape[1:], dtype=dtype).requires_grad_()
        x, wanted = add_noise(x0, SEEDS, ALPHA, SIGMA, target=target)
        total = (through_x * x).sum() if used != "target" else torch.zeros((), dtype=dtype)
        if used != "x":
            total = total + (through_target * wanted).sum()
        if used == "target" and target == "epsilon":
            (got,) = torch.autograd.grad(total, x0, allow_unused=True, materialize_grads=True)
        else:
            (got,) = torch.autograd.grad(total, x0)
        parts = [a * through_x.float()] * (used != "target")
        parts += [slope * through_target.float()] * (used != "x")
        # x0 as its own target adds the second part outside of the op, in the dtype
        wide = [p.to(dtype) for p in parts] if target == "sample" else parts
        assert torch.equal(got, sum(wide).to(dtype))  # type: ignore[union-attr]


def test_autograd_keeps_the_coefficients_alone() -> None:
    x0 = clean(1000).requires_grad_()
    saved: list[torch.Tensor] = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        add_noise(x0, SEEDS, ALPHA, SIGMA)
    assert [tuple(t.shape) for t in saved] == [(3,), (3,)]


@pytest.mark.parametrize("target", PREDICTIONS)
@pytest.mark.parametrize("fmt", (PLAIN, LAST), ids=str)
def test_opcheck(target: str, fmt: torch.memory_format) -> None:
    given = (ALPHA, SIGMA, as_seeds(2, 3), 1, 4, target)
    x0 = clean(3, 4, 5, fmt=fmt).requires_grad_()
    torch.library.opcheck(torch.ops.fastdiff.add_noise.default, (x0, *given))
    with torch.no_grad():
        strided = x0.transpose(1, 3)
        torch.library.opcheck(torch.ops.fastdiff.add_noise.default, (strided, *given))


def test_compiles_without_a_graph_break_and_once_for_all_seeds() -> None:
    torch._dynamo.reset()
    graphs = CompileCounter()

    def f(x: torch.Tensor, seeds: Any, alpha: torch.Tensor) -> torch.Tensor:
        noisy, v = add_noise(2 * x, seeds, alpha, 1 - alpha, target="v_prediction")
        return (noisy * v).sum()

    compiled = torch.compile(f, fullgraph=True, backend=graphs)
    x0 = clean(33).requires_grad_()
    for seeds in (1, 5, 9, torch.arange(3), [3, 2**64 - 1, 1]):
        expected = torch.autograd.grad(f(x0, seeds, ALPHA), x0)[0]
        got = torch.autograd.grad(compiled(x0, seeds, ALPHA), x0)[0]
        assert_same_bits(got, expected, f"seeds {seeds}")
    # the first int is a constant, the second makes it a symbol; a tensor and a list are new types
    assert graphs.frame_count == 4
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:`torch.jit.script")  # inside torch.func
def test_func_grad_works_and_forward_mode_is_refused_aloud() -> None:
    x0 = clean(9)
    got = torch.func.grad(lambda x: add_noise(x, SEEDS, ALPHA, SIGMA)[0].sum())(x0)
    assert_same_bits(got, ALPHA.view(3, 1).expand(3, 9).contiguous())
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="forward mode"),
    ):
        add_noise(torch.autograd.forward_ad.make_dual(x0, x0), SEEDS, ALPHA, SIGMA)


def test_meta_tensors_have_the_shapes() -> None:
    x0 = torch.empty(3, 4, 5, 6, device="meta", dtype=BF16).contiguous(memory_format=LAST)
    for t in add_noise(x0, 0, 0.5, 0.5):
        assert t.is_meta and t.shape == x0.shape and t.dtype == BF16 and t.stride() == x0.stride()


# --- refusals ---------------------------------------------------------------------------------

GRADIENT = torch.ones(3, requires_grad=True)
REFUSED: dict[str, tuple[type[Exception], dict[str, Any], str]] = {
    "x0 is no tensor": (TypeError, {"x0": 1.5}, "x0 must be a float32, bfloat16, float16 or"),
    "integers": (TypeError, {"x0": torch.zeros(3, 2, dtype=torch.int64)}, "x0 must be a float32"),
    "scalar": (ValueError, {"x0": torch.zeros(())}, "x0 must have a batch axis, got a tensor of"),
    "target": (
        ValueError,
        {"target": "velocity"},
        "target must be one of 'epsilon', 'sample', 'v_prediction', 'flow', got 'velocity'",
    ),
    "alpha is a list": (TypeError, {"alpha": [1.0]}, "alpha must be a number, or a floating-point"),
    "alpha is a flag": (TypeError, {"alpha": True}, "alpha must be a number, or a floating-point"),
    "sigma of integers": (
        TypeError,
        {"sigma": torch.ones(3, dtype=torch.int64)},
        "sigma must be a number, or a floating-point array or tensor, got torch.int64",
    ),
    "whole times": (TypeError, {"alpha": np.arange(3)}, "alpha must be a number, or a floating"),
    "sigma of two": (ValueError, {"sigma": torch.ones(2)}, "sigma must have shape () or (3,), got"),
    "column": (ValueError, {"alpha": torch.ones(3, 1)}, "alpha must have shape () or (3,), got"),
    "not a number": (
        ValueError,
        {"sigma": math.nan},
        "sigma must be finite in torch.float32",
    ),
    "gradient": (ValueError, {"alpha": GRADIENT}, "alpha must not require a gradient, got one"),
    "seeds": (TypeError, {"seeds": 1.5}, "seeds must be integers, got float"),
    "seed count": (ValueError, {"seeds": [1]}, "seeds must have one entry a sample (3), got 1"),
    "step": (ValueError, {"step": -1}, "step must lie in [0, 2**32), got -1"),
    "stream": (TypeError, {"stream": 1.0}, "stream must be an integer, got float"),
}


@pytest.mark.parametrize(("error", "change", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals(error: type[Exception], change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"x0": clean(4), "seeds": 0, "alpha": ALPHA, "sigma": SIGMA, **change}
    with pytest.raises(error, match=re.escape(f"add_noise: {message}")):
        add_noise(**given)


def test_without_gradients_coefficients_that_require_one_are_values() -> None:
    with torch.no_grad():
        x, _ = add_noise(clean(4), SEEDS, GRADIENT, SIGMA)
    assert not x.requires_grad


def test_float64_is_for_the_reference_alone() -> None:
    answers = describe("add_noise", clean(4).double(), SEEDS, ALPHA, SIGMA)
    assert answers["reference"] == "chosen" and "dtype must be float32" in answers["cpu"]
    with use_backend("cpu"), pytest.raises(BackendError, match="dtype must be float32, bfloat16"):
        add_noise(clean(4).double(), SEEDS, ALPHA, SIGMA)
