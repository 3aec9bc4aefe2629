"""Reparameterized sampling: z = mu + exp(logvar / 2) eps and its KL divergence, in one pass.

Kingma and Welling, "Auto-Encoding Variational Bayes", ICLR 2014, equation 10 and appendix B. The
noise is a function of the seed, so the backward pass draws it anew: nothing is stored for it but
mu, logvar and the seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import torch

from fastdiff.backends import Implementation, Op, choose, forced, use_backend
from fastdiff.ops import _native
from fastdiff.ops._dispatch import Differentiable, traced, values_only
from fastdiff.ops._reparameterize_checks import check
from fastdiff.ops._results import RESULTS
from fastdiff.ops.noise import Stream
from fastdiff.reference import reparameterize as reference
from fastdiff.reference.noise import normals

_REFERENCE_ONLY = "dtype must be float32, bfloat16 or float16, got {}"


class Reparameterize(NamedTuple):
    """Checked arguments of the forward pass, contiguous; backends fill ``z`` and ``kl``."""

    mu: torch.Tensor
    logvar: torch.Tensor
    seeds: torch.Tensor
    step: int
    stream: int
    low: float  # bounds of logvar
    high: float
    draws: int  # of each sample
    z: torch.Tensor
    kl: torch.Tensor


class ReparameterizeBackward(NamedTuple):
    """Checked arguments of the backward pass, contiguous; backends fill the two gradients."""

    grad_z: torch.Tensor | None
    grad_kl: torch.Tensor | None
    mu: torch.Tensor
    logvar: torch.Tensor
    seeds: torch.Tensor
    step: int
    stream: int
    low: float  # bounds of logvar
    high: float
    draws: int  # of each sample
    grad_mu: torch.Tensor
    grad_logvar: torch.Tensor


Call = Reparameterize | ReparameterizeBackward


# --- backends -------------------------------------------------------------------------------


def draw_stride(size: int) -> int:
    """Elements from one of several draws of a sample to the next: each starts at a block."""
    return (size + 3) // 4 * 4


def _noise(call: Call) -> torch.Tensor:
    seeds = call.seeds.cpu().numpy().view(np.uint64)
    if len(seeds) == 0:
        return torch.empty_like(call.mu, dtype=torch.float32)
    size = call.mu.numel() // len(seeds)
    starts = range(0, call.draws * draw_stride(size), max(1, draw_stride(size)))
    draws = [normals(seeds, size, call.step, call.stream, first) for first in starts]
    if not draws:  # of no elements
        draws = [np.empty((len(seeds), 0), np.float32)] * call.draws
    eps = torch.from_numpy(np.stack(draws, axis=1))
    return eps.view(len(seeds), call.draws, *call.mu.shape[1:]).to(call.mu.device)


def _reference(call: Reparameterize) -> None:
    bounds = (call.low, call.high)
    z, kl = reference.reparameterize(call.mu, call.logvar, _noise(call), bounds)
    call.z.copy_(z.view_as(call.z))
    call.kl.copy_(kl)


def _reference_backward(call: ReparameterizeBackward) -> None:
    bounds = (call.low, call.high)
    grad_mu, grad_logvar = reference.reparameterize_backward(
        call.grad_z, call.grad_kl, call.mu, call.logvar, _noise(call), bounds
    )
    call.grad_mu.copy_(grad_mu)
    call.grad_logvar.copy_(grad_logvar)


def _inputs(call: Call) -> tuple[int | float, ...]:
    """What both kernels of the extension take in the middle of their arguments."""
    mu, logvar = call.mu, call.logvar
    kind, seeds = _native.DTYPES[mu.dtype], call.seeds.data_ptr()
    count = mu.shape[0]
    size = mu.numel() // max(count, 1)
    more = (call.step, call.stream, call.low, call.high, call.draws, count, size)
    return mu.data_ptr(), logvar.data_ptr(), kind, seeds, *more


def _cpu(call: Reparameterize) -> None:
    outputs = (call.z.data_ptr(), call.kl.data_ptr())
    _native.extension.reparameterize(*_inputs(call), *outputs)


def _cpu_backward(call: ReparameterizeBackward) -> None:
    grads = (_native.address(call.grad_z), _native.address(call.grad_kl))
    outputs = (call.grad_mu.data_ptr(), call.grad_logvar.data_ptr())
    _native.extension.reparameterize_backward(*grads, *_inputs(call), *outputs)


def _refuse_dtype(call: Call) -> str | None:
    return None if call.mu.dtype in _native.DTYPES else _REFERENCE_ONLY.format(call.mu.dtype)


def _refuse_cpu(call: Call) -> str | None:
    if call.mu.device.type != "cpu":
        return f"tensors must be on the CPU, got {call.mu.device}"
    return _refuse_dtype(call)


def _refuse_triton(call: Call) -> str | None:
    return _native.refuse_triton(call.mu) or _refuse_dtype(call)


def _refuse_cuda(call: Call) -> str | None:
    return _native.refuse_cuda(call.mu) or _refuse_dtype(call)


def _kernel(module: str, name: str) -> Callable[[], Callable[[Any], None]]:
    """Imports a GPU kernel when it is first wanted, not before."""
    return lambda: getattr(import_module(module), name)


def _op(name: str, cpu: Callable[[Any], None], plain: Callable[[Any], None]) -> Op:
    triton = _kernel("fastdiff.kernels.reparameterize", name)
    backends = {
        "cpu": Implementation(lambda: cpu, _refuse_cpu),
        "triton": Implementation(triton, _refuse_triton),
        "cuda": Implementation(_kernel("fastdiff.ops._cuda", name), _refuse_cuda),
        "reference": Implementation(lambda: plain, lambda call: None),
    }
    return Op("reparameterize", backends)


OP = _op("reparameterize", _cpu, _reference)
_BACKWARD = _op("reparameterize_backward", _cpu_backward, _reference_backward)


# --- the dispatcher and autograd ------------------------------------------------------------

_Pair = tuple[torch.Tensor, torch.Tensor]


def _outputs(mu: torch.Tensor, samples: int | None) -> _Pair:
    kl = torch.float64 if mu.dtype == torch.float64 else torch.float32
    shape = mu.shape if samples is None else (mu.shape[0], samples, *mu.shape[1:])
    return RESULTS.new_empty(mu, shape), torch.empty(mu.shape[0], dtype=kl, device=mu.device)


def _forward(
    mu: torch.Tensor,
    logvar: torch.Tensor,
    seeds: torch.Tensor,
    step: int,
    stream: int,
    clamp: Sequence[float] | None = None,
    samples: int | None = None,
) -> _Pair:
    call = _call(mu, logvar, seeds, step, stream, clamp, samples)
    choose(OP, call)[1](call)
    return call.z, call.kl


def _call(
    mu: torch.Tensor,
    logvar: torch.Tensor,
    seeds: torch.Tensor,
    step: int,
    stream: int,
    clamp: Sequence[float] | None,
    samples: int | None,
) -> Reparameterize:
    inputs = (mu.contiguous(), logvar.contiguous(), seeds.contiguous())
    low, high = clamp or reference.UNBOUNDED
    draws = 1 if samples is None else samples
    return Reparameterize(*inputs, step, stream, low, high, draws, *_outputs(mu, samples))


def _gradients(mu: torch.Tensor) -> _Pair:
    return RESULTS.new_empty(mu, mu.shape), RESULTS.new_empty(mu, mu.shape)


def _backward(
    grad_z: torch.Tensor | None,
    grad_kl: torch.Tensor | None,
    mu: torch.Tensor,
    logvar: torch.Tensor,
    seeds: torch.Tensor,
    step: int,
    stream: int,
    clamp: Sequence[float] | None = None,
    samples: int | None = None,
) -> _Pair:
    grad_mu, grad_logvar = _gradients(mu)
    low, high = clamp or reference.UNBOUNDED
    call = ReparameterizeBackward(
        None if grad_z is None else grad_z.contiguous(),
        None if grad_kl is None else grad_kl.contiguous(),
        mu.contiguous(),
        logvar.contiguous(),
        seeds.contiguous(),
        step,
        stream,
        low,
        high,
        1 if samples is None else samples,
        grad_mu,
        grad_logvar,
    )
    choose(_BACKWARD, call)[1](call)
    return grad_mu, grad_logvar


_LIBRARY: Any = torch.library.Library("fastdiff", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    "reparameterize(Tensor mu, Tensor logvar, Tensor seeds, int step, int stream,"
    " float[]? clamp=None, int? samples=None) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "reparameterize_backward(Tensor? grad_z, Tensor? grad_kl, Tensor mu, Tensor logvar,"
    " Tensor seeds, int step, int stream, float[]? clamp=None, int? samples=None)"
    " -> (Tensor, Tensor)"
)
_LIBRARY.impl("reparameterize", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("reparameterize_backward", _backward, "CompositeExplicitAutograd")
_fake = torch.library.register_fake
_fake(
    "fastdiff::reparameterize",
    lambda mu, lv, seeds, step, stream, clamp=None, samples=None: _outputs(mu, samples),
    lib=_LIBRARY,
)
_fake(
    "fastdiff::reparameterize_backward",
    lambda gz, gkl, mu, *_, **__: _gradients(mu),
    lib=_LIBRARY,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    mu, logvar, seeds, *ctx.how = inputs
    ctx.save_for_backward(mu, logvar, seeds)
    ctx.set_materialize_grads(False)  # an unused output then costs no zeros
    ctx.backend = forced()  # the backward pass may run later or in another thread


def _backward_of(
    ctx: Any, grad_z: torch.Tensor | None, grad_kl: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    if grad_z is None and grad_kl is None:
        return (None,) * 7
    mu, logvar, seeds = ctx.saved_tensors
    if torch.is_grad_enabled():  # a second derivative is wanted: plain differentiable PyTorch
        grads = _differentiable(grad_z, grad_kl, mu, logvar, seeds, *ctx.how)
    else:
        run: Any = torch.ops.fastdiff.reparameterize_backward.default
        with use_backend(ctx.backend):
            grads = (run if traced((mu, logvar)) else _backward)(
                grad_z, grad_kl, mu, logvar, seeds, *ctx.how
            )
    return (*grads, *(None,) * 5)


def _differentiable(
    grad_z: torch.Tensor | None,
    grad_kl: torch.Tensor | None,
    mu: torch.Tensor,
    logvar: torch.Tensor,
    seeds: torch.Tensor,
    step: int,
    stream: int,
    clamp: Sequence[float] | None,
    samples: int | None,
) -> _Pair:
    """The reference's gradients in float64, where its exponential is one that autograd knows."""
    zero = torch.zeros_like(mu, dtype=torch.float32)
    eps, _ = reparameterize(zero, zero, seeds, step=step, stream=stream, samples=samples)
    grads = reference.reparameterize_backward(
        None if grad_z is None else grad_z.double(),
        None if grad_kl is None else grad_kl.double(),
        mu.double(),
        logvar.double(),
        eps,
        reference.UNBOUNDED if clamp is None else (clamp[0], clamp[1]),
    )
    return grads[0].to(mu.dtype), grads[1].to(mu.dtype)


_WAYS = Differentiable(
    torch.ops.fastdiff.reparameterize.default, _forward, _setup_context, _backward_of, vmap=False
)
torch.library.register_autograd(
    "fastdiff::reparameterize", _backward_of, setup_context=_setup_context, lib=_LIBRARY
)


# --- the op ---------------------------------------------------------------------------------


def prepare(
    mu: torch.Tensor,
    logvar: torch.Tensor,
    seeds: Any,
    *,
    step: int = 0,
    stream: int = Stream.REPARAMETERIZE,
    clamp: tuple[float, float] | None = None,
    samples: int | None = None,
) -> Reparameterize:
    """The arguments of `reparameterize`, checked, with its outputs allocated."""
    return _call(mu, logvar, *check(mu, logvar, seeds, step, stream, clamp, samples))


def reparameterize(
    mu: torch.Tensor,
    logvar: torch.Tensor,
    seeds: Any,
    *,
    step: int = 0,
    stream: int = Stream.REPARAMETERIZE,
    clamp: tuple[float, float] | None = None,
    samples: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A sample of N(mu, exp(logvar)) and that distribution's divergence from N(0, I), in one pass.

    ``z = mu + exp(logvar / 2) * eps`` with ``eps = randn(seeds, S, step=step, stream=stream)``:
    Kingma and Welling 2014, equation 10; ``kl = 1/2 sum(mu^2 + exp(logvar) - 1 - logvar)``, their
    appendix B. Differentiable in mu and logvar, to any order, through z and kl; the backward pass
    draws eps again, so autograd keeps mu, logvar and seeds alone.

    Image i depends on its own seed alone: z and kl of a sample are the same bits in any batch and
    for any number of threads, and z in float32 is the same bits on every backend. The kl is a sum,
    whose last bits a backend may choose.

    Args:
        mu: (N, *S) float32, bfloat16, float16, or float64 (reference backend only); any strides,
            copied first where it is not contiguous. 16-bit types are computed in float32.
        logvar: natural logarithm of the variance; shape, dtype and device of ``mu``. The standard
            deviation saturates for logvar < -172 and logvar > 176 (at exp(-86) and exp(88), and its
            gradient is that of the unsaturated formula); the float32 kl is inf from 88.8 on, where
            exp(logvar) is. NaN passes through to its own element of z and to the kl of its sample.
        seeds: an int s for s, s+1, ..., a sequence of N ints in [0, 2**64), or (N,) int64 tensor.
        step: counter of the draw, in [0, 2**32): advance it for fresh noise from the same seeds.
        stream: what the draw is for, in [0, 2**32).
        clamp: least and greatest logvar, as the decoders of latent diffusion bound it by
            (-30, 20): as `torch.clamp` before the op, but that a logvar on a bound keeps its
            gradient (as with torch before 2.15), that of a NaN is NaN, and bounds of 16-bit tensors
            are float32.
        samples: K samples of each distribution, as an importance-weighted bound wants them (Burda
            et al. 2016, arXiv:1509.00519): eps of sample k is elements k * M to k * M + size of the
            seed's sequence, where size is that of S and M the next multiple of 4; sample 0 is the
            one that a call without it draws. The kl is taken once.

    Returns:
        z: (N, *S), or (N, K, *S) with ``samples``; dtype of ``mu``, contiguous.
        kl: (N,) float32 (float64 where ``mu`` is), in nats.

    Raises:
        TypeError, ValueError: an argument breaks its rule.
        BackendError: the forced backend cannot do it.
    """
    checked = check(mu, logvar, seeds, step, stream, clamp, samples)
    tensors = (mu, logvar)
    direct = values_only(tensors)
    return _WAYS(tensors, (mu, logvar, *checked), direct)  # type: ignore[no-any-return]
