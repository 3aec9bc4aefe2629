"""A Brownian path that is a function of seed and time: which normals an increment is made of.

Levy's construction on a binary tree (the virtual Brownian tree of Li et al. 2020,
arXiv:2001.01328, section 4), with some of its upper levels cut off: W(low) = 0; time is split into
`cells`, a power of two, and nodes 0 to cells - 1 draw what W grows by over each. From there on node
i, of cells + c for cell c, draws W at the place where it splits its interval, given W at its two
ends, and its halves are the nodes 2i and 2i + 1. Below the last level, a leaf draws the bridge at
the time that is asked for. Every weight depends on times alone, so an increment is a short weighted
sum of normals, and nothing is stored.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from fastdiff.reference.noise import normals

# Weights below half a float32 ulp of an increment are left out.
_LEAST = 2.0**-25


class Tree(NamedTuple):
    """How time is split.

    Attributes:
        low, high: the ends of the path.
        depth: levels of splits; node numbers stay below 2**(depth + 1).
        geometric: split at the geometric mean of the ends, so that leaves have equal ratios, else
            at the arithmetic one.
        cells: parts whose increments are drawn first: a power of two up to 2**depth. The more, the
            fewer levels an increment goes down, and the more cells it may span.
    """

    low: float
    high: float
    depth: int
    geometric: bool
    cells: int = 1


class _Node(NamedTuple):
    """An interval [start, end] on the way to a time, split at `middle`; a leaf at that time."""

    start: float
    middle: float
    end: float

    def deviation(self) -> float:
        """Standard deviation of W(middle), given W(start) and W(end)."""
        left, right = self.middle - self.start, self.end - self.middle
        return math.sqrt(left * right / (self.end - self.start))

    def right(self, t: float) -> bool:
        return t >= self.middle

    def hat(self, t: float) -> float:
        """Share of what `middle` deviates by that W(t) takes over."""
        if self.right(t):
            return (self.end - t) / (self.end - self.middle)
        return (t - self.start) / (self.middle - self.start)

    def rise(self, t0: float, t1: float) -> float:
        """hat(t1) - hat(t0), without cancellation where both lie in the same half."""
        if self.right(t0) != self.right(t1):
            return self.hat(t1) - self.hat(t0)
        if self.right(t0):
            return (t0 - t1) / (self.end - self.middle)
        return (t1 - t0) / (self.middle - self.start)


def _middle(tree: Tree, start: float, end: float) -> float:
    return math.sqrt(start) * math.sqrt(end) if tree.geometric else start + (end - start) / 2


@lru_cache(maxsize=64)
def _edges(tree: Tree) -> tuple[float, ...]:
    """Ends of the cells."""
    edges = [tree.low, tree.high]
    while len(edges) <= tree.cells:
        between = [_middle(tree, a, b) for a, b in pairwise(edges)]
        edges = [e for both in zip(edges, between, strict=False) for e in both] + edges[-1:]
    return tuple(edges)


class _Descent(NamedTuple):
    """What W(t) is made of inside its cell: splits by number, and the leaf with its weight."""

    cell: int
    splits: dict[int, _Node]
    leaf: int
    weight: float


def _descend(tree: Tree, t: float) -> _Descent:
    edges = _edges(tree)
    cell = min(bisect_right(edges, t) - 1, tree.cells - 1)
    start, end, number = edges[cell], edges[cell + 1], tree.cells + cell
    found: dict[int, _Node] = {}
    while number < 1 << tree.depth:
        node = found[number] = _Node(start, _middle(tree, start, end), end)
        start, end = (node.middle, end) if node.right(t) else (start, node.middle)
        number = 2 * number + node.right(t)
    return _Descent(cell, found, number, _Node(start, t, end).deviation())


def increment(
    tree: Tree, t0: float, t1: float, least: float = _LEAST
) -> tuple[np.ndarray, np.ndarray]:
    """(W(t1) - W(t0)) / sqrt(abs(t1 - t0)) as a weighted sum of normals.

    Returns:
        numbers of the nodes, ascending, and the float64 weights of their normals: of unit norm, but
        for what weights up to `least` would add.

    Raises:
        ValueError: both times lie inside one leaf, where the tree does not tell them apart.
    """
    if t1 < t0:
        numbers, weights = increment(tree, t1, t0, least)
        return numbers, -weights
    before, after = _descend(tree, t0), _descend(tree, t1)
    if t0 == t1 or (before.leaf == after.leaf and before.weight and after.weight):
        raise ValueError("one leaf")
    edges = _edges(tree)
    found = {before.leaf: -before.weight}
    found[after.leaf] = after.weight + found.get(after.leaf, 0.0)
    for cell in range(before.cell, after.cell + 1):
        start, end = edges[cell], edges[cell + 1]
        found[cell] = (min(t1, end) - max(t0, start)) / math.sqrt(end - start)
    for i in before.splits.keys() | after.splits.keys():
        node = after.splits.get(i) or before.splits[i]
        if i in before.splits and i in after.splits:
            share = node.rise(t0, t1)
        else:
            share = node.hat(t1) if i in after.splits else -node.hat(t0)
        found[i] = share * node.deviation()
    length = math.sqrt(t1 - t0)
    kept = sorted((i, w / length) for i, w in found.items() if abs(w) > least * length)
    return np.array([i for i, _ in kept], np.int32), np.array([w for _, w in kept])


def weighted_normals(
    seeds: np.ndarray, size: int, numbers: np.ndarray, weights: np.ndarray, stream: int
) -> np.ndarray:
    """(len(seeds), size) float32 sums of weight * normal, added in the order given, from +0.

    Args:
        seeds: (n,) uint64.
        numbers, weights: (k,) counters of the draws, and float32 factors.
    """
    total = np.zeros((len(seeds), size), np.float32)
    for number, weight in zip(numbers, weights.astype(np.float32), strict=True):
        total = total + weight * normals(seeds, size, int(number), stream)
    return total
