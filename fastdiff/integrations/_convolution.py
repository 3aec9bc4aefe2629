"""Convolutions on small grids whose weight oneDNN has in its own blocked order already."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.integrations._swap import Swapped, bypassable, fusable

# Output positions of a whole batch up to which packing is worth its memory. F.conv2d reorders the
# weight at every call, at a price that does not depend on the grid: 53 % of a 3x3 convolution of
# 256 channels in bfloat16 at 4x4, 26 % at 8x8, 12 % at 16x16, 4 % at 32x32 (one image, one thread).
_MOST_POSITIONS = 1024

_mkldnn: Any = torch.ops.mkldnn


class Packed:
    """The reordered weight of one convolution and what it was made of; never copied or saved."""

    def __init__(self) -> None:
        # one tuple, so that a second thread sees both or neither
        self.entry: tuple[tuple[object, ...], Tensor] | None = None

    def __reduce__(self) -> Any:
        return Packed, ()

    def of(self, conv: Any, x: Tensor) -> Tensor:
        weight = conv.weight
        key = (weight.data_ptr(), weight._version, weight.dtype, weight.shape, weight.stride())
        if self.entry is None or self.entry[0] != key:
            packed = _mkldnn._reorder_convolution_weight(
                weight.detach(), conv.padding, conv.stride, conv.dilation, conv.groups, x.shape
            )
            self.entry = key, packed
        return self.entry[1]


class Conv2d(Swapped):
    """`nn.Conv2d` where its input is small and channels_last."""

    fused = "packed weight on small grids"
    _fastdiff_packed: Packed

    @staticmethod
    def refuse(module: Any, /) -> str | None:
        if not bypassable(module, nn.Conv2d, hooks=True):
            return "has a forward of its own"
        if isinstance(module.padding, str) or module.padding_mode != "zeros":
            return f"pads by {module.padding!r}, {module.padding_mode}"
        return None

    def forward(self: Any, x: Tensor) -> Tensor:
        if not _packable(self, x):
            return self.original.forward(self, x)  # type: ignore[no-any-return]
        packed = self._fastdiff_packed.of(self, x)
        return _mkldnn._convolution_pointwise(  # type: ignore[no-any-return]
            x, packed, self.bias, self.padding, self.stride, self.dilation, self.groups,
            "none", [], "",
        )  # fmt: skip


def _packable(conv: Any, x: Tensor) -> bool:
    # a compiler that may keep weights packs them by itself
    if torch.compiler.is_compiling() or not x.is_cpu or x.ndim != 4 or not fusable(x):
        return False
    weight = conv.weight
    if x.dtype not in (torch.bfloat16, torch.float32) or x.dtype != weight.dtype:
        return False
    positions = x.shape[0] * x.shape[2] * x.shape[3] // (conv.stride[0] * conv.stride[1])
    return (
        0 < positions <= _MOST_POSITIONS
        # inference tensors count no versions; other subclasses may hold no memory
        and type(weight) is nn.Parameter
        and not weight.is_inference()
        and x.is_contiguous(memory_format=torch.channels_last)
        and bool(torch.backends.mkldnn.enabled)
        and (x.dtype == torch.float32 or bool(_mkldnn._is_mkldnn_bf16_supported()))
    )


def unavailable() -> str | None:
    """Reason why this build of torch has no packed convolution, or None."""
    names = ("_reorder_convolution_weight", "_convolution_pointwise", "_is_mkldnn_bf16_supported")
    available = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
    if available and all(hasattr(_mkldnn, n) for n in names):
        return None
    return "this build of torch has no packed convolution"
