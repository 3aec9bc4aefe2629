"""A model that is called with batches of chosen sizes only, so that a sample keeps its bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff._state import Model
from fastdiff.ops.noise import Stream, as_seeds, randn

_FINE = 16  # sizes that are tried, at most, between 1 and the limit
_LEAST = 8  # samples that a size is tried on: on few, a difference may be rounded away


class FixedSizes(nn.Module):
    """Calls a model with batches of the given sizes, larger ones in parts and others filled up.

    The sum that a convolution or a matrix product takes depends on the batch: which kernel runs is
    chosen by its size, and on several threads a sample's part of the sum by its place. So the
    same sample in batches of two sizes may differ in the last bits. Where the model gives a sample
    the same bits in all of ``sizes``, whatever stands beside it, this one gives it those bits in
    any batch.

    Args:
        model: ``model(x, t, **cond)`` with x (N, *S), t (N,) and tensors with one entry a sample;
            other arguments are handed on.
        sizes: sizes that it may be called with, at least 1.

    Raises:
        TypeError, ValueError: an argument breaks its rule.
    """

    def __init__(self, model: Model, sizes: Sequence[int]) -> None:
        super().__init__()
        if not callable(model):
            raise TypeError(f"FixedSizes: model must be callable, got {type(model).__name__}")
        if not all(isinstance(n, int) and not isinstance(n, bool) for n in sizes):
            raise TypeError(f"FixedSizes: sizes must be integers, got {sizes!r}")
        if not sizes or min(sizes) < 1:
            raise ValueError(f"FixedSizes: sizes must be at least 1, got {tuple(sizes)}")
        self.model = model
        self.sizes = tuple(sorted(set(sizes)))

    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """The model's output for any number of samples."""
        if len(x) == 0:
            return self.model(x, t, **cond)
        even = _even(len(x), self.sizes)
        parts = [self._part(x, t, cond, i, i + even) for i in range(0, len(x), even)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _part(self, x: Tensor, t: Tensor, cond: Mapping[str, Any], low: int, high: int) -> Tensor:
        count = len(x)
        samples = min(high, count) - low
        size = _filled(samples, self.sizes)

        def cut(value: Any) -> Any:
            if not (isinstance(value, Tensor) and value.dim() > 0 and len(value) == count):
                return value
            value = value[low:high]
            if size == samples:
                return value
            # the first sample again: what is valid for it is valid for the filling
            return torch.cat([value, value[:1].expand(size - samples, *value.shape[1:])])

        output: Tensor = self.model(cut(x), cut(t), **{k: cut(v) for k, v in cond.items()})
        if output.shape[:1] != (size,):
            raise ValueError(
                f"FixedSizes: model must return one entry a sample ({size}), "
                f"got {tuple(output.shape)}"
            )
        return output[:samples]


def _filled(samples: int, sizes: Sequence[int]) -> int:
    """The least of the rising sizes that holds the samples."""
    return next(n for n in sizes if n >= samples)


def _even(samples: int, sizes: Sequence[int]) -> int:
    """Samples of each part, the last one apart, where they do not fit the largest size."""
    return -(-samples // -(-samples // sizes[-1]))


def _work(limit: int, sizes: Sequence[int]) -> int:
    """Samples that are run for batches of 1 to ``limit``, a call counted as one more."""
    total = 0
    for n in range(1, limit + 1):
        even = _even(n, sizes)
        total += sum(_filled(min(even, n - i), sizes) + 1 for i in range(0, n, even))
    return total


def _candidates(limit: int) -> list[int]:
    """Sizes to try, largest first: powers of two, and multiples of a sixteenth of the limit."""
    step = max(1, limit // _FINE)
    powers = (1 << k for k in range(limit.bit_length()))
    return sorted({limit, *powers, *range(step, limit + 1, step)}, reverse=True)


def _agree(one: Tensor, other: Tensor) -> bool:
    """Whether the samples that both have, the last ones, are the same."""
    both = min(len(one), len(other))
    return torch.equal(one[-both:], other[-both:])


def agreeing_sizes(
    model: Model,
    limit: int,
    shape: Sequence[int],
    cond: Mapping[str, Tensor],
    *,
    times: tuple[float, float],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[int, ...]:
    """Batch sizes in all of which the model gives a sample the same bits.

    Each size is tried on noise. Which kernels run does not depend on the values, so what agrees
    here in every bit agrees elsewhere; it does depend on the machine, the number of threads and the
    dtype, so this is measured where the model will run. It takes some thirty model calls.

    Args:
        model: as for `FixedSizes`.
        limit: the largest size to try.
        shape: of one sample.
        cond: arguments of the model for one sample each, without a sample axis.
        times: lowest and highest model time.
        dtype: of the model input.
        device: of the model.

    Returns:
        The sizes, rising. Of the sets of sizes that agree, the one that costs least over batches of
        1 to ``limit``; where a sample's bits depend on its place, a size is in none.

    Raises:
        ValueError: the model gives other bits each time, or NaN.
    """
    x = randn(as_seeds(0, limit), shape, stream=Stream.INITIAL, device=device).to(dtype)
    t = torch.linspace(*times, limit, dtype=torch.float32, device=device)
    every = {k: v.to(device).expand(limit, *v.shape) for k, v in cond.items()}

    @torch.no_grad()
    def outputs(at: Tensor, size: int) -> Tensor:
        """Of the samples at ``at``, in batches of ``size``."""
        return torch.cat(
            [
                model(x[p], t[p], **{k: v[p] for k, v in every.items()})
                for p in torch.split(at, size)
            ]
        )

    found: list[tuple[Tensor, list[int]]] = []
    for size in _candidates(limit):
        count = max(1, min(limit, _LEAST) // size) * size
        # the last samples: of each size, a sample has another place and other neighbours
        at = torch.arange(limit - count, limit, device=device)
        given = outputs(at, size)
        same = next((sizes for whole, sizes in found if _agree(whole, given)), None)
        if same is not None:
            same.insert(0, size)
        # moved by one: wherever two places differ, some sample goes from one to the other
        elif torch.equal(outputs(at.roll(1), size), given.roll(1, 0)):
            found.append((given, [size]))
    if not found:
        raise ValueError(
            "agreeing_sizes: model must repeat its output, got others (or NaN) each time"
        )
    return tuple(min(found, key=lambda entry: _work(limit, entry[1]))[1])
