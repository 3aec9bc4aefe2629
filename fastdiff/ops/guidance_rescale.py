"""The factor that gives a guided output the contrast of the conditional one, a sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.autograd import forward_ad

from fastdiff.backends import Implementation, Op, choose
from fastdiff.ops import _native
from fastdiff.ops._checks import check_dense, check_memory, check_real, is_finite
from fastdiff.ops._layout import memory_format
from fastdiff.reference import guidance_rescale as reference

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class GuidanceRescale(NamedTuple):
    """Checked arguments; backends fill ``out``.

    Both model outputs have one memory order inside a sample, and their own stride between samples.
    """

    output: torch.Tensor
    uncond: torch.Tensor
    guidance: torch.Tensor  # (N,) float32
    phi: torch.Tensor  # (N,) float32
    out: torch.Tensor  # (N,) float32
    tracked: bool  # autograd wants a backward pass, or a tensor may have a tangent


# --- backends -------------------------------------------------------------------------------


def _reference(call: GuidanceRescale) -> None:
    # in float64: the sums of the kernels carry more than float32 too
    found = reference.guidance_rescale(
        call.output.double(), call.uncond.double(), call.guidance, call.phi
    )
    call.out.copy_(found)


def _cpu(call: GuidanceRescale) -> None:
    output, uncond = call.output, call.uncond
    samples = output.shape[0]
    _native.extension.guidance_rescale(
        output.data_ptr(),
        uncond.data_ptr(),
        _native.DTYPES[output.dtype],
        output.stride(0),
        uncond.stride(0),
        samples,
        output.numel() // max(samples, 1),
        call.guidance.data_ptr(),
        call.phi.data_ptr(),
        call.out.data_ptr(),
    )


def _refuse_dtype(call: GuidanceRescale) -> str | None:
    if call.tracked:
        return "the kernel has no backward pass or tangents (torch.no_grad(), or the reference)"
    if call.output.dtype not in _native.DTYPES:
        return f"dtype must be float32, bfloat16 or float16, got {call.output.dtype}"
    return None


def _refuse_cpu(call: GuidanceRescale) -> str | None:
    if not call.output.is_cpu:
        return f"tensors must be on the CPU, got {call.output.device}"
    return _refuse_dtype(call)


def _refuse_triton(call: GuidanceRescale) -> str | None:
    return _native.refuse_triton(call.output) or _refuse_dtype(call)


def _refuse_cuda(call: GuidanceRescale) -> str | None:
    return _native.refuse_cuda(call.output) or _refuse_dtype(call)


def _load_triton() -> Callable[[GuidanceRescale], None]:
    from fastdiff.kernels.guidance_rescale import guidance_rescale

    return guidance_rescale  # type: ignore[no-any-return]


def _load_cuda() -> Callable[[GuidanceRescale], None]:
    from fastdiff.ops._cuda import guidance_rescale

    return guidance_rescale


OP = Op(
    "guidance_rescale",
    {
        "cpu": Implementation(lambda: _cpu, _refuse_cpu),
        "triton": Implementation(_load_triton, _refuse_triton),
        "cuda": Implementation(_load_cuda, _refuse_cuda),
        "reference": Implementation(lambda: _reference, lambda call: None),
    },
)


# --- the op ---------------------------------------------------------------------------------


def _check_outputs(output: object, uncond: object) -> None:
    for name, t in (("output", output), ("uncond", uncond)):
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"guidance_rescale: {name} must be a tensor, got {type(t).__name__}")
        check_dense("guidance_rescale", name, t)
        check_memory("guidance_rescale", name, t)
    assert isinstance(output, torch.Tensor) and isinstance(uncond, torch.Tensor)
    if output.dtype not in _DTYPES:
        raise TypeError(
            f"guidance_rescale: output must be float32, bfloat16, float16 or float64, "
            f"got {output.dtype}"
        )
    if output.dim() == 0:
        raise ValueError("guidance_rescale: output must have shape (N, *S), got ()")
    if uncond.dtype != output.dtype:
        raise TypeError(f"guidance_rescale: uncond must be {output.dtype}, got {uncond.dtype}")
    for what in ("shape", "device"):
        ours, other = getattr(output, what), getattr(uncond, what)
        if ours != other:
            raise ValueError(
                f"guidance_rescale: uncond must have the {what} of output {ours}, got {other}"
            )


def _each(name: str, value: float | torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """One float32 a sample."""
    count = like.shape[0]
    if isinstance(value, torch.Tensor):
        if value.shape != (count,):
            raise ValueError(
                f"guidance_rescale: {name} must be a number or one a sample ({count},), "
                f"got {tuple(value.shape)}"
            )
        check_real("guidance_rescale", name, value)
        return value.to(like.device, torch.float32).contiguous()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"guidance_rescale: {name} must be a number, got {type(value).__name__}")
    if not is_finite(value, torch.float32):
        raise ValueError(f"guidance_rescale: {name} must be finite in float32, got {value}")
    return torch.full((count,), value, dtype=torch.float32, device=like.device)


def _in_one_order(output: torch.Tensor, uncond: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both with samples in the same memory order; copied where they are not."""
    fmt = memory_format(output[:1]) or torch.contiguous_format
    first, second = (
        t if t[:1].is_contiguous(memory_format=fmt) else t.contiguous(memory_format=fmt)
        for t in (output, uncond)
    )
    return first, second


def prepare(
    output: torch.Tensor,
    uncond: torch.Tensor,
    guidance: float | torch.Tensor,
    phi: float | torch.Tensor,
) -> GuidanceRescale:
    """The arguments of `guidance_rescale`, checked, with its result allocated."""
    _check_outputs(output, uncond)
    weights, shares = _each("guidance", guidance, output), _each("phi", phi, output)
    wide = output.dtype if output.dtype == torch.float64 else torch.float32
    out = torch.empty(output.shape[0], dtype=wide, device=output.device)
    check_memory("guidance_rescale", "out", out)  # a tracer may have made it
    tracked = torch.is_grad_enabled() and any(
        t.requires_grad for t in (output, uncond, weights, shares)
    )
    tracked = tracked or forward_ad._current_level >= 0
    return GuidanceRescale(*_in_one_order(output, uncond), weights, shares, out, tracked)


def guidance_rescale(
    output: torch.Tensor,
    uncond: torch.Tensor,
    guidance: float | torch.Tensor,
    phi: float | torch.Tensor,
) -> torch.Tensor:
    """The factor of rescaled guidance, one a sample, by one pass over both model outputs.

    ``phi * std(output) / std(guided) + 1 - phi`` with ``guided = uncond + w (output - uncond)``:
    Lin et al. 2023 (arXiv:2305.08891), section 3.4, equations 15 and 16; diffusers'
    ``rescale_noise_cfg`` multiplies by the same. A standard deviation is over all elements of a
    sample, so a sample's factor depends on that sample alone: the same bits in any batch and for
    any number of threads. Sums are float64, or float32 in short runs that float64 adds up; their
    last bits are a backend's own. Give it to `reverse_step` as ``scale``.

    Args:
        output: (N, *S) conditional model output: float32, bfloat16, float16, or float64 (reference
            backend only); samples of any stride, copied first where one is not dense.
        uncond: the unconditional output; shape, dtype and device of ``output``.
        guidance: weight w, a number or (N,) float32.
        phi: share of the rescaled output, dimensionless, 0 to 1; a number or (N,) float32.

    Returns:
        (N,) float32 (float64 where ``output`` is); 1 where the guided output is constant.

    Raises:
        TypeError, ValueError: an argument breaks its rule.
        BackendError: the forced backend cannot do it; none but the reference has a backward pass.
    """
    call = prepare(output, uncond, guidance, phi)
    choose(OP, call)[1](call)
    return call.out
