"""Gated residual, normalisation and modulation of tokens in one pass: what a diffusion transformer
does between two matrix products. `gated_residual` is the same kernel without the second half."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch

from fastdiff.backends import Implementation, Op, choose, forced
from fastdiff.ops import _native
from fastdiff.ops._dispatch import Differentiable, values_only
from fastdiff.ops._modulate_checks import Modulate, arrange, check
from fastdiff.reference import modulate as reference

# --- backends -------------------------------------------------------------------------------


def _reference(call: Modulate) -> None:
    if call.out is None:
        assert call.residual is not None and call.total is not None  # one of the two is wanted
        call.total.copy_(reference.gated_residual(call.x, call.residual, call.gate))
        return
    out, total = reference.modulate(*call[:9])
    call.out.copy_(out)
    if call.total is not None:
        call.total.copy_(total)


def _cpu(call: Modulate) -> None:
    done = _native.extension.modulate(*call[:9], call.out is not None, call.out, call.total)
    if done is None:
        raise RuntimeError("modulate: the CPU kernel must take every arranged call, and did not")


def _refuse_dtype(call: Modulate) -> str | None:
    for t in call:
        if isinstance(t, torch.Tensor) and t.dtype not in _native.DTYPES:
            return f"tensors must be float32, bfloat16 or float16, got {t.dtype}"
    return None


def _refuse_cpu(call: Modulate) -> str | None:
    if not call.x.is_cpu:
        return f"tensors must be on the CPU, got {call.x.device}"
    if not _native.reads_tensors:
        return "this torch has no DLPack exchange table for its tensors"
    return _refuse_dtype(call)


def _refuse_triton(call: Modulate) -> str | None:
    return _native.refuse_triton(call.x) or _refuse_dtype(call)


def _refuse_cuda(call: Modulate) -> str | None:
    return _native.refuse_cuda(call.x) or _refuse_dtype(call)


def _load_triton() -> Callable[[Modulate], None]:
    from fastdiff.kernels.modulate import modulate

    return modulate  # type: ignore[no-any-return]


def _load_cuda() -> Callable[[Modulate], None]:
    from fastdiff.ops._cuda import modulate

    return modulate


OP = Op(
    "modulate",
    {
        "cpu": Implementation(lambda: _cpu, _refuse_cpu),
        "triton": Implementation(_load_triton, _refuse_triton),
        "cuda": Implementation(_load_cuda, _refuse_cuda),
        "reference": Implementation(lambda: _reference, lambda call: None),
    },
)


# --- the dispatcher and autograd ------------------------------------------------------------


def _results(call: Modulate) -> list[torch.Tensor]:
    return [t for t in (call.out, call.total) if t is not None]


def _forward(
    x: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    norm: str | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    gate: torch.Tensor | None,
    eps: float,
    modulated: bool,
) -> list[torch.Tensor]:
    call = arrange(x, scale, shift, norm, weight, bias, residual, gate, eps, modulated)
    if x.numel():
        choose(OP, call)[1](call)
    return _results(call)


def _fake(x: torch.Tensor, *rest: Any) -> list[torch.Tensor]:
    residual, modulated = rest[5], rest[8]
    call = arrange(x, None, None, None, None, None, residual, None, 0.0, modulated)
    return _results(call)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, scale, shift, ctx.norm, weight, bias, residual, gate, ctx.eps, ctx.modulated = inputs
    # x' is computed anew: kept, it would be one more tensor where x and residual are needed anyway
    ctx.save_for_backward(x, scale, shift, weight, bias, residual, gate)
    ctx.set_materialize_grads(False)  # an unused output then costs no zeros


def _backward(ctx: Any, grads: Any) -> tuple[Any, ...]:
    # plain PyTorch on every device, so that it differentiates again and torch.compile fuses it
    x, scale, shift, weight, bias, residual, gate = ctx.saved_tensors
    out = grads[0] if ctx.modulated else None
    total = grads[-1] if residual is not None else None
    if out is None and total is None:
        return (None,) * 10
    d_x, d_scale, d_shift, d_weight, d_bias, d_residual, d_gate = reference.modulate_backward(
        out, total, x, scale, shift, ctx.norm, weight, bias, residual, gate, ctx.eps
    )
    return d_x, d_scale, d_shift, None, d_weight, d_bias, d_residual, d_gate, None, None


_LIBRARY: Any = torch.library.Library("fastdiff", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    "modulate(Tensor x, Tensor? scale, Tensor? shift, str? norm, Tensor? weight, Tensor? bias,"
    " Tensor? residual, Tensor? gate, float eps, bool modulated) -> Tensor[]"
)
_LIBRARY.impl("modulate", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("fastdiff::modulate", _fake, lib=_LIBRARY)
torch.library.register_autograd(
    "fastdiff::modulate", _backward, setup_context=_setup_context, lib=_LIBRARY
)

_WAYS = Differentiable(
    torch.ops.fastdiff.modulate.default,
    lambda *inputs: tuple(_forward(*inputs)),
    _setup_context,
    lambda ctx, *grads: _backward(ctx, grads),
    vmap=True,
)


def _run(op: str, *inputs: Any) -> Any:
    """The results that are wanted, in a list or tuple."""
    x, scale, shift, norm, weight, bias, residual, gate, eps, _ = inputs
    tensors = (x, scale, shift, weight, bias, residual, gate)
    direct = values_only(tensors)
    # the checks in Python take longer than a small call; C++ takes what is plainly in order
    if direct and _native.reads_tensors and forced() in ("auto", "cpu"):
        done = _native.extension.modulate(*inputs, None, None)
        if done is not None:
            return done
    check(op, x, scale, shift, norm, weight, bias, residual, gate, eps)
    return _WAYS(tensors, inputs, direct)


# --- the ops --------------------------------------------------------------------------------


def prepare(
    x: torch.Tensor,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    *,
    norm: str | None = "layer",
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> Modulate:
    """The arguments of `modulate`, checked, with its results allocated."""
    check("modulate", x, scale, shift, norm, weight, bias, residual, gate, eps)
    return arrange(x, scale, shift, norm, weight, bias, residual, gate, eps, True)


@overload
def modulate(
    x: torch.Tensor,
    scale: torch.Tensor | None = ...,
    shift: torch.Tensor | None = ...,
    *,
    norm: str | None = ...,
    weight: torch.Tensor | None = ...,
    bias: torch.Tensor | None = ...,
    residual: None = ...,
    gate: None = ...,
    eps: float = ...,
) -> torch.Tensor: ...


@overload
def modulate(
    x: torch.Tensor,
    scale: torch.Tensor | None = ...,
    shift: torch.Tensor | None = ...,
    *,
    norm: str | None = ...,
    weight: torch.Tensor | None = ...,
    bias: torch.Tensor | None = ...,
    residual: torch.Tensor,
    gate: torch.Tensor | None = ...,
    eps: float = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...


def modulate(
    x: torch.Tensor,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    *,
    norm: str | None = "layer",
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """``norm(x) * (1 + scale) + shift``; with a residual, of ``x + gate * residual``.

    The adaptive normalisation of a diffusion transformer (adaLN-Zero: Peebles and Xie 2023,
    arXiv:2212.09748, section 3.2): a branch's output is gated and added, the sum is normalised
    (Ba et al. 2016, arXiv:1607.06450; RMS: Zhang and Sennrich 2019, arXiv:1910.07467) and modulated
    for the next branch, in one read of each input and one write of each result. Computed in
    float32, each result rounded once: the normalisation sees the sum before it is rounded.
    Differentiable to any order in every tensor; the backward pass is plain PyTorch, and autograd
    keeps the inputs alone.

    A token depends on its own channels alone: on one backend and instruction set its bits are the
    same in any batch and for any number of threads. They are not promised across backends.

    Args:
        x: (N, L, C) tokens, or (N, C); float32, bfloat16, float16, or float64 (reference backend
            only). Copied first where it is not contiguous, as residual is.
        scale, shift: (N, C) for every token of a sample, or the shape of x; any of these dtypes.
            Chunks of a wider tensor are read in place, where their last axis has stride 1.
        norm: "layer", "rms" or None for no normalisation.
        weight, bias: (C,), the affine part of the norm, applied before scale and shift.
        residual: output of the branch to add to x first: shape and dtype of x.
        gate: factor of the residual, 1 where it is None; shapes as scale.
        eps: added to the biased variance, or to the mean square.

    Returns:
        Without a residual the modulated tensor; with one the pair of it and of
        ``x + gate * residual``. Shape and dtype of x, contiguous.

    Raises:
        TypeError, ValueError: an argument breaks its rule.
        BackendError: the forced backend cannot do it.
    """
    results = _run("modulate", x, scale, shift, norm, weight, bias, residual, gate, eps, True)
    return results[0] if residual is None else (results[0], results[1])


def gated_residual(
    x: torch.Tensor, residual: torch.Tensor, gate: torch.Tensor | None = None
) -> torch.Tensor:
    """``x + gate * residual``: the first half of `modulate` alone, in the same kernel.

    Args:
        x, residual, gate: as in `modulate`.

    Returns, raises: as `modulate`.
    """
    if residual is None:
        raise TypeError("gated_residual: residual must be a floating-point tensor, got NoneType")
    results = _run("gated_residual", x, None, None, None, None, None, residual, gate, 0.0, False)
    return results[0]  # type: ignore[no-any-return]
