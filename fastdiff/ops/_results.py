"""Memory for the results of ops, used again once nobody holds the result.

A fresh result of 2 MiB costs 512 page faults, several times the work of most ops here, wherever
malloc gives large blocks back to the system, as glibc's does by chance of what lies above them.
Applies to the CPU; torch's allocator does the same on a device.
"""

from __future__ import annotations

import math
import os
import sys
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from fastdiff.ops._layout import memory_format

_SMALLEST = 1 << 17  # bytes; glibc takes less from its heap
_MOST = 4  # of one layout: a caller's sample, the next one, and two that schedulers keep
_BYTES = 1 << 28  # in all, held or not
# how many hold a storage; with a release of torch that does not tell, every result is fresh
_holders: Any = getattr(torch._C, "_storage_Use_Count", None)


class _Block:
    """Memory that is handed out as tensors of its own, and a tensor of it that never is."""

    __slots__ = ("_address", "_alone", "_storage", "whole")

    def __init__(self, layout: tuple[Any, ...]) -> None:
        shape, strides, dtype = layout
        # tensors of inference mode could not be written to outside of it, those of a tracer nowhere
        with torch.inference_mode(False), _disable_current_modes():
            # named: torch's default device may be another one
            self.whole = torch.empty_strided(shape, strides, dtype=dtype, device="cpu")
        self._storage = self.whole.untyped_storage()
        self._address = self.whole.data_ptr()
        self._alone: Any = None
        self._alone = self._held()

    def _held(self) -> tuple[int, int]:
        """Holders of the memory in C++, and those of its one Python object."""
        return _holders(self._storage._cdata), sys.getrefcount(self._storage)

    def free(self) -> bool:
        # memory that was moved, as by share_memory_, may be read by another process
        return self._held() == self._alone and self.whole.data_ptr() == self._address


class Results:
    """Up to four blocks of memory of each layout, 256 MiB in all."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks: dict[tuple[Any, ...], list[_Block]] = {}  # the layout that grew last is last
        self._bytes = 0

    def _take(self, layout: tuple[Any, ...], nbytes: int) -> Tensor:
        """A tensor of the layout, its content arbitrary."""
        with self._lock:
            blocks = self._blocks.get(layout, ())
            for block in blocks:
                if block.free():
                    return block.whole.data
            return self._grow(layout, nbytes).whole.data

    def _grow(self, layout: tuple[Any, ...], nbytes: int) -> _Block:
        """One block more, in place of others where there are enough."""
        blocks = self._blocks.pop(layout, [])
        if len(blocks) == _MOST:
            del blocks[0]  # whoever holds it keeps it
            self._bytes -= nbytes
        while self._bytes + nbytes > _BYTES and (self._blocks or blocks):
            oldest = next(iter(self._blocks), None)
            gone = blocks if oldest is None else self._blocks[oldest]
            self._bytes -= gone.pop(0).whole.nbytes
            if oldest is not None and not gone:
                del self._blocks[oldest]
        block = _Block(layout)
        self._blocks[layout] = [*blocks, block]
        self._bytes += nbytes
        return block

    def empty_like(self, x: Tensor) -> Tensor:
        """`torch.empty_like`, for a result that is returned."""
        # subclasses, such as those of tracing, have no memory
        plain = type(x) is Tensor or type(x) is nn.Parameter
        if not plain or not x.is_cpu or not _SMALLEST <= x.nbytes <= _BYTES:
            return torch.empty_like(x)
        if _holders is None or memory_format(x) is None:
            return torch.empty_like(x)
        return self._take((x.shape, x.stride(), x.dtype), x.nbytes)

    def new_empty(
        self,
        x: Tensor,
        shape: Sequence[int],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """`x.new_empty`, for a result that is returned."""
        dtype = dtype or x.dtype
        device = x.device if device is None else torch.device(device)
        if type(x) is not Tensor:
            return x.new_empty(shape, dtype=dtype, device=device)
        nbytes = math.prod(shape) * dtype.itemsize
        if device.type != "cpu" or _holders is None or not _SMALLEST <= nbytes <= _BYTES:
            return torch.empty(shape, dtype=dtype, device=device)
        strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        return self._take((torch.Size(shape), strides, dtype), nbytes)


RESULTS = Results()
if hasattr(os, "register_at_fork"):  # another thread may hold the lock while a process is forked
    os.register_at_fork(after_in_child=RESULTS.__init__)  # type: ignore[misc]
