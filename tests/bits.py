"""Comparison as bits, for what is promised to be bit-equal; any NaN equals any NaN."""

from __future__ import annotations

import torch

_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def different_bits(a: torch.Tensor, b: torch.Tensor) -> int:
    """Number of elements of unlike bits; payload and sign of a NaN do not count, those of 0 do."""
    if a.dtype != b.dtype or a.shape != b.shape:
        raise AssertionError(
            f"cannot compare {a.dtype} {tuple(a.shape)} with {b.dtype} {tuple(b.shape)}"
        )
    a, b = a.detach().cpu().contiguous(), b.detach().cpu().contiguous()
    kind = _INTEGER[a.element_size()]
    unlike = a.view(kind) != b.view(kind)
    return int((unlike & ~(a.isnan() & b.isnan())).sum())


def assert_same_bits(got: torch.Tensor, expected: torch.Tensor, what: str = "result") -> None:
    """Fail with the count and the first unlike element."""
    count = different_bits(got, expected)
    if count == 0:
        return
    g, e = got.detach().cpu().contiguous().flatten(), expected.detach().cpu().contiguous().flatten()
    kind = _INTEGER[g.element_size()]
    unlike = (g.view(kind) != e.view(kind)) & ~(g.isnan() & e.isnan())
    i = int(unlike.nonzero()[0])
    raise AssertionError(
        f"{what}: {count} of {g.numel()} elements differ in bits; first at {i}: "
        f"{g[i].item()!r} for {e[i].item()!r}"
    )
