"""Two generators alike, one drawn from by us and one by torch."""

from __future__ import annotations

import torch
from bits import assert_same_bits

from fastdiff.integrations._torch_noise import randn

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _rounds(dtype: torch.dtype) -> bool:
    """Whether torch's normals of the dtype are its float32 ones, rounded; in 2.11 they are not."""
    wide, narrow = (torch.Generator().manual_seed(0) for _ in range(2))
    normals = torch.randn(64, generator=wide).to(dtype)
    return torch.equal(normals, torch.randn(64, generator=narrow, dtype=dtype))


# what the kernel draws with this torch; what else is asked for, torch draws
OURS = tuple(dtype for dtype in DTYPES if _rounds(dtype))


def twins(seed: int) -> tuple[torch.Generator, torch.Generator]:
    """One generator for us and its like for torch."""
    return torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)


def assert_same_draw(
    size: int, ours: torch.Generator, theirs: torch.Generator, dtype: torch.dtype = torch.float32
) -> None:
    got = randn((size,), ours, dtype)
    expected = torch.randn((size,), generator=theirs, dtype=dtype)
    what = f"{size} {dtype}, {torch.get_num_threads()} threads"
    assert_same_bits(got, expected, what)
    assert torch.equal(ours.get_state(), theirs.get_state()), f"state after {what}"
