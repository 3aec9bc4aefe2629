"""torchsde's Brownian tree as diffusers, k-diffusion and ComfyUI query it, bit for bit.

The path of Li et al. 2020 (arXiv:2001.01328, section 4), as torchsde's `BrownianInterval` builds it
with ``halfway_tree=True``: the increment over the whole interval is drawn first, a node's increment
is split at the middle by normals of the node's own seed, and what is asked for is a sum of nodes.
Times are rounded first, so an increment depends on the entropy and on its ends alone, not on what
was asked before. Nothing is kept from query to query but the times and seeds of nodes: an increment
is computed from the root, in one pass of `csrc/cpu/brownian_tree.cpp` over the result, or by
PyTorch where the kernel cannot (another dtype or device, fewer than 16 values, a CPU or a torch
whose normals are not the kernel's). Levy areas and other tolerances are torchsde's own matter.
"""

from __future__ import annotations

import math
import struct
import warnings
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.integrations import _torch_noise
from fastdiff.ops import _native
from fastdiff.ops._dispatch import values_only

_DIGITS = 6  # of a time behind the point: torchsde's tol=1e-6
_POOL = 24  # words of entropy: its pool_size
_LEAST = 16  # values, below which torch draws one by one
_NODES = 1 << 14  # of a tree that are kept: 8 MB or so

_LEFT, _RIGHT, _BOTH, _LEAF = range(4)  # as FdTreeMove in csrc/cpu/kernels.h


# constants of numpy's SeedSequence: first and factor of two hashes, and those of its mixing
_A, _B, _MIX = (0x43B0D7E5, 0x931E8875), (0x8B51F9DD, 0x58F38DED), (0xCA01F9DD, 0x4973F715)
_MASK = 0xFFFFFFFF


def _words(value: int) -> list[int]:
    """uint32 words of an integer from the lowest, one at least."""
    if value <= _MASK:
        return [value]
    return [value >> at & _MASK for at in range(0, value.bit_length(), 32)]


@lru_cache(maxsize=64)
def _hash_constants(made: int) -> tuple[int, int]:
    """What a word is combined with in its hash and multiplied by, after so many hashes."""
    before = _A[0] * pow(_A[1], made, 1 << 32) & _MASK
    return before, before * _A[1] & _MASK


class _Entropy:
    """First words of ``SeedSequence(entropy, spawn_key=spawn, pool_size=24)``.

    The pool is the same for every spawn key until that comes in, and of its words only the first
    has to go on.
    """

    def __init__(self, entropy: int) -> None:
        self._first = int(np.random.SeedSequence(entropy, pool_size=_POOL).pool[0])
        # every word of the pool is hashed once for each other one, and once for each beyond it
        self._made = _POOL * max(_POOL, len(_words(int(entropy))))

    def seed(self, spawn: Sequence[int]) -> int:
        """The first word that is generated, for the uint32 words of a spawn key."""
        pool, made = self._first, self._made
        for word in spawn:
            before, factor = _hash_constants(made)
            hashed = (word ^ before) * factor & _MASK
            hashed ^= hashed >> 16
            pool = (pool * _MIX[0] - hashed * _MIX[1]) & _MASK
            pool ^= pool >> 16
            made += _POOL
        word = (pool ^ _B[0]) * (_B[0] * _B[1]) & _MASK
        return word ^ (word >> 16)


class _Node:
    """An interval of the tree: rounded ends, and how its increment is split once it was.

    Attributes:
        factors: of the left half: share, inverse length, spread.
        seeds: of the split's normals, one a path.
        packed: seeds and factors as the kernel reads them.
    """

    __slots__ = (
        "depth", "end", "factors", "key", "left", "middle", "packed", "right", "seeds", "start",
    )  # fmt: skip
    middle: float
    left: _Node
    right: _Node
    factors: tuple[float, float, float]
    packed: tuple[bytes, bytes]

    def __init__(self, start: float, end: float, key: int = 0, depth: int = 0) -> None:
        self.start, self.end, self.key, self.depth = start, end, key, depth
        self.seeds: tuple[int, ...] = ()

    def split(self, entropies: Sequence[_Entropy]) -> None:
        """Make both halves."""
        self.middle = middle = round(0.5 * (self.end + self.start), _DIGITS)
        key, depth = 2 * self.key, self.depth + 1
        self.left = _Node(self.start, middle, key, depth)
        self.right = _Node(middle, self.end, key + 1, depth)
        inverse = 1 / (self.end - self.start)
        before, behind = middle - self.start, self.end - middle
        self.factors = before, inverse, math.sqrt(before * behind * inverse)
        spawn = [*_words(self.key), *_words(self.depth)]
        seeds = tuple([entropy.seed(spawn) for entropy in entropies])
        self.packed = _packed(seeds, self.factors)
        self.seeds = seeds  # last: another thread may be waiting for nothing else


def _packed(seeds: Sequence[int], factors: Sequence[float]) -> tuple[bytes, bytes]:
    return struct.pack(f"={len(seeds)}I", *seeds), struct.pack("=3f", *factors)


# --- the tree --------------------------------------------------------------------------------


class BrownianTree:
    """Paths over one interval, each a tree of its own.

    For each entropy e the values of ``torchsde.BrownianInterval(t0, t1, size=shape, entropy=e,
    tol=1e-6, pool_size=24, halfway_tree=True)``, and so of ``torchsde.BrownianTree``.

    Args:
        t0, t1: ends of the interval, finite, t0 not above t1.
        entropies: ints, not negative.
        shape, dtype, device: of one path's value.

    Raises:
        ValueError: the ends are not finite or not in order, or an entropy is negative.
    """

    def __init__(
        self,
        t0: float,
        t1: float,
        entropies: Sequence[int],
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if not -math.inf < t0 <= t1 < math.inf:
            rule = "t0 and t1 must be finite, t0 not above t1"
            raise ValueError(f"BrownianTree: {rule}, got {t0} and {t1}")
        self.shape, self.dtype, self.device = tuple(shape), dtype, torch.device(device)
        self._ends = round(t0, _DIGITS), round(t1, _DIGITS)
        self._spread = math.sqrt(t1 - t0)  # of the ends as given
        self._entropies = [_Entropy(entropy) for entropy in entropies]
        self._seeds = [entropy.seed(()) for entropy in self._entropies]
        self._packed = _packed(self._seeds, (self._spread, 0.0, 0.0))
        self._root, self._split = _Node(*self._ends), 0

    def __call__(
        self, ta: float, tb: float, sign: int = 1, divisor: Tensor | None = None
    ) -> Tensor:
        """Increments over [ta, tb], times the sign and over the divisor.

        Times beyond the ends count as the ends, with a warning if it is by more than a rounding;
        between times that round to the same 1e-6 there is no increment.

        Args:
            ta, tb: in order.
            divisor: one number.

        Returns:
            (entropies, *shape).

        Raises:
            ValueError: the times are not in order, or not numbers.
        """
        if not ta <= tb:
            raise ValueError(f"BrownianTree: ta must not be above tb, got {ta} and {tb}")
        low, high = self._ends
        slack = 1e-6 + 1e-6 * max(abs(low), abs(high))  # float32's rounding of a time
        if ta < low - slack or tb > high + slack:
            span = f"ta and tb must lie in [{low}, {high}], where the path is"
            warnings.warn(f"BrownianTree: {span}, got {ta} and {tb}", stacklevel=2)
        ta, tb = (round(min(max(t, low), high), _DIGITS) for t in (ta, tb))
        shape = len(self._entropies), *self.shape
        out = torch.empty(shape, dtype=self.dtype, device=self.device)
        if ta == tb:
            out.zero_()
        else:
            moves, nodes = self._plan(ta, tb)
            if self._able(out) and _agrees(_native.extension.isa()):
                over = 1.0
                if divisor is not None and self._number(divisor):
                    over, divisor = float(divisor), None
                self._fused(out, moves, nodes, sign, over)
                return out if divisor is None else out / divisor
            for i, path in enumerate(out):
                path.copy_(self._plain(moves, nodes, i))
        out *= sign
        return out if divisor is None else out / divisor

    def _plan(self, ta: float, tb: float) -> tuple[list[int], list[_Node]]:
        """The moves down to the nodes that make up [ta, tb], in order, and what is split for it."""
        moves: list[int] = []
        nodes: list[_Node] = []
        if self._split > _NODES:
            self._root, self._split = _Node(*self._ends), 0
        later = [(self._root, ta, tb)]
        while later:
            node, start, end = later.pop()
            while start != node.start or end != node.end:
                if not node.seeds:
                    node.split(self._entropies)
                    self._split += 1
                nodes.append(node)
                middle = node.middle
                if end <= middle:
                    moves.append(_LEFT)
                    node = node.left
                elif start >= middle:
                    moves.append(_RIGHT)
                    node = node.right
                else:
                    moves.append(_BOTH)
                    later.append((node.right, middle, end))
                    node, end = node.left, middle
            moves.append(_LEAF)
        return moves, nodes

    def _plain(self, moves: Sequence[int], nodes: Sequence[_Node], path: int) -> Tensor:
        """The increment of one path, by the operations that torchsde makes."""
        split = iter(nodes)
        waiting = [self._normals(self._seeds[path]) * self._spread]
        leaves: list[Tensor] = []
        for move in moves:
            value = waiting.pop()
            if move == _LEAF:
                leaves.append(leaves.pop() + value if leaves else value)
                continue
            node = next(split)
            share, inverse, spread = node.factors
            left = share * value * inverse + spread * self._normals(node.seeds[path])
            if move != _LEFT:
                waiting.append(value - left)
            if move != _RIGHT:
                waiting.append(left)
        return leaves[0]

    def _normals(self, seed: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        empty = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        return _torch_noise.fill_(empty, generator)

    @staticmethod
    def _number(divisor: Tensor) -> bool:
        """Whether torch takes this for float32's like, and nobody wants its derivative."""
        return divisor.is_cpu and divisor.dim() == 0 and values_only((divisor,))

    def _able(self, out: Tensor) -> bool:
        """Whether the kernel takes this result."""
        return (
            _native.extension is not None
            and out.is_cpu
            and out.dtype == torch.float32
            and math.prod(self.shape) >= _LEAST
            and values_only(())
        )

    def _fused(
        self, out: Tensor, moves: list[int], nodes: list[_Node], sign: float, divisor: float
    ) -> bool:
        """Fill (entropies, *shape) ``out``; false, with nothing changed, where no kernel can."""
        seeds, factors = zip(self._packed, *[node.packed for node in nodes], strict=True)
        return bool(
            _native.extension.brownian_tree(
                b"".join(seeds), b"".join(factors), bytes(moves), 1 + moves.count(_BOTH), sign,
                divisor, len(out), math.prod(self.shape), out.data_ptr(),
            )
        )  # fmt: skip


class BrownianTreeNoiseSampler:
    """Increments of a Brownian tree over the root of their length, the same tensors as from the
    class of this name of diffusers and of k-diffusion.

    Args:
        x: tensor whose shape, dtype and device the noise has.
        sigma_min, sigma_max: ends of the interval, numbers or tensors of one.
        seed: int, or one int a sample, each with a path of its own; None: drawn from torch's
            generator.
        transform: from sigma to the time of the path.

    Raises:
        ValueError: the seeds are not one a sample, or a seed is negative, or an end is not finite.
    """

    def __init__(
        self,
        x: Tensor,
        sigma_min: Any,
        sigma_max: Any,
        seed: int | Sequence[int] | None = None,
        transform: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> None:
        self.transform = transform
        first, last = (float(transform(torch.as_tensor(s))) for s in (sigma_min, sigma_max))
        self._direction = 1 if first < last else -1
        if seed is None:
            seed = int(torch.randint(0, 2**63 - 1, []))
        seeds: Any = seed
        self._each = not isinstance(seed, int) and hasattr(seed, "__len__")
        if self._each and len(seeds) != len(x):
            raise ValueError(
                "BrownianTreeNoiseSampler: seed must be an int or one a sample "
                f"({len(x)}), got {len(seeds)}"
            )
        paths, shape = (seeds, x.shape[1:]) if self._each else ([seeds], x.shape)
        ends = min(first, last), max(first, last)
        self._tree = BrownianTree(*ends, paths, shape, x.dtype, x.device)

    def __call__(self, sigma: Any, sigma_next: Any) -> Tensor:
        """The increment from sigma to sigma_next over the root of its length."""
        t0, t1 = (self.transform(torch.as_tensor(s)) for s in (sigma, sigma_next))
        start, end = float(t0), float(t1)
        sign = self._direction if start < end else -self._direction
        root = (t1 - t0).abs().sqrt()
        moved = self._tree(min(start, end), max(start, end), sign, root)
        return moved if self._each else moved[0]


@cache
def _agrees(isa: str) -> bool:
    """Whether the kernel's increments are those of torch's operations here: asked once a process.

    Two paths of more than one piece, with the values at the end that torch draws again.
    """
    if not _torch_noise._agrees(torch.float32, isa):
        return False
    tree = BrownianTree(0.03, 14.6, [1, 2**40], (1265,))
    moves, nodes = tree._plan(0.7, 3.1)
    got = torch.empty(2, 1265, dtype=torch.float32, device="cpu")
    if not tree._fused(got, moves, nodes, 1.0, 1.0):
        return False
    want = torch.stack([tree._plain(moves, nodes, path) for path in (0, 1)])
    return torch.equal(got.view(torch.int32), want.view(torch.int32))
