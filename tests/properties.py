"""What the property tests share: random tensors in guarded memory, and laws that every op keeps.

FASTDIFF_EXAMPLES is the number of examples a property, 8 where it is not set; docs/reliability.md
says how far it has been turned up.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from bits import assert_same_bits
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from tables import Guard

EXAMPLES = int(os.environ.get("FASTDIFF_EXAMPLES", "8"))
# derandomized: a failure is the same for everyone, and a run in CI says nothing by chance
more = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip

Tensors = dict[str, torch.Tensor | None]
Results = tuple[torch.Tensor, ...]

DTYPES = st.sampled_from((torch.float32, torch.bfloat16, torch.float16))
# nothing, one, around vectors of 4 to 32 elements, around the chunk of 1,024
SIZES = st.sampled_from((0, 1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 64, 65, 127, 1023, 1025))
BATCHES = st.sampled_from((0, 1, 2, 3, 5, 9))
SEEDS = st.integers(0, 2**32 - 1)
# how a tensor lies in memory; each holds the same values
VIEWS = st.sampled_from(("guarded", "transposed", "every second", "expanded"))
# values that end or break arithmetic: signed zero, subnormals, the ends of the range, no numbers
EDGES = (0.0, -0.0, 1e-45, -1e-40, 1e-38, 3e38, -3e38, float("inf"), float("-inf"), float("nan"))


def values(rng: np.random.Generator, shape: tuple[int, ...], edges: bool) -> torch.Tensor:
    """Normals of any scale, one in four an edge where those are wanted."""
    x = rng.standard_normal(shape) * 10.0 ** rng.integers(-3, 3)
    if edges:
        x = np.where(rng.random(shape) < 0.25, rng.choice(EDGES, shape), x)
    return torch.from_numpy(np.asarray(x, np.float32))


def lay(x: torch.Tensor, view: str) -> torch.Tensor:
    """The same values in other memory."""
    if view == "expanded" and x.dim() and len(x):
        return x[:1].expand(x.shape)  # every sample the first one
    if view == "transposed" and x.dim() > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if view == "every second" and x.dim() > 1:
        return torch.stack((x, torch.full_like(x, float("nan"))), dim=-1)[..., 0]
    if not x.is_floating_point():
        return x.clone()
    guard = Guard(tuple(x.shape), dtype=x.dtype)
    guard.tensor.copy_(x)
    return guard.tensor


def assert_laws(
    run: Callable[..., Results], batched: Tensors, shared: Tensors | None = None
) -> None:
    """No input changes, a repeat gives the same bits, and a sample those that it has in any batch.

    Args:
        run: the op; takes all tensors by name and returns results with a leading batch axis.
        batched: tensors with one entry a sample.
        shared: tensors of all samples.
    """
    shared = shared or {}
    given = {**batched, **shared}
    before = {k: None if t is None else t.clone() for k, t in given.items()}
    results = [t.clone() for t in run(**given)]
    for name, t in given.items():
        was = before[name]
        if t is not None and was is not None:
            same = torch.equal if not t.is_floating_point() else _same
            assert same(t, was), f"{name} was written"

    def expect(got: Results, want: list[torch.Tensor], law: str) -> None:
        for i, (g, w) in enumerate(zip(got, want, strict=True)):
            assert_same_bits(g, w, f"result {i}, {law}")

    expect(run(**given), results, "again")
    count = len(next(t for t in batched.values() if t is not None))
    order = torch.arange(count).flip(0)

    def part(index: Any) -> Results:
        return run(**{k: None if t is None else t[index] for k, t in batched.items()}, **shared)

    expect(part(order), [r[order] for r in results], "permuted")
    if count > 1:
        halves = (part(slice(0, count // 2)), part(slice(count // 2, count)))
        joined = tuple(torch.cat(pair) for pair in zip(*halves, strict=True))
        expect(joined, results, "split")


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    assert_same_bits(a, b, "input")
    return True
