"""Noise as a function: ``noise(seed, stream, step, element)``, the same bits on every backend.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw, SC 2011) under a Box-Muller transform built from
multiplications, additions and a correctly rounded square root. Image i depends on its own seed
alone: not on batch size, thread count, device, memory format or the order of calls.

The stream is frozen: a change of any bit needs a new stream number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import torch

from fastdiff.backends import Implementation, Op, choose
from fastdiff.ops import _native
from fastdiff.ops._checks import check_counter, check_dtype, check_memory, check_shape
from fastdiff.ops._layout import channels, check_written, memory_format
from fastdiff.ops._results import RESULTS
from fastdiff.reference.noise import normals

_SEED_LIMIT = 1 << 64


class Stream(IntEnum):
    """What a draw is for; streams of one seed are independent."""

    INITIAL = 0
    STEP = 1
    CHURN = 2
    REPARAMETERIZE = 3
    FORWARD = 4
    BROWNIAN = 5
    LABEL = 6


class Draw(NamedTuple):
    """Checked arguments of one draw; backends fill ``out``."""

    seeds: torch.Tensor
    step: int
    stream: int
    out: torch.Tensor


def _reference(draw: Draw) -> None:
    seeds = draw.seeds.cpu().numpy().view(np.uint64)
    size = draw.out[0].numel() if len(draw.out) else 0
    z = torch.from_numpy(normals(seeds, size, draw.step, draw.stream))
    draw.out.copy_(z.view(draw.out.shape))


def _cpu(draw: Draw) -> None:
    out = draw.out
    fmt = memory_format(out)
    assert fmt is not None  # _refuse_cpu let it pass
    samples = out.shape[0]
    _native.extension.noise(
        draw.seeds.data_ptr(),
        draw.step,
        draw.stream,
        samples,
        out.numel() // samples if samples else 0,
        channels(out, fmt),
        out.data_ptr(),
        _native.DTYPES[out.dtype],
    )


def _refuse_layout(out: torch.Tensor) -> str | None:
    if out.dtype not in _native.DTYPES:
        return f"dtype must be float32, bfloat16 or float16, got {out.dtype}"
    if memory_format(out) is None:
        return f"out must be contiguous or channels_last, got strides {out.stride()}"
    return None


def _refuse_cpu(draw: Draw) -> str | None:
    if draw.out.device.type != "cpu":
        return f"out must be on the CPU, got {draw.out.device}"
    return _refuse_layout(draw.out)


def _refuse_triton(draw: Draw) -> str | None:
    return _native.refuse_triton(draw.out) or _refuse_layout(draw.out)


def _refuse_cuda(draw: Draw) -> str | None:
    return _native.refuse_cuda(draw.out) or _refuse_layout(draw.out)


def _load_triton() -> Callable[[Draw], None]:
    from fastdiff.kernels.noise import noise

    return noise  # type: ignore[no-any-return]


def _load_cuda() -> Callable[[Draw], None]:
    from fastdiff.ops._cuda import noise

    return noise


OP = Op(
    "noise",
    {
        "cpu": Implementation(lambda: _cpu, _refuse_cpu),
        "triton": Implementation(_load_triton, _refuse_triton),
        "cuda": Implementation(_load_cuda, _refuse_cuda),
        "reference": Implementation(lambda: _reference, lambda draw: None),
    },
)


def as_seeds(seeds: Any, count: int | None = None, *, where: str = "seeds") -> torch.Tensor:
    """Seeds as an int64 tensor on the CPU, the bit pattern of the unsigned 64-bit seeds.

    Args:
        seeds: an int s for s, s+1, ... (``count`` of them, one where it is None), a sequence of
            ints in [0, 2**64), or an int64 tensor of shape (count,).
        count: number of samples, checked.

    Raises:
        TypeError: seeds are not integers.
        ValueError: a seed is out of range, or their number is not ``count``.
    """
    if isinstance(seeds, torch.Tensor):
        if seeds.dtype != torch.int64 or seeds.dim() != 1:
            raise TypeError(
                f"{where}: seeds must be a 1-D int64 tensor, got {seeds.dim()}-D {seeds.dtype}"
            )
        values = seeds
    else:
        if isinstance(seeds, (bool, float, str)) or seeds is None:
            raise TypeError(f"{where}: seeds must be integers, got {type(seeds).__name__}")
        if isinstance(seeds, (int, np.integer)):
            listed = [int(seeds) + i for i in range(1 if count is None else count)]
        else:
            if not isinstance(seeds, (Sequence, np.ndarray)) or isinstance(seeds, bytes):
                raise TypeError(f"{where}: seeds must be a sequence, got {type(seeds).__name__}")
            listed = []
            for s in seeds:
                if isinstance(s, bool) or not isinstance(s, (int, np.integer)):
                    raise TypeError(f"{where}: seeds must be integers, got {type(s).__name__}")
                listed.append(int(s))
        for s in listed:
            if not 0 <= s < _SEED_LIMIT:
                raise ValueError(f"{where}: seeds must lie in [0, 2**64), got {s}")
        values = torch.from_numpy(np.array(listed, dtype=np.uint64).view(np.int64))
    if count is not None and values.shape[0] != count:
        raise ValueError(
            f"{where}: seeds must have one entry a sample ({count}), got {values.shape[0]}"
        )
    return values


def seeds_of(where: str, seeds: Any, x: torch.Tensor) -> torch.Tensor:
    """`as_seeds` with one entry a sample of x, on its device."""
    count = x.shape[0]
    if type(seeds) is int and 0 <= seeds < (1 << 63) - count:
        # made where they are needed: no list, no copy to the device, and torch.compile follows
        return torch.arange(seeds, seeds + count, device=x.device)
    # torch.compile cannot follow the uint64 of as_seeds; what that would refuse, it gets
    listed = torch.compiler.is_compiling() and isinstance(seeds, (list, tuple))
    if listed and all(type(s) is int and 0 <= s < 1 << 64 for s in seeds):
        seeds = torch.tensor([s - (s >> 63 << 64) for s in seeds], dtype=torch.int64)
    values = as_seeds(seeds, count, where=where)
    return values if values.device == x.device else values.to(x.device)


def prepare(
    seeds: Any,
    shape: Sequence[int],
    *,
    step: int = 0,
    stream: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    out: torch.Tensor | None = None,
) -> Draw:
    """The arguments of `randn`, checked, with its output allocated."""
    values = as_seeds(seeds, where="randn")
    check_memory("randn", "seeds", values)  # under a tracer, those of a list have none
    step, stream = check_counter("randn", "step", step), check_counter("randn", "stream", stream)
    check_shape("randn", shape)
    if out is not None and not isinstance(out, torch.Tensor):
        raise TypeError(f"randn: out must be a tensor, got {type(out).__name__}")
    full = (values.shape[0], *shape)
    if out is None:
        check_dtype("randn", dtype)
        out = RESULTS.new_empty(values, full, dtype, device)
        check_memory("randn", "out", out)  # a tracer may have made it
    elif out.shape != full:
        raise ValueError(f"randn: out must have shape {full}, got {tuple(out.shape)}")
    elif not out.is_floating_point():
        raise TypeError(f"randn: out must be a floating-point tensor, got {out.dtype}")
    else:
        check_written("randn", out)
    # kernels read the seeds as one run of memory
    return Draw(values.to(out.device).contiguous(), step, stream, out)


def randn(
    seeds: Any,
    shape: Sequence[int],
    *,
    step: int = 0,
    stream: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Unit normals, one sample a seed, the same bits on every device and for every batch size.

    Args:
        seeds: int (one sample), sequence of ints in [0, 2**64), or (n,) int64 tensor.
        shape: shape of one sample; elements are counted in its C-order, whatever the memory
            format of ``out``.
        step: counter of the draw, in [0, 2**32).
        stream: what the draw is for (`Stream`), in [0, 2**32).
        dtype: float32 (exact bits), bfloat16, float16 or float64 (the float32 normals converted).
        out: written and returned if given, shape (n, *shape); ``dtype`` and ``device`` are its own.

    Returns:
        (n, *shape) tensor.

    Raises:
        TypeError, ValueError: an argument breaks its rule.
        BackendError: the forced backend cannot do it.
    """
    draw = prepare(seeds, shape, step=step, stream=stream, dtype=dtype, device=device, out=out)
    choose(OP, draw)[1](draw)
    return draw.out


# --- for graphs -----------------------------------------------------------------------------


def _at(seeds: torch.Tensor, shape: Sequence[int], step: int, stream: int) -> torch.Tensor:
    return randn(seeds, tuple(shape), step=step, stream=stream, device=seeds.device)


def _at_tensor(
    seeds: torch.Tensor, shape: Sequence[int], step: torch.Tensor, stream: int
) -> torch.Tensor:
    return _at(seeds, shape, int(step), stream)


def _fake(seeds: torch.Tensor, shape: Sequence[int], *_: Any) -> torch.Tensor:
    return RESULTS.new_empty(seeds, (seeds.shape[0], *shape), torch.float32)


# float32 noise on the device of the seeds; a counter in a tensor is for graphs that do not know it
_LIBRARY: Any = torch.library.Library("fastdiff", "FRAGMENT")  # type: ignore[no-untyped-call]
for _name, _kind, _run in (("randn", "SymInt", _at), ("randn_at", "Tensor", _at_tensor)):
    _LIBRARY.define(f"{_name}(Tensor seeds, SymInt[] shape, {_kind} step, int stream) -> Tensor")
    _LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastdiff::{_name}", _fake, lib=_LIBRARY)
