"""torch's own normals on the CPU, bit for bit, in a fraction of its time.

What `torch.randn` draws from a generator is fixed by torch's build and by the CPU it finds, not by
a promise. So the first draw of a process compares `csrc/cpu/torch_noise.cpp` with torch, and where
they differ by a bit all draws are torch's: with torch 2.11 those of 16-bit dtypes, which it draws
in another way than later releases.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastdiff.ops import _native
from fastdiff.ops._dispatch import values_only

# Below this many values, reading and setting the generator's state takes the time that is gained.
_LEAST = 2048

# The state of torch's CPU generator, in bytes: 624 words of MT19937, one in 8 bytes, lie after the
# seed, the number of words left, a flag and the position; the cached normals follow.
_STATE, _LEFT, _NEXT, WORDS = 5056, slice(8, 12), slice(16, 24), slice(24, 5016)
_WORD_COUNT = 624

# torch locks a generator for one draw, which is one step for us alone: read, draw, set.
_lock = threading.Lock()


def randn(
    shape: Sequence[int],
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``torch.randn(shape, generator=generator, dtype=dtype)``: the same bits, the same error, the
    same state of the generator afterwards.

    Args:
        shape: shape of the result.
        generator: None for torch's default one. While a call runs, no other thread may draw from
            the same generator by torch itself; calls of this module wait for each other.
        dtype: None for torch's default one. float32, bfloat16 and float16 on the CPU are drawn
            here, all else by torch.
        out: written and returned if given, of that shape and dtype.

    Raises:
        TypeError: ``out`` is no tensor.
        ValueError: ``out`` has another shape or dtype.
    """
    if out is not None:
        if not isinstance(out, Tensor):
            raise TypeError(f"randn: out must be a tensor, got {type(out).__name__}")
        if out.shape != tuple(shape):
            raise ValueError(f"randn: out must have shape {tuple(shape)}, got {tuple(out.shape)}")
        if dtype is not None and out.dtype != dtype:
            raise ValueError(f"randn: out must have dtype {dtype}, got {out.dtype}")
        return fill_(out, generator)
    if math.prod(shape) < _LEAST or not values_only(()):
        return torch.randn(shape, generator=generator, dtype=dtype)
    return fill_(torch.empty(shape, dtype=dtype), generator)


def randn_like(x: Tensor) -> Tensor:
    """``torch.randn_like(x)``, under the terms of `randn`."""
    return fill_(torch.empty_like(x))


def fill_(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """``x.normal_(generator=generator)``, under the terms of `randn`.

    Args:
        x: any tensor; what is not contiguous is drawn by torch, whose stream is another there.
        generator: as for `randn`.

    Returns:
        ``x``.
    """
    used = torch.default_generator if generator is None else generator
    if _able(x, used) and _agrees(x.dtype, _native.extension.isa()) and _draw(x, used):
        increment_version(x)
        return x
    return x.normal_(generator=generator)


def _able(x: Tensor, generator: Any) -> bool:
    """Whether torch would only fill the memory of ``x``, and in the way that we know."""
    return (
        type(x) is Tensor
        and x.numel() >= _LEAST
        and _native.extension is not None
        and values_only((x,))
        and x.is_cpu
        and x.dtype in _native.DTYPES
        and x.is_contiguous()
        and not x.is_neg()  # a sign that is kept beside the memory
        and (not x.is_inference() or torch.is_inference_mode_enabled())
        and isinstance(generator, torch.Generator)
        and generator.device.type == "cpu"
    )


def _draw(x: Tensor, generator: torch.Generator) -> bool:
    """Fill ``x``, of 16 or more values; false, with nothing changed, where no kernel can."""
    with _lock:
        state = generator.get_state()
        if not _native.extension.torch_noise(
            state.data_ptr(), x.data_ptr(), _native.DTYPES[x.dtype], x.numel()
        ):
            return False
        generator.set_state(state)
    return True


@cache
def _agrees(dtype: torch.dtype, isa: str) -> bool:
    """Whether our draws are torch's, with this torch on this machine: asked once a process.

    A constant or a rounding that differs shows within a few float32 values, though maybe in none of
    16 bits; the edges are for what hardly ever comes up.
    """
    if dtype != torch.float32 and not _agrees(torch.float32, isa):
        return False
    seeded = torch.Generator().manual_seed(0).get_state()
    if seeded.numel() != _STATE:
        return False
    # an unfinished block at the end, and more words than are made at a time
    for state, size in ((seeded, 5003), (state_before(_edges()), _edges().size)):
        theirs, ours = torch.Generator().set_state(state), torch.Generator().set_state(state)
        expected = torch.empty(size, dtype=dtype, device="cpu").normal_(generator=theirs)
        got = torch.empty(size, dtype=dtype, device="cpu")
        if (
            not _draw(got, ours)
            or not torch.equal(got.view(torch.int8), expected.view(torch.int8))
            or not torch.equal(ours.get_state(), theirs.get_state())
        ):
            return False
    return True


def _edges() -> np.ndarray:
    """Words whose low 24 bits are where the logarithm and the sines change their formula."""
    half, root = 2**23, round((1 - math.sqrt(0.5)) * 2**24)
    radii = [0, 1, 2, half - 1, half, half + 1, root - 1, root, root + 1, 2**24 - 2, 2**24 - 1]
    turns = [(k << 21) + d for k in range(9) for d in (-1, 0, 1)]
    pairs = np.array([(r, t) for r in radii for t in turns][:296], np.int64) & 0xFFFFFF
    # 8 of each in a block
    return pairs.reshape(-1, 8, 2).transpose(0, 2, 1).astype(np.uint32).ravel()


def untempered(words: np.ndarray) -> np.ndarray:
    """What MT19937 holds in its state for these uint32 words, int64 as torch stores it."""
    y = words ^ (words >> 18)
    y ^= (y << 15) & 0xEFC60000
    raw = y
    for _ in range(4):  # 7 bits more are right each time
        raw = y ^ ((raw << 7) & 0x9D2C5680)
    y = raw
    for _ in range(2):
        raw = y ^ (raw >> 11)
    return np.asarray(raw, np.int64)


def state_before(words: np.ndarray) -> Tensor:
    """A generator's state from which torch draws these words next.

    Args:
        words: (n,) uint32, n at most 623.
    """
    state = torch.Generator().get_state()
    state[_LEFT].view(torch.int32).fill_(_WORD_COUNT)
    state[_NEXT].view(torch.int64).fill_(1)
    state[WORDS].view(torch.int64)[1 : 1 + words.size] = torch.from_numpy(untempered(words))
    return state
