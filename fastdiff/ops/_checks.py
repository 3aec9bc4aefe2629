"""What more than one op asks of its arguments, in the same words."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch._subclasses import FakeTensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def kind(value: object) -> str:
    """What an error says that it got: the dtype of a tensor, the class of anything else."""
    return str(value.dtype) if isinstance(value, torch.Tensor) else type(value).__name__


def is_finite(value: float | np.integer | np.floating, dtype: torch.dtype) -> bool:
    """Whether the dtype holds the number, which may be an int beyond every float."""
    try:
        return abs(float(value)) <= torch.finfo(dtype).max
    except OverflowError:
        return False


def check_real(op: str, name: str, t: torch.Tensor) -> None:
    """Weights may be of any dtype, but no part of one is dropped."""
    if t.is_complex():
        raise TypeError(f"{op}: {name} must be real, got {t.dtype}")


def check_dense(op: str, name: str, t: torch.Tensor) -> None:
    """Memory with strides, which kernels read."""
    if t.layout != torch.strided:
        raise TypeError(f"{op}: {name} must be a dense tensor, got {t.layout}")


def check_memory(op: str, name: str, t: torch.Tensor) -> None:
    """Memory that a kernel finds by its address: tensors of tracing have none, nor have those of
    subclasses that hold other tensors."""
    if type(t) is torch.Tensor or not t.numel():
        return
    if isinstance(t, FakeTensor) or not t.data_ptr():  # the former warns when it is asked
        raise TypeError(f"{op}: {name} must have memory of its own, got {type(t).__name__}")


def check_input(op: str, x: object) -> None:
    if not isinstance(x, torch.Tensor) or x.dtype not in FLOATS:
        raise TypeError(
            f"{op}: x must be a float32, bfloat16, float16 or float64 tensor, got {kind(x)}"
        )
    check_dense(op, "x", x)


def check_tensor(op: str, name: str, t: object, x: torch.Tensor, *shapes: tuple[int, ...]) -> None:
    """A floating-point tensor of one of these shapes on the device of x; None passes."""
    if t is None:
        return
    if not isinstance(t, torch.Tensor) or t.dtype not in FLOATS:
        raise TypeError(f"{op}: {name} must be a floating-point tensor, got {kind(t)}")
    check_dense(op, name, t)
    if tuple(t.shape) not in shapes:
        rule = " or ".join(map(str, dict.fromkeys(shapes)))
        raise ValueError(f"{op}: {name} must have shape {rule}, got {tuple(t.shape)}")
    if t.device != x.device:
        raise ValueError(f"{op}: {name} must be on the device of x {x.device}, got {t.device}")


def check_residual(op: str, residual: torch.Tensor | None, x: torch.Tensor) -> None:
    """Of the shape and dtype of x, or None."""
    check_tensor(op, "residual", residual, x, tuple(x.shape))
    if residual is not None and residual.dtype != x.dtype:
        raise TypeError(f"{op}: residual must have the dtype of x {x.dtype}, got {residual.dtype}")


def check_counter(op: str, name: str, value: object) -> int:
    """A 32-bit word of a noise counter."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{op}: {name} must be an integer, got {type(value).__name__}")
    word = int(value)  # torch 2.11 cannot trace comparisons of a `Stream`
    if not 0 <= word < 1 << 32:
        raise ValueError(f"{op}: {name} must lie in [0, 2**32), got {value}")
    return word


def check_eps(op: str, eps: object) -> None:
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"{op}: eps must be a number, got {type(eps).__name__}")
    if not (is_finite(eps, torch.float64) and eps >= 0):
        raise ValueError(f"{op}: eps must be finite and not negative, got {eps}")


def check_choice(op: str, name: str, value: object, choices: Collection[object]) -> None:
    if not isinstance(value, (str, type(None))) or value not in choices:
        names = ", ".join(map(repr, choices))
        raise ValueError(f"{op}: {name} must be one of {names}, got {value!r}")


def check_shape(op: str, shape: object) -> None:
    """The shape of one sample."""
    if not isinstance(shape, Sequence) or not all(hasattr(n, "__index__") for n in shape):
        raise TypeError(f"{op}: shape must be a sequence of ints, got {shape!r}")
    if any(not 0 <= n < 1 << 63 for n in shape):
        raise ValueError(f"{op}: shape must lie in [0, 2**63), got {tuple(shape)}")


def check_dtype(op: str, dtype: object) -> None:
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"{op}: dtype must be a floating-point type, got {dtype}")


def one_dtype(*group: torch.Tensor | None) -> list[torch.Tensor | None]:
    """All in one dtype that holds each, entries of the last axis side by side."""
    found = [t.dtype for t in group if t is not None]
    wide = found[0] if found else torch.float32
    for dtype in found[1:]:
        wide = torch.promote_types(wide, dtype)
    converted = (t if t is None else t.to(wide) for t in group)
    return [t if t is None or t.stride(-1) == 1 else t.contiguous() for t in converted]
