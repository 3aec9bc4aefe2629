"""Group normalisation, FiLM, activation and residual in one pass: what a U-Net does between two
convolutions. `film` is the same kernel without the normalisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastdiff.backends import Implementation, Op, choose, forced
from fastdiff.ops import _native
from fastdiff.ops._dispatch import Differentiable, values_only
from fastdiff.ops._film_checks import FilmNorm, arrange, check
from fastdiff.reference import film_norm as reference

# --- backends -------------------------------------------------------------------------------


def _reference(call: FilmNorm) -> None:
    call.out.copy_(reference.film_norm(*call[:10]))


def _cpu(call: FilmNorm) -> None:
    done = _native.extension.film_norm(*call[:11])
    if done is None:
        raise RuntimeError("film_norm: the CPU kernel must take every arranged call, and did not")


def _refuse_dtype(call: FilmNorm) -> str | None:
    for t in (call.x, call.weight, call.bias, call.scale, call.shift):
        if t is not None and t.dtype not in _native.DTYPES:
            return f"tensors must be float32, bfloat16 or float16, got {t.dtype}"
    return None


def _refuse_cpu(call: FilmNorm) -> str | None:
    if not call.x.is_cpu:
        return f"tensors must be on the CPU, got {call.x.device}"
    if not _native.reads_tensors:
        return "this torch has no DLPack exchange table for its tensors"
    return _refuse_dtype(call)


def _refuse_triton(call: FilmNorm) -> str | None:
    return _native.refuse_triton(call.x) or _refuse_dtype(call)


def _refuse_cuda(call: FilmNorm) -> str | None:
    return _native.refuse_cuda(call.x) or _refuse_dtype(call)


def _load_triton() -> Callable[[FilmNorm], None]:
    from fastdiff.kernels.film_norm import film_norm

    return film_norm  # type: ignore[no-any-return]


def _load_cuda() -> Callable[[FilmNorm], None]:
    from fastdiff.ops._cuda import film_norm

    return film_norm


OP = Op(
    "film_norm",
    {
        "cpu": Implementation(lambda: _cpu, _refuse_cpu),
        "triton": Implementation(_load_triton, _refuse_triton),
        "cuda": Implementation(_load_cuda, _refuse_cuda),
        "reference": Implementation(lambda: _reference, lambda call: None),
    },
)


# --- the dispatcher and autograd ------------------------------------------------------------

Film = tuple[torch.Tensor | None, ...]  # weight, bias, scale, shift


def _forward(
    x: torch.Tensor,
    groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    act: str | None,
    residual: torch.Tensor | None,
    eps: float,
    plus_one: bool,
) -> torch.Tensor:
    call = arrange(x, groups, weight, bias, scale, shift, act, residual, eps, plus_one)
    if call.x.numel():
        choose(OP, call)[1](call)
    return call.out


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, ctx.groups, weight, bias, scale, shift, ctx.act, residual, ctx.eps, ctx.plus_one = inputs
    ctx.has_residual = residual is not None
    ctx.save_for_backward(x, weight, bias, scale, shift)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    # plain PyTorch on every device, so that it differentiates again and torch.compile fuses it
    x, weight, bias, scale, shift = ctx.saved_tensors
    d_x, d_weight, d_bias, d_scale, d_shift = reference.film_norm_backward(
        grad, x, ctx.groups, weight, bias, scale, shift, ctx.act, ctx.eps, ctx.plus_one
    )
    d_residual = grad if ctx.has_residual else None
    return d_x, None, d_weight, d_bias, d_scale, d_shift, None, d_residual, None, None


_LIBRARY: Any = torch.library.Library("fastdiff", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    "film_norm(Tensor x, int groups, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift,"
    " str? act, Tensor? residual, float eps, bool plus_one) -> Tensor"
)
_LIBRARY.impl("film_norm", _forward, "CompositeExplicitAutograd")
torch.library.register_fake(
    "fastdiff::film_norm", lambda x, *_: arrange(x, 0, *(None,) * 6, 0.0, True).out, lib=_LIBRARY
)
torch.library.register_autograd(
    "fastdiff::film_norm", _backward, setup_context=_setup_context, lib=_LIBRARY
)

_WAYS = Differentiable(
    torch.ops.fastdiff.film_norm.default, _forward, _setup_context, _backward, vmap=True
)


def _run(op: str, *inputs: Any) -> torch.Tensor:
    x, groups, weight, bias, scale, shift, act, residual, eps, _ = inputs
    tensors = (x, weight, bias, scale, shift, residual)
    direct = values_only(tensors)
    if (
        direct
        and _native.reads_tensors
        and type(groups) is int
        and (0 < groups < 1 << 31 or op == "film")
        and forced() in ("auto", "cpu")
    ):
        # the checks below cost more than a small image; C++ takes what is plainly in order
        done = _native.extension.film_norm(*inputs, None)
        if done is not None:
            return done  # type: ignore[no-any-return]
    check(op, x, groups, weight, bias, scale, shift, act, residual, eps)
    return _WAYS(tensors, inputs, direct)  # type: ignore[no-any-return]


# --- the ops --------------------------------------------------------------------------------


def prepare(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    act: str | None = None,
    residual: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> FilmNorm:
    """The arguments of `film_norm`, checked, with its result allocated."""
    check("film_norm", x, num_groups, weight, bias, scale, shift, act, residual, eps)
    return arrange(x, num_groups, weight, bias, scale, shift, act, residual, eps, True)


def film_norm(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    act: str | None = None,
    residual: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """``act(group_norm(x) * (1 + scale) + shift) + residual``, each part but the norm optional.

    Group normalisation (Wu and He 2018, arXiv:1803.08494) modulated by FiLM (Perez et al. 2018,
    arXiv:1709.07871) as Dhariwal and Nichol 2021 (arXiv:2105.05233) do it, in two reads and one
    write of memory at most. Computed in float32 and rounded once. Differentiable to any order in
    every tensor; the backward pass is plain PyTorch.

    Args:
        x: (N, C, *S) float32, bfloat16, float16, or float64 (reference backend only); contiguous
            and channels_last are read as they are, any other order is copied first.
        num_groups: divides C.
        weight, bias: (C,), any of these dtypes.
        scale, shift: (N, C), any of these dtypes; scale is applied as ``1 + scale``.
        act: None or "silu".
        residual: (N, C, *S), dtype of x, added last.
        eps: added to the biased variance.

    Returns:
        (N, C, *S), dtype and memory order of x.

    Raises:
        TypeError, ValueError: an argument breaks its rule.
        BackendError: the forced backend cannot do it.
    """
    return _run("film_norm", x, num_groups, weight, bias, scale, shift, act, residual, eps, True)


def film(
    x: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    *,
    plus_one: bool = False,
    act: str | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """``act(x * scale + shift) + residual``: feature-wise linear modulation alone.

    Perez et al. 2018 (arXiv:1709.07871), equation 2.

    Args:
        x, act, residual: as in `film_norm`.
        scale, shift: (N, C); None leaves the part out.
        plus_one: multiply by ``1 + scale`` instead.

    Returns, raises: as `film_norm`.
    """
    return _run("film", x, 0, None, None, scale, shift, act, residual, 0.0, bool(plus_one))
