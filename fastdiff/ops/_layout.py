"""Memory order of a batch: the layouts that kernels walk without a copy."""

from __future__ import annotations

import torch

from fastdiff.ops._checks import check_memory

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def memory_format(x: torch.Tensor) -> torch.memory_format | None:
    """Contiguous, channels_last (4-D, 5-D), or None for any other order."""
    if x.is_contiguous():
        return torch.contiguous_format
    last = _CHANNELS_LAST.get(x.dim())
    if last is not None and x.is_contiguous(memory_format=last):
        return last
    return None


def check_written(op: str, out: torch.Tensor, **read: torch.Tensor | None) -> None:
    """Each element of ``out`` is memory of its own, and that of no other element that is read.

    Tensors that a kernel does not walk as they are were copied, or are the reference's, which
    writes last.
    """
    check_memory(op, "out", out)
    if out.numel() > 1 and any(
        n > 1 and s == 0 for n, s in zip(out.shape, out.stride(), strict=True)
    ):
        raise ValueError(
            f"{op}: out must have memory for every element, got strides {out.stride()}"
        )
    for name, t in read.items():
        if t is None or memory_format(t) is None or memory_format(out) is None:
            continue
        apart = out.data_ptr() - t.data_ptr()
        if -out.nbytes < apart < t.nbytes and (apart or out.stride() != t.stride()):
            raise ValueError(f"{op}: out must be {name} or not overlap it, got shared memory")


def channels(x: torch.Tensor, fmt: torch.memory_format) -> int:
    """Channels where they are the fastest axis, 0 where memory order is logical order."""
    return 0 if fmt == torch.contiguous_format else x.shape[1]
