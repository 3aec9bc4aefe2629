"""Increments of a Brownian path that is a pure function of (seed, stream, time).

The same times give the same path whatever is asked for in between, so a sampler that takes its
noise from it draws the same picture, up to its own error, with 10 steps and with 40.
`fastdiff.reference.brownian` says how an increment becomes a weighted sum of counter normals; the
kernels add that sum up, to the same bits on every backend in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

from fastdiff.backends import Implementation, Op, choose
from fastdiff.ops import _native
from fastdiff.ops._checks import check_dtype, check_memory, check_shape, is_finite
from fastdiff.ops._layout import channels, check_written, memory_format
from fastdiff.ops._results import RESULTS
from fastdiff.ops.noise import Stream, as_seeds
from fastdiff.reference.brownian import Tree, increment, weighted_normals

_DEPTHS = range(1, 31)
_MOST_CELLS = 4096


class Increment(NamedTuple):
    """Checked arguments of one increment; backends fill ``out``."""

    seeds: torch.Tensor
    counters: torch.Tensor  # (k,) int32, of the draws
    weights: torch.Tensor  # (k,) float32
    stream: int
    x: torch.Tensor | None  # out = x + scale * sum
    scale: float
    out: torch.Tensor


def _reference(call: Increment) -> None:
    seeds = call.seeds.cpu().numpy().view(np.uint64)
    out = call.out
    size = out[0].numel() if len(out) else 0
    numbers, weights = call.counters.cpu().numpy(), call.weights.cpu().numpy()
    total = torch.from_numpy(weighted_normals(seeds, size, numbers, weights, call.stream))
    total = total.view(out.shape).to(out.device)
    out.copy_(total if call.x is None else call.x + call.scale * total)


def _cpu(call: Increment) -> None:
    out = call.out
    fmt = memory_format(out)
    assert fmt is not None  # _refuse_cpu let it pass
    samples = out.shape[0]
    _native.extension.brownian(
        call.seeds.data_ptr(),
        call.counters.data_ptr(),
        call.weights.data_ptr(),
        len(call.counters),
        call.stream,
        _native.address(call.x),
        call.scale,
        samples,
        out.numel() // samples if samples else 0,
        channels(out, fmt),
        out.data_ptr(),
        _native.DTYPES[out.dtype],
    )


def _refuse_layout(call: Increment) -> str | None:
    out, x = call.out, call.x
    if out.dtype not in _native.DTYPES:
        return f"dtype must be float32, bfloat16 or float16, got {out.dtype}"
    if memory_format(out) is None:
        return f"out must be contiguous or channels_last, got strides {out.stride()}"
    if x is not None and memory_format(x) != memory_format(out):
        return f"add_to must have the strides of out, {out.stride()}, got {x.stride()}"
    return None


def _refuse_cpu(call: Increment) -> str | None:
    if call.out.device.type != "cpu":
        return f"out must be on the CPU, got {call.out.device}"
    return _refuse_layout(call)


def _refuse_triton(call: Increment) -> str | None:
    return _native.refuse_triton(call.out) or _refuse_layout(call)


def _refuse_cuda(call: Increment) -> str | None:
    return _native.refuse_cuda(call.out) or _refuse_layout(call)


def _load_triton() -> Callable[[Increment], None]:
    from fastdiff.kernels.brownian import brownian

    return brownian  # type: ignore[no-any-return]


def _load_cuda() -> Callable[[Increment], None]:
    from fastdiff.ops._cuda import brownian

    return brownian


OP = Op(
    "brownian",
    {
        "cpu": Implementation(lambda: _cpu, _refuse_cpu),
        "triton": Implementation(_load_triton, _refuse_triton),
        "cuda": Implementation(_load_cuda, _refuse_cuda),
        "reference": Implementation(lambda: _reference, lambda call: None),
    },
)


@lru_cache(maxsize=1024)
def _plan(
    tree: Tree, t0: float, t1: float, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Counters and weights on the device; a loop asks for the same ones in every run."""
    numbers, weights = increment(tree, t0, t1)
    return torch.from_numpy(numbers).to(device), torch.from_numpy(weights).float().to(device)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"brownian: {name} must be a number, got {type(value).__name__}")
    if not is_finite(value, torch.float64):
        raise ValueError(f"brownian: {name} must be finite, got {value}")
    return float(value)


def _integer(name: str, value: Any, limit: range) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"brownian: {name} must be an integer, got {type(value).__name__}")
    if value not in limit:
        raise ValueError(f"brownian: {name} must lie in {limit}, got {value}")
    return int(value)


def _check_tree(low: Any, high: Any, depth: Any, geometric: Any, cells: Any) -> Tree:
    low, high = _number("low", low), _number("high", high)
    if not isinstance(geometric, bool):
        raise TypeError(f"brownian: geometric must be a bool, got {type(geometric).__name__}")
    if low >= high:
        raise ValueError(f"brownian: high must be above low, got {high} for {low}")
    if geometric and low <= 0:
        raise ValueError(f"brownian: low must be above 0 for a geometric tree, got {low}")
    depth = _integer("depth", depth, _DEPTHS)
    cells = _integer("cells", cells, range(1, min(1 << depth, _MOST_CELLS) + 1))
    if cells & (cells - 1):
        raise ValueError(f"brownian: cells must be a power of two, got {cells}")
    return Tree(low, high, depth, geometric, cells)


def _check_x(x: Any, scale: Any, dtype: torch.dtype) -> None:
    if x is None:
        if scale != 1.0:
            raise ValueError(f"brownian: scale must come with add_to, got {scale} without it")
        return
    if not isinstance(x, torch.Tensor) or x.dtype != torch.float32:
        got = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
        raise TypeError(f"brownian: add_to must be a float32 tensor, got {got}")
    check_memory("brownian", "add_to", x)
    if dtype != torch.float32:
        raise TypeError(f"brownian: out must be float32 like add_to, got {dtype}")


def prepare(
    seeds: Any,
    shape: Sequence[int],
    t0: float,
    t1: float,
    *,
    low: float = 0.0,
    high: float = 1.0,
    depth: int = 20,
    geometric: bool = False,
    cells: int = 1,
    stream: int = Stream.BROWNIAN,
    add_to: torch.Tensor | None = None,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    out: torch.Tensor | None = None,
) -> Increment:
    """The arguments of `brownian`, checked, with its output allocated."""
    tree = _check_tree(low, high, depth, geometric, cells)
    t0, t1, scale = _number("t0", t0), _number("t1", t1), _number("scale", scale)
    if not is_finite(scale, torch.float32):
        raise ValueError(f"brownian: scale must be finite in float32, got {scale}")
    for name, t in (("t0", t0), ("t1", t1)):
        if not tree.low <= t <= tree.high:
            raise ValueError(
                f"brownian: {name} must lie between low and high, {tree.low} and {tree.high}, "
                f"got {t}"
            )
    stream = _integer("stream", stream, range(1 << 32))
    values = as_seeds(seeds, where="brownian")
    check_memory("brownian", "seeds", values)  # under a tracer, those of a list have none
    check_shape("brownian", shape)
    full = (values.shape[0], *shape)
    if out is not None and (not isinstance(out, torch.Tensor) or not out.is_floating_point()):
        got = out.dtype if isinstance(out, torch.Tensor) else type(out).__name__
        raise TypeError(f"brownian: out must be a floating-point tensor, got {got}")
    if out is None:
        check_dtype("brownian", dtype)
    _check_x(add_to, scale, dtype if out is None else out.dtype)
    if add_to is not None and add_to.shape != full:
        raise ValueError(f"brownian: add_to must have shape {full}, got {tuple(add_to.shape)}")
    if out is None:
        if add_to is None:
            out = RESULTS.new_empty(values, full, dtype, device)
        else:
            out = RESULTS.empty_like(add_to)
        check_memory("brownian", "out", out)  # a tracer may have made it
    elif out.shape != full:
        raise ValueError(f"brownian: out must have shape {full}, got {tuple(out.shape)}")
    else:
        check_written("brownian", out, add_to=add_to)
    if add_to is not None and add_to.device != out.device:
        raise ValueError(f"brownian: add_to must be on {out.device}, got {add_to.device}")
    try:
        counters, weights = _plan(tree, t0, t1, out.device)
    except ValueError:
        raise ValueError(
            f"brownian: t0 and t1 must lie in two of the 2**{tree.depth} leaves of the tree, "
            f"got {t0} and {t1}"
        ) from None
    # kernels read the seeds as one run of memory
    on_device = values.to(out.device).contiguous()
    return Increment(on_device, counters, weights, stream, add_to, scale, out)


def brownian(
    seeds: Any,
    shape: Sequence[int],
    t0: float,
    t1: float,
    *,
    low: float = 0.0,
    high: float = 1.0,
    depth: int = 20,
    geometric: bool = False,
    cells: int = 1,
    stream: int = Stream.BROWNIAN,
    add_to: torch.Tensor | None = None,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """(W(t1) - W(t0)) / sqrt(abs(t1 - t0)) of one Brownian path a seed: unit normals.

    A virtual Brownian tree (Li et al. 2020, arXiv:2001.01328, section 4) on the counter noise: a
    node of the tree is a counter, and an increment is a weighted sum of at most 2*depth + 2 normals
    in one pass; nothing is stored. W is continuous. The increments between any times of which no
    two lie in one leaf have exactly the law of Brownian motion, but for rounding of the float32
    weights and the left-out weights below 2**-25, and are additive in the same sense. Sample i
    depends on seed i alone, and float32 results are the same bits on every backend.

    Args:
        seeds: int (one sample), sequence of ints in [0, 2**64), or (n,) int64 tensor.
        shape: shape of one sample.
        t0, t1: times in [low, high], in two leaves; with t1 < t0 the increment is negated.
        low, high: ends of the path, W(low) = 0: another range is another path.
        depth: levels of the tree, 1 to 30; a leaf is (high - low) / 2**depth long. Another depth
            is another path inside the leaves of the smaller one only.
        geometric: split at geometric means, 0 < low: leaves of equal ratio.
        cells: a power of two up to 2**depth and 4096: the path is drawn as so many increments
            first, and a tree inside each. Increments that are about a cell long then take the
            fewest draws. Another number is another path.
        stream: what the draw is for (`Stream`), in [0, 2**32).
        add_to: (n, *shape) float32: the result is ``add_to + scale * increment``.
        scale: with ``add_to``.
        dtype: float32 (exact bits), bfloat16, float16 or float64 (float32 converted).
        device: of the result; that of ``add_to`` where it is given.
        out: written and returned if given; may be ``add_to``.

    Returns:
        (n, *shape) tensor.

    Raises:
        TypeError, ValueError: an argument breaks its rule.
        BackendError: the forced backend cannot do it.
    """
    call = prepare(
        seeds,
        shape,
        t0,
        t1,
        low=low,
        high=high,
        depth=depth,
        geometric=geometric,
        cells=cells,
        stream=stream,
        add_to=add_to,
        scale=scale,
        dtype=dtype,
        device=device,
        out=out,
    )
    choose(OP, call)[1](call)
    return call.out
