"""What `reverse_step` asks of its arguments; every rule raises before anything is written."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from fastdiff._packing import Packed, Packing
from fastdiff.ops._checks import check_dense, check_memory, check_real, is_finite
from fastdiff.ops._checks import kind as kind
from fastdiff.table import Needs


class Step(NamedTuple):
    """Checked arguments; backends write ``out``, ``y``, ``history`` and ``model_input``."""

    x: torch.Tensor
    output: torch.Tensor | None
    uncond: torch.Tensor | None
    variance: torch.Tensor | None
    y: torch.Tensor | None
    history: torch.Tensor | None
    packed: Packed
    row: int
    rows: torch.Tensor | None
    seeds: torch.Tensor | None
    guidance: float | torch.Tensor
    scale: torch.Tensor | None
    clip: float | torch.Tensor | None
    out: torch.Tensor
    model_input: torch.Tensor | None
    format: torch.memory_format


# A step on a small tensor costs about as much as its checks, so what they ask of x is read once
# and handed on: every attribute of a tensor costs 50 to 400 ns.
class Like(NamedTuple):
    """What the other tensors have to agree with."""

    shape: torch.Size
    device: torch.device
    dtype: torch.dtype
    format: torch.memory_format


def require(
    name: str, t: torch.Tensor | None, like: Like, why: str, dtype: torch.dtype | None = None
) -> torch.Tensor:
    if t is None:
        raise ValueError(f"reverse_step: {name} must be given, {why}, got None")
    if not isinstance(t, torch.Tensor) or not t.is_floating_point():
        raise TypeError(f"reverse_step: {name} must be a floating-point tensor, got {kind(t)}")
    check_dense("reverse_step", name, t)
    check_memory("reverse_step", name, t)
    if t.shape != like.shape:
        raise ValueError(
            f"reverse_step: {name} must have the shape of x {tuple(like.shape)}, "
            f"got {tuple(t.shape)}"
        )
    if t.device != like.device:
        raise ValueError(
            f"reverse_step: {name} must be on the device of x {like.device}, got {t.device}"
        )
    if dtype is not None and t.dtype != dtype:
        raise TypeError(f"reverse_step: {name} must be {dtype}, got {t.dtype}")
    return t


def has_order(t: torch.Tensor, fmt: torch.memory_format) -> bool:
    """Whether the memory order is the given one; half the time of naming the usual one."""
    if fmt is torch.contiguous_format:
        return t.is_contiguous()
    return t.is_contiguous(memory_format=fmt)


def ordered(t: torch.Tensor, fmt: torch.memory_format) -> torch.Tensor:
    """The tensor, or a copy whose samples have the memory order of the state."""
    if has_order(t, fmt) or (len(t) and has_order(t[:1], fmt)):
        return t
    return t.contiguous(memory_format=fmt)


def in_place(name: str, t: torch.Tensor, fmt: torch.memory_format) -> None:
    if not has_order(t, fmt):
        raise ValueError(
            f"reverse_step: {name} must have the memory order of x, got strides {t.stride()}"
        )


def weight(name: str, value: float | torch.Tensor, like: Like) -> float | torch.Tensor:
    if isinstance(value, torch.Tensor):
        if value.shape != like.shape[:1]:
            raise ValueError(
                f"reverse_step: {name} must be a number or one a sample ({like.shape[0]},), "
                f"got {tuple(value.shape)}"
            )
        check_real("reverse_step", name, value)
        if value.requires_grad and torch.is_grad_enabled():  # no backend has one
            raise ValueError(f"reverse_step: {name} must not record gradients, got requires_grad")
        return value.to(like.device, torch.float32).contiguous()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"reverse_step: {name} must be a number, got {type(value).__name__}")
    if not is_finite(value, torch.float32):
        raise ValueError(f"reverse_step: {name} must be finite in float32, got {value}")
    return value


def factors(value: torch.Tensor, like: Like) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"reverse_step: scale must be a tensor, got {type(value).__name__}")
    if value.shape != like.shape[:1]:
        raise ValueError(
            f"reverse_step: scale must have one factor a sample ({like.shape[0]},), "
            f"got {tuple(value.shape)}"
        )
    check_real("reverse_step", "scale", value)
    return value.to(like.device, like.dtype).contiguous()


def check_rows(rows: torch.Tensor, table: Packing, like: Like) -> torch.Tensor:
    if rows.dtype != torch.int64 or rows.shape != like.shape[:1]:
        raise ValueError(
            f"reverse_step: row must be an int or an int64 tensor ({like.shape[0]},), "
            f"got {rows.dtype} {tuple(rows.shape)}"
        )
    if len(rows) and not (int(rows.min()) >= 0 and int(rows.max()) < len(table)):
        raise ValueError(f"reverse_step: row must lie in [0, {len(table)}), got {rows.tolist()}")
    return rows.to(like.device).contiguous()


class Cursor(NamedTuple):
    """Rows of a caller who knows what lies in them, for a graph, which can not ask the device.

    Attributes:
        rows: (N,) int64 on the device of the state, as one run of memory.
        needs: what any row that it may hold needs (`joined`).
    """

    rows: torch.Tensor
    needs: Needs


def joined(table: Packing, rows: Iterable[int]) -> Needs:
    """What any of the rows needs."""
    each = [table.needs[i] for i in set(rows)] or [table.needs[0]]
    return Needs(*(max(values) for values in zip(*each, strict=True)))


def check_history(
    history: torch.Tensor | None, depth: int, x: torch.Tensor, like: Like
) -> torch.Tensor:
    if history is None:
        raise ValueError(f"reverse_step: history must have {depth} slots, got None")
    if not isinstance(history, torch.Tensor):
        raise TypeError(f"reverse_step: history must be a tensor, got {kind(history)}")
    check_dense("reverse_step", "history", history)
    check_memory("reverse_step", "history", history)
    slots = len(history) if history.dim() else 0
    if history.shape[1:] != like.shape or slots < depth:
        raise ValueError(
            f"reverse_step: history must have shape ({depth}, "
            f"{', '.join(map(str, like.shape))}), got {tuple(history.shape)}"
        )
    if history.dtype != like.dtype or history.device != like.device:
        raise TypeError(
            f"reverse_step: history must be {like.dtype} on {like.device}, "
            f"got {history.dtype} on {history.device}"
        )
    if not (like.format is torch.contiguous_format and history.is_contiguous()):
        in_place("history", history[0], like.format)
        if slots > 1 and history.stride(0) < x.numel():
            raise ValueError(
                f"reverse_step: history must have slots of their own, got strides "
                f"{history.stride()}"
            )
    return history


def check_apart(
    x: torch.Tensor,
    out: torch.Tensor,
    y: torch.Tensor | None,
    history: torch.Tensor | None,
    model_input: torch.Tensor | None,
) -> None:
    """What is written shares no memory with x or with each other, but that ``out`` may be ``x``."""
    begin, size = x.data_ptr(), x.nbytes
    to = out.data_ptr()
    if to != begin and -size < to - begin < size:
        raise ValueError("reverse_step: out must not overlap x, got shared memory")
    if y is None and history is None and model_input is None:
        return
    spans = [("x", begin, begin + size), ("out", to, to + size)]
    for name, t in (("y", y), ("history", history), ("model_input", model_input)):
        if t is None:
            continue
        mine = _runs(t, slots=name == "history")
        for low, high in mine:
            for other, a, b in spans:
                if low < b and a < high:
                    raise ValueError(
                        f"reverse_step: {name} must not overlap {other}, got shared memory"
                    )
        spans += [(name, *run) for run in mine]


def _runs(t: torch.Tensor, *, slots: bool) -> list[tuple[int, int]]:
    """Where a dense tensor begins and ends in memory, or each slot of a history."""
    begin = t.data_ptr()
    if not slots or not t.numel():
        return [(begin, begin + t.nbytes)]
    size, step = t.nbytes // len(t), t.stride(0) * t.itemsize
    return [(begin + i * step, begin + i * step + size) for i in range(len(t))]


def check_unread(
    name: str,
    m: torch.Tensor,
    out: torch.Tensor,
    y: torch.Tensor | None,
    history: torch.Tensor | None,
    model_input: torch.Tensor | None,
) -> None:
    """What is written is no memory of the model tensor ``m``, or an output is the whole of it.

    A kernel reads an element of every tensor before it writes that element's results.
    """
    if not m.numel():
        return
    begin, each = m.data_ptr(), m.nbytes // len(m)
    end = begin + (len(m) - 1) * m.stride(0) * m.itemsize + each
    written = (("out", out), ("y", y), ("history", history), ("model_input", model_input))
    for other, t in written:
        if t is None:
            continue
        whole = len(m) == 1 or m.stride(0) * m.itemsize == each
        whole = whole and other in ("out", "model_input") and t.dtype == m.dtype
        if whole and t.data_ptr() == begin:
            continue
        if any(low < end and begin < high for low, high in _runs(t, slots=other == "history")):
            raise ValueError(f"reverse_step: {other} must not overlap {name}, got shared memory")


def check_row(row: object, table: Packing) -> int:
    if isinstance(row, bool) or not isinstance(row, int):
        raise TypeError(f"reverse_step: row must be an int or an int64 tensor, got {kind(row)}")
    if not 0 <= row < len(table):
        raise ValueError(f"reverse_step: row must lie in [0, {len(table)}), got {row}")
    return row


def check_seeds(seeds: torch.Tensor | None, like: Like) -> torch.Tensor:
    if seeds is None:
        raise ValueError("reverse_step: seeds must be given, the row draws noise, got None")
    if not isinstance(seeds, torch.Tensor):
        raise TypeError(f"reverse_step: seeds must be an int64 tensor, got {kind(seeds)}")
    if seeds.dtype != torch.int64 or seeds.shape != like.shape[:1]:
        raise ValueError(
            f"reverse_step: seeds must be an int64 tensor ({like.shape[0]},), "
            f"got {seeds.dtype} {tuple(seeds.shape)}"
        )
    check_memory("reverse_step", "seeds", seeds)
    if seeds.device == like.device and seeds.is_contiguous():
        return seeds
    return seeds.to(like.device).contiguous()  # kernels read them as one run of memory
