"""CUDA launches of `modulate` as plain data, as `_launches` has those of the other ops."""

from __future__ import annotations

import torch

from fastdiff.ops._launches import THREADS, Launch
from fastdiff.ops._modulate_checks import Modulate, strides, tokens
from fastdiff.ops._native import DTYPES, address
from fastdiff.reference.modulate import NORMS

_WARP = 32
_KEPT = 32  # floats of a token that a thread keeps in registers
_FEW = 4  # packs a thread, beyond which another warp joins in


def _dtype(*group: torch.Tensor | None) -> int:
    """The code of the one dtype of a group; that of float32 where it is empty."""
    return next((DTYPES[t.dtype] for t in group if t is not None), 0)


def _pack(call: Modulate) -> int:
    """Elements a thread moves together: 16 bytes of x where everything is aligned for it, else 1.

    One, not a part of a pack: the threads of a warp then still read consecutive elements.
    """
    pack = 16 // call.x.element_size()
    for t in call:
        if not isinstance(t, torch.Tensor):
            continue
        steps = [s for n, s in zip(t.shape[:-1], t.stride()[:-1], strict=True) if n > 1]
        if t.data_ptr() % min(16, pack * t.element_size()) or any(s % pack for s in steps):
            return 1
    return pack if call.x.shape[-1] % pack == 0 else 1


def modulate(call: Modulate, blocks: int) -> list[Launch]:
    """Launches that fill ``out`` and ``total``; x must have elements."""
    x = call.x
    samples, length, channels = tokens(x)
    pack = _pack(call)
    packs = channels // pack
    threads = _WARP
    while threads < THREADS and packs > _FEW * threads:
        threads *= 2
    keep = -(-packs // threads)
    if keep * pack > _KEPT:
        keep = 0
    # long tokens have a block each: a sum over several warps takes shared memory of one token
    side = 1 if threads > _WARP else THREADS // _WARP
    rows = samples * length
    side = min(side, rows)
    parts = (call.residual, call.gate, call.out, call.scale, call.shift, call.weight, call.bias)
    macros = (
        ("FD_DTYPE", DTYPES[x.dtype]),
        ("FD_FILM_DTYPE", _dtype(call.scale, call.shift, call.gate)),
        ("FD_AFFINE_DTYPE", _dtype(call.weight, call.bias)),
        ("FD_NORM", NORMS.index(call.norm)),
        ("FD_HAS", sum(1 << bit for bit, t in enumerate(parts) if t is not None)),
        ("FD_KEEP", keep),
        ("FD_PACK", pack),
        ("FD_VECTOR", int(pack > 1)),
        ("FD_CHANNELS_LAST", 0),
    )
    args = (
        x.data_ptr(),
        address(call.residual),
        address(call.scale),
        *strides(call.scale),
        address(call.shift),
        *strides(call.shift),
        address(call.gate),
        *strides(call.gate),
        address(call.weight),
        address(call.bias),
        call.eps,
        samples,
        length,
        channels,
        address(call.out),
        address(call.total),
    )
    grid = (min(-(-rows // side), max(1, blocks)), 1)
    return [Launch("modulate.cu", "modulate", macros, grid, (threads, side), args)]
