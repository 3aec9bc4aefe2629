"""Two generators alike, one drawn from by us and one by torch."""

from __future__ import annotations

import torch
from bits import assert_same_bits

from fastdiff.integrations._torch_noise import randn

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
