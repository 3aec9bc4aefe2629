"""The forward process of training: x = alpha x0 + sigma eps and what a model should predict of it.

Ho et al. 2020 (arXiv:2006.11239), equation 4, with alpha and sigma of each sample's own time. The
noise is a function of the seed, drawn where it is used and never stored.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import torch

from fastdiff.backends import Implementation, Op, choose
from fastdiff.ops import _native
from fastdiff.ops._checks import FLOATS, check_choice, check_counter, check_dense, is_finite, kind
from fastdiff.ops._dispatch import Differentiable, values_only
from fastdiff.ops._layout import channels, memory_format
from fastdiff.ops._results import RESULTS
from fastdiff.ops.noise import Stream, seeds_of
from fastdiff.reference import add_noise as reference
from fastdiff.reference.diffusion import PREDICTIONS
from fastdiff.reference.noise import normals


class AddNoise(NamedTuple):
    """Checked arguments; backends fill ``x`` and ``wanted``."""

    x0: torch.Tensor  # in the memory format of x
    alpha: torch.Tensor  # (N,) float32, float64 where x0 is; so is sigma
    sigma: torch.Tensor
    seeds: torch.Tensor
    step: int
    stream: int
    target: str
    x: torch.Tensor
    wanted: torch.Tensor | None  # like x; None where the target is x0 itself


# --- backends -------------------------------------------------------------------------------


def _reference(call: AddNoise) -> None:
    x0 = call.x0
    if x0.numel() == 0:
        return
    seeds = call.seeds.cpu().numpy().view(np.uint64)
    eps = torch.from_numpy(normals(seeds, x0[0].numel(), call.step, call.stream))
    eps = eps.view(x0.shape).to(x0.device)
    x, wanted = reference.add_noise(x0, eps, call.alpha, call.sigma, call.target)
    call.x.copy_(x)
    if call.wanted is not None:
        call.wanted.copy_(wanted)


def _cpu(call: AddNoise) -> None:
    x = call.x
    fmt = memory_format(x)
    assert fmt is not None  # `_outputs` makes no other
    samples = x.shape[0]
    _native.extension.add_noise(
        call.x0.data_ptr(),
        _native.DTYPES[x.dtype],
        call.alpha.data_ptr(),
        call.sigma.data_ptr(),
        call.seeds.data_ptr(),
        call.step,
        call.stream,
        samples,
        x.numel() // samples if samples else 0,
        channels(x, fmt),
        PREDICTIONS.index(call.target),
        x.data_ptr(),
        _native.address(call.wanted),
    )


def _refuse_dtype(call: AddNoise) -> str | None:
    if call.x0.dtype in _native.DTYPES:
        return None
    return f"dtype must be float32, bfloat16 or float16, got {call.x0.dtype}"


def _refuse_cpu(call: AddNoise) -> str | None:
    if call.x0.device.type != "cpu":
        return f"tensors must be on the CPU, got {call.x0.device}"
    return _refuse_dtype(call)


def _refuse_triton(call: AddNoise) -> str | None:
    return _native.refuse_triton(call.x0) or _refuse_dtype(call)


def _refuse_cuda(call: AddNoise) -> str | None:
    return _native.refuse_cuda(call.x0) or _refuse_dtype(call)


def _kernel(module: str) -> Callable[[], Callable[[Any], None]]:
    """Imports a GPU kernel when it is first wanted, not before."""
    return lambda: import_module(module).add_noise


OP = Op(
    "add_noise",
    {
        "cpu": Implementation(lambda: _cpu, _refuse_cpu),
        "triton": Implementation(_kernel("fastdiff.kernels.add_noise"), _refuse_triton),
        "cuda": Implementation(_kernel("fastdiff.ops._cuda"), _refuse_cuda),
        "reference": Implementation(lambda: _reference, lambda call: None),
    },
)


# --- the dispatcher and autograd ------------------------------------------------------------

_Pair = tuple[torch.Tensor, torch.Tensor]


def _outputs(x0: torch.Tensor, target: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    walked = memory_format(x0) is not None
    x = RESULTS.empty_like(x0) if walked else RESULTS.new_empty(x0, x0.shape)
    return x, None if target == "sample" else RESULTS.empty_like(x)


def _call(
    x0: torch.Tensor,
    alpha: torch.Tensor,
    sigma: torch.Tensor,
    seeds: torch.Tensor,
    step: int,
    stream: int,
    target: str,
) -> AddNoise:
    x, wanted = _outputs(x0, target)
    if memory_format(x0) is None:
        x0 = x0.contiguous()
    coefficients = (alpha.contiguous(), sigma.contiguous(), seeds.contiguous())
    return AddNoise(x0, *coefficients, step, stream, target, x, wanted)


def _pair(x: torch.Tensor, wanted: torch.Tensor | None) -> _Pair:
    # an operator of torch may not return its input: without a target there is nothing to see
    return x, x.new_empty(0) if wanted is None else wanted


def _forward(*inputs: Any) -> _Pair:
    call = _call(*inputs)
    choose(OP, call)[1](call)
    return _pair(call.x, call.wanted)


_LIBRARY: Any = torch.library.Library("fastdiff", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    "add_noise(Tensor x0, Tensor alpha, Tensor sigma, Tensor seeds, int step, int stream,"
    " str target) -> (Tensor, Tensor)"
)
_LIBRARY.impl("add_noise", _forward, "CompositeExplicitAutograd")
torch.library.register_fake(
    "fastdiff::add_noise",
    lambda x0, alpha, sigma, seeds, step, stream, target: _pair(*_outputs(x0, target)),
    lib=_LIBRARY,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, alpha, sigma, *_, ctx.target = inputs
    ctx.save_for_backward(alpha, sigma)
    ctx.set_materialize_grads(False)  # an unused output then costs no zeros


def _backward_of(
    ctx: Any, grad_x: torch.Tensor | None, grad_target: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    alpha, sigma = ctx.saved_tensors
    grad = reference.add_noise_backward(grad_x, grad_target, alpha, sigma, ctx.target)
    return (grad, *(None,) * 6)


_WAYS = Differentiable(
    torch.ops.fastdiff.add_noise.default, _forward, _setup_context, _backward_of, vmap=False
)
torch.library.register_autograd(
    "fastdiff::add_noise", _backward_of, setup_context=_setup_context, lib=_LIBRARY
)


# --- the op ---------------------------------------------------------------------------------


def _coefficient(name: str, value: Any, x0: torch.Tensor) -> torch.Tensor:
    dtype = torch.float64 if x0.dtype == torch.float64 else torch.float32
    count = x0.shape[0]
    if isinstance(value, (int, float, np.floating)) and not isinstance(value, bool):
        if not is_finite(value, dtype):
            raise ValueError(f"add_noise: {name} must be finite in {dtype}, got {value}")
        return torch.full((count,), float(value), dtype=dtype, device=x0.device)
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        value = torch.from_numpy(np.array(value, np.float64))  # which holds every kind
    if not isinstance(value, torch.Tensor) or value.dtype not in FLOATS:
        rule = "be a number, or a floating-point array or tensor"
        raise TypeError(f"add_noise: {name} must {rule}, got {kind(value)}")
    if tuple(value.shape) not in ((), (count,)):
        raise ValueError(
            f"add_noise: {name} must have shape () or ({count},), got {tuple(value.shape)}"
        )
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"add_noise: {name} must not require a gradient, got one that does")
    return value.to(device=x0.device, dtype=dtype).expand(count).contiguous()


def _check(
    x0: Any, seeds: Any, alpha: Any, sigma: Any, target: Any, step: Any, stream: Any
) -> tuple[Any, ...]:
    if not isinstance(x0, torch.Tensor) or x0.dtype not in FLOATS:
        rule = "be a float32, bfloat16, float16 or float64 tensor"
        raise TypeError(f"add_noise: x0 must {rule}, got {kind(x0)}")
    if x0.dim() == 0:
        raise ValueError("add_noise: x0 must have a batch axis, got a tensor of shape ()")
    check_dense("add_noise", "x0", x0)
    check_choice("add_noise", "target", target, PREDICTIONS)
    counters = (("step", step), ("stream", stream))
    step, stream = (check_counter("add_noise", *counter) for counter in counters)
    a, s = _coefficient("alpha", alpha, x0), _coefficient("sigma", sigma, x0)
    return x0, a, s, seeds_of("add_noise", seeds, x0), step, stream, target


def prepare(
    x0: torch.Tensor,
    seeds: Any,
    alpha: Any,
    sigma: Any,
    *,
    target: str = "epsilon",
    step: int = 0,
    stream: int = Stream.FORWARD,
) -> AddNoise:
    """The arguments of `add_noise`, checked, with its outputs allocated."""
    return _call(*_check(x0, seeds, alpha, sigma, target, step, stream))


def add_noise(
    x0: torch.Tensor,
    seeds: Any,
    alpha: Any,
    sigma: Any,
    *,
    target: str = "epsilon",
    step: int = 0,
    stream: int = Stream.FORWARD,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy data and the training target of each sample at its own time, in one pass.

    ``x = alpha * x0 + sigma * eps`` with ``eps = randn(seeds, S, step=step, stream=stream)``: Ho
    et al. 2020 (arXiv:2006.11239), equation 4. Sample i depends on its own seed alone, and the
    results are the same bits in any batch, memory format and on every backend.

    Differentiable in x0, to any order, through both results; autograd keeps alpha and sigma alone.

    Args:
        x0: (N, *S) clean data, float32, bfloat16, float16, or float64 (reference backend only);
            contiguous or channels_last, copied first where it is neither. 16-bit types are
            computed in float32 and rounded once.
        seeds: an int s for s, s+1, ..., a sequence of N ints in [0, 2**64), or (N,) int64 tensor.
        alpha, sigma: scales of signal and noise: a number for all samples, or a floating-point
            array or tensor of shape () or (N,), as `Schedule.alpha(t)` and `Schedule.sigma(t)`
            give them; rounded to float32 and moved to the device of x0.
        target: "epsilon": eps. "v_prediction": alpha * eps - sigma * x0 (Salimans and Ho 2022,
            arXiv:2202.00512). "flow": eps - x0 (Liu et al. 2022, arXiv:2209.03003). "sample": x0
            itself is returned, and nothing written for it.
        step: counter of the draw, in [0, 2**32): the training step, for fresh noise from the same
            seeds.
        stream: what the draw is for, in [0, 2**32).

    Returns:
        x and the target, shape, dtype and memory format of ``x0``.

    Raises:
        TypeError, ValueError: an argument breaks its rule.
        BackendError: the forced backend cannot do it.
    """
    inputs = _check(x0, seeds, alpha, sigma, target, step, stream)
    x, wanted = _WAYS(inputs[:3], inputs, values_only(inputs[:1]))
    return x, x0 if target == "sample" else wanted
