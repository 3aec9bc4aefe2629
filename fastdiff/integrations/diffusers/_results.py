"""Memory for the samples that steps return, used again once nobody holds the sample.

A fresh result of 2 MiB costs 512 page faults, five to ten times the step itself, wherever malloc
gives large blocks back to the system, as glibc's does by chance of what lies above them.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

_SMALLEST = 1 << 17  # bytes; glibc takes less from its heap
_MOST = 4  # a caller's sample, the next one, and two that schedulers keep
# how many hold a storage; with a release of torch that does not tell, every result is fresh
_holders: Any = getattr(torch._C, "_storage_Use_Count", None)


class _Block:
    """Memory that is handed out as tensors of its own, and a tensor of it that never is."""

    __slots__ = ("_address", "_alone", "_storage", "whole")

    def __init__(self, like: Tensor) -> None:
        with torch.inference_mode(False):  # its tensors could not be written to outside of it
            self.whole = torch.empty_like(like, requires_grad=False)
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
    """Up to four blocks of memory of one layout."""

    __slots__ = ("_blocks", "_layout")

    def __init__(self) -> None:
        self._layout: Any = None
        self._blocks: list[_Block] = []

    def like(self, x: Tensor) -> Tensor | None:
        """A tensor of the layout of x, its content arbitrary; None: let the kernel allocate."""
        if not x.is_cpu or x.nbytes < _SMALLEST or _holders is None:
            return None
        layout = (x.shape, x.stride(), x.dtype)
        if layout != self._layout:
            self._layout, self._blocks = layout, []
        for block in self._blocks:
            if block.free():
                return block.whole.data
        if len(self._blocks) == _MOST:
            return None
        self._blocks.append(_Block(x))
        return self._blocks[-1].whole.data
